"""The membership shell: over real sockets, and in the simulator's network."""

import contextlib
import random
import socket
from types import SimpleNamespace

import pytest
import trio

from dfs.clock import SystemClock
from dfs.cluster.map import CHUNK, METADATA, ClusterMap, Node
from dfs.cluster.membership import Membership
from dfs.cluster.swim import VERSION
from dfs.errors import Corrupt, LocalProtocolError
from dfs.rpc.endpoint import RpcEndpoint
from dfs.rpc.gossip import Gossip, Info, Usurped, next_boot
from dfs.testing.disk import SimDisk
from dfs.testing.network import SimNetwork

PATIENCE = 60.0  # real seconds; a healthy run needs about one, a loaded machine may need many


def a_map(addresses):
    nodes = [
        Node(i, bytes([i + 1]) * 16, f"n{i}", f"z{i}", "r", f"h{i}", address, "")
        if role == METADATA
        else Node(i, bytes([i + 1]) * 16, f"n{i}", f"z{i}", "r", f"h{i}", "", address)
        for i, (role, address) in enumerate(addresses)
    ]
    both = [
        Node(
            n.number,
            n.node_id,
            n.name,
            n.zone,
            n.rack,
            n.host,
            n.metadata_addr or f"tcp://127.0.0.9:{n.number + 1}",
            n.chunk_addr or f"tcp://127.0.0.8:{n.number + 1}",
        )
        for n in nodes
    ]
    return ClusterMap.create(b"c" * 16, both)


def a_map_of(addresses, chunk):
    """A map of metadata nodes of which only the first is a chunkserver too, as it needs one."""
    return ClusterMap.create(
        b"c" * 16,
        [
            Node(
                i, bytes([i + 1]) * 16, f"n{i}", f"z{i}", "r", f"h{i}", address, "" if i else chunk
            )
            for i, address in enumerate(addresses)
        ],
    )


def env_of(endpoint, clock=None):
    return SimpleNamespace(clock=clock or SystemClock(), rpc=endpoint, random=random.Random(5))


def info():
    return Info(1000, 500, 0.25)


def gossip_of(endpoint, number, get_map, boot=1, role=METADATA, clock=None, **more):
    return Gossip(env_of(endpoint, clock), number, role, get_map, boot=boot, info=info, **more)


async def until(condition):
    while not condition():  # noqa: ASYNC110 - other processes would not set an event either
        await trio.sleep(0.02)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Impatient(Membership):
    """Suspects for one to six seconds, so that a test on real sockets ends soon."""

    def rule_suspicion(self):
        return 1.0


class Daemon:
    """An endpoint, its gossip and the scope that ends both."""

    def __init__(self, number, get_map, boot=1, role=METADATA):
        self.endpoint = RpcEndpoint(
            cluster_id=b"c" * 16, name=f"n{number}", clock=SystemClock(), random=random.Random(4)
        )
        self.address = get_map().address(role, number)
        self.gossip = gossip_of(self.endpoint, number, get_map, boot, role)
        core = self.gossip.core
        self.gossip.core = Impatient(
            number, role, core.me.node_id, self.address, boot, random.Random(number)
        )
        self.scope = trio.CancelScope()
        self.error = None

    async def run(self, *, task_status):
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.endpoint.run)

                async def serve(*, task_status):
                    await self.endpoint.serve(
                        self.address, self.gossip.handlers(), started=task_status.started
                    )

                await nursery.start(serve)
                task_status.started()
                try:
                    await self.gossip.run()
                except Usurped as e:
                    self.error = e
                    nursery.cancel_scope.cancel()


def is_up(daemon, number):
    return daemon.gossip.status(number, METADATA) == "alive"


@pytest.mark.realtime
async def test_three_daemons_on_real_sockets():
    # Nobody of the map is absent: who gets no answers from several at once thinks that it is slow
    # itself, and waits many times longer before it calls anybody dead.
    *addresses, chunk = [f"tcp://127.0.0.1:{free_port()}" for _ in range(4)]
    cluster = a_map_of(addresses, chunk)
    with trio.fail_after(PATIENCE * 3):
        async with trio.open_nursery() as nursery:
            daemons = [Daemon(i, lambda: cluster) for i in range(3)]
            for daemon in (*daemons, Daemon(0, lambda: cluster, role=CHUNK)):
                await nursery.start(daemon.run)
            await until(
                lambda: all(is_up(a, b) for a in daemons for b in range(3) if a is not daemons[b])
            )
            await until(
                lambda: all(m.vitals for m in daemons[0].gossip.members() if m.status == "alive")
            )
            vitals = next(m for m in daemons[0].gossip.members() if m.number == 1).vitals
            assert (vitals.epoch, vitals.digest) == (1, cluster.digest)
            assert (vitals.total, vitals.free, vitals.load) == (1000, 500, 0.25)

            # one says good-bye
            seen = []
            daemons[0].gossip.subscribe(lambda member, old, new: seen.append((member.number, new)))
            daemons[2].gossip.leave()
            await until(lambda: not daemons[0].gossip.is_up(2, METADATA))
            assert (2, "left") in seen
            assert daemons[0].gossip.status(2, METADATA) == "dead"
            daemons[2].scope.cancel()

            # it returns, at its next boot
            daemons[2] = Daemon(2, lambda: cluster, boot=2)
            while True:  # its port may still be taken by the process that is ending
                with contextlib.suppress(Exception):
                    await nursery.start(daemons[2].run)
                    break
                await trio.sleep(0.1)
            await until(lambda: is_up(daemons[0], 2) and is_up(daemons[1], 2))

            # one stops without a word
            daemons[1].gossip.core.stopped = "killed by the test"
            daemons[1].scope.cancel()
            await until(lambda: daemons[0].gossip.status(1, METADATA) == "dead")
            statistics = daemons[0].gossip.statistics()
            assert statistics["malformed"] == statistics["callback_errors"] == 0
            assert statistics["sent"] > 0
            assert statistics["received"] > 0
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def simulated(count):
    cluster = a_map([(METADATA, f"tcp://10.0.0.{i}:1") for i in range(count)])
    world = SimpleNamespace(
        map=cluster, gossips=[], endpoints=[], errors=[], maps=[cluster] * count
    )
    async with SimNetwork(random.Random(3), SystemClock()) as network:
        world.network = network

        async def start(number, boot, name, address="", scope=None):
            endpoint = network.endpoint(name)
            gossip = gossip_of(endpoint, number, lambda: world.maps[number], boot, address=address)

            async def run(*, task_status):
                try:
                    await gossip.run(task_status=task_status)
                except Usurped as e:
                    world.errors.append((name, str(e)))

            async def serve(*, task_status):
                await endpoint.serve(
                    address or f"tcp://10.0.0.{number}:1",
                    gossip.handlers(),
                    started=task_status.started,
                )

            await nursery.start(serve)
            await nursery.start(run)
            return gossip, endpoint

        world.start = start
        async with trio.open_nursery() as nursery:
            for i in range(count):
                gossip, endpoint = await start(i, 1, f"n{i}")
                world.gossips.append(gossip)
                world.endpoints.append(endpoint)
            yield world
            nursery.cancel_scope.cancel()


