"""Random schedules for the home's state machine: three homes, four clients, one model journal.

The real `metadata.volumes.HomeCore` runs under everything that can go wrong around it: take-overs
at any moment, an owner that does not know yet that it lost the ballot, a batch in flight that
survives or not, messages that are lost, late, doubled or reordered, clients that stop, crash,
resend.  The journal is a model (a list, a promised ballot, one accepted entry that may still win),
so a schedule of thousands of steps takes milliseconds.

Each chosen entry is replayed against a sequential file system, so the checkers find: histories
that are not serializable, answers out of real-time order, operations applied twice, effects of
operations that were answered an error or `Conflict`, stale answers, stale watches, sessions ended
for nothing.
"""

from random import Random
from typing import Any

from dfs.errors import DfsError, Fenced, InvalidArgument
from dfs.testing.home_mutants import CORES
from dfs.testing.homemodel import Ledger, Op, Violation, invent, judged, run_op, whole
from dfs.volume import entries
from dfs.volume.window import Window
from metadata.batches import Answer
from metadata.requests import Checkpoint, Close, Commit, Open, Request
from metadata.volumes import HomeCore

NAME = "home"
STEPS = 2500
MUTANTS = {
    "empty_window": "a take-over starts with an empty conflict window",
    "local_floor": "the window forgets by size, which is not a function of the journal",
    "floor_ignored": "reads from below the last checkpoint are judged by a window without them",
    "early_conflict": "a clash with a batch that may be lost is answered Conflict",
    "no_intra_batch": "requests of one batch are not checked against each other",
    "no_intra_request": "transactions of one request are not checked against each other",
    "volatile_dedup": "outcomes of sessions are forgotten at a take-over",
    "bare_checkpoint": "a checkpoint does not carry the outcomes of sessions",
    "dedup_at_arrival": "a resend is recognised when it arrives, not when the batch is formed",
    "no_group_reads": "a transaction does not name the groups it listed",
    "nonce_ignored": "a resent open opens a second session",
    "read_unconfirmed": "a read is validated by a home that may have lost the ballot",
    "fenced_unconfirmed": "a home that may have lost the ballot ends sessions it does not know",
    "watch_unconfirmed": "a watch is answered by a home that may have lost the ballot",
    "wall_stamps": "entries carry the wall clock of their proposer as it is",
    "busy_final": "a client takes an unknown outcome for a refusal",
    "rerun_unknown": "a client gives up waiting and runs the operation again",
    "put_inode": "a client writes whole inodes instead of patches",
    "error_unvalidated": "a client answers errors from its view",
}


# ----------------------------------------------------------------------------------- the world


class Home:
    """One home: its core while it believes that it owns the ballot, and confirms under way."""

    def __init__(self) -> None:
        """A home that owns nothing."""
        self.ballot = -1
        self.core: HomeCore | None = None
        self.proposing: bytes | None = None
        self.confirms: list[list[Any]] = []  # [seen by a majority, what to do then]


class Client:
    """One client: a session, its request under way and the operations behind it."""

    def __init__(self, number: int) -> None:
        """A client without a session."""
        self.number = number
        self.stopped = 0
        self.guess = 0
        self.opens = 0
        self.restart()

    def restart(self) -> None:
        """Crash and start again, under a new nonce."""
        self.opens += 1
        self.nonce = b"%d/%d" % (self.number, self.opens)
        self.sid = 0
        self.no = 0
        self.seq = 0
        self.pause = 0
        self.request: dict[str, Any] | None = None
        self.ops: list[list[Any]] = []  # [id, op, floor at its invocation, result last computed]
        self.watch: tuple[int, int] | None = None  # (token, floor when it was sent)


