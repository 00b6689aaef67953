"""Two mounts of one volume: who wins, what is seen when, and that permissions are asked for."""

import collections
import errno
import multiprocessing
import os
import stat
import threading
import time

import pytest

from tests.mount.differential import EXCHANGE, NOREPLACE, content, create, errno_of, put, renameat2

pytestmark = pytest.mark.mount
ALICE = 4001
ROUNDS = 40
SOON = 1.0  # seconds: what the kernel may answer from its own caches


@pytest.fixture(scope="module")
def both(sides):
    """The root directories of two mounts of a volume."""
    yield sides.mount("two"), sides.mount("two", which=1)
    sides.umount("two", which=1)
    sides.umount("two")


@pytest.fixture
def pair(both, request):
    """A new directory, as both mounts show it."""
    one, two = (m / request.node.name for m in both)
    one.mkdir()
    one.chmod(0o777)
    until(two.exists)
    return one, two


def until(true, seconds=5):
    """Wait for it; returns how long that took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.005)
    return time.monotonic() - began


def race(pair, *attempts, uids=(0, 0)):
    """Two processes call `attempt(directory, round)` at the same time, one on each mount.

    Returns how often which pair of outcomes was seen: what was returned, or the errno's name.
    """
    fork = multiprocessing.get_context("fork")
    barrier, outcomes = fork.Barrier(2, timeout=30), fork.SimpleQueue()

    def run(which):
        if uids[which]:
            os.setgroups([])
            os.setgid(uids[which])
            os.setuid(uids[which])
        told = []
        for n in range(ROUNDS):
            barrier.wait()
            try:
                told.append(attempts[which % len(attempts)](pair[which], n))
            except OSError as e:
                told.append(errno.errorcode[e.errno])
        outcomes.put((which, told))

    processes = [fork.Process(target=run, args=(which,)) for which in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    seen = dict(outcomes.get() for _ in processes)
    return collections.Counter(zip(seen[0], seen[1], strict=True))


def exclusively(where, n):
    os.close(os.open(where / f"f{n}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


def makes_directory(where, n):
    os.mkdir(where / f"f{n}")


def links(where, n):
    os.link(where / "lock", where / f"f{n}")


def moves(where, n):
    own = f"{where}/{os.getpid()}-{n}"
    create(own)
    renameat2(own, f"{where}/f{n}", NOREPLACE)


def makes_symlink(where, n):
    os.symlink("target", where / f"f{n}")


@pytest.mark.parametrize(
    "attempts",
    [
        (exclusively,),
        (makes_directory,),
        (links,),
        (moves,),
        (makes_directory, exclusively),
        (makes_symlink, moves),
    ],
    ids=lambda attempts: "-".join(a.__name__ for a in attempts),
)
def test_of_two_that_make_a_name_one_wins(pair, attempts):
    create(pair[0] / "lock")
    until((pair[1] / "lock").exists)
    told = race(pair, *attempts)
    assert set(told) <= {(None, "EEXIST"), ("EEXIST", None)}, told
    names = [n for n in os.listdir(pair[0]) if n.startswith("f")]
    assert len(names) == ROUNDS


def test_permission_is_asked_for_though_another_mount_makes_the_file_meanwhile(pair):
    """Between the lookup that finds nothing and the create that finds a file."""

    def opens(where, n):
        fd = os.open(where / f"f{n}", os.O_CREAT | os.O_RDWR, 0o600)
        own = os.fstat(fd).st_uid == os.geteuid()
        os.close(fd)
        return "own" if own else "somebody else's"

    told = race(pair, opens, uids=(0, ALICE))
    # Root may open what Alice made; Alice may not open what root made.
    assert set(told) <= {("own", "EACCES"), ("somebody else's", "own")}, told


def test_create_without_o_excl_opens_what_another_mount_makes_meanwhile(pair):
    """Whatever that is: a file, or a link to one."""
    create(pair[0] / "file")
    until((pair[1] / "file").exists)

    def opens(where, n):
        os.close(os.open(where / f"f{n}", os.O_CREAT | os.O_WRONLY, 0o666))

    def makes_link(where, n):
        os.symlink("file", where / f"f{n}")

    assert set(race(pair, opens)) == {(None, None)}
    for n in range(ROUNDS):
        os.unlink(pair[0] / f"f{n}")
    assert set(race(pair, opens, makes_link)) <= {(None, None), (None, "EEXIST")}


def test_names_are_pushed(pair):
    """What the other mount's kernel has cached changes within a second, normally at once."""
    one, two = pair
    waits = []
    for n in range(5):
        f = f"f{n}"
        create(one / f, b"x")
        waits.append(until((two / f).exists, SOON))
        assert f in os.listdir(two)
        os.chmod(one / f, 0o600)
        waits.append(until(lambda f=f: os.stat(two / f).st_mode == stat.S_IFREG | 0o600, SOON))
        os.rename(one / f, one / f"{f}-moved")
        waits.append(until(lambda f=f: not (two / f).exists(), SOON))
        assert os.listdir(two) == [f"{f}-moved"]
        os.unlink(one / f"{f}-moved")
        waits.append(until(lambda: not os.listdir(two), SOON))
        waits.append(until(lambda f=f: not (two / f"{f}-moved").exists(), SOON))
    assert sorted(waits)[len(waits) // 2] < SOON / 2


def test_names_are_found_in_a_directory_that_is_replaced_all_the_time(pair):
    """Whichever directory has the name now, the file is in it; nobody is told that there is none.

    The kernel looks its path up again once: after two replacements in a moment ESTALE is left.
    """
    one, two = pair
    os.mkdir(one / "d")
    create(one / "d/f")
    until((two / "d/f").exists)
    stop = threading.Event()

    def replace():
        while not stop.is_set():
            os.mkdir(one / "new")
            create(one / "new/f")
            renameat2(str(one / "new"), str(one / "d"), EXCHANGE)
            while errno_of(os.rmdir, one / "new"):  # the other mount may still be making files
                for name in os.listdir(one / "new"):
                    errno_of(os.unlink, one / "new" / name)

    replacing = threading.Thread(target=replace)
    replacing.start()
    codes = collections.Counter()
    try:
        end = time.monotonic() + 3
        n = 0
        while time.monotonic() < end:
            n += 1
            codes[errno_of(os.stat, two / "d/f")] += 1
            codes[errno_of(create, two / f"d/c{n}")] += 1
            codes[errno_of(os.symlink, "target", two / f"d/l{n}")] += 1
            codes[errno_of(os.chmod, two / "d", 0o755)] += 1
    finally:
        stop.set()
        replacing.join(20)
    assert set(codes) <= {0, errno.ESTALE}, codes
    assert codes[0] > 10 * codes[errno.ESTALE]


@pytest.mark.parametrize("size", [100, 5_000, 300_000])
def test_no_cache_is_stale_after_an_open(pair, size):
    """Data, size and times: in both directions, grown, cut, and written in the middle."""
    one, two = pair
    create(one / "f", b"-" * size)
    for n in range(6):
        data = bytes([65 + n]) * (size + n % 3)
        writer, reader = (one, two) if n % 2 else (two, one)
        assert len(content(reader / "f")) > 0  # the kernel has pages, size and times
        put(writer / "f", data, os.O_TRUNC)
        assert content(reader / "f") == data
        fd = os.open(writer / "f", os.O_RDWR)
        os.pwrite(fd, b"middle", size // 2)
        os.ftruncate(fd, size - 10)
        os.close(fd)
        expected = bytearray(data)
        expected[size // 2 : size // 2 + 6] = b"middle"
        fd = os.open(reader / "f", os.O_RDONLY)
        assert os.fstat(fd).st_size == size - 10
        assert os.fstat(fd).st_mtime_ns == os.stat(writer / "f").st_mtime_ns
        assert os.pread(fd, 2 * size, 0) == expected[: size - 10]
        os.close(fd)
