"""Whole cluster: file systems on three machines through crashes, cuts and losses, then judged.

Three clients share one volume.  Each writes files of its own (so that what a file may hold is
known), and all fight for the same names with exclusive creates.  Meanwhile machines lose power and
restart, the network drops, duplicates, reorders and cuts, and clients die.  With odd seeds all are
there all the time; with even seeds they take turns, so that whoever is alone has the delegation,
and clients are cut off for longer than a lease, too.  After the faults:

    V1, V2   `fsck` of the volume by a fresh client finds nothing
    V3       the checkpointed tree is the canonical tree of its content (also `fsck`)
    V4       what was fsynced is there: a file holds its last synced version or a later attempt;
             of each session's operations a prefix took place, and none of them was lost that
             somebody saw or that was fsynced (`dfs.testing.volume_history`)
    C1, C3   every chunk has its copies, and no read ever returned bytes that were never written
    J2       of all clients that tried, at most one created a name exclusively
    J3       operations on names and their results are linearizable (`dfs.testing.linear`)
    J5       after `refresh`, a client sees all that another one's committed operations made

The schedule, its faults and its checks are read as one, which makes the module longer than most.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, ClassVar

import trio
import trio.testing

import dfs.client.delegation
import metadata.volumehome
from dfs.client.chunkio import ChunkClient
from dfs.client.filesystem import FileSystem
from dfs.client.fsck import fsck
from dfs.client.store import Prepared
from dfs.errors import DfsError, FsError
from dfs.ids import ROOT_INO
from dfs.testing.holder_mutants import HOLDERS, SEEDED, broken
from dfs.testing.seeded import run_seeded
from dfs.testing.volume_history import Arena, Diary
from dfs.testing.volume_rivals import ARENA, Rival, judge
from dfs.testing.wholecluster import World, make_world

if TYPE_CHECKING:
    from collections.abc import Callable

    from metadata.volumehome import Folder

NAME = "volume"
SECONDS = 40.0  # virtual, with faults
TURNS = 120.0  # virtual, with faults, where clients take turns
SETTLE = 90.0  # virtual, without: longer than every retry and catch-up
CLIENTS = 3
RIVALS = 2  # clients that take turns
VOLUME = "v"
STRIKE = 0.02  # of all fsyncs are followed at once by a loss of power everywhere
SIZES = (0, 10, 3000, 5000, 70_000, 200_000)

MUTANTS = {
    "no_barrier": "fsync does not wait until the chunks are durable",
    "fold_drops": "a checkpoint forgets one of the items it folds",
    "wrong_nlink": "removing a directory does not lower its parent's link count",
    **{name: HOLDERS[name] for name in SEEDED},
}


@dataclass
class _File:
    """What one file may hold, as its only writer knows."""

    synced: bytes | None = None  # the last version whose fsync returned
    later: list[bytes] = field(default_factory=list)  # attempted since, newest last
    gone: bool = False  # an unlink was attempted

    def may_hold(self, content: bytes) -> bool:
        """Whether this content is one that the file can have: some version, or a prefix of work."""
        return content == (self.synced or b"") or any(content == v for v in self.later)


@dataclass
class _History:
    """What the clients did, and what was wrong about it."""

    files: dict[bytes, _File] = field(default_factory=dict)
    winners: dict[bytes, list[str]] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)
    arena: Arena = field(default_factory=Arena)
    diaries: list[Diary] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: {"delegated": 0, "lost": 0})
    there: dict[str, FileSystem] = field(default_factory=dict)  # by client, where they take turns
    done: int = 0
    failed: int = 0
    wanted: trio.Event = field(default_factory=trio.Event)  # set: whoever is away, come now
    strike: trio.Event = field(default_factory=trio.Event)  # set: lose all power now


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Run one seed; returns the violations, each a line."""
    return trace(seed, mutant=mutant).violations


def trace(seed: int, *, mutant: str | None = None) -> _History:
    """Run one seed; returns all that was done."""
    history = _History()
    with _small_checkpoints(), broken(mutant):
        run_seeded(_main, seed, mutant, history, seed=seed)
    return history


class _small_checkpoints:  # noqa: N801 - reads as a verb where it is used
    """Homes fold and holders send after a few kilobytes, so that a short run has many of both."""

    _small: ClassVar[tuple[tuple[Any, str, float], ...]] = (
        (metadata.volumehome, "CHECKPOINT_BYTES", 16 << 10),
        (metadata.volumehome, "CHECKPOINT_AGE", 5.0),
        (dfs.client.delegation, "BATCH_BYTES", 1 << 10),
    )

    def __enter__(self) -> None:
        self._kept = [getattr(module, name) for module, name, _ in self._small]
        for module, name, value in self._small:
            setattr(module, name, value)

    def __exit__(self, *_: object) -> None:
        for (module, name, _value), kept in zip(self._small, self._kept, strict=True):
            setattr(module, name, kept)


