"""What can be tuned in a store, and the limits that cannot."""

from dataclasses import dataclass

from dfs.errors import ConfigError

MAX_KEY = 4096  # bytes
MAX_VALUE = 16 << 20  # bytes
MAX_BATCH = 48 << 20  # bytes of keys and values; a log record is decoded in one piece


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """Sizes in bytes.  Together they bound the memory of a store, see `memory_bytes`."""

    memtable_bytes: int = 8 << 20  # keys, values and overhead before a memtable is frozen
    max_frozen: int = 4  # frozen memtables that may wait for their flush before writers wait
    block_bytes: int = 8 << 10  # plain size at which a table's block ends
    table_bytes: int = 32 << 20  # file size at which a compaction starts another table
    fanout: int = 4  # runs of one level that are merged into one of the next
    max_runs: int = 24  # runs at which writers wait for compaction
    cache_bytes: int = 32 << 20  # decoded blocks
    index_bytes: int = 64 << 20  # block indexes and filters of tables
    snapshot_bytes: int = 64 << 20  # memtables that only snapshots still hold
    reserve_bytes: int = (
        0  # disk space set aside for deletes and merges on a full disk, see `reserve`
    )
    expiry_grace: int = 3600  # seconds after its expiry before a merge may destroy a value
    compression: int = 1  # zstd level; 0 stores blocks plain
    own: bytes = b""  # first bytes of keys that damaged tables must not hide, see `own`
    background: bool = True  # False: `run` only flushes and repairs, nothing is merged

    def __post_init__(self) -> None:
        """Refuse what cannot work."""
        if b"\xff" in self.own:
            raise ConfigError("no key that begins with 255 can be an own one")
        if self.fanout < 2 or self.max_frozen < 1 or self.max_runs <= self.fanout:
            raise ConfigError(f"store options out of range: {self}")

    @property
    def memory_bytes(self) -> int:
        """What memtables, snapshots, cache, indexes and filters take together, at most."""
        memtables = self.memtable_bytes * (self.max_frozen + 2)
        return memtables + self.snapshot_bytes + self.cache_bytes + self.index_bytes
