"""The scrubber: reads every chunk, slowly, for ever, and verifies it.

Bits rot, and a copy that nobody reads is found bad only when it is the last one.  The cursor is
saved every minute, so that a restart goes on where it was; a full round is one pass over the ids in
order.  Whatever is bad goes to the node's `bad` function: quarantine and repair.
"""

from collections.abc import Awaitable, Callable

import trio

from chunkserver.segments import Segments
from dfs.codec import pack, unpack
from dfs.env import Env
from dfs.errors import Corrupt, DiskFull, NotFound, RemoteProtocolError
from dfs.workers import Worker

FILE = "scrub"
VERSION = 1
SAVE_EVERY = 60.0
PAGE = 1000  # chunks


class Scrub(Worker):
    """One `run_once` is a round over all chunks, at `rate` bytes a second."""

    name = "scrub"

    def __init__(
        self,
        env: Env,
        store: Segments,
        bad: Callable[[bytes, str], Awaitable[None]],
        *,
        rate: float = 16 << 20,
        interval: float = 24 * 3600.0,
    ) -> None:
        """Rounds begin `interval` seconds after the end of the last one."""
        super().__init__(env, interval, first=60.0)
        self._store = store
        self._bad = bad
        self._rate = rate
        self.verified = 0  # bytes
        self.found = 0  # bad copies

    async def run_once(self) -> int:
        """Verify everything from the saved cursor to the end; returns the chunks looked at."""
        cursor = await self._env.disk.run(self._load)
        saved = self._env.clock.monotonic()
        looked = 0
        while page := self._store.index.after(cursor, PAGE):
            for chunk_id, entry in page:
                try:
                    self.verified += await self._store.check(chunk_id)
                except NotFound:
                    continue  # deleted since the page was made
                except Corrupt as e:
                    self.found += 1
                    await self._bad(chunk_id, f"scrub: {e}")
                looked += 1
                await trio.sleep(entry.stored / self._rate)
            cursor = page[-1][0]
            share = int.from_bytes(cursor[:2], "big") / 655.36
            self.progress = f"{share:.0f} % of this round, {self.found} bad copies found"
            if self._env.clock.monotonic() - saved > SAVE_EVERY:
                await self._env.disk.run(self._save, cursor)
                saved = self._env.clock.monotonic()
        await self._env.disk.run(self._save, b"")
        self.progress = f"round done, {self.found} bad copies found"
        return looked

    def _load(self) -> bytes:
        try:
            file = self._env.disk.open(FILE)
        except NotFound:
            return b""
        try:
            version, cursor = unpack(file.pread(4096, 0))
        except (RemoteProtocolError, ValueError, TypeError):
            self.last_error = "the saved cursor is unreadable; this round starts at the beginning"
            return b""
        finally:
            file.close()
        return cursor if version == VERSION and isinstance(cursor, bytes) else b""

    def _save(self, cursor: bytes) -> None:
        try:
            self._env.disk.write_atomic(FILE, pack((VERSION, cursor)))
        except DiskFull as e:
            self.last_error = f"the cursor is not saved: {e}"
