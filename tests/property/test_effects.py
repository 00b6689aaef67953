"""Effects: how a patch computes, and that every interpreter agrees with `apply`."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.codec import pack, unpack
from dfs.volume import effects as fx
from dfs.volume import entries
from dfs.volume.fold import fold
from dfs.volume.overlay import Overlay
from dfs.volume.tree import build
from dfs.volume.view import NodeCache, View
from tests.property.test_view import TARGET, batch, entry, reference

SALT = b"s" * 16
numbers = st.integers(fx.INT_MIN, fx.INT_MAX)


@given(numbers, numbers)
def test_sums_saturate_at_64_bits(old, delta):
    value = fx.patched(pack((1, old)), ((1, fx.ADD, delta),))
    assert unpack(value) == (1, min(max(old + delta, -(1 << 63)), (1 << 64) - 1))


def test_patches_that_do_not_fit_change_nothing():
    value = pack((1, 5, b"x"))
    for change in (
        (0, fx.SET, 9),
        (3, fx.SET, 9),
        (-1, fx.SET, 9),
        (2, fx.ADD, 1),
        (1, fx.ADD, b""),
    ):
        assert fx.patched(value, (change,)) == value


def test_fields_are_changed_in_order():
    value = pack((1, 5, 6))
    changes = ((1, fx.SET, 7), (1, fx.ADD, 1), (2, fx.LAST, 9), (2, fx.ADD, -10))
    assert unpack(fx.patched(value, changes)) == (1, 8, -1)


def test_the_effects_of_an_entry_are_those_of_all_its_sessions():
    first, second = (fx.DELETE, b"a" * 9), (fx.DELETE, b"b" * 9)
    parts = ((7, 1, (True,), (first,)), (8, 3, (True, False), (second, first)))
    decoded = entries.decode(entries.encode(entries.DATA, 1, parts))
    assert fx.of_entry(decoded) == (first, second, first)
    assert fx.of_entry(entries.decode(entries.encode(entries.DATA, 1, ()))) == ()
    assert fx.of_entry(entries.decode(entries.encode(entries.CLOSE, 1, (5,)))) == ()


@given(st.lists(batch, max_size=6))
@settings(max_examples=100, deadline=None)
def test_overlay_view_and_fold_agree(journal):
    state = {}
    overlay = Overlay(lambda key: None)
    view = View(NodeCache(), b"", 0, SALT)
    stepwise, blobs = b"", {}
    cache = NodeCache()
    for seq, wanted in enumerate(journal, 1):
        state = reference(state, wanted)
        overlay.seq = seq
        fx.apply(overlay, wanted)
        view.apply_entry(seq, entry(wanted))
        stepwise, new = fold(cache.get, stepwise, SALT, wanted, TARGET)
        cache.add(new)
        blobs.update(new)
    want = build(sorted(state.items()), SALT, TARGET)[0]
    assert {k: v for k, (_, v) in overlay.items.items() if v is not None} == state
    assert dict(view.scan()) == state
    assert stepwise == want
    everything = [effect for wanted in journal for effect in wanted]
    assert fold(cache.get, b"", SALT, everything, TARGET)[0] == want
