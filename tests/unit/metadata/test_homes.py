"""The `vol.*` service on three real metadata nodes over a simulated network."""

import contextlib
from itertools import pairwise
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
    Unreachable,
    VolumeNotFound,
)
from dfs.testing.homecluster import SALT, HomeClient, HomeCluster, nonce
from dfs.testing.network import SimNetwork
from dfs.volume import entries, tree
from dfs.volume.effects import ADD, PATCH, PUT, SET
from dfs.volume.items import DIR, F_MODE, F_NLINK, Inode, group, inode_key
from metadata import pace, requests, volumehome, volumes, volumeservice

VOLUME = b"v" * 16


@contextlib.asynccontextmanager
async def cluster(nodes=3, seed=1, **kw):
    network = SimNetwork(Random(seed), SystemClock())
    async with network, trio.open_nursery() as nursery:
        made = HomeCluster(seed, network, nursery, nodes=nodes, **kw)
        await made.start()
        await made.create(VOLUME)
        yield made
        nursery.cancel_scope.cancel()


def put(ino, mode=0):
    return (PUT, inode_key(ino), Inode(DIR, mode).encode())


def txn(effects=(), keys=(), groups=()):
    return (tuple(keys), tuple(groups), tuple(effects))


class Session:
    """A client with one open session that remembers its last number and seq."""

    def __init__(self, cluster, name="c"):
        self.client = HomeClient(cluster, name)
        self.name = name
        self.no = 0

    async def open(self, mode="rw"):
        answer = await self.client.ask("vol.open", VOLUME, mode, nonce(self.name), self.name)
        self.sid, self.seq = answer[:2]
        return self

    async def commit(self, *txns, base=None, no=None, at=None, oldest=0):
        """(seq, verdicts) of a new request; or resend request `no`, to node `at`."""
        if no is None:
            self.no += 1
        base = self.seq if base is None else base
        args = (VOLUME, self.sid, no or self.no, base, base, txns, oldest)
        if at is None:
            answer = await self.client.ask("vol.commit", *args)
        else:
            answer = await self.client.call(at, "vol.commit", *args)
        return answer[1:3]

    async def watch(self, wait=0.5, have=None):
        have = self.seq if have is None else have
        return await self.client.ask("vol.watch", VOLUME, self.sid, have, wait)

    async def close(self):
        await self.client.ask("vol.close", VOLUME, self.sid)


async def opened(cluster, name="c", mode="rw"):
    return await Session(cluster, name).open(mode)


def homes(cluster):
    return cluster.map().volume_homes(VOLUME)


async def test_open_commit_watch_close():
    async with cluster() as c:
        client = HomeClient(c, "c")
        sid, seq, covered, root, tail, owner, params = await client.ask(
            "vol.open", VOLUME, "rw", nonce(1), "me"
        )
        assert (covered, root, params["name"]) == (0, b"", "test")
        assert [s for s, _ in tail] == list(range(1, seq + 1))
        assert owner == c.map().volume_homes(VOLUME)[0]
        no, at, verdicts, news, _, state = await client.ask(
            "vol.commit", VOLUME, sid, 1, seq, seq, (txn([put(5)]),), 0
        )
        assert (no, at, verdicts, state) == (1, seq + 1, (True,), (0, 0, False))
        assert entries.decode(news[0][1]).body == (((sid, 1, (True,), (put(5),)),),)
        seq2, news2, reset, _, state = await client.ask("vol.watch", VOLUME, sid, seq, 0.5)
        assert (seq2, news2, reset, state) == (at, news, None, (0, 0, False))
        assert await client.ask("vol.sync", VOLUME) == (at, owner)
        assert await client.ask("vol.close", VOLUME, sid) == ()
        assert await client.ask("vol.close", VOLUME, sid) == ()
        with pytest.raises(Fenced):
            await client.ask("vol.commit", VOLUME, sid, 2, at, at, (txn([put(6)]),), 0)
        with pytest.raises(Fenced):
            await client.ask("vol.watch", VOLUME, sid, at, 0.1)


