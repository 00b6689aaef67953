"""The command lines of the Compose file and the Kubernetes manifests, run as they are written.

Everything a container would be given, from arguments to user and mounts, is read out of the files;
see `containers` for what differs from real ones.
"""

import os
import re
import shlex
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from containers import REPO, UID, Container, Machine, Volume

pytestmark = [pytest.mark.realtime, pytest.mark.mount]

DEPLOY = REPO / "deploy"
TEXT = b"one copy is no copy\n" * 10_000


def host(address):
    return re.fullmatch(r"tcp://([^:/]+):\d+", address)[1]


def spec_hosts(path):
    nodes = yaml.safe_load(path.read_text())["nodes"]
    return [host(n[k]) for n in nodes for k in ("metadata_addr", "chunk_addr") if k in n]


# -------------------------------------------------------------------------------------- Compose


class Compose:
    """Makes containers of the services of compose.yaml."""

    def __init__(self, machine):
        self.machine = machine
        self.file = yaml.safe_load((DEPLOY / "docker/compose.yaml").read_text())

    def container(self, name, command=None):
        service = self.file["services"][name]
        # containers of this machine share one network: each listens on its own address of it
        command = command or [
            word.replace("$$", "$").replace("0.0.0.0:", f"{name}:") for word in service["command"]
        ]
        return Container(
            command,
            [self._volume(v) for v in service.get("volumes", [])],
            service.get("environment", {}),
            uid=int(service.get("user", str(UID)).split(":")[0]),
            read_only=service.get("read_only", False),
            privileged="SYS_ADMIN" in service.get("cap_add", []) or not service.get("cap_drop"),
        )

    def _volume(self, volume):
        if isinstance(volume, dict):
            assert volume["bind"]["propagation"] == "rshared"
            return Volume(self.machine.shared, volume["target"], propagation="Bidirectional")
        source, target, *mode = volume.split(":")
        if source.startswith("."):
            path = DEPLOY / "docker" / source
        else:
            assert source in self.file["volumes"]
            path = self.machine.base / "volumes" / source
            path.mkdir(parents=True, exist_ok=True)
        return Volume(path, target, read_only=mode == ["ro"])

    def cli(self, *command, **kw):
        return self.machine.run(self.container("cli", list(command)), **kw)


def test_compose(tmp_path):
    with Machine(tmp_path / "machine", spec_hosts(DEPLOY / "docker/cluster.yaml")) as machine:
        compose = Compose(machine)
        first = machine.run(compose.container("init")).stdout
        assert "made cluster" in first
        again = machine.run(compose.container("init")).stdout
        assert "made" not in again
        assert again.count("is ready for node") == 6

        # nobody is ordered before the bootstrap, which waits
        daemons = [n for n in compose.file["services"] if re.match(r"node\d-", n)]
        assert len(daemons) == 6
        for name in daemons:
            machine.start(name, compose.container(name))
        assert "made the system volume" in machine.run(compose.container("bootstrap")).stdout
        again = machine.run(compose.container("bootstrap")).stdout
        assert "has its system volume" in again

        assert "photos" in compose.cli("dfs", "volume", "create", "photos").stdout
        status = machine.run(compose.container("cli")).stdout
        assert "photos" in status
        # the container's root is read-only: what the command line writes goes to pipes
        sh = "head -c 3000000 /dev/urandom > /tmp/a && dfs put /tmp/a photos:/a && dfs get photos:/a - | cmp - /tmp/a"
        compose.cli("sh", "-ec", sh)

        # the mount container waits for no one either; a machine's shell and pods see its mount
        compose.cli("dfs", "volume", "create", "default")
        machine.start("mount", compose.container("mount"))
        shell = lambda script: see(machine, script)  # noqa: E731 - short, and used next to it only
        machine.until(lambda: shell("mountpoint -q /see/fs").returncode == 0, "mount")
        assert shell("echo hello > /see/fs/a").returncode == 0
        assert compose.cli("dfs", "cat", "default:/a").stdout == "hello\n"
        assert machine.stop("mount") == {"mount": 0}
        assert shell("mountpoint -q /see/fs").returncode != 0

        # a daemon that is killed comes back over its own data
        machine.stop("node1-metadata", sig=signal.SIGKILL)
        assert compose.cli("dfs", "cat", "default:/a").stdout == "hello\n"
        machine.start("node1-metadata", compose.container("node1-metadata"))
        log = machine.logs / "node1-metadata"
        machine.until(lambda: log.read_text().count("INFO dfs.daemon: serving") == 2, "recovery")
        assert set(machine.stop(*daemons).values()) == {0}


def see(machine, script):
    """Run a script in a pod that has the shared directory at /see, as Kubernetes would give it."""
    pod = Container(
        ["sh", "-c", script],
        [Volume(machine.shared, "/see", propagation="HostToContainer")],
        uid=0,
    )
    return machine.run(pod, check=False)


# ----------------------------------------------------------------------------------- Kubernetes