class World:
    """One schedule."""

    client_type: type[Client] = Client
    take_overs = 0.001  # of a step

    def __init__(self, seed: int, mutant: str | None = None) -> None:
        """Everything is drawn from `seed`."""
        self.random = Random(seed)
        self.mutant = mutant
        genesis = entries.encode(entries.GENESIS, 1, {"salt": b"s" * 16}, 1, (0, 1, 2))
        self.ledger = Ledger(genesis, blind=mutant == "put_inode")
        self.promised = -1
        self.ballots = 0
        self.accepted: tuple[int, bytes] | None = None
        self.homes = [Home() for _ in range(3)]
        self.clients = [self.client_type(i) for i in range(4)]
        self.mail: list[tuple[int, dict[str, Any]]] = []  # (home or ~client, message)
        self.time = self.ids = self.sids = 0
        self.dead: set[int] = set()
        self.inos = 1
        self.takeover(self.homes[0])

    # ---------------------------------------------------------------------------- the journal

    def takeover(self, home: Home) -> None:
        """A home wins the ballot; what was accepted by some survives or not."""
        self.ballots += 1
        self.promised = self.ballots
        self.lose(home)
        home.ballot = self.ballots
        if self.accepted is not None:
            payload = self.accepted[1]
            self.accepted = None
            if self.random.random() < 0.5:
                self.choose(payload)
        home.core = self.rebuild()

    def choose(self, payload: bytes) -> None:
        """An entry is chosen."""
        self.ledger.choose(payload)

    def core_class(self) -> type[HomeCore]:
        """A core, with the mutant's rule broken."""
        return CORES.get(self.mutant or "", HomeCore)

    def rebuild(self) -> HomeCore:
        """A core made from what a home still holds of the journal."""
        start = self.random.choice(self.ledger.checkpoints)[1]
        core = self.core_class()(start)
        for seq in range(start + 1, len(self.ledger.log) + 1):
            core.absorb(seq, self.ledger.log[seq - 1])
        if not core.complete:
            raise Violation("a core without control state")
        if self.mutant == "empty_window":
            core._window = Window(0)
        elif self.mutant == "local_floor":
            core._window.limit = self.random.randint(4, 16)
        elif self.mutant == "volatile_dedup":
            for session in core.sessions.values():
                session.no = 0
        return core

    def lose(self, home: Home) -> None:
        """A home finds out that it lost the ballot: its requests have no known outcome."""
        if home.core is not None:
            for request in home.core.abandon():
                self.reply(request, {"k": "busy"})
        home.core = home.proposing = None
        home.ballot = -1
        home.confirms = []

    def accept(self) -> None:
        """The accepted entry reaches a majority; its proposer learns."""
        if self.accepted is None:
            return
        ballot, payload = self.accepted
        self.accepted = None
        self.choose(payload)
        for home in self.homes:
            if home.ballot == ballot and home.core is not None:
                home.proposing = None
                self.absorb(home, home.core, payload)

    def absorb(self, home: Home, core: HomeCore, payload: bytes) -> None:
        """The proposer of an entry that was chosen learns it."""
        for request, answer in core.absorb(len(self.ledger.log), payload):
            self.answer(home, request, answer)

    # -------------------------------------------------------------------------------- a home

    def send(self, to: int, message: dict[str, Any]) -> None:
        """Post a message to a home, or to client `~to`."""
        self.mail.append((to, message))

    def reply(self, request: Request, message: dict[str, Any]) -> None:
        """Post a message to the client that made a request."""
        if request.token is not None:
            asked = request.token
            about = {key: asked[key] for key in ("sid", "no", "asked")}
            self.send(~asked["client"], {**message, **about})

    def answer(self, home: Home, request: Request, answer: Answer) -> None:
        """Turn an outcome of the core into a message."""
        if isinstance(answer, Fenced):
            self.reply(request, {"k": "fenced"})
        elif isinstance(answer, InvalidArgument):
            return  # of a request that is answered already
        elif isinstance(answer, DfsError):
            self.reply(request, {"k": "busy"})
        elif isinstance(request, Commit):
            self.ledger.check_final(request.sid, request.no, answer[1])
            self.reply(request, {"k": "done", "seq": answer[0], "verdicts": answer[1]})
        elif isinstance(request, Open) and home.core is not None:
            self.reply(request, {"k": "opened", "new": answer, "seq": home.core.seq})

    def home_message(self, home: Home, m: dict[str, Any]) -> None:
        """A message arrives at a home."""
        if home.ballot >= 0 and home.ballot != self.promised and self.random.random() < 0.3:
            self.lose(home)
        core = home.core
        if core is None:
            if self.random.random() < 0.08:
                self.takeover(home)
            return
        self.serve(home, core, m)

    def serve(self, home: Home, core: HomeCore, m: dict[str, Any]) -> None:
        """A home that believes that it owns the ballot deals with a message."""
        if m["k"] == "open":
            self.sids += 1
            opening = Open(self.sids, "rw", m["no"], "")
            opening.token = m
            core.submit(opening)
        elif m["k"] == "watch":
            self.confirm(home, ("watch", m), skip=self.mutant == "watch_unconfirmed")
        else:
            request = Commit(m["sid"], m["no"], m["base"], m["txns"], 0, m["epoch"])
            request.token = m
            if self.mutant == "dedup_at_arrival":
                session = core.sessions.get(request.sid)
                known = session and HomeCore._recall(core, session, request)
                if known:
                    self.answer(home, request, known)
                    return
            if request.writing:
                core.submit(request)
            else:
                self.confirm(home, ("settle", request), skip=self.mutant == "read_unconfirmed")

    def confirm(self, home: Home, what: tuple[str, Any], *, skip: bool = False) -> None:
        """Do something once a majority confirms the ballot; a mutant does not wait for it."""
        if skip:
            self.confirmed(home, *what)
        else:
            home.confirms.append([False, what])

    def confirmed(self, home: Home, kind: str, what: Any) -> None:
        """A majority confirmed: answer what waited for it."""
        core = home.core
        if core is None:
            raise Violation("confirmed without a core")
        if kind == "watch":
            self.watched(home, core, what)
            return
        answer = core.settle(what)
        if answer is not None:
            self.answer(home, what, answer)

    def watched(self, home: Home, core: HomeCore, m: dict[str, Any]) -> None:
        """Answer a watch."""
        self.send(~m["client"], {**m, "k": "watched", "seq": core.seq})

    def turn(self, home: Home) -> None:
        """A home does one piece of its own work."""
        core, r = home.core, self.random
        if core is None:
            return
        if home.confirms and r.random() < 0.6:
            item = r.choice(home.confirms)
            if item[0]:
                home.confirms.remove(item)
                self.confirmed(home, *item[1])
            elif home.ballot == self.promised:
                item[0] = True
            else:
                self.lose(home)
            return
        x = r.random()
        if x < 0.02 and core.seq > core.covered:
            root = b"r%d" % core.seq
            core.submit(Checkpoint(r.randint(core.covered + 1, core.seq), root, 0))
        elif x < 0.03 and self.dead:
            core.submit(Close((r.choice(sorted(self.dead)),)))
        if home.proposing is None and not core.idle:
            formed = core.form(self.time + r.randint(-20, 20))
            for request, answer in formed.answers:
                self.answer(home, request, answer)
            for request in formed.confirm:
                fast = self.mutant == "fenced_unconfirmed" and isinstance(request, Commit)
                self.confirm(home, ("settle", request), skip=fast)
            if formed.payload is not None:
                home.proposing = formed.payload
                if home.ballot == self.promised:
                    self.accepted = (home.ballot, formed.payload)

    # ------------------------------------------------------------------------------ a client

    def client_turn(self, client: Client) -> None:
        """A client does something: invoke, issue, send or resend, watch, stop, crash."""
        r = self.random
        if client.stopped > self.time:
            return
        if r.random() < 0.004:
            client.stopped = self.time + r.randint(10, 500)
            return
        if r.random() < 0.002:
            if client.sid:
                self.dead.add(client.sid)
            client.restart()
            return
        if r.random() < 0.2:
            client.guess = r.randrange(3)
        if not client.sid:
            if r.random() < 0.4:
                self.ask(client, "open", no=client.nonce)
            return
        if r.random() < 0.1:
            self.ids += 1
            client.watch = (self.ids, self.ledger.floor)
            self.ask(client, "watch", no=self.ids)
        if client.pause > self.time:
            return
        if client.request is None:
            while len(client.ops) < r.choice((1, 1, 2, 3)):
                self.ids += 1
                client.ops.append([self.ids, self.invent(client), self.ledger.floor, None])
            self.issue(client)
        elif r.random() < 0.4:
            if self.mutant == "rerun_unknown" and r.random() < 0.1:
                client.seq = len(self.ledger.log)
                self.issue(client)
            if client.request is not None:
                self.ask(client, "commit", **client.request)

    def ask(self, client: Client, kind: str, **message: Any) -> None:
        """Send a request to the home that the client takes for the owner."""
        about = {"client": client.number, "sid": client.sid, "asked": self.clock(client)}
        self.send(client.guess, {"k": kind, **about, **message})

    def clock(self, client: Client) -> float:
        """What a client's clock says."""
        return self.time

    def invent(self, client: Client) -> Op:
        """A random operation."""
        self.inos += 1
        states = self.ledger.states
        return invent(self.random, states[min(client.seq, len(states) - 1)], self.inos)

    def issue(self, client: Client) -> None:
        """Run the operations on the client's view and make one request of them."""
        state = self.ledger.states[client.seq]
        txns, ops = [], []
        for op in list(client.ops):
            result, keys, groups, effects = run_op(state, op[1])
            op[3] = result
            if self.mutant == "put_inode":
                effects = [whole(state, effect) for effect in effects]
            if self.mutant == "no_group_reads":
                groups = []
            if self.mutant == "error_unvalidated" and not effects:
                client.ops.remove(op)
                self.ledger.finish(op, result)
                continue
            txns.append((tuple(keys), tuple(groups), tuple(effects)))
            ops.append((op[0], op[1]))
        client.request = None
        if not txns:
            return
        client.no += 1
        self.ledger.submit(client.sid, client.no, ops, txns)
        base, epoch = client.seq, 0
        client.request = {"no": client.no, "base": base, "txns": tuple(txns), "epoch": epoch}

    def client_message(self, client: Client, m: dict[str, Any]) -> None:
        """An answer arrives at a client."""
        if client.stopped > self.time:
            return
        if m["k"] == "opened":
            if m["no"] == client.nonce and not client.sid:
                if self.ledger.nonces.get(client.nonce) != m["new"]:
                    raise Violation("opened without a session in the journal")
                client.sid, client.seq = m["new"], m["seq"]
            return
        if m["sid"] != client.sid:
            return
        if m["k"] == "watched":
            if client.watch is not None and m["no"] == client.watch[0]:
                if m["seq"] < client.watch[1]:
                    raise Violation("a watch missed a commit that was answered before it began")
                client.watch = None
                client.seq = max(client.seq, m["seq"])
            return
        request = client.request
        if request is None or m["no"] != request["no"]:
            return
        if m["k"] == "fenced":
            if client.sid not in self.dead:
                raise Violation("a live session was ended")
            client.restart()
        elif m["k"] == "busy":
            client.pause = self.time + 3
            if self.mutant == "busy_final":
                client.request = None
        elif m["k"] == "done":
            client.request = None
            client.seq = max(client.seq, m["seq"])
            verdicts = dict(
                zip(
                    (op[0] for op in self.ledger.requests[client.sid, m["no"]]),
                    m["verdicts"],
                    strict=True,
                )
            )
            for op in [op for op in client.ops if verdicts.get(op[0])]:
                client.ops.remove(op)
                self.ledger.finish(op, op[3])

    # ------------------------------------------------------------------------------ schedule

    def step(self) -> None:
        """One random event."""
        self.time += 1
        r = self.random
        x = r.random()
        if x < 0.25:
            self.client_turn(r.choice(self.clients))
        elif x < 0.40:
            self.turn(r.choice(self.homes))
        elif x < 0.50:
            self.accept()
        elif x < 0.5 + self.take_overs:
            self.takeover(r.choice(self.homes))
        elif self.mail:
            i = r.randrange(len(self.mail)) if r.random() < 0.3 else 0
            to, m = self.mail[i]
            y = r.random()
            if y > 0.08:
                del self.mail[i]  # else it is delivered and comes again
            if y < 0.95:
                if to >= 0:
                    self.home_message(self.homes[to], m)
                else:
                    self.client_message(self.clients[~to], m)
            if len(self.mail) > 60:
                del self.mail[:20]

    def check_end(self) -> None:
        """A core that lived through the schedule equals one made from the journal."""
        for home in self.homes:
            core = home.core
            if core is None or core.seq != len(self.ledger.log):
                continue
            other = self.rebuild()
            if core.control(0) != other.control(0) or core.covered != other.covered:
                raise Violation("control state is no function of the journal")


def play(seed: int, *, mutant: str | None = None, steps: int = STEPS) -> tuple[World, list[str]]:
    """Run one schedule; the world at its end and what was violated."""
    world = World(seed, mutant)
    return world, judged(world, steps, f"{NAME} seed {seed}")


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of one schedule; empty is good."""
    return play(seed, mutant=mutant)[1]
