"""Names: listing while changing, attributes, xattrs, two clients on one volume."""

import errno

import pytest
import trio

from dfs.client.filesystem import Caller
from dfs.client.namespace import COOKIES, Namespace
from dfs.errors import FsError
from dfs.volume import items
from dfs.volume.items import DIR, REG
from tests.unit.client.support import VOLUME, filesystem, names, new_home, read_file, write_file


async def fails(code, call):
    with pytest.raises(FsError) as caught:
        await call
    assert errno.errorcode[caught.value.errno] == errno.errorcode[code]


@pytest.mark.parametrize("bits", [63, 4])
async def test_listing_returns_what_stays_exactly_once_whatever_changes(bits):
    home = new_home()
    async with filesystem(home, hash_bits=bits) as fs:
        for n in range(60):
            await fs.mknod(1, b"keep%d" % n, 0o100644)
            await fs.mknod(1, b"go%d" % n, 0o100644)
        fh = await fs.opendir(1)
        found, cookie, n = [], 0, 0
        while entries := await fs.readdir(fh, cookie, 5):
            for name, cookie, _ in entries[:3]:  # the kernel's buffer is full after three
                fs.returned(fh, name, cookie)
                found.append(name)
            await fs.unlink(1, b"go%d" % n)
            await fs.mknod(1, b"new%d" % n, 0o100644)
            n = (n + 1) % 60
            if n == 0:
                break
        while entries := await fs.readdir(fh, cookie):
            for name, cookie, _ in entries:
                fs.returned(fh, name, cookie)
                found.append(name)
        kept = [name for name in found if name.startswith(b"keep")]
        assert sorted(kept) == sorted(b"keep%d" % n for n in range(60))
        assert len(found) == len(set(found))
        await fs.releasedir(fh)


@pytest.mark.parametrize("bits", [63, 4])
async def test_names_are_those_of_the_listing_and_need_no_inodes(bits):
    home = new_home()
    async with filesystem(home, hash_bits=bits) as fs:
        kinds = {}
        for n in range(60):
            kinds[(await fs.mknod(1, b"f%d" % n, 0o100644)).ino] = REG
            kinds[(await fs.mkdir(1, b"d%d" % n, 0o755)).ino] = DIR
        fh = await fs.opendir(1)
        found, cookie = [], 0
        while page := await fs.readdir_names(fh, cookie, 5):
            for name, cookie, ino, kind in page[:3]:  # the kernel's buffer is full after three
                fs.returned(fh, name, cookie)
                found.append((name, cookie, ino))
                assert kinds[ino] == kind
        assert found == [(name, cookie, attr.ino) for name, cookie, attr in await fs.list(1)]
        await fs.releasedir(fh)
        gone = await fs.mkdir(1, b"gone", 0o755)
        fh = await fs.opendir(gone.ino)
        await fs.rmdir(1, b"gone")
        await fails(errno.ENOENT, fs.readdir_names(fh))


async def home_of_a_thousand():
    """A home whose volume's root has a thousand files, all of them in its tree."""
    home = new_home()
    async with filesystem(home) as fs, trio.open_nursery() as nursery:
        for n in range(1000):
            nursery.start_soon(fs.mknod, 1, b"f%d" % n, 0o100644)
    home.checkpoint(VOLUME)
    return home


async def test_names_of_a_cold_directory_are_fetched_without_its_inodes():
    home = await home_of_a_thousand()
    async with filesystem(home, seed=1, mode="ro") as cold:
        cold.session.nodes.clear()
        fh, cookie, count = await cold.opendir(1), 0, 0
        while page := await cold.readdir_names(fh, cookie):
            count, cookie = count + len(page), page[-1][1]
        assert count == 1000
        nodes = cold.session.nodes
        held = [nodes.get(name) for name in home.blobs.stored if name in nodes]
        assert not any(n.level == 0 and items.inode_key(2) < n.keys[0] < n.keys[-1] for n in held)


async def test_listing_a_cold_directory_fetches_in_few_rounds():
    home = await home_of_a_thousand()
    async with filesystem(home, seed=1, mode="ro") as cold:
        assert len(await names(cold, 1)) == 1000
        assert home.blobs.gets < 25


