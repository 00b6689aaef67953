"""`HomeCore`: judging, batches, control state."""

import pytest

from dfs.errors import Busy, Corrupt, Fenced, InvalidArgument, RemoteProtocolError
from dfs.volume import entries
from dfs.volume.effects import ADD, DELETE_RANGE, LAST, PATCH, PUT, SET
from dfs.volume.items import (
    DIR,
    EXTENT,
    F_CTIME,
    F_MODE,
    F_NLINK,
    Inode,
    extent_key,
    group,
    group_end,
    inode_key,
)
from metadata import volumes
from metadata.requests import Checkpoint, Close, Commit, Open
from metadata.volumes import HomeCore

GENESIS = entries.encode(entries.GENESIS, 1, {"salt": b"s" * 16}, 1, (1, 2, 3))


def put(ino):
    return (PUT, inode_key(ino), Inode(DIR, 0).encode())


def txn(*effects, keys=(), groups=()):
    return (tuple(keys), tuple(groups), effects)


class Journal:
    """A core and the journal that it writes."""

    def __init__(self, sessions=2):
        self.log = []
        self.core = HomeCore()
        self.learn(GENESIS)
        for sid in range(1, sessions + 1):
            assert self.run(Open(sid, "rw", b"%d" % sid, "")) == sid

    def learn(self, payload):
        self.log.append(payload)
        return self.core.absorb(len(self.log), payload)

    def turn(self):
        """Form one batch and choose it; everything that was answered, and what is to confirm."""
        formed = self.core.form(1000)
        answers = dict(formed.answers)
        if formed.payload is not None:
            answers.update(self.learn(formed.payload))
        return answers, formed.confirm

    def run(self, request):
        self.core.submit(request)
        answers, _ = self.turn()
        return answers.get(request)

    def again(self, start=0):
        core = HomeCore(start)
        for seq in range(start + 1, len(self.log) + 1):
            core.absorb(seq, self.log[seq - 1])
        return core


def commit(sid, no, base, *txns, oldest=0):
    return Commit(sid, no, base, txns, oldest)


def test_a_request_is_answered_when_its_entry_is_chosen():
    j = Journal()
    request = commit(1, 1, 3, txn(put(5)))
    j.core.submit(request)
    formed = j.core.form(1000)
    assert (formed.answers, formed.confirm, j.core.flying) == ([], [], True)
    assert j.learn(formed.payload) == [(request, (4, (True,)))]
    assert entries.decode(formed.payload).body == (((1, 1, (True,), (put(5),)),),)
    assert j.core.idle


def test_only_one_batch_flies():
    j = Journal()
    j.core.submit(commit(1, 1, 3, txn(put(5))))
    j.core.form(1)
    with pytest.raises(RuntimeError):
        j.core.form(2)


def test_what_counts_as_a_write():
    j = Journal(1)
    key, files = inode_key(5), group(5, EXTENT)

    def patch(op, field):
        return (PATCH, key, ((field, op, 1),))

    cases = [
        (put(5), True),
        (patch(ADD, F_NLINK), False),
        (patch(LAST, F_CTIME), False),
        (patch(SET, F_MODE), True),
    ]
    no = 0
    for effect, counts in cases:
        base = j.core.seq
        no += 2
        j.run(commit(1, no - 1, base, txn(effect)))
        _, verdicts = j.run(commit(1, no, base, txn(put(99), keys=[key])))
        assert verdicts == (not counts,), effect
    base = j.core.seq
    j.run(commit(1, no + 1, base, txn((DELETE_RANGE, files, group_end(files)))))
    for i, reads in enumerate(({"groups": [files]}, {"keys": [extent_key(5, 0)]})):
        assert j.run(commit(1, no + 2 + i, base, txn(put(99), **reads)))[1] == (False,)


def test_a_clash_with_the_batch_waits_for_it():
    j = Journal()
    first = commit(1, 1, 3, txn(put(5)))
    second = commit(2, 1, 3, txn(put(6)), txn(put(7), keys=[inode_key(5)]))
    j.core.submit(first)
    j.core.submit(second)
    answers, _ = j.turn()
    assert answers == {first: (4, (True,))}
    answers, _ = j.turn()
    assert answers == {second: (5, (True, False))}


