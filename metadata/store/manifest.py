"""Manifest: the small file that says which tables and log segments make up the store.

    "dfs-man\\0" | version u32 | crc32 of the payload u32 | payload

The payload is the MessagePack tuple of `Manifest`'s fields.  It is replaced atomically on every
flush and compaction; whatever it does not name is garbage of an interrupted job.  Version 1, which
is still read, has losses without the table's name and tables without what expires.
"""

import struct
from contextlib import suppress
from typing import NamedTuple

from dfs.codec import pack, unpack
from dfs.env import Disk
from dfs.errors import Corrupt, DiskFull, RemoteProtocolError
from dfs.hashing import crc32
from metadata.store.losses import Loss
from metadata.store.table import Meta

MAGIC = b"dfs-man\0"
VERSION = 2
_HEADER = struct.Struct("<8sII")


class RunMeta(NamedTuple):
    """A sorted run: tables whose key ranges do not overlap, ascending."""

    level: int
    tables: tuple[Meta, ...]
    lost: tuple[Loss, ...]  # keys that damaged blocks of this run may have held


class Manifest(NamedTuple):
    """The state of a store on disk."""

    next_table: int
    first_segment: int  # log segments before it are in tables
    first_base: int  # log position at which it begins
    runs: tuple[RunMeta, ...]  # newest first
    quarantined: tuple[str, ...]  # names of damaged tables, kept as `NAME.bad`


def encode(manifest: Manifest) -> bytes:
    """Bytes of the file."""
    payload = pack(tuple(manifest))
    return _HEADER.pack(MAGIC, VERSION, crc32(payload)) + payload


def decode(data: bytes, path: str) -> Manifest:
    """Parse the file; raises `Corrupt`, naming `path`."""
    if len(data) < _HEADER.size:
        raise Corrupt(f"{path} is cut short; treat this data directory as a lost disk")
    magic, version, crc = _HEADER.unpack_from(data)
    payload = data[_HEADER.size :]
    if magic != MAGIC:
        raise Corrupt(f"{path} is no manifest; treat this data directory as a lost disk")
    if version not in (1, VERSION):
        raise Corrupt(f"{path} has format version {version}, this is {VERSION}: wrong dfs version?")
    if crc != crc32(payload):
        raise Corrupt(f"{path} is damaged; treat this data directory as a lost disk")
    try:
        next_table, first_segment, first_base, runs, quarantined = unpack(payload)
    except (RemoteProtocolError, ValueError) as e:
        raise Corrupt(f"{path}: {e}") from e
    return Manifest(
        next_table,
        first_segment,
        first_base,
        tuple(
            RunMeta(
                level,
                tuple(Meta(*meta) for meta in tables),
                tuple((*loss, "") if version == 1 else loss for loss in lost),
            )
            for level, tables, lost in runs
        ),
        quarantined,
    )


def read(disk: Disk, prefix: str) -> Manifest | None:
    """The manifest of a store, None where there has never been a store.

    Raises `Corrupt` when it is unreadable, or absent where tables or segments are, or were.
    """
    name = f"{prefix}/MANIFEST"
    if disk.exists(name):
        file = disk.open(name)
        data = file.pread(file.size(), 0)
        file.close()
        return decode(data, disk.path(name))
    orphans = [n for n in disk.listdir(prefix) if n.endswith((".wal", ".sst"))]
    if orphans:
        raise Corrupt(
            f"{disk.path(name)} is missing but {orphans[0]} is there; "
            "restore it or treat this data directory as a lost disk"
        )
    if disk.exists(made(prefix)):
        raise Corrupt(
            f"{disk.path(prefix)} is empty, but it was not;"
            " restore it or treat this data directory as a lost disk"
        )
    return None


def made(prefix: str) -> str:
    """Name of the file that says, beside a store's directory, that there is a store."""
    return f"{prefix}.made"


def note_made(disk: Disk, prefix: str) -> None:
    """Make that file, if it is not there: a store that vanishes later is not begun anew."""
    if not disk.exists(made(prefix)):
        with suppress(DiskFull):  # then the next start makes it
            disk.write_atomic(made(prefix), MAGIC)


def write(disk: Disk, prefix: str, manifest: Manifest) -> None:
    """Replace the manifest durably."""
    disk.write_atomic(f"{prefix}/MANIFEST", encode(manifest))