async def test_conflicts_are_judged_by_reads_after_the_base():
    async with cluster() as c:
        a, b = await opened(c, "a"), await opened(c, "b")
        base = b.seq
        seq, _ = await a.commit(txn([put(5)]), base=base)
        key, members = inode_key(5), group(5, 0)
        assert (await b.commit(txn([put(7)], keys=[key]), base=base))[1] == (False,)
        assert (await b.commit(txn([put(7)], groups=[members]), base=base))[1] == (False,)
        assert (await b.commit(txn(keys=[key]), base=base))[1] == (False,)
        assert (await b.commit(txn(keys=[key]), base=seq)) == (seq, (True,))
        assert (await b.commit(txn([put(7)], keys=[inode_key(6)]), base=base))[1] == (True,)


async def test_additions_do_not_conflict():
    async with cluster() as c:
        a = await opened(c)
        seq, _ = await a.commit(txn([put(5)]))
        add = (PATCH, inode_key(5), ((F_NLINK, ADD, 1),))
        assert (await a.commit(txn([add]), base=seq))[1] == (True,)
        assert (await a.commit(txn([add], keys=[inode_key(5)]), base=seq))[1] == (True,)
        change = (PATCH, inode_key(5), ((F_MODE, SET, 1),))
        assert (await a.commit(txn([change]), base=seq))[1] == (True,)
        assert (await a.commit(txn([add], keys=[inode_key(5)]), base=seq))[1] == (False,)


async def test_transactions_of_one_request_are_judged_in_order():
    async with cluster() as c:
        a = await opened(c)
        key = inode_key(5)
        _, verdicts = await a.commit(
            txn([put(5)]), txn([put(6)], keys=[key]), txn([put(7)]), txn(keys=[inode_key(8)])
        )
        assert verdicts == (True, False, True, True)
        assert len(await journal(c, entries.DATA)) == 1


async def journal(c, *kinds):
    """Entries of these kinds that the best informed running node holds."""
    held = [n.node.journals.get(VOLUME) for n in c.nodes.values() if n.up]
    found = max(held, key=lambda j: j.chosen).entries(0, 1 << 30)
    return [e for e in (entries.decode(data) for _, data in found) if e.kind in kinds]


async def test_a_request_is_applied_once_however_often_and_wherever_it_is_sent():
    async with cluster() as c:
        a = await opened(c)
        first = await a.commit(txn([put(5)]))
        for node in homes(c):
            assert await a.commit(txn([put(5)]), no=1, at=node) == first
        c.nodes[homes(c)[0]].crash()
        assert await a.commit(txn([put(5)]), no=1) == first
        await a.commit(txn([put(6)]), base=first[0])
        assert [e.body[0][0][1] for e in await journal(c, entries.DATA)] == [1, 2]


async def test_another_home_takes_over_after_a_second_and_the_old_owner_follows_it():
    async with cluster() as c:
        a = await opened(c)
        owner, other, third = homes(c)
        seq, _ = await a.commit(txn([put(5)]))
        c.nodes[owner].crash()
        started = trio.current_time()
        with pytest.raises((Unreachable, DeadlineExceeded)):
            await a.client.call(owner, "vol.sync", VOLUME, timeout=0.2)
        while True:
            with contextlib.suppress(Unreachable, DeadlineExceeded, NoQuorum, NotHome):
                assert await a.client.call(other, "vol.sync", VOLUME) == (seq, other)
                break
        assert 1.0 <= trio.current_time() - started < 4.0
        assert await a.client.call(third, "vol.sync", VOLUME) == (seq, other)
        assert c.owners(VOLUME) == [other]
        # the first choice takes it back when it is asked again, and the others notice
        await c.nodes[owner].start()
        assert await a.client.call(owner, "vol.sync", VOLUME) == (seq, owner)
        assert await a.client.call(other, "vol.sync", VOLUME) == (seq, owner)
        assert c.owners(VOLUME) == [owner]


async def test_homes_forward_to_the_owner():
    async with cluster() as c:
        a = await opened(c)
        owner, other, _ = homes(c)
        assert c.owners(VOLUME) == [owner]
        seq, verdicts = await a.commit(txn([put(5)]), at=other)
        assert verdicts == (True,)
        assert await a.client.call(other, "vol.sync", VOLUME) == (seq, owner)
        assert c.nodes[other].node.homes.forwarded == 2
        assert c.owners(VOLUME) == [owner]


