"""A volume of the fake home of `dfs.testing.fakehome`, as a plain object."""

from collections.abc import Iterable
from typing import Any

import trio

from dfs.volume import effects as fx
from dfs.volume import entries, items
from dfs.volume.window import Window


def chunks_named(effects: Iterable[fx.Effect]) -> set[bytes]:
    """Ids of the chunks that extents among the effects name."""
    extents = [
        items.decode_extent(effect[2])
        for effect in effects
        if effect[0] == fx.PUT and items.split_key(effect[1])[1] == items.EXTENT
    ]
    return {fields[2] for fields in extents if fields[1]}


class FakeVolume:
    """One volume: a list as the journal, sessions, and who has the delegation."""

    def __init__(self, params: dict[str, Any], genesis: bytes, *, system: bool) -> None:
        """A volume that was just created."""
        self.params = params
        self.system = system
        self.log: list[bytes] = [genesis]  # entry of seq n at index n - 1
        self.covered = 0
        self.root = b""
        self.sessions: dict[int, list[Any]] = {}  # sid -> [no, answer, mode, nonce]
        self.epoch = 0  # of the delegation
        self.holder = 0
        self.wanted_at: float | None = None  # when the delegation was recalled
        self.told: tuple[int, int, bool] | None = None  # what its holder's last watch said
        self.window = Window(0, 1 << 40)
        self.named: set[bytes] = set()  # chunks that some commit named
        self.news = trio.Event()

    @property
    def seq(self) -> int:
        """Number of the last entry."""
        return len(self.log)

    def append(self, kind: int, *body: Any) -> int:
        """Add an entry to the journal; its number."""
        self.log.append(entries.encode(kind, 1_000_000_000 + self.seq, *body))
        self.wake()
        return self.seq

    def wake(self) -> None:
        """Let whoever waits for news or for the delegation look again."""
        self.news.set()
        self.news = trio.Event()

    @property
    def delegation(self) -> tuple[int, int, bool]:
        """(epoch, holder, wanted), as answers have it."""
        return self.epoch, self.holder, self.wanted_at is not None

    def delegate(self, holder: int, *closed: int) -> int:
        """Give the delegation to a session, or to nobody, and end a session with it."""
        self.epoch, self.holder, self.wanted_at = self.epoch + 1, holder, None
        return self.append(entries.DELEGATION, self.epoch, holder, *closed)

    def want(self) -> None:
        """Recall the delegation."""
        if self.holder and self.wanted_at is None:
            self.wanted_at = trio.current_time()
            self.wake()

    def close(self, sid: int) -> None:
        """End a session."""
        if self.sessions.pop(sid, None) is not None:
            if sid == self.holder:
                self.epoch, self.holder, self.wanted_at = self.epoch + 1, 0, None
            self.append(entries.CLOSE, (sid,))

    def after(self, seq: int) -> tuple[tuple[int, bytes], ...]:
        """Entries after `seq`, with their numbers."""
        return tuple((i + 1, self.log[i]) for i in range(seq, self.seq))

    def opened(self, nonce: bytes) -> int:
        """The session that was opened with this nonce; 0 for none."""
        return next((sid for sid, session in self.sessions.items() if session[3] == nonce), 0)
