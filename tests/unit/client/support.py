"""A FileSystem on the in-memory cluster, for tests."""

import contextlib

import trio

from dfs.client.filesystem import FileSystem
from dfs.client.registry import make_root
from dfs.client.session import Session
from dfs.testing.fakehome import FakeHome

VOLUME = b"v" * 16
PARAMS = {"salt": b"s" * 16, "n": 3, "w": 2, "class": "strict", "name": "test"}


def new_home(**params):
    home = FakeHome()
    home.create(VOLUME, {**PARAMS, **params})
    return home


@contextlib.asynccontextmanager
async def filesystem(
    home, *, seed=0, mode="rw", deadline=30.0, flush=True, delegate=False, **options
):
    """A FileSystem with `.rpc` (the knobs of its network) and `.chunks`."""
    cluster = home.client(seed=seed, name=f"client{seed}")
    async with trio.open_nursery() as nursery:
        session = Session(
            cluster, VOLUME, mode=mode, name=f"test{seed}", deadline=deadline, delegate=delegate
        )
        await nursery.start(session.run)
        nursery.start_soon(session.keep_warm)
        if mode != "ro":
            await session.transact(lambda txn: make_root(txn, 1))
        fs = FileSystem(session, home.chunk_client(), **options)
        fs.rpc = cluster.rpc
        await nursery.start(fs.run)
        yield fs
        if flush:
            await fs.shut_down()
        nursery.cancel_scope.cancel()


async def write_file(fs, parent, name, data, *, at=0):
    attr, fh = await fs.create(parent, name, 0o644)
    if data:
        await fs.write(fh, at, data)
    await fs.flush(fh)
    await fs.release(fh)
    return attr.ino


async def read_file(fs, ino, chunk=1 << 20):
    fh = await fs.open(ino)
    parts, at = [], 0
    while data := bytes(await fs.read(fh, at, chunk)):
        parts.append(data)
        at += len(data)
    await fs.release(fh)
    return b"".join(parts)


async def names(fs, ino):
    fh = await fs.opendir(ino)
    found, cookie = [], 0
    while entries := await fs.readdir(fh, cookie, 7):
        for name, cookie, _ in entries:
            fs.returned(fh, name, cookie)
            found.append(name)
    await fs.releasedir(fh)
    assert len(found) == len(set(found))
    return sorted(found)
