"""Maps that change under load: metadata nodes are added, removed and replaced while volumes commit.

Three nodes serve volumes and blobs to clients; an operator adds a node, removes one, replaces one
or two at once, through `map.propose`, while messages are lost, links are cut, nodes lose power, are
started on old copies of their directories, and are shown maps that contradict theirs.  A second
operator races the first.  Nodes that were removed are switched off and their disks thrown away at
once.  Checked all along: one map per epoch, one entry per sequence number of each journal, at the
moment it is chosen, and every acknowledged commit among them.  At the
end, when all is healed: every transition has come to an end, all nodes have the newest map, every
journal is at the homes that the map names, and all that was acknowledged is there.
"""

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any
from unittest import mock

import trio

from dfs.clock import SystemClock
from dfs.cluster.joint import Rules
from dfs.cluster.map import METADATA, ClusterMap
from dfs.errors import ConfigError, DfsError, ForkedMap
from dfs.hashing import partition_of
from dfs.rpc.blobs import BlobClient
from dfs.rpc.mapkeeper import MapKeeper
from dfs.testing.homemodel import Violation
from dfs.testing.mapcluster import Machine, MapCluster, member
from dfs.testing.network import SimNetwork
from dfs.testing.seeded import run_judged
from dfs.volume.effects import PUT
from dfs.volume.items import DIR, Inode, inode_key
from metadata.boot import Boot
from metadata.mapdriver import MapDriver
from metadata.service import MetadataNode

NAME = "maps"
VOLUMES = tuple(bytes([i]) * 16 for i in range(1, 5))
PATIENCE = 120.0  # virtual seconds that anything may take once all is well
MUTANTS = {
    "phase_early": "reads move before blobs were pushed and before journals moved",
    "wipe_early": "nodes that leave are thrown away when the change begins",
    "no_boot_check": "a restored directory is not refused",
    "fork_accepted": "a map that contradicts the one here is taken",
}


class _PhaseEarly(Rules):
    def fenced(self, m: ClusterMap) -> int:
        return 0

    def pushed(self, m: ClusterMap) -> int:
        return 0

    def witnesses(self, m: ClusterMap) -> int:
        return 0

    def journal_majority(self, m: ClusterMap) -> int:
        return 0


@contextlib.contextmanager
def _changed(mutant: str | None) -> Iterator[None]:
    with contextlib.ExitStack() as stack:

        def patch(target: type, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(target, name, new))

        if mutant == "phase_early":
            patch(MapDriver, "rules", _PhaseEarly())
        elif mutant == "no_boot_check":
            patch(Boot, "rule_later", lambda _self, _seen: False)
            patch(Boot, "rule_needed", lambda _self, _count: 1)
        elif mutant == "fork_accepted":
            patch(MapKeeper, "rule_one_chain", lambda _self, _new: True)
        yield


class Client:
    """Commits numbered entries and puts blobs; remembers what was acknowledged."""

    def __init__(self, run: "_Run", number: int) -> None:
        """One session on one volume, opened when `run` begins."""
        self.cluster = run.cluster
        self.volume = VOLUMES[number % len(VOLUMES)]
        self.number = number
        self.random = Random(run.random.random())
        self.endpoint = run.network.endpoint(f"client{number}")
        self.keeper = MapKeeper(
            run.cluster.newest, rpc=self.endpoint, clock=run.cluster.clock, random=self.random
        )
        self.blobs = BlobClient(self.endpoint, self.keeper, run.cluster.clock)
        self.acked: list[tuple[int, bytes]] = []  # seq, key
        self.stored: list[bytes] = []  # names of blobs
        self.stop = False

    async def ask(self, method: str, *args: Any) -> tuple[Any, ...]:
        """Ask the homes of the volume by turns until one answers."""
        turn = self.random.randrange(3)
        hint: int | None = None
        while True:
            current = self.keeper()
            homes = current.volume_homes(self.volume)
            to = homes[turn % len(homes)] if hint is None else hint
            hint = None
            turn += 1
            try:
                answer: tuple[Any, ...]
                answer, _ = await self.endpoint.call(
                    current.address(METADATA, to),
                    method,
                    (self.volume, *args),
                    timeout=2,
                    epoch=current.epoch,
                )
            except (DfsError, ConfigError) as e:
                self.keeper.learn(e)
                if type(e).__name__ == "NotHome" and e.details and self.random.random() < 0.7:
                    hint = e.details[0]
                if turn % 3 == 0:
                    machines = self.cluster.live()
                    with contextlib.suppress(DfsError):
                        await self.keeper.fetch(machines[turn % len(machines)].address, timeout=1)
                await trio.sleep(self.random.uniform(0.02, 0.2))
            else:
                return answer

    async def run(self) -> None:
        """Commit until told to stop."""
        nonce = b"client%010d" % self.number
        sid, seq, *_ = await self.ask("vol.open", "rw", nonce.ljust(16, b"\0")[:16], "test")
        no = 0
        while not self.stop:
            no += 1
            key = inode_key(1000 * self.number + no)
            txn = ((), (), ((PUT, key, Inode(DIR, 0).encode()),))
            answer = await self.ask("vol.commit", sid, no, seq, seq, (txn,), 0)
            _, seq, verdicts, *_ = answer
            if verdicts != (True,):
                raise Violation(f"a commit without reads came to {verdicts}")
            self.acked.append((seq, key))
            if key not in self.cluster.entries.get(self.volume, {}).get(seq, b""):
                raise Violation(f"commit {seq} of {self.volume!r} was acknowledged, not chosen")
            if no % 3 == 0:
                blob = b"blob %d of %d" % (no, self.number) * 50
                with contextlib.suppress(DfsError):
                    self.stored += await self.blobs.put_many([blob], timeout=5)
            await trio.sleep(self.random.uniform(0.0, 0.3))


