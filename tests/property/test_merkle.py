"""Digests against a recomputation, after any sequence of changes, refusals and restarts."""

from hypothesis import given, settings
from hypothesis import strategies as st

from dfs.testing.sync_nodes import Rows, row_in
from metadata.merkle import REGISTERS, Digests, recompute

changes = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 12), st.none() | st.binary(max_size=3)), max_size=5
)
steps = st.lists(st.tuples(st.sampled_from(["apply", "refuse", "unsure", "restart"]), changes))


def apply(digests_class, sequence):
    """Play it; whether digests and data agree at the end."""
    store = Rows()
    digests = digests_class(store)
    digests.load()
    for kind, batch in sequence:
        if kind == "restart":
            digests = digests_class(store, cache_bytes=0)
            digests.load()
        ops, rows = [], []
        now = {}
        for partition, name, value in batch:
            row = row_in(partition, b"%d" % name)
            old = now.get(row, store.get(row))
            now[row] = value
            rows.append((row, value))
            ops.append((REGISTERS, partition, row, old, value))
        made = digests.ops(ops)
        if kind != "refuse":
            store.apply([*rows, *made])
        if kind in {"refuse", "unsure"}:
            digests.reload(made)
    for partition in range(3):
        check = recompute(store, REGISTERS, partition)
        try:
            while True:
                next(check)
        except StopIteration as e:
            if e.value:
                return False
        total = sum(digests.buckets(REGISTERS, partition)) % 2**256
        if digests.total(REGISTERS, partition) != total:
            return False
    return True


@settings(max_examples=150, deadline=None)
@given(steps)
def test_incremental_equals_recomputed(sequence):
    assert apply(Digests, sequence)


class Forgetful(Digests):
    """Mutant: the digest of a removed row stays."""

    def ops(self, changes):
        return super().ops([c for c in changes if c[4] is not None])


def test_a_forgetful_digest_is_seen():
    assert not apply(Forgetful, [("apply", [(0, 1, b"x")]), ("apply", [(0, 1, None)])])
