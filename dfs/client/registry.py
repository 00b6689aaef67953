"""The registry of volumes: what names stand for, kept in the system volume (volume 0).

A volume comes to be in four steps, each of which may be repeated after a crash: its name is written
with state "creating"; `jrnl.genesis` makes its journal at its homes (they accept one only while the
registry says "creating"); its root directory is committed; the state becomes "created".  Creating a
volume again that is still "creating" takes up where the last attempt stopped.

Deleting marks the name "deleting" and removes it; the volume's data is freed by garbage collection.
"""

import contextlib
import re
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import trio

from dfs.client.connect import Cluster
from dfs.client.session import DEADLINE, Session, open_session
from dfs.cluster.map import METADATA
from dfs.errors import AlreadyExists, DfsError, InvalidArgument, NoQuorum, VolumeNotFound
from dfs.ids import ROOT_INO, SYSTEM_VOLUME
from dfs.volume import entries, items
from dfs.volume.items import DIR, Inode
from dfs.volume.view import Txn

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
CREATING, CREATED, DELETING = "creating", "created", "deleting"
GENESIS_TIMEOUT = 15.0
CHUNK_SIZE = 4 << 20


class VolumeInfo(NamedTuple):
    """A volume as the registry knows it."""

    name: str
    volume_id: bytes
    state: str
    params: dict[str, Any]


def check_name(name: str) -> None:
    """Raise `InvalidArgument` for what cannot name a volume."""
    if not _NAME.fullmatch(name):
        raise InvalidArgument(
            f"{name!r} is no volume name: 1 to 63 letters, digits, dots, dashes and underscores,"
            " beginning with a letter or digit"
        )


class Registry:
    """The volumes of a cluster, over a session at the system volume."""

    def __init__(self, cluster: Cluster, session: Session) -> None:
        """Use `open_registry`."""
        self._cluster = cluster
        self._session = session

    async def list(self) -> list[VolumeInfo]:
        """All volumes, by name."""

        def op(txn: Txn) -> list[VolumeInfo]:
            prefix = items.group(items.REGISTRY_INO, items.VOLUME)
            return [_info(key, value) for key, value in txn.scan(prefix)]

        await self._session.refresh()
        return await self._session.read(op)

    async def find(self, name: str) -> VolumeInfo:
        """The volume of a name, which is created completely; raises `VolumeNotFound`."""
        check_name(name)
        await self._session.refresh()
        info = await self._session.read(lambda txn: _get(txn, name))
        if info is None:
            raise VolumeNotFound(
                f"no volume is named {name!r}; `dfs volume list` shows those that are"
            )
        if info.state == CREATING:
            raise VolumeNotFound(
                f"volume {name!r} is not created completely; run `dfs volume create {name}` again"
            )
        if info.state == DELETING:
            raise VolumeNotFound(f"volume {name!r} is being deleted")
        return info

    async def create(self, name: str, params: dict[str, Any] | None = None) -> VolumeInfo:
        """Make a volume; `params` override the defaults of the genesis entry.

        Raises `AlreadyExists`, `InvalidArgument`, `NoQuorum`, `FsError` EIO.
        """
        check_name(name)
        random = self._cluster.random
        volume_id = random.randbytes(16)
        cluster_map = self._cluster.get_map()
        chosen: dict[str, Any] = {
            "salt": random.randbytes(16),
            "n": getattr(cluster_map, "n", 3),
            "w": getattr(cluster_map, "w", 2),
            "chunk_size": CHUNK_SIZE,
            "compress": True,
            "class": "strict",
            "name": name,
            "created": self._cluster.clock.time_ns(),
            **(params or {}),
        }

        def begin(txn: Txn) -> VolumeInfo:
            there = _get(txn, name)
            if there is not None and there.state != CREATING:
                raise AlreadyExists(
                    f"volume {name!r} exists ({there.state}); choose another name or"
                    f" `dfs volume delete {name}` first"
                )
            if there is None:
                there = VolumeInfo(name, volume_id, CREATING, chosen)
                _put(txn, there)
            return there

        info = await self._session.transact(begin)
        await self._genesis(info)
        async with open_session(
            self._cluster, info.volume_id, name="volume create", deadline=self._session.deadline
        ) as session:
            await session.transact(lambda txn: make_root(txn, info.params["created"]))

        def finish(txn: Txn) -> VolumeInfo:
            there = _get(txn, name)
            if there is None or there.volume_id != info.volume_id:
                raise VolumeNotFound(f"volume {name!r} was deleted while it was created")
            done = there._replace(state=CREATED)
            _put(txn, done)
            return done

        return await self._session.transact(finish)

    async def delete(self, name: str) -> VolumeInfo:
        """Remove a volume's name; its data goes with the next garbage collection."""
        check_name(name)

        def mark(txn: Txn) -> VolumeInfo:
            info = _get(txn, name)
            if info is None:
                raise VolumeNotFound(
                    f"no volume is named {name!r}; `dfs volume list` shows those that are"
                )
            _put(txn, info._replace(state=DELETING))
            return info

        info = await self._session.transact(mark)

        def remove(txn: Txn) -> None:
            there = _get(txn, name)
            if there is not None and there.volume_id == info.volume_id:
                txn.delete(items.volume_key(name.encode()))

        await self._session.transact(remove)
        return info

    async def _genesis(self, info: VolumeInfo) -> None:
        """Make the journal at the volume's homes: all are asked, a majority must have it."""
        cluster_map = self._cluster.get_map()
        homes = tuple(cluster_map.volume_homes(info.volume_id))
        entry = entries.encode(entries.GENESIS, info.params["created"], info.params, 1, homes)
        failures: dict[int, str] = {}
        done = 0

        async def ask(home: int) -> None:
            nonlocal done
            try:
                await self._cluster.rpc.call(
                    cluster_map.address(METADATA, home),
                    "jrnl.genesis",
                    (info.volume_id, entry),
                    timeout=GENESIS_TIMEOUT,
                    epoch=cluster_map.epoch,
                )
                done += 1
            except DfsError as e:
                self._cluster.learn(e)
                failures[home] = str(e)

        async with trio.open_nursery() as nursery:
            for home in homes:
                nursery.start_soon(ask, home)
        if done < len(homes) // 2 + 1:
            told = "; ".join(f"node {home}: {why}" for home, why in sorted(failures.items()))
            raise NoQuorum(
                f"volume {info.name!r}: {done} of {len(homes)} homes made its journal ({told});"
                " create it again when more nodes are up"
            )