class Kubernetes:
    """Makes containers of the pods of the manifests."""

    def __init__(self, machine, config):
        self.machine = machine
        self.config = config  # what the ConfigMap holds

    def objects(self, file):
        return [d for d in yaml.safe_load_all((DEPLOY / "k8s" / file).read_text()) if d]

    def template(self, file, kind):
        (found,) = [d for d in self.objects(file) if d["kind"] == kind]
        return found["spec"]["template"]["spec"]

    def container(self, pod, template, container):
        context = {**template.get("securityContext", {}), **container.get("securityContext", {})}
        privileged = context.get("privileged", False)
        assert privileged or context["capabilities"] == {"drop": ["ALL"]}
        assert "command" not in container  # it would replace the image's tini
        # containers of this machine share one network: each listens on its own address of it
        own = f"{pod}.{pod.rpartition('-')[0]}.dfs.svc"
        words = [
            word.replace("$(POD_NAME)", pod).replace("0.0.0.0:", f"{own}:")
            for word in container["args"]
        ]
        volumes = {v["name"]: v for v in template.get("volumes", [])}
        mounts = [self._mount(pod, m, volumes) for m in container["volumeMounts"]]
        return Container(
            words,
            [m for m in mounts if m is not None],
            uid=context.get("runAsUser", UID),
            read_only=context.get("readOnlyRootFilesystem", False),
            privileged=privileged,
        )

    def _mount(self, pod, mount, volumes):
        volume = volumes.get(mount["name"], {})
        if "configMap" in volume:
            source = self.config
        elif volume.get("hostPath", {}).get("type") == "CharDevice":
            return None  # containers of ours have all devices
        elif "hostPath" in volume:
            source = self.machine.shared
        else:
            source = self.machine.base / "volumes" / f"{mount['name']}-{pod}"
            if not source.exists():
                source.mkdir(parents=True)
                os.chown(source, 0, UID)  # what fsGroup asks for
                source.chmod(0o2775)
            if mount["mountPath"] == "/tmp":
                source.chmod(0o1777)
        return Volume(
            source,
            mount["mountPath"],
            read_only=mount.get("readOnly", False),
            propagation=mount.get("mountPropagation", ""),
        )


@pytest.fixture
def generated(tmp_path):
    """A ConfigMap with what `dfs cluster init --spec` makes, by the command of deploy/README.md."""
    with Machine(tmp_path / "admin", []) as admin:
        (tmp_path / "out").mkdir()
        init = ["dfs", "cluster", "init", "--spec", "/in/cluster.yaml", "--dir", "/out/generated"]
        volumes = [Volume(DEPLOY / "k8s/base", "/in"), Volume(tmp_path / "out", "/out")]
        said = admin.run(Container(init, volumes, uid=0)).stdout
    assert "6 nodes" in said
    config = tmp_path / "config"
    config.mkdir()
    kustomization = yaml.safe_load((DEPLOY / "k8s/base/kustomization.yaml").read_text())
    for file in kustomization["configMapGenerator"][0]["files"]:
        copy = config / Path(file).name
        shutil.copyfile(tmp_path / "out" / file, copy)
        copy.chmod(0o644)
    return config


