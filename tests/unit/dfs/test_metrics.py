"""Pages of metrics, their text, and the little HTTP server."""

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from dfs.errors import ConfigError
from dfs.metrics import COUNTER, GAUGE, MetricsServer, Page, Row, parse_listen, render

pytestmark = pytest.mark.realtime


def parsed(text):
    return {f.name: f for f in text_string_to_metric_families(text.decode())}


def test_a_page_becomes_text_that_prometheus_reads():
    page = Page()
    page.gauge("disk_free_bytes", "Bytes free", 5)
    page.counter("rpc_requests", "Requests served", 7, method='od"d\n')
    page.counter("rpc_requests", "Requests served", 8, method="ping")
    page.summary("fsync_seconds", "Time of fdatasync", 3, 0.25)
    page.table(
        [Row("a", GAUGE, "a_bytes", "A"), Row("b", COUNTER, "b", "B"), Row("c", GAUGE, "c", "C")],
        {"a": 1, "b": 2, "other": 3},
    )
    text, kind = render(page.families)
    assert kind.startswith("text/plain")
    found = parsed(text)
    assert found["dfs_disk_free_bytes"].samples[0].value == 5
    requests = found["dfs_rpc_requests"]
    assert requests.type == "counter"
    assert {s.labels["method"]: s.value for s in requests.samples} == {'od"d\n': 7, "ping": 8}
    assert {s.name for s in requests.samples} == {"dfs_rpc_requests_total"}
    summary = {s.name: s.value for s in found["dfs_fsync_seconds"].samples}
    assert summary == {"dfs_fsync_seconds_count": 3, "dfs_fsync_seconds_sum": 0.25}
    assert found["dfs_a_bytes"].samples[0].value == 1
    assert found["dfs_b"].samples[0].value == 2
    assert "dfs_c" not in found
    assert found["process_resident_memory_bytes"].samples[0].value > 1 << 20


def test_where_to_listen():
    assert parse_listen("9100") == ("127.0.0.1", 9100)
    assert parse_listen("0.0.0.0:9100") == ("0.0.0.0", 9100)
    assert parse_listen("[::1]:0") == ("::1", 0)
    for bad in ("", "x", "host:", "1.2.3.4:99999", "host:-1"):
        with pytest.raises(ConfigError):
            parse_listen(bad)


async def ask(address, request):
    host, _, port = address.rpartition(":")
    async with await trio.open_tcp_stream(host, int(port)) as stream:
        await stream.send_all(request)
        answer = b"".join([part async for part in stream])
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.split(b"\r\n")[0].decode(), body


async def test_the_server():
    wrong = ""
    in_loop = []

    def fill(page):
        in_loop.append(trio.lowlevel.in_trio_task())  # where it may look at anything
        page.gauge("up", "Here", 1)

    server = MetricsServer(fill, lambda: wrong)
    async with trio.open_nursery() as nursery:
        address = await nursery.start(server.run, "127.0.0.1", 0)
        assert address == server.address
        status, body = await ask(address, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert status == "HTTP/1.1 200 OK"
        assert parsed(body)["dfs_up"].samples[0].value == 1
        assert in_loop == [True]
        assert await ask(address, b"GET /healthz HTTP/1.1\r\n\r\n") == ("HTTP/1.1 200 OK", b"ok\n")
        wrong = "the disk is full"
        status, body = await ask(address, b"GET /healthz?x=1 HTTP/1.1\r\n\r\n")
        assert (status, body) == ("HTTP/1.1 503 Service Unavailable", b"the disk is full\n")
        assert (await ask(address, b"HEAD /healthz HTTP/1.1\r\n\r\n"))[1] == b""
        assert "404" in (await ask(address, b"GET / HTTP/1.1\r\n\r\n"))[0]
        assert "405" in (await ask(address, b"POST /metrics HTTP/1.1\r\n\r\n"))[0]
        assert "405" in (await ask(address, b"\xff" * 8192))[0]
        with pytest.raises(ConfigError, match="--metrics"):
            await nursery.start(
                MetricsServer(fill, str).run, "127.0.0.1", int(address.rpartition(":")[2])
            )
        nursery.cancel_scope.cancel()
