"""File data: inline and chunked commits, write-back, its errors, reading, read-ahead."""

import errno
import random

import pytest
import trio

from dfs.client import compaction, contents, files
from dfs.errors import FsError
from dfs.volume import extents, items
from tests.unit.client.support import VOLUME, filesystem, new_home, read_file, write_file

MIB = 1 << 20


async def extents_of(fs, ino):
    prefix = items.group(ino, items.EXTENT)
    return await fs.session.read(lambda txn: extents.decode(txn.scan(prefix)))


async def test_a_small_file_is_inline_and_costs_two_commits():
    home = new_home()
    async with filesystem(home) as fs:
        before = home.calls["vol.commit"]
        ino = await write_file(fs, 1, b"a", b"x" * 4096)
        await fs.files.flush_all()
        assert home.calls["vol.commit"] - before == 2
        assert home.chunks.puts == 0
        assert await read_file(fs, ino) == b"x" * 4096
        [extent] = await extents_of(fs, ino)
        assert extent.data == b"x" * 4096


async def test_small_appends_do_not_pile_up_as_items():
    home = new_home()
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"log", 0o644)
        for n in range(200):
            await fs.write(fh, n * 100, b"%0100d" % n)
            await fs.fsync(fh)
        await fs.release(fh)
        found = await extents_of(fs, attr.ino)
        assert len(found) <= 6
        assert await read_file(fs, attr.ino) == b"".join(b"%0100d" % n for n in range(200))


async def test_whole_windows_are_uploaded_before_anybody_asks():
    home = new_home()
    async with filesystem(home) as fs:
        _, fh = await fs.create(1, b"a", 0o644)
        for n in range(13):
            await fs.write(fh, n * MIB, bytes([n]) * MIB)
        await trio.sleep(0.1)
        assert home.chunks.puts == 3
        assert (await fs.getattr((await fs.lookup(1, b"a")).ino)).size == 13 * MIB
        await fs.fsync(fh)
        assert home.chunks.puts == 4
        assert home.chunks.durable == set(home.chunks.stored)
        await fs.release(fh)


async def test_a_commit_never_names_a_chunk_that_is_not_durable():
    home = new_home()
    async with filesystem(home) as fs:
        seen = []
        real = home.handle

        async def handle(method, args):
            if method == "vol.commit":
                for _, _, effects in args[5]:
                    for effect in effects:
                        if effect[0] == 0 and effect[1][8] == items.EXTENT:
                            fields = items.decode_extent(effect[2])
                            seen.append(fields[2] in home.chunks.durable if fields[1] else True)
            return await real(method, args)

        home.handle = handle
        for n in range(5):
            await write_file(fs, 1, b"f%d" % n, bytes([n]) * (5 * MIB + n * 1000))
        assert seen
        assert all(seen)


async def test_scattered_writes_share_chunks_and_read_back():
    home = new_home()
    async with filesystem(home) as fs:
        rng = random.Random(1)
        whole = bytearray(rng.randbytes(6 * MIB))
        ino = await write_file(fs, 1, b"a", bytes(whole))
        puts = home.chunks.puts
        fh = await fs.open(ino, writable=True)
        for _ in range(100):
            at, data = rng.randrange(6 * MIB - 9000), rng.randbytes(rng.randrange(1, 9000))
            whole[at : at + len(data)] = data
            await fs.write(fh, at, data)
            got = await fs.read(fh, at - 50 if at > 50 else 0, 10_000)
            begin = at - 50 if at > 50 else 0
            assert bytes(got) == bytes(whole[begin : begin + 10_000])
        await fs.fsync(fh)
        assert home.chunks.puts - puts == 1
        assert await read_file(fs, ino) == bytes(whole)
        await fs.release(fh)


