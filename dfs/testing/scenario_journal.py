"""Journals under faults: replicas agree, nothing acknowledged is lost, everything ends.

Each seed plays two schedules: bare replicas under a random scheduler (`journal_cores`: membership
changes, amnesia, trimming, a crash at any record), and whole `JournalHost`s here, on a simulated
network and disks that lose power.  Clients send operations, each with a number of its own, and
confirmed reads, to any node, and repeat them until they are answered.
"""

from collections.abc import Callable
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, cast

import trio

from dfs.codec import unpack
from dfs.env import Context, Env, Reply
from dfs.errors import DfsError, NotFound
from dfs.testing.chunkcluster import SimClock
from dfs.testing.disk import SimDisk
from dfs.testing.journal_cores import ViolationError, genesis, operation, run_cores
from dfs.testing.journal_mutants import MUTANTS as CORE_MUTANTS
from dfs.testing.journal_mutants import replica_class
from dfs.testing.network import SimEndpoint, SimNetwork
from dfs.testing.processes import SimProcesses
from dfs.testing.seeded import run_seeded
from dfs.volume import entries
from metadata.journalacceptor import Message
from metadata.journals import Journal, JournalHost
from metadata.journalstate import config_of

if TYPE_CHECKING:
    from dfs.cluster.map import ClusterMap

NAME = "journal"
MUTANTS = {
    **CORE_MUTANTS,
    "nosync": "the log says durable without asking the disk",
}
NODES = 5
CLIENTS = 4
SECONDS = 12.0  # virtual, with faults
SETTLE = 60.0  # virtual, without
VOLUMES = (b"first volume ...", b"second volume ..")


