"""Bytes of replica writes under way: for the process, for each peer, until the last copy."""

import pytest
import trio

from dfs.clock import SystemClock
from dfs.errors import Busy
from dfs.rpc.budget import Flight, InFlight


def full(budget, peer=1, at=0.0):
    flight = budget.acquire_nowait(budget.per_peer)
    flight.send(peer)
    assert not budget.has_room(peer, 1, at)
    return flight


def check_the_process_is_charged_until_the_last_copy(cls):
    budget = cls(limit=100, per_peer=50)
    flight = budget.acquire_nowait(40)
    for peer in (1, 2, 3):
        flight.send(peer)
    flight.close()
    flight.ended(1)
    flight.ended(2)
    assert budget.used == 40  # the third copy is still in memory
    with pytest.raises(Busy):
        budget.acquire_nowait(61)
    budget.acquire_nowait(60).close()
    flight.ended(3)
    assert budget.used == 0
    assert budget.statistics(0.0) == {"bytes": 0, "peers": {}, "slow": (), "refused": 1}


def check_a_peer_is_slow_once_full_for_long(cls):
    budget = cls(limit=1000, per_peer=50, patience=5.0)
    flight = full(budget)
    assert not budget.slow(1, 4.9)
    assert not budget.has_room(1, 1, 4.9)
    assert budget.slow(1, 5.0)
    assert not budget.slow(2, 5.0)
    assert budget.statistics(5.0)["slow"] == (1,)
    assert not budget.slow(1, 10.1)  # nobody tried for long: try again
    assert not budget.has_room(1, 1, 10.1)
    assert not budget.slow(1, 10.2)  # its clock began anew
    flight.close()
    flight.ended(1)
    assert budget.has_room(1, 50, 11.0)
    assert not budget.slow(1, 20.0)


def check_the_peer_limit(cls):
    budget = cls(limit=1000, per_peer=50)
    flight = budget.acquire_nowait(30)
    flight.send(1)
    assert budget.has_room(1, 20, 0.0)
    assert not budget.has_room(1, 21, 0.0)
    assert budget.has_room(2, 80, 0.0)  # a large value is let through alone


CHECKS = [
    check_the_process_is_charged_until_the_last_copy,
    check_a_peer_is_slow_once_full_for_long,
    check_the_peer_limit,
]


@pytest.mark.parametrize("check", CHECKS)
def test_in_flight(check):
    check(InFlight)


class EarlyFlight(Flight):
    __slots__ = ()

    def ended(self, peer):
        super().ended(peer)
        if self._closed and self._size >= 0:  # W of N is enough, it thinks
            size, self._size = self._size, -1
            self._all._release(size)


class Early(InFlight):
    def acquire_nowait(self, size):
        super().acquire_nowait(size)
        return EarlyFlight(self, size)


class Patient(InFlight):
    def slow(self, peer, now):
        return False


class Unforgiving(InFlight):
    def slow(self, peer, now):
        return peer in self._full and now - self._full[peer][0] >= self.patience


class NoPeerLimit(InFlight):
    def has_room(self, peer, size, now):
        return True


class Stuck(InFlight):
    def has_room(self, peer, size, now):
        return self._peers.get(peer, 0) + size <= self.per_peer


@pytest.mark.parametrize("mutant", [Early, Patient, Unforgiving, NoPeerLimit, Stuck])
def test_the_checks_find_mutants(mutant):
    red = 0
    for check in CHECKS:
        try:
            check(mutant)
        except (AssertionError, KeyError):
            red += 1
    assert red


async def test_waiting_for_a_peer_ends_when_it_has_room_or_is_slow():
    budget = InFlight(limit=1000, per_peer=50)
    clock = SystemClock()
    flight = full(budget, at=trio.current_time())
    flight.close()
    start = trio.current_time()
    with pytest.raises(Busy, match="node 1 is slow"):
        await budget.wait_room(1, 10, clock)
    assert trio.current_time() - start == pytest.approx(5.0)
    with pytest.raises(Busy):
        await budget.wait_room(1, 10, clock)  # at once
    assert trio.current_time() - start == pytest.approx(5.0)
    async with trio.open_nursery() as nursery:
        await trio.sleep(20)
        nursery.start_soon(budget.wait_room, 1, 10, clock)
        await trio.sleep(1)
        flight.ended(1)


async def test_waiting_for_the_process():
    budget = InFlight(limit=100, per_peer=100)
    flight = await budget.acquire(80)
    flight.close()
    assert budget.used == 0
    flight = await budget.acquire(80)
    flight.send(1)
    flight.close()
    got = []

    async def second():
        got.append(await budget.acquire(30))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(second)
        await trio.testing.wait_all_tasks_blocked()
        assert not got
        flight.ended(1)
    assert budget.used == 30
