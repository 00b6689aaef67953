"""Giving, recalling and revoking the delegation on three real metadata nodes, by the clock."""

import contextlib
from random import Random

import pytest
import trio

from dfs.clock import SystemClock
from dfs.errors import (
    Busy,
    DeadlineExceeded,
    DfsError,
    DiskFull,
    Fenced,
    InvalidArgument,
    NoQuorum,
    NotHome,
    leaves,
)
from dfs.testing.homecluster import HomeClient, HomeCluster, nonce
from dfs.testing.network import SimNetwork
from dfs.volume import entries
from dfs.volume.effects import PUT
from dfs.volume.items import DIR, Inode, inode_key
from metadata import delegation, volumehome
from metadata.journals import Journal
from metadata.requests import Close, Revoke
from metadata.tail import kind_of
from metadata.volumes import HomeCore
from metadata.volumeservice import VolumeService

VOLUME = b"v" * 16


@contextlib.asynccontextmanager
async def cluster():
    network = SimNetwork(Random(1), SystemClock())
    async with network, trio.open_nursery() as nursery:
        made = HomeCluster(1, network, nursery)
        await made.start()
        await made.create(VOLUME)
        yield made
        nursery.cancel_scope.cancel()


def txn(ino=0, keys=()):
    effects = ((PUT, inode_key(ino), Inode(DIR, 0).encode()),) if ino else ()
    return (tuple(keys), (), effects)


class Client:
    """A session, and the requests that it makes of the owner or of some home."""

    def __init__(self, cluster, name):
        self.cluster = cluster
        self.raw = HomeClient(cluster, name)
        self.name = name
        self.no = 0

    async def open(self, mode="rw"):
        answer = await self.raw.ask("vol.open", VOLUME, mode, nonce(self.name), self.name)
        self.sid, self.seq = answer[:2]
        return self

    async def ask(self, method, *args, at=None):
        at = at or homes(self.cluster)[0]
        return await self.raw.call(at, "vol." + method, VOLUME, *args, timeout=6.0)

    async def commit(self, *txns, epoch=0, again=False, at=None):
        self.no += not again
        args = (self.sid, self.no, self.seq, self.seq, txns, 0, epoch)
        return await self.ask("commit", *args, at=at)

    async def watch(self, wait=0.5, have=None):
        return await self.ask("watch", self.sid, self.seq if have is None else have, wait)

    async def hold(self):
        """Ask until the delegation is granted; (epoch, seconds that it took)."""
        start = trio.current_time()
        while True:
            epoch, _, wait, _ = await self.ask("delegate", self.sid)
            if epoch:
                return epoch, trio.current_time() - start
            await trio.sleep(wait)

    async def beat(self, seconds, commits=0):
        """Watch for a while, as a holder that does not return what it has."""
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            self.seq, *_, state = await self.watch()
            await trio.sleep(0.2)
        return state


def homes(c):
    return c.map().volume_homes(VOLUME)


async def two(c):
    return await Client(c, "a").open(), await Client(c, "b").open()


async def persist(client, method, *args):
    """Ask until there is an answer; (answer or `Fenced`, seconds that it took)."""
    start = trio.current_time()
    while True:
        try:
            return await client.ask(method, *args), trio.current_time() - start
        except Fenced as e:
            return e, trio.current_time() - start
        except (Busy, DfsError):
            await trio.sleep(0.05)


async def delegations(c):
    held = max(
        (n.node.journals.get(VOLUME) for n in c.nodes.values() if n.up), key=lambda j: j.chosen
    )
    found = [entries.decode(data) for _, data in held.entries(held.base, 1 << 30)]
    return [e.body for e in found if e.kind == entries.DELEGATION]


async def test_the_only_session_has_it_at_once():
    async with cluster() as c:
        a = await Client(c, "a").open()
        epoch, seq, wait, owner = await a.ask("delegate", a.sid)
        assert (epoch, seq, wait, owner) == (1, a.seq + 1, 0.0, homes(c)[0])
        assert await a.ask("delegate", a.sid) == (1, seq, 0.0, owner)
        assert (await a.watch())[4] == (1, a.sid, False)
        a.seq = seq
        *_, verdicts, _, _, state = await a.commit(txn(5), epoch=1)
        assert (verdicts, state) == ((True,), (1, a.sid, False))
        assert await a.ask("return", a.sid, 1) == (seq + 2, owner)
        assert await a.ask("return", a.sid, 1) == (seq + 2, owner)
        assert (await a.watch(wait=0))[4] == (2, 0, False)
        with pytest.raises(Fenced):
            await a.commit(txn(6), epoch=1)
        assert await delegations(c) == [(1, a.sid), (2, 0)]


