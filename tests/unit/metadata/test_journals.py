"""`JournalHost` and `Journal`: creation, ownership, waiting, catching up, disks that fail."""

import contextlib
import random
from types import SimpleNamespace

import pytest
import trio

from dfs.env import Env
from dfs.errors import (
    AlreadyExists,
    DiskFull,
    InvalidArgument,
    NoQuorum,
    NotFound,
    NotHome,
    StoreFailed,
)
from dfs.testing.chunkcluster import SimClock
from dfs.testing.disk import SimDisk
from dfs.testing.journal_cores import genesis
from dfs.testing.network import SimNetwork
from dfs.testing.processes import SimProcesses
from dfs.volume import entries
from metadata.journals import JournalHost, Trimmed

V = b"v" * 16
HOMES = (0, 1, 2)
FIRST = genesis(HOMES)


class Map:
    epoch = 1

    def __init__(self, count):
        self.nodes = [
            SimpleNamespace(number=i, metadata_addr=f"tcp://n{i}:1") for i in range(count)
        ]
        self.homes = HOMES

    def volume_homes(self, volume):
        return self.homes


class Cluster:
    def __init__(self, nursery, network, count):
        self.nursery = nursery
        self.network = network
        self.map = Map(count)
        self.disks = [SimDisk(random.Random(i)) for i in range(count)]
        self.hosts = [None] * count
        self.ends = [None] * count
        self.scopes = [None] * count
        self.died = {}

    async def start(self, i, **options):
        self.ends[i] = end = self.network.endpoint(f"n{i}")
        rnd = random.Random(i)
        env = Env(SimClock(), self.disks[i], end, SimProcesses(rnd), rnd)
        self.hosts[i] = host = JournalHost(env, i, lambda: self.map, **options)
        await self.nursery.start(self._run, i, host, end)

    async def _run(self, i, host, end, *, task_status):
        with trio.CancelScope() as self.scopes[i]:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(host.run)
                    handlers = host.handlers()
                    await end.serve(
                        f"tcp://n{i}:1", handlers, started=lambda _: task_status.started()
                    )
            except* StoreFailed as e:
                self.died[i] = e.exceptions[0]
                end.close()

    def stop(self, i):
        self.ends[i].close()
        self.disks[i].crash()
        self.scopes[i].cancel()

    def journal(self, i):
        return self.hosts[i].get(V)


@contextlib.asynccontextmanager
async def cluster(count=3, *, create=True, **options):
    async with (
        SimNetwork(random.Random(1), SimClock()) as network,
        trio.open_nursery() as nursery,
    ):
        made = Cluster(nursery, network, count)
        for i in range(count):
            await made.start(i, **options)
        if create:
            await made.hosts[0].create(V, FIRST, timeout=5)
            await trio.sleep(0.1)
        yield made
        nursery.cancel_scope.cancel()


async def test_created_owned_written_read_everywhere():
    async with cluster() as c:
        assert [h.volumes() for h in c.hosts] == [[V]] * 3
        journal = c.journal(1)
        seen = []
        c.journal(2).subscribe(lambda seq, payload: seen.append((seq, payload)))
        await journal.acquire(5)
        assert journal.owned
        assert [await journal.propose(b"entry %d" % k, 5) for k in range(3)] == [2, 3, 4]
        await trio.sleep(0.5)
        for i in HOMES:
            other = c.journal(i)
            assert other.owner == 1
            assert other.members == HOMES
            assert other.entries(1) == [(k + 2, b"entry %d" % k) for k in range(3)]
            assert other.genesis == FIRST
        assert seen == journal.entries(1)
        assert [s for s, _ in journal.entries(0, 1)] == [1], "at least one, whatever the limit"


async def test_creation_is_idempotent_and_refuses_another_genesis():
    async with cluster() as c:
        await c.hosts[2].create(V, FIRST, timeout=5)
        with pytest.raises(AlreadyExists):
            await c.hosts[1].create(V, genesis((0, 1)), timeout=5)
        with pytest.raises(InvalidArgument):
            await c.ends[0].call("tcp://n1:1", "jrnl.genesis", (b"w" * 16, b"no"), timeout=5)
        assert c.hosts[1].get(b"w" * 16) is None


async def test_creation_needs_a_majority_and_names_who_failed():
    async with cluster(create=False) as c:
        c.stop(0)
        c.stop(2)
        with pytest.raises(NoQuorum, match=r"at nodes \[1\] of .* node 0: .*; node 2: "):
            await c.hosts[1].create(V, FIRST, timeout=1)


