"""The conflict window against a list of everything that was written, indexed early or late."""

from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from dfs.volume import effects as fx
from dfs.volume import items, window
from dfs.volume.window import Window

KEYS = [
    *(items.inode_key(i) for i in (1, 2)),
    *(items.entry_key(1, h) for h in (10, 20)),
    *(items.extent_key(i, at) for i in (1, 2) for at in (0, 1)),
]
GROUPS = sorted({key[: items.GROUP_SIZE] for key in KEYS})
PATCHES = (
    ((1, fx.ADD, 1), (2, fx.LAST, 5)),
    ((1, fx.ADD, 1), (2, fx.SET, 5)),
)

effect = st.one_of(
    st.tuples(st.just(fx.PUT), st.sampled_from(KEYS), st.just(b"")),
    st.tuples(st.just(fx.DELETE), st.sampled_from(KEYS)),
    st.tuples(st.just(fx.PATCH), st.sampled_from(KEYS), st.sampled_from(PATCHES)),
    st.sampled_from(GROUPS).map(lambda g: (fx.DELETE_RANGE, g, items.group_end(g))),
)
record = st.tuples(st.just("record"), st.integers(0, 2), st.lists(effect, max_size=4))
look = st.tuples(st.just("look"), st.integers(0, 6), st.just(None))
forget = st.tuples(st.just("forget"), st.integers(0, 6), st.just(None))
steps = st.lists(st.one_of(record, record, record, look, forget), max_size=40)


class Eager(Window):
    """Indexes each entry as it comes."""

    def record(self, seq, effects):
        super().record(seq, effects)
        self._index()


class Lazy(Window):
    """The mutant: does not look at what waits when it is asked."""

    def changed_since(self, base, keys, groups=()):
        entries, self._entries = self._entries, []
        try:
            return super().changed_since(base, keys, groups)
        finally:
            self._entries = entries


def asked(w, base):
    return [
        *(w.changed_since(base, [key]) for key in KEYS),
        *(w.changed_since(base, [], [group]) for group in GROUPS),
    ]


def truth(history, base):
    """What `asked` has to answer: of all effects after `base`, by the definition."""
    keys, groups = set(), set()
    for seq, effects in history:
        if seq > base:
            listed, touched = fx.writes(effects)
            keys.update(listed)
            groups.update(touched)
            keys.update(
                key
                for e in effects
                if e[0] == fx.DELETE_RANGE
                for key in KEYS
                if key[: items.GROUP_SIZE] == e[1]
            )
    return [*(key in keys for key in KEYS), *(group in groups for group in GROUPS)]


def run(kind, script, limit, waiting):
    """The answers of two windows to one script: `kind`, and one that indexes at once."""
    with mock.patch.object(window, "WAITING", waiting):
        w, eager = kind(0, limit), Eager(0, limit)
        seq, history = 0, []
        for what, number, effects in script:
            if what == "record":
                seq += number  # 0: another part of the same entry
                seq = max(seq, 1)
                history.append((seq, effects))
                w.record(seq, effects)
                eager.record(seq, effects)
            elif what == "forget":
                w.forget(seq - number)
                eager.forget(seq - number)
            else:
                base = max(0, seq - number)
                yield asked(w, base), asked(eager, base)
                if base >= w.floor:
                    yield asked(w, base), truth(history, base)
            yield w.floor, eager.floor
        yield len(w), len(eager)
        for base in range(seq + 1):
            yield asked(w, base), asked(eager, base)


@given(steps, st.sampled_from([6, 12, 1000]), st.sampled_from([0, 3, 1000]))
def test_no_answer_depends_on_when_entries_are_indexed(script, limit, waiting):
    for lazy, eager in run(Window, script, limit, waiting):
        assert lazy == eager


def test_a_window_that_does_not_look_at_what_waits_is_found():
    script = [("record", 1, [(fx.PUT, KEYS[0], b"")]), ("look", 1, None)]
    assert any(lazy != eager for lazy, eager in run(Lazy, script, 1000, 1000))


def test_what_waits_is_bounded():
    w = Window(0, 1 << 62)
    for seq in range(1, 5000):
        w.record(seq, [(fx.PUT, items.inode_key(seq), b"x" * 100)] * 3)
        assert sum(len(effects) for _, effects in w._entries) <= window.WAITING
    assert w.changed_since(4998, [items.inode_key(4999)])
    values = [b"%05d" % n * 10_000 for n in range(30)]
    for value in values:
        w.record(4999, [(fx.PUT, KEYS[1], value)])
        assert sum(len(e[2]) for _, effects in w._entries for e in effects) <= window.HELD
    w.record(5000, [(fx.PUT, KEYS[0], b"")])
    w.forget(5000)
    assert not w._entries
    assert len(w) == 0