async def test_who_may_not_have_it():
    async with cluster() as c:
        ro = await Client(c, "ro").open("ro")
        with pytest.raises(InvalidArgument, match="read-only"):
            await ro.ask("delegate", ro.sid)
        with pytest.raises(Fenced):
            await ro.ask("delegate", 12345)
        for bad in (("delegate", "x"), ("return", 1, "x"), ("return", 1)):
            with pytest.raises(InvalidArgument):
                await ro.ask(*bad)


async def test_others_must_be_silent_for_a_lease():
    async with cluster() as c:
        a, b = await two(c)
        await a.beat(20)  # the home has owned the ballot for long
        await b.watch(wait=0)
        epoch, _, wait, _ = await a.ask("delegate", a.sid)
        assert (epoch, round(wait)) == (0, 15)
        await trio.sleep(10)
        await b.watch(wait=0)
        _, took = await a.hold()
        assert 14.9 < took < 15.1


async def test_sessions_that_ended_do_not_count():
    async with cluster() as c:
        a, b = await two(c)
        assert not (await a.ask("delegate", a.sid))[0]
        await b.ask("close", b.sid)
        assert (await a.ask("delegate", a.sid))[0] == 1


async def test_a_new_owner_counts_every_session_as_heard_of():
    async with cluster() as c:
        a, _ = await two(c)
        await a.beat(20)
        owner, other, _ = homes(c)
        c.nodes[owner].crash()
        with contextlib.suppress(DfsError):
            await a.raw.ask("vol.sync", VOLUME)
        at = other if other in c.owners(VOLUME) else homes(c)[2]
        epoch, _, wait, _ = await a.ask("delegate", a.sid, at=at)
        assert epoch == 0
        assert 14.0 < wait <= 15.0


async def test_a_recall_wakes_the_holder_and_others_go_on_when_it_is_back():
    async with cluster() as c:
        a, b = await two(c)
        epoch, _ = await a.hold()
        a.seq = (await a.watch(wait=0))[0]
        got = {}

        async def holder():
            *_, state = await a.watch()
            got["told"], got["state"] = trio.current_time(), state
            await a.commit(txn(7), epoch=epoch)
            got["seq"] = (await a.ask("return", a.sid, epoch))[0]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(holder)
            await trio.sleep(0.1)
            start = trio.current_time()
            _, seq, verdicts, news, _, state = await b.commit(txn(8, keys=[inode_key(9)]))
        assert got["told"] - start < 0.05
        assert got["state"] == (epoch, a.sid, True)
        assert trio.current_time() - start < 0.2
        assert (seq, verdicts, state) == (got["seq"] + 1, (True,), (epoch + 1, 0, False))
        assert [n for n, _ in news][-1] == seq


WAITING = {
    "commit": lambda b: b.commit(txn(8)),
    "read": lambda b: b.commit(txn(keys=[inode_key(8)])),
    "known": lambda b: b.commit(txn(9), again=True),
    "open": lambda b: b.ask("open", "ro", nonce("c"), "c"),
    "sync": lambda b: b.ask("sync"),
    "watch": lambda b: b.watch(),
}


@pytest.mark.parametrize("request_", WAITING)
async def test_what_waits_for_it_fails_after_a_second(request_):
    async with cluster() as c:
        a, b = await two(c)
        await b.commit(txn(9))
        await a.hold()
        start, limit = trio.current_time(), 0.5 if request_ == "watch" else 1.0
        with pytest.raises(Busy):
            await WAITING[request_](b)
        assert limit <= trio.current_time() - start < limit + 0.1
        assert (await a.watch())[4][2]


