"""Registers on five real nodes while nodes are killed, stopped, copied, damaged and filled up.

A load runs in every test, and `Load.check` says at the end whether anything acknowledged is missing.
How long nobody was answered is printed, not asserted: `pytest -rP` shows it.
"""

import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from kvload import Load
from localcluster import LocalCluster, free_ports, wait_gone, wait_until

from dfs.cluster.map import METADATA
from dfs.disk import disk_at
from dfs.errors import DiskFull, InvalidArgument
from metadata.registers import partition_of_row, row_of
from metadata.store import manifest
from metadata.store.table import open_table

pytestmark = pytest.mark.mount

METADATA_ONLY = ("metadata",)
ROOMY, FULL = "size=4g", "size=200m"  # 256 MiB are always kept free
CONVERGED = 30.0  # seconds that homes are given to become equal
WHOLE = 60.0  # seconds that a cluster is given to make good what a test did to it


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Five metadata nodes; every test leaves them whole, and all they ever acknowledged in them."""
    c = LocalCluster(tmp_path_factory.mktemp("five"), 5, METADATA_ONLY)
    disk = c.dir / "node5" / "metadata"
    try:
        c.init()
        marker = (disk / "MARKER").read_bytes()
        subprocess.run(["mount", "-t", "tmpfs", "-o", ROOMY, "dfs", disk], check=True)
        (disk / "MARKER").write_bytes(marker)
        yield c.up()
    finally:
        c.dfs("cluster", "down", check=False)
        subprocess.run(["umount", "-l", disk], check=False, capture_output=True)
        c.destroy()


@pytest.fixture(autouse=True)
def _from_a_whole_cluster(five):
    """What an earlier test left undone, or broke, is not this one's fault."""
    wait_whole(five)


def missing(cluster):
    """What keeps the cluster from being whole, in words; "" = it is."""
    current = cluster.map()
    found = cluster.node_status()
    names = [node.name for node in current.nodes]
    said = [f"{name} is silent" for name in names if name not in found]
    if phase := current.phase(METADATA):
        said.append(f"the homes of epoch {current.epoch} are in phase {phase} of a change")
    for name, status in found.items():
        if waiting := status["sync"]["waiting_partitions"]:
            errors = [
                error for worker, *_, error in status["workers"] if worker == "storage-repair"
            ]
            said.append(f"{waiting} partitions of {name} wait ({errors})")
        if lost := status["store"]["lost_ranges"]:
            said.append(f"{lost} ranges of the store of {name} are lost")
    return "; ".join(said)


def wait_whole(cluster, seconds=WHOLE):
    """Until all nodes answer, nothing is lost, no partition waits; returns the seconds it took."""
    began = time.monotonic()
    while said := missing(cluster):
        if time.monotonic() > began + seconds:
            raise AssertionError(f"the cluster is not whole after {seconds:.0f} s: {said}")
        time.sleep(0.2)
    return time.monotonic() - began


def converged(cluster, load):
    """Every home of every key holds the same bytes; returns the seconds it took."""
    began = time.monotonic()
    keys = [*load.carts, *load.own, *load.cold]

    def equal():
        try:
            return not cluster.differing(keys)
        except AssertionError:
            return False

    wait_until(
        equal, CONVERGED, f"equal homes; {len(cluster.differing(keys))} of {len(keys)} differ"
    )
    return time.monotonic() - began


def counters(cluster, name, *nodes):
    """A counter of the registers' statistics, added up over nodes."""
    return sum(status["kv"].get(name, 0) for status in cluster.node_status(*nodes).values())


# ------------------------------------------------------------------------------- dead and mute nodes


