"""Several tasks use few files at once, on slow and failing storage: nothing is lost or made up.

Each seed is a program for some tasks, and the moods of the network and of the chunkservers.  The
oracle (`tests.property.fileoracle`) knows what each read may see at most, what a crash may leave,
and what must add up when all is quiet.
"""

import contextlib
import errno
import logging
import random
from functools import partial

import pytest
import trio

from dfs.client import contents, files, reader, writebuffer
from dfs.client.files import Files
from dfs.client.foresight import Foresight
from dfs.client.openfile import File
from dfs.client.quota import Quota
from dfs.client.writebuffer import WriteBuffer
from dfs.errors import DiskFull, FsError, NoQuorum, leaves
from dfs.ids import ROOT_INO
from dfs.testing.fakehome import FakeChunks
from dfs.volume import extents, items
from tests.conftest import run_seeded
from tests.property.fileoracle import Disk, Model
from tests.unit.client.support import VOLUME, filesystem, new_home, read_file

WINDOW = 64 << 10
SIZES = (10, 10, 100, 4096, 20_000, WINDOW, 3 * WINDOW)
MOST = 6 * WINDOW  # greatest size of a file
NAMES = (b"a", b"b", b"c")
LIMIT = 8 * WINDOW
TASKS, STEPS = 4, 14

