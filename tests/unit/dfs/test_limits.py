"""Disk limits: levels, hysteresis, floors, refusals."""

import pytest

from dfs.errors import ConfigError, DiskFull
from dfs.limits import UNSEEN, UNSEEN_WRITES, DiskWatch, Level, Limits

G = 1 << 30


class Disk:
    def __init__(self, total):
        self.total = total
        self.free = total

    def usage(self):
        return self.total, self.free

    def used(self, percent):
        self.free = round(self.total * (100 - percent) / 100)


def check(limits):
    """Levels of a large disk on the way up and down."""
    total = 1000 * G

    def walk(percents, level):
        found = []
        for percent in percents:
            level = limits.level(total, round(total * (100 - percent) / 100), level)
            found.append(level.label)
        return found

    up = walk([50, 84.9, 85, 89.9, 90, 94.9, 95, 99], Level.OK)
    assert up == ["ok", "ok", "near", "near", "backfill", "backfill", "full", "full"]
    down = walk([94.1, 93.9, 89.1, 88.9, 84.1, 83.9], Level.FULL)
    assert down == ["full", "backfill", "backfill", "near", "near", "ok"]


def check_floor(limits):
    """A small disk keeps the floor free, whatever the percentages say."""
    total, floor = 2 * G, 256 << 20
    assert limits.level(total, 3 * floor) == Level.OK
    assert limits.level(total, 3 * floor - 1) == Level.NEAR
    assert limits.level(total, 2 * floor - 1) == Level.BACKFILL
    assert limits.level(total, floor - 1) == Level.FULL
    assert limits.level(total, floor + 1, Level.FULL) == Level.FULL
    assert limits.level(total, floor + total // 100 + 1, Level.FULL) == Level.BACKFILL


def test_levels_and_their_hysteresis():
    check(Limits())


def test_a_floor_of_free_bytes():
    check_floor(Limits())
    tiny = Limits(floor=1 << 20)
    assert tiny.level(64 << 20, 60 << 20) == Level.OK  # a small disk with a small floor works
    assert tiny.level(64 << 20, 3 << 20) == Level.FULL
    assert tiny.level(0, 0) == Level.OK  # unknown


class NoHysteresis(Limits):
    def level(self, total, free, before=Level.OK):
        return super().level(total, free)


class NoFloor(Limits):
    def level(self, total, free, before=Level.OK):
        return Limits(floor=0).level(total, free, before)


MUTANTS = [Limits(near=86), Limits(near=84), Limits(backfill=91), Limits(backfill=89)]
MUTANTS += [Limits(full=96), Limits(full=94), Limits(hysteresis=0), Limits(hysteresis=3)]


@pytest.mark.parametrize("mutant", [*MUTANTS, NoHysteresis()])
def test_the_check_finds_other_limits(mutant):
    with pytest.raises(AssertionError):
        check(mutant)


@pytest.mark.parametrize("mutant", [NoHysteresis(), NoFloor()])
def test_the_check_finds_other_floors(mutant):
    with pytest.raises(AssertionError):
        check_floor(mutant)


def test_nonsense_is_refused():
    for bad in (
        {"near": 0},
        {"near": 92},
        {"backfill": 96},
        {"full": 101},
        {"floor": -1},
    ):
        with pytest.raises(ConfigError):
            Limits(**bad)


def test_what_a_watch_refuses():
    disk = Disk(1000 * G)
    watch = DiskWatch(Limits(), disk.usage, "/data")
    disk.used(89)
    watch.check_write(1 << 20)
    watch.check_move(1 << 20)
    with pytest.raises(DiskFull, match=r"/data: .* no data from other nodes"):
        watch.check_move(11 * G)  # would cross the limit
    watch.check_move(1 << 20)  # but it has not been crossed
    disk.used(90)
    with pytest.raises(DiskFull):
        watch.check_move()
    watch.check_write(1 << 20)
    disk.used(95)
    with pytest.raises(DiskFull, match="delete data or add capacity"):
        watch.check_write()
    disk.used(94.5)
    with pytest.raises(DiskFull):
        watch.check_write()
    disk.used(93)
    watch.check_write()
    assert watch.refused == 4
    assert watch.level() == Level.BACKFILL


def test_room_is_what_clients_may_write():
    disk = Disk(1000 * G)
    watch = DiskWatch(Limits(), disk.usage, "/data")
    disk.used(90)
    assert watch.room() == 50 * G
    watch.check_write(watch.room() - G)
    with pytest.raises(DiskFull):
        watch.check_write(watch.room() + G)
    disk.used(96)
    assert watch.room() == 0
    small = DiskWatch(Limits(floor=256 << 20), lambda: (300 << 20, 257 << 20), "/data")
    assert small.room() == 1 << 20


def test_while_there_is_room_not_every_write_looks():
    disk = Disk(1000 * G)
    looks = []
    watch = DiskWatch(Limits(), lambda: looks.append(1) or disk.usage(), "/data", credit=True)
    for _ in range(2 * (UNSEEN_WRITES + 1)):
        watch.check_write(100)
    assert len(looks) == 2
    looks.clear()
    watch.check_write(100)  # looks
    watch.check_write(UNSEEN // 2)
    watch.check_write(UNSEEN // 2)
    assert len(looks) == 1
    watch.check_write(UNSEEN // 2)
    assert len(looks) == 2
    watch.check_write(2 * UNSEEN)
    assert len(looks) == 3


def test_a_disk_that_fills_up_unseen_is_noticed_within_the_bounds():
    disk = Disk(1000 * G)
    watch = DiskWatch(Limits(), disk.usage, "/data", credit=True)
    watch.check_write(100)
    disk.used(99)
    for _ in range(UNSEEN_WRITES):
        watch.check_write(100)
    with pytest.raises(DiskFull):
        watch.check_write(1)
    disk.used(86)  # near: each write looks
    watch.check_write(1)
    disk.used(99)
    with pytest.raises(DiskFull):
        watch.check_write(1)
    disk.used(10)  # and room is found at once
    watch.check_write(1)


def test_a_look_by_anybody_ends_the_credit():
    usage = [1000 << 20, 900 << 20]
    watch = DiskWatch(Limits(), lambda: (usage[0], usage[1]), "d", credit=True)
    watch.check_write(10)
    usage[1] = 0
    watch.check_write(10)  # not looked at yet
    assert watch.level() is Level.FULL
    with pytest.raises(DiskFull):
        watch.check_write(10)
