"""The numbers of a metadata node for Prometheus; see `dfs.metrics`.

Each part is measured by its `.statistics()`; a part that a node does not have (yet) has no rows.
"""

from collections.abc import Mapping
from typing import Any

from dfs.cluster.map import METADATA, ClusterMap
from dfs.metrics import COUNTER, GAUGE, Page, Row

STORE = (
    Row("bytes", GAUGE, "lsm_bytes", "Bytes of the tables"),
    Row("plain_bytes", GAUGE, "lsm_plain_bytes", "The same before compression"),
    Row("entries", GAUGE, "lsm_entries", "Entries in tables, older versions included"),
    Row("tombstones", GAUGE, "lsm_tombstones", "Deletions in tables"),
    Row("tables", GAUGE, "lsm_tables", "Tables"),
    Row("runs", GAUGE, "lsm_runs", "Sorted runs, each of which a read may have to look at"),
    Row("levels", GAUGE, "lsm_levels", "Levels"),
    Row("memtable_bytes", GAUGE, "lsm_memtable_bytes", "Bytes not in tables yet"),
    Row("frozen", GAUGE, "lsm_frozen_memtables", "Memtables waiting to be written"),
    Row("snapshot_bytes", GAUGE, "lsm_snapshot_bytes", "Bytes kept for snapshots only"),
    Row("cache_bytes", GAUGE, "lsm_cache_bytes", "Bytes of the block cache"),
    Row("cache_hits", COUNTER, "lsm_cache_hits", "Blocks found in the cache"),
    Row("cache_misses", COUNTER, "lsm_cache_misses", "Blocks read from disk"),
    Row("filtered", COUNTER, "lsm_filtered", "Runs that a filter saved a read from"),
    Row("searched", COUNTER, "lsm_searched", "Runs searched"),
    Row("puts", COUNTER, "lsm_puts", "Operations written"),
    Row("user_bytes", COUNTER, "lsm_user_bytes", "Bytes of keys and values written"),
    Row("flushes", COUNTER, "lsm_flushes", "Memtables written"),
    Row("merges", COUNTER, "lsm_merges", "Merges done"),
    Row("write_amplification", GAUGE, "lsm_write_amplification", "Bytes written per user byte"),
    Row("syncs", COUNTER, "wal_syncs", "Syncs of the log"),
    Row("sync_calls", COUNTER, "wal_sync_calls", "Writers that waited for one"),
    Row("lost_ranges", GAUGE, "lsm_lost_ranges", "Ranges lost with damaged tables"),
    Row("quarantined", GAUGE, "lsm_quarantined_tables", "Damaged tables set aside"),
)
JOURNALS = (
    Row("journals", GAUGE, "journal_volumes", "Journals here"),
    Row("active", GAUGE, "journal_active", "Journals with work to do"),
    Row("segments", GAUGE, "journal_segments", "Segments of the journals' log"),
    Row("bytes", GAUGE, "journal_bytes", "Bytes of these"),
    Row("live", GAUGE, "journal_live_bytes", "Bytes of entries still needed"),
    Row("batches", COUNTER, "journal_batches", "Batches written"),
)
HOMES = (
    Row("volumes", GAUGE, "volumes", "Volumes with a home here"),
    Row("owned", GAUGE, "volumes_owned", "Volumes sequenced here"),
    Row("take_overs", COUNTER, "volume_take_overs", "Volumes taken over"),
    Row("forwarded", COUNTER, "volume_forwarded", "Requests forwarded to the owner"),
)
KV = (
    Row("gets", COUNTER, "kv_gets", "Reads coordinated"),
    Row("puts", COUNTER, "kv_puts", "Writes coordinated"),
    Row("repairs", COUNTER, "kv_read_repairs", "Replicas repaired by reads"),
    Row("hedges", COUNTER, "kv_hedges", "Reads that asked one more replica"),
    Row("replans", COUNTER, "kv_replans", "Operations begun again with a newer map"),
    Row("failures", COUNTER, "quorum_failures", "Operations without a quorum"),
    Row("stale", COUNTER, "stale_epoch", "Requests refused for an old map epoch"),
    Row("under_way", GAUGE, "kv_under_way", "Operations under way"),
    Row("siblings_max", GAUGE, "siblings_max", "Most concurrent values of a key seen"),
    Row("requests", COUNTER, "kv_replica_requests", "Requests to the replica here"),
    Row("passes", COUNTER, "kv_replica_batches", "Store batches they took"),
    Row("merges", COUNTER, "kv_merges", "Registers merged"),
    Row("hints_bytes", GAUGE, "hints_bytes", "Bytes of hints for nodes that were away"),
    Row("hints_age", GAUGE, "hints_age_seconds", "Age of the oldest hint"),
    Row("hints_dropped", COUNTER, "hints_dropped", "Hints dropped for lack of room or time"),
    Row("merkle_drift", COUNTER, "merkle_drift", "Digests that did not match their rows"),
    Row("sync_items", COUNTER, "sync_items", "Rows exchanged by anti-entropy"),
    Row("tombstones", GAUGE, "tombstones", "Deleted keys not forgotten yet"),
    Row("inflight_bytes", GAUGE, "inflight_bytes", "Bytes of replica writes under way"),
)


def measure(
    page: Page,
    m: ClusterMap,
    number: int,
    *,
    store: Mapping[str, Any],
    journals: Mapping[str, Any],
    homes: Mapping[str, Any],
    kv: Mapping[str, Any] | None = None,
) -> None:
    """Everything a running metadata node counts."""
    page.gauge("map_epoch", "Epoch of the cluster map here", m.epoch)
    page.gauge("map_phase", "0 = stable, 1 or 2 while homes are moving", m.phase(METADATA))
    held = sum(number in homes for homes in m.tables[0])
    text = "Partitions that this node is a home of"
    moving = sum(number in m.homes(METADATA, p) for p in m.changed(METADATA))
    page.gauge("partitions", text, held - moving, state="stable")
    page.gauge("partitions", text, moving, state="moving")
    page.table(STORE, store)
    page.table(JOURNALS, journals)
    page.table(HOMES, homes)
    page.table(KV, kv or {})
