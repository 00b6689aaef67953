"""Whole metadata nodes under faults: real homes, journals, stores on simulated network and disks.

Three nodes serve one volume to four clients while messages are lost, doubled, late and reordered,
links are cut in one or both directions and nodes lose power.  An observer at every journal feeds
what is chosen to the `Ledger` of `homemodel`; clients run operations on the model's states, commit
them like real clients do, and report every answer to the ledger.  At the end everything heals, all
operations have to come to an end, and all replicas have to agree.

`scenario_home` runs the same state machine a hundred times faster but without the I/O around it;
here the mutants break that I/O.
"""

import contextlib
from collections.abc import Iterator
from random import Random
from typing import Any

import trio

from dfs.clock import SystemClock
from dfs.errors import Busy, DeadlineExceeded, DfsError, NoQuorum, NotHome, Unreachable
from dfs.rpc.blobs import BlobClient
from dfs.testing.homecluster import SALT, HomeClient, HomeCluster, SimNode, nonce
from dfs.testing.homemodel import Ledger, Op, Violation, invent, run_op
from dfs.testing.network import SimNetwork
from dfs.testing.seeded import run_judged
from dfs.volume import entries, tree
from dfs.volume.items import inode_key
from dfs.volume.nodecache import NodeCache
from metadata import volumehome
from metadata.batches import Answers
from metadata.volumehome import VolumeHome
from metadata.volumes import HomeCore

NAME = "homes"
VOLUME = b"homes of volumes"
DURATION = 8.0  # virtual seconds of faults
CLIENTS = 3
PATIENCE = 60.0  # virtual seconds that anything may take once all is well
CHECKPOINT_BYTES = 2000
TRANSIENT = (Unreachable, DeadlineExceeded, Busy, NoQuorum, NotHome)
MUTANTS = {
    "unconfirmed": "a home says things about now without a majority",
    "answer_early": "a commit is answered when it is proposed",
    "volatile_dedup": "a take-over forgets the last requests of sessions",
    "empty_rebuild": "a take-over forgets what was written since the last checkpoint",
    "lost_is_conflict": "requests without a known outcome are answered Conflict",
    "hasty_checkpoint": "a checkpoint says that it covers entries that it did not fold",
}


class _Volatile(HomeCore):
    def absorb(self, seq: int, entry: bytes) -> Answers:
        answers = super().absorb(seq, entry)
        if not answers:  # learned, not proposed here
            for session in self.sessions.values():
                session.no = 0
        return answers


class _Empty(HomeCore):
    def absorb(self, seq: int, entry: bytes) -> Answers:
        answers = super().absorb(seq, entry)
        if not answers:
            self._window = type(self._window)(0)
        return answers


class _Hasty(HomeCore):
    def _form_control(self, request: Any, now: int, formed: Any) -> None:
        if hasattr(request, "covered"):
            request.covered = self.seq
        super()._form_control(request, now, formed)


@contextlib.contextmanager
def _changed(mutant: str | None) -> Iterator[None]:
    """Small checkpoints, and what a mutant breaks, for the time of a run."""
    saved = [
        (volumehome, "CHECKPOINT_BYTES", volumehome.CHECKPOINT_BYTES),
        (VolumeHome, "core_class", VolumeHome.core_class),
        (VolumeHome, "_confirm", VolumeHome._confirm),
        (VolumeHome, "_drop", VolumeHome._drop),
        (VolumeHome, "_submit", VolumeHome._submit),
    ]
    try:
        volumehome.CHECKPOINT_BYTES = CHECKPOINT_BYTES
        _apply_mutant(mutant)
        yield
    finally:
        for owner, name, value in saved:
            setattr(owner, name, value)


def _apply_mutant(mutant: str | None) -> None:
    cores = {"volatile_dedup": _Volatile, "empty_rebuild": _Empty, "hasty_checkpoint": _Hasty}
    if mutant in cores:
        VolumeHome.core_class = cores[mutant]
    elif mutant == "unconfirmed":

        async def confirm(_self: VolumeHome, _core: HomeCore) -> None:
            await trio.lowlevel.checkpoint()

        setattr(VolumeHome, "_confirm", confirm)  # noqa: B010 - mypy refuses assignments to methods
    elif mutant == "lost_is_conflict":
        drop = VolumeHome._drop

        def refuse(self: VolumeHome, core: HomeCore, reason: str) -> None:
            for request in core.give_up():
                txns = getattr(request, "txns", None)
                if txns is not None:
                    request.token.set((core.seq, (False,) * len(txns)))
            drop(self, core, reason)

        setattr(VolumeHome, "_drop", refuse)  # noqa: B010 - mypy refuses assignments to methods
    elif mutant == "answer_early":
        submit = VolumeHome._submit

        def early(self: VolumeHome, core: HomeCore, request: Any) -> None:
            submit(self, core, request)
            if hasattr(request, "txns"):
                request.token.set((core.seq, (True,) * len(request.txns)))

        setattr(VolumeHome, "_submit", early)  # noqa: B010 - mypy refuses assignments to methods


