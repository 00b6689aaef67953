"""`dfs cluster node|plan|apply|wait|map` and `dfs node members` over a cluster of dicts."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from fakecluster import FakeCluster

from dfs import codec
from dfs.cli import members as module
from dfs.cli.local import ClusterDir
from dfs.cli.main import cli
from dfs.client.kv import CLUSTER_SPACE
from dfs.client.membership import STAGED
from dfs.cluster.change import Drain, SetWeight, edit_from_fields
from dfs.cluster.map import CHUNK, METADATA, ClusterMap
from dfs.errors import ConfigError, Corrupt, DfsError, NoQuorum, StaleEpoch, Unreachable
from dfs.hashing import PARTITIONS

REGISTER = (CLUSTER_SPACE, STAGED)
FAR = ("--metadata", "tcp://10.0.0.9:7400", "--chunk", "tcp://10.0.0.9:7401")


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    made = FakeCluster(4)
    made.patch(monkeypatch, "dfs.cli.members", "dfs.cli.network")
    (tmp_path / "cluster.json").write_text("{}")
    monkeypatch.setenv("DFS_CLUSTER", str(tmp_path))
    monkeypatch.setattr(module, "_POLL", 0.01)
    return made


@pytest.fixture
def local(cluster, monkeypatch, tmp_path):
    """The directory of that cluster, with all of its nodes here; `started` are the nodes started."""
    directory = ClusterDir(tmp_path / "local")
    directory.create(cluster.map, cluster.map.nodes)
    directory._write_file(cluster.map)
    monkeypatch.setenv("DFS_CLUSTER", str(directory.path))
    directory.started = []

    async def start(path, names, _timeout):
        assert path == directory.path
        directory.started.append(names)

    monkeypatch.setattr(module, "start", start)
    return directory


def run(*args, fails=None):
    """What a command prints; with `fails`, the words of the error of that class it ends with."""
    result = CliRunner().invoke(cli, [*map(str, args)])
    if fails is None:
        assert result.exit_code == 0, (result.output, result.exception)
        return result.stdout
    assert type(result.exception) is fails, (result.output, result.exception)
    return str(result.exception)


def node(*args, **more):
    return run("cluster", "node", *args, **more)


def staged(cluster):
    (value,) = cluster.registers[REGISTER]
    _, fields = codec.unpack(value)
    return tuple(map(edit_from_fields, fields))


# ---------------------------------------------------------------------------------------- staging


def test_edits_are_staged_shown_and_dropped(cluster):
    assert node("staged") == "no changes are staged\n"
    assert node("reset") == "nothing was staged\n"
    assert node("drain", "node1") == (
        "staged: drain node1\nlook: dfs cluster plan      do it: dfs cluster apply --epoch 2\n"
    )
    text = node("weight", "--role", "chunk", "node2", "2.5")
    assert text.startswith("staged: drain node1; set the chunk weight of node2 to 2.5\n")
    assert node("staged") == text
    assert staged(cluster) == (Drain("node1"), SetWeight("node2", CHUNK, 2.5))
    assert node("reset") == "dropped what was staged\n"
    assert node("staged") == "no changes are staged\n"
    assert "staged: remove node1\n" in node("remove", "node1")
    node("reset")
    node("drain", "node3")
    run("cluster", "apply", "--epoch", 2)
    assert "staged: undrain node3\n" in node("undrain", "node3", "--weight", "2")
    assert f"--epoch {cluster.map.epoch + 1}\n" in node("staged")


def test_edits_that_cannot_be_staged_are_refused_in_words(cluster):
    nodes = "its nodes are node1, node2, node3, node4"
    for command in (("drain", "x"), ("undrain", "x"), ("remove", "x"),
                    ("weight", "--role", "chunk", "x", 1), ("replace", "x", "y", *FAR)):  # fmt: skip
        told = node(*command, fails=ConfigError)
        assert told == f"there is no node x in the cluster; {nodes}"
    for command, words in (
        (("undrain", "node1"), "node node1 is not drained: set its weight instead"),
        (("add", "node1", *FAR), "there is a node node1 already: give the new one another name"),
        (
            ("add", "a", "b", "--metadata", "tcp://10.0.0.9:1"),
            "one node at a time when addresses are given",
        ),
        (("add", "a"), "where will a listen? give --metadata ADDRESS, --chunk ADDRESS, or both"),
        (
            ("replace", "node1", "node1", *FAR),
            "give the new node another name: the old one's directories may be left",
        ),
        (("add", "a", "--chunk", "10.0.0.9:1"), "no address of ours: '10.0.0.9:1'"),
        (("add", "a", *FAR, "--weight", "nan"), "weights must be floats >= 0"),
    ):
        assert words in node(*command, fails=ConfigError)
    assert REGISTER not in cluster.registers
    for usage in (("add",), ("weight", "node1", "1"), ("weight", "--role", "x", "node1", "1"),
                  ("weight", "--role", "chunk", "node1", "--", "-1"),
                  ("add", "a", *FAR, "--weight", "-1")):  # fmt: skip
        assert CliRunner().invoke(cli, ["cluster", "node", *usage]).exit_code == 2


def test_a_node_of_another_machine_is_described_by_options(cluster):
    node("add", "far", *FAR, "--zone", "z", "--rack", "r", "--host", "h", "--weight", "2")
    (edit,) = staged(cluster)
    new = edit.node
    assert len(new.node_id) == 16
    assert (new.name, new.zone, new.rack, new.host) == ("far", "z", "r", "h")
    assert (new.metadata_addr, new.chunk_addr) == (FAR[1], FAR[3])
    assert (new.metadata_weight, new.chunk_weight) == (2.0, 2.0)
    node("reset")
    node("add", "chunks", "--chunk", FAR[3])
    (edit,) = staged(cluster)
    new = edit.node
    assert (new.zone, new.rack, new.host) == ("chunks", "", "10.0.0.9")
    assert (new.metadata_addr, new.chunk_addr) == ("", FAR[3])


def test_a_replacement_stands_where_the_old_one_stood(cluster):
    cluster.map = cluster.map.successor(
        [replace(n, zone="zone1", rack="rack7") if n.number == 1 else n for n in cluster.map.nodes]
    )
    for given, place in (
        ((), ("zone1", "rack7")),
        (("--rack", "r"), ("zone1", "r")),
        (("--zone", "z"), ("z", "")),
    ):
        node("replace", "node1", "new", *FAR, *given)
        (edit,) = staged(cluster)
        assert (edit.old, edit.node.zone, edit.node.rack) == ("node1", *place)
        node("reset")


def test_a_replacement_has_the_capacity_of_the_old_one_unless_told(cluster):
    cluster.map = cluster.map.successor(
        [
            replace(n, metadata_weight=2.0, chunk_weight=4.0) if n.number == 1 else n
            for n in cluster.map.nodes
        ]
    )
    for given, weights in (((), (2.0, 4.0)), (("--weight", "3"), (3.0, 3.0))):
        node("replace", "node1", "new", *FAR, *given)
        (edit,) = staged(cluster)
        assert (edit.node.metadata_weight, edit.node.chunk_weight) == weights
        node("reset")


def test_on_a_local_cluster_ports_and_zones_are_chosen(cluster, local, monkeypatch):
    taken = {7408, 7411}

    class Probe:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def setsockopt(self, *_):
            return None

        def bind(self, address):
            if address[1] in taken:
                raise OSError("in use")

    kernel = SimpleNamespace(socket=Probe, SOL_SOCKET=1, SO_REUSEADDR=2)
    monkeypatch.setattr(module, "socket", kernel)
    cluster.map = cluster.map.successor(
        [replace(n, zone="zone1" if n.number < 3 else f"zone{n.number}") for n in cluster.map.nodes]
    )
    node("add", "node5", "node6")
    node("add", "node7", "--zone", "here", "--host", "h")
    first, second, third = (edit.node for edit in staged(cluster))
    prefix = "tcp://127.0.0.1:"
    assert (first.metadata_addr, first.chunk_addr) == (f"{prefix}7409", f"{prefix}7410")
    assert (second.metadata_addr, second.chunk_addr) == (f"{prefix}7412", f"{prefix}7413")
    assert third.metadata_addr == f"{prefix}7414"
    assert (first.zone, second.zone, third.zone) == ("zone3", "zone4", "here")
    assert [n.host for n in (first, second, third)] == ["host-node5", "host-node6", "h"]
    taken.update(range(7414, 65536))
    told = node("add", "node8", fails=ConfigError)
    assert told == "no free loopback ports above those of the cluster: give --metadata, --chunk"


def test_what_another_version_staged_can_be_dropped(cluster):
    cluster.registers[REGISTER] = (codec.pack((2, "?")),)
    for command in (("node", "staged"), ("node", "drain", "node1"), ("plan",),
                    ("apply", "--epoch", "2")):  # fmt: skip
        told = run("cluster", *command, fails=Corrupt)
        assert told == (
            "staged changes have format 2: upgrade dfs, or `dfs cluster node reset` drops them"
        )
    assert node("reset") == "dropped what was staged\n"
    assert node("staged") == "no changes are staged\n"


# ------------------------------------------------------------------------------------------- plan


def test_a_plan_without_edits_says_how_to_stage_some(cluster):
    told = run("cluster", "plan", fails=ConfigError)
    assert told == (
        "no changes are staged: `dfs cluster node add|drain|remove|replace` stages some; "
        "`dfs cluster plan --nodes N` plans a new cluster"
    )


def test_the_plan_shows_shares_bytes_and_warnings(cluster):
    quiet = cluster.map.node(2).metadata_addr
    cluster.down.add(quiet)  # whose use is not known: an estimate without it
    cluster.answers["node.status"] = ({"used": 256 << 20},)
    node("remove", "node1")
    text = run("cluster", "plan")
    assert text.startswith("epoch 1 -> 2: remove node1\n")
    assert "metadata role" in text
    assert "chunk role" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("node1 ")]
    before = str(sum(1 in row for row in cluster.map.tables[0]))
    assert [row[:5] for row in rows] == [["node1", "0", before, "0", "0"]] * 2
    assert all(row[-1] == "-" for row in rows), "no ideal for who has no weight"
    assert "moves " in text
    assert "every partition's copies are in different zones and on different hosts" in text
    assert text.endswith("\n\ndo it: dfs cluster apply --epoch 2\n")

    told = json.loads(run("cluster", "plan", "--json"))
    assert (told["epoch"], told["changes"]) == (2, ["remove node1"])
    shares = {(s["name"], s["role"]): s for s in told["nodes"]}
    assert shares["node1", "metadata"]["after"] == 0
    assert shares["node2", "metadata"]["receive"] > 0
    assert shares["node2", "metadata"]["move_bytes"] > 0
    assert told["roles"]["chunk"]["partitions_sharing_zone"] == 0
    assert told["roles"]["chunk"]["moved"] >= told["roles"]["chunk"]["least"] > 0
    assert cluster.map.epoch == 1


def test_the_plan_counts_copies_that_are_lost_together(cluster):
    node("add", "twin", "--metadata", "tcp://10.0.0.1:1", "--chunk", "tcp://10.0.0.1:2",
         "--zone", "zone1", "--weight", "9")  # fmt: skip
    node("remove", "node3")
    node("remove", "node4")
    text = run("cluster", "plan")
    assert f"of {PARTITIONS} partitions, two copies are: " in text
    assert " in one zone" in text
    assert "WARNING: 3 metadata copies but 2 zones (zone1, zone2)" in text
    told = json.loads(run("cluster", "plan", "--json"))
    assert told["roles"]["metadata"]["partitions_sharing_zone"] > 0
    assert any("3 chunk copies but 2 zones" in warning for warning in told["warnings"])


# ------------------------------------------------------------------------------------------ apply


def test_apply_begins_a_change_that_goes_on_by_itself(cluster):
    cluster.moves = False
    node("drain", "node1")
    assert run("cluster", "apply", "--epoch", 2) == (
        "epoch 2: the change has begun\nit goes on by itself; progress: dfs cluster status\n"
    )
    assert cluster.map.transition is not None
    assert cluster.proposed[0][0] == "drain node1"
    assert "changing already" in node("drain", "node2", fails=ConfigError)


def test_apply_waits_if_asked(cluster):
    cluster.answers["node.status"] = ({},)
    node("drain", "node1")
    assert run("cluster", "apply", "--epoch", 2, "--wait", 60) == (
        f"epoch 2: the change has begun\ndone: epoch {cluster.map.epoch} is stable\n"
    )


def test_apply_is_refused_for_another_epoch_and_without_edits(cluster):
    told = run("cluster", "apply", "--epoch", 2, fails=ConfigError)
    assert told == "nothing to change: add, drain, remove or replace a node first"
    node("drain", "node1")
    told = run("cluster", "apply", "--epoch", 3, fails=StaleEpoch)
    assert told == (
        "the cluster's map has epoch 1 and the next is 2, not 3: look at `dfs cluster plan` again"
    )
    cluster.answers["map.propose"] = NoQuorum("1 of 3 voters answered")
    assert run("cluster", "apply", "--epoch", 2, fails=NoQuorum) == "1 of 3 voters answered"
    assert staged(cluster) == (Drain("node1"),)
    assert CliRunner().invoke(cli, ["cluster", "apply"]).exit_code == 2


def test_a_new_node_elsewhere_joins_and_takes_its_share_once_it_answers(cluster):
    node("add", "far", *FAR)
    text = run("cluster", "apply", "--epoch", 2)
    assert text.splitlines() == [
        "epoch 2: far joined, without data yet",
        "start far now, on its machine: dfs node format --new --cluster-map MAP --name far "
        "--data DIR   (MAP: dfs cluster map --output MAP)",
        "epoch 3: the change has begun",
        "it goes on by itself; progress: dfs cluster status",
    ]
    pinged = [address for address, method, _ in cluster.asked if method == "ping"]
    assert pinged == [FAR[1], FAR[3]]
    assert any(5 in row for row in cluster.map.tables[0])


def test_nothing_moves_to_a_node_that_does_not_answer(cluster):
    cluster.down.add(FAR[3])
    node("add", "far", *FAR)
    told = run("cluster", "apply", "--epoch", 2, "--start-timeout", 0.2, fails=DfsError)
    assert told == (
        f"far does not answer: {FAR[3]}: connection refused. Nothing moved yet; once the new nodes "
        "run: dfs cluster apply --epoch 3"
    )
    assert (cluster.map.epoch, cluster.map.transition) == (2, None)
    assert not any(5 in row for table in cluster.map.tables for row in table)
    cluster.down.clear()
    assert run("cluster", "apply", "--epoch", 3).startswith("epoch 3: the change has begun\n")
    assert any(5 in row for row in cluster.map.tables[1])


def test_a_node_of_weight_0_joins_and_that_is_all(cluster):
    node("add", "far", *FAR, "--weight", 0)
    text = run("cluster", "apply", "--epoch", 2)
    assert text.endswith("\ndone: they take no data as long as their weight is 0\n")
    assert (cluster.map.epoch, cluster.map.nodes[-1].name) == (2, "far")


def test_a_new_node_of_this_machine_is_formatted_and_started(cluster, local):
    node("add", "node5")
    text = run("cluster", "apply", "--epoch", 2)
    assert "start node5 now" not in text
    assert local.started == [("node5",)]
    new = next(n for n in cluster.map.nodes if n.name == "node5")
    assert local.roles(new) == [METADATA, CHUNK]
    known = json.loads(local.file.read_text())
    assert new.metadata_addr in known["seeds"]
    assert local.load_map().epoch == 3, "the map in which the change began"
    # one that is for another machine is not started here
    node("add", "far", *FAR)
    text = run("cluster", "apply", "--epoch", cluster.map.epoch + 1)
    assert "start far now, on its machine" in text
    assert local.started == [("node5",)]


# ------------------------------------------------------------------------------------------- wait


def test_wait_ends_when_nothing_is_under_way(cluster):
    cluster.answers["node.status"] = ({},)
    assert run("cluster", "wait") == "done: epoch 1 is stable\n"


def test_wait_goes_on_until_the_change_is_complete(cluster):
    cluster.moves = False
    node("drain", "node1")
    run("cluster", "apply", "--epoch", 2)
    looks = []

    def newest(address, args):
        looks.append(address)
        if len(looks) in (2, 3):
            cluster.map = cluster.map.advance()
        elif len(looks) == 4:
            cluster.map = cluster.map.finish_chunks()
        return cluster.do_map_get(address, args)

    cluster.answers["map.get"] = newest
    cluster.answers["node.status"] = lambda _address, _args: ({"used": 1},)
    assert run("cluster", "wait") == f"done: epoch {cluster.map.epoch} is stable\n"
    assert cluster.map.transition is None
    assert len(looks) >= 4


def test_wait_says_what_the_driver_waits_for(cluster):
    cluster.moves = False
    node("drain", "node1")
    run("cluster", "apply", "--epoch", 2)

    def told():
        return run("cluster", "wait", "--timeout", 0.02, fails=DfsError)

    end = "It goes on by itself; `dfs cluster status` shows it"
    assert told() == (
        f"after 0.02 s the change is still under way (epoch 2): nobody says why. {end}"
    )
    driver = cluster.address("node2")
    cluster.answers["map.waiting"] = lambda address, _args: (
        (2, (1, 1), ("node4 has 7 partitions to get",), True)
        if address == driver
        else (2, (1, 1), ("zzz: what a mere voter says",), False)
    )
    assert told() == (
        "after 0.02 s the change is still under way (epoch 2): node4 has 7 partitions to get. "
        + end
    )
    cluster.down.add(driver)  # then another voter is better than nobody
    assert "(epoch 2): zzz: what a mere voter says. " in told()


def test_wait_names_nodes_that_still_compare(cluster):
    behind = cluster.address("node2")
    cluster.answers["node.status"] = lambda address, _args: (
        {"sync": {"waiting_partitions": 1}} if address == behind else {},
    )
    told = run("cluster", "wait", "--timeout", 0, fails=DfsError)
    assert told == (
        "after 0 s the change is still under way (epoch 1): node2 compares 1 partition with the "
        "other homes. It goes on by itself; `dfs cluster status` shows it"
    )


# -------------------------------------------------------------------------------------------- map


def test_the_map_is_shown(cluster, tmp_path):
    text = run("cluster", "map")
    first, voters, *nodes = text.splitlines()
    assert first == f"epoch 1, digest {cluster.map.digest.hex()[:16]}"
    assert voters == "voters: node1, node2, node3, node4"
    assert len(nodes) == 4
    share = sum(1 in row for row in cluster.map.tables[0])
    assert nodes[0] == (
        f"     1  node1  zone zone1: {share} metadata partitions, "
        f"{sum(1 in row for row in cluster.map.tables[1])} chunk partitions"
    )
    told = json.loads(run("cluster", "map", "--json"))
    assert (told["epoch"], told["digest"]) == (1, cluster.map.digest.hex())
    assert told["voters"] == ["node1", "node2", "node3", "node4"]
    assert (told["transition"], told["banned"]) == ("", [])
    assert told["nodes"][0]["partitions"]["metadata"] == share
    assert told["nodes"][0]["addresses"]["metadata"] == cluster.address("node1")

    file = tmp_path / "map"
    assert run("cluster", "map", "--output", file) == f"wrote the map of epoch 1 to {file}\n"
    assert ClusterMap.decode(file.read_bytes()) == cluster.map
    result = CliRunner().invoke(cli, ["cluster", "map", "--output", str(tmp_path / "no" / "map")])
    assert isinstance(result.exception, FileNotFoundError)


def test_the_map_tells_what_is_under_way_and_who_is_gone(cluster):
    cluster.moves = False
    node("remove", "node4")
    run("cluster", "apply", "--epoch", 2)
    number = {role: len(cluster.map.changed(role)) for role in (METADATA, CHUNK)}
    words = (
        f"metadata homes move, phase 1 of 2, {number[METADATA]} partitions; "
        f"chunks move, {number[CHUNK]} partitions; node4 to leave"
    )
    assert f"\nunder way: {words}\n" in run("cluster", "map")
    assert json.loads(run("cluster", "map", "--json"))["transition"] == words
    cluster.map = cluster.map.advance()
    assert "phase 2 of 2" in run("cluster", "map")
    cluster.map = cluster.map.advance()
    under_way = json.loads(run("cluster", "map", "--json"))["transition"]
    assert under_way == f"chunks move, {number[CHUNK]} partitions; node4 to leave"
    cluster.map = cluster.map.finish_chunks()
    text = run("cluster", "map")
    assert text.endswith("\nremoved for ever: 4\n")
    assert "under way" not in text
    assert json.loads(run("cluster", "map", "--json"))["banned"] == [4]


def test_the_history_is_told_by_any_voter(cluster):
    node("weight", "--role", "chunk", "node1", 2)
    run("cluster", "apply", "--epoch", 2)
    cluster.proposed.append(("", cluster.map))
    cluster.down.add(cluster.address("node1"))
    lines = run("cluster", "map", "--history").splitlines()
    assert [line.split()[0] for line in lines] == ["1", "2", str(cluster.map.epoch)]
    assert lines[0].endswith(" -  the cluster was made")
    assert lines[1].endswith("  set the chunk weight of node1 to 2")
    assert lines[1].split()[1] == cluster.proposed[0][1].digest.hex()[:16]
    assert "2001-09-0" in lines[1]
    assert lines[2].endswith("  next phase")
    told = json.loads(run("cluster", "map", "--history", "--json"))
    assert [entry["note"] for entry in told] == [
        "the cluster was made",
        "set the chunk weight of node1 to 2",
        "",
    ]
    assert told[1]["time_ns"] == 10**18
    cluster.answers["map.history"] = Unreachable("gone")
    told = run("cluster", "map", "--history", fails=Unreachable)
    assert told == (
        "no voter tells the history of the map: node1: connection refused; node2, node3: gone"
    )


# ------------------------------------------------------------------------------------ dfs node members


def member(number, role=METADATA, **more):
    return {
        "number": number, "role": role, "status": "alive", "since": 12.4, "boot": 3,
        "incarnation": 1, **more,
    }  # fmt: skip


def test_members_as_a_node_sees_them(cluster):
    vitals = {
        "heartbeat": 9, "map_epoch": 1, "disk_total": 2 << 30, "disk_free": 1 << 30, "load": 0.5
    }  # fmt: skip
    rows = (member(2, **vitals), member(3, CHUNK, status="dead"), member(77, status="left"))
    cluster.answers["node.members"] = lambda _address, _args: (rows,)
    title, header, *table = run("node", "members").splitlines()
    assert title == "as node1 sees it:"
    assert header.split()[:4] == ["node", "role", "status", "for"]
    found = [line.split() for line in table]
    assert found[0] == ["node2", "metadata", "alive", "12", "s", "3", "1", "9", "1", "0.5",
                        "1.0", "GiB"]  # fmt: skip
    assert found[1] == ["node3", "chunkserver", "dead", "12", "s", "3", "1", "-", "-", "-", "-"]
    assert found[2][0] == "(77)", "whom the map does not name"
    told = json.loads(run("node", "members", "node3", "--json"))
    assert told["witness"] == "node3"
    assert [m["node"] for m in told["members"]] == ["node2", "node3", "?"]
    assert told["members"][0]["load"] == 0.5


def test_members_are_asked_of_the_first_that_answers(cluster):
    cluster.answers["node.members"] = lambda _address, _args: ((),)
    cluster.down |= {cluster.address("node1"), cluster.address("node2")}
    assert run("node", "members").startswith("as node3 sees it:\n")
    told = run("node", "members", "node2", fails=Unreachable)
    assert told == "no node says who is alive: node2: connection refused"
    told = run("node", "members", "node9", fails=ConfigError)
    assert told == ("there is no metadata node node9; there are node1, node2, node3, node4")
    cluster.answers["node.members"] = Unreachable("gone")
    told = run("node", "members", fails=Unreachable)
    assert told == (
        "no node says who is alive: node1, node2: connection refused; node3, node4: gone"
    )
