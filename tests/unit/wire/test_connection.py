"""The connection's state machine: greeting, roles, refusals."""

import pytest

from dfs.codec import pack
from dfs.errors import (
    Corrupt,
    LocalProtocolError,
    NotFound,
    RemoteProtocolError,
    WrongCluster,
    WrongVersion,
)
from dfs.wire import connection as module
from dfs.wire.connection import Connection, Role, State, encode_value
from dfs.wire.frame import CAST, ERROR, GOODBYE, HELLO, REPLY, REQUEST, encode


def transfer(source, target):
    """Move everything queued; returns the events."""
    events = []
    while batch := source.queue.batch():
        raw = b"".join(batch)
        source.queue.sent(len(raw))
        events += push(target, raw)
    return events


def push(target, raw):
    events = []
    while raw:
        buffer = target.next_buffer()
        n = min(len(buffer), len(raw))
        buffer[:n] = raw[:n]
        events += target.received(n)
        raw = raw[n:]
    return events


def pair(cluster=(b"c" * 16, b"c" * 16), secret=(b"", b"")):
    return (
        Connection(Role.CLIENT, cluster[0], "client", secret[0]),
        Connection(Role.SERVER, cluster[1], "server", secret[1]),
    )


def opened():
    client, server = pair()
    transfer(client, server)
    transfer(server, client)
    return client, server


def test_greeting_opens_both_sides():
    client, server = pair()
    assert client.state is server.state is State.GREETING
    ((kind, *_, greeting, _),) = transfer(client, server)
    assert (kind, greeting.name, server.peer.name) == (HELLO, "client", "client")
    assert server.state is State.OPEN
    assert client.state is State.GREETING
    transfer(server, client)
    assert client.state is State.OPEN
    assert client.peer.name == "server"


def test_requests_and_answers():
    client, server = opened()
    client.send(REQUEST, 1, pack(("get", (b"k",))), priority=1, epoch=4, deadline=100)
    client.send(REQUEST, 2, pack(("put", ())), [b"da", b"ta"], priority=1)
    client.send(CAST, 0, pack(("hint", (1,))), priority=1)
    got = [(*e[:6], bytes(e[6])) for e in transfer(client, server)]
    assert got == [
        (REQUEST, 1, 1, 4, 100, ("get", (b"k",)), b""),
        (REQUEST, 2, 1, 0, 0, ("put", ()), b"data"),
        (CAST, 0, 1, 0, 0, ("hint", (1,)), b""),
    ]
    server.send(REPLY, 2, pack((1, "x")), b"back")
    server.send(ERROR, 1, pack((NotFound.code, "no such key", (b"k",))))
    reply, error = transfer(server, client)
    assert (reply[0], reply[1], reply[5], bytes(reply[6])) == (REPLY, 2, (1, "x"), b"back")
    assert isinstance(error[5], NotFound)
    assert (str(error[5]), error[5].details) == ("no such key", (b"k",))


def test_other_cluster():
    client, server = pair(cluster=(b"a" * 16, b"b" * 16))
    with pytest.raises(WrongCluster, match="cluster file"):
        transfer(client, server)
    assert server.state is State.CLOSED
    with pytest.raises(WrongCluster, match=(b"a" * 16).hex()):
        transfer(server, client)  # the server said why


def test_other_secret():
    for secret in [(b"one", b"two"), (b"", b"two"), (b"one", b"")]:
        client, server = pair(secret=secret)
        with pytest.raises(WrongCluster, match="secret"):
            transfer(client, server)
        with pytest.raises(WrongCluster, match="secret"):
            transfer(server, client)


def test_a_server_that_lies_about_its_cluster_is_refused_by_the_client():
    client, _ = pair()
    hello = encode(HELLO, 0, pack((module.PROTOCOL, b"z" * 16, "liar", b"")))
    with pytest.raises(WrongCluster, match="liar"):
        push(client, hello)
    assert client.state is State.CLOSED


def test_other_protocol_version():
    _, server = pair()
    hello = encode(HELLO, 0, pack((module.PROTOCOL + 1, b"c" * 16, "new", b"", "more")))
    with pytest.raises(WrongVersion, match="same release"):
        push(server, hello)
    _, server = pair()
    extended = encode(HELLO, 0, pack((module.PROTOCOL, b"c" * 16, "new", b"", "more")))
    assert push(server, extended)
    assert server.state is State.OPEN


def test_other_wire_format_is_told_to_both():
    client, server = pair()
    raw = b"".join(client.queue.batch())
    with pytest.raises(WrongVersion):
        push(server, raw[:2] + b"\x07" + raw[3:])
    with pytest.raises(WrongVersion):
        transfer(server, client)


