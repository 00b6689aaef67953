"""Worker processes: results, errors, death, cancellation; nobody outlives the parent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pytest
import trio

from dfs.errors import DfsError, NotFound
from dfs.rpc.processes import WorkerProcesses
from dfs.testing.processes import SimProcesses


def make_module(tmp_path, monkeypatch):
    (tmp_path / "jobs_for_test.py").write_text(
        "import os, sys, time, trio\n"
        "from dfs.errors import NotFound\n"
        "def add(a, b):\n    print('noise')\n    return a + b\n"
        "async def sleepy(x):\n    await trio.sleep(0.01)\n    return (x, os.getpid())\n"
        "def fail():\n    raise NotFound('no such thing', 7)\n"
        "def odd():\n    return object()\n"
        "def die():\n    os._exit(3)\n"
        "def hang():\n    time.sleep(1000)\n"
        "def nice():\n    return os.nice(0)\n"
        "def size(data):\n    return len(data)\n"
        "def keep(count):\n    sys.kept = bytearray(b'x') * count\n    return os.getpid()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.realtime
async def test_jobs(tmp_path, monkeypatch):
    make_module(tmp_path, monkeypatch)
    monkeypatch.chdir("/")
    async with WorkerProcesses(count=1) as processes:
        assert await processes.run("jobs_for_test:add", 1, 2) == 3
        value, pid = await processes.run("jobs_for_test:sleepy", b"x")
        assert value == b"x"
        assert pid != os.getpid()
        with pytest.raises(NotFound, match="no such thing") as caught:
            await processes.run("jobs_for_test:fail")
        assert caught.value.details == (7,)
        with pytest.raises(DfsError, match="TypeError"):
            await processes.run("jobs_for_test:odd")
        with pytest.raises(DfsError, match="absent"):
            await processes.run("jobs_for_test:absent")
        assert await processes.run("jobs_for_test:nice") >= 10
        assert await processes.run("jobs_for_test:size", bytes(5 << 20)) == 5 << 20
        assert processes.statistics()["started"] == 1
        with pytest.raises(DfsError, match="died: exit status 3"):
            await processes.run("jobs_for_test:die")
        _, second = await processes.run("jobs_for_test:sleepy", 1)
        assert second != pid
        os.kill(second, signal.SIGKILL)  # dies while idle: replaced unnoticed
        await trio.sleep(0.1)
        assert await processes.run("jobs_for_test:add", 1, 2) == 3
        with trio.move_on_after(0.2) as scope:
            await processes.run("jobs_for_test:hang")
        assert scope.cancelled_caught
        async with trio.open_nursery() as nursery:
            for i in range(5):
                nursery.start_soon(processes.run, "jobs_for_test:add", i, i)
        assert processes.statistics()["started"] == 4
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.realtime
async def test_a_child_that_has_become_large_is_not_kept(tmp_path, monkeypatch):
    make_module(tmp_path, monkeypatch)
    async with WorkerProcesses(count=1) as processes:
        small = await processes.run("jobs_for_test:keep", 1 << 20)
        large = await processes.run("jobs_for_test:keep", 100 << 20)
        assert large == small
        assert not os.path.exists(f"/proc/{large}")  # noqa: ASYNC240 - no disk
        assert await processes.run("jobs_for_test:keep", 1) != large
        assert processes.statistics() == {"jobs": 3, "started": 2, "idle": 1}


@pytest.mark.realtime
async def test_one_child_waits_for_the_next_job(tmp_path, monkeypatch):
    make_module(tmp_path, monkeypatch)
    async with WorkerProcesses(count=2) as processes:
        pids = []

        async def job():
            pids.append((await processes.run("jobs_for_test:sleepy", 1))[1])

        async with trio.open_nursery() as nursery:
            nursery.start_soon(job)
            nursery.start_soon(job)
        assert len(set(pids)) == 2
        assert processes.statistics() == {"jobs": 2, "started": 2, "idle": 1}
        left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]  # noqa: ASYNC240 - no disk
        await job()
        assert pids[2:] == left


def test_children_die_with_their_parent(tmp_path, monkeypatch):
    make_module(tmp_path, monkeypatch)
    root = Path(__file__).parents[3]
    code = (
        "import sys, trio\n"
        f"sys.path[:0] = [{str(tmp_path)!r}, {str(root)!r}]\n"
        "from dfs.rpc.processes import WorkerProcesses\n"
        "async def main():\n"
        "    p = WorkerProcesses(2)\n"
        "    a = await p.run('jobs_for_test:sleepy', 1)\n"
        "    print(a[1], flush=True)\n"
        "    await p.run('jobs_for_test:hang')\n"
        "trio.run(main)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        child = int(parent.stdout.readline())
        time.sleep(0.1)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":  # dead; whoever adopted it has not reaped it yet
            return
        time.sleep(0.05)
    pytest.fail(f"child {child} outlives its parent")


async def test_simulated(tmp_path, monkeypatch):
    make_module(tmp_path, monkeypatch)
    processes = SimProcesses(Random(1), delay=5)
    start = trio.current_time()
    assert await processes.run("jobs_for_test:add", 1, 2) == 3
    assert trio.current_time() > start
    assert (await processes.run("jobs_for_test:sleepy", [1]))[0] == (1,)
    with pytest.raises(NotFound, match="no such thing"):
        await processes.run("jobs_for_test:fail")
    with pytest.raises(TypeError):
        await processes.run("jobs_for_test:odd")
    processes.fail_next()
    with pytest.raises(DfsError, match="died"):
        await processes.run("jobs_for_test:add", 1, 2)