async def test_an_owner_cut_off_from_the_others_says_nothing_about_now():
    async with cluster() as c:
        a, b = await opened(c, "a"), await opened(c, "b")
        owner, other, third = homes(c)
        old = a.seq
        names = {n: c.nodes[n].name for n in homes(c)}
        c.network.partition([[names[owner], "a"], [names[other], names[third], "b"]])
        for method, args in (
            ("vol.sync", ()),
            ("vol.watch", (a.sid, old, 0.1)),
            ("vol.commit", (a.sid, 1, old, old, (txn(keys=[inode_key(5)]),), 0)),
            ("vol.commit", (a.sid, 2, old, old, (txn([put(9)]),), 0)),
            ("vol.watch", (12345, old, 0.1)),
        ):
            with pytest.raises((NoQuorum, DeadlineExceeded, NotHome)):
                await a.client.call(owner, method, VOLUME, *args, timeout=6.0)
        seq, verdicts = await b.commit(txn([put(5)]))
        assert verdicts == (True,)
        c.network.heal()
        assert (await a.client.ask("vol.sync", VOLUME))[0] >= seq
        verdict = await a.commit(txn(keys=[inode_key(5)]), base=old, no=3)
        assert verdict[1] == (False,)


async def test_watch_is_woken_by_other_sessions_and_beats_without_news():
    async with cluster() as c:
        a, b = await opened(c, "a"), await opened(c, "b")
        start = trio.current_time()
        seq, news, reset, *_ = await b.watch(wait=9.0)
        assert (seq, news, reset) == (b.seq, (), None)
        assert 0.5 <= trio.current_time() - start < 0.6
        got = []

        async def wait():
            got.append(await b.watch())
            got.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(0.1)
            seq, _ = await a.commit(txn([put(5)]), base=b.seq)
            done = trio.current_time()
        (at, news, reset, *_), when = got
        assert (at, [n for n, _ in news], reset) == (seq, [seq], None)
        assert when - done < 0.01


async def test_a_holders_watch_sleeps_through_its_own_commits():
    async with cluster() as c:
        a = await opened(c, "a")
        epoch = 0
        while not epoch:
            epoch, seq, wait, _ = await a.client.ask("vol.delegate", VOLUME, a.sid)
            await trio.sleep(wait)
        got = []

        async def watch(have):
            start = trio.current_time()
            at, news, _, _, state = await a.watch(have=have)
            got.append((at, [n for n, _ in news], state, trio.current_time() - start))

        async def commit(no, have):
            part = (txn([put(10 + no)]),)
            args = (VOLUME, a.sid, no, have, have, part, 0, epoch)
            return (await a.client.ask("vol.commit", *args))[1:3]

        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, seq)
            await trio.sleep(0.1)
            assert await commit(1, seq) == (seq + 1, (True,))
            assert await commit(2, seq + 1) == (seq + 2, (True,))
            await trio.sleep(0.1)
            assert not got
        # It has said that it has the first: only the second is news.
        assert got[0][:3] == (seq + 2, [seq + 2], (epoch, a.sid, False))
        assert got[0][3] >= 0.5
        with trio.move_on_after(0.2):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(watch, seq + 2)
                await trio.sleep(0.05)
                nursery.start_soon(opened, c, "b")
        assert got[1][2] == (epoch, a.sid, True)
        assert got[1][3] < 0.1


async def test_commits_that_wait_share_entries():
    async with cluster() as c:
        sessions = [await opened(c, f"c{i}") for i in range(20)]
        before = len(await journal(c, entries.DATA))

        async def one(i, session):
            assert (await session.commit(txn([put(100 + i)])))[1] == (True,)

        async with trio.open_nursery() as nursery:
            for i, session in enumerate(sessions):
                nursery.start_soon(one, i, session)
        assert len(await journal(c, entries.DATA)) - before <= 6


