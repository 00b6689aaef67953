"""Close without waiting: what travels later, with what, and in which order."""

import trio

from dfs.client.session import LAZY, open_session
from dfs.client.submission import Submission, form
from dfs.ids import ROOT_INO
from dfs.volume import entries, items
from tests.unit.client.support import VOLUME, filesystem, new_home, read_file


async def close_small(fs, name, data):
    attr, handle = await fs.create(ROOT_INO, name, 0o644)
    await fs.write(handle, 0, data)
    await fs.flush(handle)
    return attr.ino, handle


def names_and_data(home, upto):
    """What the journal's first entries make of the volume: (names, inodes with data)."""
    names, data = [], []
    for seq, raw in home.volumes[VOLUME].after(0):
        if seq > upto:
            break
        entry = entries.decode(raw)
        if entry.kind != entries.DATA:
            continue
        for _sid, _no, _verdicts, effects in entry.body[0]:
            for effect in effects:
                if effect[0] == 0 and effect[1][8] == items.ENTRY:
                    names += [n for n, _, _ in items.decode_entries(effect[2])]
                if effect[0] == 0 and effect[1][8] == items.EXTENT:
                    data.append(int.from_bytes(effect[1][:8], "big"))
    return names, data


async def test_a_lone_session_closes_without_a_commit_and_the_next_operation_carries_it():
    home = new_home()
    async with filesystem(home) as fs:
        inos = []
        before = home.calls["vol.commit"]
        for i in range(10):
            ino, handle = await close_small(fs, b"f%d" % i, b"data%d" % i)
            inos.append(ino)
            await fs.release(handle)
        assert home.calls["vol.commit"] - before <= 12
        for i, ino in enumerate(inos):
            assert await read_file(fs, ino) == b"data%d" % i
        # Every prefix of the journal that has a name has the data of all the names before it.
        seq = home.volumes[VOLUME].seq
        for upto in range(seq + 1):
            names, data = names_and_data(home, upto)
            known = [n for n in names if n.startswith(b"f")]
            assert data == inos[: len(data)]
            assert len(data) >= len(known) - 1


async def test_a_lazy_commit_does_not_wait_for_company_for_long():
    home = new_home()
    async with filesystem(home) as fs:
        ino, handle = await close_small(fs, b"f", b"data")
        await trio.sleep(5 * LAZY)
        assert names_and_data(home, home.volumes[VOLUME].seq)[1] == [ino]
        await fs.release(handle)


async def test_fsync_waits():
    home = new_home()
    async with filesystem(home) as fs:
        ino, handle = await close_small(fs, b"f", b"data")
        await fs.fsync(handle)
        assert names_and_data(home, home.volumes[VOLUME].seq)[1] == [ino]
        await fs.release(handle)


async def test_close_waits_when_a_reader_has_the_volume_open():
    home = new_home()
    async with filesystem(home) as fs:
        async with open_session(home.client(seed=9, name="reader"), VOLUME, mode="ro"):
            await fs.session.refresh()
            ino, handle = await close_small(fs, b"f", b"data")
            assert names_and_data(home, home.volumes[VOLUME].seq)[1] == [ino]
            await fs.release(handle)
        await fs.session.refresh()
        before = home.calls["vol.commit"]
        _, handle = await close_small(fs, b"g", b"data")
        assert home.calls["vol.commit"] - before == 1
        await fs.release(handle)


async def test_nothing_overtakes_a_lazy_transaction_that_stays_behind():
    home = new_home()
    async with filesystem(home) as fs:
        view = fs.session.view

        def submission(key, lazy):
            txn = view.begin()
            txn.put(items.xattr_key(ROOT_INO, key), items.encode_xattr(b"v"))
            made = Submission(txn, 0, lazy=lazy)
            made._task = object()  # somebody waits
            return made

        first, same, other = (
            submission(b"a", False),
            submission(b"a", True),
            submission(b"b", False),
        )
        batch, left, lost = form([first, same, other], view)
        assert (batch, list(left), lost) == ([first], [same, other], [])
        eager = submission(b"a", False)
        batch, left, lost = form([first, eager, other], view)
        assert (batch, list(left)) == ([first, other], [eager])
