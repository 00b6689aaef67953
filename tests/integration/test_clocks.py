"""Mounts whose wall clocks are wrong, as processes of their own."""

import os
import subprocess
import sys

import pytest
from localcluster import wait_gone

from dfs.mountinfo import mounts_at

pytestmark = [pytest.mark.realtime, pytest.mark.mount]

PROGRAM = """
import sys, time
from dfs.clock import SystemClock
ahead = int(sys.argv.pop(1)) * 3600 * 10**9
SystemClock.time_ns = lambda self: time.time_ns() + ahead
from fuse.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("hours", [-13, -1, 13, -400_000])
def test_a_mount_whose_clock_is_wrong_writes_what_others_read(shared_cluster, tmp_path, hours):
    cluster, volume = shared_cluster, f"v{hours}"
    cluster.dfs("volume", "create", volume)
    right = cluster.mount(volume, tmp_path / "right")
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    reader, writer = os.pipe()
    options = ["--cluster", cluster.dir / "cluster.json", "--volume", volume, "--ready-fd"]
    mount = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(hours), *map(str, options), str(writer), str(wrong)],
        pass_fds=(writer,),
        stderr=subprocess.DEVNULL,
    )
    os.close(writer)
    with os.fdopen(reader) as ready:
        assert ready.readline() == "ready\n"
    try:
        data = os.urandom(5 << 20)
        for place, name, other in ((wrong, "a", right), (right, "b", wrong)):
            with (place / name).open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            assert (other / name).read_bytes() == data
        behind = (right / "b").stat().st_mtime - (right / "a").stat().st_mtime
        assert -hours * 3600 <= behind < -hours * 3600 + 60
    finally:
        cluster.umount(wrong)
        cluster.umount(right)
        mount.wait(30)
    assert mount.returncode == 0
    wait_gone(mount.pid)
    assert not mounts_at(wrong)
