"""The numbers of a chunkserver for Prometheus; see `dfs.metrics`."""

from typing import TYPE_CHECKING

from dfs.cluster.map import CHUNK
from dfs.metrics import COUNTER, GAUGE, Page, Row, measure_limit

if TYPE_CHECKING:
    from chunkserver.service import ChunkNode

STORE = (
    Row("puts", COUNTER, "chunks_put", "Chunks stored"),
    Row("touches", COUNTER, "chunks_touched", "Chunks whose stamps were renewed"),
    Row("put_bytes", COUNTER, "chunks_put_bytes", "Bytes of encoded chunks stored"),
    Row("syncs", COUNTER, "chunks_syncs", "Syncs of the segments"),
    Row("segments", GAUGE, "chunks_segments", "Segment files"),
)
GOSSIP = (
    Row("sent", COUNTER, "gossip_sent", "Gossip messages sent"),
    Row("received", COUNTER, "gossip_received", "Gossip messages received"),
    Row("malformed", COUNTER, "gossip_malformed", "Gossip messages that made no sense"),
)


def measure(page: Page, node: "ChunkNode") -> None:
    """Everything a running chunkserver counts."""
    store = node.store
    m = node.peers.map()
    page.gauge("map_epoch", "Epoch of the cluster map here", m.epoch)
    page.gauge("map_phase", "0 = stable, else homes are moving", m.phase(CHUNK))
    page.gauge("chunks", "Chunks held", len(store.index))
    page.gauge("chunks_bytes", "Bytes of the encoded chunks held", store.index.stored_bytes)
    page.gauge("chunks_quarantined", "Bad copies set aside", len(store.quarantine.ids))
    page.gauge("chunks_lost", "Chunks of which no server has a good copy", len(node.repair.lost))
    page.gauge("chunks_repair_queue", "Chunks to repair", len(node.repair.queue))
    page.gauge("chunks_to_move", "Chunks that are not where they belong", node.to_move())
    page.counter("chunks_repaired", "Chunks repaired", node.repair.repaired)
    page.counter("chunks_pulled", "Chunks pulled from others", node.catch_up.pulled)
    page.counter("chunks_pushed", "Chunks pushed to their homes", node.hand_over.pushed)
    page.counter("chunks_handed_over", "Chunks dropped here", node.hand_over.handed_over)
    page.counter("scrub_bytes", "Bytes verified by the scrubber", node.scrub.verified)
    page.counter("scrub_errors", "Bad copies found by the scrubber", node.scrub.found)
    page.counter("disk_refused_writes", "Writes refused for lack of space", store.room.refused)
    incomplete = node.catch_up.incomplete()
    text = "Partitions that this node is a home of"
    page.gauge("partitions", text, sum(node.peers.mine()) - incomplete, state="complete")
    page.gauge("partitions", text, incomplete, state="incomplete")
    if node.presence is not None:
        page.table(GOSSIP, node.presence.gossip.statistics())
    page.table(STORE, store.statistics())
    page.workers(node.workers)
    measure_limit(page, store.room.level().label)