def test_a_clash_with_a_batch_that_is_lost_is_none():
    j = Journal()
    second = commit(2, 1, 3, txn(put(7), keys=[inode_key(5)]))
    j.core.submit(commit(1, 1, 3, txn(put(5))))
    j.core.submit(second)
    j.core.form(1)
    assert second in j.core.abandon()
    j.core = j.again()
    assert j.run(second) == (4, (True,))


def test_what_waits_keeps_its_place():
    j = Journal(4)
    first, *rest = (commit(sid, 1, 5, txn(put(5), keys=[inode_key(5)])) for sid in (1, 2, 3))
    late = commit(4, 1, 5, txn(put(5), keys=[inode_key(5)]))
    for request in (first, *rest):
        j.core.submit(request)
    assert list(j.turn()[0]) == [first]
    j.core.submit(late)
    assert list(j.turn()[0]) == [*rest, late]


def test_reads_without_writes_need_a_confirm():
    j = Journal()
    j.run(commit(1, 1, 3, txn(put(5))))
    mixed = commit(2, 1, 3, txn(put(6), keys=[inode_key(5)]), txn(keys=[inode_key(7)]))
    j.core.submit(mixed)
    answers, confirm = j.turn()
    assert (answers, confirm) == ({}, [mixed])
    assert j.core.settle(mixed) == (4, (False, True))
    stale = commit(2, 2, 3, txn(put(6), keys=[inode_key(5)]))
    assert j.run(stale) == (4, (False,))


def test_unknown_sessions_are_fenced_only_after_a_confirm():
    j = Journal()
    request = commit(9, 1, 3, txn(put(5)))
    j.core.submit(request)
    answers, confirm = j.turn()
    assert (answers, confirm) == ({}, [request])
    assert isinstance(j.core.settle(request), Fenced)
    # it may turn out that it exists: opened at another home in between
    j.learn(entries.encode(entries.SESSION, 5000, 9, "rw", b"n", ""))
    assert j.core.settle(request) is None
    assert j.turn()[0] == {request: (5, (True,))}


def test_outcomes_survive_take_overs_and_checkpoints():
    j = Journal()
    j.run(commit(1, 1, 3, txn(put(5)), txn(put(6), keys=[inode_key(5)])))
    known = (4, (True, False))
    assert j.run(commit(1, 1, 3, txn(put(5)))) == known
    j.run(Checkpoint(4, b"root", 77))
    j.run(commit(2, 1, 4, txn(put(8))))
    for start in (0, 2, 4):
        j.core = j.again(start)
        assert j.core.complete
        assert (j.core.covered, j.core.root, j.core.tree_bytes) == (4, b"root", 77)
        assert j.core.params == {"salt": b"s" * 16}
        assert j.run(commit(1, 1, 3, txn(put(5)))) == known
        assert isinstance(j.run(commit(2, 0, 3, txn(put(5)))), InvalidArgument)
        assert j.run(commit(1, 2, 3, txn(put(9), keys=[inode_key(99)]))) == (6, (False,))
    assert not j.again(5).complete
    assert HomeCore(3).complete is False


def test_a_checkpoint_that_covers_less_changes_nothing():
    j = Journal()
    j.run(commit(1, 1, 3, txn(put(5))))
    j.run(Checkpoint(4, b"new", 0))
    assert j.run(Checkpoint(3, b"old", 0)) == ()
    assert len(j.log) == 5
    j.learn(entries.encode(entries.CHECKPOINT, 9999, 3, b"old", j.core.control(0)))
    assert (j.core.covered, j.core.root) == (4, b"new")


def test_sessions_open_and_close():
    j = Journal(1)
    again = Open(7, "rw", b"1", "")
    j.core.submit(again)
    answers, confirm = j.turn()
    assert (answers, confirm) == ({}, [again])
    assert j.core.settle(again) == 1
    assert j.run(Close((1,))) == ()
    gone = Close((1,))
    j.core.submit(gone)
    assert j.turn() == ({}, [gone])
    assert j.core.settle(gone) == ()
    assert j.core.sessions == {}


