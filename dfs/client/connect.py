"""How a client reaches a cluster: from a file or seed addresses to a `Cluster`.

`ClusterRef` names a cluster; `connect` turns it into a live `Cluster` (RPC endpoint, newest map,
blob client).  Nothing here keeps a connection of its own: the endpoint does.
"""

import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random, SystemRandom
from typing import Any, Protocol

import trio

from dfs.clock import Clock, SystemClock
from dfs.cluster.map import ClusterMap
from dfs.env import Rpc
from dfs.errors import ConfigError, DfsError, Unreachable, WrongCluster
from dfs.rpc.blobs import BlobClient
from dfs.rpc.endpoint import RpcEndpoint
from dfs.rpc.mapkeeper import MapKeeper

FILE_FORMAT = 1
CLUSTER_ID_SIZE = 16
SEED_TIMEOUT = 6.0  # seconds a seed is given to answer
HEAD_START = 0.5  # seconds a seed is given before the next is asked as well


@dataclass(frozen=True, slots=True)
class ClusterRef:
    """Names a cluster: its id (16 bytes, empty = not known) and addresses to begin with."""

    seeds: tuple[str, ...]
    cluster_id: bytes = b""

    @classmethod
    def load(cls, path: str | Path) -> "ClusterRef":
        """Read a `cluster.json`; raises `ConfigError` that says what is wrong with it."""
        path = Path(path)
        try:
            value = json.loads(path.read_bytes())
        except FileNotFoundError:
            raise ConfigError(
                f"cluster file {path} does not exist; make one with `dfs cluster init`"
                " or name another with --cluster or DFS_CLUSTER"
            ) from None
        except OSError as e:
            raise ConfigError(f"cluster file {path} cannot be read: {e.strerror}") from e
        except ValueError as e:
            raise ConfigError(
                f"cluster file {path} is damaged: {e}; copy it from a machine where it works"
            ) from e
        try:
            if value["format"] != FILE_FORMAT:
                raise ConfigError(
                    f"cluster file {path} has format {value['format']}; this version reads"
                    f" {FILE_FORMAT}: upgrade dfs"
                )
            given = value["seeds"]
            if not isinstance(given, list) or not all(isinstance(seed, str) for seed in given):
                raise ConfigError(f"cluster file {path}: `seeds` must be a list of addresses")
            seeds = tuple(given)
            cluster_id = bytes.fromhex(value["cluster_id"])
        except (KeyError, TypeError, ValueError) as e:
            why = f"{e} is missing" if isinstance(e, KeyError) else e
            raise ConfigError(
                f"{path} is not a cluster file ({why}): `dfs cluster init` makes one"
            ) from e
        if len(cluster_id) != CLUSTER_ID_SIZE:
            raise ConfigError(
                f"cluster file {path}: `cluster_id` must be {2 * CLUSTER_ID_SIZE} hex digits"
            )
        if not seeds:
            raise ConfigError(f"cluster file {path} names no seeds")
        return cls(seeds, cluster_id)


class BlobSource(Protocol):
    """What a session needs of `dfs.rpc.blobs.BlobClient`."""

    async def get_many(self, hashes: Any, *, timeout: float = 10) -> dict[bytes, bytes]:
        """Verified blobs by hash; raises when one is nowhere to be found."""
        ...