async def test_a_clash_inside_a_batch_waits_and_is_judged_again():
    async with cluster() as c:
        sessions = [await opened(c, f"c{i}") for i in range(6)]
        base = sessions[-1].seq
        verdicts = []

        async def one(session):
            key = inode_key(5)
            verdicts.append((await session.commit(txn([put(5)], keys=[key]), base=base))[1])

        async with trio.open_nursery() as nursery:
            for session in sessions:
                nursery.start_soon(one, session)
        assert sorted(verdicts) == [(False,)] * 5 + [(True,)]


async def test_open_is_idempotent_by_nonce():
    async with cluster() as c:
        a = await opened(c)
        for node in homes(c):
            answer = await a.client.call(node, "vol.open", VOLUME, "rw", nonce("c"), "c")
            assert answer[0] == a.sid
        assert len(await journal(c, entries.SESSION)) == 1


async def test_session_ids_are_never_used_twice():
    async with cluster() as c:
        sids = []
        for i in range(4):
            sids.append((await opened(c, f"c{i}")).sid)
            owner = c.nodes[homes(c)[0]]
            owner.crash()
            await owner.start()
        assert len(set(sids)) == 4


async def test_what_is_refused():
    async with cluster() as c:
        a, ro = await opened(c, "a"), await opened(c, "ro", "ro")
        now = c.clock.time_ns()
        with pytest.raises(InvalidArgument, match="read-only"):
            await ro.commit(txn([put(5)]))
        assert (await ro.commit(txn(keys=[inode_key(5)])))[1] == (True,)
        with pytest.raises(InvalidArgument, match="touch its chunks"):
            await a.commit(txn([put(5)]), oldest=now - 13 * 3600 * 10**9)
        assert (await a.commit(txn([put(5)]), oldest=now - 3600 * 10**9))[1] == (True,)
        for bad in (
            ("vol.commit", (a.sid, 0, 1, 1, (txn(),), 0)),
            ("vol.commit", (a.sid, 9, 1, 1, (), 0)),
            ("vol.commit", (a.sid, 9, 1, 1, ((1, 2, 3),), 0)),
            ("vol.commit", (a.sid, 9, 1, 1, (txn([(PUT, b"short", b"")]),), 0)),
            ("vol.commit", (a.sid, 9, -1, 1, (txn(),), 0)),
            ("vol.commit", (a.sid, "9", 1, 1, (txn(),), 0)),
            ("vol.open", ("rx", nonce(1), "")),
            ("vol.open", ("rw", b"short", "")),
            ("vol.watch", (a.sid, 1)),
            ("vol.watch", (a.sid, "1", 0.1)),
            ("vol.close", ("x",)),
        ):
            with pytest.raises(InvalidArgument):
                await a.client.ask(bad[0], VOLUME, *bad[1])
        with pytest.raises(InvalidArgument, match="volume id"):
            await a.client.call(1, "vol.sync", b"v")


@pytest.mark.parametrize("many", [4, 1000])
async def test_a_large_commit_is_checked_between_the_turns_of_others(monkeypatch, many):
    monkeypatch.setattr(requests, "MANY", many)
    monkeypatch.setattr(volumeservice, "MANY", many)
    turns, seen = Turns(), []
    validate = requests.validate

    def noted(effects, **options):
        seen.append((turns.count, len(effects)))
        validate(effects, **options)

    async with cluster() as c:
        a = await opened(c)
        txns = [txn([put(i) for i in range(2, 12)]), txn([put(20)]), txn([put(21)])]
        bad = [txn([put(i) for i in range(30, 42)]), txn([(PUT, b"?", b"")])]
        monkeypatch.setattr(requests, "validate", noted)
        monkeypatch.setattr(volumeservice, "validate", noted)
        trio.lowlevel.add_instrument(turns)
        assert (await a.commit(*txns))[1] == (True, True, True)
        with pytest.raises(InvalidArgument, match="key"):
            await a.commit(*bad)
        trio.lowlevel.remove_instrument(turns)
    assert max(size for _, size in seen) <= many
    assert sum(size for _, size in seen) == 12 + 13
    assert len({turn for turn, _ in seen}) == (7 if many == 4 else 2)


class Turns(trio.abc.Instrument):
    """Counts the turns of tasks."""

    count = 0

    def before_task_step(self, task):
        self.count += 1