async def test_what_does_not_ask_for_it():
    async with cluster() as c:
        a, b = await two(c)
        await a.commit(txn(7))
        await b.commit(txn(8))
        await a.hold()
        assert (await a.ask("open", "rw", nonce("a"), "a"))[0] == a.sid
        assert (await b.ask("delegate", b.sid))[0] == 0
        with pytest.raises(Fenced):
            await b.ask("watch", 12345, 0, 0.5)
        await b.ask("close", b.sid)
        assert not (await a.watch(wait=0))[4][2]


async def test_a_home_that_forwards_does_not_take_waiting_for_a_failure():
    async with cluster() as c:
        a, b = await two(c)
        epoch, _ = await a.hold()
        owner, other, _ = homes(c)
        for _ in range(6):
            with pytest.raises(Busy):
                await b.commit(txn(8), again=b.no > 0, at=other)
            await a.watch(wait=0)
        assert c.owners(VOLUME) == [owner]
        await a.ask("return", a.sid, epoch, at=other)
        assert (await b.commit(txn(8), again=True, at=other))[2] == (True,)


async def test_a_silent_holder_is_revoked_when_somebody_wants_it():
    async with cluster() as c:
        a, b = await two(c)
        epoch, _ = await a.hold()
        await trio.sleep(100)
        assert len(await delegations(c)) == 1
        await a.watch(wait=0)
        await trio.sleep(5)
        answer, took = await persist(b, "commit", b.sid, 1, b.seq, b.seq, (txn(8),), 0)
        assert 9.9 < took < 10.3
        assert answer[2] == (True,)
        assert await delegations(c) == [(epoch, a.sid), (epoch + 1, 0, a.sid)]
        for request in (a.watch(), a.commit(txn(5), epoch=epoch), a.commit(txn(5))):
            with pytest.raises(Fenced):
                await request
        assert (await b.ask("delegate", b.sid))[2] <= 1.0  # there is nobody else


@pytest.mark.parametrize(("commits", "limit"), [(False, 30.0), (True, 120.0)])
async def test_a_holder_that_beats_is_revoked_in_the_end(commits, limit):
    async with cluster() as c:
        a, b = await two(c)
        epoch, _ = await a.hold()
        start = trio.current_time()

        async def holder():
            ino = 10
            while True:
                try:
                    await a.watch(wait=0)
                    if commits:
                        ino += 1
                        await a.commit(txn(ino), epoch=epoch)
                except Busy:
                    pass
                except Fenced:
                    return
                await trio.sleep(0.5)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(holder)
            answer, _ = await persist(b, "commit", b.sid, 1, b.seq, b.seq, (txn(8),), 0)
        assert answer[2] == (True,)
        assert limit <= trio.current_time() - start < limit + 2


async def test_a_new_owner_waits_for_a_lease_before_it_revokes():
    async with cluster() as c:
        a, b = await two(c)
        await a.hold()
        await trio.sleep(30)
        owner, *others = homes(c)
        c.nodes[owner].crash()
        start, seq = trio.current_time(), 0
        while not seq:
            for home in others:
                with contextlib.suppress(DfsError):
                    seq = (await b.commit(txn(8), again=b.no > 0, at=home))[1]
        assert 15.0 < trio.current_time() - start < 22.0


async def test_closing_the_holder_ends_it():
    async with cluster() as c:
        a, b = await two(c)
        await a.hold()
        await a.ask("close", a.sid)
        assert (await b.commit(txn(8)))[5] == (2, 0, False)


async def test_recalls_keep_it_back():
    async with cluster() as c:
        a, b = await two(c)
        kept = []
        for _ in range(3):
            epoch, _ = await a.hold()
            with pytest.raises(Busy):
                await b.ask("sync")
            await a.ask("return", a.sid, epoch)
            await b.ask("close", b.sid)
            _, took = await a.hold()
            kept.append(round(took))
            await a.ask("return", a.sid, epoch + 2)
            b = await Client(c, f"b{len(kept)}").open()
        assert kept == [1, 2, 4]


