"""`Rumours`: statements still to be passed on, least told first and among those the newest.

A statement is told a bounded number of times by each member; that is enough to reach everybody
with high probability and lets a quiet cluster be quiet.  Newest first: under a flood, what just
happened is not behind what everybody knows (memberlist's `TransmitLimitedQueue`).
"""

_OVERHEAD = 3  # bytes that a bytes value in a message costs besides its own


class Rumours:
    """At most one statement per member: a newer one replaces what was to be told about it."""

    __slots__ = ("_told", "_where")

    def __init__(self) -> None:
        """Nothing to tell."""
        self._told: list[dict[int, bytes]] = [{}]  # by number of times told: member -> statement
        self._where: dict[int, int] = {}  # member -> index into _told

    def __len__(self) -> int:
        """Members about whom there is something to tell."""
        return len(self._where)

    def add(self, key: int, raw: bytes) -> None:
        """Tell this about a member, from now on."""
        self.discard(key)
        self._told[0][key] = raw
        self._where[key] = 0

    def discard(self, key: int) -> None:
        """Tell nothing about a member."""
        at = self._where.pop(key, None)
        if at is not None:
            del self._told[at][key]

    def take(self, room: int, limit: int, avoid: int = -1) -> list[bytes]:
        """Statements for one message of at most `room` bytes; each is told `limit` times at most.

        Nothing about the member `avoid` is taken: that is the one who reads the message.
        """
        told, where = self._told, self._where
        if not where:
            return []
        while len(told) < limit:
            told.append({})
        moves: list[tuple[int, int]] = []
        taken: list[bytes] = []
        for at, rumours in enumerate(told):
            if not rumours:
                continue
            for key in reversed(rumours):
                if key == avoid:
                    continue
                raw = rumours[key]
                room -= len(raw) + _OVERHEAD
                if room < 0:
                    break
                taken.append(raw)
                moves.append((at, key))
            if room < 0:
                break
        # oldest first, so that the order within a level stays the order of arrival
        for at, key in reversed(moves):
            raw = told[at].pop(key)
            if at + 1 < limit:
                told[at + 1][key] = raw
                where[key] = at + 1
            else:
                del where[key]
        return taken
