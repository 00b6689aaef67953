"""The real endpoint against broken peers, dead peers, slow peers and full memory."""

import gc
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import tracemalloc
from contextlib import asynccontextmanager, suppress

import pytest
import trio
import trio.lowlevel

from dfs.clock import SystemClock
from dfs.env import Priority
from dfs.errors import (
    Busy,
    ConfigError,
    DeadlineExceeded,
    DfsError,
    InvalidArgument,
    LocalProtocolError,
    Unreachable,
    WrongCluster,
)
from dfs.rpc import client as client_module
from dfs.rpc import server as server_module
from dfs.rpc.endpoint import RpcEndpoint
from dfs.wire import frame

pytestmark = pytest.mark.realtime
CLUSTER = b"c" * 16
MIB = 1 << 20


def endpoint(name, *, cluster=CLUSTER, secret=b""):
    return RpcEndpoint(
        cluster_id=cluster, name=name, clock=SystemClock(), random=random.Random(1), secret=secret
    )


def echo(context, args, data):
    return args, data


@asynccontextmanager
async def running(*endpoints):
    async with trio.open_nursery() as nursery:
        for each in endpoints:
            await nursery.start(each.run)
        yield nursery
        nursery.cancel_scope.cancel()


async def serve(nursery, server, handlers, address="tcp://127.0.0.1:0"):
    async def task(*, task_status):
        await server.serve(address, handlers, started=task_status.started)

    return await nursery.start(task)


def port_of(address):
    return int(address.rpartition(":")[2])


async def raw(address):
    return await trio.open_tcp_stream("127.0.0.1", port_of(address))


def hello(cluster=CLUSTER):
    from dfs.codec import pack

    return frame.encode(frame.HELLO, 0, pack((1, cluster, "raw", b"")))


async def until(condition):
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - conditions of code that knows no event of ours
            await trio.sleep(0.01)


# --------------------------------------------------------------------------- broken and alien peers


@pytest.mark.parametrize(
    ("greet", "garbage", "reason"),
    [
        (False, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(40), "start no frame"),
        (False, bytes(100), "start no frame"),
        (False, b"dF\x01\x03" + b"\xff" * 28 + bytes(8), "makes no sense"),
        (True, b"dF\x01\x03" + bytes(28) + b"\xff" * 8, "over the limits"),
        (True, frame.encode(frame.REPLY, 1, b"\xc0"), "REPLY"),
        (True, frame.encode(frame.REQUEST, 1, b"\xc1"), "undecodable"),
        (True, frame.encode(frame.REQUEST, 1, b"\xc0", 50_000) + bytes(100), "inside a frame"),
        (True, frame.encode(frame.REQUEST, 1, b"\xc0")[:-1] + b"\xc2", "checksum"),
    ],
)
async def test_a_bad_connection_is_closed_with_a_reason_and_harms_nobody(
    caplog, greet, garbage, reason
):
    caplog.set_level(logging.INFO)
    server, client = endpoint("server"), endpoint("client")
    async with running(client) as nursery:
        to = await serve(nursery, server, {"echo": echo})
        await client.call(to, "echo", timeout=5)
        stream = await raw(to)
        await stream.send_all((hello() if greet else b"") + garbage)
        await stream.send_eof()
        with trio.fail_after(5):
            while await stream.receive_some():
                pass
        await stream.aclose()
        await until(lambda: any(reason in r.getMessage() for r in caplog.records))
        assert (await client.call(to, "echo", (1,), timeout=5))[0] == (1,)
        assert client.statistics()["connects"] == 1  # on the connection it had


async def test_another_cluster_is_refused_with_advice():
    server, client = endpoint("server"), endpoint("client", cluster=b"d" * 16)
    async with running(client) as nursery:
        to = await serve(nursery, server, {"echo": echo})
        for _ in range(2):  # the second one meets the back-off
            with pytest.raises(WrongCluster, match="cluster file"):
                await client.call(to, "echo", timeout=5)


