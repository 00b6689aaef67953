"""Exclusive sessions: in `HomeCore`, and by the clock on three real metadata nodes."""

import pytest
import trio

from dfs.errors import Busy, DfsError, Fenced, InUse, InvalidArgument
from dfs.volume import entries
from metadata import delegation
from metadata.exclusion import Excluded
from metadata.requests import Checkpoint, Close, Delegate, Open
from metadata.sessions import Control
from tests.unit.metadata.test_delegation import Journal
from tests.unit.metadata.test_delegation import txn as core_txn
from tests.unit.metadata.test_recall import VOLUME, Client, cluster, homes, txn

ALONE = {"rw": ("rwx",), "rwx": ("rw", "rwx"), "ro": ()}


# ------------------------------------------------------------------------------------- the core


@pytest.mark.parametrize("there", ALONE)
@pytest.mark.parametrize("asked", ALONE)
def test_who_keeps_whom_out(there, asked):
    j = Journal(0)
    assert j.ask(Open(1, there, b"1", "first")) == 1
    answer = j.ask(Open(2, asked, b"2", "second"))
    if asked in ALONE[there]:
        assert isinstance(answer, Excluded)
        assert [s.name for s in answer.rivals] == ["first"]
        assert list(j.core.sessions) == [1]
    else:
        assert answer == 2
    assert j.again().control(0) == j.core.control(0)


def test_a_resent_open_finds_its_exclusive_session():
    j = Journal(0)
    assert j.ask(Open(1, "rwx", b"1", "")) == 1
    assert j.ask(Open(2, "rwx", b"1", "")) == 1
    assert list(j.core.sessions) == [1]


def test_the_end_of_an_exclusive_session_lets_others_in():
    j = Journal(0)
    j.ask(Open(1, "rwx", b"1", ""))
    assert j.ask(Close((1,))) == ()
    assert j.ask(Open(2, "rw", b"2", "")) == 2
    assert isinstance(j.commit(1, 1, j.core.seq, core_txn(), epoch=0), Fenced)


def test_an_exclusive_session_commits_and_may_have_the_delegation():
    j = Journal(0)
    j.ask(Open(1, "rwx", b"1", ""))
    assert j.ask(Delegate(1)) == 1
    assert j.commit(1, 1, 0, core_txn(), epoch=1)[1] == (True,)


def test_who_is_kept_out_does_not_recall_the_delegation():
    j = Journal(0)
    j.ask(Open(1, "rwx", b"1", ""))
    j.ask(Delegate(1))
    assert isinstance(j.ask(Open(2, "rw", b"2", "")), Excluded)
    assert isinstance(j.ask(Open(3, "rwx", b"3", "")), Excluded)
    assert isinstance(j.ask(Open(4, "ro", b"4", "")), delegation.Delegated)


def test_a_checkpoint_carries_that_a_session_is_exclusive():
    j = Journal(0)
    j.ask(Open(1, "rwx", b"1", "db"))
    covered = j.core.seq
    j.ask(Checkpoint(covered, b"r", 0))
    (session,) = Control.decode(entries.decode(j.log[-1]).body[2]).sessions
    assert (session.mode, session.writes) == ("rwx", True)
    j.core = j.again(covered)
    assert isinstance(j.ask(Open(2, "rw", b"2", "")), Excluded)


# ------------------------------------------------------------------------------------ the clock


async def until_open(client, mode):
    """Seconds until an open succeeds."""
    start = trio.current_time()
    while True:
        try:
            await client.open(mode)
        except (InUse, Busy):
            await trio.sleep(0.2)
        else:
            return trio.current_time() - start


async def test_the_refusal_names_the_holder_and_what_to_do():
    async with cluster() as c:
        a = await Client(c, "the database").open("rwx")
        await a.watch(wait=0)
        for mode in ("rw", "rwx"):
            with pytest.raises(
                InUse, match=r"exclusively by .*the database.*unmount it there"
            ) as e:
                await Client(c, f"b{mode}").open(mode)
            assert e.value.details[0] == a.sid
            assert 0 <= e.value.details[1] < 1
        await Client(c, "reader").open("ro")


async def test_a_writer_keeps_an_exclusive_session_out():
    async with cluster() as c:
        a = await Client(c, "writer").open()
        with pytest.raises(InUse, match=r"exclusively, session .*writer.* for writing.*unmount"):
            await Client(c, "b").open("rwx")
        await a.ask("close", a.sid)
        await Client(c, "b").open("rwx")


@pytest.mark.parametrize("there", ["rw", "rwx"])
@pytest.mark.parametrize("holds", [False, True])
async def test_a_silent_session_makes_way_and_is_fenced(there, holds):
    async with cluster() as c:
        a = await Client(c, "a").open(there)
        await a.watch(wait=0)
        if holds:
            await a.hold()
        b = Client(c, "b")
        waited = await until_open(b, "rwx")
        assert delegation.SILENCE - 0.5 < waited < delegation.SILENCE + 2
        with pytest.raises(Fenced):
            await a.watch(wait=0)
        with pytest.raises(Fenced):
            await a.commit(txn(5), epoch=int(holds))
        with pytest.raises(InUse):
            await Client(c, "c").open("rw")


async def test_a_session_that_beats_keeps_others_out():
    async with cluster() as c, trio.open_nursery() as nursery:
        a = await Client(c, "a").open("rwx")
        nursery.start_soon(a.beat, 40)
        with trio.move_on_after(35):
            await until_open(Client(c, "b"), "rw")
            pytest.fail("two writers")
        assert (await a.commit(txn(5)))[2] == (True,)


async def test_a_new_owner_gives_the_holder_its_time():
    async with cluster() as c:
        a = await Client(c, "a").open("rwx")
        await trio.sleep(delegation.SILENCE - 2)
        c.nodes[homes(c)[0]].crash()
        b = Client(c, "b")
        start = trio.current_time()
        while True:
            try:
                answer = await b.raw.call(
                    homes(c)[1], "vol.open", VOLUME, "rw", b"b" * 16, "b", timeout=6.0
                )
            except InUse as e:
                assert e.details == (a.sid, None)  # noqa: PT017 - the others are not of interest
                await trio.sleep(0.2)
            except DfsError:
                await trio.sleep(0.2)
            else:
                break
        assert answer[0] != a.sid
        assert trio.current_time() - start > delegation.SILENCE


async def test_who_is_about_to_end_is_told_nothing():
    async with cluster() as c:
        a = await Client(c, "a").open("rwx")
        core = c.nodes[homes(c)[0]].node.homes.find(VOLUME).core
        core.submit(Close((a.sid,)))
        assert core.losing(a.sid)
        core.retract()
        assert not core.losing(a.sid)


async def test_other_modes_are_refused():
    async with cluster() as c:
        with pytest.raises(InvalidArgument, match="rwx"):
            await Client(c, "a").open("w")