def test_each_node_in_turn_is_killed_and_returns(five):
    with Load(five, prefix="kill-").preload(50) as load:
        load.wait_for_acks(50)
        for victim in five.nodes:
            load.enter(f"{victim} killed")
            five.kill(victim)
            load.wait_for_acks(100)
            time.sleep(0.5)
            load.enter(f"{victim} started")
            five.up(victim)
            load.wait_for_acks(20)
    load.check(level="quorum")
    print(f"  homes are equal after {converged(five, load):.1f} s")
    load.check()


def test_a_stopped_node_goes_on_where_it_was(five):
    """Longer than it takes to be suspected and declared dead."""
    with Load(five, prefix="stop-", seed=2) as load:
        load.wait_for_acks(50)
        load.enter("node2 stopped")
        five.kill("node2", sig=signal.SIGSTOP)
        try:
            time.sleep(6.5)
            load.wait_for_acks(50)
        finally:
            load.enter("node2 continued")
            five.kill("node2", sig=signal.SIGCONT)
        time.sleep(1)
        load.wait_for_acks(50)
    load.check(level="quorum")
    print(f"  homes are equal after {converged(five, load):.1f} s")
    load.check()


# ------------------------------------------------------------------------------------------ clients


def test_one_live_seed_is_enough_and_none_is_told(five, tmp_path):
    file = json.loads((five.dir / "cluster.json").read_text())
    dead = [f"tcp://127.0.0.1:{free_ports(3) + i}" for i in range(3)]
    small = LocalCluster(tmp_path)
    small.dir.mkdir()
    seeds = (small.dir / "cluster.json").write_text

    seeds(json.dumps(file | {"seeds": [*dead, file["seeds"][3]]}))
    small.dfs("kv", "put", "by-one-seed", "v")
    assert small.dfs("kv", "get", "by-one-seed").stdout == "v"
    five.kill("node4", sig=signal.SIGSTOP)  # mute, not dead: it never says that it is gone
    try:
        began = time.monotonic()
        seeds(json.dumps(file | {"seeds": [file["seeds"][3], file["seeds"][1]]}))
        assert small.dfs("kv", "get", "by-one-seed").stdout == "v"
        print(f"  a mute first seed costs {time.monotonic() - began:.1f} s")
    finally:
        five.kill("node4", sig=signal.SIGCONT)

    seeds(json.dumps(file | {"seeds": dead}))
    began = time.monotonic()
    said = small.refused("kv", "get", "by-one-seed")
    print(f"  all seeds dead: told after {time.monotonic() - began:.1f} s")
    assert "no node of the cluster" in said
    assert all(seed in said for seed in dead)
    assert "dfs cluster up" in said


# -------------------------------------------------------------------------------------- convergence


def drop_hints(cluster, target):
    """Forget every hint for a node; returns how many nodes had some."""

    async def work(c):
        number = next(n.number for n in c.get_map().nodes if n.name == target)
        dropped = 0
        for node in c.get_map().nodes:
            if node.number != number:
                try:
                    await c.rpc.call(node.metadata_addr, "hints.drop", (number,), timeout=10)
                except InvalidArgument:
                    continue  # it has none
                dropped += 1
        return dropped

    return cluster.ask(work)


@pytest.mark.slow
def test_anti_entropy_brings_what_no_hint_does(five):
    five.kill("node3")
    load = Load(five, prefix="sync-").preload(2000)
    dropped = drop_hints(five, "node3")
    assert dropped
    time.sleep(31)  # what is younger than 30 s is left alone: it is taken to be on its way
    began = time.monotonic()
    five.up("node3")
    print(f"  hints of {dropped} nodes dropped, up after {time.monotonic() - began:.1f} s")
    print(f"  2000 keys are equal after {converged(five, load):.1f} s more")
    load.check()


# -------------------------------------------------------------------------------------------- disks