async def test_times_owner_and_modes():
    home = new_home()
    async with filesystem(home) as fs:
        d = await fs.mkdir(1, b"d", 0o2775, Caller(5, 6))
        sub = await fs.mkdir(d.ino, b"sub", 0o755, Caller(7, 8))
        assert (sub.uid, sub.gid, sub.mode) == (7, 6, 0o2755)
        await fs.setattr(sub.ino, atime=1, mtime=2)
        attr = await fs.getattr(sub.ino)
        assert (attr.atime, attr.mtime) == (1, 2)
        assert attr.ctime > 2
        ino = await write_file(fs, d.ino, b"f", b"x")
        await fs.setattr(ino, mode=0o6755)
        assert (await fs.setattr(ino, uid=9)).mode == 0o755
        await fs.setattr(ino, mode=0o6644)
        fh = await fs.open(ino, writable=True)
        await fs.write(fh, 0, b"y")
        await fs.setattr(ino, mtime=77)  # a write before must not overtake it
        await fs.flush(fh)
        await fs.release(fh)
        attr = await fs.getattr(ino)
        assert attr.mtime == 77
        assert attr.mode == 0o2644  # set-group-ID of what the group cannot execute means locking


async def test_extended_attributes():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"f", b"x")
        await fails(errno.ENODATA, fs.getxattr(ino, b"user.a"))
        await fs.setxattr(ino, b"user.a", b"1")
        await fs.setxattr(ino, b"user.b", b"2" * 60_000)
        assert await fs.listxattr(ino) == [b"user.a", b"user.b"]
        assert await fs.getxattr(ino, b"user.b") == b"2" * 60_000
        await fails(errno.EEXIST, fs.setxattr(ino, b"user.a", b"", 1))
        await fails(errno.ENODATA, fs.setxattr(ino, b"user.c", b"", 2))
        await fails(errno.E2BIG, fs.setxattr(ino, b"user.a", bytes(70_000)))
        await fails(errno.ERANGE, fs.setxattr(ino, b"u" * 256, b""))
        await fs.removexattr(ino, b"user.a")
        await fails(errno.ENODATA, fs.removexattr(ino, b"user.a"))
        await fs.unlink(1, b"f")
        await fails(errno.ESTALE, fs.listxattr(ino))


async def test_create_that_finds_the_name_taken():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"f", b"content")
        await fails(errno.EEXIST, fs.create(1, b"f", 0o644))
        attr, fh = await fs.create(1, b"f", 0o644, exclusive=False)
        assert attr.ino == ino
        assert attr.size == 7
        await fs.release(fh)
        attr, fh = await fs.create(1, b"f", 0o644, exclusive=False, truncate=True)
        assert attr.size == 0
        await fs.release(fh)
        await fs.mkdir(1, b"d", 0o755)
        await fails(errno.EISDIR, fs.create(1, b"d", 0o644, exclusive=False))


async def test_names_that_cannot_be():
    home = new_home()
    async with filesystem(home) as fs:
        await fails(errno.ENAMETOOLONG, fs.mkdir(1, b"x" * 256, 0o755))
        await fails(errno.EINVAL, fs.mkdir(1, b"a/b", 0o755))
        await fails(errno.ENOENT, fs.mkdir(1, b"", 0o755))
        await fails(errno.EEXIST, fs.mkdir(1, b"..", 0o755))
        await fails(errno.ENAMETOOLONG, fs.symlink(1, b"l", b"t" * 5000))
        await fails(errno.EBADF, fs.read(99, 0, 1))
        await fails(errno.EISDIR, fs.open(1))


async def test_a_read_only_file_system_refuses_every_change():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"f", b"x")
        await fs.files.flush_all()
        async with filesystem(home, seed=1, mode="ro") as ro:
            assert await read_file(ro, ino) == b"x"
            await fails(errno.EROFS, ro.mkdir(1, b"d", 0o755))
            await fails(errno.EROFS, ro.unlink(1, b"f"))
            await fails(errno.EROFS, ro.setattr(ino, mode=0))
            await fails(errno.EROFS, ro.setattr(ino, size=0))
            await fails(errno.EROFS, ro.open(ino, writable=True))


async def test_of_two_exclusive_creators_one_wins():
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        for n in range(20):
            won = []

            async def create(fs, name=b"f%d" % n, won=won):
                try:
                    _, fh = await fs.create(1, name, 0o644)
                    won.append(fs)
                    await fs.release(fh)
                except FsError as e:
                    assert e.errno == errno.EEXIST  # noqa: PT017 - it need not be raised

            async with trio.open_nursery() as nursery:
                nursery.start_soon(create, a)
                nursery.start_soon(create, b)
            assert len(won) == 1