async def test_writes_during_a_commit_are_kept():
    home = new_home()
    home.chunks.delay = 0.05
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        await fs.write(fh, 0, b"a" * 100_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.fsync, fh)
            await trio.sleep(0.02)
            await fs.write(fh, 50_000, b"b" * 10)
        want = b"a" * 50_000 + b"b" * 10 + b"a" * 49_990
        assert bytes(await fs.read(fh, 0, 200_000)) == want
        await fs.fsync(fh)
        await fs.release(fh)
        async with filesystem(home, seed=1) as other:
            assert await read_file(other, attr.ino) == want


@pytest.mark.parametrize("over", [(0, 100_000), (0, 200_000), (10, 99_980)])
async def test_what_is_written_over_during_its_commit_is_committed_as_it_was(over):
    """A file that changes faster than its chunks are stored is durable after fsync nevertheless."""
    home = new_home()
    home.chunks.delay = 0.05
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        await fs.write(fh, 0, b"a" * 100_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.fsync, fh)
            await trio.sleep(0.02)
            await fs.write(fh, over[0], b"b" * over[1])
        async with filesystem(home, seed=1) as other:
            assert await read_file(other, attr.ino) == b"a" * 100_000
        await fs.release(fh)
        want = b"a" * over[0] + b"b" * over[1] + b"a" * (100_000 - over[0] - over[1])
        assert await read_file(fs, attr.ino) == want


async def test_equal_bytes_written_again_elsewhere_survive_a_commit():
    home = new_home()
    home.chunks.delay = 0.05
    data = b"abcd" * 2000
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        await fs.write(fh, 0, data)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fs.fsync, fh)
            await trio.sleep(0.02)
            await fs.write(fh, 2, data)  # the same object, moved by two bytes
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == data[:2] + data


async def test_dirty_data_is_committed_after_a_second():
    home = new_home()
    async with filesystem(home) as fs, filesystem(home, seed=1) as other:
        attr, fh = await fs.create(1, b"a", 0o644)
        await fs.write(fh, 0, b"hello")
        await trio.sleep(2)
        assert await read_file(other, attr.ino) == b"hello"
        await fs.release(fh)


async def test_an_error_of_the_write_back_comes_once_and_the_data_is_kept():
    home = new_home()
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        home.chunks.broken = True
        await fs.write(fh, 0, b"x" * 10_000)
        await trio.sleep(3)
        with pytest.raises(FsError) as caught:
            await fs.write(fh, 0, b"y")
        assert caught.value.errno == errno.EIO
        with pytest.raises(FsError):
            await fs.fsync(fh)
        home.chunks.broken = False
        await fs.fsync(fh)
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == b"x" * 10_000


async def test_a_full_cluster_is_enospc_at_close():
    home = new_home()
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        home.chunks.full = True
        await fs.write(fh, 0, b"x" * 10_000)
        with pytest.raises(FsError) as caught:
            await fs.flush(fh)
        assert caught.value.errno == errno.ENOSPC
        home.chunks.full = False
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == b"x" * 10_000


async def test_holes_read_as_zeros_and_truncation_forgets():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"end", at=9 * MIB)
        assert (await fs.getattr(ino)).size == 9 * MIB + 3
        assert await read_file(fs, ino) == bytes(9 * MIB) + b"end"
        await fs.setattr(ino, size=9 * MIB + 1)
        await fs.setattr(ino, size=9 * MIB + 5)
        assert (await read_file(fs, ino))[-5:] == b"e\0\0\0\0"
        fh = await fs.open(ino, writable=True)
        await fs.write(fh, 100, b"dirty")
        await fs.setattr(ino, size=102)
        await fs.setattr(ino, size=200)
        assert bytes(await fs.read(fh, 98, 10)) == b"\0\0di" + bytes(6)
        await fs.release(fh)
        assert await read_file(fs, ino) == bytes(100) + b"di" + bytes(98)


