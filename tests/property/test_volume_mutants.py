"""The checkers of the volume state can fail: each mutant is a mistake that one of them must catch."""

import inspect

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from dfs.volume import effects as fx
from dfs.volume import extents, node, overlay, tree, treeedit, view, window
from dfs.volume.localtxn import LocalTxn
from tests.property import test_extents, test_tree, test_view

CHECKERS = {
    "canonical": (test_tree.test_incremental_equals_from_scratch, test_tree.HISTORIES),
    "journal": (test_view.test_view_and_fold_follow_the_journal, test_view.JOURNALS),
    "transaction": (test_view.test_transactions_see_their_own_effects, test_view.TRANSACTIONS),
    "window": (test_view.test_changed_since_misses_no_write, test_view.WRITES),
    "file": (test_extents.test_file_equals_a_bytearray, test_extents.OPERATIONS),
}


def run(name, examples):
    """Run a checker's property again, without shrinking."""
    test, strategies = CHECKERS[name]
    inner = test.hypothesis.inner_test
    names = inspect.signature(inner).parameters

    def again(**drawn):
        inner(**drawn)

    settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )(given(**dict(zip(names, strategies, strict=True)))(again))()


def boundary_by_position(salt, level, target=0):
    count = iter(range(1 << 60))
    return lambda key, size: next(count) % 3 == 2


def whole_node_kept(cursor, edits, done, cut, absent, _recut=treeedit._recut):
    """Does not go on into the next node when an edit took the boundary away."""
    last = cursor.last
    cursor_type = type(cursor)
    original = cursor_type.last
    cursor_type.last = lambda self: True
    try:
        return _recut(
            cursor, [e for e in edits if e[0] <= cursor.node.keys[-1] or last()], done, cut, absent
        )
    finally:
        cursor_type.last = original


def range_forgets_the_base(self, start, end):
    for key in self.keys(start, end):
        self.items[key] = (self.seq, None)


def range_keeps_the_overlay(self, start, end):
    self.ranges.setdefault(start[:9], []).append((start, end, self.seq))


def drop_all(self, covered):
    self.clear()


def drop_ranges(self, covered, _drop=overlay.Overlay.drop):
    _drop(self, covered)
    self.ranges = {}


def scan_base_only(self, base, start, end):
    yield from base


def put_over_a_patch(self, key, value):
    self._overlaid().put(key, value)


def last_as_add(value, changes, _patched=fx.patched):
    return _patched(value, [(f, fx.ADD if op == fx.LAST else op, v) for f, op, v in changes])


def patch_creates(target, effects, _apply=fx.apply):
    for e in effects:
        if e[0] == fx.PATCH and target.get(e[1]) is None:
            target.put(e[1], b"\x91\x01")
        _apply(target, (e,))


def no_ranges(self, seq, effects, _record=window.Window.record):
    _record(self, seq, [e for e in effects if e[0] != fx.DELETE_RANGE])


def no_groups(self, base, keys, groups=(), _changed_since=window.Window.changed_since):
    return _changed_since(self, base, keys)


def forgets_the_tail(ino, found, holes, replaced, _cut=extents._cut_out):
    return [e for e in _cut(ino, found, holes, replaced) if e[0] == fx.DELETE]


def chunk_offset_stays(self, start, end, _part=extents.Extent.part):
    return _part(self, start, end)._replace(chunk_offset=self.chunk_offset)


def truncate_keeps_the_last(ino, found, size, _plan=extents.plan_truncate):
    return _plan(ino, [], size)


def local_ranges_hide_nothing(self, key):
    return self.changes[key] if key in self.changes else self.view.get(key)


def local_patch_of_the_view(self, key, changes):
    old = self.view.get(key)
    if old is not None:
        self.changes[key] = fx.patched(old, changes)


MUTANTS = [
    ("canonical", treeedit, "cutter", boundary_by_position),
    ("canonical", treeedit, "_recut", whole_node_kept),
    ("canonical", treeedit, "_shrink", lambda get_node, root, nodes: root),
    ("journal", overlay.Overlay, "delete_range", range_forgets_the_base),
    ("journal", overlay.Overlay, "delete_range", range_keeps_the_overlay),
    ("journal", overlay.Overlay, "drop", drop_all),
    ("journal", overlay.Overlay, "drop", drop_ranges),
    ("journal", fx, "patched", last_as_add),
    ("journal", fx, "apply", patch_creates),
    ("transaction", overlay.Overlay, "merge", scan_base_only),
    ("transaction", view.Txn, "_change", put_over_a_patch),
    ("transaction", view.Txn, "_settle", lambda self, key, own: None),
    ("transaction", LocalTxn, "get", local_ranges_hide_nothing),
    ("transaction", LocalTxn, "patch", local_patch_of_the_view),
    ("window", window.Window, "record", no_ranges),
    ("window", window.Window, "changed_since", no_groups),
    ("file", extents, "_cut_out", forgets_the_tail),
    ("file", extents.Extent, "part", chunk_offset_stays),
    ("file", extents, "plan_truncate", truncate_keeps_the_last),
]  # fmt: skip


@pytest.mark.parametrize(
    ("checker", "where", "name", "mutant"),
    MUTANTS,
    ids=lambda v: getattr(v, "__name__", v) if callable(v) or isinstance(v, str) else "",
)
def test_mutant_is_caught(monkeypatch, checker, where, name, mutant):
    monkeypatch.setattr(where, name, mutant)
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the checker trips over
        run(checker, 400)


@pytest.mark.parametrize("checker", CHECKERS)
def test_no_mutant_passes(checker):
    assert node.cutter is treeedit.cutter
    assert tree.apply is treeedit.apply
    run(checker, 50)