async def test_secrets():
    server = endpoint("server", secret=b"s")
    good, bad = endpoint("good", secret=b"s"), endpoint("bad", secret=b"x")
    async with running(good, bad) as nursery:
        to = await serve(nursery, server, {"echo": echo})
        await good.call(to, "echo", timeout=5)
        with pytest.raises(WrongCluster, match="secret"):
            await bad.call(to, "echo", timeout=5)


async def test_a_peer_that_never_greets(monkeypatch):
    monkeypatch.setattr(client_module, "CONNECT_TIMEOUT", 0.2)
    client = endpoint("client")
    with socket.create_server(("127.0.0.1", 0)) as mute:
        address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        async with running(client):
            with pytest.raises(Unreachable, match="no answer within"):
                await client.call(address, "echo", timeout=5)
            with pytest.raises((DeadlineExceeded, Unreachable)):
                await client.call(address, "echo", timeout=0.05)


async def test_a_caller_that_never_greets(monkeypatch, caplog):
    monkeypatch.setattr(server_module, "HANDSHAKE_TIMEOUT", 0.1)
    server = endpoint("server")
    async with running() as nursery:
        to = await serve(nursery, server, {"echo": echo})
        stream = await raw(to)
        with trio.fail_after(5):
            assert await stream.receive_some() == b""
        await stream.aclose()
        assert "no greeting" in caplog.text


async def test_bad_addresses():
    client = endpoint("client")
    async with running(client):
        for address in ("", "tcp://", "host:1", "unix://relative", "tcp://127.0.0.1:99999"):
            with pytest.raises(InvalidArgument, match="tcp://HOST:PORT"):
                await client.call(address, "echo", timeout=5)
        with pytest.raises(Unreachable, match="does not exist; is the node running"):
            await client.call("unix:///nonexistent/socket", "echo", timeout=5)


# ------------------------------------------------------------------------------ processes that die

SERVER = """
import random, sys, trio
from dfs.clock import SystemClock
from dfs.rpc.endpoint import RpcEndpoint
async def hang(context, args, data):
    await trio.sleep_forever()
async def main():
    await RpcEndpoint(
        cluster_id=b"c" * 16, name="child", clock=SystemClock(), random=random.Random(1)
    ).serve(sys.argv[1], {"hang": hang, "echo": lambda c, a, d: (a, b"")},
            started=lambda address: print(address, flush=True))
trio.run(main)
"""


@asynccontextmanager
async def child(address="tcp://127.0.0.1:0"):
    process = await trio.lowlevel.open_process(
        [sys.executable, "-c", SERVER, address],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in ("", *sys.path) if p)},
    )
    try:
        line = b""
        while not line.endswith(b"\n"):
            line += await process.stdout.receive_some()
        yield process, line.decode().strip()
    finally:
        process.send_signal(signal.SIGCONT)
        process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
        await process.stdout.aclose()


async def test_killed_server_fails_what_waits_at_once_and_comes_back():
    client = endpoint("client")
    async with running(client) as nursery:
        async with child() as (process, to):
            errors = []

            async def doomed():
                try:
                    await client.call(to, "hang", timeout=60)
                except DfsError as e:
                    errors.append(e)

            for _ in range(5):
                nursery.start_soon(doomed)
            await client.call(to, "echo", timeout=5)
            process.kill()
            await until(lambda: len(errors) == 5)
            assert all(isinstance(e, Unreachable) and "unknown" in str(e) for e in errors)
            with pytest.raises(Unreachable, match="running"):
                await client.call(to, "echo", timeout=5)
        async with child(to) as (process, again):
            assert again == to
            with trio.fail_after(5):
                while True:
                    try:
                        await client.call(to, "echo", timeout=5)
                        break
                    except Unreachable:
                        await trio.sleep(0.05)