class Slow:
    """Entries of some kinds are proposed only after `go`, or not at all if there is an `error`."""

    def __init__(self, monkeypatch):
        self.kinds, self.error = set(), None
        self.go, self.waits = trio.Event(), trio.Event()
        launch = Journal.launch

        async def held(journal, payload, timeout, then):
            self.waits.set()
            await self.go.wait()
            self.kinds = set()
            if self.error is not None:
                then(self.error)
            else:
                launch(journal, payload, timeout, then)

        def launched(journal, payload, timeout, then):
            if kind_of(payload) in self.kinds:
                trio.lowlevel.spawn_system_task(held, journal, payload, timeout, then)
            else:
                launch(journal, payload, timeout, then)

        monkeypatch.setattr(Journal, "launch", launched)


@pytest.mark.parametrize("request_", ["watch", "delegate"])
@pytest.mark.parametrize("revoked", [True, False])
async def test_no_beat_is_answered_while_a_revocation_is_under_way(request_, revoked, monkeypatch):
    slow = Slow(monkeypatch)
    async with cluster() as c:
        a, b = await two(c)
        epoch, _ = await a.hold()
        await trio.sleep(20)
        slow.kinds = {entries.DELEGATION}
        slow.error = None if revoked else DiskFull("the log is full")
        with pytest.raises(Busy):
            await b.ask("sync")
        await slow.waits.wait()

        async def beat():
            if request_ == "watch":
                return (await a.watch(wait=0))[4]
            return (*(await a.ask("delegate", a.sid))[:1], a.sid, None)

        with pytest.raises(Busy):
            await beat()
        got = []

        async def waiting():
            try:
                got.append(await beat())
            except Fenced as e:
                got.append(e)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(waiting)
            await trio.sleep(0.2)
            slow.go.set()
        if revoked:
            assert isinstance(got[0], Fenced)
        else:
            assert got[0][:2] == (epoch, a.sid)


@pytest.mark.parametrize("end", [Revoke, Close])
async def test_a_commit_in_flight_before_a_revocation_is_answered_after_it(end, monkeypatch):
    slow = Slow(monkeypatch)
    async with cluster() as c:
        a = await Client(c, "a").open()
        epoch, _ = await a.hold()
        home = c.nodes[homes(c)[0]].node.homes.find(VOLUME)
        slow.kinds = {entries.DATA}
        async with trio.open_nursery() as nursery:
            got = []

            async def commit():
                got.append(await a.commit(txn(5), epoch=epoch))

            nursery.start_soon(commit)
            await slow.waits.wait()
            ending = Revoke(epoch) if end is Revoke else Close((a.sid,))
            nursery.start_soon(home._run, home.core, ending)
            await trio.sleep(0.1)
            slow.go.set()
        assert got[0][2] == (True,)
        assert got[0][5] == (epoch + 1, 0, False)


async def test_a_grant_under_way_is_not_told_past(monkeypatch):
    slow = Slow(monkeypatch)
    async with cluster() as c:
        a, b = await two(c)
        await trio.sleep(20)
        slow.kinds = {entries.DELEGATION}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.ask, "delegate", a.sid)
            await slow.waits.wait()
            with pytest.raises(Busy):
                await b.watch()
            with pytest.raises(Busy):
                await b.ask("sync")
            slow.go.set()
        assert (await a.watch())[4] == (1, a.sid, False)
        with pytest.raises(Busy):
            await b.watch()
        assert (await a.watch())[4] == (1, a.sid, True)


@pytest.mark.parametrize("flying", [False, True])
async def test_a_beat_is_proved_by_what_was_proposed_after_it(flying, monkeypatch):
    slow = Slow(monkeypatch)
    async with cluster() as c:
        a = await Client(c, "a").open()
        epoch, _ = await a.hold()
        a.seq = (await a.commit(txn(5), epoch=epoch))[1]
        home = c.nodes[homes(c)[0]].node.homes.find(VOLUME)
        confirms, confirm = [], home._confirm

        async def counted(core):
            confirms.append(core)
            await confirm(core)

        home._confirm = counted
        slow.kinds = {entries.DATA}
        async with trio.open_nursery() as nursery:
            if flying:
                nursery.start_soon(a.commit, txn(6))
                await slow.waits.wait()
            nursery.start_soon(a.watch)
            await trio.sleep(0.1)
            if not flying:
                nursery.start_soon(a.commit, txn(6))
            await trio.sleep(0.1)
            slow.go.set()
        assert len(confirms) == flying


