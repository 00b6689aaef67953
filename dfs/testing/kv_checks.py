"""What has to hold in the register simulation: during a schedule, and at its end.

Each check raises `ViolationError`, whose text begins with the name of what does not hold:

    copies      an acknowledged write is durable on W nodes of every set of homes, PW of them homes
    fresh       no quorum that would answer a read misses an acknowledged write
    dead        nothing that was purged is back
    digests     equal copies have equal digests, and those are what a recomputation gives
    canonical   equal registers have equal bytes
    actors      a version vector has no more actors than ever were homes of its partition
    merge       the order in which copies meet does not matter
    liveness    at the end every quorum read succeeds
"""

from typing import TYPE_CHECKING

from dfs.cluster.map import METADATA
from dfs.testing.kv_clients import Operation
from dfs.testing.kv_network import LIMIT
from dfs.testing.kv_oracle import Dot, ViolationError
from dfs.testing.kv_shell import Shell
from metadata import merkle, versions
from metadata.antientropy import members
from metadata.merkle import REGISTERS, recompute
from metadata.quorum import majority

if TYPE_CHECKING:
    from dfs.testing.kv_cores import World


def check_copies(world: "World", process: Shell, operation: Operation) -> None:
    """An acknowledged write is durable on as many nodes of every set of homes as it has to be."""
    write = operation.write
    if write is None or write.counted:
        return
    write.counted = True
    history = world.oracle.history(operation.row)
    for members_, total, homes in operation.quotas(process.map, process.number):
        best = (-1, -1)
        for name in sorted(write.dots):
            dot = history.dots[name]
            held = sum(
                n in dot.homes or n in dot.lost or _left(world, process, operation.row, dot, n)
                for n in members_
            )
            hinted = len(dot.hints - set(members_))
            best = max(best, (held, hinted))
        if best[0] < homes or best[0] + best[1] < total:
            raise ViolationError(
                f"copies: write {write.number} was acknowledged with {best} copies on homes "
                f"{members_} and as hints, {total} and {homes} on homes are needed"
            )


def _left(world: "World", process: Shell, row: bytes, dot: Dot, number: int) -> bool:
    """Whether a node had a copy, and let go of it by homes this coordinator has not heard of.

    Nothing tells a coordinator with an old map that a home which acknowledged is one no more.
    It need not know: the transition that ended it has taken the write to quorums of the homes
    that followed, and `check_quorums` asks for it there.
    """
    epoch = dot.left.get(number)
    if epoch is None:
        return False
    partition = int.from_bytes(row[1:3], "big")
    return world.chain.at(epoch).last_change(METADATA, partition) > process.map.epoch


def check_quorums(world: "World", row: bytes) -> None:
    """No quorum that would answer a read now, by a map of any epoch, may miss what is known.

    Stronger than to wait for a read that does: what matters is whether one could.
    """
    partition = int.from_bytes(row[1:3], "big")
    for epoch in range(world.committed, max(0, world.committed - 3), -1):
        m = world.chain.at(epoch)
        homes = m.read_homes(METADATA, partition)
        able = [n for n in homes if _serves(world, n, epoch, partition)]
        missed = world.oracle.missed(row, able, majority(len(homes)))
        if missed:
            raise ViolationError(
                f"fresh: {row!r}: quorums of {able} of epoch {epoch} (newest "
                f"{world.committed}) do not know writes {missed:b}"
            )
        if epoch != world.committed:
            continue
        for n in able:
            data = world.nodes[n].store.get(row)
            if data and (back := world.oracle.risen(row, data)):
                raise ViolationError(f"dead: {row!r} is back at node {n}: writes {back:b}")


