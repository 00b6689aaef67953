"""What the Dockerfile does, without Docker: a wheel of what it copies, in an environment of its own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
DOCKERFILE = (ROOT / "deploy/docker/Dockerfile").read_text().replace("\\\n", " ")


def instructions(name):
    return re.findall(rf"^{name} (.*)$", DOCKERFILE, re.MULTILINE)


def run(*words, cwd="/"):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "DFS_CLUSTER")}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """The environment that the build stage makes, by its own COPY and RUN lines."""
    base = tmp_path_factory.mktemp("image")
    source, target = base / "src", base / "opt"
    source.mkdir()
    for line in instructions("COPY"):
        if line.startswith("--from"):
            continue
        *names, where = line.split()
        for name in names:
            if (ROOT / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, source / where, ignore=ignore)
            else:
                shutil.copy(ROOT / name, source / where)
    (build,) = [line for line in instructions("RUN") if "pip install" in line]
    for command in build.replace("/opt/dfs", str(target)).split(" && "):
        words = [w for w in shlex.split(command) if w != "--no-cache-dir"]
        if words[0] == "python":
            words[0] = sys.executable
        run(*words, cwd=source)
    return target / "bin"


def test_programs_run_outside_the_checkout(image):
    assert "Use and run dfs" in run(image / "dfs", "--help")
    for program in ("metadata", "chunkserver", "fuse"):
        assert f"python -m {program}" in run(image / "python", "-m", program, "--help")


def test_every_module_is_in_the_wheel(image):
    find = "import sys, pathlib; print(next(p for p in sys.path if p.endswith('site-packages')))"
    installed = Path(run(image / "python", "-c", find).strip())
    everything = set()
    for package in ("dfs", "metadata", "chunkserver", "fuse"):
        ours = {p.relative_to(ROOT) for p in (ROOT / package).rglob("*.py")}
        there = {p.relative_to(installed) for p in (installed / package).rglob("*.py")}
        assert ours == there
        everything |= there
    # importing is the real proof: nothing reaches for the checkout or for a test dependency
    modules = sorted(
        ".".join(p.with_suffix("").parts).removesuffix(".__init__")
        for p in everything
        if p.name != "__main__.py" and not p.name.startswith("contract")  # tests
    )
    run(image / "python", "-P", "-c", "import " + ", ".join(modules))


def test_a_cluster_can_be_made_with_it(image, tmp_path):
    said = run(image / "dfs", "cluster", "init", "--dir", tmp_path / "c", "--nodes", "3")
    assert "made cluster" in said


def test_the_context_holds_what_is_copied():
    ignore = (ROOT / "deploy/docker/Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = [line.split()[:-1] for line in instructions("COPY") if not line.startswith("--from")]
    assert allowed == {name for names in copied for name in names}
    assert all((ROOT / name).exists() for name in allowed)
