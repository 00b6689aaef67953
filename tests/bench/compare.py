#!/usr/bin/env python3
"""Runs the workloads on a fresh dfs mount and on the local disk beside it, and prints a table.

    .venv/bin/python tests/bench/compare.py [--only a,b] [--skip a,b] [--runs N] [--dir DIR] [--json FILE]

A three-node cluster is made below DIR (default: a temporary directory on the same disk), mounted with
default options, measured and removed.  In every run the local disk and dfs take turns, so that a slow
moment of the machine hits both; the table shows the median of each and dfs / local disk.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from localcluster import ROLES, LocalCluster

SLOW_IS_BIG = {"git"}  # rate is seconds: lower is better


def run_workload(target, peer, run, options, extra=()):
    cmd = [
        sys.executable,
        HERE / "workload.py",
        target,
        "--peer",
        peer,
        "--run",
        str(run),
        *extra,
        *options,
    ]
    done = subprocess.run(list(map(str, cmd)), capture_output=True, text=True, check=False)
    rows = []
    for line in done.stdout.splitlines():
        row = json.loads(line)
        if not row["w"].startswith("_"):
            rows.append(row)
            shown = row.get("rate", row.get("error") or row.get("skip"))
            print(
                f"  {peer:6} {row['w']:20} {shown} {row.get('unit', '')}",
                file=sys.stderr,
                flush=True,
            )
    if done.returncode:
        print(done.stderr, file=sys.stderr)
    return rows


def dfs_run(base, run, options):
    cluster = LocalCluster(base)
    cli = f"{sys.executable} -m dfs.cli.main"
    try:
        cluster.init().up()
        cluster.dfs("volume", "create", "bench")
        mnt = cluster.mount("bench", base / "mnt")
        pids = base / "pids.sh"
        pids.write_text(f"#!/bin/sh\ncat {cluster.dir}/run/*.pid\n")
        remount = base / "remount.sh"
        remount.write_text(
            f"#!/bin/sh\nset -e\nexport DFS_CLUSTER={cluster.dir}/cluster.json\n{cli} umount {mnt}\n{cli} mount bench {mnt}\n"
        )
        for f in (pids, remount):
            f.chmod(0o755)
        return run_workload(mnt, "dfs", run, options, ["--pids", pids, "--remount", remount])
    finally:
        for m in cluster.mounts:
            cluster.dfs("umount", m, check=False)
        for n in cluster.nodes:
            for r in ROLES:
                if (cluster.dir / "run" / f"{n}-{r}.pid").exists():
                    cluster.kill(n, [r])
        cluster.destroy()


def table(rows):
    by = {}
    for r in rows:
        by.setdefault(r["w"], {}).setdefault(r["peer"], []).append(r)
    out = [
        "| workload | unit | local disk | dfs | dfs / local | dfs CPU s | dfs RSS MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for w, peers in by.items():
        med = {}
        for peer, rs in peers.items():
            rates = [r["rate"] for r in rs if r.get("rate") is not None]
            med[peer] = statistics.median(rates) if rates else None
        unit = next((r["unit"] for rs in peers.values() for r in rs if "unit" in r), "")
        ours, local = med.get("dfs"), med.get("local")
        errors = [
            r.get("error") or r.get("skip")
            for r in peers.get("dfs", [])
            if "error" in r or "skip" in r
        ]
        ratio = f"{ours / local:.3f}" if ours and local else "-"
        note = " (lower is better)" if w in SLOW_IS_BIG else ""
        cpu = statistics.median([r.get("daemon_cpu_s", 0) for r in peers.get("dfs", [{}])])
        rss = max([r.get("rss_mib", 0) for r in peers.get("dfs", [{}])])
        shown = f"{ours:,.1f}" if ours else (errors[0] if errors else "-")
        out.append(
            f"| {w}{note} | {unit} | {local:,.1f} | {shown} | {ratio} | {cpu} | {rss} |"
            if local
            else f"| {w}{note} | {unit} | - | {shown} | - | {cpu} | {rss} |"
        )
    return "\n".join(out)


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--only", default="")
    ap.add_argument("--skip", default="")
    ap.add_argument("--runs", type=int, default=1)
    ap.add_argument("--dir", type=Path, default=None)
    ap.add_argument("--json", type=Path, default=None)
    ap.add_argument("--no-local", action="store_true", help="only dfs")
    a = ap.parse_args()
    options = [*(["--only", a.only] if a.only else []), *(["--skip", a.skip] if a.skip else [])]
    base = Path(tempfile.mkdtemp(prefix="dfs-bench-", dir=a.dir))
    rows = []
    try:
        for run in range(1, a.runs + 1):
            if not a.no_local:
                (base / "local").mkdir(exist_ok=True)
                rows += run_workload(base / "local", "local", run, options, ["--remount", "true"])
                shutil.rmtree(base / "local")
            rows += dfs_run(base / f"dfs{run}", run, options)
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if a.json:
        a.json.write_text("\n".join(map(json.dumps, rows)) + "\n")
    print(f"{os.cpu_count()} CPUs, Linux {os.uname().release}, median of {a.runs} run(s)\n")
    print(table(rows))


if __name__ == "__main__":
    main()
