"""`dfs fsck --repair` on a real volume: damage of every kind, mended in one run, nothing else touched."""

import json
import os
import random

import pytest
from localcluster import LocalCluster

from dfs.client.registry import open_volume_by_name
from dfs.client.session import open_session
from dfs.volume import items
from dfs.volume.items import REG, Inode
from tests.integration.test_faults import flip_a_byte

MIB = 1 << 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    c = LocalCluster(tmp_path_factory.mktemp("fsck"))
    try:
        yield c.init().up()
    finally:
        c.destroy()


def change(cluster, volume, work):
    """Damage a volume: `work(txn, salt)` writes what no client would."""

    async def main(connected):
        info = await open_volume_by_name(connected, volume)
        async with open_session(connected, info.volume_id) as session:
            await session.transact(lambda txn: work(txn, session.params["salt"]))

    cluster.ask(main)


def patch(txn, ino, **fields):
    inode = Inode.decode(txn.get(items.inode_key(ino)))
    for name, value in fields.items():
        setattr(inode, name, value)
    txn.put(items.inode_key(ino), inode.encode())


def fsck(cluster, volume, *options):
    """(exit status, the report)."""
    done = cluster.dfs("fsck", "--json", *options, volume, check=False)
    return done.returncode, json.loads(done.stdout)


def tree(where):
    found = {}
    for path, directories, files in os.walk(where):
        for name in directories + files:
            p = os.path.join(path, name)
            s = os.lstat(p)
            content = None
            if os.path.islink(p):
                content = os.readlink(p)
            elif name in files:
                with open(p, "rb") as f:
                    content = f.read()
            found[os.path.relpath(p, where)] = (
                s.st_mode,
                s.st_nlink,
                s.st_mtime_ns,
                s.st_ino,
                content,
            )
    return found


def test_damage_of_names_and_counts_is_repaired_and_the_rest_untouched(cluster, tmp_path):
    cluster.dfs("volume", "create", "v")
    m = cluster.mount("v", tmp_path / "m")
    rnd = random.Random(1)
    (m / "d" / "e").mkdir(parents=True)
    (m / "other").mkdir()
    for name in ("a", "d/b", "d/e/c", "other/x", "other/y"):
        (m / name).write_bytes(rnd.randbytes(100_000))
    os.link(m / "a", m / "d" / "again")
    os.symlink("a", m / "l")
    before = tree(m)
    ino = {name: before[name][3] for name in before}
    cluster.umount(m)

    def damage(txn, salt):
        patch(txn, ino["a"], nlink=1)  # a wrong link count
        patch(txn, ino["d/e"], parent=1)  # a wrong parent
        patch(txn, ino["d"], nlink=9, size=17)
        key = items.entry_key(1, items.name_hash(salt, b"ghost"))  # a name of nothing
        txn.put(key, items.encode_entries(((b"ghost", 0x123456, REG),)))
        inode = Inode(REG, 0o644, nlink=0, parent=1, size=5)  # what a dead client left
        txn.put(items.inode_key(0x777), inode.encode())
        txn.put(items.orphan_key(0x777), items.ORPHAN_VALUE)
        txn.delete(items.entry_key(ino["other"], items.name_hash(salt, b"x")))  # a lost name
        txn.put(items.USAGE_KEY, items.encode_usage(12, 34))

    change(cluster, "v", damage)
    status, report = fsck(cluster, "v")
    assert status == 4
    assert {p["invariant"] for p in report["problems"]} == {"V1", "V2"}
    assert report["repaired"] == []
    status, report = fsck(cluster, "v", "--repair")
    assert status == 1, report
    assert report["problems"] == []
    told = "\n".join(r["text"] for r in report["repaired"])
    for text in (
        "(/a): corrected nlink 1 to 2",
        "(/d/e): corrected its parent",
        "dropped the name b'ghost', which led to no inode",
        "finished the removal of a deleted file",
        f"named it #{ino['other/x']:x} in lost+found",
        "it said 12 bytes in 34",
    ):
        assert text in told, told

    cluster.mount("v", m)
    after = tree(m)
    found = f"lost+found/#{ino['other/x']:x}"
    assert after.pop(found) == before.pop("other/x")
    del after["lost+found"]
    assert after == before
    status = cluster.dfs("fsck", "--repair", "v", check=False)  # not while it is mounted
    assert status.returncode == 8
    assert "v" in status.stderr
    assert len(status.stderr.splitlines()) == 1
    assert fsck(cluster, "v")[0] == 0  # a check goes on beside it
    cluster.umount(m)
    cluster.mounts.remove(m)


def test_copies_are_made_again_and_data_that_nobody_has_is_told(cluster, tmp_path):
    cluster.dfs("volume", "create", "w")
    data = random.Random(2).randbytes(6 * MIB)
    (tmp_path / "in").write_bytes(data)
    cluster.dfs("put", tmp_path / "in", "w:/kept")

    def spoil(*nodes):
        """Flip a byte at the end of the last chunk, in every copy that the nodes have."""
        for node in nodes:
            for path in (cluster.dir / node / "chunks").rglob("*.seg"):
                content = path.read_bytes()
                at = content.find(data[-64:])
                while at >= 0:
                    flip_a_byte(path, at)
                    at = content.find(data[-64:], at + 1)

    spoil("node2")
    status, report = fsck(cluster, "w", "--repair")
    assert status == 1, report
    assert [r["invariant"] for r in report["repaired"]] == ["C1"]
    assert "3 good copies again, it had 2" in report["repaired"][0]["text"]

    spoil("node1", "node2", "node3")
    status, report = fsck(cluster, "w", "--repair")
    assert status == 4
    (loss,) = report["lost"]
    assert (loss["path"], loss["offset"], loss["length"]) == ("/kept", 4 * MIB, 2 * MIB)
    assert "no server has a good copy" in loss["why"]
    assert "backup" in loss["advice"]
    shown = cluster.dfs("fsck", "w", check=False)
    assert shown.returncode == 4
    assert "lost: /kept, bytes 4194304 to 6291455: no server has a good copy" in shown.stdout
    assert cluster.dfs("get", "w:/kept", tmp_path / "out", check=False).returncode == 1
    cluster.dfs("put", "--force", tmp_path / "in", "w:/kept")  # written again, as it says
    assert fsck(cluster, "w", "--all-copies")[0] == 0
    cluster.dfs("get", "w:/kept", tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == data