async def test_a_deleted_open_file_is_readable_until_its_last_close():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"x" * 10_000)
        one, two = await fs.open(ino, writable=True), await fs.open(ino)
        await fs.unlink(1, b"a")
        assert (await fs.getattr(ino)).nlink == 0
        await fs.write(one, 5, b"yyy")
        await fs.release(one)
        assert bytes(await fs.read(two, 0, 20_000)) == b"x" * 5 + b"yyy" + b"x" * 9992
        await fs.release(two)
        with pytest.raises(FsError) as caught:
            await fs.getattr(ino)
        assert caught.value.errno == errno.ESTALE
        assert (await fs.statfs()).inodes == 1


async def test_orphans_of_a_dead_client_are_purged_by_the_next_only_writer():
    home = new_home()
    async with filesystem(home, flush=False) as fs:
        ino = await write_file(fs, 1, b"a", b"x" * 10_000)
        await fs.open(ino)
        await fs.unlink(1, b"a")
        home.fence(VOLUME, fs.session.sid)
        fs.rpc.down = {1, 2, 3}
    async with filesystem(home, seed=1) as other:
        await trio.sleep(1)
        assert (await other.statfs()).inodes == 1


async def test_a_sequential_reader_is_ahead_of_itself_and_fetches_everything_once():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", random.Random(1).randbytes(20 * MIB))
    home.chunks.delay = 0.010
    async with filesystem(home, seed=1) as fs:
        fh = await fs.open(ino)
        began = trio.current_time()
        for at in range(0, 20 * MIB, 128 << 10):
            assert len(await fs.read(fh, at, 128 << 10)) == 128 << 10
        assert home.chunks.reads <= 10  # several MiB at a time
        assert fs.files.statistics()["cache"]["used"] == 20 * MIB
        assert trio.current_time() - began < 20 * 0.010 / 2
        await fs.release(fh)


async def test_readers_of_one_chunk_share_a_fetch():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"z" * MIB)
        fh = await fs.open(ino)
        async with trio.open_nursery() as nursery:
            for n in range(8):
                nursery.start_soon(fs.read, fh, n * 1000, 1000)
        assert home.chunks.reads == 1
        await fs.release(fh)


async def test_a_scattered_reader_does_not_fetch_whole_megabytes():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", bytes(64 * MIB))
    async with filesystem(home, seed=1, cache_bytes=8 * MIB) as fs:
        lengths = []
        real = fs.files._cache._chunks.read

        async def read(chunk_id, offset, length):
            lengths.append(length)
            return await real(chunk_id, offset, length)

        fs.files._cache._chunks.read = read
        fh = await fs.open(ino)
        for n in (40, 3, 60, 20, 50, 10, 33, 5):
            await fs.read(fh, n * MIB + 5000, 4096)
        assert max(lengths) <= 64 << 10
        for n in range(64):
            await fs.read(fh, n * MIB, MIB)
        assert fs.files.statistics()["cache"]["used"] <= 9 * MIB
        await fs.release(fh)


async def test_close_to_open_between_two_clients():
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        ino = await write_file(a, 1, b"f", b"0" * 100_000)
        for n in range(1, 10):
            writer, reader = (a, b) if n % 2 else (b, a)
            fh = await writer.open(ino, writable=True)
            await writer.write(fh, n * 10, b"%d" % n)
            await writer.flush(fh)
            got = await read_file(reader, ino)
            assert got[n * 10 : n * 10 + 1] == b"%d" % n
            await writer.release(fh)


async def test_a_lost_session_fails_dirty_files_once_and_keeps_their_data():
    home = new_home()
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        await fs.write(fh, 0, b"hello")
        home.fence(VOLUME, fs.session.sid)
        await trio.sleep(0.05)
        with pytest.raises(FsError) as caught:
            await fs.flush(fh)
        assert caught.value.errno == errno.EIO
        await fs.flush(fh)
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == b"hello"


