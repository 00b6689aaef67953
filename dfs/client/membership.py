"""Changing who is in a cluster: staged edits, and the proposal of the map in which they begin.

Edits are staged in a register of the cluster's own space, so that operators see each other's, and
applied together, in two steps: new nodes `join` without data, and once they answer the change may
`begin`.  Each step names the epoch it makes: if the cluster moved on in between, nothing happens.
From there on the cluster's own drivers carry the change out.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from dfs import codec
from dfs.client.connect import Cluster
from dfs.client.kv import CLUSTER_SPACE, KV
from dfs.cluster.change import (
    Add,
    Edit,
    Plan,
    Remove,
    Replace,
    SetWeight,
    apply_edits,
    describe,
    edit_fields,
    edit_from_fields,
)
from dfs.cluster.change import plan as make_plan
from dfs.cluster.map import CHUNK, METADATA, ROLES, ClusterMap
from dfs.errors import (
    Busy,
    ConfigError,
    Corrupt,
    DeadlineExceeded,
    DfsError,
    NoQuorum,
    NotHome,
    RemoteProtocolError,
    StaleEpoch,
    Unreachable,
)

STAGED = b"map/staged"  # key of the register
FORMAT = 1
_ELSEWHERE = (Unreachable, DeadlineExceeded, NotHome, NoQuorum, Busy)


class Staged(NamedTuple):
    """Edits that wait to be applied; more than one operator may have staged some."""

    edits: tuple[Edit, ...]
    context: bytes


class Membership:
    """The members of a cluster, as an operator changes them."""

    def __init__(self, cluster: Cluster, *, timeout: float = 10.0) -> None:
        """Every step is given `timeout` seconds."""
        self._cluster = cluster
        self._timeout = timeout
        self._kv = KV(cluster, space=CLUSTER_SPACE, timeout=timeout)

    async def newest(self) -> ClusterMap:
        """The newest map that answers; never an older one than is known here."""
        await self._cluster.refresh_map()
        return self._cluster.get_map()

    async def staged(self) -> Staged:
        """What is staged; edits of concurrent operators one after the other.

        Raises `Corrupt` when another version of dfs staged them.
        """
        entry = await self._kv.get(STAGED)
        edits: list[Edit] = []
        for value in reversed(entry.values):
            edits += [e for e in _decode(value) if e not in edits]
        return Staged(tuple(edits), entry.context)

    async def stage(self, edits: Sequence[Edit]) -> Staged:
        """Add edits to what is staged; raises `ConfigError` if all together cannot be applied."""
        before = await self.staged()
        together = (*before.edits, *edits)
        apply_edits(await self.newest(), together)
        return await self._store(together, before.context)

    async def reset(self) -> int:
        """Drop what is staged, readable or not; returns how many operators' edits that were."""
        entry = await self._kv.get(STAGED)
        empty: Any = (FORMAT, ())
        dropped = [value for value in entry.values if value != codec.pack(empty)]
        if dropped:
            await self._store((), entry.context)
        return len(dropped)

    async def plan(self, used: dict[tuple[str, int], int]) -> Plan:
        """What the staged edits would do; `used` as for `dfs.cluster.change.plan`."""
        staged = await self.staged()
        return make_plan(await self.newest(), staged.edits, used)

    async def join(self, epoch: int) -> tuple[str, ...]:
        """Make the new nodes of the staged edits members, without data; returns their names.

        The first of two steps.  A node that took its share before it answers would be a home that
        is down; so it joins with weight 0, is started, and takes its share in the second step, for
        which the staged edits are rewritten.  Does nothing if there are no new nodes.  Raises
        as `begin` does.
        """
        staged = await self.staged()
        present = await self._at(epoch)
        joining, rest = _split(present, staged.edits)
        if not joining:
            return ()
        joined = apply_edits(present, joining)
        if rest:
            apply_edits(joined, rest)  # raises before anything is done
        changed = await self._store(rest, staged.context)
        try:
            await self._agree(joined, joining)
        except DfsError:
            await self._store(staged.edits, changed.context)
            raise
        return tuple(edit.node.name for edit in joining)

    async def begin(self, epoch: int) -> ClusterMap:
        """Propose the map in which the staged edits begin, which must have this epoch.

        Raises `StaleEpoch` when the cluster moved on, `ConfigError` for what cannot be applied,
        `NoQuorum` when the voters do not answer: then the map may or may not be there; look.
        """
        staged = await self.staged()
        new = apply_edits(await self._at(epoch), staged.edits)
        # Before the map: in its first phase the register needs a quorum of old and new homes.
        changed = await self._store((), staged.context)
        try:
            await self._agree(new, staged.edits)
        except DfsError:
            await self._store(staged.edits, changed.context)
            raise
        return new

    async def _at(self, epoch: int) -> ClusterMap:
        """The newest map, if `epoch` is the next; raises `StaleEpoch`."""
        present = await self.newest()
        if present.epoch + 1 != epoch:
            raise StaleEpoch(
                f"the cluster's map has epoch {present.epoch} and the next is {present.epoch + 1}, "
                f"not {epoch}: look at `dfs cluster plan` again"
            )
        return present

    async def _agree(self, new: ClusterMap, edits: Sequence[Edit]) -> None:
        await self.propose(new, "; ".join(describe(edit) for edit in edits))

    async def propose(self, new: ClusterMap, note: str) -> None:
        """Have the voters agree on a map; raises as `begin` does."""
        known = self._cluster.get_map()  # may be newer by now than the one that `new` follows
        voters = [n for n in known.nodes if n.number in known.voters]
        error: DfsError = ConfigError("the cluster has no voters")
        for node in voters:
            try:
                await self._cluster.rpc.call(
                    node.address(METADATA),
                    "map.propose",
                    (new.epoch - 1, new.encode(), note),
                    timeout=self._timeout,
                    epoch=known.epoch,
                )
            except _ELSEWHERE as e:
                error = e
            else:
                await self._cluster.refresh_map(node.address(METADATA))
                return
        raise error

    async def _store(self, edits: Sequence[Edit], context: bytes) -> Staged:
        value: Any = (FORMAT, tuple(edit_fields(edit) for edit in edits))
        entry = await self._kv.put(STAGED, codec.pack(value), context=context)
        return Staged(tuple(edits), entry.context)


