"""A metadata node's part in the gossip: real `Gossip` in the simulator's network."""

import contextlib
import random
from types import SimpleNamespace

import trio

from dfs.cli.context import explain
from dfs.clock import SystemClock
from dfs.cluster.map import CHUNK, METADATA
from dfs.errors import ConfigError
from dfs.rpc.gossip import Gossip, Info, Usurped
from dfs.rpc.mapkeeper import CATCH_UP, MapKeeper
from dfs.testing.mapcluster import MapCluster, first_map
from dfs.testing.network import SimNetwork
from metadata.presence import Presence

DEAD = 60.0  # virtual seconds in which a member that is gone is surely found dead


class Member:
    """One metadata node, as far as the gossip is concerned: an endpoint, a keeper, a presence."""

    def __init__(self, world, number, boot=1, initial=None):
        self.world = world
        self.number = number
        self.endpoint = world.network.endpoint(f"n{number}")
        rand = random.Random(number * 100 + boot)
        clock = SystemClock()
        self.free = 500
        disk = SimpleNamespace(usage=lambda: (1000, self.free))
        env = SimpleNamespace(clock=clock, rpc=self.endpoint, random=rand, disk=disk)
        self.address = world.map.address(METADATA, number)
        self.keeper = MapKeeper(
            initial or world.map, rpc=self.endpoint, clock=clock, random=rand, own=self.address
        )
        self.returned = []
        self.usurped = []
        self.fetched = 0
        self.error = None
        self.scope = trio.CancelScope()
        self.presence = Presence(
            env, number, self.keeper, boot=boot, load=lambda: 0.5,
            returned=self.returned.append, usurped=self.usurped.append,
        )  # fmt: skip

    async def start(self):
        await self.world.nursery.start(self._run)

    async def _run(self, *, task_status):
        def map_get(_context, _args, _data):
            self.fetched += 1
            return (self.keeper().encode(),), b""

        handlers = {**self.presence.gossip.handlers(), "map.get": map_get}
        with self.scope:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._serve, handlers, task_status.started)
                    await self.presence.run()
            except* Usurped as group:
                self.error = group

    async def _serve(self, handlers, started):
        await self.endpoint.serve(self.address, handlers, started=started)

    def crash(self):
        self.endpoint.close()
        self.scope.cancel()


@contextlib.asynccontextmanager
async def running(count=3):
    """`count` members that have spoken to each other."""
    async with (
        SimNetwork(random.Random(3), SystemClock()) as network,
        trio.open_nursery() as nursery,
    ):
        world = SimpleNamespace(network=network, nursery=nursery, map=first_map(count))
        world.members = {n: Member(world, n) for n in range(1, count + 1)}
        for member in world.members.values():
            await member.start()
        await trio.sleep(3)
        yield world
        nursery.cancel_scope.cancel()


def chunks_of(world):
    return [n.number for n in world.map.nodes if n.chunk_addr]


async def until(condition, within):
    """Seconds until `condition()`, looked at ten times a second."""
    start = trio.current_time()
    with trio.fail_after(within):
        while not condition():  # noqa: ASYNC110 - nobody would set an event
            await trio.sleep(0.1)
    return trio.current_time() - start


# -------------------------------------------------------------------------------------- liveness


async def test_who_is_up_follows_the_gossip():
    async with running() as world:
        watcher = world.members[1].presence
        assert [watcher.is_up(n) for n in (1, 2, 3)] == [True, True, True]
        assert not watcher.is_up(9), "nobody knows of it"
        world.members[3].crash()
        assert watcher.is_up(3), "it is not known yet"
        await until(lambda: watcher.gossip.status(3, METADATA) == "suspect", 30)
        assert not watcher.is_up(3), "others answer sooner"
        await until(lambda: watcher.gossip.status(3, METADATA) == "dead", DEAD)
        assert not watcher.is_up(3)
        assert watcher.is_up(2)
        world.members[2].presence.gossip.leave()
        await until(lambda: not watcher.is_up(2), 1)


async def test_a_node_is_always_up_for_itself():
    async with running() as world:
        alone = world.members[2]
        world.network.isolate("n2")
        await until(lambda: not (alone.presence.is_up(1) or alone.presence.is_up(3)), 2 * DEAD)
        assert alone.presence.is_up(2)


