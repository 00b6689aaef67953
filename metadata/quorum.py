"""How many copies an operation on a register needs, and of whom: options, levels, quotas.

A *quota* is (members, total, homes): of the copies for these members at least `total` are needed,
`homes` of them by the members themselves, the rest by fallbacks that keep a hint for one.  An
operation has one quota for each set of homes, or for each zone of each set.
"""

from collections.abc import Mapping
from typing import Any

from dfs.cluster.map import METADATA, ClusterMap, Row
from dfs.errors import InvalidArgument

LEVELS = ("one", "quorum", "all", "local-quorum", "each-zone")
_NUMBERS = ("n", "r", "w", "pr", "pw")
_KNOWN = frozenset((*_NUMBERS, "level", "eventual", "request"))
REQUEST_SIZE = 16

Quota = tuple[Row, int, int]  # members, copies in all, copies on members


class Options:
    """What the caller of an operation wants; None = as the level or the cluster says.

    `key` is equal for options that lead to equal plans.
    """

    __slots__ = ("eventual", "key", "level", "n", "pr", "pw", "r", "request", "w")

    def __init__(self, given: Mapping[str, Any]) -> None:
        """Take the options of a request; raises `InvalidArgument`."""
        unknown = [name for name in given if name not in _KNOWN]
        if unknown:
            raise InvalidArgument(
                f"no option {unknown[0]!r}; there are {', '.join(sorted(_KNOWN))}"
            )
        level = given.get("level")
        if level is not None and level not in LEVELS:
            raise InvalidArgument(f"no level {level!r}; there are {', '.join(LEVELS)}")
        for name in _NUMBERS:
            value = given.get(name)
            if value is not None and (value.__class__ is not int or not 0 <= value <= 16):
                raise InvalidArgument(f"{name} is a number of copies, not {value!r}")
        request = given.get("request", b"")
        if request.__class__ is not bytes or len(request) not in (0, REQUEST_SIZE):
            raise InvalidArgument(f"a request id has {REQUEST_SIZE} bytes, not {request!r:.60}")
        self.level: str | None = level
        self.n: int | None = given.get("n")
        self.r: int | None = given.get("r")
        self.w: int | None = given.get("w")
        self.pr: int | None = given.get("pr")
        self.pw: int | None = given.get("pw")
        self.eventual = bool(given.get("eventual", False))
        self.request: bytes = request
        numbers = (self.n, self.r, self.w, self.pr, self.pw)
        self.key: Any = None  # the defaults
        if level is not None or self.eventual or numbers != (None,) * 5:
            self.key = (level, self.eventual, numbers)


DEFAULTS = Options({})


def defaults_with(request: bytes) -> Options:
    """`Options({"request": request})`, what almost every put has; `request` is a valid id."""
    options = Options.__new__(Options)
    options.level = options.n = options.r = options.w = options.pr = options.pw = None
    options.eventual = False
    options.key = None
    options.request = request
    return options


class Plan:
    """Who takes part in operations on one partition, by one map, with the same options."""

    __slots__ = ("epoch", "fallbacks", "joint", "readers", "reads", "writers", "writes")

    def __init__(
        self, cluster_map: ClusterMap, me: int, partition: int, options: Options = DEFAULTS
    ) -> None:
        """Plan for the coordinator `me`; raises `InvalidArgument` for impossible options."""
        params = cluster_map.params
        copies = params.n if options.n is None else options.n
        if not 1 <= copies <= params.n:
            raise InvalidArgument(f"n is 1 to {params.n} in this cluster, not {copies}")
        self.epoch = cluster_map.epoch
        read_set = cluster_map.read_homes(METADATA, partition)[:copies]
        write_sets = [row[:copies] for row in cluster_map.write_sets(METADATA, partition)]
        read = _read_numbers(options, copies, params.r, params.pw)
        write = _write_numbers(options, copies, params.w, params.pw)
        if not options.eventual and options.level != "one" and _by_numbers(options):
            _check_overlap(copies, read[0], write[0])
        zones = {node.number: node.zone for node in cluster_map.nodes}
        self.reads: tuple[Quota, ...] = tuple(
            _quotas(read_set, options.level, *read, zones, zones.get(me))
        )
        self.writes: tuple[Quota, ...] = tuple(
            quota
            for row in write_sets
            for quota in _quotas(row, options.level, *write, zones, zones.get(me))
        )
        self.readers: Row = read_set
        self.writers: Row = tuple(dict.fromkeys(number for row in write_sets for number in row))
        homes = {*self.writers, *self.readers}
        self.fallbacks: Row = tuple(
            number
            for number in cluster_map.preference(METADATA, partition)
            if number not in homes and number != me
        )
        self.joint = len(write_sets) > 1


def satisfied(
    quotas: tuple[Quota, ...], holders: Mapping[int, Any], hinted: Mapping[int, Any]
) -> bool:
    """Whether copies on `holders`, and hints for `hinted`, meet every quota."""
    for members, total, homes in quotas:
        held = 0
        kept = 0
        for member in members:
            if member in holders:
                held += 1
            elif member in hinted:
                kept += 1
        if held < homes or held + kept < total:
            return False
    return True


def majority(count: int) -> int:
    """More than half."""
    return count // 2 + 1


def _by_numbers(options: Options) -> bool:
    return not (options.n is None and options.r is None and options.w is None)


def _read_numbers(options: Options, copies: int, default: int, pw: int) -> tuple[int, int]:
    level = options.level
    r = {None: min(default, copies), "one": 1, "all": copies}.get(level, majority(copies))
    pr = r if pw else 0
    if level == "one":
        pr = 0
    elif level is not None:
        pr = r
    if options.r is not None:
        r, pr = options.r, min(pr, options.r)
    if options.pr is not None:
        pr = options.pr
    return _checked("r", "pr", r, pr, copies)


def _write_numbers(options: Options, copies: int, w: int, pw: int) -> tuple[int, int]:
    level = options.level
    if level is None:
        w, pw = min(w, copies), min(pw, copies)
    else:
        w = {"one": 1, "all": copies}.get(level, majority(copies))
        pw = 0 if level == "one" else w
    if options.w is not None:
        w, pw = options.w, min(pw, options.w)
    if options.pw is not None:
        pw = options.pw
    return _checked("w", "pw", w, pw, copies)


def _checked(name: str, primary: str, total: int, homes: int, copies: int) -> tuple[int, int]:
    if not 1 <= total <= copies:
        raise InvalidArgument(f"{name} is 1 to n = {copies}, not {total}")
    if not 0 <= homes <= total:
        raise InvalidArgument(f"{primary} is 0 to {name} = {total}, not {homes}")
    return total, homes


def _check_overlap(copies: int, r: int, w: int) -> None:
    if r + w <= copies:
        raise InvalidArgument(
            f"with n = {copies}, r = {r}, w = {w} a read can miss the latest write: "
            "r + w must be more than n; say `eventual` if that is meant"
        )


def _quotas(
    row: Row, level: str | None, total: int, homes: int, zones: Mapping[int, str], own: str | None
) -> list[Quota]:
    if level not in ("local-quorum", "each-zone"):
        return [(row, total, homes)]
    groups: dict[str, list[int]] = {}
    for number in row:
        groups.setdefault(zones[number], []).append(number)
    if level == "local-quorum":
        if own not in groups:  # a set without homes near by: any majority of it
            return [(row, majority(len(row)), majority(len(row)))]
        groups = {own: groups[own]}
    counts = [(tuple(members), majority(len(members))) for members in groups.values()]
    return [(members, count, count) for members, count in counts]
