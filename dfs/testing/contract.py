"""What every `dfs.env.Endpoint` does: one test class that the real one and the simulator pass.

Subclass it in a test module and give it a `world`; a class for real sockets is marked `realtime`.
"""

from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
import trio.lowlevel

from dfs.env import Buffer, Buffers, Context, Deferred, Endpoint, Handler, Priority, Reply
from dfs.errors import (
    ConfigError,
    Corrupt,
    DeadlineExceeded,
    DfsError,
    FsError,
    LocalProtocolError,
    UnknownMethod,
    Unreachable,
)


@dataclass
class World:
    """Two endpoints that reach each other."""

    client: Endpoint
    server: Endpoint
    address: str  # where the server may serve; a port of 0 is fine
    nowhere: str  # an address at which nobody serves


def _echo(context: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
    return args, data


def _describe(context: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
    return (context.peer, context.epoch, context.deadline, context.priority), b""


def _refuse(context: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
    raise FsError("no such directory", 2)


async def _later(context: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
    await trio.sleep(args[0])
    return (len(data), *args), data


async def _refuse_later(context: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
    await trio.lowlevel.checkpoint()
    raise Corrupt("bad bytes", b"id", 7)


def _deferred(context: Context, args: tuple[Any, ...], data: memoryview) -> Deferred:
    answer = Deferred()
    soon = trio.lowlevel.current_trio_token().run_sync_soon
    if args[0] == "now":
        answer.answer((args, b"data"))
    elif args[0] == "later":
        soon(answer.answer, (args, b"data"))
    else:
        soon(answer.answer, Corrupt("bad bytes", b"id", 7))
    answer.answer(((), b"")) if args[0] == "now" else soon(
        answer.answer, ((), b"")
    )  # not the first
    return answer


HANDLERS: dict[str, Handler] = {
    "echo": _echo,
    "describe": _describe,
    "refuse": _refuse,
    "later": _later,
    "refuse_later": _refuse_later,
    "deferred": _deferred,
}


class RpcContract:
    """The tests."""

    def world(self) -> AbstractAsyncContextManager[World]:
        """Two fresh endpoints, started."""
        raise NotImplementedError

    async def start(
        self, nursery: trio.Nursery, world: World, handlers: dict[str, Handler] = HANDLERS
    ) -> str:
        """Serve in the nursery; returns the address."""

        async def serve(*, task_status: trio.TaskStatus[str]) -> None:
            await world.server.serve(world.address, handlers, started=task_status.started)

        address: str = await nursery.start(serve)
        return address

    async def test_values_and_data_round_trip(self) -> None:
        """Result and data come back as sent; arrays as tuples, data as one buffer."""
        values = (
            1,
            -(2**63),
            2**64 - 1,
            1.5,
            None,
            True,
            "é",
            b"\xff",
            (),
            (1, (2, b"x")),
            {"a": 1},
        )
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)
            cases: list[tuple[Buffers, bytes]] = [
                (b"", b""),
                (b"abc", b"abc"),
                (bytearray(b"abc"), b"abc"),
                (memoryview(b"abcd")[1:3], b"bc"),
                ((b"ab", b"", memoryview(b"cd")), b"abcd"),
                ([b"x" * 5000, b"y" * 70000], b"x" * 5000 + b"y" * 70000),
            ]
            for data, joined in cases:
                result, back = await world.client.call(to, "echo", values, data, timeout=5)
                assert result == values
                assert isinstance(back, memoryview)
                assert back == joined
            nursery.cancel_scope.cancel()

    async def test_bulk_data(self) -> None:
        """Megabytes pass unharmed, many at once."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)

            async def one(i: int) -> None:
                data = bytes([i]) * (3 << 20)
                result, back = await world.client.call(
                    to, "later", (0.001 * i,), data, timeout=20, priority=Priority.BULK
                )
                assert result == (len(data), 0.001 * i)
                assert back == data

            async with trio.open_nursery() as callers:
                for i in range(8):
                    callers.start_soon(one, i)
            nursery.cancel_scope.cancel()

    async def test_answers_find_their_callers(self) -> None:
        """Many calls at once, answered out of order."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)

            async def one(i: int) -> None:
                method, args = ("later", (0.02 * (i % 3), i)) if i % 2 else ("echo", (0.0, i))
                result, _ = await world.client.call(to, method, args, timeout=5)
                assert result[-1] == i

            async with trio.open_nursery() as callers:
                for i in range(200):
                    callers.start_soon(one, i)
            nursery.cancel_scope.cancel()

    async def test_context(self) -> None:
        """A handler learns who calls, the epoch, the priority and the time left."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)
            before = trio.current_time()
            (peer, epoch, deadline, priority), _ = await world.client.call(
                to, "describe", timeout=3, priority=Priority.BACKGROUND, epoch=9
            )
            assert "client" in peer
            assert (epoch, priority) == (9, Priority.BACKGROUND)
            assert before + 2.5 < deadline < trio.current_time() + 3.1
            nursery.cancel_scope.cancel()

    async def test_errors_cross_the_wire(self) -> None:
        """Class, message and details of a handler's error reach the caller."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)
            with pytest.raises(FsError, match="no such directory") as posix:
                await world.client.call(to, "refuse", timeout=5)
            assert posix.value.errno == 2
            with pytest.raises(Corrupt, match="bad bytes") as corrupt:
                await world.client.call(to, "refuse_later", timeout=5)
            assert corrupt.value.details == (b"id", 7)
            with pytest.raises(UnknownMethod):
                await world.client.call(to, "nonsense", timeout=5)
            nursery.cancel_scope.cancel()

    async def test_deferred_answers(self) -> None:
        """The first answer that somebody gives reaches the caller, errors too."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)
            for when in ("now", "later"):
                result, data = await world.client.call(to, "deferred", (when, 1), timeout=5)
                assert (result, bytes(data)) == ((when, 1), b"data")
            with pytest.raises(Corrupt, match="bad bytes") as corrupt:
                await world.client.call(to, "deferred", ("refuse",), timeout=5)
            assert corrupt.value.details == (b"id", 7)
            nursery.cancel_scope.cancel()

    async def test_unencodable_values_are_the_callers_fault(self) -> None:
        """They raise at once, for every kind of request, and break nothing."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)
            bad = (object(),)
            with pytest.raises(LocalProtocolError):
                await world.client.call(to, "echo", bad, timeout=5)
            with pytest.raises(LocalProtocolError):
                world.client.request(to, "echo", bad, timeout=5, on_reply=print)
            with pytest.raises(LocalProtocolError):
                world.client.cast(to, "echo", bad)
            assert (await world.client.call(to, "echo", (1,), timeout=5))[0] == (1,)
            nursery.cancel_scope.cancel()

    async def test_nobody_there(self) -> None:
        """`Unreachable` names the address, well before the timeout."""
        async with self.world() as world:
            start = trio.current_time()
            for _ in range(3):
                with pytest.raises(Unreachable) as caught:
                    await world.client.call(world.nowhere, "echo", timeout=30)
                assert world.nowhere in str(caught.value)
            assert trio.current_time() < start + 10
            world.client.cast(world.nowhere, "echo")

    async def test_deadline(self) -> None:
        """A late answer is dropped; the endpoint stays usable."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)
            with pytest.raises(DeadlineExceeded, match="later"):
                await world.client.call(to, "later", (0.2,), timeout=0.05)
            await trio.sleep(0.3)
            assert (await world.client.call(to, "echo", (5,), timeout=5))[0] == (5,)
            nursery.cancel_scope.cancel()

    async def test_cancelled_call(self) -> None:
        """Cancelling a caller leaves the endpoint usable, its answer is dropped."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)
            await world.client.call(to, "echo", timeout=5)
            with trio.move_on_after(0.02) as scope:
                await world.client.call(to, "later", (0.1,), timeout=5)
            assert scope.cancelled_caught
            await trio.sleep(0.2)
            assert (await world.client.call(to, "echo", (5,), timeout=5))[0] == (5,)
            nursery.cancel_scope.cancel()

    async def test_request_calls_back_once_and_later(self) -> None:
        """Never from inside `request`, exactly once, whatever happens."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)
            got: dict[str, list[tuple[Any, Buffer] | DfsError]] = {}
            cases: list[tuple[str, str, str, tuple[Any, ...], float]] = [
                ("answer", to, "echo", (1,), 5.0),
                ("error", to, "refuse", (), 5.0),
                ("late", to, "later", (0.2,), 0.05),
                ("nobody", world.nowhere, "echo", (), 5.0),
            ]
            for name, where, method, args, timeout in cases:
                got[name] = []
                world.client.request(
                    where, method, args, timeout=timeout, on_reply=got[name].append
                )
                assert not got[name]
            await trio.sleep(0.5)
            ((result, _),) = got["answer"]  # type: ignore[misc]  # an error here fails the test
            assert result == (1,)
            kinds = {name: [type(x) for x in got[name]] for name in ("error", "late", "nobody")}
            assert kinds == {
                "error": [FsError],
                "late": [DeadlineExceeded],
                "nobody": [Unreachable],
            }
            nursery.cancel_scope.cancel()

    async def test_cast(self) -> None:
        """A cast arrives, answers nothing, and its handler's errors stay with the server."""
        heard: list[tuple[Any, bytes]] = []
        done = trio.Event()

        def hear(context: Context, args: tuple[Any, ...], data: memoryview) -> Reply:
            heard.append((args, bytes(data)))
            if len(heard) == 5:
                done.set()
            raise Corrupt("ignored")

        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world, {**HANDLERS, "hear": hear})
            for i in range(5):
                world.client.cast(to, "hear", (i,), b"d" * i)
            world.client.cast(to, "nonsense")
            with trio.fail_after(5):
                await done.wait()
            assert heard == [((i,), b"d" * i) for i in range(5)]
            nursery.cancel_scope.cancel()

    async def test_address_in_use(self) -> None:
        """Two services cannot share an address."""
        async with self.world() as world, trio.open_nursery() as nursery:
            to = await self.start(nursery, world)
            with pytest.raises(ConfigError):
                await world.client.serve(to, HANDLERS, started=print)
            nursery.cancel_scope.cancel()

    async def test_service_ends_and_comes_back(self) -> None:
        """Calls under way fail, later ones are refused, and work again after a restart."""
        async with self.world() as world, trio.open_nursery() as nursery:
            failures: list[DfsError] = []
            failed = trio.Event()

            async def doomed() -> None:
                try:
                    await world.client.call(to, "later", (60.0,), timeout=2)
                except DfsError as e:
                    failures.append(e)
                    failed.set()

            async with trio.open_nursery() as first:
                to = await self.start(first, world)
                await world.client.call(to, "echo", timeout=5)
                nursery.start_soon(doomed)
                await trio.sleep(0.05)
                first.cancel_scope.cancel()
            with pytest.raises((Unreachable, DeadlineExceeded)):
                await world.client.call(to, "echo", timeout=1)
            world.address = to
            assert await self.start(nursery, world) == to
            with trio.fail_after(5):
                while True:
                    try:
                        await world.client.call(to, "echo", timeout=1)
                        break
                    except Unreachable:
                        await trio.sleep(0.05)
                await failed.wait()
            assert isinstance(failures[0], Unreachable | DeadlineExceeded)
            nursery.cancel_scope.cancel()
