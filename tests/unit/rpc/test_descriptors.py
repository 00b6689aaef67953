"""Descriptors of files go to processes of the same host, and are given back."""

import os
import random
import socket
from pathlib import Path

import pytest
import trio

from dfs.codec import pack
from dfs.errors import NotFound, RemoteProtocolError, Unreachable
from dfs.rpc import descriptors
from dfs.rpc.descriptors import Descriptor, DescriptorClient, DescriptorServer, decode, encode

pytestmark = pytest.mark.realtime
GOLDEN = Path(__file__).parents[2] / "data" / "descriptors-v1.txt"


def test_messages_are_golden():
    lines = [line.split() for line in GOLDEN.read_text().splitlines()]
    messages = {"ask": (7, bytes(range(16))), "given": (7, True), "removed": (300, False)}
    assert [name for name, _ in lines] == list(messages)
    for name, data in lines:
        assert encode(*messages[name]).hex() == data
        assert decode(bytes.fromhex(data)) == messages[name]


@pytest.mark.parametrize(
    "value", [(2, 7, True), (1, 7), (1, "7", True), (1, 7, 1), 5, (1, True, True)]
)
def test_other_messages_are_refused(value):
    with pytest.raises(RemoteProtocolError):
        decode(pack(value))


def test_there_is_a_machine():
    assert descriptors.machine() == descriptors.machine() != b""


class Files:
    """Numbered files in a directory."""

    def __init__(self, path):
        self.path = path
        self.direct = True

    def write(self, number, data=b"content"):
        (self.path / str(number)).write_bytes(data)

    def open(self, number):
        try:
            fds = [os.open(self.path / str(number), os.O_RDONLY)]
        except FileNotFoundError as e:
            raise NotFound(str(number)) from e
        return fds + ([os.open(self.path / str(number), os.O_RDONLY)] if self.direct else [])

    def held(self):
        """How many descriptors of this process are of these files."""
        links = []
        for fd in Path("/proc/self/fd").iterdir():
            try:
                links.append(fd.readlink())
            except FileNotFoundError:
                continue
        return sum(link.is_relative_to(self.path) for link in links)


async def settle(condition):
    with trio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - waits for the kernel or another process
            await trio.sleep(0.005)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


async def started(nursery, files):
    server = DescriptorServer(files.open, random.Random(1))
    await nursery.start(server.run)
    return server


async def test_a_client_reads_what_it_was_given(files):
    files.write(1, b"first")
    files.write(2, b"second")
    async with trio.open_nursery() as nursery:
        server = await started(nursery, files)
        client = await DescriptorClient.connect(server.name, server.token)
        nursery.start_soon(client.run)
        one, again, two = await client.get(1), await client.get(1), await client.get(2)
        assert one is again
        assert (os.pread(one.fd, 9, 0), os.pread(two.fd, 9, 2)) == (b"first", b"cond")
        assert os.pread(one.direct, 9, 0) == b"first"
        with pytest.raises(OSError, match="Bad file"):
            os.write(one.fd, b"no")
        assert await client.get(3) is None
        files.direct = False
        files.write(4, b"four")
        assert (await client.get(4)).direct == -1
        assert server.statistics() == {"clients": 1, "descriptors": 3}
        nursery.cancel_scope.cancel()
    assert files.held() == 0
    assert one.revoked
    assert one.fd == -1


async def test_many_that_ask_for_one_file_get_one(files):
    files.write(1)
    async with trio.open_nursery() as nursery:
        server = await started(nursery, files)
        client = await DescriptorClient.connect(server.name, server.token)
        nursery.start_soon(client.run)
        found = []

        async def ask():
            found.append(await client.get(1))

        async with trio.open_nursery() as askers:
            for _ in range(10):
                askers.start_soon(ask)
        assert len({id(f) for f in found}) == 1
        assert server.statistics()["descriptors"] == 1
        nursery.cancel_scope.cancel()


async def test_strangers_get_nothing(files):
    files.write(1)
    async with trio.open_nursery() as nursery:
        server = await started(nursery, files)
        client = await DescriptorClient.connect(server.name, b"wrong")
        nursery.start_soon(client.run)
        assert await client.get(1) is None
        assert client.closed
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as rude:
            rude.connect(f"\0{server.name}")
            rude.send(b"\xc1 is no message")
            await trio.lowlevel.wait_readable(rude)
            assert rude.recv(100) == b""
        with pytest.raises(Unreachable):
            await DescriptorClient.connect("nobody listens here", b"")
        good = await DescriptorClient.connect(server.name, server.token)
        nursery.start_soon(good.run)
        assert await good.get(1) is not None
        nursery.cancel_scope.cancel()


async def test_there_are_only_so_many_clients(files, monkeypatch):
    monkeypatch.setattr(descriptors, "CLIENTS", 2)
    files.write(1)
    async with trio.open_nursery() as nursery:
        server = await started(nursery, files)
        got = []
        for _ in range(3):
            client = await DescriptorClient.connect(server.name, server.token)
            nursery.start_soon(client.run)
            got.append(await client.get(1) is not None)
        assert got == [True, True, False]
        nursery.cancel_scope.cancel()


async def test_a_removed_file_is_closed_at_once_but_not_under_a_reader(files):
    files.write(1)
    files.write(2)
    async with trio.open_nursery() as nursery:
        server = await started(nursery, files)
        client = await DescriptorClient.connect(server.name, server.token)
        nursery.start_soon(client.run)
        one, two = await client.get(1), await client.get(2)
        two.acquire()
        for number in (1, 2, 3):
            (files.path / str(number)).unlink(missing_ok=True)
            server.revoke(number)
        await settle(lambda: one.revoked and two.revoked)
        assert (one.fd, one.direct) == (-1, -1)
        assert os.pread(two.fd, 9, 0) == b"content"
        two.release()
        assert two.fd == -1
        assert files.held() == 0
        assert await client.get(1) is None
        files.write(1, b"anew")
        assert os.pread((await client.get(1)).fd, 9, 0) == b"anew"
        nursery.cancel_scope.cancel()


async def test_the_end_of_the_server_closes_everything(files):
    files.write(1)
    async with trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as serving:
                server = await started(serving, files)
                client = await DescriptorClient.connect(server.name, server.token)
                nursery.start_soon(client.run)
                one = await client.get(1)
                scope.cancel()
        await settle(lambda: client.closed)
        assert one.revoked
        assert files.held() == 0
        assert await client.get(1) is None


async def test_only_so_many_descriptors_are_kept(files):
    for number in range(5):
        files.write(number)
    async with trio.open_nursery() as nursery:
        server = await started(nursery, files)
        client = await DescriptorClient.connect(server.name, server.token, limit=2)
        nursery.start_soon(client.run)
        held = [await client.get(number) for number in range(5)]
        assert [d.revoked for d in held] == [True, True, True, False, False]
        assert files.held() == 4
        nursery.cancel_scope.cancel()


def test_a_forgotten_descriptor_is_closed(files):
    files.write(1)
    descriptor = Descriptor(*files.open(1))
    descriptor.acquire()
    assert files.held() == 2
    del descriptor
    assert files.held() == 0