async def test_stopped_server_costs_deadlines_and_no_memory(monkeypatch):
    monkeypatch.setattr(client_module, "QUEUE_LIMIT", 4 * MIB)
    monkeypatch.setattr(client_module, "HELD_LIMIT", 6 * MIB)
    client = endpoint("client")
    async with running(client), child() as (process, to):
        await client.call(to, "echo", timeout=5)
        await client.call(to, "echo", timeout=5, priority=Priority.BULK)
        process.send_signal(signal.SIGSTOP)
        outcomes = []

        async def put():
            try:
                await client.call(to, "echo", (), bytes(MIB), timeout=0.3, priority=Priority.BULK)
            except DfsError as e:
                outcomes.append(type(e))

        for _ in range(3):
            async with trio.open_nursery() as callers:
                for _ in range(20):
                    callers.start_soon(put)
            (bulk,) = [x for x in client.statistics()["links"] if x["bulk"]]
            assert bulk["queued_bytes"] <= 6 * MIB
            assert bulk["held"] <= 1
            assert bulk["in_flight"] == 0
        # at last the circuit breaker spares callers the wait
        assert set(outcomes) == {DeadlineExceeded, Busy, Unreachable}
        assert len(outcomes) == 60
        with pytest.raises(DeadlineExceeded):
            await client.call(to, "echo", timeout=0.1, priority=Priority.HIGH)
        process.send_signal(signal.SIGCONT)
        await client.call(to, "echo", timeout=5, priority=Priority.HIGH)
        await client.call(to, "echo", timeout=5)
        await client.call(to, "echo", timeout=5, priority=Priority.BULK)


# ------------------------------------------------------------------------------------ back-pressure


async def test_large_requests_wait_for_memory():
    server, client = endpoint("server"), endpoint("client")
    server._budget.limit = 8 * MIB
    running_now = most = 0

    async def put(context, args, data):
        nonlocal running_now, most
        running_now += len(data)
        most = max(most, running_now)
        await trio.sleep(0.02)
        running_now -= len(data)
        return (len(data),), b""

    async with running(client) as nursery:
        to = await serve(nursery, server, {"put": put})

        async def one():
            result, _ = await client.call(to, "put", (), bytes(2 * MIB), timeout=20)
            assert result == (2 * MIB,)

        async with trio.open_nursery() as callers:
            for _ in range(40):
                callers.start_soon(one)
        assert 2 * MIB <= most <= 8 * MIB
        assert server._budget.used == 0


async def test_no_memory_is_busy_not_a_hang(monkeypatch):
    monkeypatch.setattr(server_module, "ADMIT_WAIT", 0.1)
    server, client = endpoint("server"), endpoint("client")
    server._budget.limit = 3 * MIB
    release = trio.Event()

    async def put(context, args, data):
        await release.wait()
        return (len(data),), b""

    async with running(client) as nursery:
        to = await serve(nursery, server, {"put": put, "echo": echo})
        results = []
        for _ in range(4):
            client.request(
                to, "put", (), bytes(2 * MIB), timeout=10, on_reply=results.append,
                priority=Priority.BULK,
            )  # fmt: skip
        await until(lambda: len(results) == 3)
        assert all(isinstance(r, Busy) for r in results)
        # The connection is still in step and small requests pass.
        assert (await client.call(to, "echo", (1,), timeout=5, priority=Priority.BULK))[0] == (1,)
        release.set()
        await until(lambda: len(results) == 4)
        assert results[3][0] == (2 * MIB,)
        assert server._budget.used == 0


async def test_a_connection_that_dies_inside_a_large_request_gives_its_memory_back():
    server = endpoint("server")
    async with running() as nursery:
        to = await serve(nursery, server, {"echo": echo})
        stream = await raw(to)
        head = frame.encode(frame.REQUEST, 1, b"\x92\xa4echo\x90", MIB)
        await stream.send_all(hello() + head + bytes(1000))
        await until(lambda: server._budget.used > 0)
        await stream.aclose()
        await until(lambda: server._budget.used == 0)


