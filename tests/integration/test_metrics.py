"""Metrics and background loops of a real cluster."""

import json
import urllib.request

from prometheus_client.parser import text_string_to_metric_families


def scrape(address, path="/metrics"):
    with urllib.request.urlopen(f"http://{address}{path}", timeout=10) as answer:
        return answer.read().decode()


def test_every_daemon_is_scraped(shared_cluster):
    c = shared_cluster
    report = json.loads(c.dfs("cluster", "status", "--json").stdout)
    seen = set()
    for node in report["nodes"]:
        for program, role in node["roles"].items():
            assert role["metrics"].startswith("127.0.0.1:")
            assert scrape(role["metrics"], "/healthz") == "ok\n"
            found = {f.name: f for f in text_string_to_metric_families(scrape(role["metrics"]))}
            seen.add(role["metrics"])
            common = {
                "dfs_map_epoch",
                "dfs_map_phase",
                "dfs_partitions",
                "dfs_disk_free_bytes",
                "dfs_disk_total_bytes",
                "dfs_disk_level",
                "dfs_fsync_seconds",
                "dfs_rpc_requests",
                "dfs_worker_rounds",
                "process_cpu_seconds",
            }
            assert common <= set(found)
            own = "dfs_lsm_bytes" if program == "metadata" else "dfs_chunks"
            assert own in found
            assert found["dfs_map_epoch"].samples[0].value == role["map_epoch"]
            methods = {s.labels["method"]: s.value for s in found["dfs_rpc_requests"].samples}
            assert methods["node.status"] >= 1
            for family in found.values():
                assert family.documentation or family.name.startswith("python_")
    assert len(seen) == 6
    plain = c.dfs("cluster", "status").stdout
    assert all(address in plain for address in seen)


def test_loops_are_listed_and_steered(shared_cluster):
    c = shared_cluster
    listed = json.loads(c.dfs("node", "workers", "--json").stdout)
    assert len(listed) == 6
    names = {(e["role"], w["name"]) for e in listed for w in e["workers"]}
    for wanted in ("catch-up", "hand-over", "scrub", "repair"):
        assert ("chunkserver", wanted) in names
    for wanted in ("store-flush", "store-merge", "journal-log", "checkpoint"):
        assert ("metadata", wanted) in names
    node = listed[0]["node"]
    text = c.dfs("node", "workers", node).stdout
    assert "scrub" in text
    assert "paused" in c.dfs("node", "workers", node, "--pause", "scrub").stdout
    assert "paused" in c.dfs("node", "workers", node).stdout
    assert "waiting" in c.dfs("node", "workers", node, "--resume", "scrub").stdout
    c.dfs("node", "workers", node, "--run", "catch-up")
    for args, said in (
        ((node, "--run", "nonsense"), "has no such loop"),
        ((node, "--pause", "store-merge"), "cannot be steered"),
        (("nobody",), "there is no node nobody"),
        (("--run", "scrub"), "say which NODE"),
    ):
        failed = c.dfs("node", "workers", *args, check=False)
        assert failed.returncode != 0
        assert said in failed.stderr