async def test_chunkservers_of_a_number_say_nothing_about_metadata_nodes():
    async with running() as world:
        watcher = world.members[1].presence
        await trio.sleep(DEAD)  # none of them runs
        for number in chunks_of(world):
            assert watcher.gossip.status(number, CHUNK) == "dead"
            assert not watcher.is_up(number)
        assert watcher.is_up(2)


async def test_others_are_told_the_disk_and_the_load():
    async with running() as world:
        world.members[2].free = 123
        await trio.sleep(30)
        seen = {m.number: m for m in world.members[1].presence.gossip.members()}
        vitals = seen[2].vitals
        assert (vitals.total, vitals.free, vitals.load) == (1000, 123, 0.5)
        assert (vitals.epoch, vitals.digest) == (1, world.map.digest)


# --------------------------------------------------------------------------------------- returns


async def test_a_return_from_the_dead_is_told():
    async with running() as world:
        watcher = world.members[1]
        watcher.returned.clear()
        world.members[3].crash()
        await until(lambda: watcher.presence.gossip.status(3, METADATA) == "dead", DEAD)
        assert watcher.returned == [], "going is no return"
        again = world.members[3] = Member(world, 3, boot=2)
        await again.start()
        await until(lambda: watcher.presence.is_up(3), 10)
        assert watcher.returned == [3]
        assert world.members[2].returned[-1] == 3
        assert 3 not in again.returned, "not of itself"


async def test_a_restart_that_nobody_missed_is_told():
    """Who was away for a moment has missed what was sent to it all the same."""
    async with running() as world:
        watcher = world.members[1]
        watcher.returned.clear()
        statuses = []
        watcher.presence.gossip.subscribe(lambda m, old, new: statuses.append((m.number, old, new)))
        world.members[3].crash()
        again = world.members[3] = Member(world, 3, boot=2)
        await again.start()
        await until(lambda: watcher.returned, 3)
        assert statuses == [(3, "alive", "alive")]
        assert watcher.returned == [3]
        assert watcher.presence.is_up(3)


async def test_a_partition_that_heals_is_a_return():
    async with running() as world:
        watcher = world.members[1]
        world.network.isolate("n3")
        await until(lambda: watcher.presence.gossip.status(3, METADATA) == "dead", DEAD)
        other = world.members[3].presence
        await until(lambda: not (other.is_up(1) or other.is_up(2)), 2 * DEAD)
        watcher.returned.clear()
        world.members[3].returned.clear()
        world.network.heal()
        await until(lambda: 3 in watcher.returned, DEAD)
        await until(lambda: {1, 2} <= set(world.members[3].returned), DEAD)


async def test_a_chunkserver_is_no_metadata_node_that_returns():
    async with running() as world:
        watcher = world.members[1]
        watcher.returned.clear()
        number = chunks_of(world)[0]
        (snapshot,) = [m for m in watcher.presence.gossip.members() if m.number == number]
        watcher.presence._status(snapshot, "dead", "alive")
        assert watcher.returned == []
        node = next(m for m in watcher.presence.gossip.members() if m.number == 2)
        watcher.presence._status(node, "dead", "alive")
        assert watcher.returned == [2]


# ------------------------------------------------------------------------------------------ maps


async def test_a_newer_map_is_fetched_from_whoever_shows_it():
    async with running() as world:
        newer = world.map.successor(world.map.nodes)
        switched = {n: [] for n in (2, 3)}
        for n, seen in switched.items():
            world.members[n].keeper.subscribe(lambda old, new, seen=seen: seen.append(new.epoch))
        fetched = {n: m.fetched for n, m in world.members.items()}
        world.members[1].keeper.offer(newer)
        vitals = world.members[1].presence.gossip.core.vitals
        assert vitals.epoch == 2, "it tells of the map from now on, not from the next tick on"
        spent = await until(lambda: all(switched.values()), 5)
        assert spent < 1.5
        assert switched == {2: [2], 3: [2]}
        assert world.members[1].fetched > fetched[1]
        for member in world.members.values():
            assert member.keeper() == newer
            assert member.presence.last_error == ""
        before = {n: m.fetched for n, m in world.members.items()}
        await trio.sleep(20)
        assert {n: m.fetched for n, m in world.members.items()} == before, "news only once"


