"""Names that are replaced all the time while others open them: no program meets ESTALE."""

import errno
import multiprocessing
import os
import time
from collections import Counter

import pytest

pytestmark = pytest.mark.mount
SECONDS = 3.0
CONTENT = "x" * 50


def replace(where, how):
    new, name = where / "new", where / "name"
    new.write_text(CONTENT)
    new.rename(name)
    if how == "unlink":
        name.unlink()


def read(where, _how):
    assert (where / "name").read_text() == CONTENT


def write(where, _how):
    os.close(os.open(where / "name", os.O_WRONLY))


def status(where, _how):
    (where / "name").stat()


def repeat(action, where, how, queue):
    found, end = Counter(), time.monotonic() + SECONDS
    while time.monotonic() < end:
        try:
            action(where, how)
        except OSError as e:
            found[errno.errorcode[e.errno]] += 1
        else:
            found["fine"] += 1
    queue.put((action.__name__, found))


@pytest.mark.parametrize("how", ["rename", "unlink"])
def test_what_is_replaced_is_there_or_not_there(mnt, how):
    replace(mnt, "rename")
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    actions = (replace, read, read, write, status)
    running = [context.Process(target=repeat, args=(a, mnt, how, queue)) for a in actions]
    for process in running:
        process.start()
    found = [queue.get(timeout=60) for _ in running]
    for process in running:
        process.join(60)
        assert process.exitcode == 0
    allowed = {"fine"} if how == "rename" else {"fine", "ENOENT"}
    for name, counts in found:
        assert counts["fine"] > 10, (name, counts)
        assert not counts.keys() - allowed, (name, counts)
