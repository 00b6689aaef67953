"""Runs every `async def test_*` under trio: on a virtual, seeded clock, or on the real one.

By default a coroutine test runs with `MockClock(autojump_threshold=0)` and a seeded scheduler, so
that a virtual hour takes milliseconds and a seed gives one trace.  A test marked `realtime` (it
touches the kernel: sockets, processes, mounts) runs with the real clock.
"""

import inspect
import random

import pytest
import trio
import trio.testing
from localcluster import LocalCluster


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the soak tests")


def pytest_configure(config):
    config.addinivalue_line("markers", "realtime: a coroutine test that needs the real clock")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    soak = [i for i in items if i.get_closest_marker("slow")]
    if soak:
        config.hook.pytest_deselected(items=soak)
        items[:] = [i for i in items if not i.get_closest_marker("slow")]


def run_seeded(fn, *args, seed=0):
    """Run `await fn(*args)` on a virtual clock with a scheduler seeded by `seed`."""
    trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING = True
    trio._core._run._r = random.Random(seed)
    return trio.run(fn, *args, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    fn = pyfuncitem.obj
    if not inspect.iscoroutinefunction(fn):
        return None
    names = pyfuncitem._fixtureinfo.argnames
    args = {n: pyfuncitem.funcargs[n] for n in names}

    async def main():
        await fn(**args)

    if pyfuncitem.get_closest_marker("realtime") or pyfuncitem.get_closest_marker("mount"):
        trio.run(main)
    else:
        run_seeded(main)
    return True


@pytest.fixture
def cluster(tmp_path):
    """A fresh running three-node cluster of real processes."""
    c = LocalCluster(tmp_path)
    try:
        yield c.init().up()
    finally:
        c.destroy()


@pytest.fixture(scope="module")
def shared_cluster(tmp_path_factory):
    """One running three-node cluster for all tests of a module that do no harm to it."""
    c = LocalCluster(tmp_path_factory.mktemp("shared"))
    try:
        yield c.init().up()
    finally:
        c.destroy()
