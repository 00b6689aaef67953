"""Quotas: refused when something is written or made, never when what was accepted is committed."""

import contextlib
import errno

import pytest

from dfs.client.quota import Quota
from dfs.errors import FsError
from dfs.volume import items
from tests.unit.client.support import VOLUME, filesystem, new_home, read_file, write_file

KIB = 1 << 10


@contextlib.contextmanager
def over_quota():
    with pytest.raises(FsError) as caught:
        yield
    assert caught.value.errno == errno.EDQUOT
    assert "dfs volume set" in str(caught.value)


async def set_quota(fs, size, inodes):
    await fs.session.transact(
        lambda txn: txn.put(items.QUOTA_KEY, items.encode_quota(size, inodes))
    )


@pytest.mark.parametrize("delegates", [False, True])
async def test_a_write_over_the_quota_is_refused_at_once_and_what_was_accepted_is_kept(delegates):
    home = new_home(quota_bytes=100_000)
    home.delegates = delegates
    async with filesystem(home, delegate=delegates) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        for at in range(0, 100_000, 10_000):
            await fs.write(fh, at, b"x" * 10_000)
        with over_quota():
            await fs.write(fh, 100_000, b"y")
        await fs.write(fh, 50_000, b"z" * 50_000)  # over what is there: nothing more
        await fs.fsync(fh)
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == b"x" * 50_000 + b"z" * 50_000
        assert fs.namespace.quota.held == 0
        assert (await fs.statfs()).free == 0


async def test_what_other_files_hold_counts():
    home = new_home(quota_bytes=100_000)
    async with filesystem(home) as fs:
        one, two = [(await fs.create(1, name, 0o644))[1] for name in (b"a", b"b")]
        await fs.write(one, 0, b"x" * 70_000)
        with over_quota():
            await fs.write(two, 0, b"y" * 30_001)
        await fs.write(two, 0, b"y" * 30_000)
        assert (await fs.statfs()).free == 0
        await fs.fsync(two)
        await fs.fsync(one)
        assert (await fs.statfs())[:3] == (100_000, 0, 100_000)
        await fs.release(one)
        await fs.release(two)


async def test_deleting_and_cutting_give_back():
    home = new_home(quota_bytes=100_000)
    async with filesystem(home) as fs:
        await write_file(fs, 1, b"a", b"x" * 60_000)
        ino = await write_file(fs, 1, b"b", b"x" * 40_000)
        await fs.setattr(ino, size=10_000)
        fh = await fs.open(ino, writable=True)
        await fs.write(fh, 10_000, b"y" * 30_000)
        with over_quota():
            await fs.write(fh, 40_000, b"y")
        await fs.unlink(1, b"a")
        await fs.write(fh, 40_000, b"y" * 60_000)
        await fs.fsync(fh)
        await fs.release(fh)
        assert await read_file(fs, ino) == b"x" * 10_000 + b"y" * 90_000


async def test_dirty_data_that_is_given_up_is_given_back():
    home = new_home(quota_bytes=100_000)
    async with filesystem(home) as fs:
        _, fh = await fs.create(1, b"a", 0o644)
        await fs.write(fh, 0, b"x" * 90_000)
        await fs.unlink(1, b"a")
        await fs.release(fh)
        assert fs.namespace.quota.held == 0
        _, fh = await fs.create(1, b"b", 0o644)
        await fs.write(fh, 0, b"x" * 90_000)
        attr = await fs.lookup(1, b"b")
        await fs.setattr(attr.ino, size=20_000)
        assert fs.namespace.quota.held == 0
        await fs.setattr(attr.ino, size=100_000)
        with over_quota():
            await fs.setattr(attr.ino, size=100_001)
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == b"x" * 20_000 + bytes(80_000)


async def test_a_truncation_of_a_dirty_file_counts_its_bytes_once():
    home = new_home(quota_bytes=100_000)
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        await fs.write(fh, 0, b"x" * 60_000)
        with over_quota():
            await fs.setattr(attr.ino, size=100_001)
        assert fs.namespace.quota.held == 60_000
        await fs.setattr(attr.ino, size=100_000)
        assert fs.namespace.quota.held == 0
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == b"x" * 60_000 + bytes(40_000)


async def test_holes_count_by_their_size():
    home = new_home(quota_bytes=100_000)
    async with filesystem(home) as fs:
        _, fh = await fs.create(1, b"a", 0o644)
        with over_quota():
            await fs.write(fh, 100_000, b"end")
        await fs.write(fh, 99_997, b"end")
        await fs.release(fh)
        assert (await fs.statfs()).used == 100_000


async def test_inodes_are_counted_too_the_root_among_them():
    home = new_home(quota_inodes=3)
    async with filesystem(home) as fs:
        await fs.mkdir(1, b"a", 0o755)
        await fs.symlink(1, b"b", b"target")
        for make in (fs.create(1, b"c", 0o644), fs.mkdir(1, b"c", 0o755)):
            with over_quota():
                await make
        assert (await fs.statfs()).free_inodes == 0
        await fs.rename(1, b"b", 1, b"c")
        await fs.rmdir(1, b"a")
        await fs.mkdir(1, b"a", 0o755)