class _Client:
    """One client: a session, its operations one request at a time, a watch beside them."""

    def __init__(self, run: "_Run", number: int) -> None:
        self.run = run
        self.number = number
        self.random = Random(run.random.random())
        self.raw = HomeClient(run.cluster, f"client{number}")
        self.sid = self.no = self.seq = 0
        self.ops: list[list[Any]] = []  # [id, op, floor at its invocation, result]

    async def ask(self, method: str, *args: Any) -> tuple[Any, ...]:
        """Send the same request to homes until there is an outcome."""
        run = self.run
        while True:
            try:
                node = self.random.choice(sorted(run.cluster.nodes))
                timeout = self.random.choice((0.3, 1.0, 2.0))
                return await self.raw.call(node, method, VOLUME, *args, timeout=timeout)
            except TRANSIENT:
                run.check_progress()
            await trio.sleep(self.random.uniform(0.01, 0.2))

    def entered(self, have: int, seq: int, news: tuple[tuple[int, bytes], ...]) -> None:
        """Check the entries of an answer: those after `have`, as they were chosen."""
        log = self.run.ledger.log
        if any(log[n - 1] != entry for n, entry in news):
            raise Violation("an answer holds an entry that was not chosen")
        if [n for n, _ in news] != list(range(have + 1, have + 1 + len(news))) or (
            news and news[-1][0] > seq
        ):
            raise Violation("an answer's entries are not those after the view")
        self.seq = max(self.seq, seq)

    async def open(self) -> None:
        """Open the session."""
        answer = await self.ask("vol.open", "rw", nonce(self.number), f"client{self.number}")
        self.sid, seq, covered, _, tail, _, _ = answer
        self.entered(covered, seq, tail)

    async def live(self) -> None:
        """Invoke operations and commit them until the run ends."""
        run, r = self.run, self.random
        await self.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.watch)
            while not run.ending or self.ops:
                while len(self.ops) < r.choice((1, 1, 2, 3)) and not run.ending:
                    self.ops.append([run.new_id(), self.invent(), run.ledger.floor, None])
                await self.commit()
                await trio.sleep(r.uniform(0, 0.03))
            nursery.cancel_scope.cancel()

    def invent(self) -> Op:
        return invent(self.random, self.run.ledger.states[self.seq], self.run.new_id())

    async def commit(self) -> None:
        """One request with all the operations there are, until its verdicts are known."""
        ledger = self.run.ledger
        state, base = ledger.states[self.seq], self.seq
        txns, ops, asked = [], [], list(self.ops)
        for op in asked:
            op[3], keys, groups, effects = run_op(state, op[1])
            txns.append((tuple(keys), tuple(groups), tuple(effects)))
            ops.append((op[0], op[1]))
        self.no += 1
        ledger.submit(self.sid, self.no, ops, txns)
        args = (self.sid, self.no, base, base, tuple(txns), 0)
        no, seq, verdicts, news, *_ = await self.ask("vol.commit", *args)
        if no != self.no:
            raise Violation("an answer to another request")
        ledger.check_final(self.sid, no, verdicts)
        self.entered(base, seq, news)
        for op, ok in zip(asked, verdicts, strict=True):
            if ok:
                self.ops.remove(op)
                ledger.finish(op, op[3])

    async def watch(self) -> None:
        """Watch, and check that an answer knows all that was answered before it was asked for."""
        while True:
            have, floor = self.seq, self.run.ledger.floor
            wait = self.random.choice((0.0, 0.2, 0.5))
            seq, news, reset, *_ = await self.ask("vol.watch", self.sid, have, wait)
            if seq < floor:
                raise Violation("a watch missed a commit that was answered before it began")
            self.entered(have if reset is None else reset[0], seq, news)
            await trio.sleep(0.01)