async def test_the_number_of_sessions_is_limited(monkeypatch):
    monkeypatch.setattr(volumes, "MAX_SESSIONS", 3)
    async with cluster() as c:
        held = [await opened(c, f"c{i}") for i in range(3)]
        late = HomeClient(c, "late")
        with pytest.raises(Busy, match="open sessions"):
            await late.call(homes(c)[0], "vol.open", VOLUME, "rw", nonce("late"), "")
        await held[0].client.ask("vol.close", VOLUME, held[0].sid)
        await late.ask("vol.open", VOLUME, "rw", nonce("late"), "")


async def test_silent_sessions_end_and_beating_ones_do_not(monkeypatch):
    monkeypatch.setattr(volumehome, "SESSION_TTL", 20.0)
    async with cluster() as c:
        silent, beating = await opened(c, "silent"), await opened(c, "beating")
        for _ in range(30):
            await beating.watch()
        c.nodes[homes(c)[0]].crash()  # the count starts again with the new owner
        for _ in range(30):
            beating.seq = (await beating.watch())[0]
        assert (await silent.commit(txn(keys=[inode_key(5)])))[1] == (True,)
        for _ in range(60):
            beating.seq = (await beating.watch())[0]
        with pytest.raises(Fenced):
            await silent.commit(txn([put(5)]))
        assert (await beating.commit(txn([put(5)])))[1] == (True,)


async def test_who_is_no_home_says_who_is():
    async with cluster(nodes=5) as c:
        client = HomeClient(c, "c")
        outsider = next(n for n in c.nodes if n not in homes(c))
        with pytest.raises(NotHome) as e:
            await client.call(outsider, "vol.sync", VOLUME)
        assert e.value.details == homes(c)


async def test_a_volume_that_does_not_exist_is_not_found():
    async with cluster() as c:
        client = HomeClient(c, "c")
        with pytest.raises(VolumeNotFound):
            await client.call(1, "vol.sync", b"w" * 16)
        c.nodes[2].crash()
        with pytest.raises(VolumeNotFound):  # a majority of homes has none
            await client.call(1, "vol.sync", b"w" * 16)
        c.nodes[3].crash()
        with pytest.raises((Unreachable, DeadlineExceeded, NoQuorum)):
            await client.call(1, "vol.sync", b"w" * 16, timeout=8.0)


async def test_a_home_that_missed_the_creation_passes_requests_on():
    network = SimNetwork(Random(1), SystemClock())
    async with network, trio.open_nursery() as nursery:
        c = HomeCluster(1, network, nursery)
        await c.start()
        blank = homes(c)[0]
        c.nodes[blank].crash()
        await c.create(VOLUME)
        await c.nodes[blank].start()
        client = HomeClient(c, "c")
        seq, owner = await client.call(blank, "vol.sync", VOLUME, timeout=5.0)
        assert (seq, owner in homes(c)[1:]) == (1, True)
        nursery.cancel_scope.cancel()


async def test_a_checkpoint_covers_entries_and_a_take_over_starts_from_it(monkeypatch):
    monkeypatch.setattr(volumehome, "CHECKPOINT_BYTES", 6000)
    async with cluster() as c:
        a = await opened(c)
        expected = {}
        for i in range(40):
            batch = [put(10 + 30 * i + j, j) for j in range(30)]
            expected.update((e[1], e[2]) for e in batch)
            a.seq, _ = await a.commit(txn(batch))
            await trio.sleep(0.2)
        await trio.sleep(5)
        checkpoints = await journal_checkpoints(c)
        assert len(checkpoints) >= 2
        base = c.nodes[1].node.journals.get(VOLUME).base
        assert 0 < base <= checkpoints[0].body[0]
        late = HomeClient(c, "late")
        answer = await late.ask("vol.open", VOLUME, "rw", nonce("late"), "late")
        _, seq, covered, root, tail, _, params = answer
        assert covered == checkpoints[-1].body[0]
        assert params["salt"] == SALT
        assert [n for n, _ in tail] == list(range(covered + 1, seq + 1))
        wanted, _ = tree.build(sorted(expected.items()), SALT)
        assert root == wanted
        # whoever read before the checkpoint conflicts, at this home and the next
        reads = txn([put(5)], keys=[inode_key(5)])
        assert (await a.commit(reads, base=covered - 1))[1] == (False,)
        assert (await a.commit(txn([put(4)], keys=[inode_key(5)]), base=covered))[1] == (True,)
        last = a.no
        c.nodes[homes(c)[0]].crash()
        assert (await a.commit(reads, base=covered - 1))[1] == (False,)
        assert (await a.commit(txn([put(4)], keys=[inode_key(5)]), no=last))[1] == (True,)
        behind = await a.watch(have=1)
        assert behind[2] == (covered, root)
        assert behind[1][0][0] == covered + 1