def test_kubernetes(tmp_path, generated):
    names = spec_hosts(DEPLOY / "k8s/base/cluster.yaml")
    with Machine(tmp_path / "machine", names) as machine:
        k8s = Kubernetes(machine, generated)
        roles = {
            role: k8s.template(f"base/{role}.yaml", "StatefulSet")
            for role in ("metadata", "chunkserver")
        }
        pods = [(f"{role}-{i}", template) for role, template in roles.items() for i in range(3)]

        def start(pod, template):
            for init in template["initContainers"]:
                machine.run(k8s.container(pod, template, init))
            (container,) = template["containers"]
            machine.start(pod, k8s.container(pod, template, container))

        # the disk of another pod is refused, a disk of one's own is left as it is
        format_ = roles["metadata"]["initContainers"][0]
        mine = k8s.container("metadata-0", roles["metadata"], format_)
        machine.run(mine)
        assert "is ready for metadata-0 already" in machine.run(mine).stdout
        theirs = k8s.container("metadata-1", roles["metadata"], format_)
        theirs.volumes = mine.volumes
        refused = machine.run(theirs, check=False)
        assert refused.returncode == 1
        assert "belongs to node 1" in refused.stderr
        wrong = k8s.container("metadata-0", roles["metadata"], format_)
        wrong.command = [w.replace("metadata-0", "chunkserver-0") for w in wrong.command]
        assert "has no metadata role" in machine.run(wrong, check=False).stderr

        with ThreadPoolExecutor() as together:
            list(together.map(start, *zip(*pods, strict=True)))
        job = k8s.template("base/bootstrap.yaml", "Job")
        bootstrap = k8s.container("bootstrap", job, job["containers"][0])
        assert "made the system volume" in machine.run(bootstrap).stdout
        assert "has its system volume" in machine.run(bootstrap).stdout

        def exec_(*words, **kw):  # kubectl exec metadata-0 -- WORDS
            (container,) = roles["metadata"]["containers"]
            inside = k8s.container("metadata-0", roles["metadata"], container)
            inside.command = ["dfs", "--cluster", "/etc/dfs/cluster.json", *words]
            return machine.run(inside, **kw)

        exec_("volume", "create", "default")
        (machine.base / "volumes/tmp-metadata-0/in").write_bytes(TEXT)
        exec_("put", "/tmp/in", "default:/file")
        exec_("get", "default:/file", "/tmp/out")
        assert (machine.base / "volumes/tmp-metadata-0/out").read_bytes() == TEXT
        assert "chunkserver-2" in exec_("cluster", "status").stdout

        daemon_set = k8s.template("base/mount.yaml", "DaemonSet")
        mount = k8s.container("mount-default", daemon_set, daemon_set["containers"][0])
        probe = daemon_set["containers"][0]["readinessProbe"]["exec"]["command"]
        ready = shlex.join(probe).replace("/dfs/", "/see/")
        machine.start("mount", mount)
        machine.until(lambda: see(machine, ready).returncode == 0, "mount")
        consumer = Container(
            ["sh", "-c", "while true; do wc -c < /data/fs/file; sleep 0.1; done"],
            [Volume(machine.shared, "/data", propagation="HostToContainer")],
            uid=1000,
        )
        machine.start("consumer", consumer)
        said = machine.logs / "consumer"
        machine.until(lambda: str(len(TEXT)) in said.read_text(), "a pod sees the file")

        # the mount is killed and its container started again: the pod goes on
        machine.stop("mount", sig=signal.SIGKILL)
        machine.until(lambda: "not connected" in said.read_text(), "a pod sees the mount die")
        machine.start("mount", mount)
        machine.until(
            lambda: said.read_text().endswith(f"{len(TEXT)}\n"), "a pod sees the file again"
        )
        machine.stop("consumer", sig=signal.SIGKILL)
        assert machine.stop("mount") == {"mount": 0}
        # nobody but root can write to the bare folder
        bare = Container(["touch", "/data/fs/x"], consumer.volumes, uid=1000)
        assert "denied" in machine.run(bare, check=False).stderr

        # pods are replaced: formatting again is harmless; a chunkserver may come back with a new disk
        for pod, template in pods[2:4]:
            assert machine.stop(pod) == {pod: 0}
            if pod == "chunkserver-0":
                shutil.rmtree(machine.base / "volumes/data-chunkserver-0")
            start(pod, template)

        def refilled():
            return exec_("fsck", "--all-copies", "default", check=False).returncode == 0

        machine.until(refilled, "the new disk gets its chunks")
        exec_("get", "default:/file", "/tmp/again")
        assert (machine.base / "volumes/tmp-metadata-0/again").read_bytes() == TEXT
        assert set(machine.stop(*(pod for pod, _ in pods)).values()) == {0}


# --------------------------------------------------------------------------------------- systemd


def unit(name, instance):
    """(ExecStart as words, User or root) of an instance of a unit."""
    lines = (DEPLOY / f"systemd/{name}@.service").read_text().splitlines()
    service = dict(line.split("=", 1) for line in lines if "=" in line and line[0] != "#")
    assert service["EnvironmentFile"] == "-/etc/dfs/dfs.env"
    command = service["ExecStart"].replace("%i", instance).replace("/opt/dfs/.venv/", "/opt/dfs/")
    environment = {
        "$DFS_DAEMON_OPTIONS": "--insecure-listen-any",
        "$DFS_METADATA_OPTIONS": "--metrics 9101",
        "$DFS_CHUNKSERVER_OPTIONS": "",
    }
    for variable, value in environment.items():
        command = command.replace(variable, value)
    assert "$" not in command
    return command.split(), service["User"]


def test_systemd_daemons(tmp_path):
    nodes = [
        {"name": f"node{i}", "metadata_addr": f"m{i}:7401", "chunk_addr": f"m{i}:7402"}
        for i in (1, 2, 3)
    ]
    with Machine(tmp_path / "machine", ["m1", "m2", "m3"]) as machine:
        etc, var = machine.base / "etc", machine.base / "var"
        for directory in (etc, var):
            directory.mkdir()
        (etc / "cluster.yaml").write_text(yaml.safe_dump({"nodes": nodes}))
        volumes = [Volume(etc, "/etc/dfs"), Volume(var, "/var/lib/dfs")]
        init = "dfs cluster init --spec /etc/dfs/cluster.yaml --dir /var/lib/dfs/new"
        share = "install -m 644 /var/lib/dfs/new/map /var/lib/dfs/new/cluster.json /etc/dfs"
        machine.run(Container(["sh", "-ec", f"{init}; {share}"], volumes, uid=0))
        os.chown(var, UID, UID)
        format_ = (
            "dfs node format --cluster-map /etc/dfs/map --name node1 --data /var/lib/dfs/node1"
        )
        machine.run(Container(format_.split(), volumes))
        for program in ("metadata", "chunkserver"):
            words, user = unit(f"dfs-{program}", "node1")
            assert user == "dfs"
            machine.start(program, Container(words, volumes))
            log = machine.logs / program
            machine.until(lambda log=log: "serving tcp://127" in log.read_text(), program)
        assert set(machine.stop("metadata", "chunkserver").values()) == {0}