def _decode(value: bytes) -> tuple[Edit, ...]:
    """The edits of one operator."""
    try:
        version, *fields = codec.unpack(value)
        if version == FORMAT:
            (edits,) = fields
            return tuple(map(edit_from_fields, edits))
        why = f"have format {version}"
    except (RemoteProtocolError, TypeError, ValueError) as e:
        why = f"cannot be read ({e})"
    raise Corrupt(f"staged changes {why}: upgrade dfs, or `dfs cluster node reset` drops them")


def _split(present: ClusterMap, edits: Sequence[Edit]) -> tuple[tuple[Add, ...], tuple[Edit, ...]]:
    """New nodes that can join first, without data, and the edits that are left then."""
    taken = {a for node in present.nodes for role in ROLES if (a := node.address(role))}
    joining: list[Add] = []
    rest: list[Edit] = []
    for edit in edits:
        if not isinstance(edit, Add | Replace):
            rest.append(edit)
            continue
        new = edit.node
        if {new.metadata_addr, new.chunk_addr} & taken or any(
            node.name == new.name for node in present.nodes
        ):
            rest.append(edit)  # it can only come as the other goes
            continue
        joining.append(Add(replace(new, metadata_weight=0.0, chunk_weight=0.0)))
        if isinstance(edit, Replace):
            rest.append(Remove(edit.old))
        for role, address, weight in (
            (METADATA, new.metadata_addr, new.metadata_weight),
            (CHUNK, new.chunk_addr, new.chunk_weight),
        ):
            if address and weight:
                rest.append(SetWeight(new.name, role, weight))
    return tuple(joining), tuple(rest)
