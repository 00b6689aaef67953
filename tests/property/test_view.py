"""Views, transactions and folding against a plain dict that interprets effects by the book."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.client.delegation import Delegation
from dfs.codec import pack, unpack
from dfs.volume import effects as fx
from dfs.volume import entries, items, tree
from dfs.volume.fold import fold
from dfs.volume.localtxn import LocalTxn
from dfs.volume.node import Missing
from dfs.volume.overlay import Overlay
from dfs.volume.view import NodeCache, View

SALT = b"s" * 16
TARGET = 60
INOS = (5, 6)
GROUPS = [items.group(i, t) for i in INOS for t in (items.INODE, items.ENTRY, items.EXTENT)]
SPOTS = range(0, 60, 8)
KEYS = (
    [items.inode_key(i) for i in INOS]
    + [items.entry_key(i, h) for i in INOS for h in SPOTS]
    + [items.extent_key(i, o) for i in INOS for o in SPOTS]
)
HOT = [KEYS[0], KEYS[3], KEYS[-1]]  # drawn often, so that effects meet
keys = st.one_of(st.sampled_from(HOT), st.sampled_from(KEYS))
values = st.tuples(st.just(1), st.integers(-5, 5), st.integers(0, 9)).map(pack)
changes = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from([fx.SET, fx.ADD, fx.LAST]), st.integers(-9, 9)),
    min_size=1,
    max_size=3,
).map(tuple)


@st.composite
def ranges(draw):
    ino = draw(st.sampled_from(INOS))
    kind = draw(st.sampled_from([items.ENTRY, items.EXTENT]))
    low, high = sorted(draw(st.tuples(st.integers(0, 62), st.integers(0, 62))))
    prefix = items.group(ino, kind)
    start = prefix + low.to_bytes(8, "big")
    end = prefix + high.to_bytes(8, "big")
    if draw(st.booleans()):
        start = prefix
    if draw(st.booleans()):
        end = items.group_end(prefix)
    return start, end


effect = st.one_of(
    st.tuples(st.just(fx.PUT), keys, values),
    st.tuples(st.just(fx.PUT), keys, values),
    st.tuples(st.just(fx.PATCH), keys, changes),
    st.tuples(st.just(fx.DELETE), keys),
    ranges().map(lambda r: (fx.DELETE_RANGE, *r)),
)
batch = st.lists(effect, max_size=8).map(tuple)
JOURNALS = (st.lists(batch, min_size=1, max_size=12), st.data())
TRANSACTIONS = (batch, batch, batch, st.data())
WRITES = (st.lists(batch, max_size=8), st.integers(0, 9))


def reference(state, wanted):
    """What effects mean, written once more and in another way."""
    state = dict(state)
    for e in wanted:
        if e[0] == fx.PUT:
            state[e[1]] = e[2]
        elif e[0] == fx.DELETE:
            state.pop(e[1], None)
        elif e[0] == fx.DELETE_RANGE:
            state = {k: v for k, v in state.items() if not e[1] <= k < e[2]}
        elif e[1] in state:
            fields = list(unpack(state[e[1]]))
            for field, op, operand in e[2]:
                if 0 < field < len(fields):
                    fields[field] = fields[field] + operand if op == fx.ADD else operand
            state[e[1]] = pack(tuple(fields))
    return state


def entry(wanted, sid=7):
    return entries.encode(entries.DATA, 1, ((sid, 1, (True,), wanted),))


class Fetching:
    """A view with a cold cache, and the store behind it."""

    def __init__(self):
        self.blobs = {}
        self.view = View(NodeCache(), b"", 0, SALT)
        self.fetched = 0

    def __call__(self, call, *args):
        before = self.view.seq
        while True:
            try:
                return call(*args)
            except Missing as e:
                wanted = e.hashes
            assert self.view.seq == before  # nothing applied
            assert not any(name in self.view.nodes for name in wanted)
            self.view.nodes.add({name: self.blobs[name] for name in wanted})
            self.fetched += len(wanted)

    def checkpoint(self, root, wanted):
        cache = NodeCache()
        while True:
            try:
                root, new = fold(cache.get, root, SALT, wanted, TARGET)
                break
            except Missing as e:
                cache.add({h: self.blobs[h] for h in e.hashes})
        self.blobs.update(new)
        return root


@given(*JOURNALS)
@settings(max_examples=120, deadline=None)
def test_view_and_fold_follow_the_journal(journal, data):
    f = Fetching()
    view = f.view
    states = [{}]
    for wanted in journal:
        states.append(reference(states[-1], wanted))
    roots = {0: b""}
    for seq, wanted in enumerate(journal, 1):
        before = f(lambda: dict(view.scan()))
        changed = f(view.apply_entry, seq, entry(wanted))
        state = states[seq]
        assert f(lambda: dict(view.scan())) == state
        for key in before.keys() | state.keys():
            if before.get(key) != state.get(key):
                assert key in changed or key[:9] in changed
        if data.draw(st.booleans()):
            covered = data.draw(st.integers(view.root_seq, seq))
            root = roots[view.root_seq]
            root = f.checkpoint(root, [e for b in journal[view.root_seq : covered] for e in b])
            assert root == tree.build(sorted(states[covered].items()), SALT, TARGET)[0]
            roots[covered] = root
            view.nodes.clear()
            view.rebase(root, covered)
            assert view.root_seq == covered
        for key in data.draw(st.lists(keys, max_size=6)):
            assert f(view.get, key) == state.get(key)
        start, end = data.draw(ranges())
        got = f(lambda: view.begin().scan_range(start, end))  # noqa: B023 - called at once
        assert got == sorted((k, v) for k, v in state.items() if start <= k < end)


@given(*TRANSACTIONS)
@settings(max_examples=400, deadline=None)
def test_transactions_see_their_own_effects(in_tree, in_overlay, own, data):
    f = Fetching()
    begin = data.draw(st.sampled_from([View.begin, LocalTxn]))
    f.view.reset(f.checkpoint(b"", in_tree), 1)
    f(f.view.apply_entry, 2, entry(in_overlay))
    base = reference(reference({}, in_tree), in_overlay)
    touched = st.sampled_from([e[1] for e in own if e[0] != fx.DELETE_RANGE] + HOT)
    reads = data.draw(st.lists(st.tuples(st.integers(0, len(own)), touched), max_size=8))
    scans = data.draw(st.lists(st.tuples(st.integers(0, len(own)), ranges()), max_size=3))

    def operation():
        txn = begin(f.view)
        seen = []
        for i in range(len(own) + 1):
            seen += [(i, key, txn.get(key)) for at, key in reads if at == i]
            seen += [(i, span, txn.scan_range(*span)) for at, span in scans if at == i]
            if i < len(own):
                txn.extend(own[i : i + 1])
        return txn, seen

    txn, seen = f(operation)
    judged = begin is not LocalTxn
    for i, what, result in seen:
        state = reference(base, own[:i])
        if isinstance(what, bytes):
            assert result == state.get(what)
            assert not judged or what in txn.keys
        else:
            assert result == sorted((k, v) for k, v in state.items() if what[0] <= k < what[1])
            assert not judged or what[0][:9] in txn.groups
    if not judged:
        assert f(lambda: dict(f.view.scan())) == base  # the view is untouched
        f.view.commit_local(txn.changes, txn.ranges, 1)
        assert f(lambda: dict(f.view.scan())) == reference(base, own)
        return
    kept = [e for e in own if e[0] != fx.DELETE_RANGE or e[1] < e[2]]
    assert txn.effects == kept
    assert txn.base == 2
    assert f(lambda: dict(f.view.scan())) == base  # the view is untouched
    f(f.view.apply_entry, 3, entry(tuple(txn.effects)))
    assert f(lambda: dict(f.view.scan())) == reference(base, own)


@given(batch, st.lists(st.tuples(batch, st.booleans()), max_size=8), st.data())
@settings(max_examples=200, deadline=None)
def test_what_was_done_here_is_a_prefix_in_the_journal(in_tree, operations, data):
    """Batches as entries lead everybody else to the same states, and the holder sees the last."""
    f = Fetching()
    f.view.reset(f.checkpoint(b"", in_tree), 1)
    state, covered = reference({}, in_tree), list(in_tree)
    follower = Fetching()
    follower.blobs = f.blobs
    follower.view.reset(f.view.root, 1)
    here = Delegation()
    waiting = []

    def confirm():
        seq = f.view.seq + 1
        done, after = waiting.pop(0)
        wanted = done.effects
        f.view.confirm_local(seq, done.keys, done.ranges, done.number)
        here.confirmed(done)
        follower(follower.view.apply_entry, seq, entry(wanted))
        assert follower(lambda: dict(follower.view.scan())) == after
        covered.extend(wanted)
        if data.draw(st.booleans()):
            root = f.checkpoint(b"", covered)
            f.view.rebase(root, seq)
            f.view.nodes.clear()

    for wanted, close in operations:

        def operation(wanted=wanted):
            txn = LocalTxn(f.view)
            txn.extend(wanted)
            here.commit(f.view, txn, 0, 0.0)

        f(operation)
        state = reference(state, wanted)
        assert f(lambda: dict(f.view.scan())) == state
        for key in data.draw(st.lists(keys, max_size=3)):
            assert f(f.view.get, key) == state.get(key)
        if close:
            if not waiting:
                waiting.append((here.first(f.view), state))
            elif data.draw(st.booleans()):
                confirm()
        assert f(lambda: dict(f.view.scan())) == state
    while here.batches:
        if not waiting:
            waiting.append((here.first(f.view), state))
        confirm()
    assert here.pending == 0
    # Nothing is ahead of the journal any more: a checkpoint takes the place of all of it.
    f.view.rebase(f.checkpoint(b"", covered), f.view.seq)
    assert not f.view._overlay.items
    assert not f.view._overlay.ranges
    assert f(lambda: dict(f.view.scan())) == state
    f(f.view.apply_entry, f.view.seq + 1, entry(((fx.PUT, KEYS[0], pack((1, 7))),)))
    assert f(f.view.get, KEYS[0]) == pack((1, 7))


@given(batch, st.sampled_from(GROUPS), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_scanning_by_pages_meets_every_item_once(wanted, group, limit):
    f = Fetching()
    f(f.view.apply_entry, 1, entry(wanted))
    whole = f(lambda: f.view.begin().scan(group))
    pages, after = [], b""
    while page := f(lambda: f.view.begin().scan(group, after, limit)):  # noqa: B023 - called at once
        assert len(page) <= limit
        pages += page
        after = page[-1][0]
    assert (
        pages == whole == sorted((k, v) for k, v in reference({}, wanted).items() if k[:9] == group)
    )


@given(*WRITES)
@settings(max_examples=150, deadline=None)
def test_changed_since_misses_no_write(journal, base):
    """Whatever changed a value, except by ADD and LAST, is reported, for its key and its group."""
    f = Fetching()
    state, base = {}, min(base, len(journal))
    changed = set()
    for seq, wanted in enumerate(journal, 1):
        for e in wanted:
            new = reference(state, (e,))
            quiet = e[0] == fx.PATCH and not any(c[1] == fx.SET for c in e[2])
            if seq > base and not quiet:
                changed |= {k for k in new.keys() | state.keys() if new.get(k) != state.get(k)}
            state = new
        f(f.view.apply_entry, seq, entry(wanted))
    for key in changed:
        assert f.view.changed_since(base, [key], [])
        assert f.view.changed_since(base, [], [key[:9]])
    if not any(wanted for wanted in journal[base:]):
        assert not f.view.changed_since(base, KEYS, GROUPS)
    assert not f.view.changed_since(len(journal), KEYS, GROUPS)


def test_entries_must_come_in_order():
    f = Fetching()
    with pytest.raises(ValueError, match="next"):
        f.view.apply_entry(2, entry(()))
    f.view.apply_entry(1, entry(()))
    with pytest.raises(ValueError, match="next"):
        f.view.apply_entry(1, entry(()))
    with pytest.raises(ValueError, match="checkpoint"):
        f.view.rebase(b"", 2)


def test_checkpoint_entry_moves_the_view():
    f = Fetching()
    wanted = ((fx.PUT, KEYS[0], pack((1, 1))), (fx.PUT, KEYS[5], pack((1, 2))))
    f.view.apply_entry(1, entry(wanted))
    f.view.apply_entry(2, entry(((fx.DELETE, KEYS[5]),)))
    root = f.checkpoint(b"", wanted)
    f.view.apply_entry(3, entries.encode(entries.CHECKPOINT, 1, 1, root, ()))
    assert (f.view.root, f.view.root_seq, f.view.seq) == (root, 1, 3)
    assert f(f.view.get, KEYS[0]) == pack((1, 1))
    assert f(f.view.get, KEYS[5]) is None
    assert f.view.statistics()["overlay"] == 1


def test_a_patch_fetches_what_it_needs_in_one_round_trip_a_level():
    f = Fetching()
    wanted = [(fx.PUT, k, pack((1, 0))) for k in KEYS]
    f.view.reset(f.checkpoint(b"", wanted), 1)
    patches = tuple((fx.PATCH, k, ((1, fx.ADD, 1),)) for k in KEYS)
    rounds = 0
    while True:
        try:
            f.view.apply_entry(2, entry(patches))
            break
        except Missing as e:
            rounds += 1
            f.view.nodes.add({h: f.blobs[h] for h in e.hashes})
    assert rounds == f.view.nodes.get(f.view.root).level + 1
    assert f.view.get(KEYS[7]) == pack((1, 1))


def test_scans_read_the_index_not_the_whole_overlay():
    overlay = Overlay(lambda key: None)
    for i in range(1000):
        overlay.put(items.entry_key(i, 5), b"v")
    assert overlay.keys(items.group(3, items.ENTRY), items.group(3, items.ENTRY + 1)) == [
        items.entry_key(3, 5)
    ]