async def test_a_file_removed_by_another_client_is_stale():
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        ino = await write_file(a, 1, b"f", b"0")
        fh = await a.open(ino, writable=True)
        await b.session.refresh()
        await b.unlink(1, b"f")
        await a.write(fh, 0, b"1")
        with pytest.raises(FsError) as caught:
            await a.fsync(fh)
        assert caught.value.errno == errno.ESTALE
        with pytest.raises(FsError) as caught:
            await a.open(ino)
        assert caught.value.errno == errno.ESTALE
        await a.release(fh)


async def test_a_writer_that_is_faster_than_the_cluster_waits():
    home = new_home()
    home.chunks.delay = 0.5
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        data = bytes(MIB)
        for n in range(200):
            await fs.write(fh, n * MIB, data)
            assert fs.files.statistics()["uncommitted"] <= 100 * MIB
        await fs.release(fh)
        assert (await fs.getattr(attr.ino)).size == 200 * MIB


async def test_a_file_cut_to_pieces_is_compacted_and_stays_the_same():
    home = new_home()
    async with filesystem(home) as fs:
        rng = random.Random(2)
        whole = bytearray(rng.randbytes(6 * MIB))
        ino = await write_file(fs, 1, b"a", bytes(whole))
        mtime = 0
        fh = await fs.open(ino, writable=True)
        for n in range(300):
            at, data = rng.randrange(6 * MIB - 9000), rng.randbytes(8192)
            whole[at : at + len(data)] = data
            await fs.write(fh, at, data)
            if n % 10 == 9:
                await fs.fsync(fh)
                mtime = (await fs.getattr(ino)).mtime
        await trio.sleep(compaction.STILL + 2)
        assert len(await extents_of(fs, ino)) < 150
        assert fs.files.statistics()["compacted"] > 100
        assert await read_file(fs, ino) == bytes(whole)
        assert (await fs.getattr(ino)).mtime == mtime
        await fs.release(fh)


async def test_compaction_never_undoes_what_was_written_meanwhile(monkeypatch):
    monkeypatch.setattr(compaction, "HURRY", 0.01)  # it waits for nobody
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        ino = await write_file(a, 1, b"a", bytes(MIB))
        one, two = await a.open(ino, writable=True), await b.open(ino, writable=True)
        whole, rng = bytearray(MIB), random.Random(3)
        home.chunks.delay = 0.02  # compaction takes long
        for n in range(150):
            fs, fh = ((a, one), (b, two))[n % 2]
            at, data = rng.randrange(MIB - 100), bytes([n]) * 100
            whole[at : at + 100] = data
            await fs.write(fh, at, data)
            await fs.fsync(fh)
        await trio.sleep(2)
        assert await read_file(b, ino) == bytes(whole)
        await a.release(one)
        await b.release(two)


async def test_that_test_sees_a_compaction_that_does_not_look_again(monkeypatch):
    def replace(self, txn, ino, seen, new):
        start, end = seen[0].offset, seen[-1].end
        old = contents.scan_extents(txn, ino, start, end)
        txn.extend(extents.plan_write(ino, old, new))
        return True

    monkeypatch.setattr(contents.Contents, "replace", replace)
    with pytest.raises(BaseExceptionGroup) as caught:
        await test_compaction_never_undoes_what_was_written_meanwhile(monkeypatch)
    assert caught.group_contains(AssertionError, depth=None)


async def test_two_first_contents_of_a_file_conflict():
    """Who puts the first content of a file looks at nothing, but relies on nobody having done so."""
    home = new_home()
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        await fs.release(fh)
        content = contents.Contents(fs.namespace, clear_privileges=True)

        def publish(txn, data):
            content.publish(txn, attr.ino, [extents.inline(0, data)], 1)
            return txn

        first, second = (publish(fs.session.view.begin(), data) for data in (b"1", b"22"))
        assert items.group(attr.ino, items.EXTENT) in second.groups
        await fs.session.transact(lambda txn: publish(txn, b"1"))
        assert fs.session.view.changed_since(first.base, first.keys, first.groups)
        assert await extents_of(fs, attr.ino) == [extents.inline(0, b"1")]


# ------------------------------------------------------------------ what else happens meanwhile