class _Run:
    """One schedule."""

    def __init__(self, seed: int, mutant: str | None) -> None:
        self.random = Random(seed)
        self.mutant = mutant
        self.clients: list[Client] = []
        self.changes = 0
        self.faults = True

    async def main(self) -> None:
        self.network = SimNetwork(
            Random(self.random.random()),
            SystemClock(),
            drop=self.random.choice([0.0, 0.005, 0.02]),
            duplicate=0.01,
            reorder=0.02,
        )
        async with self.network as network, trio.open_nursery() as nursery:
            self.cluster = cluster = MapCluster(self.random.randrange(1 << 30), network, nursery)
            cluster.on_map = self.check_phase
            await cluster.start()
            self.operator = network.endpoint("operator")
            drop, network.drop = network.drop, 0.0
            for volume in VOLUMES:
                await cluster.create(volume, self.operator)
            network.drop = drop
            self.clients = [Client(self, n) for n in range(4)]
            async with trio.open_nursery() as load:
                for client in self.clients:
                    load.start_soon(client.run)
                load.start_soon(self.trouble)
                await trio.sleep(1)
                await self.operate()
                self.faults = False
                await self.heal()
                await self.settled()
                for client in self.clients:
                    client.stop = True
            await self.check()
            nursery.cancel_scope.cancel()

    # ---------------------------------------------------------------------------------- operator

    async def operate(self) -> None:
        """Three changes in some order, each once the one before is done."""
        kinds = self.random.sample(["add", "remove", "replace", "two"], 3)
        if self.mutant == "wipe_early":
            kinds = ["two"]
        if "add" not in kinds[: kinds.index("remove")] if "remove" in kinds else False:
            kinds.sort()  # three copies need three nodes
        for number, kind in enumerate(kinds, 4):
            await self.stable()
            await self.change(kind, number)
            self.changes += 1
        await self.stable()

    async def change(self, kind: str, number: int) -> None:
        cluster = self.cluster
        while True:
            old = cluster.newest
            numbers = [n.number for n in old.nodes if n.metadata_addr]
            count = {"add": 0, "two": 2}.get(kind, 1)
            going = tuple(self.random.sample(numbers, count))
            if kind == "remove" and len(numbers) == 3:
                return
            coming = {"remove": (), "two": (number, number + 10)}.get(kind, (number,))
            nodes = [n for n in old.nodes if n.number not in going]
            nodes += [member(n) for n in coming]
            new = old.begin(nodes, leaving=going)
            rival = old.begin([replace(n, rack="q") if n.number == 1 else n for n in old.nodes])
            if self.random.random() < 0.5:
                async with trio.open_nursery() as both:
                    both.start_soon(cluster.propose, self.operator, rival)
                    both.start_soon(cluster.propose, self.operator, new)
            else:
                await cluster.propose(self.operator, new)
            await trio.sleep(0.5)
            if cluster.maps.get(new.epoch) == new:
                break
            await self.stable()
        for n in coming:
            await cluster.add_machine(n)
        if self.mutant == "wipe_early":
            for n in going:
                machine = cluster.machines.pop(n)
                if machine.up:
                    machine.crash()

    async def stable(self) -> None:
        """Wait until no transition is under way, throwing away what was removed."""
        deadline = self.cluster.clock.monotonic() + PATIENCE * 2
        while True:
            self.bury()
            if self.cluster.newest.transition is None:
                return
            if self.cluster.clock.monotonic() > deadline:
                raise Violation(f"a transition does not end: {self.why()}")
            await trio.sleep(0.5)

    def bury(self) -> None:
        """Switch removed machines off and throw their disks away."""
        members = {n.number for n in self.cluster.newest.nodes}
        for number in sorted(self.cluster.machines.keys() - members):
            machine = self.cluster.machines.pop(number)
            if machine.up:
                machine.crash()

    def why(self) -> str:
        found = []
        for machine in self.cluster.live():
            life = machine.node and machine.node.life
            if life and life.driver.waiting:
                found.append(f"node {machine.number}: {'; '.join(life.driver.waiting)}")
            if life and life.moves.waiting:
                found.append(f"node {machine.number} moves: {life.moves.waiting}")
            if life and life.rebalance.errors:
                found.append(f"node {machine.number} pushes: {life.rebalance.errors}")
        return " | ".join(found)

    # ------------------------------------------------------------------------------------ faults

    async def trouble(self) -> None:
        """One node at a time loses power or its links."""
        while self.faults:
            await trio.sleep(self.random.uniform(0.5, 4))
            machines = self.cluster.live()
            if not self.faults or len(machines) < len(self.cluster.machines):
                continue
            machine = machines[self.random.randrange(len(machines))]
            kind = self.random.random()
            if kind < 0.1:
                await self.restore(machine)
            elif kind < 0.2:
                await self.fork(machine)
            elif kind < 0.6:
                machine.crash()
                await trio.sleep(self.random.uniform(0.1, 4))
                if machine.number in self.cluster.machines and not machine.up:
                    await machine.start()
            else:
                mine = f"node{machine.number}"
                others = [f"node{m.number}" for m in machines if m is not machine]
                self.network.partition([[mine], others])
                await trio.sleep(self.random.uniform(0.5, 5))
                self.network.heal()

    async def restore(self, machine: Machine) -> None:
        """Start a node on a copy of its directory that is one life old: it must not serve."""
        machine.crash()
        new, old = machine.disk, copy.deepcopy(machine.disk)
        for turn, disk in enumerate((new, old, new)):
            if machine.number not in self.cluster.machines:
                return
            machine.disk = disk
            await machine.start()
            await trio.sleep(self.random.uniform(1, 3))
            node = machine.node
            serves = node is not None and node.boot is not None and node.boot.admitted.is_set()
            if serves and disk is old:
                raise Violation(f"node {machine.number} serves on a copy of its directory")
            if turn == 2 or (turn == 0 and not serves):  # a life that nobody noted may be repeated
                return
            if machine.up:
                machine.crash()

    async def fork(self, machine: Machine) -> None:
        """Show a node a map that does not follow from its own, then settle that as people would."""
        keeper = machine.keeper
        if keeper is None:
            return
        with contextlib.suppress(ForkedMap):
            current = keeper()
            if keeper.offer(replace(current, epoch=current.epoch + 1, prev_hash=b"x" * 32)):
                raise Violation(f"node {machine.number} took a map that contradicts its own")
        await trio.sleep(self.random.uniform(0, 1))
        if machine.number in self.cluster.machines and machine.up:
            machine.crash()
            await machine.start()

    async def heal(self) -> None:
        self.network.heal()
        self.network.drop = self.network.duplicate = self.network.reorder = 0.0
        self.bury()
        for machine in list(self.cluster.machines.values()):
            if not machine.up:
                await machine.start()

    # ------------------------------------------------------------------------------------ checks

    async def settled(self) -> None:
        """Wait until all is where the map says."""
        deadline = self.cluster.clock.monotonic() + PATIENCE
        while True:
            self.bury()
            wrong = self.unsettled()
            if not wrong:
                return
            if self.cluster.clock.monotonic() > deadline:
                raise Violation(f"after {PATIENCE:g} s of peace {wrong}; {self.why()}")
            await trio.sleep(1)

    def unsettled(self) -> str:
        newest = self.cluster.newest
        if newest.transition is not None:
            return "a transition is under way"
        for machine in self.cluster.machines.values():
            if machine.node is None or machine.keeper is None:
                return f"node {machine.number} is down: {machine.error!r}"
            if machine.keeper() != newest:
                return f"node {machine.number} has an old map"
            if machine.keeper.forked:
                return machine.keeper.alarm
        for volume in VOLUMES:
            homes = newest.volume_homes(volume)
            for home in homes:
                node = self.cluster.machines[home].node
                journal = node.journals.get(volume) if node is not None else None
                if journal is None:
                    return f"home {home} of {homes} has no journal of volume {volume[:1]!r}"
                if set(journal.members) != set(homes):
                    return f"volume {volume[:1]!r} is at {journal.members}, not at {homes}"
        return ""

    async def check(self) -> None:
        """All that was acknowledged is there."""
        for client in self.clients:
            chosen = self.cluster.entries.get(client.volume, {})
            for seq, key in client.acked:
                if key not in chosen.get(seq, b""):
                    raise Violation(f"commit {seq} of {client.volume!r} was acknowledged and lost")
            reader = BlobClient(client.endpoint, client.keeper, self.cluster.clock)
            client.keeper.offer(self.cluster.newest)
            try:
                await reader.get_many(client.stored, timeout=20)
            except DfsError as e:
                raise Violation(f"blobs that were acknowledged are lost: {e}") from e
            self.check_copies(client.stored)
        for volume in VOLUMES:
            self.check_journal(volume)
        for machine in self.cluster.machines.values():
            for volume in VOLUMES:
                journal = machine.node.journals.get(volume) if machine.node else None
                if journal is not None and journal.chosen > max(self.cluster.entries[volume]):
                    raise Violation("an entry that nobody observed")

    def check_journal(self, volume: bytes) -> None:
        """What was acknowledged is in the replicas of a majority of the homes.

        The last entry may be accepted there and not known to be chosen yet.
        """
        acked = {seq: key for c in self.clients if c.volume == volume for seq, key in c.acked}
        homes = self.cluster.newest.volume_homes(volume)
        good = dict.fromkeys(acked, 0)
        for node in self.nodes_of(homes):
            journal = node.journals.get(volume)
            if journal is None:
                continue
            base, chosen, pending = journal.base, journal.chosen, journal.replica.pending
            for seq, key in acked.items():
                if seq <= base:
                    good[seq] += 1  # covered by a checkpoint
                elif seq <= chosen:
                    good[seq] += key in journal.entries(seq - 1, 1)[0][1]
                elif pending is not None and seq == chosen + 1:
                    good[seq] += key in pending.payload
        lost = [seq for seq, count in good.items() if count <= len(homes) // 2]
        if lost:
            raise Violation(f"commits {lost} of {volume!r} are not at most of {homes}")

    def check_phase(self, new: ClusterMap) -> None:
        """Reads move to B in this map: every R homes of B must have what was acknowledged.

        Nodes that are down may have it.
        """
        if new.phase(METADATA) != 2:
            return
        for client in self.clients:
            for name in client.stored:
                homes = new.homes(METADATA, partition_of(name))
                without = [n for n in self.nodes_of(homes) if n.blobs.get(name) is None]
                if len(without) >= new.params.r:
                    raise Violation(f"epoch {new.epoch}: a blob is missing at most of {homes}")
        for volume in VOLUMES:
            homes = new.volume_homes(volume)
            found = [n.journals.get(volume) for n in self.nodes_of(homes)]
            wrong = [j for j in found if j is None or set(j.members) != set(homes)]
            if len(wrong) > len(homes) // 2:
                raise Violation(f"epoch {new.epoch}: volume {volume[:1]!r} is not at {homes} yet")

    def nodes_of(self, homes: tuple[int, ...]) -> list[MetadataNode]:
        """Those of the homes that are up and have started."""
        machines = [self.cluster.machines.get(home) for home in homes]
        nodes = [m.node for m in machines if m is not None and m.node is not None]
        return [n for n in nodes if n.boot is not None and n.boot.admitted.is_set()]

    def check_copies(self, names: list[bytes]) -> None:
        """Each blob is on W homes, so that any R of them find it."""
        newest = self.cluster.newest
        for name in names:
            homes = newest.homes(METADATA, partition_of(name))
            nodes = [self.cluster.machines[home].node for home in homes]
            held = sum(node is not None and node.blobs.get(name) is not None for node in nodes)
            if held < newest.w:
                raise Violation(f"a blob is on {held} of its homes {homes}")


def play(seed: int, *, mutant: str | None = None) -> tuple[_Run, list[str]]:
    """Run one schedule; what it did and what was violated."""
    made = _Run(seed, mutant)
    with _changed(mutant):
        wanted = (Violation, DfsError)
        return made, run_judged(made.main, seed=seed, name=NAME, wanted=wanted)


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of one schedule; empty is good."""
    return play(seed, mutant=mutant)[1]
