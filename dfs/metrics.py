"""Numbers for Prometheus: gathered in the loop when somebody asks, served at a port of their own.

Nothing counts twice: a scrape reads what `.statistics()` of every part has anyway into a `Page`,
which takes a fraction of a millisecond in the loop; the text is made of it on a thread, by
`prometheus_client`.  So metrics cost nothing between scrapes, and no thread ever touches state that
belongs to the loop.

The HTTP server knows `GET /metrics` and `GET /healthz`: 200 when the daemon can do its work, 503
with the reason when it cannot, no answer when its loop hangs.  It closes after each answer.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import trio

from dfs.errors import ConfigError
from dfs.workers import Listed

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
HEAD_LIMIT = 8192  # bytes of a request's head
PATIENCE = 10.0  # seconds for a request
CLIENTS = 8  # connections at once
GAUGE, COUNTER, SUMMARY = "gauge", "counter", "summary"


class Family(NamedTuple):
    """One metric with all its samples: (suffix of the name, labels, value)."""

    kind: str
    text: str
    samples: list[tuple[str, dict[str, str], float]]


class Row(NamedTuple):
    """How one number of some `.statistics()` is shown."""

    key: str
    kind: str  # GAUGE or COUNTER
    name: str  # without the prefix, and for a counter without "_total"
    text: str


class Page:
    """What a scrape finds; names get the prefix `dfs_`, counters the suffix `_total`."""

    def __init__(self) -> None:
        """Empty."""
        self.families: dict[str, Family] = {}

    def gauge(self, name: str, text: str, value: float, **labels: Any) -> None:
        """A number that goes up and down."""
        self._add(GAUGE, name, text, [("", value)], labels)

    def counter(self, name: str, text: str, value: float, **labels: Any) -> None:
        """A number that only grows while the process lives."""
        self._add(COUNTER, name, text, [("_total", value)], labels)

    def summary(self, name: str, text: str, count: float, total: float, **labels: Any) -> None:
        """How often something happened, and the sum of what it took."""
        self._add(SUMMARY, name, text, [("_count", count), ("_sum", total)], labels)

    def table(self, rows: Iterable[Row], numbers: Mapping[str, Any], **labels: Any) -> None:
        """The rows whose key is among `numbers`; others are of another version or role."""
        for key, kind, name, text in rows:
            value = numbers.get(key)
            if isinstance(value, int | float):
                suffix = "_total" if kind == COUNTER else ""
                self._add(kind, name, text, [(suffix, value)], labels)

    def workers(self, workers: Iterable[Listed]) -> None:
        """The background loops."""
        for worker in workers:
            s = worker.status()
            label = {"worker": s["name"]}
            self.counter("worker_items", "Items done", s["items"], **label)
            self.counter("worker_bytes", "Bytes moved or read", s["bytes"], **label)
            self.counter("worker_rounds", "Rounds ended", s["rounds"], **label)
            self.gauge("worker_paused", "Paused by an operator", s["state"] == "paused", **label)
            self.gauge("worker_failed", "The last round failed", s["state"] == "failed", **label)
            at = s["last_error_at"] / 1e9
            self.gauge("worker_last_error_time_seconds", "Wall time, 0 = never", at, **label)

    def _add(
        self,
        kind: str,
        name: str,
        text: str,
        values: Sequence[tuple[str, float]],
        labels: dict[str, Any],
    ) -> None:
        family = self.families.get(name)
        if family is None:
            family = self.families[name] = Family(kind, text, [])
        texts = {key: str(value) for key, value in labels.items()}
        family.samples.extend((suffix, texts, float(value)) for suffix, value in values)


def render(families: Mapping[str, Family]) -> tuple[bytes, str]:
    """(text, content type) of a page, with the process's own numbers; for a thread."""
    # Not before the first scrape: the import takes 70 ms, which a daemon that nobody asks saves.
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        CollectorRegistry,
        ProcessCollector,
        generate_latest,
    )
    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector

    class Found(Collector):
        def collect(self) -> Iterable[Metric]:
            for name, (kind, text, samples) in families.items():
                metric = Metric(f"dfs_{name}", text, kind)
                for suffix, labels, value in samples:
                    metric.add_sample(f"dfs_{name}{suffix}", labels, value)
                yield metric

    registry = CollectorRegistry(auto_describe=False)
    registry.register(Found())
    ProcessCollector(registry=registry)
    return generate_latest(registry), CONTENT_TYPE_LATEST


def parse_listen(text: str) -> tuple[str, int]:
    """(host, port) of `[HOST:]PORT`; loopback by default.  Raises `ConfigError`."""
    host, _, port = text.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"metrics cannot be served at {text!r}: write PORT or HOST:PORT")
    return host.strip("[]") or LOOPBACK, int(port)


