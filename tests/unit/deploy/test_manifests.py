"""Kubernetes, Compose and systemd files: valid against schemas, and true to each other."""

import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
BASE = DEPLOY / "k8s" / "base"
KUBERNETES = ["1.29", "1.33"]
MANIFESTS = sorted(
    p
    for p in (DEPLOY / "k8s").rglob("*.yaml")
    if p.name not in ("kustomization.yaml", "cluster.yaml")
)


def documents(path):
    return [d for d in yaml.safe_load_all(path.read_text()) if d]


def everything():
    return [d for p in MANIFESTS for d in documents(p)]


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.name)
def test_manifests_fit_the_kubernetes_schemas(path, version):
    for d in documents(path):
        kubernetes_validate.validate(d, version, strict=True)


def test_the_validator_can_fail():
    bad = documents(BASE / "metadata.yaml")[-1]
    bad["spec"]["replicaz"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(bad, KUBERNETES[0], strict=True)


def test_kustomization_lists_every_file():
    listed = set(yaml.safe_load((BASE / "kustomization.yaml").read_text())["resources"])
    assert listed == {p.name for p in MANIFESTS if p.parent == BASE}


@pytest.mark.parametrize("role", ["metadata", "chunkserver"])
def test_stateful_sets_are_what_placement_assumes(role):
    by_kind = {d["kind"]: d for d in documents(BASE / f"{role}.yaml")}
    sts, svc = by_kind["StatefulSet"], by_kind["Service"]
    labels = sts["spec"]["template"]["metadata"]["labels"]
    assert svc["spec"]["clusterIP"] == "None"
    assert svc["spec"]["selector"].items() <= labels.items()
    assert sts["spec"]["serviceName"] == svc["metadata"]["name"]
    for who in (sts["spec"]["selector"], by_kind["PodDisruptionBudget"]["spec"]["selector"]):
        assert who["matchLabels"].items() <= labels.items()
    assert by_kind["PodDisruptionBudget"]["spec"]["maxUnavailable"] == 1
    anti = sts["spec"]["template"]["spec"]["affinity"]["podAntiAffinity"]
    required = anti["requiredDuringSchedulingIgnoredDuringExecution"]
    assert [a["topologyKey"] for a in required] == ["kubernetes.io/hostname"]
    container = sts["spec"]["template"]["spec"]["containers"][0]
    assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
    assert container["ports"][0]["containerPort"] == svc["spec"]["ports"][0]["port"]
    assert sts["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "data"
    # The map's addresses are the pods' names in DNS.
    spec = yaml.safe_load((BASE / "cluster.yaml").read_text())["nodes"]
    key = {"metadata": "metadata_addr", "chunkserver": "chunk_addr"}[role]
    want = [
        f"tcp://{role}-{i}.{svc['metadata']['name']}.dfs.svc:{svc['spec']['ports'][0]['port']}"
        for i in range(sts["spec"]["replicas"])
    ]
    assert [n[key] for n in spec if key in n] == want


def pod_specs():
    for d in everything():
        if d["kind"] == "Pod":
            yield d["metadata"]["name"], d["spec"]
        elif "template" in d.get("spec", {}):
            yield d["metadata"]["name"], d["spec"]["template"]["spec"]


@pytest.mark.parametrize(
    ("name", "spec"), [*pod_specs()], ids=lambda x: x if type(x) is str else ""
)
def test_pods_have_no_more_rights_than_they_need(name, spec):
    assert spec["automountServiceAccountToken"] is False
    for c in [*spec.get("initContainers", []), *spec["containers"]]:
        if c["image"].startswith("dfs:"):
            assert "command" not in c  # it would replace the image's entry point, tini
            assert spec["enableServiceLinks"] is False
        if name == "mount-default":
            continue  # FUSE with Bidirectional propagation takes a privileged container
        assert spec["securityContext"]["runAsNonRoot"] is True
        context = c["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}


def test_the_mount_reaches_pods():
    (daemon_set,) = documents(BASE / "mount.yaml")
    container = daemon_set["spec"]["template"]["spec"]["containers"][0]
    mount = next(m for m in container["volumeMounts"] if m["name"] == "mnt")
    assert mount["mountPropagation"] == "Bidirectional"
    assert container["securityContext"]["privileged"] is True
    pv, pvc, pod = documents(DEPLOY / "k8s" / "example" / "pv.yaml")
    host = next(v for v in daemon_set["spec"]["template"]["spec"]["volumes"] if v["name"] == "mnt")
    # the folder around the mount point: a bind of the mount point itself would outlive the mount
    assert pv["spec"]["hostPath"]["path"] == host["hostPath"]["path"]
    (where,) = pod["spec"]["containers"][0]["volumeMounts"]
    assert where["mountPropagation"] == "HostToContainer"
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    assert pvc["spec"]["volumeName"] == pv["metadata"]["name"]
    assert pvc["spec"]["storageClassName"] == pv["spec"]["storageClassName"]
    claim = pod["spec"]["volumes"][0]["persistentVolumeClaim"]["claimName"]
    assert claim == pvc["metadata"]["name"]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomize_renders(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    (base / "generated").mkdir(exist_ok=True)
    (base / "generated" / "map").write_bytes(b"\xff\x00map")
    (base / "generated" / "cluster.json").write_text("{}")
    done = subprocess.run(
        ["kubectl", "kustomize", base], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    rendered = [d for d in yaml.safe_load_all(done.stdout) if d]
    kinds = [d["kind"] for d in rendered]
    assert kinds.count("StatefulSet") == 2
    config = next(d for d in rendered if d["kind"] == "ConfigMap")
    assert "map" in config["binaryData"]
    assert "cluster.json" in config["data"]
    for d in rendered:
        kubernetes_validate.validate(d, KUBERNETES[-1], strict=True)


def test_compose_names_nodes_and_volumes_consistently():
    compose = yaml.safe_load((DEPLOY / "docker" / "compose.yaml").read_text())
    nodes = yaml.safe_load((DEPLOY / "docker" / "cluster.yaml").read_text())["nodes"]
    for n in nodes:
        for role, key in (("metadata", "metadata_addr"), ("chunkserver", "chunk_addr")):
            service = compose["services"][n[key].split("//")[1].split(":")[0]]
            assert service["command"][2] == role
            assert f"{n['name']}:/data" in service["volumes"]
            assert f"/data/{role}" in service["command"]
    used = {
        v.split(":")[0]
        for s in compose["services"].values()
        for v in s.get("volumes", [])
        if isinstance(v, str) and not v.startswith(".")
    }
    assert used == set(compose["volumes"])
