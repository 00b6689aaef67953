"""What a client of the volume scenario does in its own diaries, in others', and in the arena."""

import errno
from random import Random
from typing import TYPE_CHECKING

import trio

from dfs.client.filesystem import Caller, FileSystem
from dfs.errors import FsError
from dfs.ids import ROOT_INO
from dfs.testing.linear import EXCHANGE, NOREPLACE
from dfs.testing.volume_history import Arena, Diary, Listing, Look
from dfs.volume.items import REG

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ARENA = b"arena"
ROUND = 3.0  # seconds after which the names of the arena are others
NAMES = (b"a", b"b", b"c")
FULL = 100  # operations after which another diary is begun


class Rival:
    """One client's part in the diaries and the arena; `client` names it and its life."""

    def __init__(
        self, fs: FileSystem, client: str, random: Random, arena: Arena, diaries: list[Diary]
    ) -> None:
        """On a mounted file system."""
        self.fs = fs
        self.client = client
        self.random = random
        self.lazy = random.random() < 0.5  # it does not sync: much can be lost
        self.arena = arena
        self.diaries = diaries
        self.diary: Diary | None = None
        self.ino = 0  # of the diary's directory
        self.names: list[bytes] = []  # in it
        self.count = 0

    # ------------------------------------------------------------------ the own diary

    async def write_diary(self) -> None:
        """The next operation in the own diary; a new one after a loss."""
        diary = self.diary
        if diary is None or diary.over or len(diary.ops) >= FULL:
            diary = await self._begin()
        for _ in range(self.random.randint(1, 4)):
            await self._one(diary)
            if diary.over:
                return
        if not self.lazy and self.random.random() < 0.3:
            await diary.sync(self.fs, self._sync)

    async def _begin(self) -> Diary:
        self.count += 1
        generation = self.fs.session.generation
        name = f"diary-{self.client}-{self.count}".encode()
        self.ino = (await self.fs.mkdir(ROOT_INO, name, 0o755)).ino
        await self._sync()
        self.names = []
        self.diary = Diary(name, (self.client, generation))
        if self.fs.session.generation != generation:
            self.diary.over = True  # the directory may be lost
        else:
            self.diaries.append(self.diary)
        return self.diary

    async def _sync(self) -> None:
        handle = await self.fs.opendir(ROOT_INO)
        try:
            await self.fs.fsyncdir(handle)
        finally:
            await self.fs.releasedir(handle)

    async def _one(self, diary: Diary) -> None:
        random, fs, ino = self.random, self.fs, self.ino
        kind = random.choice(("create", "create", "write", "write", "rename", "unlink"))
        if kind == "create" or not self.names:
            token = self.arena.token()
            name = b"%d" % token
            op = ("create", name, token)
            await diary.run(fs, op, lambda: self._make(ino, name, token))
            self.names.append(name)
            return
        name = random.choice(self.names)
        if kind == "write":
            size = len(diary.ops) + random.choice((1, 1000, 10_000, 40_000))
            await diary.run(fs, ("write", name, size), lambda: self._write(ino, name, size))
        elif kind == "rename":
            new = b"%d" % self.arena.token()
            await diary.run(fs, ("rename", name, new), lambda: fs.rename(ino, name, ino, new))
            self.names[self.names.index(name)] = new
        else:
            self.names.remove(name)
            await diary.run(fs, ("unlink", name), lambda: fs.unlink(ino, name))

    async def _make(self, parent: int, name: bytes, token: int) -> None:
        await self.fs.mknod(parent, name, REG << 12 | 0o644, caller=Caller(token, 0))

    async def _write(self, parent: int, name: bytes, size: int) -> None:
        """Give a file its size in one commit: files only grow, and only at their end."""
        attr = await self.fs.lookup(parent, name)
        handle = await self.fs.open(attr.ino, writable=True)
        try:
            if attr.size < size:
                await self.fs.write(handle, attr.size, bytes(size - attr.size))
            else:
                await self.fs.setattr(attr.ino, size=size)
            await self.fs.flush(handle)
        finally:
            await self.fs.release(handle)

    # ------------------------------------------------------------------ others' diaries

    async def look(self) -> None:
        """Read somebody's diary: whatever was done before must be there."""
        others = [d for d in self.diaries[-8:] if d is not self.diary]
        if not others:
            return
        diary = self.random.choice(others)
        acknowledged = diary.acknowledged
        found = await listing(self.fs, diary)
        diary.looks.append(Look(self.client, acknowledged, len(diary.ops), found))

    # ------------------------------------------------------------------ the arena

    async def fight(self) -> None:
        """An operation on one of the few names of the moment."""
        random, fs = self.random, self.fs
        arena = (await fs.lookup(ROOT_INO, ARENA)).ino
        moment = b"%d" % (trio.current_time() // ROUND)
        name, other = (moment + random.choice(NAMES) for _ in range(2))
        token = self.arena.token()
        caller = Caller(token, 0)
        do: Callable[[], Awaitable[object]]
        kind = random.choice(("create", "create", "mkdir", "unlink", "rename", "lookup", "lookup"))
        what: tuple[object, ...] = (kind, name)
        if kind == "create":
            what, do = (kind, name, token), lambda: self._make(arena, name, token)
        elif kind == "mkdir":
            what = (kind, name, token)

            async def do() -> None:
                await fs.mkdir(arena, name, 0o755, caller)

        elif kind == "unlink":
            what = (random.choice(("unlink", "rmdir")), name)
            remove = fs.unlink if what[0] == "unlink" else fs.rmdir

            async def do() -> None:
                await remove(arena, name)

        elif kind == "rename":
            flags = random.choice((0, 0, NOREPLACE, EXCHANGE))
            what = (kind, name, other, flags)
            do = lambda: fs.rename(arena, name, arena, other, flags)  # noqa: E731 - a body of many
        else:
            do = lambda: token_of(fs, arena, name)  # noqa: E731 - see above
        await self.arena.run(fs, self.client, what, do)
        if not self.lazy and random.random() < 0.1:
            await self.arena.sync(fs, self.client, self._sync)


async def token_of(fs: FileSystem, parent: int, name: bytes) -> int:
    """Whose name it is, now and not a second ago."""
    await fs.session.refresh()
    return (await fs.lookup(parent, name)).uid


async def listing(fs: FileSystem, diary: Diary) -> Listing | None:
    """What stands in a diary now; None if it is gone."""
    await fs.session.refresh()
    try:
        ino = (await fs.lookup(ROOT_INO, diary.name)).ino
    except FsError as e:
        if e.errno != errno.ENOENT:
            raise
        return None
    found = await fs.list(ino, 0, 1000)
    return {name: (attr.uid, attr.size) for name, _, attr in found}


async def judge(fs: FileSystem, arena: Arena, diaries: list[Diary]) -> list[str]:
    """Look at everything once more when all is calm; what was wrong."""
    found = []
    for diary in diaries:
        found += diary.judge(await listing(fs, diary))
    ino = (await fs.lookup(ROOT_INO, ARENA)).ino
    for name in arena.names():
        await arena.run(fs, "judge", ("lookup", name), lambda name=name: token_of(fs, ino, name))  # type: ignore[misc]  # the name of this turn
    return found + arena.judge()