class MetricsServer:
    """Serves `/metrics` and `/healthz`; `address` is set once it listens."""

    def __init__(self, fill: Callable[[Page], None], health: Callable[[], str]) -> None:
        """`fill` writes the numbers of now into a page; `health` says what is wrong, "" if nothing.

        Both are called in the loop and must be quick.
        """
        self._fill = fill
        self._health = health
        self._clients = 0
        self._thread = trio.CapacityLimiter(1)
        self.address = ""

    async def run(
        self, host: str, port: int, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Serve until cancelled; port 0 takes a free one.  Raises `ConfigError`."""
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except OSError as e:
            raise ConfigError(
                f"metrics cannot be served at {host}:{port}: {e.strerror or e}; "
                "give --metrics another address"
            ) from e
        bound = listeners[0].socket.getsockname()
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"
        async with trio.open_nursery() as nursery:
            task_status.started(self.address)
            await trio.serve_listeners(self._serve, listeners, handler_nursery=nursery)

    async def _serve(self, stream: trio.SocketStream) -> None:
        self._clients += 1
        try:
            with trio.move_on_after(PATIENCE):
                async with stream:
                    if self._clients > CLIENTS:
                        return
                    head = await _head(stream)
                    await stream.send_all(await self._answer(head))
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            log.debug("a client of the metrics went away")
        finally:
            self._clients -= 1

    async def _answer(self, head: bytes) -> bytes:
        method, _, rest = head.partition(b" ")
        target = rest.partition(b" ")[0].partition(b"?")[0]
        kind = "text/plain; charset=utf-8"
        if method not in (b"GET", b"HEAD"):
            status, body = "405 Method Not Allowed", b"only GET\n"
        elif target == b"/metrics":
            page = Page()
            self._fill(page)
            status = "200 OK"
            body, kind = await trio.to_thread.run_sync(
                render, page.families, limiter=self._thread, abandon_on_cancel=True
            )
        elif target == b"/healthz":
            wrong = self._health()
            status = "503 Service Unavailable" if wrong else "200 OK"
            body = (wrong or "ok").encode() + b"\n"
        else:
            status, body = "404 Not Found", b"there are /metrics and /healthz\n"
        lines = (
            f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return lines.encode() + (b"" if method == b"HEAD" else body)


async def _head(stream: trio.SocketStream) -> bytes:
    """The head of a request, or what there is of it."""
    head = b""
    while b"\r\n\r\n" not in head and len(head) < HEAD_LIMIT:
        more = await stream.receive_some(HEAD_LIMIT)
        if not more:
            break
        head += more
    return head


# --------------------------------------------------------------------- what every daemon can tell

RPC = (
    Row("connects", COUNTER, "rpc_connects", "Connections made to other nodes"),
    Row("failures", COUNTER, "rpc_connect_failures", "Connections that could not be made"),
    Row("late", COUNTER, "rpc_late_answers", "Answers that came when nobody waited any more"),
    Row("accepted", COUNTER, "rpc_accepted_connections", "Connections accepted"),
    Row("refused", COUNTER, "rpc_refused_requests", "Large requests refused for lack of memory"),
    Row("calls", COUNTER, "rpc_calls", "Requests made to other nodes"),
    Row("server_bytes", GAUGE, "inflight_server_bytes", "Bytes of large requests being served"),
)


def measure_rpc(page: Page, statistics: Mapping[str, Any]) -> None:
    """From `RpcEndpoint.statistics()`."""
    page.table(RPC, statistics)
    for method, (requests, tasks, seconds) in sorted(statistics["methods"].items()):
        page.counter("rpc_requests", "Requests served", requests, method=method)
        if tasks:
            text = "Time to serve the requests that had to wait for something"
            page.summary("rpc_seconds", text, tasks, seconds, method=method)
    for link in statistics["links"]:
        label = {"peer": link["address"], "link": "bulk" if link["bulk"] else "control"}
        page.summary(
            "rpc_client_seconds", "Time to the answers of other nodes", link["answers"],
            link["seconds"], **label,
        )  # fmt: skip
        page.gauge("rpc_in_flight", "Requests without an answer", link["in_flight"], **label)
        page.gauge("rpc_queued_bytes", "Bytes not sent yet", link["queued_bytes"], **label)
    for peer, breaker in statistics["breakers"].items():
        text = "The circuit breaker of the peer: 0 closed, 1 half open, 2 open"
        level = {"closed": 0, "half open": 1}.get(breaker["state"], 2)
        page.gauge("breaker_state", text, level, peer=peer)
        page.counter("breaker_opened", "Times it opened", breaker["opened"], peer=peer)
        page.counter("breaker_refused", "Requests it failed", breaker["refused"], peer=peer)


def measure_disk(page: Page, usage: tuple[int, int], statistics: Mapping[str, Any]) -> None:
    """From `Disk.usage()` and the real disk's statistics."""
    total, free = usage
    page.gauge("disk_total_bytes", "Size of the file system of the data directory", total)
    page.gauge("disk_free_bytes", "Bytes free for us", free)
    if "syncs" in statistics:
        text = "Time of fdatasync"
        page.summary("fsync_seconds", text, statistics["syncs"], statistics["sync_seconds"])


def measure_limit(page: Page, level: str) -> None:
    """How full the disk is, see `dfs.limits`."""
    for name in ("ok", "near", "backfill", "full"):
        page.gauge("disk_level", "1 for the level the disk is at", name == level, level=name)
