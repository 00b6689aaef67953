"""systemd units and shell scripts: accepted by the programs that read them."""

import configparser
import shutil
import subprocess
from pathlib import Path

import pytest

from dfs.datadir import DIRECTORIES, PROGRAMS

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
SCRIPTS = sorted(DEPLOY.glob("*.sh"))


def read(path):
    unit = configparser.RawConfigParser(strict=False, delimiters="=")
    unit.optionxform = str
    unit.read_string(path.read_text())
    return unit


@pytest.mark.parametrize("path", UNITS, ids=lambda p: p.name)
def test_units_start_our_programs(path):
    unit = read(path)
    start = unit["Service"]["ExecStart"].split()
    assert start[0].startswith("/opt/dfs/.venv/bin/")
    assert unit["Service"]["Restart"] == "on-failure"
    assert unit["Install"]["WantedBy"] == "multi-user.target"


@pytest.mark.parametrize("role", PROGRAMS)
def test_daemons_find_the_directories_that_format_makes(role):
    unit = read(DEPLOY / f"systemd/dfs-{PROGRAMS[role]}@.service")
    start = unit["Service"]["ExecStart"].split()
    assert start[start.index("-m") + 1] == PROGRAMS[role]
    node = unit["Service"]["ReadWritePaths"]
    assert start[start.index("--data") + 1] == f"{node}/{DIRECTORIES[role]}"
    assert unit["Unit"]["RequiresMountsFor"] == node


def verify(directory, edit=lambda text: text):
    """`systemd-analyze verify` of instances of all units, with programs that exist."""
    paths = []
    for path in UNITS:
        text = path.read_text().replace("/opt/dfs/.venv/bin/python", "/usr/bin/env")
        text = text.replace("/opt/dfs/.venv/bin/dfs", "/usr/bin/env")
        assert "/usr/bin/env" in text
        instance = directory / path.name.replace("@", "@x")
        instance.write_text(edit(text))
        paths.append(instance)
    return subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *paths],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_accepts_the_units(tmp_path):
    done = verify(tmp_path)
    # it also loads the machine's own units and talks about those
    ours = [line for line in done.stderr.splitlines() if "dfs-" in line]
    assert (done.returncode, ours) == (0, []), done.stderr


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd is not installed")
def test_systemd_can_refuse_a_unit(tmp_path):
    done = verify(tmp_path, lambda text: text.replace("TimeoutStopSec=", "TimeoutStopSek="))
    assert "TimeoutStopSek" in done.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse(path):
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", path], cwd=DEPLOY.parent, check=True)
