"""Digests: incremental equals recomputed, in every order, over crashes, losses and refused batches."""

from random import Random

import pytest
from blake3 import blake3

from dfs.errors import Corrupt
from dfs.hashing import digest
from metadata import merkle
from metadata.merkle import BLOBS, BUCKETS, REGISTERS, Digests, bucket_of, bucket_row, recompute


class DictStore(dict):
    """A store of nothing but a dict; `lost` keys raise."""

    def __init__(self):
        super().__init__()
        self.lost = set()

    def get(self, key):
        if key in self.lost:
            raise Corrupt(f"{key!r} is lost")
        return super().get(key)

    def scan(self, prefix, after=b"", limit=1000):
        keys = sorted(k for k in self if k.startswith(prefix) and k > after)[:limit]
        if any(k in self.lost for k in keys):
            raise Corrupt("a key of the range is lost")
        return [(k, self[k]) for k in keys]

    def apply(self, ops):
        for key, value in ops:
            self.lost.discard(key)
            if value is None:
                self.pop(key, None)
            else:
                self[key] = value


def register(partition, name, space=0):
    return b"r" + partition.to_bytes(2, "big") + bytes([space]) + name


def put(store, digests, *rows, table=REGISTERS):
    """Change rows (key, value or None) and digests in one batch."""
    changes, ops, now = [], [], {}
    for row, value in rows:
        old = now[row] if row in now else store.get(row)
        changes.append((table, merkle.partition_of_row(table, row), row, old, value))
        ops.append((row, value))
        now[row] = value
    ops += digests.ops(changes)
    store.apply(ops)
    return ops


def drift(store, table, partition):
    steps = recompute(store, table, partition)
    while True:
        try:
            next(steps)
        except StopIteration as e:
            return e.value


def make():
    store = DictStore()
    digests = Digests(store)
    digests.load()
    return store, digests


def test_format_of_rows_and_sums():
    store, digests = make()
    row, value = register(0x123, b"key"), b"value"
    put(store, digests, (row, value))
    bucket = bucket_of(row)
    assert bucket == blake3(row, key=b"dfs merkle buckets" + bytes(14)).digest()[0] == 110
    expected = blake3(row + blake3(value).digest()).digest()
    assert store[b"m\x00\x01\x23" + bytes([bucket])] == expected
    other = next(r for i in range(9999) if bucket_of(r := register(0x123, b"%d" % i)) == bucket)
    put(store, digests, (other, b"x"))
    both = int.from_bytes(expected, "big")
    both += int.from_bytes(blake3(other + blake3(b"x").digest()).digest(), "big")
    assert store[bucket_row(0, 0x123, bucket)] == (both % 2**256).to_bytes(32, "big")
    assert digests.total(REGISTERS, 0x123) == both % 2**256
    blob = digest(b"blob")
    put(store, digests, (b"b" + blob, b"blob"), table=BLOBS)
    partition = blob[0] << 4 | blob[1] >> 4
    key = bucket_row(BLOBS, partition, bucket_of(b"b" + blob))
    assert store[key] == blake3(b"b" + blob + blob).digest()
    # an empty bucket has no row
    put(store, digests, (row, None), (other, None))
    put(store, digests, (b"b" + blob, None), table=BLOBS)
    assert store == {}
    assert digests.total(REGISTERS, 0x123) == digests.total(BLOBS, partition) == 0


def test_buckets_are_independent_of_partitions():
    seen = set()
    blobs = [d for i in range(30_000) if (d := digest(b"%d" % i))[0] == 7]
    for blob in blobs:
        seen.add(bucket_of(b"b" + blob))
    assert len(seen) > 90


def test_a_batch_may_change_a_row_twice_and_many_rows_of_a_bucket():
    store, digests = make()
    row = register(5, b"a")
    same = [r for i in range(20_000) if bucket_of(r := register(5, b"%d" % i)) == bucket_of(row)]
    ops = put(store, digests, (row, b"1"), (row, b"2"), *((r, b"x") for r in same), (row, b"3"))
    assert len([k for k, _ in ops if k[:1] == b"m"]) == 1  # one row for all
    assert drift(store, REGISTERS, 5) == {}
    assert digests.total(REGISTERS, 5) == sum(digests.buckets(REGISTERS, 5)) % 2**256


def test_random_changes_keep_the_digests_right():
    random = Random(1)
    store, digests = DictStore(), None
    for step in range(400):
        if digests is None or random.random() < 0.02:
            digests = Digests(store, cache_bytes=0)
            digests._entries = 3  # sums come from the store most of the time
            digests.load()
        rows = []
        for _ in range(random.randrange(1, 6)):
            row = register(random.randrange(3), b"%d" % random.randrange(30))
            rows.append((row, random.choice([None, b"%d" % random.randrange(4)])))
        put(store, digests, *rows)
        if step % 40 == 0:
            for partition in range(3):
                assert drift(store, REGISTERS, partition) == {}
                total = sum(digests.buckets(REGISTERS, partition)) % 2**256
                assert digests.total(REGISTERS, partition) == total
    assert digests.statistics()["cache_bytes"] <= 3 * 232
    assert digests.drift == 0


