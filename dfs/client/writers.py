"""Who else is there: the sessions that the journal shows open."""

from dfs.ids import SessionId
from dfs.volume import entries


class Writers:
    """Sessions open for writing and for reading, followed through control entries.

    Known only once the journal was seen from a place where one can tell: its beginning, or a
    checkpoint entry, which repeats the home's control state.
    """

    __slots__ = ("_known", "_readers", "_sids")

    def __init__(self) -> None:
        """Nothing is known."""
        self._sids: set[SessionId] = set()
        self._readers: set[SessionId] = set()
        self._known = False

    def forget(self) -> None:
        """The journal was skipped: nothing is known any more."""
        self._sids.clear()
        self._readers.clear()
        self._known = False

    def note(self, entry: entries.Entry) -> None:
        """Follow one entry."""
        kind, _, body = entry
        if kind == entries.SESSION:
            (self._readers if body[1] == "ro" else self._sids).add(body[0])
        elif ended := entries.closed(entry):
            self._sids.difference_update(ended)
            self._readers.difference_update(ended)
        elif kind == entries.GENESIS:
            self._known = True
        elif kind == entries.CHECKPOINT and not self._known:
            # Control state of the home: (version, params, ((sid, mode, ...), ...), ...)
            for s in body[2][2]:
                (self._readers if s[1] == "ro" else self._sids).add(s[0])
            self._known = True

    def only(self, sid: SessionId) -> bool:
        """Whether this is known to be the only one that writes."""
        return self._known and self._sids == {sid}
