"""Mounts as processes: starting `python -m fuse`, finding what is mounted, unmounting."""

import contextlib
import errno
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import click

from dfs.cli.local import ClusterDir, Process, locked, spawn, stop
from dfs.errors import ConfigError, DfsError
from dfs.mountinfo import mounts_at

KIND = "fuse.dfs"  # what the kernel calls our mounts
LAZY_PATIENCE = 2.0  # seconds in which a detached mount ends if nothing uses it
LINKS = 40  # symbolic links that are followed, as in the kernel
NAMES_TIMEOUT = 10.0  # seconds for another command to take a name, which is a matter of moments
READY_TIMEOUT = 60.0  # seconds a mount may take
_MODULE = ("-m", "fuse")


def start_mount(
    file: Path, volume: str, where: Path, options: list[str], pid_file: Path | None
) -> int:
    """Mount in a process of its own and wait until it serves; returns its pid.

    Raises `DfsError` with the reason when the mount ends instead.
    """
    directory = _place(file)
    reader, writer = os.pipe()
    try:
        arguments = ["--cluster", str(file.absolute()), "--volume", volume, *options]
        arguments += ["--ready-fd", str(writer), str(where)]
        with _names(directory):
            process = _process(directory, volume, pid_file)
            child = spawn(process, arguments, pass_fds=(writer,))
            process.pid_file.with_suffix(".mountpoint").write_text(f"{where}\n")
        os.close(writer)
        writer = -1
        said = _wait_ready(reader, child)
    finally:
        os.close(reader)
        if writer >= 0:
            os.close(writer)
    if said == "ready":
        return child.pid
    with _names(directory):
        if process.pid() in (child.pid, None):  # else the name is another mount's by now
            _forget(process)
    if child.poll() is None:
        child.terminate()
    reason = said.removeprefix("error: ") or f"no answer, see {process.log}"
    raise DfsError(f"mounting {volume} on {where} failed: {reason}")


def check_mount_point(where: Path) -> Path:
    """The absolute mount point; raises `ConfigError` if nothing can be mounted there."""
    path = canonical(where)
    mounted = mounts_at(path)
    if mounted:
        if not any(_mount_point(pid) == str(path) for pid in _pids()) and _is_dead(path):
            raise ConfigError(
                f"{path} holds a dead mount whose process has ended: `dfs umount {path}` removes it"
            )
        how = "dfs umount" if mounted[-1].kind == KIND else "umount"
        raise ConfigError(
            f"{path} has {mounted[-1]} mounted on it already: "
            f"`{how} {path}` first, or choose another directory"
        )
    if not path.exists():
        raise ConfigError(f"mount point {path} does not exist: mkdir {path}")
    if not path.is_dir():
        raise ConfigError(f"mount point {path} is no directory")
    if any(path.iterdir()):
        raise ConfigError(
            f"mount point {path} is not empty, and a mount would hide what is in it: "
            "choose an empty directory"
        )
    return path


def _is_dead(path: Path) -> bool:
    """Whether nobody serves a FUSE mount any more; must not be called while somebody does."""
    try:
        os.statvfs(path)  # unlike attributes, nothing that the kernel would remember
    except OSError as e:
        return e.errno == errno.ENOTCONN
    return False


def canonical(path: Path) -> Path:
    """The path without symbolic links, without a look at what is mounted there.

    `Path.resolve` asks for its attributes, and a mount without a quorum answers in half a minute.
    """
    path = Path(os.path.abspath(path))  # noqa: PTH100 - see above
    for _ in range(LINKS):
        if mounts_at(path):
            break
        path = path.parent.resolve() / path.name
        if mounts_at(path):
            break
        try:
            target = path.readlink()
        except OSError:  # no link: this is it
            break
        path = Path(os.path.abspath(path.parent / target))  # noqa: PTH100 - see above
    return path


