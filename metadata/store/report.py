"""What an operator sees of a store: numbers, put together from its parts."""

from typing import Any

from metadata.store.maintenance import Maintenance
from metadata.store.reader import Run
from metadata.store.state import State
from metadata.store.table import FilterReads


class Counts:
    """What the engine counts itself since the store was opened."""

    __slots__ = ("ops", "tail_cut", "user_bytes")

    def __init__(self, tail_cut: int) -> None:
        """Zeros, and the bytes of unacknowledged records dropped when the store was opened."""
        self.ops = 0
        self.user_bytes = 0  # of keys and values
        self.tail_cut = tail_cut


def statistics(s: State, maintenance: Maintenance, counts: Counts) -> dict[str, Any]:
    """Sizes in bytes and counts since the store was opened."""
    tables = [t for r in s.runs for t in r.tables]
    cache = s.cache.statistics()
    syncs = s.log.statistics()
    return {
        "bytes": sum(t.meta.size for t in tables),
        "plain_bytes": sum(t.meta.plain for t in tables),
        "entries": sum(t.meta.entries for t in tables),
        "tombstones": sum(t.meta.tombstones for t in tables),
        "tables": len(tables),
        "runs": len(s.runs),
        "levels": 1 + max((r.level for r in s.runs), default=-1),
        "memtable_bytes": s.memtable.bytes + sum(m.bytes for m in s.frozen),
        "frozen": len(s.frozen),
        "snapshot_bytes": s.snapshot_bytes(),
        "index_bytes": s.indexes.bytes,
        "cache_bytes": cache["bytes"],
        "cache_hits": cache["hits"],
        "cache_misses": cache["misses"],
        "filtered": sum(r.negatives for r in s.reads.values()),
        "searched": sum(r.hits + r.false_positives for r in s.reads.values()),
        "puts": counts.ops,
        "user_bytes": counts.user_bytes,
        "flushes": maintenance.flushes,
        "merges": maintenance.merges,
        "write_amplification": _write_amplification(s, counts),
        "syncs": syncs["syncs"],
        "sync_calls": syncs["calls"],
        "tail_cut": counts.tail_cut,
        "lost_ranges": sum(len(r.lost) for r in s.runs),
        "quarantined": len(s.quarantined),
    }


def lsm(s: State, maintenance: Maintenance, counts: Counts) -> dict[str, Any]:
    """The tree: its levels, youngest first, and what it costs; sizes in bytes.

    `write_amplification` is bytes written, log and tables, per byte of keys and values since the
    store was opened.  `space_amplification` estimates bytes of entries in all tables per byte that
    a full merge would leave: at least the largest run, at most everything.
    """
    levels: dict[int, list[Run]] = {}
    for run in s.runs:
        levels.setdefault(run.level, []).append(run)
    plain = [sum(t.meta.plain for t in r.tables) for r in s.runs]
    cache = s.cache.statistics()
    looked = cache["hits"] + cache["misses"]
    pending = maintenance.pending()
    memory = {
        "memtables": s.memtable.bytes + sum(m.bytes for m in s.frozen),
        "snapshots": s.snapshot_bytes(),
        "cache": cache["bytes"],
        "indexes": s.indexes.bytes,
    }
    return {
        "levels": [_level(n, runs, s.reads[n]) for n, runs in sorted(levels.items())],
        "write_amplification": round(_write_amplification(s, counts), 2),
        "space_amplification": round(sum(plain) / max(1, *plain, 1), 2) if plain else 1.0,
        "cache_hit_rate": round(cache["hits"] / looked, 4) if looked else 0.0,
        "memory": {**memory, "total": sum(memory.values()), "budget": s.options.memory_bytes},
        "frozen_memtables": len(s.frozen),
        "pending_merge": 0 if pending is None else pending.end - pending.start,
        "flushes": maintenance.flushes,
        "merges": maintenance.merges,
        "log": {
            "segments": s.log.number - s.first_segment + 1,
            "bytes": s.log.written - s.first_base,
            "unsynced_bytes": s.log.written - s.log.durable,
        },
        "retired_bytes": sum(t.meta.size for t in list(s.retired)),
        "reserve": {"bytes": s.options.reserve_bytes, "missing": s.reserve.missing},
        "quarantined": list(s.quarantined),
        "lost": [list(x) for r in s.runs for x in r.lost],
    }


def _write_amplification(s: State, counts: Counts) -> float:
    return (counts.user_bytes + s.table_bytes_written) / max(1, counts.user_bytes)


def _level(number: int, runs: list[Run], reads: FilterReads) -> dict[str, Any]:
    metas = [t.meta for r in runs for t in r.tables]
    loaded = [t for r in runs for t in r.tables if t.index is not None]
    bits = 8 * sum(t.index.filter_bytes for t in loaded if t.index is not None)
    asked = reads.negatives + reads.false_positives
    return {
        "level": number,
        "runs": len(runs),
        "tables": len(metas),
        "bytes": sum(m.size for m in metas),
        "plain_bytes": sum(m.plain for m in metas),
        "entries": sum(m.entries for m in metas),
        "tombstones": sum(m.tombstones for m in metas),
        "expiring": sum(m.expiring for m in metas),
        "filter_bits_per_key": round(bits / max(1, sum(t.meta.entries for t in loaded)), 1),
        "filter_hits": reads.hits,
        "filter_negatives": reads.negatives,
        "filter_false_positives": reads.false_positives,
        "filter_false_positive_rate": round(reads.false_positives / asked, 5) if asked else 0.0,
    }
