"""The delegation in `HomeCore`, and the times at which it is given and taken."""

import pytest

from dfs.errors import Busy, Fenced
from dfs.volume import entries
from dfs.volume.effects import PUT
from dfs.volume.items import DIR, Inode, inode_key
from metadata.delegation import Delegated, Standing
from metadata.requests import Checkpoint, Close, Commit, Delegate, Open, Return, Revoke
from metadata.volumes import HomeCore

GENESIS = entries.encode(entries.GENESIS, 1, {"salt": b"s" * 16}, 1, (1, 2, 3))


def put(ino):
    return (PUT, inode_key(ino), Inode(DIR, 0).encode())


def txn(*effects, keys=()):
    return (tuple(keys), (), effects)


class Journal:
    """A core with sessions 1, 2, ... and the journal that it writes."""

    def __init__(self, sessions=2):
        self.log = []
        self.core = HomeCore()
        self.learn(GENESIS)
        for sid in range(1, sessions + 1):
            assert self.ask(Open(sid, "rw", b"%d" % sid, "")) == sid

    def learn(self, payload):
        self.log.append(payload)
        return dict(self.core.absorb(len(self.log), payload))

    def ask(self, request):
        """The outcome of a request, confirmed if need be."""
        self.core.submit(request)
        while True:
            formed = self.core.form(1000)
            answers = dict(formed.answers)
            if formed.payload is not None:
                answers |= self.learn(formed.payload)
            for waiting in formed.confirm:
                answer = self.core.settle(waiting)
                if answer is not None:
                    answers[waiting] = answer
            if request in answers:
                return answers[request]

    @property
    def state(self):
        return self.core.epoch, self.core.holder

    def commit(self, sid, no, base, *txns, epoch=0):
        return self.ask(Commit(sid, no, base, txns, 0, epoch))

    def again(self, start=0):
        core = HomeCore(start)
        for seq in range(start + 1, len(self.log) + 1):
            core.absorb(seq, self.log[seq - 1])
        return core


def test_each_change_is_an_entry_of_the_next_epoch():
    j = Journal()
    assert j.ask(Delegate(1)) == 1
    assert j.state == (1, 1)
    assert j.ask(Return(1, 1)) == 2
    assert j.state == (2, 0)
    assert j.ask(Delegate(2)) == 3
    assert j.ask(Revoke(3)) == 4
    assert j.state == (4, 0)
    assert list(j.core.sessions) == [1]
    bodies = [e.body for e in map(entries.decode, j.log) if e.kind == entries.DELEGATION]
    assert bodies == [(1, 1), (2, 0), (3, 2), (4, 0, 2)]
    assert j.again().control(0) == j.core.control(0)


@pytest.mark.parametrize("request_", [Return(1, 1), Return(2, 3), Revoke(1), Revoke(4)])
def test_changes_of_another_epoch_do_nothing(request_):
    j = Journal()
    j.ask(Delegate(1))
    j.ask(Return(1, 1))
    j.ask(Delegate(1))
    assert j.ask(request_) == 3
    assert j.state == (3, 1)


def test_it_has_one_holder_at_most():
    j = Journal()
    j.ask(Delegate(1))
    answer = j.ask(Delegate(2))
    assert isinstance(answer, Busy)
    assert isinstance(j.ask(Delegate(7)), Busy)
    assert j.state == (1, 1)


def test_closing_its_holder_ends_it_in_the_same_entry():
    j = Journal()
    j.ask(Delegate(1))
    j.ask(Close((2,)))
    assert j.state == (1, 1)
    j.ask(Close((1,)))
    assert j.state == (2, 0)
    assert j.again().control(0) == j.core.control(0)


def test_a_checkpoint_carries_it():
    j = Journal()
    j.ask(Delegate(1))
    j.ask(Checkpoint(3, b"", 0))
    other = j.again(3)
    assert (other.epoch, other.holder) == (1, 1)


def test_the_holders_commits_are_not_judged():
    j = Journal()
    old = j.core.seq
    j.commit(2, 1, old, txn(put(5)))
    j.ask(Delegate(1))
    key = inode_key(5)
    assert j.commit(1, 1, old, txn(put(6), keys=[key]), epoch=1)[1] == (True,)
    assert j.commit(1, 2, old, txn(put(7), keys=[key]), epoch=0)[1] == (False,)
    own = (txn(put(8)), txn(put(9), keys=[inode_key(8)]))
    assert j.commit(1, 3, old, *own, epoch=1)[1] == (True, True)
    assert j.commit(1, 4, old, txn(keys=[key]), epoch=1)[1] == (True,)


def test_a_commit_with_an_old_epoch_is_fenced():
    j = Journal()
    j.ask(Delegate(1))
    first = j.commit(1, 1, 3, txn(put(5)), epoch=1)
    j.ask(Return(1, 1))
    assert isinstance(j.commit(1, 2, 3, txn(put(6)), epoch=1), Fenced)
    j.ask(Delegate(1))
    assert isinstance(j.commit(1, 2, 3, txn(put(6)), epoch=1), Fenced)
    assert j.commit(1, 1, 3, txn(put(5)), epoch=1) == first  # it was accepted then