class Cluster:
    """A live connection to a cluster, shared by every session of a process."""

    def __init__(
        self,
        rpc: Rpc,
        get_map: Callable[[], ClusterMap],
        blobs: BlobSource,
        clock: Clock,
        random: Random,
        *,
        seeds: tuple[str, ...] = (),
        set_map: Callable[[ClusterMap], None] | None = None,
    ) -> None:
        """Compose from parts; `connect` does so for real clusters, tests do with fakes.

        With a `MapKeeper` for `get_map` newer maps are learned by themselves; without one
        `set_map`, if given, takes those that are asked for.
        """
        self.rpc = rpc
        self.get_map = get_map
        self.blobs = blobs
        self.clock = clock
        self.random = random
        self.silent: dict[
            int, float
        ] = {}  # node that did not answer lately -> when to ask it again
        self._seeds = seeds
        self._set_map = set_map

    def learn(self, error: DfsError) -> bool:
        """Take the map out of a `StaleEpoch`; whether it was newer, so that a retry makes sense."""
        keeper = self.get_map
        return isinstance(keeper, MapKeeper) and keeper.learn(error)

    async def refresh_map(self, first: str = "") -> None:
        """Ask for a newer map, `first` before others; keeps the old one when nobody answers."""
        keeper = self.get_map
        if self._set_map is None and not isinstance(keeper, MapKeeper):
            return
        known = self.get_map()
        addresses = [first] if first else []
        addresses += [n.metadata_addr for n in known.nodes if n.metadata_addr]
        with contextlib.suppress(Unreachable):
            newest = await load_map(self.rpc, (*addresses, *self._seeds))
            if isinstance(keeper, MapKeeper):
                keeper.offer(newest)
            elif self._set_map is not None and newest.epoch > known.epoch:
                self._set_map(newest)


async def load_map(rpc: Rpc, seeds: tuple[str, ...]) -> ClusterMap:
    """The newest map among the first seeds that answer.

    Raises `Unreachable` if none does, `WrongCluster` if all that answer are of another cluster.

    Seeds are asked one after the other with a head start of `HEAD_START` each, so that one that
    swallows packets does not hold up the rest.
    """
    failures: dict[str, DfsError] = {}
    found: list[ClusterMap] = []
    done = trio.Event()

    async def ask(seed: str) -> None:
        try:
            (encoded,), _ = await rpc.call(seed, "map.get", timeout=SEED_TIMEOUT)
            found.append(ClusterMap.decode(encoded))
            done.set()
        except DfsError as e:
            failures[seed] = e
            if len(failures) == len(asked):
                done.set()

    asked = tuple(dict.fromkeys(seeds))
    async with trio.open_nursery() as nursery:
        for seed in asked:
            before = len(failures)
            nursery.start_soon(ask, seed)
            with trio.move_on_after(HEAD_START):
                while not found and len(failures) == before:
                    with trio.move_on_after(0.05):
                        await done.wait()
            if found:
                break
        await done.wait()
        nursery.cancel_scope.cancel()
    if not found:
        strangers = [e for e in failures.values() if isinstance(e, WrongCluster)]
        if strangers and len(strangers) == len(failures):
            raise WrongCluster(str(strangers[0]), *strangers[0].details)
        told = "; ".join(f"{seed}: {why}" for seed, why in failures.items()) or "no seeds given"
        raise Unreachable(
            f"no node of the cluster answers ({told});"
            " are the daemons running? try `dfs cluster up`"
        )
    return max(found, key=lambda m: m.epoch)


@contextlib.asynccontextmanager
async def connect(
    ref: ClusterRef,
    *,
    name: str = "client",
    clock: Clock | None = None,
    random: Random | None = None,
) -> AsyncIterator[Cluster]:
    """Connect to a cluster for the length of the block.

    Raises `Unreachable` when all seeds are dead, `WrongCluster` when they belong to another
    cluster.  An error raised inside the block leaves it as it is, not wrapped in a group.
    """
    clock = clock or SystemClock()
    random = random or SystemRandom()
    keepers: list[MapKeeper] = []  # one, once a map is known
    rpc = RpcEndpoint(
        cluster_id=ref.cluster_id,
        name=name,
        clock=clock,
        random=random,
        epoch=lambda: keepers[0].current.epoch if keepers else 0,
    )
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        await nursery.start(rpc.run)
        try:
            first = await load_map(rpc, ref.seeds)
            keeper = MapKeeper(first, rpc=rpc, clock=clock, random=random, seeds=ref.seeds)
            keepers.append(keeper)
            blobs = BlobClient(rpc, keeper, clock)
            yield Cluster(rpc, keeper, blobs, clock, random, seeds=ref.seeds)
        except trio.Cancelled:
            raise
        except BaseException as e:
            error = e
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