def test_order_does_not_matter():
    rows = [(register(1, b"%d" % i), b"%d" % i) for i in range(100)]
    results = []
    for seed in range(3):
        store, digests = make()
        Random(seed).shuffle(rows)
        put(store, digests, (register(1, b"gone"), b"x"))
        for row in rows:
            put(store, digests, row)
        put(store, digests, (register(1, b"gone"), None))
        results.append(({k: v for k, v in store.items() if k[:1] == b"m"}, digests.total(0, 1)))
    assert results[0] == results[1] == results[2]


def test_a_refused_batch_is_reloaded():
    store, digests = make()
    row = register(9, b"a")
    put(store, digests, (row, b"1"))
    before = digests.total(REGISTERS, 9)
    ops = digests.ops([(REGISTERS, 9, row, b"1", b"2")])
    assert digests.total(REGISTERS, 9) != before
    digests.reload(ops)  # the store was full
    assert digests.total(REGISTERS, 9) == before
    put(store, digests, (row, b"3"))
    assert drift(store, REGISTERS, 9) == {}
    ops = put(store, digests, (row, b"4"))
    digests.reload(ops)  # cancelled, but applied
    assert digests.total(REGISTERS, 9) == sum(digests.buckets(REGISTERS, 9)) % 2**256
    put(store, digests, (row, None))
    assert store == {}


def test_drift_is_found_counted_and_corrected_while_the_partition_changes():
    store, digests = make()
    store.apply(digests.mark_built(REGISTERS))
    rows = [register(2, b"%d" % i) for i in range(50)]
    put(store, digests, *((r, b"x") for r in rows))
    store[rows[0]] = b"y"  # a write that forgot its digest
    del store[rows[1]]
    errors = drift(store, REGISTERS, 2)
    assert set(errors) == {bucket_of(rows[0]), bucket_of(rows[1])}
    put(store, digests, (rows[0], b"z"), (rows[5], None))  # meanwhile
    store.apply(digests.correct(REGISTERS, 2, errors))
    assert drift(store, REGISTERS, 2) == {}
    assert digests.drift == 2
    assert digests.total(REGISTERS, 2) == sum(digests.buckets(REGISTERS, 2)) % 2**256


def test_data_older_than_digests_is_built_without_counting_as_drift():
    store = DictStore()
    blobs = {b"b" + digest(b"%d" % i): b"%d" % i for i in range(20)}
    store.update(blobs)
    digests = Digests(store)
    digests.load()
    assert not digests.built(BLOBS)
    gone = next(iter(blobs))
    put(store, digests, (gone, None), table=BLOBS)  # a bad copy is removed before it is counted
    for partition in range(4096):
        if errors := drift(store, BLOBS, partition):
            store.apply(digests.correct(BLOBS, partition, errors))
    store.apply(digests.mark_built(BLOBS))
    assert digests.drift == 0
    reference = DictStore()
    fresh = Digests(reference)
    fresh.load()
    del blobs[gone]
    put(reference, fresh, *blobs.items(), table=BLOBS)
    assert all(fresh.total(BLOBS, p) == digests.total(BLOBS, p) for p in range(4096))
    again = Digests(store)
    again.load()
    assert again.built(BLOBS)
    assert not again.built(REGISTERS)


def test_lost_sums_do_not_stop_writes_and_are_rebuilt():
    store, digests = make()
    store.apply(digests.mark_built(REGISTERS))
    rows = [register(2, b"%d" % i) for i in range(300)]
    put(store, digests, *((r, b"x") for r in rows))
    right = digests.total(REGISTERS, 2)
    lost = bucket_row(REGISTERS, 2, bucket_of(rows[0]))
    store.lost.update({lost, bucket_row(REGISTERS, 2, bucket_of(rows[1]))})
    digests = Digests(store)
    digests.load()
    assert (REGISTERS, 2) in digests.damaged
    put(store, digests, (rows[0], b"y"))
    with pytest.raises(Corrupt):
        drift(store, REGISTERS, 2)
    put(store, digests, (rows[1], b"z"))  # a sum that is remembered, though it was lost
    store.apply(digests.replace_lost(REGISTERS, 2))
    put(store, digests, (rows[2], b"y"), (rows[1], b"x"))
    store.apply(digests.correct(REGISTERS, 2, drift(store, REGISTERS, 2)))
    assert drift(store, REGISTERS, 2) == {}
    put(store, digests, (rows[0], b"x"), (rows[2], b"x"))
    assert digests.total(REGISTERS, 2) == right
    assert digests.drift == 0
    assert digests.damaged == {}