def make_root(txn: Txn, now: int) -> None:
    """Put an empty root directory into a volume that has none."""
    if txn.get(items.inode_key(ROOT_INO)) is None:
        root = Inode(
            DIR, 0o755, nlink=2, atime=now, mtime=now, ctime=now, btime=now, parent=ROOT_INO
        )
        txn.put(items.inode_key(ROOT_INO), root.encode())
        txn.put(items.USAGE_KEY, items.encode_usage(0, 1))


def _info(key: bytes, value: bytes) -> VolumeInfo:
    name = key[items.GROUP_SIZE :].decode()
    return VolumeInfo(name, *items.decode_volume(value))


def _get(txn: Txn, name: str) -> VolumeInfo | None:
    key = items.volume_key(name.encode())
    value = txn.get(key)
    return None if value is None else _info(key, value)


def _put(txn: Txn, info: VolumeInfo) -> None:
    value = items.encode_volume(info.volume_id, info.state, info.params)
    txn.put(items.volume_key(info.name.encode()), value)


@contextlib.asynccontextmanager
async def open_registry(
    cluster: Cluster, *, mode: str = "rw", deadline: float = DEADLINE
) -> AsyncIterator[Registry]:
    """The registry for the length of the block."""
    async with open_session(
        cluster, SYSTEM_VOLUME, mode=mode, name="registry", deadline=deadline
    ) as session:
        yield Registry(cluster, session)


async def create_volume(
    cluster: Cluster, name: str, params: dict[str, Any] | None = None
) -> VolumeInfo:
    """See `Registry.create`."""
    async with open_registry(cluster) as registry:
        return await registry.create(name, params)


async def list_volumes(cluster: Cluster) -> list[VolumeInfo]:
    """See `Registry.list`."""
    async with open_registry(cluster, mode="ro") as registry:
        return await registry.list()


async def open_volume_by_name(cluster: Cluster, name: str) -> VolumeInfo:
    """See `Registry.find`."""
    async with open_registry(cluster, mode="ro") as registry:
        return await registry.find(name)


async def delete_volume(cluster: Cluster, name: str) -> VolumeInfo:
    """See `Registry.delete`."""
    async with open_registry(cluster) as registry:
        return await registry.delete(name)


__all__ = [
    "Registry",
    "VolumeInfo",
    "check_name",
    "create_volume",
    "delete_volume",
    "list_volumes",
    "make_root",
    "open_registry",
    "open_volume_by_name",
]
