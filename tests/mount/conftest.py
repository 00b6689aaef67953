"""One cluster, some mounts of it and a tmpfs for all the tests of POSIX semantics."""

import itertools
import os
import subprocess

import pytest
from localcluster import LocalCluster

from dfs.client.registry import create_volume
from tests.mount.differential import compare

_numbers = itertools.count()


class Sides:
    """Mounts of one cluster by their options, and tmpfs mounts to compare them with."""

    def __init__(self, base):
        self.base = base
        self.cluster = LocalCluster(base).init().up()
        self._volumes = set()
        self._mounts = {}
        self._references = {}

    def mount(self, volume="posix", *options, which=0, params=None):
        """The mount of a volume with these options, number `which`; made when first asked for.

        So is the volume, with these parameters.
        """
        key = (volume, options, which)
        if key not in self._mounts:
            if volume not in self._volumes:
                self._volumes.add(volume)
                self.cluster.ask(lambda c: create_volume(c, volume, params))
            where = self.base / f"m{next(_numbers)}"
            self._mounts[key] = self.cluster.mount(volume, where, *options)
        return self._mounts[key]

    def umount(self, volume, *options, which=0):
        """Take one of them away again."""
        where = self._mounts.pop((volume, options, which))
        self.cluster.umount(where)
        self.cluster.mounts.remove(where)

    def reference(self, options="noatime"):
        """A tmpfs mounted so."""
        if options not in self._references:
            where = self.base / f"r{next(_numbers)}"
            where.mkdir()
            options_ = f"{options},nosuid,nodev,mode=0755"
            subprocess.run(["mount", "-t", "tmpfs", "-o", options_, "reference", where], check=True)
            self._references[options] = where
        return self._references[options]

    def close(self):
        for where in self._references.values():
            subprocess.run(["umount", "-l", where], check=False)
        self.cluster.destroy()


@pytest.fixture(scope="session")
def sides(tmp_path_factory):
    """The cluster, its mounts and the tmpfs beside it."""
    s = Sides(tmp_path_factory.mktemp("posix"))
    try:
        yield s
    finally:
        s.close()


@pytest.fixture
def mnt(sides):
    """A fresh directory on the mount."""
    where = sides.mount() / f"t{next(_numbers)}"
    where.mkdir(mode=0o777)
    os.chmod(where, 0o777)
    return where


@pytest.fixture
def same(sides):
    """`same(script)`: the script sees the same on the mount as on tmpfs."""

    def run(script, *options, volume="posix", reference="noatime"):
        name = f"s{next(_numbers)}"
        places = [sides.mount(volume, *options) / name, sides.reference(reference) / name]
        for place in places:
            place.mkdir()
            os.chmod(place, 0o777)
        compare(script, *places)

    return run
