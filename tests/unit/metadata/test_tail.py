"""Entries kept in memory and what a checkpoint would cover."""

from dfs.volume import entries
from metadata import tail as module
from metadata.tail import Tail

DATA = entries.encode(entries.DATA, 1, ())
CHECKPOINT = entries.encode(entries.CHECKPOINT, 1, 2, b"", ())


def test_answers_hold_exactly_what_is_asked_for():
    tail = Tail()
    for seq in range(5, 11):
        tail.append(seq, DATA)
    assert [n for n, _ in tail.between(6, 9)] == [7, 8, 9]
    assert [n for n, _ in tail.between(9, 10)] == [10]
    assert [n for n, _ in tail.between(4, 10)] == [5, 6, 7, 8, 9, 10]
    assert tail.between(10, 10) == tail.between(12, 11) == ()
    assert tail.between(3, 10) is None
    assert tail.between(9, 11) is None
    assert Tail().between(0, 1) is None
    assert tail.between(9, 10)[0][1] is DATA


def test_answers_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "ANSWER_BYTES", 3 * len(DATA))
    tail = Tail()
    for seq in range(1, 10):
        tail.append(seq, DATA)
    assert [n for n, _ in tail.between(0, 9)] == [1, 2, 3]
    monkeypatch.setattr(module, "ANSWER_BYTES", 1)
    assert [n for n, _ in tail.between(0, 9)] == [1]


def test_memory_is_bounded_and_gaps_forget(monkeypatch):
    monkeypatch.setattr(module, "TAIL_BYTES", 3 * len(DATA))
    tail = Tail()
    for seq in range(1, 10):
        tail.append(seq, DATA)
    assert len(tail) == 3
    tail.append(20, DATA)
    assert len(tail) == 1
    assert tail.between(19, 20) == ((20, DATA),)


def test_checkpoints_cover_entries_but_not_each_other():
    tail = Tail()
    for seq in range(1, 5):
        tail.append(seq, DATA)
    tail.append(5, CHECKPOINT)
    assert (tail.loose, tail.loose_bytes) == (4, 4 * len(DATA))
    tail.cover(3)
    assert (tail.loose, tail.loose_bytes) == (1, len(DATA))
    tail.cover(4)
    assert (tail.loose, tail.loose_bytes) == (0, 0)