async def test_nodes_that_call_each_other_with_full_memory_do_not_deadlock(monkeypatch):
    monkeypatch.setattr(server_module, "ADMIT_WAIT", 0.2)
    a, b = endpoint("a"), endpoint("b")
    peers = {}

    def relay(me):
        async def handler(context, args, data):
            if args[0]:
                other = peers["b" if me == "a" else "a"]
                rpc = a if me == "a" else b
                await rpc.call(other, "relay", (args[0] - 1,), data, timeout=5)
            return (), b""

        return handler

    async with running(a, b) as nursery:
        for name, node in (("a", a), ("b", b)):
            node._budget.limit = 3 * MIB
            peers[name] = await serve(nursery, node, {"relay": relay(name)})
        outcomes = []

        async def one(rpc, to):
            try:
                await rpc.call(to, "relay", (3,), bytes(MIB), timeout=10)
                outcomes.append("ok")
            except (Busy, DeadlineExceeded) as e:
                outcomes.append(type(e).__name__)

        with trio.fail_after(30):
            async with trio.open_nursery() as callers:
                for _ in range(10):
                    callers.start_soon(one, a, peers["b"])
                    callers.start_soon(one, b, peers["a"])
        assert len(outcomes) == 20
        await a.call(peers["b"], "relay", (3,), bytes(MIB), timeout=10)
        assert (a._budget.used, b._budget.used) == (0, 0)