def test_partitions_of_rows():
    for partition in (0, 1, 0x123, 4095):
        assert merkle.partition_of_row(REGISTERS, register(partition, b"x" * 1024)) == partition
    for bad in (b"", b"r\x00\x00\x00", b"r\x10\x00\x00a", b"b" + bytes(32)):
        with pytest.raises(ValueError, match="no row of table 0"):
            merkle.partition_of_row(REGISTERS, bad)
    with pytest.raises(ValueError, match="no row of table 1"):
        merkle.partition_of_row(BLOBS, b"b" + bytes(31))
    blobs = sorted(b"b" + digest(b"%d" % i) for i in range(3000))
    store = DictStore()
    store.update(dict.fromkeys(blobs, b""))
    for blob in blobs[::100]:
        partition = merkle.partition_of_row(BLOBS, blob)
        expected = [b for b in blobs if merkle.partition_of_row(BLOBS, b) == partition]
        found, more = merkle.rows_of(store, BLOBS, partition)
        assert [r for r, _ in found] == expected
        assert not more
    for edge in (bytes(32), b"\xff" * 32):
        store[b"b" + edge] = b""
        partition = merkle.partition_of_row(BLOBS, b"b" + edge)
        assert b"b" + edge in dict(merkle.rows_of(store, BLOBS, partition)[0])
    assert BUCKETS == 256


# -- why a sum: whoever chooses values makes an exclusive or say "equal" for different data


class XorDigests(Digests):
    """Mutant: exclusive or instead of a sum."""

    def ops(self, changes):
        result = []
        for table, partition, row, old, new in changes:
            bucket = bucket_row(table, partition, bucket_of(row))
            known = int.from_bytes(self._view.get(bucket) or b"", "big")
            for value in (old, new):
                if value is not None:
                    known ^= merkle.element(row, merkle.value_digest(table, row, value))
            self._view.apply([(bucket, known.to_bytes(32, "big"))])
            self._totals[table][partition] = known
            result = [(bucket, known.to_bytes(32, "big"))]
        return result


def attack():
    """Two sets of values of the same keys, different, whose exclusive ors are equal."""
    rows = []
    i = 0
    while len(rows) < 257:
        if bucket_of(row := register(0, b"%d" % i)) == 0:
            rows.append(row)
        i += 1
    basis = {}  # leading bit -> (vector, which rows make it)
    for n, row in enumerate(rows):
        vector = merkle.element(row, digest(b"a")) ^ merkle.element(row, digest(b"b"))
        combination = 1 << n
        while vector and vector.bit_length() in basis:
            other, rows_of_other = basis[vector.bit_length()]
            vector ^= other
            combination ^= rows_of_other
        if not vector:
            return [(r, b"b" if combination >> k & 1 else b"a") for k, r in enumerate(rows)]
        basis[vector.bit_length()] = vector, combination
    raise AssertionError("257 vectors of 256 bits are dependent")


def _totals(kind, rows):
    store = DictStore()
    digests = kind(store)
    digests.load()
    for row, value in rows:
        store.apply([(row, value), *digests.ops([(REGISTERS, 0, row, None, value)])])
    return digests.total(REGISTERS, 0)


def test_chosen_values_collide_under_xor_and_not_under_a_sum():
    forged = attack()
    honest = [(row, b"a") for row, _ in forged]
    assert forged != honest
    assert _totals(XorDigests, honest) == _totals(XorDigests, forged)
    assert _totals(Digests, honest) != _totals(Digests, forged)


def test_buckets_without_a_row_are_not_read():
    store = DictStore()
    rng = Random(5)
    digests = Digests(store)
    digests.load()
    rows = [register(rng.randrange(4096), b"%d" % i) for i in range(300)]
    put(store, digests, *((row, b"v") for row in rows[:200]))
    assert digests.misses == 0
    put(store, digests, *((row, b"w") for row in rows[:100]))
    assert digests.hits >= 100
    again = Digests(store)
    again.load()
    put(store, again, *((row, None) for row in rows[:50]))
    put(store, again, *((row, b"x") for row in rows[150:]))
    assert 0 < again.misses <= 100
    for row in rows:
        partition = merkle.partition_of_row(REGISTERS, row)
        assert drift(store, REGISTERS, partition) == {}


def test_buckets_are_read_while_it_is_not_known_which_have_rows():
    store = DictStore()
    first = Digests(store)
    first.load()
    row = register(7, b"k")
    put(store, first, (row, b"v"))
    unloaded = Digests(store)
    put(store, unloaded, (row, b"w"))
    assert drift(store, REGISTERS, 7) == {}