class _Here:
    """A node as the journals' map shows it."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.metadata_addr = f"tcp://n{number}:1"


class _Map:
    """As much of a cluster map as journals ask for; homes move when the operator says so."""

    epoch = 1

    def __init__(self) -> None:
        self.nodes = tuple(_Here(i) for i in range(NODES))
        self.homes: dict[bytes, tuple[int, ...]] = {VOLUMES[0]: (0, 1, 2), VOLUMES[1]: (2, 3, 4)}

    def volume_homes(self, volume: bytes) -> tuple[int, ...]:
        return self.homes[volume]


class _Hasty(Journal):
    """Votes leave before they are durable."""

    def _reply(self, to: int, message: Message) -> None:
        self._answer(to, message)


class _OwnAck(Journal):
    """Its own votes count before they are durable."""

    def _reply(self, to: int, message: Message) -> None:
        if to == self._host.number:
            self._answer(to, message)
        else:
            super()._reply(to, message)


def _host_class(mutant: str | None) -> type[JournalHost]:
    class Host(JournalHost):
        pass

    Host.replica_class = replica_class(mutant)
    Host.journal_class = {"hasty": _Hasty, "ownack": _OwnAck}.get(mutant or "", Journal)
    return Host


class Machine:
    """A node: its disk, which outlives crashes, and its present run."""

    def __init__(self, world: "World", number: int) -> None:
        """Not started."""
        self.world = world
        self.number = number
        random = Random(world.random.random())
        self.disk = SimDisk(random, sync_delay=world.random.choice((0.002, 0.03, 0.1)))
        self.scope: trio.CancelScope | None = None
        self.endpoint: SimEndpoint | None = None
        self.host: JournalHost | None = None
        self.places: dict[bytes, dict[int, int]] = {}
        self.seen: dict[bytes, int] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Recover and serve until the crash."""
        world = self.world
        self.endpoint = endpoint = world.network.endpoint(f"n{self.number}")
        random = Random(world.random.random())
        env = Env(world.clock, self.disk, endpoint, SimProcesses(random), random)
        host = _host_class(world.mutant)(
            env, self.number, lambda: cast("ClusterMap", world.map), segment_bytes=3000
        )
        self.places, self.seen = {v: {} for v in VOLUMES}, dict.fromkeys(VOLUMES, 0)
        with trio.CancelScope() as self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(host.run)
                if world.mutant == "nosync":
                    host.log._sync = cast("Any", _NoSync())
                self.host = host
                handlers = host.handlers() | {"op": self._op, "read": self._read}
                await endpoint.serve(
                    f"tcp://n{self.number}:1", handlers, started=lambda _: task_status.started()
                )

    def crash(self) -> None:
        """Lose power."""
        if self.scope is None or self.endpoint is None:
            return
        for journal in self.journals():
            self.world.collect(self, journal)
        self.endpoint.close()
        self.disk.crash()
        self.scope.cancel()
        self.scope = self.host = None

    def journals(self) -> list[Journal]:
        """The journals here, blank ones aside."""
        found = [self.host.get(v) for v in VOLUMES] if self.host is not None else []
        return [j for j in found if j is not None]

    def journal(self, volume: bytes) -> Journal:
        """The journal of a volume; raises `NotFound`."""
        journal = self.host.get(volume) if self.host is not None else None
        if journal is None:
            raise NotFound("no journal here")
        return journal

    async def _op(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        volume, number = args
        journal = self.journal(volume)
        if not journal.owned:
            await journal.acquire(1.0)
        self.world.collect(self, journal)
        if number not in self.places[volume]:
            await journal.propose(operation(number), 1.0)
            self.world.collect(self, journal)
        return (self.places[volume][number],), b""

    async def _read(self, _ctx: Context, args: tuple[Any, ...], _data: memoryview) -> Reply:
        journal = self.journal(args[0])
        if not journal.owned:
            raise NotFound("not the owner")
        await journal.confirm(1.0)
        return (journal.chosen,), b""


class _NoSync:
    async def sync(self, *, turn: bool = True) -> None:
        await trio.lowlevel.checkpoint()


class World:
    """Network, machines, clients and what they were told."""

    def __init__(self, seed: int, mutant: str | None) -> None:
        """Choose the weather."""
        self.random = random = Random(seed)
        self.seed = seed
        self.mutant = mutant
        self.clock = SimClock()
        self.map = _Map()
        self.network: SimNetwork
        self.nursery: trio.Nursery
        self.machines = [Machine(self, i) for i in range(NODES)]
        self.history: dict[bytes, dict[int, bytes]] = {v: {} for v in VOLUMES}
        self.results: list[tuple[bytes, int, float, float, int]] = []  # volume op began ended place
        self.acked: dict[bytes, int] = dict.fromkeys(VOLUMES, 0)
        self.calm = False
        self.operations = 0
        self.reads = self.crashes = self.changes = 0
        self.left = CLIENTS
        self.done = trio.Event()  # every client has its answers
        self.violations: list[str] = []
        self.knobs: dict[str, Any] = {
            "drop": random.choice((0.0, 0.02, 0.1)),
            "duplicate": random.choice((0.0, 0.05)),
            "reorder": random.choice((0.0, 0.1)),
        }

    def fail(self, text: str) -> None:
        """Note a violation."""
        if text not in self.violations:
            self.violations.append(text)

    def collect(self, machine: Machine, journal: Journal) -> None:
        """Compare what a machine calls chosen with what others did."""
        volume = journal.volume
        history = self.history[volume]
        seen = machine.seen[volume]
        places = machine.places[volume]
        if seen < journal.base:
            for seq in range(seen + 1, journal.base + 1):
                self._note(places, seq, history.get(seq, b""))
            seen = journal.base
        while seen < journal.chosen:
            for seq, payload in journal.entries(seen, 4096):
                if history.setdefault(seq, payload) != payload:
                    self.fail(f"agreement: two entries are chosen at seq {seq}")
                self._note(places, seq, payload)
                seen = seq
        machine.seen[volume] = seen

    @staticmethod
    def _note(places: dict[int, int], seq: int, payload: bytes) -> None:
        if payload and config_of(payload) is None:
            places.setdefault(unpack(payload)[0], seq)

    # ---------------------------------------------------------------------------------- actors

    async def client(self, number: int) -> None:
        """Operations one after the other, each repeated until it is answered; reads between."""
        rpc = self.network.endpoint(f"client{number}")
        random = Random(self.random.random())
        while not self.calm:
            volume = random.choice(VOLUMES)
            if random.random() < 0.3:
                await self._read(rpc, random, volume)
            else:
                self.operations += 1
                await self._operation(rpc, random, volume, self.operations)
            await trio.sleep(random.random() * 0.1)
        self.left -= 1
        if not self.left:
            self.done.set()

    async def _ask(self, rpc: SimEndpoint, random: Random, method: str, *args: Any) -> Any:
        homes = self.map.homes[args[0]]
        owners = {j.owner for m in self.machines for j in m.journals() if j.volume == args[0]}
        known = sorted(o for o in owners if o is not None)
        to = random.choice(known) if known and random.random() < 0.8 else random.choice(homes)
        answer, _ = await rpc.call(f"tcp://n{to}:1", method, args, timeout=2.5)
        return answer[0]

    async def _operation(self, rpc: SimEndpoint, random: Random, volume: bytes, op: int) -> None:
        began = trio.current_time()
        while True:
            try:
                place = await self._ask(rpc, random, "op", volume, op)
            except DfsError:
                await trio.sleep(random.random() * 0.3)
                continue
            self.results.append((volume, op, began, trio.current_time(), place))
            self.acked[volume] = max(self.acked[volume], place)
            return

    async def _read(self, rpc: SimEndpoint, random: Random, volume: bytes) -> None:
        known = self.acked[volume]
        try:
            chosen = await self._ask(rpc, random, "read", volume)
        except DfsError:
            return
        self.reads += 1
        if chosen < known:
            self.fail(f"a confirmed read saw {chosen} when {known} was acknowledged")

    async def faults(self) -> None:
        """Crashes, power cuts, partitions, trims, changes of members; then none."""
        random = self.random
        end = trio.current_time() + SECONDS
        down: dict[int, float] = {}
        while trio.current_time() < end:
            await trio.sleep(random.random() * 0.3)
            for number in [n for n, t in down.items() if t <= trio.current_time()]:
                del down[number]
                await self.start(number)
            x = random.random()
            if x < 0.15:
                victims = [random.randrange(NODES)] if random.random() < 0.8 else range(NODES)
                for number in victims:
                    if number not in down:
                        self.crashes += 1
                        self.machines[number].crash()
                        down[number] = trio.current_time() + random.random()
            elif x < 0.3:
                self._part()
            elif x < 0.5:
                self.network.heal()
            elif x < 0.6:
                await self._trim(random.choice(self.machines))
            elif x < 0.7:
                await self._change(random.choice(VOLUMES))
        for number in down:
            await self.start(number)
        self.network.heal()
        self.network.drop = self.network.duplicate = self.network.reorder = 0.0
        self.calm = True

    def _part(self) -> None:
        random, names = self.random, [f"n{i}" for i in range(NODES)]
        if random.random() < 0.5:
            one = {n for n in names if random.random() < 0.5}
            self.network.partition([one, set(names) - one])
        else:
            for _ in range(3):
                self.network.block(random.choice(names), random.choice(names))

    async def _trim(self, machine: Machine) -> None:
        for journal in machine.journals():
            self.collect(machine, journal)
            if journal.chosen > journal.base + 5:
                await journal.trim(self.random.randint(journal.base + 2, journal.chosen))

    async def _change(self, volume: bytes) -> None:
        """Swap a member by the owner, when there is one; the map follows the journal."""
        for machine in self.machines:
            for journal in machine.journals():
                if journal.volume == volume and journal.owned:
                    members = list(journal.members)
                    others = [i for i in range(NODES) if i not in members]
                    members[self.random.randrange(3)] = self.random.choice(others)
                    entry = entries.encode(
                        entries.CONFIG, 0, journal.config_version + 1, tuple(members)
                    )
                    self.map.homes[volume] = tuple({*journal.members, *members})
                    try:
                        await journal.propose(entry, 0.5)
                        self.changes += 1
                    except DfsError:
                        return
                    return

    async def start(self, number: int) -> None:
        """Start a machine on what its disk holds."""
        await self.nursery.start(self.machines[number].run)

    # ------------------------------------------------------------------------------------- play

    async def main(self) -> None:
        """Faults, then calm, then the final comparison."""
        async with (
            SimNetwork(self.random, self.clock, **self.knobs) as self.network,
            trio.open_nursery() as self.nursery,
        ):
            for number in range(NODES):
                await self.start(number)
            for volume in VOLUMES:
                host = self.machines[self.map.homes[volume][0]].host
                assert host is not None  # just started
                await self._persist(
                    partial(host.create, volume, genesis(self.map.homes[volume]), timeout=1.0)
                )
            for number in range(CLIENTS):
                self.nursery.start_soon(self.client, number)
            await self.faults()
            with trio.move_on_after(SETTLE):
                await self.done.wait()
            if self.left:
                self.fail(f"liveness: {self.left} clients are not answered without faults")
            await trio.sleep(5.0)
            self._verify()
            self.nursery.cancel_scope.cancel()

    async def _persist(self, fn: Callable[[], Any]) -> None:
        while True:
            try:
                await fn()
            except DfsError:
                continue
            return

    def _verify(self) -> None:
        for volume in VOLUMES:
            places: dict[int, int] = {}
            last = 0
            for machine in self.machines:
                for journal in machine.journals():
                    if journal.volume == volume:
                        self.collect(machine, journal)
                        last = max(last, journal.chosen)
                if machine.host is not None:
                    for text in machine.host.errors:
                        if "cut from" not in text:
                            self.fail(text)
            if not self.left:
                self._check_informed(volume, last)
            for seq, payload in sorted(self.history[volume].items()):
                self._note(places, seq, payload)
            mine = [r for r in self.results if r[0] == volume]
            for _, op, _, _, place in mine:
                if places.get(op) != place:
                    self.fail(f"acknowledged operation {op} is lost or moved")
            if any(a[3] < b[2] and a[4] > b[4] for a in mine for b in mine):
                self.fail("real-time order")

    def _check_informed(self, volume: bytes, last: int) -> None:
        """Idle members know the last entry, and on one chain."""
        found = [j for m in self.machines for j in m.journals() if j.volume == volume]
        owners = [j for j in found if j.owned and j.chosen == last]
        for journal in found:
            at_end = owners and journal.volume == volume
            if at_end and journal._host.number in owners[0].members and journal.chosen < last:
                self.fail(f"a member stayed at {journal.chosen} while {last} is chosen")
        if len({j.replica.head for j in found if j.chosen == last}) > 1:
            self.fail("replicas at one seq have different chains")


def play(seed: int, *, mutant: str | None = None) -> World:
    """The schedule of whole hosts."""
    world = World(seed, mutant)
    run_seeded(world.main, seed=seed)
    return world


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of the two schedules of a seed; empty is good."""
    found = []
    try:
        run_cores(seed, mutant)
    except ViolationError as e:
        found.append(f"replicas: {e}")
    if not found:
        try:
            found += [f"hosts: {text}" for text in play(seed, mutant=mutant).violations]
        except BaseExceptionGroup as e:
            found.append(f"hosts: {e.exceptions[0]!r}")
    return found