def _serves(world: "World", number: int, epoch: int, partition: int) -> bool:
    """Whether a node would answer a read of that epoch, once it runs and is reached."""
    node = world.nodes.get(number)
    if node is None or node.restored:
        return False
    process = node.process
    if process is None:
        known, waits = node.saved_map, world.classes.pull_first(node.store)
        stale = epoch < known.last_change(METADATA, partition)
    else:
        known, waits = process.map, process.pull_first
        last = known.last_change(METADATA, partition)
        stale = process.registers.rule_stale(epoch, last)
    if stale or waits.waiting(partition):
        return False
    if known.epoch >= epoch or world.chain.at(epoch).last_change(METADATA, partition) <= (
        known.epoch
    ):
        return True
    # it learns of the map first, and may have to pull then
    there = epoch == known.epoch + 1 and number in members(known, partition)
    return there or not merkle.rows_of(node.store, REGISTERS, partition)[0]


def differing(world: "World") -> str:
    """What keeps the homes from being alike, in words; "" if they are."""
    m = world.chain.at(world.committed)
    for row in world.rows:
        homes = m.homes(METADATA, int.from_bytes(row[1:3], "big"))
        if len({world.nodes[n].store.get(row) for n in homes}) > 1:
            return f"{row!r} differs between homes {homes}"
        for n in homes:
            process = world.nodes[n].process
            if process is None or process.pull_first.waiting(int.from_bytes(row[1:3], "big")):
                return f"node {n} still waits"
    return ""


def verify(world: "World") -> None:
    """All that holds at the end, when nothing is under way: values, digests, actors, answers."""
    m = world.chain.at(world.committed)
    for row in world.rows:
        partition = int.from_bytes(row[1:3], "big")
        homes = m.homes(METADATA, partition)
        data = world.nodes[homes[0]].store.get(row)
        register = world.oracle.decode(data) if data else versions.EMPTY
        world.oracle.final(row, register)
        if data and versions.encode(register) != data:
            raise ViolationError(f"canonical: {row!r} has other bytes than its value")
        totals = set()
        for n in homes:
            process = world.nodes[n].process
            if process is not None:
                totals.add(tuple(process.digests.buckets(REGISTERS, partition)))
        if len(totals) > 1:
            raise ViolationError(f"digests: partition {partition} differs while its rows agree")
        _check_actors(world, partition, register)
        _check_merges(world, row)
    for node in world.nodes.values():
        for partition in world.touched:
            steps = recompute(node.store, REGISTERS, partition)
            try:
                while True:
                    next(steps)
            except StopIteration as e:
                if e.value:
                    raise ViolationError(f"digests: those of node {node.number} drifted") from None
    _read_all(world)


def _check_actors(world: "World", partition: int, register: versions.Register) -> None:
    """No more actors than homes there were, and than nodes that forgot what they had been."""
    renewed = world.renewals
    for node in world.nodes.values():
        if node.process is not None:
            renewed += node.process.registers.actors.epoch - 1
    bound = world.chain.at(1).n + world.handoffs[partition] + renewed
    if len(register[0]) > bound or not {a for a, _ in register[0]} <= world.names.get(
        partition, set()
    ):
        raise ViolationError(
            f"actors: {len(register[0])} in a register of partition {partition}, bound {bound}"
        )


def _check_merges(world: "World", row: bytes) -> None:
    """Whatever registers of a row there ever were merge to the same bytes in any order."""
    seen = world.oracle.seen_registers(row, 12)
    results = set()
    for _ in range(3):
        world.random.shuffle(seen)
        merged = versions.EMPTY
        for data in seen:
            merged = versions.merge(merged, world.oracle.decode(data))
            merged = versions.merge(merged, world.oracle.decode(data))
        results.add(versions.encode(merged))
    if len(results) > 1:
        raise ViolationError(f"merge: the order in which copies of {row!r} meet matters")


def _read_all(world: "World") -> None:
    """At the end every quorum read succeeds and knows all."""
    client = world.clients[0]
    wanted = len(world.rows)
    for row in world.rows:
        client.last_read(row)
    world.scheduler.run(world.scheduler.now + 30.0, LIMIT * 3)
    if client.read_back != wanted:
        raise ViolationError(f"liveness: {client.read_back} of {wanted} reads succeeded")