async def journal_checkpoints(c):
    node = c.nodes[1].node.journals.get(VOLUME)
    found = node.entries(node.base, 1 << 30)
    return [e for e in (entries.decode(d) for _, d in found) if e.kind == entries.CHECKPOINT]


async def test_a_checkpoint_is_due_after_five_minutes_and_an_idle_volume_rests():
    async with cluster() as c:
        a = await opened(c)
        await a.commit(txn([put(5)]))
        await trio.sleep(310)
        assert len(await journal_checkpoints(c)) == 1
        await trio.sleep(1000)
        assert len(await journal_checkpoints(c)) == 1


async def test_a_volume_that_nobody_has_open_is_folded_soon_if_it_is_worth_it(monkeypatch):
    monkeypatch.setattr(volumehome, "REST_BYTES", 2000)
    async with cluster() as c:
        a = await opened(c, "a")
        await a.commit(txn([put(5)]))
        await a.close()
        await trio.sleep(20)
        assert await journal_checkpoints(c) == []  # a few bytes are not
        b = await opened(c, "b")
        await b.commit(txn([put(10 + i) for i in range(100)]))
        await trio.sleep(20)
        assert await journal_checkpoints(c) == []  # it is in use
        await b.close()
        await trio.sleep(volumehome.REST_AFTER - 1)
        await (await opened(c, "again")).close()
        await trio.sleep(volumehome.REST_AFTER - 1)
        assert await journal_checkpoints(c) == []  # it was, just now
        await trio.sleep(3)
        (checkpoint,) = await journal_checkpoints(c)
        late = HomeClient(c, "late")
        _, seq, covered, *_ = await late.ask("vol.open", VOLUME, "rw", nonce("late"), "late")
        assert covered == checkpoint.body[0] >= seq - 3


async def test_a_fold_that_fails_is_tried_again(monkeypatch):
    monkeypatch.setattr(volumehome, "CHECKPOINT_AGE", 10.0)
    tried = []

    async def folder(root, salt, data):
        tried.append(trio.current_time())
        if len(tried) <= 7:
            raise NoQuorum("no blobs today")
        return b"r" * 32, 1000

    async with cluster(folder=folder) as c:
        a = await opened(c)
        await a.commit(txn([put(5)]))
        await trio.sleep(120)
        assert [e.body[1] for e in await journal_checkpoints(c)] == [b"r" * 32]
    pauses = [later - earlier for earlier, later in pairwise(tried)]
    assert [round(pause) for pause in pauses] == [1, 2, 4, 8, 16, 30, 30]


@pytest.mark.parametrize("mutant", [False, True], ids=["right", "mutant"])
async def test_commits_that_outrun_checkpoints_are_slowed(monkeypatch, mutant):
    monkeypatch.setattr(volumehome, "CHECKPOINT_BYTES", 2000)
    if mutant:  # nothing slows them
        monkeypatch.setattr(pace, "BEHIND", 1 << 30)
    may_fold = trio.Event()

    async def folder(root, salt, data):
        await may_fold.wait()
        return b"r" * 32, 1

    async with cluster(folder=folder) as c:
        s = await opened(c)

        async def commits(count):
            began = trio.current_time()
            for n in range(count):
                await s.commit(txn([put(5 + n)]))
            return (trio.current_time() - began) / count

        assert await commits(20) < 0.1
        await commits(150)  # some 60 bytes each: more than three times 2000
        took = await commits(5)
        assert (1 <= took < 1.5) == (not mutant), took  # slowed, not stopped
        may_fold.set()
        await trio.sleep(2)
        assert await commits(5) < 0.1