async def test_a_home_that_missed_the_creation_fills_itself():
    async with cluster(create=False) as c:
        c.stop(2)
        await c.hosts[0].create(V, FIRST, timeout=1)
        journal = c.journal(0)
        await journal.acquire(5)
        for k in range(50):
            await journal.propose(b"x" * 20_000 + b"%d" % k, 5)
        await journal.trim(20)
        await c.start(2)
        assert c.journal(2) is None
        await journal.propose(b"last", 5)
        await trio.sleep(1)
        late = c.journal(2)
        assert (late.base, late.chosen) == (19, 52)
        assert late.genesis == FIRST
        assert late.entries(19, 1 << 30) == journal.entries(19, 1 << 30)
        c.stop(0)
        await late.acquire(5)
        assert await late.propose(b"mine", 5) == 53


async def test_a_node_that_is_no_home_stays_without():
    async with cluster(4) as c:
        await c.ends[0].call("tcp://n3:1", "jrnl", (V, 0, (8, 1, b"h" * 32)), timeout=1)
        assert c.hosts[3].get(V) is None
        assert c.hosts[3].statistics()["journals"] == 0


async def test_a_lost_owner_is_told():
    async with cluster() as c:
        first, second = c.journal(0), c.journal(1)
        await first.acquire(5)
        await second.acquire(5)
        with pytest.raises(NotHome):
            await first.confirm(5)
        assert not first.owned
        assert first.owner == 1
        with pytest.raises(NotHome):
            await first.propose(b"x", 5)
        await second.confirm(5)


async def test_without_a_majority_everything_ends_in_time():
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        c.stop(1)
        c.stop(2)
        for verb in (lambda: journal.propose(b"x", 2), lambda: journal.confirm(2)):
            start = trio.current_time()
            with pytest.raises(NoQuorum, match=r"nodes \[0\] did, nodes \[1, 2\] did not"):
                await verb()
            assert trio.current_time() - start == pytest.approx(2, abs=0.1)
        await c.start(1)
        assert await journal.propose(b"y", 5) == 3, "the entry in doubt went first"
        assert journal.entries(1) == [(2, b"x"), (3, b"y")]


async def test_confirms_share_rounds():
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        before = c.network.counts["sent"]
        async with trio.open_nursery() as nursery:
            for _ in range(100):
                nursery.start_soon(journal.confirm, 5)
        # The first of them in one round, the other 99 in the next: 2 x (2 requests + 2 answers).
        assert c.network.counts["sent"] - before <= 10
        syncs = [d.syncs for d in c.disks] if hasattr(c.disks[0], "syncs") else []
        await journal.confirm(5)
        assert syncs == [d.syncs for d in c.disks], "a confirm syncs nothing"


async def test_a_cancelled_proposal_leaves_the_line():
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(journal.propose, b"first", 5)
            await trio.testing.wait_all_tasks_blocked()
            with trio.move_on_after(0):
                await journal.propose(b"never", 5)
            assert await journal.propose(b"second", 5) == 3
        assert [p for _, p in journal.entries(1)] == [b"first", b"second"]


async def test_trimmed_entries_are_refused_not_invented():
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        for k in range(10):
            await journal.propose(b"%d" % k, 5)
        await journal.trim(6)
        assert journal.base == 5
        assert [s for s, _ in journal.entries(5)] == list(range(6, 12))
        with pytest.raises(Trimmed) as caught:
            journal.entries(4)
        assert caught.value.details == (5,)


async def test_old_entries_come_from_the_log():
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        payloads = [bytes([k]) * 50_000 for k in range(20)]
        for payload in payloads:
            await journal.propose(payload, 5)
        assert len(journal.replica.tail) < 10
        assert [p for _, p in journal.entries(1, 1 << 30)] == payloads


async def test_everything_acknowledged_survives_a_power_cut_of_all_nodes():
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        for k in range(10):
            await journal.propose(b"%d" % k, 5)
        for i in HOMES:
            c.stop(i)
        for i in HOMES:
            await c.start(i)
        again = c.journal(2)
        await again.acquire(5)
        assert [p for _, p in again.entries(1)] == [b"%d" % k for k in range(10)]


async def test_a_full_disk_refuses_writes_and_answers_reads():
    async with cluster(segment_bytes=2000) as c:
        journal = c.journal(0)
        await journal.acquire(5)
        c.disks[0].full = True
        await journal.propose(b"a" * 3000, 5)  # the two others suffice; the own vote waits for room
        await trio.sleep(0.1)
        await journal.confirm(5)
        with pytest.raises(DiskFull):
            await journal.propose(b"c", 5)
        c.disks[0].full = False
        await trio.sleep(1)
        await journal.propose(b"d", 5)


async def test_a_failed_sync_ends_the_node_and_the_others_go_on():
    async with cluster() as c:
        await c.journal(0).acquire(5)
        c.disks[0].fail_next("sync", "journals")
        with contextlib.suppress(NoQuorum, NotHome, StoreFailed):
            await c.journal(0).propose(b"x", 1)
        await trio.sleep(0.1)
        assert "Input/output error" in str(c.died[0])
        with pytest.raises(StoreFailed):
            await c.hosts[0].get(V).confirm(1)
        await c.journal(1).acquire(5)
        await c.journal(1).propose(b"y", 5)


