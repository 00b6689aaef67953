"""Opening a store: manifest, tables, and the replay of the log.

Nothing is guessed.  No manifest in an empty directory is a new store; no manifest beside tables or
segments, an unreadable one, damaged acknowledged records: `Corrupt`.  A damaged or missing table
does not stop the store: its keys are lost, which reads of them say.
"""

from dataclasses import dataclass

from dfs.env import Disk
from dfs.errors import Corrupt
from metadata.store import manifest as manifests
from metadata.store import wal
from metadata.store.manifest import Manifest
from metadata.store.memtable import Memtable
from metadata.store.options import StoreOptions
from metadata.store.reader import Run
from metadata.store.table import Table, open_table


@dataclass(slots=True)
class Loaded:
    """A store as found on disk."""

    manifest: Manifest
    memtables: list[Memtable]  # newest first; at least one
    runs: list[Run]  # newest first
    segment: int  # number of the last log segment
    position: int  # log position of its end
    cut: int  # bytes of unacknowledged records dropped at the end of the log
    missing: list[tuple[str, str]]  # tables that cannot be opened, and why


def table_number(name: str) -> int:
    """Number of a table, from its file name `NUMBER-RANDOM.sst`."""
    return int(name.partition("-")[0])


def load(disk: Disk, prefix: str, options: StoreOptions) -> Loaded:
    """Read everything, clean up after interrupted jobs; raises `Corrupt`."""
    disk.mkdir(prefix)
    manifest = manifests.read(disk, prefix)
    if manifest is None:
        manifest = Manifest(1, 1, 0, (), ())
        manifests.write(disk, prefix, manifest)
    _clean(disk, prefix, manifest)
    missing: list[tuple[str, str]] = []
    runs = []
    for run in manifest.runs:
        tables: list[Table] = []
        lost = run.lost
        for meta in run.tables:
            try:
                tables.append(open_table(disk, prefix, meta, table_number(meta.name)))
            except Corrupt as e:
                missing.append((meta.name, str(e)))
                lost = (*lost, (meta.first, meta.last + b"\0", meta.name))
        runs.append(Run(run.level, tables, lost))

    first = manifest.first_segment
    if disk.exists(manifests.made(prefix)) and not [
        n for n in wal.numbers(disk, prefix) if n >= first
    ]:
        raise Corrupt(
            f"{disk.path(prefix)} has no log from segment {first} on, but it had;"
            " restore it or treat this data directory as a lost disk"
        )
    memtables = [Memtable([])]
    base = manifest.first_base
    last = wal.Recovered(first - 1, base, base, [], "", 0)
    for last in wal.replay(disk, prefix, first, base):
        if memtables[0].bytes >= options.memtable_bytes:
            memtables.insert(0, Memtable([]))
        memtables[0].segments.append(last.number)
        for batch in last.batches:
            memtables[0].apply(batch)
        memtables[0].end = last.end
    cut = wal.cut(disk, prefix, first, last)
    return Loaded(manifest, memtables, runs, last.number, last.end, cut, missing)


def _clean(disk: Disk, prefix: str, manifest: Manifest) -> None:
    """Remove what no manifest names; a quarantined table keeps its bytes for whoever looks."""
    live = {meta.name for run in manifest.runs for meta in run.tables}
    for name in disk.listdir(prefix):
        path = f"{prefix}/{name}"
        if name.endswith(".sst") and name in manifest.quarantined and name not in live:
            disk.rename(path, f"{path}.bad")
        elif name.endswith(".tmp") or (name.endswith(".sst") and name not in live):
            disk.unlink(path)
    for number in wal.numbers(disk, prefix):
        if number < manifest.first_segment:
            disk.unlink(wal.segment_name(prefix, number))