async def _main(seed: int, mutant: str | None, history: _History) -> None:
    random = Random(seed)
    async with make_world(random) as world:
        _mutate(world, mutant)
        turns = seed % 2 == 0
        await world.create_volume(VOLUME)
        async with world.filesystem(world.connect("operator"), VOLUME) as fs:
            await fs.mkdir(ROOT_INO, ARENA, 0o755)
        network = world.network
        network.drop = random.choice((0.0, 0.002, 0.02))
        network.duplicate = random.choice((0.0, 0.01))
        network.reorder = random.choice((0.0, 0.02))
        with trio.move_on_after(TURNS if turns else SECONDS):
            async with trio.open_nursery() as nursery:
                for i in range(RIVALS if turns else CLIENTS):
                    client = _turns if turns else _client
                    nursery.start_soon(client, world, f"client{i}", history, mutant)
                nursery.start_soon(_weather, world, history, turns)
        network.drop = network.duplicate = network.reorder = 0.0
        network.heal()
        for machine in world.machines:
            if not machine.up:
                await machine.start()
        await trio.sleep(SETTLE)
        await _judge(world, history)


# ----------------------------------------------------------------------------------------- faults


async def _weather(world: World, history: _History, turns: bool) -> None:
    """Machines die one at a time; sometimes all at once; the network is cut now and then.

    Lightning strikes when a client says so: all machines die while a promise is youngest.
    """
    random, network = world.random, world.network
    while True:
        history.strike = trio.Event()
        with trio.move_on_after(random.uniform(0.5, 5)):
            await history.strike.wait()
        fault = random.random()
        if turns and random.random() < 0.6:  # rare enough that some get the delegation
            holder = next((n for n, fs in sorted(history.there.items()) if fs.session.here), None)
            network.isolate(holder or f"client{random.randrange(RIVALS)}")
            seconds = random.choice((random.uniform(0.1, 3), random.uniform(16, 45)))
            if seconds > 3:
                history.wanted.set()  # somebody who finds that the holder is silent
                history.wanted = trio.Event()
            await trio.sleep(seconds)
            network.heal()
        elif history.strike.is_set() or 0.45 <= fault < 0.55:
            for machine in world.machines:
                machine.crash()
            await trio.sleep(random.uniform(0.1, 2))
            for machine in world.machines:
                await machine.start()
        elif fault < 0.45:
            machine = random.choice(world.machines)
            machine.crash()
            await trio.sleep(random.uniform(0.1, 4))
            await machine.start()
        elif fault < 0.8:
            cut = random.choice(world.machines)
            for name in cut.names():
                network.isolate(name)
            await trio.sleep(random.uniform(0.2, 6))
            network.heal()
        elif fault < 0.9:
            one, other = random.sample(world.machines, 2)
            network.block(one.names()[0], other.names()[0])
            await trio.sleep(random.uniform(0.2, 4))
            network.heal()
        else:
            _flip_bits(world)


def _flip_bits(world: World) -> None:
    """Damage a segment file; always of the same machine, so that a good copy is left."""
    machine = world.random.choice(world.machines)
    for disk in machine.disks.values():
        for folder in disk.listdir():
            for name in disk.listdir(folder):
                path = f"{folder}/{name}"
                if name.endswith(".seg") and disk.exists(path):
                    size = disk.open(path).size()
                    if size > 4096 and world.damaged in (0, machine.number):
                        disk.flip(path, world.random.randrange(4096, size))
                        world.damaged = machine.number
                        return


# ---------------------------------------------------------------------------------------- clients


async def _client(world: World, name: str, history: _History, mutant: str | None) -> None:
    """Mount, work, die, mount again."""
    random = Random(world.random.random())
    life = 0
    while True:
        life += 1
        with trio.move_on_after(random.uniform(5, 25)):
            try:
                cluster = world.connect(name)
                async with world.filesystem(cluster, VOLUME) as fs:
                    if mutant == "wrong_nlink":
                        _break_rmdir(fs)
                    worker = _Worker(fs, name, life, random, history)
                    while True:
                        await worker.step()
            except DfsError:
                history.failed += 1  # no quorum for too long: come back later
        world.network.endpoint(name).close()
        await trio.sleep(random.uniform(0.1, 1))


