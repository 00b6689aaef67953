"""The background loops of a metadata node that are no `Worker`, as `dfs node workers` lists them.

They run when something is to be done and cannot be paused: a store that did not flush, or a log
that was not tidied, would only fill the disk.
"""

from typing import Any

from dfs.clock import Clock
from dfs.workers import Listed, Observed
from metadata.homes import Homes
from metadata.journals import JournalHost
from metadata.nodelife import NodeLife
from metadata.store.engine import Store


def loops(clock: Clock, store: Store, journals: JournalHost, homes: Homes) -> tuple[Listed, ...]:
    """What the parts of the node say about their loops."""

    def flush() -> dict[str, Any]:
        s = store.statistics()
        return {
            "state": "running" if s["frozen"] else "waiting",
            "items": s["flushes"],
            "progress": f"{s['frozen']} full memtables, {s['memtable_bytes']} bytes in memory",
        }

    def merge() -> dict[str, Any]:
        s = store.statistics()
        return {
            "items": s["merges"],
            "progress": f"{s['runs']} runs in {s['levels']} levels, {s['tables']} tables",
            "last_error": store.errors[-1] if store.errors else "",
        }

    def tidy() -> dict[str, Any]:
        s = journals.statistics()
        return {
            "items": s.get("batches", 0),
            "progress": f"{s.get('live', 0)} of {s.get('bytes', 0)} bytes in "
            f"{s.get('segments', 0)} segments are live",
        }

    def checkpoint() -> dict[str, Any]:
        s = homes.statistics()
        return {"progress": f"{s['owned']} of {s['volumes']} volumes are sequenced here"}

    return (
        Observed("store-flush", clock, flush),
        Observed("store-merge", clock, merge),
        Observed("journal-log", clock, tidy),
        Observed("checkpoint", clock, checkpoint),
    )


def life_loops(clock: Clock, life: NodeLife) -> tuple[Listed, ...]:
    """The loops that follow the cluster map."""

    def rebalance() -> dict[str, Any]:
        s = life.rebalance.statistics()
        return {
            "progress": f"{s['left']} partitions to push, {s['sent']} bytes sent",
            "bytes": s["sent"],
            "last_error": "; ".join(map(str, s["failing"])),
        }

    def moves() -> dict[str, Any]:
        s = life.moves.statistics()
        return {"items": s["moved"], "progress": f"{s['moving']} moving, {s['waiting']} waiting"}

    def driver() -> dict[str, Any]:
        return {"progress": "; ".join(life.driver.waiting)}

    return (
        Observed("rebalance", clock, rebalance),
        Observed("journal-moves", clock, moves),
        Observed("map-driver", clock, driver),
    )
