"""Random operations, the same on a mount and on tmpfs: whatever a seed finds is a bug or a rule to say."""

import os
import random

import pytest

from tests.mount.differential import EXCHANGE, NOREPLACE, renameat2

pytestmark = pytest.mark.mount
NAMES = ["a", "b", "c", "d/a", "d/b", "d/e/a", "d/e/b", "d", "d/e", "f", "f/a"]
FLAGS = (0, os.O_EXCL, os.O_TRUNC, os.O_APPEND)


def program(rnd, s, steps):
    """Some hundred calls with names from a small pool, so that they meet."""
    handles = []

    def name():
        return rnd.choice(NAMES)

    def opened():
        path, flags = name(), os.O_CREAT * rnd.randrange(2) | rnd.choice(FLAGS) | os.O_RDWR
        before = len(handles)

        def open_():
            handles.append(os.open(path, flags, rnd_mode))

        rnd_mode = rnd.choice((0o600, 0o644, 0o4755))
        s.do(open_)
        s.note(path, len(handles) - before)

    def on_handle():
        if not handles:
            return
        fd = handles[rnd.randrange(len(handles))]
        at, n = (
            rnd.choice((0, 1, 4095, 4096, 70_000, rnd.randrange(200_000))),
            rnd.choice((1, 100, 5000, 66_000)),
        )
        what = rnd.randrange(7)
        if what == 0:
            s.do(os.pwrite, fd, bytes([rnd.randrange(256)]) * n, at)
        elif what == 1:
            s.do(os.pread, fd, n, at)
        elif what == 2:
            s.do(os.ftruncate, fd, at)
        elif what == 3:
            s.do(os.fstat, fd)
        elif what == 4:
            s.do(os.fsync, fd)
        elif what == 5:
            s.do(os.fchmod, fd, rnd.choice((0o600, 0o755, 0o2644)))
        else:
            handles.remove(fd)
            s.do(os.close, fd)

    actions = (
        (8, opened),
        (14, on_handle),
        (4, lambda: s.do(os.mkdir, name())),
        (3, lambda: s.do(os.rmdir, name())),
        (5, lambda: s.do(os.unlink, name())),
        (5, lambda: s.do(os.rename, name(), name())),
        (3, lambda: s.do(renameat2, name(), name(), rnd.choice((NOREPLACE, EXCHANGE)))),
        (4, lambda: s.do(os.link, name(), name())),
        (2, lambda: s.do(os.symlink, rnd.choice(("a", "e", "../a", "none", "d")), name())),
        (2, lambda: s.do(os.readlink, name())),
        (1, lambda: s.do(os.mkfifo, name())),
        (4, lambda: s.look(name())),
        (2, lambda: s.do(os.stat, name())),
        (2, lambda: s.do(os.truncate, name(), rnd.randrange(100_000))),
        (1, lambda: s.do(os.chmod, name(), rnd.choice((0o700, 0o644)))),
        (1, lambda: s.do(os.chown, name(), rnd.randrange(3), rnd.randrange(3))),
        (2, lambda: s.do(lambda n: sorted(os.listdir(n)), name())),
    )
    weights = [w for w, _ in actions]
    for _ in range(steps):
        rnd.choices(actions, weights)[0][1]()
        if len(handles) > 8:
            s.do(os.close, handles.pop(0))
    for fd in handles:
        s.do(os.close, fd)


@pytest.mark.parametrize("seed", range(4))
def test_random_operations(same, seed):
    same(lambda s: program(random.Random(seed), s, 400))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 160))
def test_many_random_operations(same, seed):
    same(lambda s: program(random.Random(seed), s, 1000))


def test_the_comparison_finds_a_difference(same):
    """In what is noted, and in the trees that are left: devices do differ."""

    def leaves_something_else(s):
        with open("x", "w") as f:
            f.write(str(os.fstat(f.fileno()).st_dev))

    with pytest.raises(AssertionError, match="where Linux has"):
        same(leaves_something_else)
    with pytest.raises(AssertionError, match="where Linux has"):
        same(lambda s: s.note(os.stat(".").st_dev))
