"""Containers out of namespaces, so that tests run the deployment files' own command lines.

A `Machine` is a network of its own with its own /etc/hosts: the names of services resolve to loopback
addresses.  A `Container` is a process in a root of its own: /usr and the environment of the tests are
what its image would have, volumes are bind mounts at the paths that the file says, and user,
capabilities, environment and read-only root are those of the file.  Needs root.  What is not as in a
real container: pids are shared, there is no cgroup and no seccomp filter, nothing plays tini, and all
containers of a machine share its network, so that nobody can listen on 0.0.0.0.
"""

import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
UID = 7400

_MACHINE = """
set -e
{python} - <<'PY'
import fcntl, socket, struct
s = socket.socket()
flags = 0x1 | 0x40  # up and running
fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", flags))
PY
mount --bind {hosts} /etc/hosts
mount -t tmpfs dfs {shared}
mount --make-shared {shared}
echo ready
exec cat
"""

_CONTAINER = """
set -e
R={root}
mount -t tmpfs -o mode=755 dfs $R
cd $R
mkdir -p usr proc dev sys etc tmp opt var/lib/dfs
for name in bin sbin lib lib32 lib64 libx32; do
    if [ -L /$name ]; then cp -a /$name .; elif [ -d /$name ]; then mkdir $name; mount --rbind /$name $name; fi
done
for name in usr proc dev sys; do mount --rbind /$name $name; done
for name in passwd group nsswitch.conf ld.so.cache fuse.conf hosts mtab; do
    if [ -e /etc/$name ]; then cp -P /etc/$name etc/; fi
done
mount -t tmpfs -o mode=1777 dfs tmp
chown {uid}:{uid} var/lib/dfs
"""


@dataclass(frozen=True)
class Volume:
    """What a container sees at `target`; propagation as Kubernetes names it."""

    source: Path
    target: str
    read_only: bool = False
    propagation: str = ""  # "", "Bidirectional" or "HostToContainer"

    def script(self):
        source, target = shlex.quote(str(self.source)), shlex.quote(f".{self.target}")
        if self.source.is_dir():
            yield f"mkdir -p {target}"
        else:
            yield f"mkdir -p {shlex.quote('.' + str(Path(self.target).parent))}; touch {target}"
        yield f"mount --rbind {source} {target}"
        if self.propagation != "Bidirectional":
            yield f"mount --make-r{'slave' if self.propagation else 'private'} {target}"
        if self.read_only:
            yield f"mount -o remount,bind,ro {target}"


@dataclass
class Container:
    """What to run, and in what surroundings."""

    command: list[str]
    volumes: list[Volume] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    uid: int = UID
    read_only: bool = False
    privileged: bool = False  # or whatever may mount


class Machine:
    """Where containers run; a context manager that leaves no process behind."""

    def __init__(self, base, names):
        """`names` are host names that must resolve, each to an address of its own."""
        self.base = Path(base)
        self.shared = self.base / "shared"  # a file system whose mounts propagate
        self.root = self.base / "root"
        for directory in (self.shared, self.root):
            directory.mkdir(parents=True)
        self.base.chmod(0o755)
        self.addresses = {name: f"127.7.4.{i}" for i, name in enumerate(names, 1)}
        hosts = self.base / "hosts"
        lines = ["127.0.0.1 localhost", *(f"{ip} {name}" for name, ip in self.addresses.items())]
        hosts.write_text("\n".join(lines) + "\n")
        hosts.chmod(0o644)
        self.processes = {}
        self.logs = self.base / "logs"
        self.logs.mkdir()
        script = _MACHINE.format(python=sys.executable, hosts=hosts, shared=self.shared)
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "--net", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        if self._holder.stdout.readline() != b"ready\n":
            self._holder.kill()
            raise RuntimeError("no namespaces here: these tests need root")

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
                process.wait()
        self._holder.stdin.close()
        self._holder.stdout.close()
        self._holder.wait(10)

    def arguments(self, c):
        """The command line that runs a container."""
        script = [_CONTAINER.format(root=self.root, uid=UID)]
        for volume in c.volumes:
            script += volume.script()
        # Last, because the checkout may lie below a path that a volume covers, such as /tmp.
        for place in sorted({REPO, Path(sys.prefix), Path(sys.base_prefix)}):
            if not place.is_relative_to("/usr"):
                script += Volume(place, str(place)).script()
        script.append(f"ln -s {shlex.quote(sys.prefix)} opt/dfs")
        if c.read_only:
            script.append("mount -o remount,ro $R")
        environment = [f"{k}={v}" for k, v in {**image_environment(), **c.environment}.items()]
        drop = [] if c.privileged else ["--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
        user = [f"--reuid={c.uid}", f"--regid={c.uid}", "--clear-groups"]
        script.append('exec chroot $R setpriv "$@"')
        return [
            *("nsenter", "--target", str(self._holder.pid), "--mount", "--net", "--"),
            *("unshare", "--mount", "--propagation", "unchanged", "--"),
            *("sh", "-c", "\n".join(script), "sh", *user, *drop, "--"),
            *("env", "--ignore-environment", "--chdir=/var/lib/dfs", *environment, *c.command),
        ]

    def run(self, container, *, check=True, timeout=60):
        """Run to the end; returns the CompletedProcess (text)."""
        try:
            done = subprocess.run(
                self.arguments(container),
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as e:
            said = f"{e.stdout!r} {e.stderr!r}"
            raise AssertionError(f"{container.command} hangs: {said}\n{self.words()}") from None
        if check and done.returncode:
            raise AssertionError(
                f"{container.command}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.words()}"
            )
        return done

    def start(self, name, container):
        """Start in the background; the log is `logs/NAME`."""
        with (self.logs / name).open("ab") as log:
            self.processes[name] = subprocess.Popen(
                self.arguments(container), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def stop(self, *names, sig=signal.SIGTERM, timeout=30):
        """Signal the processes of containers and wait for their ends; returns their statuses."""
        for name in names:
            self.processes[name].send_signal(sig)
        end = time.monotonic() + timeout
        # one that outlives its time is killed when the machine ends
        return {name: self._wait(name, end - time.monotonic()) for name in names}

    def _wait(self, name, timeout):
        try:
            status = self.processes[name].wait(max(timeout, 0))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} does not stop\n{self.words()}") from None
        del self.processes[name]
        return status

    def until(self, condition, what, timeout=30):
        """Wait for a condition; no container may end meanwhile."""
        end = time.monotonic() + timeout
        while not condition():
            ended = {n: p.returncode for n, p in self.processes.items() if p.poll() is not None}
            if ended or time.monotonic() > end:
                raise AssertionError(f"{what}: ended {ended}, or time is up\n{self.words()}")
            time.sleep(0.1)

    def words(self, lines=8):
        """The ends of all logs."""
        texts = [(p.name, p.read_text(errors="replace")) for p in sorted(self.logs.iterdir())]
        return "\n".join(
            f"== {name}\n" + "\n".join(t.splitlines()[-lines:]) for name, t in texts if t
        )


def image_environment():
    """The environment that the Dockerfile gives to every process."""
    text = (REPO / "deploy/docker/Dockerfile").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("ENV ")]
    pairs = dict(word.split("=", 1) for word in line.split()[1:])
    path = pairs["PATH"].replace("$PATH", "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    return {**pairs, "PATH": path, "HOME": "/var/lib/dfs", "PYTHONDONTWRITEBYTECODE": "1"}