def test_an_epoch_this_home_does_not_know_needs_a_confirm():
    j = Journal()
    j.ask(Delegate(1))
    request = Commit(1, 1, 3, (txn(put(5)),), 0, 2)
    j.core.submit(request)
    formed = j.core.form(1)
    assert (formed.answers, formed.confirm) == ([], [request])
    assert isinstance(j.core.settle(request), Fenced)


def test_others_wait():
    j = Journal(3)
    known = j.commit(2, 1, 3, txn(put(5)))
    j.ask(Delegate(1))
    assert isinstance(j.commit(2, 2, 3, txn(put(6))), Delegated)
    assert isinstance(j.commit(2, 2, 3, txn(keys=[inode_key(6)])), Delegated)
    assert isinstance(j.ask(Open(9, "ro", b"9", "")), Delegated)
    assert isinstance(j.ask(Open(9, "rw", b"2", "")), Delegated)
    assert j.ask(Open(9, "rw", b"1", "")) == 1  # the holder's own nonce
    assert j.commit(2, 1, 3, txn(put(5))) == known  # it is known for ever
    assert j.ask(Close((3,))) == ()
    j.ask(Return(1, 1))
    assert j.commit(2, 2, 3, txn(put(6)))[1] == (True,)


def test_what_was_confirmed_meanwhile_waits_for_a_grant():
    j = Journal()
    reading, opening = Commit(2, 1, 3, (txn(keys=[inode_key(6)]),)), Open(9, "rw", b"2", "")
    j.ask(Delegate(1))
    assert isinstance(j.core.settle(reading), Delegated)
    assert isinstance(j.core.settle(opening), Delegated)


def test_who_claims_it_and_who_is_losing_it():
    j = Journal()
    core = j.core
    core.submit(Delegate(1))
    assert (core.claimant, core.holder) == (1, 0)
    formed = core.form(1)
    assert (core.claimant, core.holder) == (1, 0)
    j.learn(formed.payload)
    assert core.claimant == core.holder == 1
    for taking in (Revoke(1), Close((2, 1))):
        assert not core.losing(1)
        core.submit(taking)
        assert core.losing(1)
        core.form(2)
        assert core.losing(1)
        core.give_up()  # whoever asked was told that it is not known
        assert core.losing(1)
        core.retract()
    core.submit(Revoke(7))
    core.submit(Return(1, 1))
    core.submit(Close((2,)))
    assert not core.losing(1)


# ------------------------------------------------------------------------------------- times


def test_others_must_be_silent_for_a_grant():
    s = Standing(100.0)
    assert s.wait(1, (1,), 100.0) == 0  # nobody else: at once
    assert s.wait(1, (1, 2), 100.0) == 15.0  # what the owner before heard is not known
    assert s.wait(1, (1, 2), 115.0) == 0
    s.heard(2, 110.0)
    assert s.wait(1, (1, 2), 115.0) == 10.0
    s.heard(1, 115.0)
    assert s.wait(1, (1, 2), 125.0) == 0
    assert s.wait(2, (1, 2), 125.0) == 5.0


def test_a_silent_holder_is_revoked_after_a_lease():
    s = Standing(100.0)
    s.heard(1, 101.0)
    s.want(0, 102.0)
    assert s.due(1, 0, 102.0) == 14.0
    s.heard(1, 110.0)
    assert s.due(1, 0, 116.0) == 9.0
    assert s.due(1, 0, 125.0) == 0


def test_a_take_over_gives_the_holder_a_whole_lease():
    s = Standing(100.0)
    s.want(0, 100.0)
    assert s.due(1, 0, 114.9) > 0
    assert s.due(1, 0, 115.0) == 0


def test_a_holder_that_beats_but_does_not_get_on_is_revoked():
    s = Standing(0.0)
    s.want(7, 1000.0)
    for now in range(1000, 1030):
        s.heard(1, now)
        assert s.due(1, 7, now) > 0
    s.heard(1, 1030.0)
    assert s.due(1, 7, 1030.0) == 0
    assert s.due(1, 8, 1030.0) == 15.0  # it committed something
    progress, now = 8, 1030.0
    while s.due(1, progress, now) > 0:
        now += 1
        progress += 1
        s.heard(1, now)
    assert now == 1120.0


def test_it_is_kept_back_ever_longer_after_recalls():
    s = Standing(0.0)
    now, kept = 100.0, []
    for _ in range(8):
        s.want(0, now)
        s.ended(now + 1)
        kept.append(s.wait(1, (1,), now + 1))
        now += 1 + kept[-1] + 30
    assert kept == [1, 2, 4, 8, 16, 32, 60, 60]
    now += 31
    s.want(0, now)
    s.ended(now)
    assert s.wait(1, (1,), now) == 1
    s.ended(now + 5)  # returned without being asked
    assert s.wait(1, (1,), now + 5) == 0


def test_beats_of_sessions_that_ended_are_forgotten():
    s = Standing(0.0)
    s.heard(1, 50.0)
    s.heard(2, 50.0)
    assert s.expired((1, 3), 40.0, 60.0) == (3,)
    assert s._beats == {1: 50.0}
    assert s.expired((1, 3), 40.0, 91.0) == (1, 3)
