"""Unmounting, without a kernel: what is told when a mount's process ends badly, or not at all."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dfs.cli import mounts
from dfs.errors import ConfigError, DfsError
from dfs.mountinfo import Mount as Mounted

MOUNTED = Mounted("0:45", "/m", "fuse.dfs", "dfs:v")


class Mount:
    """A mount's process that says something and ends when it is unmounted."""

    def __init__(self, path, monkeypatch, said, ends=True):
        self.path, self.said, self.ends, self.commands = path / "m", said, ends, []
        self.log = path / "mount.log"
        self.log.write_text("error: of the mount before\nserving\n")
        with self.log.open("a") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=stderr
            )
        monkeypatch.setattr(mounts, "_pids", lambda: [self.process.pid])
        monkeypatch.setattr(mounts, "_mount_point", self.mount_point)
        monkeypatch.setattr(mounts, "canonical", lambda path: path)
        monkeypatch.setattr(mounts, "mounts_at", lambda _: [MOUNTED])
        monkeypatch.setattr(subprocess, "run", self.run)

    def mount_point(self, _pid):
        return None if self.process.poll() is not None else str(self.path)

    def run(self, command, **_):
        self.commands.append(command)
        if self.ends:
            with self.log.open("a") as log:
                log.write(self.said)
            self.process.communicate(b"\n")
        return subprocess.CompletedProcess(command, 0, "", "")

    def close(self):
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def mount(tmp_path, monkeypatch):
    made = []

    def make(*args, **kw):
        made.append(Mount(tmp_path, monkeypatch, *args, **kw))
        return made[-1]

    yield make
    for m in made:
        m.close()


def test_what_is_not_in_the_cluster_is_told(mount):
    m = mount("flushing\nerror: no space left: 3 of 3; make room\n")
    with pytest.raises(DfsError, match="is unmounted, but what was written there last is not in"):
        mounts.unmount(m.path)
    assert m.commands[0][-1] == str(m.path)


@pytest.mark.parametrize("said", ["unmounted\n", "", "error: of a flush\nunmounted\n"])
def test_a_good_end_is_none_of_an_earlier_mount(mount, said):
    mounts.unmount(mount(said).path)


def test_who_holds_files_is_not_waited_for_when_it_is_detached(mount, monkeypatch, capsys):
    monkeypatch.setattr(mounts, "LAZY_PATIENCE", 0.1)
    m = mount("", ends=False)
    began = time.monotonic()
    mounts.unmount(m.path, lazy=True)
    assert time.monotonic() - began < 10
    assert f"is detached; process {m.process.pid} commits" in capsys.readouterr().err
    monkeypatch.setattr(mounts, "READY_TIMEOUT", 0.1)
    with pytest.raises(DfsError, match=r"its process .* does not end"):
        mounts.unmount(m.path)


def test_nothing_to_unmount(tmp_path):
    with pytest.raises(ConfigError, match="nothing is mounted on"):
        mounts.unmount(tmp_path)


def test_what_others_have_mounted_is_named_and_left_alone(monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    with pytest.raises(ConfigError, match=r"not of dfs, but proc \(proc\): `umount /proc`"):
        mounts.unmount(Path("/proc"))
    with pytest.raises(ConfigError, match=r"proc \(proc\) mounted on it already: `umount /proc`"):
        mounts.check_mount_point(Path("/proc"))


def test_one_that_is_mounted_beneath_is_not_waited_for(mount, monkeypatch):
    m = mount("")
    monkeypatch.setattr(mounts, "_pids", lambda: [1, m.process.pid])
    monkeypatch.setattr(
        mounts, "_mount_point", lambda pid: str(m.path) if pid == 1 else m.mount_point(pid)
    )
    mounts.unmount(m.path)


def test_links_are_followed_up_to_what_is_mounted(tmp_path, monkeypatch):
    (tmp_path / "real" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "to_m").symlink_to("link/m")
    (tmp_path / "loop").symlink_to("loop")
    looked = []
    wanted = tmp_path.resolve() / "real" / "m"
    monkeypatch.setattr(mounts, "mounts_at", lambda path: [MOUNTED] if path == wanted else [])
    for name in ("stat", "lstat"):
        real = getattr(os, name)
        monkeypatch.setattr(
            os, name, lambda path, *a, real=real, **kw: looked.append(path) or real(path, *a, **kw)
        )
    for path in ("to_m", "link/m", "real/m", "real/../link/m"):
        assert mounts.canonical(tmp_path / path) == wanted
    assert looked
    assert wanted not in map(Path, looked)
    monkeypatch.undo()
    assert mounts.canonical(tmp_path / "none" / "x") == tmp_path.resolve() / "none" / "x"
    assert mounts.canonical(tmp_path / "loop").name == "loop"
