"""The send queue: priorities, joining, bulk without copies, partial sends."""

from dfs.wire.outgoing import SMALL, SendQueue


def drain(queue, step=1 << 30):
    out = b""
    while batch := queue.batch():
        raw = b"".join(batch)[:step]
        queue.sent(len(raw))
        out += raw
    assert queue.size == 0
    return out


def test_higher_priorities_first_and_fifo_within():
    queue = SendQueue()
    for priority, text in [(3, b"d"), (1, b"b1"), (0, b"a"), (1, b"b2"), (2, b"c")]:
        queue.put(priority, text, (), 0)
    assert drain(queue) == b"ab1b2cd"


def test_small_things_leave_as_one_buffer():
    queue = SendQueue()
    for i in range(100):
        queue.put(1, b"%03d" % i, (b"x" * 10,), 10)
    assert len(queue.batch()) == 1


def test_bulk_is_not_copied():
    queue = SendQueue()
    bulk = memoryview(bytearray(SMALL + 1))
    queue.put(2, b"head1", (bulk,), len(bulk))
    queue.put(2, b"head2", (), 0)
    first, second, third = queue.batch()
    assert (first, third) == (b"head1", b"head2")
    assert second is bulk


def test_partial_sends():
    for step in (1, 2, 5, 1000, SMALL):
        queue = SendQueue()
        expected = b""
        for i in range(6):
            data = bytes([i]) * (SMALL + i if i % 2 else i)
            queue.put(1, b"<%d>" % i, (data,) if data else (), len(data))
            expected += b"<%d>" % i + data
        assert queue.size == len(expected)
        assert drain(queue, step) == expected


def test_urgent_overtakes_queued_bulk():
    queue = SendQueue()
    for i in range(10):
        queue.put(2, b"<%d>" % i, (bytes(1 << 20),), 1 << 20)
    size = sum(map(len, queue.batch()))
    queue.sent(size)
    queue.put(0, b"urgent", (), 0)
    assert queue.batch()[0].startswith(b"urgent")


def test_many_buffers_stay_under_the_kernels_limit():
    queue = SendQueue()
    parts = [bytes([i % 256]) * 10 for i in range(3000)]
    queue.put(2, b"head", parts, 30_000)
    assert len(queue.batch()) <= 1024
    assert drain(queue) == b"head" + b"".join(parts)