async def meanwhile(first, *others, after=0.02):
    """Run a call, and others one after the other while it is under way; returns their results."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await trio.sleep(after)
        return [await other() for other in others]


async def test_a_file_is_never_seen_half_truncated():
    """Neither what is not committed without the rest, nor the rest without that."""
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"a" * 20_000)
        fh = await fs.open(ino, writable=True)
        await fs.write(fh, 0, b"b" * 10_000)
        fs.rpc.delay = 0.1
        content, attr = await meanwhile(
            lambda: fs.setattr(ino, size=5000),
            lambda: fs.read(fh, 0, 30_000),
            lambda: fs.getattr(ino),
        )
        assert bytes(content) == b"b" * 5000
        assert attr.size == 5000
        [content] = await meanwhile(
            lambda: fs.setattr(ino, size=12_000), lambda: fs.read(fh, 0, 30_000)
        )
        assert bytes(content) == b"b" * 5000 + bytes(7000)
        fs.rpc.delay = 0.0
        await fs.release(fh)
        assert await read_file(fs, ino) == b"b" * 5000 + bytes(7000)


async def test_what_is_written_beyond_a_truncation_under_way_comes_after_it():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"a" * 20_000)
        fh = await fs.open(ino, writable=True)
        fs.rpc.delay = 0.1
        want = b"a" * 5000 + bytes(3000) + b"c"
        _, content = await meanwhile(
            lambda: fs.setattr(ino, size=5000),
            lambda: fs.write(fh, 8000, b"c"),
            lambda: fs.read(fh, 0, 30_000),
        )
        assert bytes(content) == want
        fs.rpc.delay = 0.0
        await fs.release(fh)
        assert await read_file(fs, ino) == want


async def test_a_truncation_that_fails_leaves_what_was_written():
    home = new_home()
    async with filesystem(home, deadline=2.0) as fs:
        ino = await write_file(fs, 1, b"a", b"a" * 100)
        fh = await fs.open(ino, writable=True)
        await fs.write(fh, 50, b"b" * 100)

        async def cut():
            with pytest.raises(FsError):
                await fs.setattr(ino, size=20)

        fs.rpc.down = {1, 2, 3}
        await meanwhile(cut, lambda: fs.write(fh, 60, b"c" * 10))
        assert fs.files.statistics()["uncommitted"] == 100
        fs.rpc.down = set()
        await trio.sleep(3)
        with pytest.raises(FsError):  # the session was lost, too
            await fs.fsync(fh)
        await fs.release(fh)
        want = b"a" * 50 + b"b" * 10 + b"c" * 10 + b"b" * 80
        assert await read_file(fs, ino) == want


async def test_fsync_beside_a_truncation_waits_for_it():
    """What was written before is durable then, or durably cut."""
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"a" * 20_000)
        fh = await fs.open(ino, writable=True)
        await fs.write(fh, 0, b"b" * 20_000)
        fs.rpc.delay = 0.1
        async with filesystem(home, seed=1, mode="ro") as other:
            _, _, found = await meanwhile(
                lambda: fs.setattr(ino, size=0),
                lambda: fs.fsync(fh),
                other.session.refresh,
                lambda: read_file(other, ino),
            )
        assert found == b""
        fs.rpc.delay = 0.0
        await fs.release(fh)


async def test_who_opens_a_file_while_it_is_truncated_does_not_see_the_rest_afterwards():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"a" * 20_000)
        fs.rpc.delay = 0.1
        opened = []

        async def look():
            opened.append(await fs.open(ino, writable=True))
            await fs.read(opened[0], 0, 20_000)

        async def cut():
            await trio.sleep(0.1)  # the open has looked at the newest state by then
            await fs.setattr(ino, size=5)

        await meanwhile(cut, look)
        await trio.sleep(0.5)
        await fs.write(opened[0], 10, b"x")
        assert bytes(await fs.read(opened[0], 0, 20_000)) == b"a" * 5 + bytes(5) + b"x"
        fs.rpc.delay = 0.0
        await fs.release(opened[0])


async def test_the_time_of_a_truncation_is_not_set_back_by_what_was_written_before():
    home = new_home()
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        await fs.write(fh, 0, b"a" * 100)
        await fs.setattr(attr.ino, size=50)
        cut = (await fs.getattr(attr.ino)).mtime
        await fs.fsync(fh)
        assert (await fs.getattr(attr.ino)).mtime == cut
        await fs.release(fh)


async def test_data_given_up_while_its_chunks_are_sent_is_not_committed_after_all():
    """The session was lost with the delegation: others may have changed the file since."""
    home = new_home()
    home.delegates = True
    async with filesystem(home, delegate=True) as fs:
        ino = await write_file(fs, 1, b"a", b"a" * 50_000)
        for n in range(5):
            await write_file(fs, 1, b"f%d" % n, b"")
            await trio.sleep(0.2)
        assert fs.session.here
        fh = await fs.open(ino, writable=True)
        await fs.session.settle()
        home.chunks.delay = 3.0
        await fs.write(fh, 0, b"b" * 50_000)

        async def sync():
            with pytest.raises(FsError) as caught:
                await fs.fsync(fh)
            assert caught.value.errno == errno.EIO

        async def lose():
            home.revoke(VOLUME)

        await meanwhile(sync, lose)
        home.chunks.delay = 0.0
        await fs.fsync(fh)
        await fs.release(fh)
        assert await read_file(fs, ino) == b"a" * 50_000
        async with filesystem(home, seed=1) as other:
            assert await read_file(other, ino) == b"a" * 50_000


@pytest.mark.parametrize("how", ["close", "chmod", "utimes"])
async def test_an_error_is_told_to_who_syncs_not_spent_on_who_closes_or_sets_a_mode(how):
    home = new_home()
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        other = await fs.open(attr.ino, writable=True)
        await fs.write(fh, 0, b"hello")
        home.fence(VOLUME, fs.session.sid)
        await trio.sleep(0.05)
        if how == "close":
            await fs.release(other)
        elif how == "chmod":
            await fs.setattr(attr.ino, mode=0o600)
        else:
            await fs.setattr(attr.ino, mtime=5)
        with pytest.raises(FsError) as caught:
            await fs.fsync(fh)
        assert caught.value.errno == errno.EIO
        await fs.fsync(fh)
        await fs.release(fh)


async def test_a_file_that_is_closed_while_its_last_name_is_removed_is_purged():
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"x" * 10_000)
        fh = await fs.open(ino)
        fs.rpc.delay = 0.1
        await meanwhile(lambda: fs.unlink(1, b"a"), lambda: fs.release(fh))
        fs.rpc.delay = 0.0
        await fs.session.refresh()
        assert (await fs.statfs())[2:4] == (0, 1)


async def test_an_unmount_commits_all_files_though_one_cannot_be():
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        stale = await write_file(a, 1, b"gone", b"0")
        fh = await a.open(stale, writable=True)
        await b.session.refresh()
        await b.unlink(1, b"gone")
        await a.write(fh, 0, b"1")
        handles = []
        for n in range(100):
            attr, handle = await a.create(1, b"f%d" % n, 0o644)
            await a.write(handle, 0, b"%d" % n)
            handles.append((attr.ino, handle))
        with pytest.raises(FsError) as caught:
            await a.shut_down()
        assert caught.value.errno == errno.ESTALE
        for n, (ino, _) in enumerate(handles):
            assert await read_file(b, ino) == b"%d" % n
        for _, handle in [(stale, fh), *handles]:
            await a.release(handle)
        assert not a.files._files


async def test_a_file_that_is_written_over_and_over_does_not_fill_the_memory():
    home = new_home()
    home.chunks.delay = 0.5
    async with filesystem(home) as fs:
        _, fh = await fs.create(1, b"a", 0o644)
        data = bytes(4 * MIB)
        for _ in range(60):
            await fs.write(fh, 0, data)
            assert fs.files.statistics()["uploading"] <= 96 / 4 + 1
        await fs.release(fh)


async def test_what_goes_wrong_with_a_file_is_not_told_to_the_writer_of_another(monkeypatch):
    monkeypatch.setattr("dfs.client.files.MAX_DIRTY", 100_000)
    home = new_home()
    async with filesystem(home) as a, filesystem(home, seed=1) as b:
        stale = await write_file(a, 1, b"gone", b"0")
        one = await a.open(stale, writable=True)
        _, two = await a.create(1, b"b", 0o644)
        await b.session.refresh()
        await b.unlink(1, b"gone")
        await a.write(one, 0, bytes(90_000))
        # While the writer's own file is being committed, there is no room for the other either.
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.write, two, 0, bytes(50_000))
            await trio.sleep(0.0001)
            await a.write(two, 50_000, bytes(70_000))
        with pytest.raises(FsError) as caught:
            await a.fsync(one)
        assert caught.value.errno == errno.ESTALE
        await a.release(one)
        await a.release(two)


async def test_a_client_that_ends_commits_no_chunk_that_was_not_stored():
    home = new_home()
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        real = fs.files._chunks.put_prepared
        broken = trio.Event()

        async def put(prepared, *, durable=False):
            await broken.wait()
            raise ValueError("a defect")

        fs.files._chunks.put_prepared = put
        upload = None
        try:
            async with trio.open_nursery() as nursery:
                outer, fs.files._nursery = fs.files._nursery, nursery
                await fs.write(fh, 0, b"x" * 10_000)
                fs.files._pack(fs.files._files[attr.ino].buffer)
                [upload] = fs.files._uploads
                broken.set()
        except* ValueError:
            pass
        fs.files._nursery, fs.files._chunks.put_prepared = outer, real
        assert isinstance(upload.error, FsError)
        await fs.fsync(fh)
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == b"x" * 10_000


@pytest.mark.parametrize("many", [True, False])
async def test_many_pieces_are_committed_early(many):
    async with filesystem(new_home()) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        await trio.sleep(2 * files.AGE)
        for n in range(files.MANY + 1 if many else files.MANY // 2):
            await fs.write(fh, n * 9000, b"%d" % n)
        await trio.sleep(0.5 * files.AGE)
        assert fs.files.is_dirty(attr.ino) != many
        await trio.sleep(files.AGE)
        assert not fs.files.is_dirty(attr.ino)
        await fs.release(fh)


async def test_many_pieces_that_cannot_be_stored_are_not_tried_again_at_once():
    home = new_home()
    async with filesystem(home) as fs:
        _, fh = await fs.create(1, b"a", 0o644)
        home.chunks.full = True
        tried = []
        real = fs.files._commit

        async def commit(file):
            tried.append(trio.current_time())
            await real(file)

        fs.files._commit = commit
        for n in range(files.MANY + 1):
            await fs.write(fh, n * 9000, b"%d" % n)
        await trio.sleep(10 * files.AGE)
        assert 2 <= len(tried) <= 11
        home.chunks.full = False
        await fs.fsync(fh)
        await fs.release(fh)


LAST = items.MAX_OFFSET


async def test_offsets_at_the_limits():
    home = new_home()
    async with filesystem(home) as fs:
        attr, fh = await fs.create(1, b"a", 0o644)
        for at, length, code in [
            (-1, 1, errno.EINVAL),
            (-5, 0, errno.EINVAL),
            (LAST, 1, errno.EFBIG),
            (1 << 70, 1, errno.EFBIG),
        ]:
            with pytest.raises(FsError) as caught:
                await fs.write(fh, at, b"x" * length)
            assert caught.value.errno == code
        for at, length in [(-1, 5), (0, -5), (-(1 << 70), 1)]:
            with pytest.raises(FsError) as caught:
                await fs.read(fh, at, length)
            assert caught.value.errno == errno.EINVAL
        for size, code in [(-1, errno.EINVAL), (LAST + 1, errno.EFBIG)]:
            with pytest.raises(FsError) as caught:
                await fs.setattr(attr.ino, size=size)
            assert caught.value.errno == code
        assert await fs.write(fh, 0, b"") == 0
        assert bytes(await fs.read(fh, 0, 0)) == b""
        assert (await fs.getattr(attr.ino)).size == 0
        for part in (b"tail", b"x" * 50_000):
            await fs.write(fh, LAST - len(part), part)
            for _ in range(2):
                assert bytes(await fs.read(fh, LAST - len(part), 1 << 20)) == part
                assert bytes(await fs.read(fh, LAST - 1, 10)) == part[-1:]
                assert bytes(await fs.read(fh, LAST, 10)) == b""
                assert bytes(await fs.read(fh, 1 << 70, 10)) == b""
                assert bytes(await fs.read(fh, 1 << 62, 10)) == bytes(10)
                await fs.fsync(fh)
        assert (await fs.getattr(attr.ino)).size == LAST
        await fs.setattr(attr.ino, size=LAST - 10)
        await fs.setattr(attr.ino, size=LAST)
        assert bytes(await fs.read(fh, LAST - 20, 100)) == b"x" * 10 + bytes(10)
        await fs.setattr(attr.ino, size=3)
        await fs.release(fh)
        assert await read_file(fs, attr.ino) == bytes(3)


async def test_an_open_that_cannot_truncate_leaves_nothing_open():
    home = new_home()
    async with filesystem(home, deadline=2.0) as fs:
        ino = await write_file(fs, 1, b"a", b"a" * 100)
        real = fs.files.truncate

        async def truncate(ino, size):
            fs.rpc.down = {1, 2, 3}
            await real(ino, size)

        fs.files.truncate = truncate
        with pytest.raises(FsError):
            await fs.open(ino, writable=True, truncate=True)
        assert len(fs.handles) == 0
        assert not fs.files._files
        fs.rpc.down = set()
        await trio.sleep(3)
        assert await read_file(fs, ino) == b"a" * 100


async def test_a_file_may_be_closed_and_opened_while_it_waits_for_compaction(monkeypatch):
    monkeypatch.setattr(contents, "CROWDED", 2)
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"a" * MIB)
        for _ in range(3):
            fh = await fs.open(ino, writable=True)
            for n in range(40):
                await fs.write(fh, n * 20_000, b"b" * 5000)
            await fs.fsync(fh)
            await fs.release(fh)
            await trio.sleep(0.1)
        await trio.sleep(30)
        assert fs.files.statistics()["compacted"]
        want = bytearray(b"a" * MIB)
        for n in range(40):
            want[n * 20_000 : n * 20_000 + 5000] = b"b" * 5000
        assert await read_file(fs, ino) == bytes(want)


@pytest.mark.parametrize("length", [100_000, 3 * MIB])
async def test_a_reader_gets_no_less_when_a_fetch_has_a_defect(length):
    home = new_home()
    async with filesystem(home) as fs:
        ino = await write_file(fs, 1, b"a", b"a" * length)
        fh = await fs.open(ino)
        cache = fs.files._cache
        found = []

        async def read(*_):
            await trio.sleep(0.1)
            raise ValueError("a defect")

        async def reader():
            try:
                with trio.CancelScope(shield=True):
                    found.append(await fs.read(fh, 0, length))
            except FsError as e:
                found.append(e.errno)

        cache._chunks.read = read
        try:
            async with trio.open_nursery() as nursery:
                outer, cache._nursery = cache._nursery, nursery
                nursery.start_soon(reader)
        except* ValueError:
            pass
        assert found == [errno.EIO]
        del cache._chunks.read
        cache._nursery = outer
        assert len(await fs.read(fh, 0, length)) == length
        await fs.release(fh)
