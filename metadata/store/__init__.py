"""LSM storage engine: WAL, memtable, SSTables, compaction."""