async def test_what_a_closed_caller_left_in_the_kernel_is_never_delivered():
    """Nobody waits for it: a request that arrives hours later must not be carried out."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    listener.settimeout(5)
    client = endpoint("client")
    sent = 8 * MIB
    async with running(client):

        async def call():
            address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            await client.call(address, "put", data=bytes(sent), timeout=30)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(call)
            peer, _ = await trio.to_thread.run_sync(listener.accept)
            peer.sendall(hello())
            await until(lambda: any(link["in_flight"] for link in client.statistics()["links"]))
            await trio.sleep(0.2)  # the kernel has what it takes
            nursery.cancel_scope.cancel()
    peer.settimeout(5)
    got = 0

    def read():
        nonlocal got
        while data := peer.recv(1 << 20):
            got += len(data)

    with pytest.raises(ConnectionResetError):
        read()
    assert got < sent
    peer.close()
    listener.close()


async def test_a_peer_that_reads_no_answers_is_not_served_on(monkeypatch):
    monkeypatch.setattr(server_module, "REPLY_LIMIT", 4 * MIB)
    server, client = endpoint("server"), endpoint("client")
    served = 0
    blob = bytes(MIB)

    def get(context, args, data):
        nonlocal served
        served += 1
        return (), blob

    async with running(client) as nursery:
        to = await serve(nursery, server, {"get": get, "echo": echo})
        stream = await raw(to)
        await stream.send_all(hello())
        request = frame.encode(frame.REQUEST, 1, b"\x92\xa3get\x90")
        sent = 0
        with trio.move_on_after(1):
            while sent < 500:
                await stream.send_all(request)
                sent += 1
                await trio.sleep(0.001)
        # What the kernel's buffers hold, plus the limit: not everything that was asked for.
        assert 4 <= served < 60
        await client.call(to, "echo", timeout=5)
        got = 0
        with trio.fail_after(20):
            while got < sent * MIB:
                got += len(await stream.receive_some(MIB))
        assert served == sent
        await stream.aclose()


async def test_too_many_tasks_of_one_connection(monkeypatch):
    monkeypatch.setattr(server_module, "TASK_LIMIT", 3)
    server, client = endpoint("server"), endpoint("client")

    async def slow(context, args, data):
        await trio.sleep(0.2)
        return (), b""

    async with running(client) as nursery:
        to = await serve(nursery, server, {"slow": slow})
        results = []
        for _ in range(5):
            client.request(to, "slow", timeout=5, on_reply=results.append)
        await until(lambda: len(results) == 5)
        assert sum(isinstance(r, Busy) for r in results) == 2


async def test_frames_over_the_limit_are_the_callers_fault():
    server, client = endpoint("server"), endpoint("client")
    huge = [bytes(8 * MIB)] * 9

    async with running(client) as nursery:
        to = await serve(nursery, server, {"echo": echo, "huge": lambda c, a, d: ((), huge)})
        await client.call(to, "echo", timeout=5, priority=Priority.BULK)
        with pytest.raises(LocalProtocolError, match="in parts"):
            await client.call(to, "echo", (), huge, timeout=5)
        with pytest.raises(LocalProtocolError, match="in parts"):
            await client.call(to, "huge", timeout=5)
        await client.call(to, "echo", timeout=5)


async def test_frames_over_the_limit_before_the_connection_is_there():
    server, client = endpoint("server"), endpoint("client")
    huge = [bytes(8 * MIB)] * 9
    async with running(client) as nursery:
        to = await serve(nursery, server, {"echo": echo})
        with pytest.raises(LocalProtocolError, match="in parts"):
            await client.call(to, "echo", (), huge, timeout=5)


# -------------------------------------------------------------------------------- handlers that fail


async def test_a_bug_in_a_handler_is_logged_and_answered(caplog):
    server, client = endpoint("server"), endpoint("client")

    def bug(context, args, data):
        raise KeyError("oops")

    async def bug_later(context, args, data):
        await trio.lowlevel.checkpoint()
        raise KeyError("oops later")

    handlers = {
        "bug": bug,
        "bug_later": bug_later,
        "unencodable": lambda context, args, data: (object(), b""),
        "shapeless": lambda context, args, data: (1, b"", 3),
        "echo": echo,
    }
    async with running(client) as nursery:
        to = await serve(nursery, server, handlers)
        for method in ("bug", "bug_later", "unencodable", "shapeless"):
            with pytest.raises(DfsError):
                await client.call(to, method, timeout=5)
            assert method in caplog.text
        await client.call(to, "echo", timeout=5)
        assert client.statistics()["connects"] == 1


async def test_a_bug_in_a_callback_is_logged_and_harms_nobody(caplog):
    server, client = endpoint("server"), endpoint("client")

    def bug(answer):
        raise KeyError("oops")

    async with running(client) as nursery:
        to = await serve(nursery, server, {"echo": echo})
        client.request(to, "echo", timeout=5, on_reply=bug)
        await client.call(to, "echo", timeout=5)
        await until(lambda: "callback of echo" in caplog.text)
        await client.call(to, "echo", timeout=5)
        assert client.statistics()["connects"] == 1


# ------------------------------------------------------------------------------- starting, stopping


async def test_closing_fails_what_waits_and_leaves_nothing_open():
    def sockets():
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                found += "socket" in os.readlink(f"/proc/self/fd/{fd}")
        return found

    before = sockets()
    server, client = endpoint("server"), endpoint("client")
    errors, replies = [], []

    async def hang(context, args, data):
        await trio.sleep_forever()

    async with running() as outer:
        to = await serve(outer, server, {"hang": hang, "echo": echo})

        async def doomed():
            try:
                await client.call(to, "hang", timeout=60)
            except Unreachable as e:
                errors.append(e)

        async with trio.open_nursery() as inner:
            await inner.start(client.run)
            await client.call(to, "echo", timeout=5, priority=Priority.BULK)
            outer.start_soon(doomed)
            client.request(to, "hang", timeout=60, on_reply=replies.append)
            await client.call(to, "echo", timeout=5)
            inner.cancel_scope.cancel()
        await until(lambda: errors and replies)
        assert isinstance(replies[0], Unreachable)
        with pytest.raises(Unreachable, match="shutting down"):
            await client.call(to, "echo", timeout=5)
        client.request(to, "echo", timeout=5, on_reply=replies.append)
        client.cast(to, "echo")
        assert len(replies) == 1
        await until(lambda: len(replies) == 2)
        await trio.sleep(0.05)
    assert sockets() == before


async def test_run_comes_first():
    with pytest.raises(LocalProtocolError, match="run"):
        await endpoint("client").call("tcp://127.0.0.1:1", "echo", timeout=1)


async def test_urgent_and_bulk_use_connections_of_their_own():
    server, client = endpoint("server"), endpoint("client")
    async with running(client) as nursery:
        to = await serve(nursery, server, {"echo": echo})
        for priority in Priority:
            await client.call(to, "echo", timeout=5, priority=priority)
        await client.call(to, "echo", (), bytes(MIB), timeout=5, priority=Priority.HIGH)
        links = client.statistics()["links"]
        assert sorted((x["bulk"], x["connected"]) for x in links) == [(False, True), (True, True)]


async def test_unix_sockets_left_behind(tmp_path):
    path = tmp_path / "socket"
    address = f"unix://{path}"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    server = endpoint("server")
    async with running() as nursery:
        await serve(nursery, server, {}, address)
        with pytest.raises(ConfigError, match="another process serves"):
            await endpoint("other").serve(address, {}, started=print)
        assert path.exists()
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(ConfigError, match="no socket"):
        await server.serve(address, {}, started=print)
    assert path.read_text() == "precious"


async def test_addresses_that_cannot_be_served(tmp_path):
    server = endpoint("server")
    for address in (
        "tcp://nohost.invalid:1",
        "junk",
        f"unix://{tmp_path}/no/folder",
        "unix:///" + "x" * 200,
    ):
        with pytest.raises(ConfigError):
            await server.serve(address, {}, started=print)


async def test_no_secret_no_strangers():
    with pytest.raises(ConfigError, match="secret"):
        await endpoint("server").serve("tcp://0.0.0.0:0", {}, started=print)


async def test_epoch_of_the_endpoint_is_the_default():
    server = endpoint("server")
    client = RpcEndpoint(
        cluster_id=CLUSTER, name="client", clock=SystemClock(), random=random.Random(1),
        epoch=lambda: 42,
    )  # fmt: skip
    async with running(client) as nursery:
        to = await serve(nursery, server, {"epoch": lambda c, a, d: ((c.epoch,), b"")})
        assert (await client.call(to, "epoch", timeout=5))[0] == (42,)
        assert (await client.call(to, "epoch", timeout=5, epoch=7))[0] == (7,)


async def test_requests_may_follow_the_greeting_at_once():
    server = endpoint("server")
    async with running() as nursery:
        to = await serve(nursery, server, {"echo": echo})
        stream = await raw(to)
        requests = [frame.encode(frame.REQUEST, i, b"\x92\xa4echo\x91\x07") for i in (1, 2, 3)]
        await stream.send_all(hello() + b"".join(requests))
        answers = b"".join(frame.encode(frame.REPLY, i, b"\x91\x07") for i in (1, 2, 3))
        got = b""
        with trio.fail_after(5):
            while not got.endswith(answers):
                got += await stream.receive_some()
        await stream.aclose()


async def test_a_connection_that_broke_keeps_no_memory():
    """Before the garbage collector comes, which in a node may take an hour."""
    server = endpoint("server")
    count, size = 8, 4 * MIB
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        async with running(server) as nursery:
            address = await serve(nursery, server, {"echo": echo})
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(count):
                with trio.CancelScope() as scope:
                    caller = endpoint("caller")
                    async with running(caller):
                        await caller.call(address, "echo", (), bytes(size), timeout=10)
                        scope.cancel()
            await until(lambda: server.statistics()["closed"] == count)
            kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < count * 32 * 1024