def test_a_full_disk_refuses_and_recovers(five):
    disk = five.dir / "node5" / "metadata"

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,{size}", disk], check=True)

    with Load(five, prefix="full-", seed=3) as load:
        load.wait_for_acks(50)
        load.enter("the disk of node5 is full")
        resize(FULL)
        try:
            wait_until(
                lambda: five.node_status("node5")["node5"]["disk_level"] == "full", 20, "full"
            )
            load.wait_for_acks(200)
            said = five.ask(put_at_node5)
            assert "take no new data" in five.dfs("cluster", "status", check=False).stdout
            assert "under the reserve" in str(said), said
            assert str(disk) in str(said)
        finally:
            resize(ROOMY)
        load.enter("space again")
        wait_until(lambda: five.node_status("node5")["node5"]["disk_level"] != "full", 20, "space")
        load.wait_for_acks(50)
    words = {text for text in load.words if "full" in text}
    assert not words, words  # no client saw it: others took what node5 refused
    load.check(level="quorum")
    print(f"  homes are equal after {converged(five, load):.1f} s")
    load.check()


async def put_at_node5(c):
    """What node5 itself says to a put and to a delete of a key of which it is a home."""
    current = c.get_map()
    number = next(n.number for n in current.nodes if n.name == "node5")
    for i in range(100):
        key = b"full-own-%d" % i
        if number in current.read_homes(METADATA, partition_of_row(row_of(0, key))):
            break
    address = current.address(METADATA, number)
    await c.rpc.call(address, "kv.put", (0, key, None, b"", {}), timeout=10, epoch=current.epoch)
    try:
        await c.rpc.call(
            address, "kv.put", (0, key, b"v", b"", {}), timeout=10, epoch=current.epoch
        )
    except DiskFull as e:
        return e
    raise AssertionError("node5 took a value on a full disk")


def scrub(cluster, node):
    """Let a node read every table of its store."""

    async def worker(c):
        (found,), _ = await c.rpc.call(address, "node.workers", timeout=10)
        (scrub,) = [w for w in found if w["name"] == "store-scrub"]
        return scrub

    address = next(n.metadata_addr for n in cluster.map().nodes if n.name == node)
    before = cluster.ask(worker)["rounds"]
    cluster.dfs("node", "workers", node, "--run", "store-scrub")
    wait_until(lambda: cluster.ask(worker)["rounds"] > before, WHOLE, "every table is read")
    print(f"  scrub: {cluster.ask(worker)['progress']}")


def blocks(data):
    """The tables of a node that is down: path -> place in the file and keys of each block."""
    disk = disk_at(str(data))
    found = {}
    for run in manifest.read(disk, "lsm").runs:
        for meta in run.tables:
            table = open_table(disk, "lsm", meta, 1)
            places = table.load().offsets[:-1]
            found[data / "lsm" / meta.name] = [
                (at, table.block(i)[0]) for i, at in enumerate(places)
            ]
    return found


