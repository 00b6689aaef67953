"""The table of inodes: names follow renames, counts are the kernel's, old ones are offered for pruning."""

import random
import tracemalloc

from dfs.volume.items import entry_key
from fuse.inodes import PER_INODE, InodeTable

A, B = entry_key(1, 100), entry_key(5, 7)


def test_a_renamed_inode_is_found_by_its_new_name_only():
    table = InodeTable()
    table.looked_up(10, A, b"old")
    assert table.find(A, b"old") == 10
    assert table.find(A, b"other") == 0
    assert table.find(entry_key(2, 100), b"old") == 0
    table.moved(10, B, b"new")
    assert table.find(A, b"old") == 0
    assert table.find(B, b"new") == 10
    assert table.names(A) == []
    assert table.names(B) == [b"new"]
    assert table.places() == [(5, b"new")]
    assert table.forget(10, 1)
    assert table.names(B) == []


def test_exchanged_inodes_keep_one_name_each():
    table = InodeTable()
    table.looked_up(10, A, b"a")
    table.looked_up(11, B, b"b")
    table.moved(10, B, b"b")
    table.moved(11, A, b"a")
    assert (table.find(A, b"a"), table.find(B, b"b")) == (11, 10)
    table.forget(10, 1)
    table.forget(11, 1)
    assert table.places() == []


def test_what_the_kernel_does_not_hold_does_not_move():
    table = InodeTable()
    table.moved(10, A, b"a")
    assert table.find(A, b"a") == 0


def test_lookups_are_counted():
    table = InodeTable()
    table.looked_up(5, A, b"a")
    table.looked_up(5, A, b"a")
    table.looked_up(6, A, b"b")  # its name has the same hash
    assert table.names(A) == [b"a", b"b"]
    assert not table.forget(5, 1)
    assert 5 in table
    table.looked_up(5, B, b"moved")
    assert table.names(A) == [b"b"]
    assert table.names(B) == [b"moved"]
    assert table.forget(5, 2)
    assert 5 not in table
    assert table.names(B) == []
    assert table.forget(6, 1)
    assert len(table) == table.used == 0
    assert 1 in table


class Plain:
    """The table as it would be written without a thought for memory."""

    def __init__(self):
        self.counts, self.at = {}, {}

    def looked_up(self, ino, key, name):
        self.counts[ino] = self.counts.get(ino, 0) + 1
        self.at[ino] = (key, name)

    def moved(self, ino, key, name):
        if ino in self.at:
            self.at[ino] = (key, name)

    def forget(self, ino, count):
        self.counts[ino] = self.counts.get(ino, 0) - count
        if self.counts[ino] > 0:
            return False
        del self.counts[ino]
        self.at.pop(ino, None)
        return True


def test_any_sequence_agrees_with_a_plain_table():
    rng = random.Random(4)
    keys = [entry_key(parent, cookie) for parent in (1, 2) for cookie in (1, 2)]
    names = [b"a", b"b", b"c"]
    table, plain = InodeTable(), Plain()
    for _ in range(20_000):
        ino, key, name = rng.randint(2, 9), rng.choice(keys), rng.choice(names)
        match rng.randrange(4):
            case 0 | 1:
                table.looked_up(ino, key, name)
                plain.looked_up(ino, key, name)
            case 2:
                table.moved(ino, key, name)
                plain.moved(ino, key, name)
            case 3 if ino in plain.counts:
                count = rng.randint(1, plain.counts[ino])
                assert table.forget(ino, count) == plain.forget(ino, count)
        for key in keys:
            held = sorted(name for k, name in plain.at.values() if k == key)
            assert sorted(table.names(key)) == held
            for name in names:
                found = table.find(key, name)
                assert plain.at[found] == (key, name) if found else name not in held
        assert set(table.all()) == set(plain.at)
        assert table.used == sum(PER_INODE + len(k) + len(n) for k, n in plain.at.values())


def fill(table, numbers):
    for n in numbers:
        table.looked_up(1000 + n, entry_key(1, n), b"f%05d" % n)


def test_beyond_the_budget_the_oldest_are_offered_once_and_again_when_all_were():
    offered = []
    one = PER_INODE + len(A) + 6
    table = InodeTable(100 * one, offered.append)
    fill(table, range(100))
    assert offered == []
    fill(table, [100])
    assert offered == [[1000 + n for n in range(7)]]
    fill(table, range(101, 103))
    assert len(offered) == 1  # not with each lookup, while the kernel makes up its mind
    fill(table, range(103, 200))
    assert offered[1][0] == 1007
    first = [ino for inos in offered[:8] for ino in inos]
    assert first == [1000 + n for n in range(len(first))]
    assert 1000 in [ino for inos in offered[8:] for ino in inos]


def test_what_is_pruned_makes_room():
    offered = []
    one = PER_INODE + len(A) + 6

    def prune(inos):
        offered.append(len(inos))
        pending.extend(inos)

    pending = []
    table = InodeTable(1000 * one, prune)
    for n in range(10_000):
        fill(table, [n])
        for ino in pending:
            assert table.forget(ino, 1)
        pending.clear()
        assert table.used <= table.budget
    assert max(offered) < 100


def test_the_budget_is_what_the_table_takes():
    tracemalloc.start()
    try:
        table = InodeTable()
        fill(table, range(1000))
        before, used = tracemalloc.get_traced_memory()[0], table.used
        fill(table, range(1000, 45_000))
        took = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.6 * took < table.used - used < 1.4 * took