async def test_a_damaged_log_keeps_the_node_from_voting():
    async with cluster() as c:
        await c.journal(0).acquire(5)
        for k in range(5):
            await c.journal(0).propose(b"%d" % k, 5)
        await trio.sleep(1)
        c.stop(1)
        name = f"journals/{c.disks[1].listdir('journals')[0]}"
        c.disks[1].flip(name, 120)
        with pytest.RaisesGroup(pytest.RaisesExc(StoreFailed, match=r"000000000001\.log.*offset")):
            async with trio.open_nursery() as nursery:
                end = c.network.endpoint("n1")
                rnd = random.Random(1)
                env = Env(SimClock(), c.disks[1], end, SimProcesses(rnd), rnd)
                await nursery.start(JournalHost(env, 1, lambda: c.map).run)


async def test_members_move_and_the_log_shrinks():
    async with cluster(5, segment_bytes=2000) as c:
        journal = c.journal(0)
        await journal.acquire(5)
        for k in range(40):
            await journal.propose(b"entry %d" % k, 5)
        c.map.homes = (0, 3, 4)
        entry = entries.encode(entries.CONFIG, 0, journal.config_version + 1, (0, 3, 4))
        assert await journal.propose(entry, 5) == 42
        assert await journal.propose(b"after", 5) == 43
        await trio.sleep(1)
        assert c.journal(3).members == (0, 3, 4)
        assert c.journal(4).chosen == 43
        with pytest.raises(NotHome) as caught:
            await c.journal(1).acquire(5)
        assert caught.value.details == (0, 3, 4)
        segments = c.hosts[0].statistics()["segments"]
        await journal.trim(43)
        await trio.sleep(1)
        assert c.hosts[0].statistics()["segments"] < segments


async def test_status_tells_what_is_held_durably():
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        await journal.propose(b"x", 5)
        (status,), _ = await c.ends[1].call("tcp://n0:1", "jrnl.status", (V,), timeout=5)
        assert status["chosen"] == 2
        assert status["owned"] is True
        assert status["members"] == HOMES
        with pytest.raises(NotFound):
            await c.ends[1].call("tcp://n0:1", "jrnl.status", (b"w" * 16,), timeout=5)


async def test_an_idle_journal_costs_nothing():
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        await journal.propose(b"x", 5)
        await trio.sleep(5)
        before = c.network.counts["sent"]
        await trio.sleep(3600)
        assert c.network.counts["sent"] == before
        assert c.hosts[0].statistics()["active"] == 0


async def test_a_subscriber_may_act_on_what_it_hears():
    """Effects made from inside a callback wait for those under way."""
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        order = []

        def heard(seq, payload):
            order.append(seq)
            if seq == 4:
                journal._run(journal.replica.trim(2, 0.0))

        journal.subscribe(heard)
        for _ in range(3):
            await journal.propose(b"x", 5)
        assert order == [2, 3, 4]
        assert journal.base == 2
        journal.unsubscribe(heard)
        await journal.propose(b"x", 5)
        assert order == [2, 3, 4]


def counted(monkeypatch, log):
    """How often the timers' task of a log's node looks around."""
    looks = []
    idle = log.idle
    monkeypatch.setattr(log, "idle", lambda now: looks.append(now) or idle(now))
    return looks


@pytest.mark.parametrize("told", [True, False])
async def test_who_only_votes_is_left_alone_until_its_log_is_to_be_marked(monkeypatch, told):
    if not told:  # the mutant: a task that rests is not told that there is something to mark
        never = property(lambda _: False, lambda *_: None)
        monkeypatch.setattr(JournalHost, "_resting", never, raising=False)
    async with cluster() as c:
        journal = c.journal(0)
        await journal.acquire(5)
        await trio.sleep(60)  # all know everything, nobody has anything to do
        logs = [c.hosts[i].log for i in HOMES]
        assert all(log._marked == log._synced for log in logs) == told
        looks = [counted(monkeypatch, log) for log in logs]
        await trio.sleep(10)
        assert not told or max(map(len, looks)) <= 10  # one a second, for what is far away
        before = [log._synced for log in logs]
        began, count = trio.current_time(), 0
        while trio.current_time() < began + 2:
            await journal.propose(b"x" * 20, 5)
            count += 1
        lasted = trio.current_time() - began
        assert count > 100
        assert all(log._synced > at for log, at in zip(logs, before, strict=True))
        assert max(map(len, looks[1:])) < 60, "far fewer looks than votes"
        assert len(looks[0]) > 0.8 * lasted / 0.02, "the owner has timers to look at"
        await trio.sleep(0.6)  # the others heard by then of what was chosen without them
        assert not told or all(log._marked == log._synced for log in logs)