def flip_bits(path, found):
    """Damage some blocks of a table, and where its hints end; returns the kinds of rows in it.

    Not those of the sums: all partitions would wait, which is slow, and tested elsewhere.
    """
    ends = {keys[-1][:1]: at for at, keys in found}
    some = [found[len(found) // part] for part in (2, 3, 5, 7)]
    chosen = {at for at, keys in some if keys[0][:1] in b"Hhr"}
    with path.open("r+b") as f:
        for at in sorted(chosen | {ends[kind] for kind in (b"H", b"h") if kind in ends}):
            f.seek(at + 10)
            byte = f.read(1)
            f.seek(at + 10)
            f.write(bytes([byte[0] ^ 0x40]))
    return {key[:1] for _, keys in found for key in keys}


def test_flipped_bits_in_tables_are_found_and_repaired(five):
    """Those that a read meets, and those that only the scrub does."""
    load = Load(five, prefix="bits-", seed=4).preload(300)
    filler = Load(five, prefix="fill-", seed=5)
    data = five.dir / "node2" / "metadata"

    def tables():
        return sorted(data.rglob("*.sst"))

    five.kill("node3")  # so that there are hints
    try:
        for _ in range(5):
            filler.preload(100, pad=random.Random(1).randbytes(64 << 10))
            if tables():
                break
    finally:
        five.up("node3")
    wait_until(tables, 10, "a memtable of node2 is flushed")
    five.down("node2")
    flipped = tables()
    kinds = [flip_bits(path, found) for path, found in blocks(data).items()]
    assert any(kind.issuperset({b"H", b"h", b"m", b"n", b"r"}) for kind in kinds), kinds
    with load:
        five.up("node2")
        load.wait_for_acks(100)
    filler.check(level="quorum")

    def told():
        errors = five.status()["errors"]
        return any("node2" in e["node"] and e["role"] == "metadata" for e in errors)

    wait_until(told, 30, "`dfs cluster status` shows the damage")
    print(f"  what reads met is repaired after {wait_whole(five):.1f} s more")
    scrub(five, "node2")
    print(f"  what the scrub met is repaired after {wait_whole(five):.1f} s more")
    errors = [text for text, _ in five.node_status("node2")["node2"]["errors"]]
    for table in flipped:
        assert f"table {table.name} is quarantined" in errors
    load.check()
    filler.check()
    print(f"  homes are equal after {converged(five, filler):.1f} s")


# --------------------------------------------------------------------------- copies of a directory


def replace(cluster, old, new, numbers):
    """`dfs cluster node replace`, on a loopback port."""
    address = f"tcp://127.0.0.1:{free_ports(numbers)}"
    said = cluster.apply("replace", old, new, "--metadata", address, wait=60)
    cluster.nodes[cluster.nodes.index(old)] = new
    return said


def test_an_old_copy_of_a_directory_is_refused_and_replaced(five):
    load = Load(five, prefix="old-", seed=6).preload(50)
    data = five.dir / "node4" / "metadata"
    copy = five.dir / "copy"
    with load:
        five.down("node4")
        shutil.copytree(data, copy)
        five.up("node4")
        load.wait_for_acks(300)
        five.down("node4")
        shutil.rmtree(data)
        shutil.move(copy, data)
        up = five.dfs("cluster", "up", "--dir", five.dir, "node4", check=False)
        wait_until(lambda: "must not run on" in five.log("node4"), 20, "the copy is refused")
        said = five.log("node4").splitlines()[-1]
        print(f"  {up.returncode}: {up.stderr}{said}")
        assert "dfs cluster node replace" in said
        load.enter("node4 replaced")
        replace(five, "node4", "node6", 1)
        load.wait_for_acks(100)
    load.check()


def test_of_two_processes_with_one_id_one_stops(five):
    load = Load(five, prefix="twin-", seed=7).preload(50)
    copy = five.dir / "twin"
    data = five.dir / "node5" / "metadata"
    with load:
        load.wait_for_acks(50)
        shutil.copytree(data, copy)
        load.enter("a twin of node5 runs")
        own = [sys.executable, "-P", "-m", "metadata"]
        own += ["--listen", f"tcp://127.0.0.1:{free_ports(1)}"]
        log = five.dir / "log" / "twin.log"
        with log.open("wb") as out:
            twin = subprocess.Popen(
                [*own, "--data", copy, "--map", five.dir / "node5" / "map"],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        try:

            def one_stopped():
                return "another process runs as" in five.log("node5") or twin.poll() is not None

            wait_until(one_stopped, 30, "one of them stops")
            load.wait_for_acks(100)
        finally:
            original_stopped = twin.poll() is None
            twin.kill()
            twin.wait()
        said = five.log("node5") if original_stopped else log.read_text()
        print(
            f"  {'the original' if original_stopped else 'the twin'} stops: {said.splitlines()[-1]}"
        )
        assert "another process runs as" in said
        load.enter("node5 replaced")
        if original_stopped:
            wait_gone(five.pid("node5", "metadata"))
            replace(five, "node5", "node7", 1)
        load.wait_for_acks(100)
    load.check()