async def test_the_holders_resend_is_no_beat_at_an_owner_cut_off():
    async with cluster() as c:
        a = await Client(c, "a").open()
        epoch, _ = await a.hold()
        await a.commit(txn(5), epoch=epoch)
        names = [c.nodes[n].name for n in homes(c)]
        c.network.partition([[names[0], "a"], names[1:]])
        with pytest.raises((NoQuorum, DeadlineExceeded, NotHome)):
            await a.commit(txn(5), epoch=epoch, again=True)
        with pytest.raises((NoQuorum, DeadlineExceeded, NotHome)):
            await a.ask("delegate", a.sid)


async def test_a_silent_session_that_stirs_is_not_expired(monkeypatch):
    monkeypatch.setattr(volumehome, "SESSION_TTL", 20.0)
    async with cluster() as c:
        a = await Client(c, "a").open()
        await a.hold()
        await trio.sleep(19)
        await a.watch(wait=0)
        await trio.sleep(19)
        assert (await a.watch(wait=0))[4][1] == a.sid
        await trio.sleep(40)
        with pytest.raises(Fenced):
            await a.watch()
        late = await Client(c, "late").open()
        assert (await late.watch(wait=0))[4] == (2, 0, False)


def _launched(core, count):
    core.count = count


async def _unconfirmed(_self, _core):
    await trio.lowlevel.checkpoint()


BROKEN = {
    "a holder is revoked after 10 s": (
        (delegation, "SILENCE", 10.0),
        lambda _: test_a_silent_holder_is_revoked_when_somebody_wants_it(),
    ),
    "a new owner knows of silence before it took over": (
        (delegation.Standing, "silence", lambda self, sid, now: now - self._beats.get(sid, 0.0)),
        lambda _: test_a_new_owner_waits_for_a_lease_before_it_revokes(),
    ),
    "a new owner grants at once": (
        (delegation.Standing, "silence", lambda self, sid, now: now - self._beats.get(sid, 0.0)),
        lambda _: test_a_new_owner_counts_every_session_as_heard_of(),
    ),
    "a recall without progress lasts 20 s": (
        (delegation, "NO_PROGRESS", 20.0),
        lambda _: test_a_holder_that_beats_is_revoked_in_the_end(False, 30.0),
    ),
    "a recall with progress has no end": (
        (delegation, "RECALL_MAX", 140.0),
        lambda _: test_a_holder_that_beats_is_revoked_in_the_end(True, 120.0),
    ),
    "no back-off": ((delegation, "BACKOFF_MIN", 0.1), lambda _: test_recalls_keep_it_back()),
    "requests wait for long": (
        (volumehome, "RECALL_WAIT", 3.0),
        lambda _: test_what_waits_for_it_fails_after_a_second("commit"),
    ),
    "a beat is answered while a revocation is under way": (
        (HomeCore, "losing", lambda _self, _sid: False),
        lambda m: test_no_beat_is_answered_while_a_revocation_is_under_way("watch", True, m),
    ),
    "a commit is a beat while a revocation is under way": (
        (HomeCore, "losing", lambda _self, _sid: False),
        lambda m: test_a_commit_in_flight_before_a_revocation_is_answered_after_it(Revoke, m),
    ),
    "a grant that is not chosen yet does not count": (
        (HomeCore, "claimant", property(lambda self: self.holder)),
        lambda m: test_a_grant_under_way_is_not_told_past(m),
    ),
    "what was in flight proves a beat": (
        (HomeCore, "launched", property(lambda self: self.count - self.flying, _launched)),
        lambda m: test_a_beat_is_proved_by_what_was_proposed_after_it(True, m),
    ),
    "an outcome from memory is a beat": (
        (VolumeService, "_confirm", _unconfirmed),
        lambda _: test_the_holders_resend_is_no_beat_at_an_owner_cut_off(),
    ),
}


@pytest.mark.parametrize("rule", BROKEN)
async def test_each_broken_rule_turns_a_test_red(rule, monkeypatch):
    broken, check = BROKEN[rule]
    monkeypatch.setattr(*broken, raising=False)
    with pytest.raises((AssertionError, pytest.fail.Exception, BaseExceptionGroup)) as e:
        await check(monkeypatch)
    red = (AssertionError, pytest.fail.Exception)
    assert all(isinstance(x, red) for x in leaves(e.value))