async def _turns(world: World, name: str, history: _History, mutant: str | None) -> None:
    """Work now and then; end with a close, or with a crash."""
    random = Random(world.random.random())
    life = 0
    while True:
        life += 1
        with trio.move_on_after(random.choice((random.uniform(0, 5), random.uniform(10, 50)))):
            await history.wanted.wait()
        until = trio.current_time() + random.uniform(4, 40)
        crash = until if random.random() < 0.4 else math.inf
        with trio.move_on_at(crash):
            try:
                async with world.filesystem(world.connect(name), VOLUME) as fs:
                    if mutant == "wrong_nlink":
                        _break_rmdir(fs)
                    fs.session.on_fenced(partial(_fenced, history))
                    history.there[name] = fs
                    worker = _Worker(fs, name, life, random, history)
                    while trio.current_time() < until:
                        await worker.step()
            except DfsError:
                history.failed += 1
        history.there.pop(name, None)
        world.network.endpoint(name).close()


def _fenced(history: _History, _held: bool, lost: set[int]) -> None:
    history.counts["lost"] += bool(lost)


class _Worker:
    """One client's operations and what they prove."""

    def __init__(
        self, fs: FileSystem, name: str, life: int, random: Random, history: _History
    ) -> None:
        self.fs = fs
        self.name = name
        self.random = random
        self.history = history
        self.prefix = f"{name}-{life}-".encode()
        self.count = 0
        self.mine: list[bytes] = []
        self.directories: list[bytes] = []
        self.rival = Rival(fs, f"{name}-{life}", random, history.arena, history.diaries)

    async def step(self) -> None:
        """One operation; an error is an outcome, not an end."""
        await trio.sleep(self.random.uniform(0, 0.2))
        syncing: tuple[Callable[[], Any], ...] = (
            self.write_new,
            self.write_new,
            self.rewrite,
            self.fight,
        )
        choices = (
            *(() if self.rival.lazy else syncing),
            self.read_back,
            self.remove,
            self.make_directory,
            self.remove_directory,
            self.rename,
            *(self.rival.write_diary,) * 3,
            *(self.rival.fight,) * 3,
            *(self.rival.look,) * 2,
        )
        self.history.counts["delegated"] += self.fs.session.here
        try:
            await self.random.choice(choices)()
            self.history.done += 1
        except DfsError:
            self.history.failed += 1

    async def write_new(self) -> None:
        """Create a file of our own and write it."""
        self.count += 1
        path = self.prefix + str(self.count).encode()
        record = self.history.files[path] = _File()
        _, handle = await self.fs.create(ROOT_INO, path, 0o644)
        self.mine.append(path)
        await self._fill(handle, record)

    async def rewrite(self) -> None:
        """Write a file anew: longer than before, so that no part of the old version is left."""
        if not self.mine:
            return
        path = self.random.choice(self.mine)
        attr = await self.fs.lookup(ROOT_INO, path)
        handle = await self.fs.open(attr.ino, writable=True)
        await self._fill(handle, self.history.files[path], attr.size)

    async def _fill(self, handle: int, record: _File, at_least: int = 0) -> None:
        size = max(self.random.choice(SIZES), at_least)
        content = self.random.randbytes(size)
        record.later.append(content)
        try:
            await self.fs.write(handle, 0, content)
            await self.fs.fsync(handle)
            record.synced = content
            record.later = []
            if self.random.random() < STRIKE:
                self.history.strike.set()
        finally:
            await self.fs.release(handle)

    async def read_back(self) -> None:
        """Read any file: what comes must have been written by somebody."""
        entries = await self.fs.list(ROOT_INO)
        names = [n for n, _, _ in entries if n in self.history.files]
        if not names:
            return
        path = self.random.choice(names)
        attr = await self.fs.lookup(ROOT_INO, path)
        content = await _read_all(self.fs, attr.ino)
        self.check_content(path, content)

    def check_content(self, path: bytes, content: bytes) -> None:
        """C3, and V4 for what only grows newer."""
        record = self.history.files[path]
        if content and not record.may_hold(content) and path in self.mine:
            self.history.violations.append(
                f"C3: {self.name} read {len(content)} bytes of {path!r} that nobody wrote"
            )

    async def remove(self) -> None:
        """Unlink one of our files."""
        if len(self.mine) < 4:
            return
        path = self.mine.pop(self.random.randrange(len(self.mine)))
        self.history.files[path].gone = True
        await self.fs.unlink(ROOT_INO, path)

    async def fight(self) -> None:
        """Create a name that the others want too; only one may succeed."""
        name = f"prize{self.random.randrange(60)}".encode()
        _, handle = await self.fs.create(ROOT_INO, name, 0o644)
        await self.fs.fsync(handle)  # before that the next crash may give the name to another
        winners = self.history.winners.setdefault(name, [])
        winners.append(self.name)
        if len(winners) > 1:
            self.history.violations.append(f"J2: {name!r} was created exclusively by {winners}")
        await self.fs.release(handle)

    async def make_directory(self) -> None:
        """A directory with a directory in it."""
        self.count += 1
        name = self.prefix + b"d" + str(self.count).encode()
        attr = await self.fs.mkdir(ROOT_INO, name, 0o755)
        await self.fs.mkdir(attr.ino, b"sub", 0o755)
        self.directories.append(name)

    async def remove_directory(self) -> None:
        """Take one down again."""
        if not self.directories:
            return
        name = self.directories.pop()
        attr = await self.fs.lookup(ROOT_INO, name)
        await self.fs.rmdir(attr.ino, b"sub")
        await self.fs.rmdir(ROOT_INO, name)

    async def rename(self) -> None:
        """Move a directory into another one of ours."""
        if len(self.directories) < 2:
            return
        name, into = self.directories.pop(), self.directories[0]
        target = await self.fs.lookup(ROOT_INO, into)
        await self.fs.rename(ROOT_INO, name, target.ino, name)


