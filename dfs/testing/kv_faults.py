"""What befalls the nodes of the register simulation: single faults, and days of purging."""

from typing import TYPE_CHECKING

from dfs.cluster.map import METADATA
from dfs.testing.kv_network import LIMIT
from dfs.testing.kv_node import Node
from dfs.testing.kv_shell import HOUR

if TYPE_CHECKING:
    from dfs.testing.kv_cores import World


def fault(world: "World", kind: str) -> None:
    """One fault of that kind, somewhere; kinds that are none of these do nothing."""
    random = world.random
    numbers = list(world.nodes)
    some = random.choice(numbers)
    node = world.nodes[some]
    if kind == "cut":
        world.network.heal()
        if random.random() < 0.6:
            side = {n: random.random() < 0.5 for n in numbers}
            pairs = [(a, b) for a in numbers for b in numbers if side[a] != side[b]]
            if random.random() < 0.3:
                pairs = [(a, b) for a, b in pairs if side[a]]  # one way
            world.network.cut(pairs)
    elif kind == "links":
        world.network.cut((random.choice(numbers), random.choice(numbers)) for _ in range(4))
    elif kind == "crash":
        world.crashes += 1
        node.crash()
    elif kind == "start":
        for n in numbers:
            if random.random() < 0.7:
                world.nodes[n].start()
    elif kind == "stop":
        world.network.stop(some)
    elif kind == "continue":
        for n in numbers:
            if random.random() < 0.7:
                world.carry_on(n)
    elif kind == "full":
        node.store.full = not node.store.full
    elif kind == "skew":
        node.skew = random.uniform(-1800.0, 1800.0)
    elif kind == "restore":
        homes = world.chain.at(world.committed).homes(METADATA, random.choice(world.touched))
        _restore(world, world.nodes[random.choice([n for n in homes if n in world.nodes])])
    elif kind == "age":
        world.jump(random.choice((600.0, 4 * HOUR, 30 * HOUR, 80 * HOUR)))


def purge_cycle(world: "World") -> None:
    """A day and five hours, in which tombstones may go."""
    random = world.random
    quiet = random.random() < 0.8
    if quiet:
        for client in world.clients:
            client.pause()
        if random.random() < 0.8:
            _delete_all(world)
    if random.random() < 0.9:
        world.network.heal()
    for number, node in world.nodes.items():
        if random.random() < 0.95:
            node.store.full = False
            world.carry_on(number)
            node.start()
    for _ in range(random.choice((0, 1, 3))):
        world.some_repair()
    world.jump(random.choice((3.0, 23.5, 25.5, 25.5, 26.0, 30.0)) * HOUR)
    world.some_repair()
    leaders = world.leaders()
    for partition, process in leaders:
        process.prepare(partition)
        world.scheduler.run(world.scheduler.now + 1.0, LIMIT)
    if not quiet or random.random() < 0.2:
        fault(world, random.choice(("crash", "start", "nothing", "restore")))
    if random.random() < 0.3:
        world.operator()
    if random.random() < 0.85:
        world.jump(random.choice((3.0, 4.5, 5.5, 6.0)) * HOUR)
    for _, leader in leaders:
        if leader.alive:
            leader.purge()
            world.scheduler.run(world.scheduler.now + 1.0, LIMIT)
    for row in world.rows:
        world.check_quorums(row)
    for client in world.clients:
        client.resume()
    for number in world.nodes:
        keeper = world.nodes[number].process
        if keeper is not None and not world.network.stopped(number):
            keeper.deliver_hints()
    world.some_repair()


def _delete_all(world: "World") -> None:
    """Clients delete every row that they can."""
    world.scheduler.run(world.scheduler.now + 11.0, LIMIT)
    rows = list(world.rows)
    for _ in range(3):
        for client in world.clients:
            if rows and client.current is None:
                client.delete(rows.pop())
        world.scheduler.run(world.scheduler.now + 2.0, LIMIT)


def _restore(world: "World", node: Node) -> None:
    """An old state comes back, or is kept for later."""
    if node.backup is None:
        if not node.store.dirty:
            node.backup = (node.store.rows(), node.saved_map)
        return
    if any(n.waits() for n in world.nodes.values()):
        return  # two at once are more than any quorum forgives
    if any(world.oracle.alone(row, node.number) for row in world.rows):
        return  # and so is one, where the other copy is a hint that nobody took for three hours
    world.restores += 1
    node.crash()
    node.restore()
    if world.random.random() < 0.7:
        node.start()
