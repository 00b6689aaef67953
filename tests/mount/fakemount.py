"""Mounts the in-memory cluster: `python fakemount.py MOUNTPOINT [quota] [xattrs] [few] [deaf] [large]`.

The process holds the fake cluster, the mounted client and a second client of the same volume that
obeys commands on standard input, one a line, one answer line each; see `obey`.  `few`: the mount's
table of inodes has a budget for some hundreds; `deaf`: the kernel does not know FUSE_NOTIFY_PRUNE;
`large`: directories are large from 100 entries on, and requests for names are counted.
"""

import errno
import logging
import sys

import trio

from dfs.client.filesystem import FileSystem
from dfs.client.paths import read_path, resolve, write_path
from dfs.client.registry import make_root
from dfs.client.session import Session
from dfs.errors import DfsError
from dfs.testing.fakehome import FakeHome
from fuse import invalidate, listing, operations
from fuse.inodes import InodeTable
from fuse.mount import MountOptions, serve

VOLUME = b"v" * 16
FEW = 48 << 10  # bytes
tables = []
lookups = [0]


def few(prune):
    """A table of inodes with a small budget, to be asked about later."""
    tables.append((InodeTable(FEW, prune), prune.__self__))
    return tables[-1][0]


def counting(lookup):
    """LOOKUP, counted."""

    async def counted(self, *args):
        lookups[0] += 1
        return await lookup(self, *args)

    return counted


def deaf(_device, _inos):
    """What older kernels say to FUSE_NOTIFY_PRUNE."""
    raise OSError(errno.EINVAL, "Invalid argument")


async def client(home, nursery, seed, **options):
    cluster = home.client(seed=seed, name=f"client{seed}")
    session = Session(cluster, VOLUME, name=f"c{seed}", deadline=3.0)
    await nursery.start(session.run)
    nursery.start_soon(session.keep_warm)
    await session.transact(lambda txn: make_root(txn, 1))
    fs = FileSystem(session, home.chunk_client(), **options)
    fs.rpc = cluster.rpc
    await nursery.start(fs.run)
    return fs


async def obey(line, home, mounted, other):
    command, *args = line.split(" ")
    names = [a.encode() for a in args]
    if command == "write":
        await write_path(other, names[0], names[1])
    elif command == "read":
        return (await read_path(other, names[0])).decode()
    elif command == "unlink":
        await other.unlink(1, names[0])
    elif command == "rename":
        await other.rename(1, names[0], 1, names[1])
    elif command == "mkdir":
        await other.mkdir(1, names[0], 0o755)
    elif command == "stat":
        return str((await resolve(other, names[0])).size)
    elif command == "break":
        home.chunks.broken = True
    elif command == "mend":
        home.chunks.broken = False
    elif command == "cut":
        mounted.rpc.down = {1, 2, 3}
    elif command == "join":
        mounted.rpc.down = set()
    elif command == "fill":
        async with trio.open_nursery() as nursery:
            for n in range(int(args[1])):
                nursery.start_soon(other.mknod, 1, b"%s%d" % (names[0], n), 0o100640)
    elif command == "lookups":
        return str(lookups[0])
    elif command == "held":
        table, invalidator = tables[0]
        return f"{table.used} {table.budget} {invalidator.statistics()['pruned']}"
    elif command == "boom":
        mounted.readlink = None  # a bug: calling it raises TypeError
    return "ok"


async def commands(home, mounted, other):
    async for line in trio.lowlevel.FdStream(0):
        for text in line.decode().splitlines():
            try:
                answer = await obey(text, home, mounted, other)
            except DfsError as e:
                answer = f"error {e.errno}"
            print(answer, flush=True)


async def main(mountpoint, *flags):
    home = FakeHome(latency=0.0002)
    params = {"salt": b"s" * 16, "class": "strict"}
    if "quota" in flags:
        params["quota_bytes"] = 1 << 20
    if "few" in flags:
        operations.InodeTable = few
    if "deaf" in flags:
        invalidate.Invalidator.__init__.__kwdefaults__["prune"] = deaf
    if "large" in flags:
        listing.Listings.__init__.__defaults__ = (100,)
        operations.Operations.lookup = counting(operations.Operations.lookup)
    home.create(VOLUME, params)
    async with trio.open_nursery() as nursery:
        mounted = await client(home, nursery, 0, clear_privileges=False)
        other = await client(home, nursery, 1)
        nursery.start_soon(commands, home, mounted, other)
        options = MountOptions(mountpoint, "fake", xattrs="xattrs" in flags)
        await serve(mounted, options, lambda: print("ready", flush=True))
        await other.session.refresh()
        saved = (await other.statfs()).used
        print(f"saved {saved} open {len(mounted.handles)}", flush=True)
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    trio.run(main, *sys.argv[1:])