class _Run:
    """One run of a seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)
        self.seed = seed
        self.ledger: Ledger
        self.cluster: HomeCluster
        self.network: SimNetwork
        self.ids = 1
        self.ending = False
        self.healed = float("inf")
        self.crashes = 0

    def new_id(self) -> int:
        self.ids += 1
        return self.ids

    def check_progress(self) -> None:
        """Nothing may hang for ever once all is well."""
        if trio.current_time() > self.healed + PATIENCE:
            raise Violation("a request is not answered although all nodes are well")

    def observe(self, node: SimNode) -> None:
        """Feed what a node's journal chooses to the ledger."""
        journal = node.node.journals.get(VOLUME) if node.node is not None else None
        if journal is None:
            return

        def chosen(seq: int, payload: bytes) -> None:
            log = self.ledger.log
            if seq > len(log) + 1:
                for n, entry in journal.entries(len(log), 1 << 30):
                    if n < seq:
                        self.ledger.choose(entry)
            if seq == len(log) + 1:
                self.ledger.choose(payload)
            elif log[seq - 1] != payload:
                raise Violation("two entries were chosen at one seq")

        journal.subscribe(chosen)

    async def faults(self) -> None:
        """Break things for a while, then mend everything."""
        r, network, nodes = self.random, self.network, self.cluster.nodes
        end = trio.current_time() + DURATION
        while trio.current_time() < end:
            await trio.sleep(r.expovariate(2.0))
            x = r.random()
            up = [n for n in nodes.values() if n.up]
            down = [n for n in nodes.values() if not n.up]
            names = [n.name for n in nodes.values()]
            if x < 0.15 and len(up) > 1:
                r.choice(up).crash()
                self.crashes += 1
            elif x < 0.5 and down:
                await r.choice(down).start()
            elif x < 0.6:
                network.block(*r.sample(names, 2))
            elif x < 0.8:  # cut off from the other nodes, but not from the clients
                alone = r.choice(self.cluster.owners(VOLUME) or list(nodes))
                network.partition(
                    [[nodes[alone].name], [n for n in names if n != nodes[alone].name]]
                )
            else:
                network.heal()
        network.heal()
        network.drop = 0.0
        for node in nodes.values():
            if not node.up:
                await node.start()
        self.healed = trio.current_time()
        self.ending = True

    async def main(self) -> None:
        """Everything."""
        r = self.random
        self.network = network = SimNetwork(
            Random(r.random()),
            SystemClock(),
            delay=(0.0002, r.choice((0.001, 0.01))),
            drop=r.choice((0.0, 0.02)),
            duplicate=r.choice((0.0, 0.05)),
            reorder=r.choice((0.0, 0.1)),
        )
        async with network, trio.open_nursery() as nursery:
            self.cluster = cluster = HomeCluster(self.seed, network, nursery, hook=self.observe)
            self.ledger = Ledger(cluster.genesis(VOLUME))
            drop, network.drop = network.drop, 0.0
            await cluster.start()
            await cluster.create(VOLUME)
            await trio.sleep(1)
            network.drop = drop
            for node in cluster.nodes.values():
                self.observe(node)
            async with trio.open_nursery() as actors:
                for number in range(CLIENTS):
                    actors.start_soon(_Client(self, number).live)
                actors.start_soon(self.faults)
            await trio.sleep(31.0)  # the owner announces what it chose at the latest now
            self.check_end()
            await self.check_tree()
            nursery.cancel_scope.cancel()

    def check_end(self) -> None:
        """All replicas hold the same journal."""
        for node in self.cluster.nodes.values():
            journal = node.node.journals.get(VOLUME) if node.node is not None else None
            if journal is None or journal.chosen != len(self.ledger.log):
                raise Violation(f"replica {node.number} did not catch up")
            for seq, entry in journal.entries(journal.base, 1 << 30):
                if self.ledger.log[seq - 1] != entry:
                    raise Violation("replicas differ")

    async def check_tree(self) -> None:
        """The tree of the last checkpoint holds the state that it says it covers."""
        seq, covered = self.ledger.checkpoints[-1]
        root = entries.decode(self.ledger.log[seq - 1]).body[1] if covered else b""
        endpoint = self.network.endpoint("reader")
        blobs = BlobClient(endpoint, self.cluster.map, self.cluster.clock)
        cache = NodeCache()
        while True:
            try:
                held = dict(tree.scan(cache.get, root))
                tree.check(cache.get, root, SALT)
                break
            except tree.Missing as e:
                cache.add(await blobs.get_many(e.hashes))
        # The model starts with a root directory that nobody created.
        created = {k: v for k, v in self.ledger.states[covered].items() if k != inode_key(1)}
        if covered and held != created:
            raise Violation("a checkpoint's tree is not the state that it covers")


def play(seed: int, *, mutant: str | None = None) -> tuple[_Run, list[str]]:
    """Run one schedule; what it did and what was violated."""
    made = _Run(seed)
    with _changed(mutant):
        wanted = (Violation, DfsError)
        return made, run_judged(made.main, seed=seed, name=NAME, wanted=wanted)


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of one schedule; empty is good."""
    return play(seed, mutant=mutant)[1]
