"""The outbox: batches, and copies that a slow peer keeps waiting."""

from math import inf

import pytest
import trio
import trio.testing

from dfs.errors import Busy, DeadlineExceeded, Unreachable
from dfs.rpc.budget import InFlight
from dfs.testing.chunkcluster import SimClock
from dfs.testing.sync_maps import first_map
from metadata.outbox import ATTEMPT, BATCH_BYTES, Outbox
from metadata.registers import GET, HINT, MERGE

KIB = b"x" * 1024


class Rpc:
    """Remembers requests, and answers when it is told to."""

    def __init__(self):
        self.sent = []

    def request(self, address, method, args, *, timeout, on_reply, epoch):
        assert (method, timeout) == ("reg.batch", ATTEMPT)
        self.sent.append((address, args[1], on_reply, epoch))

    def answer(self, index, error=None):
        _, requests, on_reply, _ = self.sent[index]
        on_reply(error or ((tuple(None for _ in requests),), b""))


class World:
    def __init__(self, outbox_class=Outbox, **limits):
        self.rpc = Rpc()
        self.replies = []
        self.inflight = InFlight(**limits)
        self.outbox = outbox_class(
            self.rpc,
            SimClock(),
            1,
            lambda: first_map(3),
            on_reply=lambda now, ticket, reply: self.replies.append((ticket, reply)),
            observe=lambda node, seconds: None,
            inflight=self.inflight,
        )

    async def put(self, *items):
        for node, request, ticket in items:
            self.outbox.put(node, 1, request, ticket)
        await trio.testing.wait_all_tasks_blocked()

    def merge(self, node, ticket, value=KIB):
        return node, (MERGE, b"row", value), ticket


async def running(world, body):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.outbox.run)
        await trio.testing.wait_all_tasks_blocked()
        await body()
        nursery.cancel_scope.cancel()


async def test_a_batch_for_each_peer_reads_apart():
    world = World()

    async def body():
        await world.put(
            world.merge(2, "a"),
            world.merge(3, "b"),
            (2, (GET, b"row"), "c"),
            (2, (HINT, b"row", KIB, 3, 1), "d"),
        )
        sent = [(address, [r[0] for r in requests]) for address, requests, _, _ in world.rpc.sent]
        assert sent == [
            ("tcp://n2:1", [MERGE, HINT]),
            ("tcp://n3:1", [MERGE]),
            ("tcp://n2:1", [GET]),
        ]
        assert world.inflight.used == 3 * 1024  # reads are not charged
        world.rpc.answer(0)
        world.rpc.answer(2, Unreachable("gone"))
        assert world.inflight.used == 1024
        assert [t for t, _ in world.replies] == ["a", "d", "c"]
        world.rpc.answer(1, DeadlineExceeded("late"))  # given up: not in memory any more
        assert world.inflight.used == 0
        assert world.outbox.statistics()["batches"] == 3

    await running(world, body)


async def test_copies_for_a_full_peer_wait_their_turn_and_nobody_else_does():
    world = World(per_peer=2048)

    async def body():
        await world.put(world.merge(2, 0), world.merge(2, 1))
        for i in range(2, 6):
            await world.put(world.merge(2, i))
        await world.put(world.merge(3, 9), (2, (GET, b"row"), 10))
        assert [len(r) for _, r, _, _ in world.rpc.sent] == [2, 1, 1]
        stats = world.outbox.statistics()
        assert (stats["held_back"], stats["inflight_bytes"]) == (4, 3 * 1024)
        world.rpc.answer(0)
        assert len(world.rpc.sent) == 5  # two more
        assert world.inflight.used == 3 * 1024
        world.rpc.answer(3)
        world.rpc.answer(4)
        world.rpc.answer(5)
        world.rpc.answer(6)
        assert [t for t, _ in world.replies if t != 10] == [0, 1, 2, 3, 4, 5]
        assert world.outbox.statistics()["held_back"] == 0

    await running(world, body)


class Forgetful(Outbox):
    """A mutant: what was sent is charged to nobody."""

    def _send_one(self, node, epoch, requests, tickets, size):
        super()._send_one(node, epoch, requests, tickets, 0)


class Endless(Outbox):
    """A mutant: waits for a slow peer for ever."""

    def _refuse_if_slow(self, node):
        pass


@pytest.mark.parametrize("outbox", [Outbox, Forgetful, Endless])
async def test_copies_for_a_slow_peer_are_refused(outbox):
    world = World(outbox, per_peer=2048)

    async def body():
        await world.put(world.merge(2, 0), world.merge(2, 1))
        for second in range(8):
            await world.put(world.merge(2, 2 + second))
            await trio.sleep(1)
        refused = [t for t, r in world.replies if isinstance(r, Busy) and "slow" in str(r)]
        sent = sum(len(r) for _, r, _, _ in world.rpc.sent)
        if outbox is not Outbox:
            assert (refused, sent) in (([], 10), ([], 2))  # the mutants are seen
            return
        assert sent == 2
        assert refused == list(range(2, 10))
        assert world.outbox.statistics()["refused_slow"] == 8
        assert world.inflight.used == 2048
        world.rpc.answer(0)
        await world.put(world.merge(2, 11))
        assert sum(len(r) for _, r, _, _ in world.rpc.sent) == 3

    await running(world, body)


async def test_room_that_somebody_else_gives_back_is_used():
    world = World(per_peer=2048)

    async def body():
        other = world.inflight.charge(2048)
        other.send(2)
        other.close()
        await world.put(world.merge(2, 0))
        assert world.rpc.sent == []
        other.ended(2)
        assert len(world.rpc.sent) == 1

    await running(world, body)


async def test_large_batches_are_cut():
    world = World()

    async def body():
        value = b"v" * (BATCH_BYTES // 2)
        await world.put(*(world.merge(2, i, value) for i in range(5)))
        assert [len(r) for _, r, _, _ in world.rpc.sent] == [2, 2, 1]
        assert world.inflight.statistics(inf)["peers"] == {2: 5 * len(value)}

    await running(world, body)


async def test_a_peer_that_is_no_member_any_more():
    world = World()

    async def body():
        await world.put(world.merge(7, "x"))
        ((ticket, reply),) = world.replies
        assert ticket == "x"
        assert isinstance(reply, Unreachable)
        assert world.inflight.used == 0

    await running(world, body)