def test_sessions_are_limited(monkeypatch):
    monkeypatch.setattr(volumes, "MAX_SESSIONS", 2)
    j = Journal(2)
    assert isinstance(j.run(Open(3, "rw", b"3", "")), Busy)
    j.run(Close((1,)))
    assert j.run(Open(3, "rw", b"3", "")) == 3


def test_read_only_sessions_write_nothing():
    j = Journal(1)
    j.run(Open(2, "ro", b"2", ""))
    assert isinstance(j.run(commit(2, 1, 3, txn(put(5)))), InvalidArgument)


def test_old_chunks_are_refused():
    j = Journal(1)
    hour = 3600 * 10**9
    cases = [
        (20 * hour - 11 * hour, False),  # a stamp
        (20 * hour - 13 * hour, True),
        (-11 * hour, False),  # an age: whatever the clock of the session says
        (-13 * hour, True),
    ]
    for no, (oldest, refused) in enumerate(cases, 1):
        request = commit(1, no, 2, txn(put(5)), oldest=oldest)
        j.core.submit(request)
        formed = j.core.form(20 * hour)
        answers = dict(formed.answers)
        if formed.payload:
            answers.update(j.learn(formed.payload))
        assert isinstance(answers[request], InvalidArgument) == refused


def test_stamps_grow_whatever_the_clock_says():
    j = Journal(1)
    for no, now in enumerate((50, 10, 10, 99999, 5), 1):
        j.core.submit(commit(1, no, 2, txn(put(5))))
        j.learn(j.core.form(now).payload)
    stamps = [entries.decode(e).stamp for e in j.log]
    assert stamps == sorted(set(stamps))
    assert 99999 in stamps


def test_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(volumes, "BATCH_BYTES", 500)
    j = Journal(8)
    requests = [
        commit(sid, 1, 9, txn(*[put(10 * sid + i) for i in range(3)])) for sid in range(1, 9)
    ]
    for request in requests:
        j.core.submit(request)
    turns = []
    while not j.core.idle:
        turns.append(len(j.turn()[0]))
    assert sum(turns) == 8
    assert max(turns) < 5


def test_control_requests_do_not_wait_behind_data():
    j = Journal(1)
    j.core.submit(commit(1, 1, 2, txn(put(5))))
    opening = Open(2, "rw", b"2", "")
    j.core.submit(opening)
    assert j.turn()[0] == {opening: 2}


def test_delegation_entries_are_kept():
    j = Journal(1)
    j.learn(entries.encode(entries.DELEGATION, 5000, 3, 1))
    assert (j.core.epoch, j.core.holder) == (3, 1)
    j.run(Checkpoint(2, b"", 0))
    assert (j.again(2).epoch, j.again(2).holder) == (3, 1)


def test_config_entries_are_somebody_elses():
    j = Journal(1)
    j.core.submit(commit(1, 1, 2, txn(put(5))))
    formed = j.core.form(1)
    assert j.learn(entries.encode(entries.CONFIG, 5000, 2, (1, 2, 4))) == []
    assert len(j.learn(formed.payload)) == 1


@pytest.mark.parametrize(
    "entry",
    [
        b"",
        b"garbage",
        entries.encode(99, 5000),
        entries.encode(entries.SESSION, 5000, 1),
        entries.encode(entries.DATA, 5000, 7),
        entries.encode(entries.CHECKPOINT, 5000, 3, b"", (99, {}, (), 0, 0, 0)),
        b"\x93\x02\x00\x01",
    ],
)
def test_entries_that_are_not_understood_stop_the_home(entry):
    core = Journal(0).core
    with pytest.raises((Corrupt, RemoteProtocolError)):
        core.absorb(2, entry)


def test_entries_come_in_order():
    core = HomeCore()
    with pytest.raises(Corrupt, match="follows"):
        core.absorb(2, GENESIS)


def test_giving_up_keeps_the_batch_in_flight():
    j = Journal()
    first, second = commit(1, 1, 3, txn(put(5))), commit(2, 1, 3, txn(put(6)))
    j.core.submit(first)
    formed = j.core.form(1)
    j.core.submit(second)
    assert set(j.core.give_up()) == {first, second}
    assert j.core.flying
    assert j.learn(formed.payload) == []
    assert j.run(commit(1, 1, 3, txn(put(5)))) == (4, (True,))