@pytest.mark.parametrize(
    "hello",
    [
        (),
        5,
        (1,),
        ("1", b"c", "n", b""),
        (1, "c", "n", b""),
        (1, b"c", b"n", b""),
        (1, b"", "n", 0),
    ],
)
def test_malformed_hello(hello):
    _, server = pair()
    with pytest.raises(RemoteProtocolError, match="HELLO"):
        push(server, encode(HELLO, 0, pack(hello)))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("greeted", [False, True])
@pytest.mark.parametrize("kind", [HELLO, REQUEST, REPLY, ERROR, CAST])
def test_only_what_the_table_allows(side, greeted, kind):
    target = (opened() if greeted else pair())[side]
    allowed = kind in module._RECEIVE[target.role, target.state]
    meta = {
        HELLO: (module.PROTOCOL, b"c" * 16, "n", b""),
        REQUEST: ("m", ()),
        CAST: ("m", ()),
        REPLY: (1,),
        ERROR: (2, "text", ()),
    }[kind]
    raw = encode(kind, 1, pack(meta))
    if allowed:
        assert len(push(target, raw)) == 1
        return
    with pytest.raises(RemoteProtocolError):
        push(target, raw)
    assert target.state is State.CLOSED


@pytest.mark.parametrize("kind", [HELLO, GOODBYE, REQUEST, REPLY, ERROR, CAST])
def test_we_keep_the_rules_too(kind):
    for target in (*opened(), *pair()):
        size = target.queue.size
        if kind in module._SEND.get((target.role, target.state), ()):
            target.send(kind, 1, pack(("m", ())))
            continue
        with pytest.raises(LocalProtocolError):
            target.send(kind, 1, pack(("m", ())))
        assert target.queue.size == size


@pytest.mark.parametrize("meta", [(), ("m",), ("m", 1), (b"m", ()), ("m", (), 3), "m"])
def test_malformed_requests(meta):
    _, server = opened()
    with pytest.raises(RemoteProtocolError):
        push(server, encode(REQUEST, 1, pack(meta)))


@pytest.mark.parametrize(
    "meta", [(), ("2", "t", ()), (2, b"t", ()), (2, "t", 5), (30, "t", ("x",))]
)
def test_malformed_errors(meta):
    client, _ = opened()
    with pytest.raises(RemoteProtocolError):
        push(client, encode(ERROR, 1, pack(meta)))


def test_events_before_the_bad_frame_come_first():
    _, server = opened()
    good = encode(REQUEST, 1, pack(("m", ())))
    events = push(server, good + encode(REQUEST, 2, b"\xc1"))
    assert [e[1] for e in events] == [1]
    with pytest.raises(RemoteProtocolError):
        server.next_buffer()
    assert server.state is State.CLOSED


def test_goodbye():
    client, server = opened()
    server.goodbye(Corrupt("we are done"))
    server.goodbye(Corrupt("not twice"))
    with pytest.raises(LocalProtocolError):
        server.send(REPLY, 1, b"\xc0")
    with pytest.raises(Corrupt, match="we are done"):
        transfer(server, client)
    assert client.state is State.CLOSED


def test_nobody_gets_memory_before_the_greeting():
    _, server = pair()
    with pytest.raises(RemoteProtocolError, match="over the limits"):
        push(server, encode(HELLO, 0, b"x" * (65 << 10)))
    _, server = pair()
    with pytest.raises(RemoteProtocolError, match="over the limits"):
        push(server, encode(HELLO, 0, b"x", 1))


def test_a_client_may_pipeline_behind_its_hello():
    _, server = pair()
    hello = encode(HELLO, 0, pack((module.PROTOCOL, b"c" * 16, "eager", b"")))
    small = encode(REQUEST, 1, pack(("m", ())))
    big = encode(REQUEST, 2, pack(("m", ())), 200_000) + bytes(200_000)
    assert [e[:2] for e in push(server, hello + small + small + big)] == [
        (HELLO, 0), (REQUEST, 1), (REQUEST, 1), (REQUEST, 2),
    ]  # fmt: skip


def test_discarded_request():
    client, server = opened()
    client.send(REQUEST, 4, pack(("put", ())), bytes(300_000), priority=2, deadline=77)
    raw = b"".join(client.queue.batch())
    server.next_buffer()[:1000] = raw[:1000]
    assert server.received(1000) == []
    assert server.waiting > 300_000
    assert server.waiting_deadline == 77
    server.discard()
    ((kind, stream, *_, value, data),) = push(server, raw[1000:])
    assert (kind, stream, value, bytes(data)) == (REQUEST, 4, None, b"")


def test_values_without_encoding():
    for value in (object(), 2**64, {1, 2}):
        with pytest.raises(LocalProtocolError):
            encode_value(value)
