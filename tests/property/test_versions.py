"""Laws of registers: merge is a join (K1), bytes are canonical (K5), acknowledged values stay."""

from hypothesis import given
from hypothesis import strategies as st

from metadata.versions import (
    EMPTY,
    _merged,
    covers,
    decode,
    encode,
    is_tombstone,
    join,
    merge,
    newest_hlc,
    put,
)

ACTORS = [bytes([i]) * 8 for i in range(1, 5)]


class World:
    """Replicas that mint with an actor each and merge with one another, as the protocol allows."""

    def __init__(self, count=4):
        self.copies = [EMPTY] * count
        self.clock = 0
        self.superseded = set()  # values that some write has seen and replaced
        self.written = []

    def write(self, at, seen_at, delete):
        context = EMPTY if seen_at is None else self.copies[seen_at]
        self.clock += 1
        value = None if delete else b"%d" % self.clock
        self.superseded |= {x[2] for x in context[1]}
        self.copies[at] = put(self.copies[at], context[0], ACTORS[at], self.clock, value)
        if value is not None:
            self.written.append(value)

    def exchange(self, a, b):
        self.copies[a] = merge(self.copies[a], self.copies[b])


ACTIONS = st.lists(
    st.tuples(st.booleans(), st.integers(0, 3), st.none() | st.integers(0, 3), st.booleans()),
    max_size=30,
)


def play(actions):
    world = World()
    for write, a, b, delete in actions:
        if write:
            world.write(a, b, delete)
        else:
            world.exchange(a, b or 0)
    return world


@given(ACTIONS)
def test_merge_is_commutative_associative_idempotent(actions):
    a, b, c, _ = play(actions).copies
    assert merge(a, b) == merge(b, a)
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, a) == a
    assert merge(a, merge(a, b)) == merge(a, b)
    assert merge(a, EMPTY) == a


@given(ACTIONS)
def test_the_short_ways_of_merge_find_what_the_long_one_finds(actions):
    world = World()
    seen = [EMPTY]  # old states too: a copy that is sent late
    for write, a, b, delete in actions:
        if write:
            world.write(a, b, delete)
        else:
            world.exchange(a, b or 0)
        seen.append(world.copies[a])
    for one in seen:
        for other in seen:
            assert merge(one, other) == _merged(*one, *other)


@given(ACTIONS, st.permutations(range(4)))
def test_equal_registers_are_equal_bytes_in_whatever_order_they_met(actions, order):
    copies = play(actions).copies
    one = other = EMPTY
    for copy in copies:
        one = merge(one, copy)
    for i in order:
        other = merge(copies[i], other)
    assert one == other
    if one != EMPTY:
        assert encode(one) == encode(other)
        assert decode(encode(one)) == one


@given(ACTIONS)
def test_a_value_disappears_only_when_a_write_had_seen_it(actions):
    world = play(actions)
    final = EMPTY
    for copy in world.copies:
        final = merge(final, copy)
    live = {x[2] for x in final[1]}
    assert live | world.superseded >= set(world.written)
    assert not live & world.superseded


@given(ACTIONS)
def test_vectors_cover_exactly_what_was_seen(actions):
    world = play(actions)
    final = EMPTY
    for copy in world.copies:
        for actor, hlc, _ in copy[1]:
            assert covers(copy[0], actor, hlc)
        final = merge(final, copy)
    assert newest_hlc(final) == (max((h for _, h in final[0]), default=0))
    assert is_tombstone(final) == (final != EMPTY and not final[1])
    assert len(final[0]) <= 4  # K6: one entry an actor


@given(ACTIONS)
def test_join_is_the_least_upper_bound(actions):
    a, b, *_ = play(actions).copies
    joined = join(a[0], b[0])
    assert dict(joined) == {
        actor: max(dict(a[0]).get(actor, 0), dict(b[0]).get(actor, 0))
        for actor in {*dict(a[0]), *dict(b[0])}
    }
    assert list(joined) == sorted(joined)


@given(st.binary(max_size=60))
def test_no_bytes_make_decode_fail_otherwise_than_by_saying_so(data):
    from dfs.errors import Corrupt

    for start in (b"", b"\x01"):
        try:
            register = decode(start + data)
        except Corrupt:
            continue
        assert decode(encode(register)) == register