@pytest.mark.parametrize("mutant", [False, True], ids=["right", "mutant"])
async def test_commits_come_as_fast_as_they_are_folded(monkeypatch, mutant):
    """A steady pace instead of full speed and standstill in turns."""
    monkeypatch.setattr(volumehome, "CHECKPOINT_BYTES", 3000)
    monkeypatch.setattr(volumehome, "READ_BYTES", 500)
    if mutant:  # nothing is slowed before the end
        monkeypatch.setattr(pace, "EASY", pace.BEHIND - 0.001)

    async def folder(root, salt, data):
        await trio.sleep(1)
        return b"r" * 32, 1

    async with cluster(folder=folder) as c:
        s = await opened(c)
        longest, began = 0.0, trio.current_time()
        committed = 0
        while (now := trio.current_time()) - began < 15:
            s.seq, verdicts = await s.commit(txn([put(5 + committed % 100)]))
            assert verdicts == (True,)
            committed += 1
            if now - began > 5:  # the pace of folds is known
                longest = max(longest, trio.current_time() - now)
        assert (longest < 0.2) == (not mutant), longest


async def test_a_client_far_behind_gets_entries_in_portions(monkeypatch):
    monkeypatch.setattr("metadata.tail.ANSWER_BYTES", 2000)
    async with cluster() as c:
        a = await opened(c)
        start = a.seq
        for i in range(30):
            last, _ = await a.commit(txn([put(10 * i + j) for j in range(1, 6)]))
        seq, news, reset, *_ = await a.watch(have=start)
        assert (seq, reset) == (last, None)
        have = start
        while news:
            assert news[0][0] == have + 1
            have = news[-1][0]
            news = (await a.watch(have=have))[1] if have < last else ()
        assert have == last


async def test_status_names_volume_seq_and_owner():
    async with cluster() as c:
        a = await opened(c)
        seq, _ = await a.commit(txn([put(5)]))
        await trio.sleep(1)
        for number in homes(c):
            assert c.nodes[number].node.homes.status() == [(VOLUME, seq, homes(c)[0])]


async def test_a_long_take_over_is_not_taken_for_a_dead_owner(monkeypatch):
    async with cluster() as c:
        a = await opened(c)
        owner, other, _ = homes(c)
        await a.commit(txn([put(5)]))
        c.nodes[owner].crash()
        await c.nodes[owner].start()
        rebuild = volumehome.VolumeHome._rebuild

        async def slow(self):
            await trio.sleep(6)
            return await rebuild(self)

        monkeypatch.setattr(volumehome.VolumeHome, "_rebuild", slow)
        busy = 0
        for _ in range(100):
            try:
                answer = await a.client.call(other, "vol.sync", VOLUME, timeout=3.0)
                break
            except Busy:
                busy += 1
        assert busy > 2
        assert answer[1] == owner
        taken = [n.node.homes.statistics()["take_overs"] for n in c.nodes.values()]
        assert sum(taken) == 1


async def big_commits(session, node):
    for i in range(20):  # the log has room made ahead: the first get through
        await session.commit(txn([put(100 + n, i) for n in range(3000)]), at=node)
        await trio.sleep(0.1)


async def test_a_full_disk_at_the_owner_is_an_error_and_another_home_helps():
    async with cluster() as c:
        a = await opened(c)
        owner, other, third = homes(c)
        c.nodes[owner].disk.full = True
        with pytest.raises(DiskFull):
            await big_commits(a, owner)
        a.no += 1
        args = (VOLUME, a.sid, a.no, a.seq, a.seq, (txn([put(6)]),), 0)
        for _ in range(10):
            with contextlib.suppress(DfsError):
                answer = await a.client.call(other, "vol.commit", *args, timeout=3.0)
                break
        assert answer[2] == (True,)
        assert answer[4] in (other, third)
        c.nodes[owner].disk.full = False
        await trio.sleep(5)
        assert (await a.commit(txn([put(7)]), base=answer[1]))[1] == (True,)
