"""View: a volume as one client knows it, and transactions on it.

A view is a tree (nodes in a cache, fetched on demand) and an overlay of the journal's entries
since.  Nothing here waits: what needs a tree node that is not cached raises `Missing`, having
changed nothing; the caller fetches the nodes and calls again.

Who holds the volume's delegation commits to its own view first (`commit_local`), in batches that
are sent as entries later; `confirm_local` says which entry a batch has become.  Nobody else's entry
may be applied in between.

An operation is a function on a `Txn`, run from `View.begin` to its end without giving up control,
so that it sees one state; when it raises `Missing` it is run again with a new `Txn`.  The
transaction records which keys and groups it read and which effects it wants.  The home of the
volume commits it if no commit after `Txn.base` wrote what it read.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import islice

from dfs.codec import Buffer
from dfs.volume import effects, entries, tree
from dfs.volume.effects import DELETE, DELETE_RANGE, PATCH, PUT, Change, Effect
from dfs.volume.items import GROUP_SIZE, group_end
from dfs.volume.node import Missing
from dfs.volume.nodecache import NodeCache
from dfs.volume.overlay import Item, Overlay
from dfs.volume.validation import RANGES
from dfs.volume.window import Window

__all__ = ["Missing", "NodeCache", "Txn", "View"]

WINDOW = 100_000  # writers that `changed_since` remembers
LOCAL = 1 << 62  # sequence numbers from here on stand for batches that are in no entry yet


class View:
    """The state of a volume after entry `seq`: the tree `root`, which covers `root_seq`, and since.

    `salt` is the volume family's.  `nodes` may be shared by the views of many volumes.
    """

    __slots__ = ("_overlay", "_window", "nodes", "root", "root_seq", "salt", "seq")

    def __init__(self, nodes: NodeCache, root: bytes, seq: int, salt: bytes) -> None:
        """The state that a checkpoint `root` of entry `seq` holds; `b""` is the empty tree."""
        self.nodes = nodes
        self.salt = salt
        self.reset(root, seq)

    def reset(self, root: bytes, seq: int) -> None:
        """Start over from a checkpoint; `tree.diff` of the old root and this tells what changed."""
        self.root = root
        self.root_seq = seq
        self.seq = seq
        self._overlay = Overlay(self._tree_get, seq)
        self._window = Window(seq, WINDOW)

    # ----------------------------------------------------------------------- following

    def apply_entry(self, seq: int, entry: Buffer) -> list[bytes]:
        """Apply journal entry `seq`, which must be the next; returns the keys that it changed.

        A removed range is given as its group (the 9-byte prefix).  A checkpoint entry moves the
        view to its tree.  Raises `Missing` (nothing is applied then, and it names all that the
        entry needs and that is known to be missing), `Corrupt` and, out of order, `ValueError`.
        """
        if seq != self.seq + 1:
            raise ValueError(f"entry {seq} is not the next one after {self.seq}")
        decoded = entries.decode(entry)
        changed = self.apply_effects(seq, effects.of_entry(decoded))
        if decoded.kind == entries.CHECKPOINT:
            self.rebase(decoded.body[1], decoded.body[0])
        return changed

    def apply_effects(self, seq: int, wanted: Sequence[Effect]) -> list[bytes]:
        """Apply the effects of entry `seq`; as `apply_entry`."""
        overlay = self._overlay
        staged = Overlay(overlay.get)
        try:
            effects.apply(staged, wanted)
        except Missing as e:
            raise Missing(*dict.fromkeys((*e.hashes, *self.missing_for(wanted)))) from None
        overlay.seq = self.seq = seq
        overlay.absorb(staged)
        self._window.record(seq, wanted)
        return [*staged.items, *staged.ranges]

    def missing_for(self, wanted: Sequence[Effect]) -> tuple[bytes, ...]:
        """Tree nodes that these effects need and that are not cached; a first guess, see `tree`."""
        overlay = self._overlay
        keys = {e[1] for e in wanted if e[0] == PATCH and e[1] not in overlay.items}
        return tree.missing(self.nodes.get, self.root, sorted(keys))

    def rebase(self, root: bytes, seq: int) -> None:
        """A checkpoint holds everything up to `seq` in the tree `root`: move over to it.

        Does nothing when the view's tree covers as much.  The state stays as it is.
        """
        if seq <= self.root_seq:
            return
        if seq > self.seq:
            raise ValueError(f"checkpoint of entry {seq}, but the view is at {self.seq}")
        self.root = root
        self.root_seq = seq
        self._overlay.drop(seq)

    def changed_until(self, seq: int) -> list[bytes]:
        """Keys of what `rebase` to a checkpoint of entry `seq` would drop, in order."""
        return sorted(key for key, (at, _) in self._overlay.items.items() if at <= seq)

    def changed_since(self, base: int, keys: Collection[bytes], groups: Collection[bytes]) -> bool:
        """Whether an entry after `base` wrote one of the keys or groups; True when unknown."""
        return self._window.changed_since(base, keys, groups)

    # ----------------------------------------------------------------------- ahead of the journal

    def commit_local(
        self,
        changes: Mapping[bytes, bytes | None],
        ranges: Iterable[tuple[bytes, bytes]],
        number: int,
    ) -> None:
        """Apply what a `LocalTxn` did to the view, as part of batch `number`."""
        overlay = self._overlay
        overlay.seq = LOCAL + number
        for start, end in ranges:
            overlay.delete_range(start, end)
        put = overlay.put
        for key, value in changes.items():
            put(key, value)
        overlay.seq = self.seq

    def changed(self, key: bytes) -> bytes | None:
        """What an item that was changed since the tree is now."""
        return self._overlay.items[key][1]

    def confirm_local(
        self, seq: int, keys: Iterable[bytes], ranges: Sequence[tuple[bytes, bytes]], number: int
    ) -> None:
        """Entry `seq`, which must be the next, is the batch `number`: nothing changes by it."""
        if seq != self.seq + 1:
            raise ValueError(f"entry {seq} is not the next one after {self.seq}")
        self.seq = seq
        self._overlay.renumber(keys, ranges, LOCAL + number, seq)
        # What was read before is not compared with these entries: it counts as changed.
        self._window.forget(seq)

    def jump(self, root: bytes, seq: int) -> None:
        """Start over from a checkpoint as `reset`, and keep what is ahead of the journal.

        That lies on top of the checkpoint as it lay on the view before, because nobody else has
        changed anything.  A batch may be in the checkpoint already, then with the same values.
        """
        overlay = self._overlay
        overlay.drop(LOCAL - 1)
        self.root, self.root_seq, self.seq = root, seq, seq
        overlay.seq = seq
        self._window = Window(seq, WINDOW)

    def confirm_covered(
        self, keys: Iterable[bytes], ranges: Sequence[tuple[bytes, bytes]], number: int
    ) -> None:
        """An entry that the view has jumped over was the batch `number`."""
        self._overlay.renumber(keys, ranges, LOCAL + number, self.root_seq)

    # ----------------------------------------------------------------------- reading

    def begin(self) -> "Txn":
        """A transaction on the state as it is now."""
        return Txn(self)

    def get(self, key: bytes) -> bytes | None:
        """Value of an item, or None; records nothing.  May raise `Missing`."""
        return self._overlay.get(key)

    def scan(
        self, start: bytes = b"", end: bytes | None = None, ahead: int = tree.AHEAD
    ) -> Iterator[Item]:
        """Items with start <= key < end in order; records nothing.  May raise `Missing`."""
        base = tree.scan(self.nodes.get, self.root, start, end, ahead)
        return self._overlay.merge(base, start, end)

    def statistics(self) -> dict[str, int]:
        """Counters for people and metrics."""
        return {
            "seq": self.seq,
            "root_seq": self.root_seq,
            "overlay": len(self._overlay),
            "window": len(self._window),
            "window_floor": self._window.floor,
        }

    def _tree_get(self, key: bytes) -> bytes | None:
        return tree.get(self.nodes.get, self.root, key)


class Txn:
    """A transaction: reads are recorded in `keys` and `groups`, writes are kept in `effects`.

    Reads see the transaction's own effects.  `base` is the sequence number that it read at.
    All reads may raise `Missing`; then run the operation again, on a new transaction.
    """

    __slots__ = ("_own", "_patches", "base", "effects", "groups", "keys", "view")

    def __init__(self, view: View) -> None:
        """Use `View.begin`."""
        self.view = view
        self.base = view.seq
        self.keys: dict[bytes, None] = {}  # in order, as sets are not
        self.groups: dict[bytes, None] = {}
        self.effects: list[Effect] = []
        self._own: Overlay | None = None
        # Patches wait until their item is read, since most never are: a patch reads nothing.
        self._patches: dict[bytes, list[Effect]] = {}

    def get(self, key: bytes) -> bytes | None:
        """Value of an item, or None.

        Where items may be removed by range it records the group: a range names no keys.
        """
        self.keys[key] = None
        if key[8] in RANGES:
            self.groups[key[:GROUP_SIZE]] = None
        own = self._own
        if own is None:
            return self.view._overlay.get(key)
        if key in self._patches:
            self._settle(key, own)
        return own.get(key)

    def reads(self, group: bytes) -> None:
        """The operation relies on what it knows of a group without looking."""
        self.groups[group] = None

    def scan(
        self, group: bytes, after: bytes = b"", limit: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Items of a group in order, at most `limit`, beginning after the key `after`."""
        start = after + b"\0" if after else group
        return self._scan(group, start, group_end(group), limit)

    def scan_range(
        self, start: bytes, end: bytes, limit: int | None = None
    ) -> list[tuple[bytes, bytes]]:
        """Items with start <= key < end, which lie in one group; the whole group counts as read."""
        return self._scan(start[:GROUP_SIZE], start, end, limit)

    def _scan(
        self, group: bytes, start: bytes, end: bytes, limit: int | None
    ) -> list[tuple[bytes, bytes]]:
        if start < group or end > group_end(group):
            raise ValueError(f"scan leaves its group {group!r}: {start!r} to {end!r}")
        self.groups[group] = None
        # A leaf holds some 50 items and more: look no further ahead than the limit reaches.
        ahead = tree.AHEAD if limit is None else min(limit // 50 + 1, tree.AHEAD)
        found = self.view.scan(start, end, ahead)
        own = self._own
        if own is not None:
            for key in [k for k in self._patches if start <= k < end]:
                self._settle(key, own)
            found = own.merge(found, start, end)
        return list(found if limit is None else islice(found, limit))

    def put(self, key: bytes, value: bytes) -> None:
        """Create or replace an item."""
        self.effects.append((PUT, key, value))
        self._change(key, value)

    def delete(self, key: bytes) -> None:
        """Remove an item; fine if it is absent."""
        self.effects.append((DELETE, key))
        self._change(key, None)

    def patch(self, key: bytes, changes: Sequence[Change]) -> None:
        """Change fields of an item: (field, SET | ADD | LAST, operand) each.  Reads nothing."""
        effect = (PATCH, key, tuple(changes))
        self.effects.append(effect)
        self._overlaid()
        self._patches.setdefault(key, []).append(effect)

    def delete_range(self, start: bytes, end: bytes) -> None:
        """Remove the items with start <= key < end, which lie in one group."""
        if start >= end:
            return
        self.effects.append((DELETE_RANGE, start, end))
        for key in [k for k in self._patches if start <= k < end]:
            del self._patches[key]
        self._overlaid().delete_range(start, end)

    def extend(self, wanted: Sequence[Effect]) -> None:
        """Add effects that a planner made, in order."""
        for effect in wanted:
            op = effect[0]
            if op == PUT:
                self.put(effect[1], effect[2])
            elif op == DELETE:
                self.delete(effect[1])
            elif op == PATCH:
                self.patch(effect[1], effect[2])
            else:
                self.delete_range(effect[1], effect[2])

    def _overlaid(self) -> Overlay:
        own = self._own
        if own is None:
            own = self._own = Overlay(self.view.get)
        return own

    def _change(self, key: bytes, value: bytes | None) -> None:
        self._patches.pop(key, None)
        self._overlaid().put(key, value)

    def _settle(self, key: bytes, own: Overlay) -> None:
        effects.apply(own, self._patches[key])
        del self._patches[key]