MODES = {
    "shared": {},
    "delegated": {"delegates": True},
    "exclusive": {"delegates": True, "mode": "rwx"},
    "recalled": {"delegates": True, "rivals": True},
    "recalled_failing": {"delegates": True, "rivals": True, "fails": True},
    "limited": {"quota": True},
    "limited_delegated": {"quota": True, "delegates": True},
    "failing": {"fails": True},
    "failing_delegated": {"fails": True, "delegates": True},
    "lost": {"fails": True, "loses": True},
    "lost_delegated": {"fails": True, "loses": True, "delegates": True},
    "lost_limited": {"fails": True, "loses": True, "delegates": True, "quota": True},
}
OPS = {
    "write": 12,
    "append": 4,
    "rewrite": 2,
    "read": 6,
    "getattr": 3,
    "truncate": 3,
    "fsync": 4,
    "flush": 2,
    "close": 2,
    "open": 2,
    "unlink": 1,
    "rename": 1,
    "link": 1,
    "times": 2,
    "mode": 1,
    "pause": 4,
    "crash": 3,
}
CHOICES = [name for name, weight in OPS.items() for _ in range(weight)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A few writes fill a window, and the budget of what is not committed."""
    monkeypatch.setattr(files, "WINDOW", WINDOW)
    monkeypatch.setattr(writebuffer, "WINDOW", WINDOW)
    monkeypatch.setattr(files, "MAX_DIRTY", LIMIT)
    monkeypatch.setattr(files, "LOOK", 2)
    monkeypatch.setattr(contents, "CROWDED", 1)
    monkeypatch.setattr(extents, "plan_compact", partial(extents.plan_compact, limit=2))
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


class Moody(FakeChunks):
    """Chunkservers that are slow now and then, or refuse."""

    def __init__(self, store, rnd, fails):
        super().__init__(store)
        self.rnd = rnd
        self.fails = fails

    async def sync(self):
        await self._mood()
        return await super().sync()

    async def put_prepared(self, prepared, *, durable=False):
        await self._mood()
        await super().put_prepared(prepared, durable=durable)

    async def _mood(self):
        await trio.sleep(self.rnd.choice([0, 0, 0.01, 0.05, 0.3]))
        if self.rnd.random() < self.fails:
            raise self.rnd.choice([DiskFull, NoQuorum])("for a while")


class Witness(Foresight):
    """Tells when a write is accepted."""

    __slots__ = ("writing",)

    def __init__(self):
        super().__init__()
        self.writing = {}

    def wrote(self, file):
        super().wrote(file)
        model, at, data = self.writing.pop(trio.lowlevel.current_task())
        assert file.ino == model.ino
        model.write(at, data)


class Handle:
    def __init__(self, model, number):
        self.model = model
        self.number = number
        self.users = 0


class Crowd:
    """Tasks at work on one client's files."""

    def __init__(self, home, fs, rnd, **mode):
        self.home, self.fs, self.rnd = home, fs, rnd
        self.limited, self.fails = mode.get("quota"), mode.get("fails", False)
        self.loses, self.delegates = mode.get("loses", False), mode.get("delegates", False)
        self.rivals = mode.get("rivals", False)
        self.disk = Disk(home)
        self.models = []
        self.handles = []
        self.names = {}
        self.naming = trio.Lock()  # the kernel has one for each directory
        self.stamp = 0
        self.witness = fs.files._foresight = Witness()
        fs.session.on_fenced(self.fenced)

    # ------------------------------------------------------------------ what may go wrong

    def excuse(self, e, *more):
        """Raise an error that nothing explains."""
        if e.errno in more or (self.fails and e.errno in (errno.EIO, errno.ENOSPC)):
            return
        raise AssertionError(f"nothing explains {e!r}") from e

    def fenced(self, held, _inos):
        assert self.loses, "the session was lost for no reason"
        for model in self.models:
            left = self.disk.content(model.ino)
            if all(left != c for c, _ in model.states) and model.cutting is None:
                model.owed = model.handles > 0
            if held and left is not None:
                model.check_disk(left, model.floor)
                model.rebase(left)

    def total(self):
        """Bytes in files, at most."""
        return sum(max(map(len, m.versions[-1])) for m in self.models if not m.gone)

    def check_limit(self):
        """What is certainly there is not more than may be."""
        there = [m for m in self.models if m.names or m.handles]
        used = sum(min(map(len, m.versions[-1])) for m in there)
        assert not self.limited or used <= LIMIT, "more than the limit"

    def check_room(self, before, more):
        """There was none, or a truncation is under way, which gives back what it frees at last."""
        if all(m.cutting is None for m in self.models):
            assert max(before, self.total()) + more > LIMIT, "there is room"

    # ------------------------------------------------------------------ operations

    async def run(self):
        for name in NAMES[:2]:
            await self.open(name)
        if self.loses:
            await self.fs.session.settle()
        async with trio.open_nursery() as nursery:
            for _ in range(TASKS):
                nursery.start_soon(self.task)
            if self.loses:
                nursery.start_soon(self.lose)
            if self.rivals:
                nursery.start_soon(self.look_from_elsewhere)
        await self.quiet()

    async def task(self):
        rnd = self.rnd
        for _ in range(STEPS):
            what = rnd.choice(CHOICES)
            if what in ("open", "unlink", "rename", "link"):
                if not self.loses:
                    await self.name(what, rnd.choice(NAMES), rnd.choice(NAMES))
                elif what == "open":  # a loss takes names back, and not only the last one
                    await self.open_again(rnd.choice(self.models))
                continue
            if what == "pause":
                await trio.sleep(rnd.choice([0.001, 0.01, 0.1, 1.5]))
                continue
            open_ = [h for h in self.handles if not (what == "close" and h.users)]
            if open_:
                handle = rnd.choice(open_)
                handle.users += 1
                await getattr(self, what)(handle, handle.model)
                handle.users -= 1

    async def lose(self):
        await trio.sleep(self.rnd.uniform(0, 1.5))
        v = self.home.volumes[VOLUME]
        if v.holder:
            self.home.revoke(VOLUME)
        else:
            self.home.fence(VOLUME, self.fs.session.sid)

    async def look_from_elsewhere(self):
        """Other clients see what was synced, and take the delegation away."""
        for seed in range(2, 6):
            await trio.sleep(self.rnd.choice([0.01, 0.1, 0.5]))
            mode = self.rnd.choice(["ro", "rw"])
            async with filesystem(self.home, seed=seed, mode=mode) as other:
                for model in [m for m in self.models if m.names]:
                    since = model.floor
                    try:
                        found = await read_file(other, model.ino, MOST + 1)
                    except FsError as e:
                        if model.names:
                            self.excuse(e)
                    else:
                        model.check_disk(found, since)
                await trio.sleep(self.rnd.choice([0, 0.3]))

    async def name(self, what, name, other):
        fs = self.fs
        async with self.naming:
            if what == "open":
                await self.open(name)
            elif name not in self.names:
                return
            elif what == "unlink":
                model = self.names.pop(name)
                model.names.discard(name)
                model.leaving += 1
                await fs.unlink(ROOT_INO, name)
                model.leaving -= 1
                self.left(model)
            elif what == "link" and other not in self.names:
                model = self.names[other] = self.names[name]
                model.names.add(other)
                await fs.link(model.ino, ROOT_INO, other)
            elif what == "rename" and self.names.get(other) is not self.names[name]:
                victim = self.names.get(other)
                if victim is not None:
                    victim.names.discard(other)
                    victim.leaving += 1
                model = self.names[other] = self.names.pop(name)
                model.names ^= {name, other}
                await fs.rename(ROOT_INO, name, ROOT_INO, other)
                if victim is not None:
                    victim.leaving -= 1
                    self.left(victim)

    def left(self, model):
        """Nobody needs the file any more, perhaps."""
        model.gone = not (model.names or model.handles or model.leaving)

    async def open(self, name):
        attr, number = await self.fs.create(ROOT_INO, name, 0o644, exclusive=False)
        model = self.names.get(name)
        if model is None:
            model = self.names[name] = Model(attr.ino, certain=not self.loses)
            model.names.add(name)
            self.models.append(model)
        assert model.ino == attr.ino
        model.handles += 1
        self.handles.append(Handle(model, number))

    async def open_again(self, model):
        try:
            number = await self.fs.open(model.ino, writable=True)
        except FsError as e:
            self.excuse(e)
            return
        model.handles += 1
        self.handles.append(Handle(model, number))

    async def write(self, h, model, at=None, data=None):
        rnd = self.rnd
        size = rnd.choice(SIZES)
        if at is None:
            ends = [0, WINDOW, len(model.newest), rnd.randrange(MOST)]
            at = min(rnd.choice(ends), MOST - size)
        if data is None:
            self.stamp += 1
            data = (b"%06d;" % self.stamp * (size // 7 + 1))[:size]
        since, before = model.now, self.total()
        me = trio.lowlevel.current_task()
        self.witness.writing[me] = model, at, data
        try:
            assert await self.fs.write(h.number, at, data) == len(data)
            assert me not in self.witness.writing
            self.check_limit()
        except FsError as e:
            if e.errno == errno.EDQUOT:
                assert self.limited
                self.check_room(
                    before, max(0, at + len(data) - min(map(len, model.versions[since])))
                )
                return
            self.told(model, e)
            self.excuse(e)
        finally:
            self.witness.writing.pop(me, None)

    async def append(self, h, model):
        if len(model.newest) < MOST:
            await self.write(h, model, at=len(model.newest))

    async def rewrite(self, h, model):
        """What is there already."""
        content = model.newest
        if content:
            at = self.rnd.randrange(len(content))
            await self.write(h, model, at, content[at : at + self.rnd.choice(SIZES)])

    async def read(self, h, model):
        at, length = self.rnd.randrange(MOST), self.rnd.choice([100, WINDOW, MOST])
        at = self.rnd.choice([0, at])
        since = model.now
        try:
            model.check_read(since, at, length, await self.fs.read(h.number, at, length))
        except FsError as e:
            self.excuse(e)

    async def getattr(self, _h, model):
        since, busy, low = model.now, model.busy, model.mtime
        attr = await self.fs.getattr(model.ino)
        model.check_size(since, attr.size)
        if self.loses or busy or model.busy:
            return
        if model.times and model.times[1] == model.now:
            assert attr.mtime == model.times[0], "the time that was set is not kept"
        assert attr.mtime >= low, "mtime went back"
        model.mtime = max(model.mtime, attr.mtime)

    async def times(self, _h, model):
        await self.change(model, mtime=self.rnd.randrange(1, 10**9))

    async def mode(self, _h, model):
        await self.change(model, mode=0o600)

    async def change(self, model, **what):
        if model.busy:
            return
        since = model.now
        model.busy += 1
        try:
            await self.fs.setattr(model.ino, **what)
            if "mtime" in what:
                model.mtime = 0
                model.times = (what["mtime"], model.now) if since == model.now else None
        except FsError as e:
            self.excuse(e)
        finally:
            model.busy -= 1

    async def truncate(self, _h, model):
        if model.cutting is not None:
            return
        content = model.newest
        size = self.rnd.choice([0, self.rnd.randrange(MOST), len(content) // 2, len(content) + 100])
        before = self.total()
        model.begin_cut(size)
        model.busy += 1
        done = None
        try:
            await self.fs.setattr(model.ino, size=size)
            done = True
            model.times = None
            self.check_limit()
        except FsError as e:
            if e.errno == errno.EDQUOT:
                assert self.limited
                model.cutting = None
                self.check_room(before, size - len(content))
                done = False
            else:
                self.excuse(e)
        finally:
            model.end_cut(done)
            model.busy -= 1

    async def fsync(self, h, model):
        since = model.now
        try:
            await self.fs.fsync(h.number)
        except FsError as e:
            self.told(model, e)
            self.excuse(e)
            return
        assert not model.owed, "fsync does not tell what was lost"
        self.durable(model, since)

    async def flush(self, h, model):
        since = model.now
        try:
            await self.fs.flush(h.number)
        except FsError as e:
            self.told(model, e)
            self.excuse(e)
            return
        if not self.delegates:
            self.durable(model, since)

    def durable(self, model, since):
        since = max(since, model.floor)
        model.check_disk(self.disk.content(model.ino), since)
        model.floor = since

    def told(self, model, e):
        if e.errno == errno.EIO:
            model.owed = False

    async def close(self, h, model):
        self.handles.remove(h)
        model.handles -= 1
        model.leaving += 1
        await self.fs.release(h.number)
        model.leaving -= 1
        self.left(model)
        if not model.handles:  # nobody is left to be told
            model.owed = False

    async def crash(self, _h, model):
        if model.names:
            model.check_disk(self.disk.content(model.ino), model.floor)

    # ------------------------------------------------------------------ when all is quiet

    async def quiet(self):
        fs = self.fs
        fs.files._chunks.fails = 0.0
        fs.rpc.lose_request = fs.rpc.lose_answer = 0.0
        for model in {h.model for h in self.handles}:
            for h in [h for h in self.handles if h.model is model]:
                for _ in range(2):  # the first may tell what went wrong before
                    await self.fsync(h, model)
        for h in list(self.handles):
            await self.close(h, h.model)
        lost = [FsError] if self.loses else []
        with contextlib.suppress(*lost):  # of those who have closed
            await fs.files.flush_all()
        with contextlib.suppress(*lost):
            await fs.session.settle()
        await trio.sleep(20)  # compaction has ended too
        assert fs.session.statistics()["opens"] == 1 + self.loses
        assert fs.session.here == self.delegates or self.loses or self.rivals
        found = fs.files.statistics()
        assert [found[k] for k in ("open", "dirty", "uncommitted", "uploading")] == [0] * 4, found
        assert not fs.files._files, "files that nobody has open are kept"
        assert not fs.namespace.quota.held
        alive = [m for m in self.models if m.names]
        self.disk.look()
        for model in alive:
            for name in model.names:
                assert (await fs.lookup(ROOT_INO, name)).ino == model.ino
            content = await read_file(fs, model.ino)
            assert content in [c for c, _ in model.states]
            assert self.disk.content(model.ino) == content
            model.rebase(content)
            assert (await fs.getattr(model.ino)).size == len(content)
        async with filesystem(self.home, seed=1, mode="ro") as other:
            for model in alive:
                assert await read_file(other, model.ino) == model.newest
        left = {k for k in self.disk.items if k[8] == items.INODE}
        wanted = {items.inode_key(i) for i in (ROOT_INO, *(m.ino for m in alive))}
        assert left == wanted, (left - wanted, wanted - left)
        usage = items.decode_usage(self.disk.items[items.USAGE_KEY])
        assert usage == (sum(len(m.newest) for m in alive), 1 + len(alive))


async def run(seed, mode):
    rnd = random.Random(seed)
    settings = MODES[mode]
    home = new_home(**({"quota_bytes": LIMIT} if settings.get("quota") else {}))
    home.delegates = settings.get("delegates", False)
    home.latency = rnd.choice([0.0005, 0.02, 0.1])
    fails = rnd.choice([0.1, 0.3]) if settings.get("fails") else 0.0
    home.chunk_client = lambda: Moody(home.chunks, rnd, fails)
    with trio.fail_after(2000):
        async with filesystem(
            home,
            mode=settings.get("mode", "rw"),
            delegate=home.delegates,
            kernel_times=False,
        ) as fs:
            if fails:
                fs.rpc.lose_request, fs.rpc.lose_answer = 0.05, 0.05
            await Crowd(home, fs, rnd, **settings).run()


def run_noted(seed, mode):
    """Run one program; what it raises says which it was."""
    try:
        run_seeded(run, seed, mode, seed=seed)
    except BaseException as e:
        e.add_note(f"seed {seed}, mode {mode}")
        raise


@pytest.mark.parametrize("mode", MODES)
def test_what_is_read_and_what_is_kept_is_what_was_written(mode):
    for seed in range(15):
        run_noted(seed, mode)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 2000, 100))
@pytest.mark.parametrize("mode", MODES)
def test_so_it_is_with_many_more_programs(first, mode):
    for seed in range(first, first + 100):
        run_noted(seed, mode)


# ------------------------------------------------------------------------------------ mutants


def forgets_later_writes(patch):
    """What was written during a commit is forgotten with what was committed."""

    def forget(self, committed):
        for segment in committed:
            self.cut(segment.start, segment.end)

    patch(WriteBuffer, "forget", forget)


def commits_what_is_left(patch):
    """Of what was sent, only that is committed which was not written over meanwhile."""
    real = Files._store

    async def store(self, buffer):
        segments, oldest = await real(self, buffer)
        left = set(map(id, buffer))
        return [s for s in segments if id(s) in left], oldest

    patch(Files, "_store", store)


def cuts_beside_commits(patch):
    """A truncation does not wait for a commit, nor a commit for a truncation."""

    async def truncate(self, ino, size):
        file = self._files.get(ino) or File(ino)
        if file.cut < 0:
            await self._truncate(file, size)

    patch(Files, "truncate", truncate)


def cuts_what_is_dirty_only(patch):
    """While a truncation is under way, what is committed is shown as it was."""
    patch(reader, "shorter", lambda found, _size: found)
    patch(Files, "overlay", lambda _, attr: attr)


def does_not_wait_for_cuts(patch):
    """fsync does not wait for a truncation under way."""

    async def flush(self, file):
        if file.buffer:
            await self._commit(file)
        self._raise_error(file)

    patch(Files, "flush", flush)


def commits_what_was_dropped(patch):
    """What was given up with the session is committed to the next one."""
    real = Files._publication

    def publication(self, file, _buffer, segments, **more):
        return real(self, file, file.buffer, segments, **more)

    patch(Files, "_publication", publication)


def loses_what_it_cut(patch):
    """A truncation that fails does not give back what it cut from the buffer."""
    patch(WriteBuffer, "restore", lambda *_: None)


def spends_errors(patch):
    """A close takes the error that a sync should tell."""
    real = Files.close

    async def close(self, file):
        file.error, file.lost = None, False
        await real(self, file)

    patch(Files, "close", close)


def counts_twice(patch):
    """What a commit added is used and held for a while."""
    patch(Quota, "recount", lambda *_: None)


def does_not_reserve(patch):
    """What a truncation adds is not held while it is under way."""

    async def reserve(self, file, end):
        await trio.lowlevel.checkpoint()

    async def hold(self, file, end):
        await real(self, file, end)

    real = Quota.reserve
    patch(Quota, "hold", hold)
    patch(Quota, "reserve", reserve)


def leaves_orphans(patch):
    """A file that was closed while it was unlinked is not purged."""
    real = Files.unlinked

    async def unlinked(self, ino):
        if ino in self._files:
            await real(self, ino)

    patch(Files, "unlinked", unlinked)


def syncs_nothing(patch):
    """A commit does not wait until its chunks are durable."""

    async def sync(self):
        await trio.lowlevel.checkpoint()
        return 0

    patch(Moody, "sync", sync)


def sets_times_back(patch):
    """A mode or time that is set does not wait for what was written before."""

    async def settle(self, ino):
        await trio.lowlevel.checkpoint()

    patch(Files, "settle", settle)


# Each mutant with a mode in which it shows, and the first program to try.
MUTANTS = {
    forgets_later_writes: ("shared", 0),
    commits_what_is_left: ("shared", 3),
    cuts_beside_commits: ("failing", 6),
    cuts_what_is_dirty_only: ("shared", 0),
    does_not_wait_for_cuts: ("shared", 91),
    commits_what_was_dropped: ("lost_delegated", 6),
    loses_what_it_cut: ("lost", 251),
    spends_errors: ("lost", 30),
    counts_twice: ("limited", 58),
    does_not_reserve: ("limited", 131),
    leaves_orphans: ("shared", 38),
    syncs_nothing: ("failing", 0),
    sets_times_back: ("shared", 3),
}


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_a_broken_client_is_found(monkeypatch, mutant):
    mutant(monkeypatch.setattr)
    mode, first = MUTANTS[mutant]
    for seed in range(first, first + 400):  # what draws a number more or less shifts them all
        try:
            run_seeded(run, seed, mode, seed=seed)
        except BaseException as e:
            found = set(map(type, leaves(e)))
            assert found <= {AssertionError, FsError, trio.TooSlowError, trio.Cancelled}, found
            return
    raise AssertionError("no program shows it")
