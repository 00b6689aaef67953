"""Sessions: group commit, conflicts, resends, loss, freshness, resets."""

import contextlib
import errno

import pytest
import trio

from dfs.client.committer import Committer
from dfs.client.freshness import FRESH
from dfs.client.session import open_session
from dfs.errors import FsError, NotFound
from dfs.volume import items
from tests.unit.client.support import VOLUME, filesystem, new_home


def set_item(n, value=b"v"):
    def op(txn):
        txn.get(items.xattr_key(9, b"%d" % n))
        txn.put(items.inode_key(1000 + n), items.Inode(8, 0o644, size=n).encode())
        return value

    return op


def increment(ino):
    """Read-modify-write of one item: every pair of these conflicts."""

    def op(txn):
        old = txn.get(items.inode_key(ino))
        size = 0 if old is None else items.Inode.decode(old).size
        txn.put(items.inode_key(ino), items.Inode(8, 0o644, size=size + 1).encode())
        return size + 1

    return op


def size_of(ino):
    def op(txn):
        value = txn.get(items.inode_key(ino))
        return None if value is None else items.Inode.decode(value).size

    return op


@contextlib.asynccontextmanager
async def two_sessions(home):
    async with (
        open_session(home.client(seed=1), VOLUME) as a,
        open_session(home.client(seed=2), VOLUME) as b,
    ):
        yield a, b


async def gather(*calls):
    results = [None] * len(calls)

    async def run(i, call):
        results[i] = await call()

    async with trio.open_nursery() as nursery:
        for i, call in enumerate(calls):
            nursery.start_soon(run, i, call)
    return results


async def test_transactions_that_are_ready_together_share_a_request():
    home = new_home()
    async with open_session(home.client(), VOLUME) as s:
        await gather(*(lambda n=n: s.transact(set_item(n)) for n in range(100)))
        stats = s.statistics()
        assert stats["transactions"] == 100
        assert stats["commits"] <= 4
        assert await s.read(size_of(1042)) == 42


async def test_conflicting_transactions_of_one_session_run_again_without_a_round_trip():
    home = new_home()
    async with open_session(home.client(), VOLUME) as s:
        got = await gather(*(lambda: s.transact(increment(7)) for _ in range(20)))
        assert sorted(got) == list(range(1, 21))
        assert home.calls["vol.commit"] == 20
        assert s.statistics()["local_conflicts"] >= 20


async def test_two_sessions_never_lose_an_update():
    home = new_home()
    async with two_sessions(home) as (a, b):
        calls = [lambda s=s: s.transact(increment(7)) for s in (a, b) for _ in range(25)]
        await gather(*calls)
        await gather(a.refresh, b.refresh)
        assert await a.read(size_of(7)) == await b.read(size_of(7)) == 50
        assert a.statistics()["conflicts"] + b.statistics()["conflicts"] > 0


async def test_lost_answers_are_asked_for_again_and_nothing_happens_twice():
    home = new_home()
    async with open_session(home.client(seed=3), VOLUME) as s:
        s.cluster.rpc.lose_answer = s.cluster.rpc.lose_request = 0.3
        for n in range(1, 30):
            assert await s.transact(increment(7)) == n
        assert s.statistics()["resends"] > 3


async def test_another_home_is_asked_when_one_is_down():
    home = new_home()
    async with open_session(home.client(), VOLUME) as s:
        s.cluster.rpc.down = {1}
        assert await s.transact(increment(7)) == 1
        s.cluster.rpc.down = {1, 2}
        assert await s.transact(increment(7)) == 2


async def test_an_error_is_only_raised_when_the_home_confirms_what_was_read():
    home = new_home()

    def exclusive(txn):
        if txn.get(items.inode_key(7)) is not None:
            raise FsError("there", errno.EEXIST)
        txn.put(items.inode_key(7), items.Inode(8, 0o644).encode())

    def remove(txn):
        txn.delete(items.inode_key(7))

    async with two_sessions(home) as (a, b):
        await a.transact(exclusive)
        await b.refresh()
        b.cluster.rpc.delay = 0.2  # b's view is behind from now on
        await a.transact(remove)
        await b.transact(exclusive)  # its stale view said EEXIST
        with pytest.raises(FsError) as caught:
            await a.transact(exclusive)
        assert caught.value.errno == errno.EEXIST


async def test_a_view_that_is_not_fresh_answers_nothing_and_gives_up_with_eio():
    home = new_home()
    async with open_session(home.client(), VOLUME, deadline=5.0) as s:
        await s.transact(increment(7))
        s.cluster.rpc.down = {1, 2, 3}
        assert await s.read(size_of(7)) == 1
        await trio.sleep(FRESH + 0.1)
        began = trio.current_time()
        with pytest.raises(FsError, match="no quorum for volume") as caught:
            await s.read(size_of(7))
        assert caught.value.errno == errno.EIO
        assert trio.current_time() - began == pytest.approx(5.0, abs=0.2)
        s.cluster.rpc.down = set()
        assert await s.read(size_of(7)) == 1


