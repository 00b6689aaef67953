"""The RPC catalogue: every method, its arguments, its answer and its errors.

Arguments and results are tuples of `dfs.codec` values; `data` is the bulk part of a frame, which never
passes through msgpack.  Methods are only ever extended by appending optional arguments; a change of
meaning gets a new name.  Addresses are strings (`tcp://host:port`, `unix:///path`).  Nodes are named
by their map number.  `volume` is a 16-byte volume id; hashes are 32-byte BLAKE3 digests.

Every node (both roles)
    ping()                               -> (role, node_number, node_id, map_epoch)
    map.get(epoch=0)                     -> (map_bytes,)            # 0: the newest; metadata nodes have some older ones
        errors: NotFound
    swim(kind, ...)                      cast; gossip, see dfs/cluster/GOSSIP.md
    node.status()                        -> (map of str -> value)   # see `STATUS_FIELDS`
    node.workers()                       -> ((map of str -> value, ...),)   # background loops, see `dfs.workers.STATUS`
    node.steer(worker, "run"|"pause"|"resume") -> (map of str -> value,)    # its status then
        errors: NotFound, InvalidArgument

Metadata node: the cluster map and the node's life (metadata/MEMBERSHIP.md).  A header with a newer epoch
makes a node fetch that map before it answers.
    map.propose(epoch, map_bytes, note="", told=0) -> (epoch,)      # the map that follows `epoch`; idempotent
        told=1: do not pass it on.  errors: StaleEpoch (with the newest map), InvalidArgument, NoQuorum, NotHome
    map.history()                        -> (((epoch, digest, stamp_ns, note), ...),)   # those that are kept
    map.progress()                       -> fields of `dfs.cluster.joint.Progress`
    map.waiting()                        -> (epoch, (metadata_phase, chunk_phase), (reason, ...), drives)
    node.boot(number, node_id, boot, nonce, role="metadata") -> (boot, nonce)   # the highest ever seen; durable
        errors: ConfigError (the id was removed)
    node.lsm()                           -> (map of str -> value,)  # levels of the store, see `dfs kv lsm`

Metadata node: blobs (immutable, content-addressed)
    blob.put(((hash, length), ...)) data=the blobs, one after the other
                                         -> (durable_count,)        # verified, then synced by group commit
                                         errors: Corrupt, DiskFull, StaleEpoch
    blob.get((hash, ...))                -> ((length or -1, ...),)  data=those found, one after the other
    blob.has((hash, ...))                -> ((bool, ...),)

Metadata node: journals; casts, not calls, except the last two
    jrnl(volume, from_node, message)     cast; message = one tuple of `metadata.journal`
    jrnl.genesis(volume, entry)          -> (seq,)                  # idempotent; only while the registry says `creating`
    jrnl.status(volume)                  -> (map of str -> value)   # for fsck, status and tests

Metadata node: registers; see `metadata/KV.md` for levels and guarantees
    kv.get(space, key, opts, forwarded=False) -> (values, context, info)
    kv.put(space, key, value or None, context or None, opts, forwarded=False) -> (context, siblings, info)
    kv.scan(space, prefix, cursor, limit, opts) -> (((key, values, context), ...), cursor)   # cursor b"" = begin, end
        errors: NoQuorum (details: wanted, {node: "ok" | why not}), TooManySiblings, InvalidArgument, DiskFull, Busy
    reg.batch(from_node, requests)       -> (replies,)              # between nodes: ("g", row), ("m", row, register),
        ("h", row, register, target, written); the reply to a refused one is ("!", code, text, details)
    reg.scan(from_node, space, prefix, (partitions as u16s, after_row), limit) -> (((row, register), ...), last_row or b"")

Metadata node: volume home.  Any metadata node that is a home of the volume
answers; one that does not own the ballot forwards to the owner.
    vol.open(volume, mode, nonce, name)  -> (sid, seq, checkpoint_seq, root or b"", ((seq, entry), ...), owner, params)
        mode: "rw" | "ro" | "rwx" (exclusive: the only one that writes); nonce: 16 bytes that make a resend idempotent; name: for people.
        params: map of str -> value, from the genesis entry.  Entries are those after `checkpoint_seq`.
    vol.commit(volume, sid, no, base, have, txns, oldest, epoch=0)
                                         -> (no, seq, verdicts, ((seq, entry), ...), owner, delegation)
        txns: ((keys, groups, effects), ...): keys and groups this transaction read, as bytes, and
        effects as in `dfs.volume.effects`.  A transaction without effects is validated only.
        base: the seq its reads come from.  have: the last seq applied to the caller's view.
        oldest: of the chunk puts and touches the effects rely on, 0 if none: below 0 the age (ns) of the
        oldest, as -age, by a clock that cannot be wrong, only slow; above 0 its stamp by the wall clock.
        epoch: of the delegation the caller holds: what it read is not judged; 0: an ordinary commit.
        verdicts: one bool per transaction, True = committed (or valid), False = Conflict.
        seq: of the entry that holds the committed ones (or of the last chosen entry, for none).
        entries: every entry in (have, seq], so that the answer never overtakes the view.
        delegation: as of `vol.watch`; confirmed if a verdict is True or the caller holds it.
        Final and equal at every home.  Anything else (Unreachable, DeadlineExceeded, Busy, NoQuorum)
        means: send the identical request again, to any home.
        errors: Fenced (session unknown or over, or `epoch` is not the delegation's any more),
                InvalidArgument (effects on forbidden keys, bad encoding)
    vol.watch(volume, sid, have, wait)   -> (seq, ((seq, entry), ...), reset or None, owner, delegation)
        Long poll: answers at once when entries after `have` exist, else after `wait` seconds (<= 0.5),
        and then only after a `Confirm` at a majority, so that the answer is a heartbeat: everything
        committed before the answer is in it.  It is also the session's beat.
        reset = (checkpoint_seq, root): `have` is below the last checkpoint's tail that is still
        held; entries then start after checkpoint_seq and the caller diffs trees.
        delegation = (epoch, holder or 0, wanted): of the volume's delegation as of this answer;
        wanted: the holder shall commit what it has and `vol.return` it.  A watch of the holder that
        waits is answered at once when that becomes so; its own commits do not wake it, and what it
        said in a commit that it has is not in the answer.
    vol.delegate(volume, sid)            -> (epoch, seq, wait, owner)
        The volume is delegated to its only active session: it may then answer and acknowledge from
        its view, once that is at `seq`, until 12 s after it *sent* its last `vol.watch`, `vol.commit`
        or `vol.delegate` whose answer names it with this epoch.  epoch 0: not now; ask again in `wait`
        seconds.  Asking again while holding answers the present epoch.  A session that is named as
        the holder without having learned it asks again or returns it.
        errors: Fenced, InvalidArgument (the session is read-only)
    vol.return(volume, sid, epoch)       -> (seq, owner)            # fine if it is not held any more
        What the holder has not committed by then is lost to it.  No heartbeat.
    While one session holds the delegation, `vol.open`, `vol.commit` and `vol.watch` of others and `vol.sync`
    make the home want it back; they wait for up to a second, then fail with `Busy`: ask again.
    vol.sync(volume)                     -> (seq, owner)            # confirmed
    vol.close(volume, sid)               -> ()

Metadata node: synchronisation (metadata/SYNC.md), between metadata nodes; the header carries the epoch.
table: 0 registers, 1 blobs.  For registers both must be homes of the partitions by the map here
(`NotHome`, `StaleEpoch`); a digest is 32 bytes.
    sync.totals(from_node, table, packed, partitions or None) -> ((partition, ...),)   # those that differ
        packed: partition u16 + total, for every total that is not zero; None = all that both share
    sync.buckets(from_node, table, (partition, ...)) -> ((packed, ...), (waiting, ...))
        packed: bucket u8 + sum, for every sum that is not zero; waiting: it is being pulled there
    sync.keys(from_node, table, ((partition, bucket_mask), ...), after, until, forced)
                                         -> (((row, value_digest or b""), ...), cursor)
        in (after, until], ascending; b"" = too fresh to compare; cursor b"" = complete
    sync.items(from_node, table, (row, ...)) -> (((row, value), ...), answered)
        answered: how many of the rows this is the answer for; absent ones have no item
    sync.push(from_node, table, ((row, value), ...), sent) -> (taken,)     # durable; no items: a barrier
        sent: wall time (us); refused when it is over 3 h ago
    hints.deliver(from_node, ((row, register, written), ...)) -> (taken, refused)   # refused: too old
    hints.list()                         -> ((map of str -> value, ...),)  # see `metadata.hints.Hints.status`
    hints.drop(target)                   -> (dropped,)               # anti-entropy does it instead
    tomb.prepare(from_node, partition, ((row, register), ...)) -> ((value_digest or b"", ...),)
    tomb.purge(from_node, partition, ((row, value_digest), ...)) -> ((gone, ...),)
        both only in the one stable epoch that both nodes have (`StaleEpoch`), from the first home

Chunkserver.  An encoded chunk is `dfs.chunks.format`: header + stored blocks.
    chunk.put(chunk_id, durable, stamp, copy=False)  data=encoded chunk -> (stored_new, boot)
        verified completely before it is acknowledged; durable=True means fdatasync first.
        stamp: of a copy; a writer's put has the server's own time, whatever it says.
        copy=True: from another server, not from a writer; ignored if the collector condemned the
        chunk at or after `stamp`.
        errors: Corrupt, DiskFull, StaleEpoch
    chunk.touch((chunk_id, ...), stamp, stamps=absent) -> ((bool, ...),)  # a put without bytes: True = held, durable, stamp renewed
        stamps: one for each chunk, of copies.  Without: the server's own time, whatever `stamp` says.
    chunk.sync()                         -> (boot,)                      # all puts acknowledged before are durable after
        boot: random number of this run of the server.  A sync whose boot differs from a put's proves
        nothing about that put (the server restarted in between): the client puts it again.
    chunk.get(chunk_id, first_block, blocks) -> (plain_length, stamp) data=header + those stored blocks
        blocks = -1 means to the end.  errors: NotFound, Corrupt
    chunk.door()                         -> (boot, machine, socket, token)  # where readers of one host get files
        machine: see `dfs.rpc.descriptors.machine`; b"" = there is no such door.  socket: its
        abstract name.  token: what to say there.
    chunk.locate((chunk_id, ...))        -> (boot, ((segment, offset, stored_length, plain_length) or None, ...))
        for readers with a descriptor of the segment: where the encoded chunk lies now.
    chunk.report(chunk_id)               -> (action,)               # a reader saw a bad copy: "ok" | "quarantined" | "absent"
    chunk.list(after_id, limit, last_partition=0) -> (((chunk_id, plain_length, stored_length, stamp), ...),)
    chunk.summary()                      -> (4096,)                 data=(count u32, sum of id[:16] mod 2**128) a partition
    chunk.delete((chunk_id, ...), before=0) -> ()                   # tombstones; used by GC only
        before: stamp; chunks put or touched at or after it stay.  0 = all of them go.
    chunk.fence(epoch)                   -> (fenced, (partition, ...))
        gets the map of `epoch`; no write judged by a map older than `fenced` is under way any more.
        partitions: those of which a chunk here awaits repair.
    chunk.progress()                     -> (epoch, complete)       # fields of `dfs.cluster.joint.ChunkProgress`
"""

STATUS_FIELDS = """Fields of `node.status`, all optional but the first four:
role "metadata"|"chunkserver", number, name, map_epoch, uptime (s), disk_total, disk_free, used (bytes),
version, errors: ((text, count), ...) that an operator should see (corrupt copies, quarantined tables),
workers: ((name, state, progress, last error), ...), volumes: ((volume, seq, owner), ...),
chunks, chunk_bytes, quarantined (counts), disk_level "ok"|"near"|"backfill"|"full" (see `dfs.limits`),
to_move (chunks that are not where they belong), incomplete (partitions that move here and lack some),
metrics (HOST:PORT of the HTTP server of metrics, if there is one)."""
