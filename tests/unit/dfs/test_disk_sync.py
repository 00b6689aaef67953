"""Where a sync runs: inline on a quick medium, on a thread on a slow one."""

import threading
import time

import pytest

from dfs.disk import STALL, RealDisk

pytestmark = pytest.mark.realtime


async def places(disk, seconds, count):
    """Which of `count` syncs that take `seconds` ran on the loop's own thread."""
    loop = threading.get_ident()
    ran = []

    def fdatasync():
        ran.append(threading.get_ident() == loop)
        time.sleep(seconds)

    for _ in range(count):
        await disk.sync(fdatasync)
    return ran


async def test_a_quick_medium_is_synced_inline_once_it_proved_quick(tmp_path):
    disk = RealDisk(tmp_path)
    ran = await places(disk, 0, 200)
    assert not ran[0], "an unknown medium is not trusted"
    assert sum(ran) > 100
    disk.close()


async def test_one_slow_sync_moves_the_next_to_a_thread(tmp_path):
    disk = RealDisk(tmp_path)
    while not (await places(disk, 0, 50))[-1]:
        pass
    await places(disk, 1.5 * STALL, 1)
    assert await places(disk, 1.5 * STALL, 5) == [False] * 5
    disk.close()


async def test_an_error_of_a_sync_is_raised_wherever_it_ran(tmp_path):
    disk = RealDisk(tmp_path)

    def fail():
        raise OSError("no")

    for _ in range(2):
        with pytest.raises(OSError, match="no"):
            await disk.sync(fail)
        await places(disk, 0, 200)
    disk.close()