async def test_at_the_deadline_a_commit_fails_once_and_a_new_session_takes_over():
    home = new_home()
    async with open_session(home.client(), VOLUME, deadline=4.0) as s:
        fenced = []
        s.on_fenced(lambda *_: fenced.append(s.sid))
        first = s.sid
        await s.transact(increment(7))
        s.cluster.rpc.down = {1, 2, 3}
        with pytest.raises(FsError) as caught:
            await s.transact(increment(7))
        assert caught.value.errno == errno.EIO
        assert fenced == [first]
        s.cluster.rpc.down = set()
        assert await s.transact(increment(7)) == 2
        assert s.sid != first


async def test_a_fenced_session_is_replaced_and_operations_go_on():
    home = new_home()
    async with open_session(home.client(), VOLUME) as s:
        changes = []
        s.on_change(changes.append)
        first, ino = s.sid, s.mint_ino()
        home.fence(VOLUME, first)
        await trio.sleep(0.1)
        assert await s.transact(increment(7)) == 1
        assert s.sid != first
        assert s.mint_ino() != ino
        assert None in changes  # whoever derived something from the view must forget it


async def test_tree_nodes_are_fetched_when_missing_and_once_for_all_who_wait():
    home = new_home()
    async with open_session(home.client(seed=1), VOLUME) as a:
        await gather(*(lambda n=n: a.transact(set_item(n)) for n in range(2000)))
        home.checkpoint(VOLUME)
        async with open_session(home.client(seed=2), VOLUME) as cold:
            calls = [lambda n=n: cold.read(size_of(1000 + n)) for n in (5, 5, 5, 5, 1999)]
            assert await gather(*calls) == [5, 5, 5, 5, 1999]
            assert home.blobs.gets < 10


async def test_a_watcher_behind_the_tail_is_reset():
    home = new_home()
    async with two_sessions(home) as (a, b):
        b.cluster.rpc.down = {1, 2, 3}
        await trio.sleep(1.0)
        for _ in range(5):
            await a.transact(increment(7))
            home.checkpoint(VOLUME)
        changes = []
        b.on_change(changes.append)
        b.cluster.rpc.down = set()
        await b.refresh()
        assert await b.read(size_of(7)) == 5
        assert None in changes


async def test_refresh_sees_what_was_committed_before_it():
    home = new_home()
    async with two_sessions(home) as (a, b):
        for n in range(1, 20):
            await a.transact(increment(7))
            await b.refresh()
            assert await b.read(size_of(7)) == n


async def test_a_read_only_session_refuses_to_write():
    home = new_home()
    async with open_session(home.client(), VOLUME, mode="ro") as s:
        with pytest.raises(FsError) as caught:
            await s.transact(increment(7))
        assert caught.value.errno == errno.EROFS


async def test_a_volume_without_a_journal_is_an_error_of_its_own():
    home = new_home()
    with pytest.raises(NotFound):
        async with open_session(home.client(), b"x" * 16):
            pass


async def test_who_is_the_only_writer_is_known_from_the_journal():
    home = new_home()
    async with open_session(home.client(seed=1), VOLUME) as a:
        assert a.alone
        async with open_session(home.client(seed=2), VOLUME) as b:
            await a.refresh()
            assert not a.alone
            assert not b.alone
        await a.refresh()
        assert a.alone
        home.checkpoint(VOLUME)
        async with open_session(home.client(seed=3), VOLUME, mode="ro"):
            await a.refresh()
            assert a.alone
    async with open_session(home.client(seed=4), VOLUME) as later:  # begins after a checkpoint
        assert later.alone


async def test_a_cancelled_operation_leaves_the_queue():
    home = new_home()
    async with open_session(home.client(), VOLUME) as s:
        s.cluster.rpc.delay = 1.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(s.transact, increment(7))
            await trio.sleep(0.1)
            with trio.move_on_after(0.1):
                await s.transact(increment(8))  # waits behind the request in flight
        s.cluster.rpc.delay = 0.0
        await s.refresh()
        assert await s.read(size_of(8)) is None
        assert await s.read(size_of(7)) == 1


REAL_REQUEST = Committer._request


def mutant_request(self, txns, *rest):
    """Sends no reads, as if they did not matter."""
    return REAL_REQUEST(self, tuple(((), (), effects) for _, _, effects in txns), *rest)


async def test_the_lost_update_test_sees_a_client_that_sends_no_reads(monkeypatch):
    monkeypatch.setattr(Committer, "_request", mutant_request)
    with pytest.raises(AssertionError):
        await test_two_sessions_never_lose_an_update()


async def test_a_session_opened_with_part_of_a_long_tail_answers_only_from_all_of_it():
    home = new_home()
    async with filesystem(home) as fs:
        for n in range(30):
            await fs.mkdir(1, b"d%d" % n, 0o755)
        whole = home._open

        async def part(v, *args):
            *head, tail, owner, params = await whole(v, *args)
            return (*head, tail[:5], owner, params)

        home._open = part
        async with open_session(home.client(seed=4), VOLUME, mode="ro") as reader:
            found = await reader.read(lambda txn: txn.scan(items.group(1, items.ENTRY)))
            assert len(found) == 30