async def test_a_map_that_cannot_be_fetched_is_asked_for_again():
    async with running() as world:
        newer = world.map.successor(world.map.nodes)
        source, behind = world.members[1], world.members[2]
        world.members[3].crash()

        def refuse(_encoded):
            raise ConfigError("the disk refuses the map")

        behind.keeper._save = refuse
        source.keeper.offer(newer)
        await until(lambda: behind.presence.last_error, CATCH_UP + 3)
        assert "cannot get the one of epoch 2" in behind.presence.last_error
        assert behind.keeper().epoch == 1
        assert behind.error is None, "it goes on"
        behind.keeper._save = None
        await until(lambda: behind.keeper().epoch == 2, 10)


async def test_another_map_of_the_same_epoch_stops_writes():
    async with running() as world:
        one = world.map.successor(world.map.nodes)
        other = world.map.successor(world.map.nodes, voters=(1, 2))
        world.network.isolate("n2")
        world.members[1].keeper.offer(one)
        world.members[2].keeper.offer(other)
        assert not world.members[2].keeper.forked
        world.network.heal()
        await until(lambda: world.members[2].keeper.forked, DEAD)
        assert "two different cluster maps of epoch 2 exist" in world.members[2].keeper.alarm
        assert world.members[2].keeper() == other, "neither is taken for the other"
        assert world.members[1].keeper() == one


async def test_it_no_longer_follows_the_keeper_when_it_has_ended():
    async with running() as world:
        member = world.members[2]
        assert member.keeper._subscribers
        member.scope.cancel()
        await trio.sleep(0.1)
        assert member.keeper._subscribers == []
        assert not world.members[1].presence.is_up(2), "it said good-bye"


# ------------------------------------------------------------------------------------- usurpers


@contextlib.asynccontextmanager
async def twin_of(network, cluster_map, number, boot):
    """Another process with the identity of a node, at another address, for the block."""
    endpoint = network.endpoint("twin")
    env = SimpleNamespace(clock=SystemClock(), rpc=endpoint, random=random.Random(8))
    gossip = Gossip(
        env, number, METADATA, lambda: cluster_map, boot=boot, info=lambda: Info(1, 1, 0.0),
        address="tcp://elsewhere:1",
    )  # fmt: skip

    async def serve(*, task_status):
        await endpoint.serve("tcp://elsewhere:1", gossip.handlers(), started=task_status.started)

    async with trio.open_nursery() as nursery:
        await nursery.start(serve)
        await nursery.start(gossip.run)
        yield gossip
        nursery.cancel_scope.cancel()


async def test_a_later_life_of_the_node_ends_it():
    async with running() as world:
        first = world.members[3]
        async with twin_of(world.network, world.map, 3, boot=2):
            await until(lambda: first.error is not None, 10)
            (text,) = first.usurped
            assert text.startswith(
                "another process runs as metadata 3: at tcp://elsewhere:1, boot 2; "
                f"this one is at {first.address}, boot 1. Stop one of them"
            )
            assert explain(first.error) == [text]
            assert first.keeper._subscribers == []
            await trio.sleep(5)
            assert world.members[1].presence.is_up(3), "as the later one"


async def test_an_earlier_life_of_the_node_ends_itself():
    async with running() as world:
        first = world.members[3]
        first.crash()
        second = Member(world, 3, boot=5)
        await second.start()
        await until(lambda: world.members[1].returned[-1:] == [3], 5)
        words = []
        try:
            async with twin_of(world.network, world.map, 3, boot=4):
                await trio.sleep(DEAD)
        except* Usurped as group:
            words = explain(group)
        assert len(words) == 1
        assert f"at {second.address}, boot 5; this one is at tcp://elsewhere:1, boot 4" in words[0]
        assert second.error is None


async def test_a_whole_node_stops_with_the_words_of_the_usurped():
    async with SimNetwork(random.Random(1), SystemClock()) as network, trio.open_nursery() as n:
        cluster = MapCluster(1, network, n, nodes=3)
        await cluster.start()
        machine = cluster.machines[3]
        await until(lambda: all(m.node.boot.admitted.is_set() for m in cluster.live()), 30)
        presence = machine.node.presence
        await until(lambda: presence.is_up(1) and cluster.machines[1].node.is_up(3), 10)
        boot = machine.node.boot.boot
        async with twin_of(network, cluster.newest, 3, boot=boot + 1):
            await until(lambda: not machine.up, 30)
            (line,) = explain(machine.error)
            assert f"at tcp://elsewhere:1, boot {boot + 1}; this one is at" in line
            assert machine.error.subgroup(ConfigError) is not None
            assert cluster.machines[1].up
        n.cancel_scope.cancel()