async def test_a_crash_is_found_and_reported():
    async with simulated(4) as world:
        await trio.sleep(3)
        events = []
        cancel = world.gossips[0].subscribe(
            lambda m, old, new: events.append((m.number, m.role, old, new))
        )

        def broken(member, old, new):
            raise RuntimeError("a subscriber that fails")

        world.gossips[0].subscribe(broken)
        world.endpoints[3].close()
        await trio.sleep(60)
        assert world.gossips[0].status(3, METADATA) == "dead"
        assert [e[2:] for e in events if e[:2] == (3, METADATA)] == [
            ("alive", "suspect"),
            ("suspect", "dead"),
        ]
        assert world.gossips[0].statistics()["callback_errors"] >= 2
        cancel()
        before = len(events)
        world.gossips[1].leave()
        await trio.sleep(1)
        assert len(events) == before
        # chunk servers of this map never ran; nobody knows of node 9
        assert world.gossips[0].status(1, CHUNK) == "dead"
        assert world.gossips[0].status(9, METADATA) == "unknown"
        assert not world.gossips[0].is_up(9, METADATA)


async def test_an_unknown_member_of_the_map_counts_as_up():
    async with simulated(3) as world:
        assert world.gossips[2].status(1, METADATA) in ("unknown", "alive")
        assert world.gossips[2].is_up(1, METADATA)


async def test_a_newer_map_is_reported_until_it_is_taken():
    async with simulated(3) as world:
        await trio.sleep(2)
        newer = world.map.successor(world.map.nodes)
        told = {1: [], 2: []}
        for i in told:
            world.gossips[i].on_epoch(
                lambda address, epoch, digest, i=i: told[i].append((address, epoch, digest))
            )
        world.maps[0] = newer
        world.gossips[0].map_changed()
        await trio.sleep(2)
        for i, seen in told.items():
            assert ("tcp://10.0.0.0:1", 2, newer.digest) in seen, i
        world.maps[1] = world.maps[2] = newer
        await trio.sleep(2)
        for seen in told.values():
            seen.clear()
        await trio.sleep(5)
        assert told == {1: [], 2: []}


async def test_a_second_map_of_one_epoch_is_reported():
    async with simulated(3) as world:
        await trio.sleep(2)
        one = world.map.successor(world.map.nodes)
        other = world.map.successor(world.map.nodes, voters=(0,))
        assert one.digest != other.digest
        seen = []
        world.gossips[0].on_epoch(lambda *what: seen.append(what))
        world.maps[:] = [one, other, other]
        await trio.sleep(5)
        assert {(epoch, digest) for _, epoch, digest in seen} == {(2, other.digest)}


async def test_a_usurped_daemon_stops():
    async with simulated(3) as world:
        await trio.sleep(2)
        called = []
        world.gossips[1].on_usurped = called.append
        second, _ = await world.start(1, 2, "second", "tcp://10.0.0.77:1")
        await trio.sleep(10)
        ((name, text),) = world.errors
        assert name == "n1"
        assert "another process runs as metadata 1" in text
        assert called == [text]
        assert not second.core.stopped
        assert world.gossips[0].status(1, METADATA) == "alive"


async def test_malformed_messages_are_counted_and_dropped():
    async with simulated(3) as world:
        await trio.sleep(2)
        stranger = world.network.endpoint("stranger")
        for message in ((), (VERSION + 1,), (VERSION, 1, b"", b"", 0, 0, (), ()), ("x",) * 8):
            stranger.cast("tcp://10.0.0.0:1", "swim", message)
        await trio.sleep(1)
        assert world.gossips[0].statistics()["malformed"] == 4
        assert world.gossips[0].status(1, METADATA) == "alive"


async def test_a_gossip_runs_once():
    async with simulated(3) as world:
        with pytest.raises(LocalProtocolError):
            await world.gossips[0].run()


def test_boots_grow_over_restarts_and_power_loss():
    disk = SimDisk(random.Random(1))
    assert [next_boot(disk) for _ in range(3)] == [1, 2, 3]
    disk.crash()
    assert next_boot(disk) == 4
    disk.write_atomic("boot", b"what?")
    with pytest.raises(Corrupt, match="instead of a number"):
        next_boot(disk)
