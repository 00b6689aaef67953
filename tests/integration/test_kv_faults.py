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
from pathlib import Path

import pytest
from kvload import Load, many
from localcluster import LocalCluster, free_ports, wait_gone, wait_until

from dfs.client.kv import KV

METADATA_ONLY = ("metadata",)
CONVERGED = 30.0  # seconds that homes are given to become equal


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Five metadata nodes; every test leaves them whole, and all they ever acknowledged in them."""
    c = LocalCluster(tmp_path_factory.mktemp("five"), 5, METADATA_ONLY)
    try:
        yield c.init().up()
    finally:
        c.destroy()


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
