"""Which cluster map may follow which: the rules that every voter checks before a map is proposed.

The tables are not computed again: they were validated (every row names N usable nodes), two
machines may disagree in the last bit of a logarithm, and single partitions may be pinned.  What is
checked is what safety rests on: the chain, one transition at a time, its steps in order, the epoch
in which each row changed, voters that change one at a time, removed ids banned for ever.
"""

from dfs.cluster.map import ClusterMap
from dfs.cluster.node import ROLES, same_homes
from dfs.errors import ConfigError, InvalidArgument, WrongCluster


def check_step(old: ClusterMap, new: ClusterMap) -> None:
    """Raise `InvalidArgument`, or `WrongCluster`, if `new` may not follow `old`."""
    if new.cluster_id != old.cluster_id:
        raise WrongCluster(f"the map is of cluster {new.cluster_id.hex()}")
    _require(
        new.epoch == old.epoch + 1 and new.prev_hash == old.digest,
        f"the map of epoch {new.epoch} does not follow the newest one, of epoch {old.epoch}: "
        "make it from that one",
    )
    if old.transition is not None:
        _require(_onward(old, new), "a transition is under way and the map is not its next step")
        return
    _require(new.params == old.params, "the replication parameters cannot change")
    differ = set(new.voters) ^ set(old.voters)
    _require(len(differ) <= 1, f"voters change one per epoch, not {sorted(differ)} at once")
    _check_members(old, new)
    _check_rows(old, new)


def _onward(old: ClusterMap, new: ClusterMap) -> bool:
    for step in (old.advance, old.finish_chunks, old.shift_voters):
        try:
            if step() == new:
                return True
        except ConfigError:  # not a step of this map
            continue
    return False


def _check_members(old: ClusterMap, new: ClusterMap) -> None:
    there = {node.number: node for node in new.nodes}
    gone = tuple((x.number, x.node_id) for x in old.nodes if x.number not in there)
    _require(new.transition is None or not gone, "nodes are dropped when the transition ends")
    _require(
        new.banned == tuple(sorted(old.banned + gone)), "the banned nodes are not those removed"
    )
    used = {number for number, _ in old.banned}
    for before in old.nodes:
        node = there.get(before.number)
        if node is None:
            continue
        _require(node.node_id == before.node_id, f"the id of node {before.name} changed")
        for role in ROLES:
            _require(
                not before.address(role) or bool(node.address(role)),
                f"node {before.name} lost its {role} role",
            )
    _require(not used.intersection(there), "the number of a removed node is used again")


def _check_rows(old: ClusterMap, new: ClusterMap) -> None:
    transition = new.transition
    moving = []
    for at, role in enumerate(ROLES):
        before, after = old.tables[at], new.tables[at]
        differ = [not same_homes(a, b) for a, b in zip(before, after, strict=True)]
        moves = any(differ)
        moving.append(moves)
        kept = None if transition is None else transition.old(role)
        _require(
            kept == (before if moves else None),
            f"the {role} homes move without a transition from where they are",
        )
        for p, (changed, was, now) in enumerate(
            zip(differ, old.changes[at], new.changes[at], strict=True)
        ):
            _require(
                now == (new.epoch if changed else was),
                f"the {role} partition {p} does not say when it changed",
            )
    if transition is not None:
        _require(any(moving), "a transition in which nothing moves")
        _require(transition.phase == (1 if moving[0] else 2), "a transition begins with phase 1")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InvalidArgument(message)