async def _read_all(fs: FileSystem, ino: int) -> bytes:
    handle = await fs.open(ino)
    try:
        size = (await fs.getattr(ino)).size
        parts = []
        at = 0
        while at < size:
            part = bytes(await fs.read(handle, at, 1 << 20))
            if not part:
                break
            parts.append(part)
            at += len(part)
        return b"".join(parts)
    finally:
        await fs.release(handle)


# --------------------------------------------------------------------------------------- judgement


async def _judge(world: World, history: _History) -> None:
    found = history.violations
    try:
        cluster = world.connect("judge")
        async with world.filesystem(cluster, VOLUME) as fs:
            await fs.session.refresh()
            names = {name for name, _, _ in await fs.list(ROOT_INO)}
            for path, record in sorted(history.files.items()):
                await _judge_file(fs, path, record, names, found)
            found += await judge(fs, history.arena, history.diaries)
            for prize in sorted(history.winners):
                if prize not in names:
                    found.append(f"V4: {prize!r} was created but is gone")
        report = await fsck(cluster, VOLUME)
        found += [f"{invariant}: {text}" for invariant, text in report.problems]
    except DfsError as e:
        found.append(f"liveness: after the faults the volume is not usable: {e}")


async def _judge_file(
    fs: FileSystem, path: bytes, record: _File, names: set[bytes], found: list[str]
) -> None:
    if path not in names:
        if record.synced is not None and not record.gone:
            found.append(f"V4: {path!r} was fsynced and is gone")
        return
    try:
        content = await _read_all(fs, (await fs.lookup(ROOT_INO, path)).ino)
    except FsError as e:
        found.append(f"C1: {path!r} cannot be read: {e}")
        return
    if record.may_hold(content):
        return
    if not content and record.synced is None:
        return
    found.append(
        f"V4: {path!r} holds {len(content)} bytes, neither its synced version of"
        f" {len(record.synced or b'')} nor one of {len(record.later)} later attempts"
    )


# ----------------------------------------------------------------------------------------- mutants


class _NoBarrier(ChunkClient):
    async def put_prepared(self, prepared: Prepared, *, durable: bool = False) -> None:
        del durable
        await super().put_prepared(prepared)

    async def sync(self) -> None:
        pass


def _mutate(world: World, mutant: str | None) -> None:
    if mutant == "no_barrier":
        world.chunk_client = _NoBarrier
    elif mutant == "fold_drops":
        world.wrap_folder = _forgetful


def _forgetful(folder: "Folder") -> "Folder":
    async def forget(root: bytes, salt: bytes, entries: Any) -> tuple[bytes, int]:
        return await folder(root, salt, entries[:-1])

    return forget


def _break_rmdir(fs: FileSystem) -> None:
    original = fs.namespace.rmdir

    def rmdir(txn: Any, *args: Any) -> Any:
        result = original(txn, *args)
        txn.effects[:] = [
            e for e in txn.effects if not (e[0] == 1 and any(c[1] == 1 for c in e[2]))
        ]
        return result

    fs.namespace.rmdir = rmdir  # type: ignore[method-assign, assignment]  # for one instance
