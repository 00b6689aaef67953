"""One new name for each loss: a node that lost registers mints as another actor, once.

A damaged table may hold dots of this node that nobody else has.  Until the loss is accepted
(`metadata.repair`) its rows can be neither read nor minted, so a start with losses, or with tables
that were quarantined long ago, needs no new name; each name stays in version vectors for ever.
Before the first acceptance the node takes one.  Further losses of the same table need none: a table
never changes, so all its dots are older than the name.

Row `nrenewed` of the store: (format, names of the damaged tables that were answered with a name).
"""

from collections.abc import Callable, Sequence

from dfs import codec
from dfs.errors import Corrupt
from metadata.merkle import Table
from metadata.steps import Steps, Write

ROW = b"nrenewed"
_FORMAT = 1
Loss = tuple[bytes, bytes, str]  # [first, last) of keys, and the damaged table


def renew_once(
    view: Table, losses: Sequence[Loss], renew: Callable[[], Steps[None]]
) -> Steps[bool]:
    """Run `renew` unless it was run for the tables of these losses; whether it was run now.

    A loss without a table's name is always new.  Raises `Corrupt` for a row of another format.
    """
    known: tuple[str, ...] = ()
    if (raw := view.get(ROW)) is not None:
        form, known = codec.unpack(raw)
        if form != _FORMAT:
            raise Corrupt(f"the list of renewed names has format {form}: upgrade dfs")
    tables = tuple(sorted({name for _, _, name in losses}))
    if all(name and name in known for name in tables):
        return False
    yield from renew()
    # Tables without losses are gone for good: their names are never used again.
    yield Write([(ROW, codec.pack((_FORMAT, tables)))])
    return True
