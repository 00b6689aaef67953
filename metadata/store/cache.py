"""Cache of decoded blocks with a byte budget.

Two generations: a hit in the young one writes nothing, a hit in the old one moves the block up.
When the young generation has filled half of the budget it becomes the old one, and the old one is
dropped whole.  That approximates LRU without touching an order on every hit.
"""

from typing import Any


class BlockCache:
    """Maps ints (table and block) to decoded blocks."""

    __slots__ = ("_half", "_old", "_old_bytes", "_young", "_young_bytes", "hits", "misses")

    def __init__(self, budget: int) -> None:
        """Hold at most `budget` bytes, as told to `put`."""
        self._half = budget // 2
        self._young: dict[int, tuple[int, Any]] = {}
        self._old: dict[int, tuple[int, Any]] = {}
        self._young_bytes = 0
        self._old_bytes = 0
        self.hits = 0
        self.misses = 0

    def get(self, key: int) -> Any:
        """The block, or None."""
        entry = self._young.get(key)
        if entry is None:
            entry = self._old.pop(key, None)
            if entry is None:
                return None
            self._old_bytes -= entry[0]
            self._put(key, entry)
        self.hits += 1
        return entry[1]

    def peek(self, key: int) -> Any:
        """The block, or None; counts and moves nothing."""
        entry = self._young.get(key) or self._old.get(key)
        return None if entry is None else entry[1]

    def put(self, key: int, size: int, block: Any) -> None:
        """Keep a block of about `size` bytes that was missing; none over half of the budget."""
        self.misses += 1
        if size <= self._half:
            self._put(key, (size, block))

    def _put(self, key: int, entry: tuple[int, Any]) -> None:
        if self._young_bytes + entry[0] > self._half:
            self._old, self._old_bytes = self._young, self._young_bytes
            self._young, self._young_bytes = {}, 0
        self._young[key] = entry
        self._young_bytes += entry[0]

    def statistics(self) -> dict[str, int]:
        """Hits, misses (blocks that had to be read), bytes held, blocks held."""
        return {
            "hits": self.hits,
            "misses": self.misses,
            "bytes": self._young_bytes + self._old_bytes,
            "blocks": len(self._young) + len(self._old),
        }