async def test_two_clients_moving_directories_into_each_other_make_no_loop():
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        for n in range(10):
            x, y = b"x%d" % n, b"y%d" % n
            one, two = await a.mkdir(1, x, 0o755), await a.mkdir(1, y, 0o755)
            await b.session.refresh()
            done = []

            async def move(fs, name, into, done=done):
                try:
                    await fs.rename(1, name, into, b"in")
                    done.append(name)
                except FsError as e:
                    assert e.errno in (errno.EINVAL, errno.ENOENT)  # noqa: PT017 - it need not be raised

            async with trio.open_nursery() as nursery:
                nursery.start_soon(move, a, x, two.ino)
                nursery.start_soon(move, b, y, one.ino)
            assert len(done) == 1
            assert set(await names(a, 1)) & {x, y}


async def test_directories_are_renamed_and_moved_at_any_depth():
    home = new_home()
    async with filesystem(home) as fs:
        chain = [1]
        for _ in range(4200):  # deeper than a path can say: who gets there goes step by step
            chain.append((await fs.mkdir(chain[-1], b"d", 0o755)).ino)
        bottom = chain[-1]
        await fs.mkdir(bottom, b"x", 0o755)
        y = await fs.mkdir(bottom, b"y", 0o755)
        await fs.rename(bottom, b"x", bottom, b"z")
        await fs.rename(bottom, b"z", y.ino, b"z")
        await fs.rename(y.ino, b"z", 1, b"up")
        await fails(errno.EINVAL, fs.rename(1, b"d", bottom, b"loop"))
        await fails(errno.ENOTEMPTY, fs.rename(1, b"up", 1, b"d"))


async def test_removing_a_directory_races_with_creating_in_it():
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        for n in range(20):
            d = await a.mkdir(1, b"d%d" % n, 0o755)
            await b.session.refresh()
            results = {}

            async def attempt(what, call, results=results):
                try:
                    await call
                    results[what] = 0
                except FsError as e:
                    results[what] = e.errno

            async with trio.open_nursery() as nursery:
                nursery.start_soon(attempt, "create", a.mknod(d.ino, b"f", 0o100644))
                nursery.start_soon(attempt, "remove", b.rmdir(1, b"d%d" % n))
            assert results in (
                {"create": 0, "remove": errno.ENOTEMPTY},
                {"create": errno.ENOENT, "remove": 0},
            )


async def test_two_clients_unlinking_two_names_of_a_file_free_it():
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        for _ in range(10):
            ino = await write_file(a, 1, b"f", b"x")
            await a.link(ino, 1, b"g")
            await b.session.refresh()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.unlink, 1, b"f")
                nursery.start_soon(b.unlink, 1, b"g")
        await a.session.refresh()
        assert (await a.statfs()).inodes == 1
        assert (await a.statfs()).used == 0


async def test_creating_in_one_directory_from_two_clients_does_not_conflict():
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        async with trio.open_nursery() as nursery:
            for n in range(50):
                nursery.start_soon(a.mknod, 1, b"a%d" % n, 0o100644)
                nursery.start_soon(b.mknod, 1, b"b%d" % n, 0o100644)
        assert a.session.statistics()["conflicts"] + b.session.statistics()["conflicts"] == 0
        await a.session.refresh()
        attr = await a.getattr(1)
        assert attr.size == len(await names(a, 1)) == 100


async def test_a_name_that_another_client_made_is_found_at_once():
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        for n in range(20):
            made = await a.mkdir(1, b"d%d" % n, 0o755)
            assert (await b.lookup(1, b"d%d" % n)).ino == made.ino
        await fails(errno.ENOENT, b.lookup(1, b"nothing"))


def test_hashes_of_names_are_remembered_in_bounds():
    namespace = Namespace(b"s" * 16)
    for n in [*range(COOKIES + 10), *range(20)]:
        name = b"%d" % n
        assert namespace.cookie(name) == items.name_hash(b"s" * 16, name)
        assert len(namespace._cookies) <= COOKIES
    assert len(namespace._cookies) == 30


async def test_what_is_removed_is_returned_as_it_was():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"f", b"x" * 10)
        await fs.link(ino, 1, b"g")
        attr = await fs.unlink(1, b"f")
        assert (attr.ino, attr.nlink, attr.size) == (ino, 2, 10)
        fh = await fs.open(ino, writable=True)
        await fs.write(fh, 10, b"y")
        attr = await fs.unlink(1, b"g")
        assert (attr.ino, attr.nlink, attr.size) == (ino, 1, 11)
        await fs.release(fh)
        made = await fs.mkdir(1, b"d", 0o700)
        attr = await fs.rmdir(1, b"d")
        assert (attr.ino, attr.mode, attr.nlink) == (made.ino, 0o700, 2)