async def test_a_new_quota_is_heard_of_by_every_client_and_overrides_the_first():
    home = new_home(quota_bytes=10_000)
    async with filesystem(home) as fs, filesystem(home, seed=1) as other:
        await write_file(fs, 1, b"a", b"x" * 10_000)
        await set_quota(other, 20_000, 0)
        await fs.session.refresh()
        ino = await write_file(fs, 1, b"b", b"x" * 10_000)
        await set_quota(other, 5_000, 2)  # less than there is
        await fs.session.refresh()
        with over_quota():
            await fs.mkdir(1, b"c", 0o755)
        fh = await fs.open(ino, writable=True)
        with over_quota():
            await fs.write(fh, 10_000, b"y")
        await fs.write(fh, 0, b"y")
        await fs.release(fh)
        await set_quota(other, 0, 0)
        await fs.session.refresh()
        await write_file(fs, 1, b"c", b"x" * 100_000)
        assert not fs.namespace.quota.limited


async def test_it_is_found_in_a_checkpoint():
    home = new_home()
    async with filesystem(home) as fs:
        await set_quota(fs, 10_000, 0)
        home.checkpoint(VOLUME)
    async with filesystem(home, seed=1) as fs:
        _, fh = await fs.create(1, b"a", 0o644)
        with over_quota():
            await fs.write(fh, 0, b"x" * 10_001)
        await fs.release(fh)


async def test_several_clients_exceed_it_by_what_they_hold_and_lose_nothing():
    home = new_home(quota_bytes=100_000)
    async with filesystem(home) as fs, filesystem(home, seed=1) as other:
        written = []
        for each, name in ((fs, b"a"), (other, b"b")):
            attr, fh = await each.create(1, name, 0o644)
            await each.write(fh, 0, name * 80_000)
            written.append((each, attr.ino, fh, name))
        for each, _, fh, _ in written:
            await each.fsync(fh)  # both were accepted: neither may fail
        for each, ino, fh, name in written:
            await each.session.refresh()
            with over_quota():
                await each.write(fh, 80_000, b"y")
            await each.release(fh)
            assert await read_file(each, ino) == name * 80_000


async def test_a_volume_without_a_quota_looks_once(monkeypatch):
    looks = []
    limits = Quota.limits
    monkeypatch.setattr(Quota, "limits", lambda self, get: looks.append(1) or limits(self, get))
    async with filesystem(new_home()) as fs:
        for i in range(5):
            await write_file(fs, 1, b"%d" % i, b"x" * 10 * KIB)
        assert len(looks) == 1


class Forgetful(Quota):
    """A mutant: what was accepted is not held."""

    def _hold(self, file, end, get):
        held = super()._hold(file, end, get)
        self.release(file)
        return held


async def test_a_quota_that_holds_nothing_is_found(monkeypatch):
    monkeypatch.setattr("dfs.client.filesystem.Quota", Forgetful)
    with pytest.raises(BaseExceptionGroup, match="Exceptions from"):
        await test_what_other_files_hold_counts()


async def test_a_full_cluster_is_met_like_a_quota_and_what_was_accepted_is_committed():
    async with filesystem(new_home()) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        await fs.write(fh, 0, b"x" * 10 * KIB)
        fs.refuse("", "3 disks are full")
        for call in (fs.write(fh, 10 * KIB, b"y"), fs.write(fh, 0, b"y" * 8 * KIB)):
            with pytest.raises(FsError, match="3 disks are full") as caught:
                await call
            assert caught.value.errno == errno.ENOSPC
        await fs.fsync(fh)
        await write_file(fs, 1, b"small", b"needs no chunkserver")
        assert (await fs.statfs()).free == 0
        fs.refuse("metadata is full", "")
        for call in (
            fs.write(fh, 0, b"y"),
            fs.mkdir(1, b"d", 0o755),
            fs.create(1, b"b", 0o644),
            fs.setattr(attr.ino, size=20 * KIB),
        ):
            with pytest.raises(FsError, match="metadata is full") as caught:
                await call
            assert caught.value.errno == errno.ENOSPC
        assert (await fs.statfs()).free_inodes == 0
        await fs.rename(1, b"a", 1, b"b")
        await fs.setattr(attr.ino, size=KIB, mode=0o600)
        assert await read_file(fs, attr.ino) == b"x" * KIB
        await fs.unlink(1, b"small")
        fs.refuse("", "")
        await fs.write(fh, KIB, b"z")
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == b"x" * KIB + b"z"
        assert not fs.namespace.quota.limited


async def test_homes_that_take_nothing_because_they_are_full_are_enospc_to_fsync():
    home = new_home()
    home.delegates = True
    async with filesystem(home, delegate=True, deadline=3.0) as fs:
        for i in range(4):
            ino = await write_file(fs, 1, b"%d" % i, b"x")
        assert fs.session.here
        fh = await fs.open(ino, writable=True)
        await fs.write(fh, 0, b"y")
        fs.rpc.down = {1, 2, 3}
        for full, code in (("the disks are full", errno.ENOSPC), ("", errno.EIO)):
            fs.refuse(full, "")
            with pytest.raises(FsError) as caught:
                await fs.fsync(fh)
            assert caught.value.errno == code
        fs.rpc.down = set()
        await fs.fsync(fh)
        await fs.release(fh)
        assert await read_file(fs, ino) == b"y"
