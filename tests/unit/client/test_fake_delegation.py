"""The fake home of the client's tests delegates, recalls and revokes as real homes do."""

import pytest
import trio

from dfs.errors import Busy, Fenced
from dfs.testing.fakehome import FakeHome
from dfs.volume import entries
from dfs.volume.effects import PUT
from dfs.volume.items import DIR, Inode, inode_key

VOLUME = b"v" * 16


def txn(ino):
    return ((), (), ((PUT, inode_key(ino), Inode(DIR, 0).encode()),))


async def holding():
    """(fake home, sid of the holder, a way to ask)."""
    home = FakeHome()
    home.create(VOLUME, {"salt": b"s" * 16})

    async def ask(method, *args):
        return await home.handle("vol." + method, (VOLUME, *args))

    sid = (await ask("open", "rw", b"a" * 16, "a"))[0]
    assert (await ask("delegate", sid))[:3] == (0, 0, 1.0)
    home.delegates = True
    assert (await ask("delegate", sid))[:3] == (1, 3, 0.0)
    return home, sid, ask


async def test_a_recall_wakes_the_holder_and_waits_for_the_return():
    _, sid, ask = await holding()
    told = []

    async def holder():
        told.append((await ask("watch", sid, 3, 0.5))[4])
        assert (await ask("commit", sid, 1, 3, 3, (txn(5),), 0, 1))[5] == (1, sid, True)
        await ask("return", sid, 1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(holder)
        await trio.sleep(0.1)
        other, seq, *_ = await ask("open", "rw", b"b" * 16, "b")
    assert told == [(1, sid, True)]
    assert seq == 6
    assert (await ask("watch", other, seq, 0.0))[4] == (2, 0, False)
    with pytest.raises(Fenced):
        await ask("commit", sid, 2, 3, 3, (txn(6),), 0, 1)
    assert (await ask("delegate", sid))[0] == 0  # there are two sessions


async def test_others_get_busy_and_revocation_ends_the_session():
    home, sid, ask = await holding()
    with pytest.raises(Busy):
        await ask("sync")
    home.revoke(VOLUME)
    with pytest.raises(Fenced):
        await ask("watch", sid, 3, 0.0)
    entry = entries.decode(home.volumes[VOLUME].log[-1])
    assert entries.closed(entry) == (sid,)


async def test_revocation_after_a_time():
    home, sid, ask = await holding()
    home.revoke_after = 0.2
    assert (await ask("sync"))[0] == 4
    with pytest.raises(Fenced):
        await ask("delegate", sid)


async def test_closing_the_holder_ends_it():
    home, sid, ask = await holding()
    home.fence(VOLUME, sid)
    assert home.volumes[VOLUME].delegation == (2, 0, False)
    assert (await ask("sync"))[0] == 4