def unmount(path: Path, *, lazy: bool = False) -> None:
    """Unmount and wait until the mount's process has ended; raises `DfsError`.

    `lazy`: detach it even if files are open.  Its process ends after the last of them, whenever
    that is, so it is not waited for.
    """
    path = canonical(path)
    pids = [pid for pid in _pids() if _mount_point(pid) == str(path)]
    mounted = mounts_at(path)
    if not mounted:
        raise ConfigError(f"nothing is mounted on {path}")
    if mounted[-1].kind != KIND:
        raise ConfigError(
            f"what is mounted on {path} is not of dfs, but {mounted[-1]}: "
            f"`umount {path}` unmounts it"
        )
    # Without -c it looks at the path first, which takes as long as a mount waits for a quorum.
    logs = [log for log in map(_log, pids) if log is not None]
    command = ["umount", "-c"] if os.geteuid() == 0 else ["fusermount3", "-u"]
    if lazy:
        command.append("-l" if os.geteuid() == 0 else "-z")
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is not installed: install the package fuse3")
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)  # noqa: S603 - the system's own umount
    if done.returncode:
        text = " ".join(done.stderr.split())
        if "busy" in text:
            raise DfsError(
                f"{path} is busy: close what uses it (`fuser -vm {path}` shows what), "
                "or detach it with `dfs umount --lazy`"
            )
        raise DfsError(text or f"{command[0]} {path} failed with status {done.returncode}")
    end = time.monotonic() + (LAZY_PATIENCE if lazy else READY_TIMEOUT)
    # One that is mounted beneath, or was detached while files were open, goes on.
    while pids and all(_alive(pid) for pid in pids):
        if time.monotonic() > end:
            if lazy:
                who = ", ".join(map(str, pids))
                click.echo(
                    f"dfs: {path} is detached; process {who} commits what is still written and ends"
                    " when the last file is closed",
                    err=True,
                )
                return
            raise DfsError(f"{path} is unmounted, but its process {pids} does not end")
        time.sleep(0.02)
    for log, before in logs:
        said = log.read_bytes()[before:].decode(errors="replace").strip().rpartition("\n")[2]
        if said.startswith("error: "):
            raise DfsError(
                f"{path} is unmounted, but what was written there last is not in the cluster:"
                f" {said.removeprefix('error: ')}"
            )


def unmount_all(directory: ClusterDir) -> None:
    """Unmount everything that was mounted from a cluster directory."""
    for process, where in directory.mounts():
        if any(mount.kind == KIND for mount in mounts_at(where)[-1:]):
            try:
                unmount(Path(where))
            except DfsError as e:
                if mounts_at(Path(where)):
                    click.echo(f"dfs: {e}; unmounting {where} lazily", err=True)
                    unmount(Path(where), lazy=True)
                else:
                    click.echo(f"dfs: {e}", err=True)
            click.echo(f"unmounted {where}")
        stop([process])
        _forget(process)


def forget_dead(file: Path) -> None:
    """Remove pid files of mounts of a cluster whose processes have ended."""
    directory = _place(file)
    if not directory.run.is_dir():
        return
    with _names(directory):
        for process, _ in directory.mounts():
            if process.pid() is None:
                _forget(process)


def _place(file: Path) -> ClusterDir:
    """Where pid files and logs go: next to the cluster file, or to the user's own place."""
    directory = ClusterDir.of_file(file.absolute())
    if os.access(directory.path, os.W_OK):
        return directory
    return ClusterDir(Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache") / "dfs")


@contextlib.contextmanager
def _names(directory: ClusterDir) -> Iterator[None]:
    """Only one command at a time takes or gives up names of mounts, which is done in moments."""
    directory.run.mkdir(parents=True, exist_ok=True)
    with locked(directory.run, NAMES_TIMEOUT, "`dfs mount` or `umount`"):
        yield


def _process(directory: ClusterDir, volume: str, pid_file: Path | None) -> Process:
    """A name that no running mount has: mount-VOLUME, mount-VOLUME-2, ..."""
    stem = "mount-" + re.sub(r"[^A-Za-z0-9_.-]", "_", volume)
    number = 1
    while True:
        name = stem if number == 1 else f"{stem}-{number}"
        file = pid_file or directory.run / f"{name}.pid"
        process = Process(name, file, _MODULE, directory.log / f"{name}.log")
        if process.pid() is None:
            return process
        if pid_file is not None:
            raise ConfigError(f"the process of {pid_file} runs already")
        number += 1


def _wait_ready(reader: int, child: subprocess.Popen[bytes]) -> str:
    """The line that the mount wrote when it was ready or failed; "" if it ended or time is up."""
    end = time.monotonic() + READY_TIMEOUT
    line = b""
    while time.monotonic() < end and not line.endswith(b"\n"):
        readable, _, _ = select.select([reader], [], [], 0.1)
        if readable:
            part = os.read(reader, 4096)
            if not part:
                break
            line += part
        elif child.poll() is not None:
            break
    return line.decode(errors="replace").strip()


def _forget(process: Process) -> None:
    process.pid_file.unlink(missing_ok=True)
    process.pid_file.with_suffix(".mountpoint").unlink(missing_ok=True)


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]


def _mount_point(pid: int) -> str | None:
    """The mount point of a mount process of ours, from its command line; None for any other."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:-1]
    except OSError:
        return None
    for i in range(len(arguments) - 2):
        if arguments[i : i + 2] == [b"-m", b"fuse"]:
            return os.fsdecode(arguments[-1])
    return None


def _log(pid: int) -> tuple[Path, int] | None:
    """The file that a mount's standard error goes to, if it is one, and its size now."""
    try:
        path = Path(f"/proc/{pid}/fd/2").readlink()
        return (path, path.stat().st_size) if path.is_file() else None
    except OSError:
        return None


def _alive(pid: int) -> bool:
    return _mount_point(pid) is not None
