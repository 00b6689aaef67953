"""Random schedules for the delegation: the schedules of `scenario_home` with holders among them.

Clients fall silent, ask for the delegation, answer operations from their own view while they have
it, commit behind, return it when they are told to, stop, crash.  Homes run the real `HomeCore` and
the real rules of `metadata.delegation`; how they wait and who asks when is modelled here.  Every
client and home has a clock that runs up to 5 % fast or slow.

Checked besides what `scenario_home` checks: whoever answers from its view under a delegation has
it, by the chosen journal, at that moment, and nobody else answers from a view that was confirmed
lately; no answer about now leaves out what a holder acknowledged before it was asked for; entries
under a delegation are its holder's, under its present epoch; what a holder acknowledged gets into
the journal in order, so that what is lost is a suffix.
"""

from random import Random
from typing import Any

from dfs.errors import Fenced
from dfs.testing.delegation_mutants import CORES, MUTANTS, STANDINGS
from dfs.testing.homemodel import Op, Target, Violation, invent, judged, run_op
from dfs.testing.scenario_home import Client, Home, World
from dfs.volume import entries
from dfs.volume.effects import apply
from metadata.batches import Answer
from metadata.delegation import Delegated, Standing
from metadata.requests import Commit, Delegate, Request, Return, Revoke
from metadata.tail import kind_of
from metadata.volumes import HomeCore

__all__ = ["MUTANTS", "NAME", "play", "run"]

NAME = "delegation"
STEPS = 4000
SECONDS = 0.05  # of a step
DRIFT = 0.05  # of clocks
LEASE = 12.0  # seconds after it asked that a holder serves
FRESH = 10.0  # seconds after it asked that a view answers; more than clients have, to meet more


class Holder(Client):
    """A client that may have the delegation."""

    def restart(self) -> None:
        """Crash and start again: what was not committed is gone."""
        super().restart()
        self.epoch = 0  # of the delegation this client has
        self.stray = 0  # of one that it was given without learning of it
        self.asking = 0.0  # until when it asks for the delegation
        self.question = 0  # the last request that did
        self.heard = -1e9  # when it asked what was answered last, by its own clock
        self.recalled = False
        self.quiet = 0  # until when it asks for nothing
        self.cut = 0  # until when no home hears it
        self.state = Target()  # its own view
        self.pending: list[tuple[int, Op]] = []  # acknowledged, not yet sent
        self.sent: list[tuple[int, Op]] = []  # by the request under way


class DelegationWorld(World):
    """One schedule; see the module's docstring."""

    client_type: type[Client] = Holder
    take_overs = 0.0003

    def __init__(self, seed: int, mutant: str | None = None) -> None:
        """Everything is drawn from `seed`."""
        self.rates = [1 + Random(f"{seed}/{i}").uniform(-DRIFT, DRIFT) for i in range(8)]
        self.standings: dict[int, Standing] = {}
        self.epoch = self.holder = 0  # by the chosen journal
        self.epochs: dict[tuple[int, int], int] = {}  # request -> epoch it names
        self.acks: dict[int, tuple[int, int, int]] = {}  # operation -> (time, sid, number)
        self.flushed: dict[int, int] = {}  # session -> number of the last in the journal
        self.counts = dict.fromkeys(("grants", "served", "returns", "revoked", "lost"), 0)
        super().__init__(seed, mutant)
        self.sluggish = self.random.random() < 0.5  # changes of hands take seconds
        self.crowd = self.random.choice((1, 2, 3))  # clients that are active at a time, about
        for client in self.clients[1:]:
            client.stopped = self.random.choice((0, 0, 500, 2000))

    # -------------------------------------------------------------------------------- clocks

    def clock(self, client: Client) -> float:
        """What a client's clock says, in seconds."""
        return self.time * SECONDS * self.rates[client.number]

    def now(self, home: Home) -> float:
        """What a home's clock says, in seconds."""
        return self.time * SECONDS * self.rates[4 + self.homes.index(home)]

    # ------------------------------------------------------------------------------- journal

    def core_class(self) -> type[HomeCore]:
        """A core with the mutant's rule broken."""
        return CORES.get(self.mutant or "", HomeCore)

    def takeover(self, home: Home) -> None:
        """A home wins the ballot: it has heard of nobody."""
        super().takeover(home)
        i = self.homes.index(home)
        self.standings[i] = STANDINGS.get(self.mutant or "", Standing)(self.now(home))

    def choose(self, payload: bytes) -> None:
        """An entry is chosen: it must be the holder's, and its operations next in line."""
        kind, _, body = entries.decode(payload)
        others = self.holder and kind == entries.SESSION
        if kind == entries.DATA:
            for sid, no, _, _ in body[0]:
                epoch = self.epochs.get((sid, no), 0)
                others = others or self.holder not in (0, sid)
                if epoch and (epoch, sid) != (self.epoch, self.holder):
                    raise Violation("a commit with an old epoch")
                for op_id, _ in self.ledger.requests[sid, no]:
                    if epoch:
                        number = self.acks[op_id][2]
                        if number != self.flushed.get(sid, 0) + 1:
                            raise Violation("acknowledged operations got in out of order")
                        self.flushed[sid] = number
        if others:
            raise Violation("an entry of another session under a delegation")
        super().choose(payload)
        before = self.epoch
        if kind == entries.DELEGATION:
            self.epoch, self.holder = body[:2]
            self.counts["grants" if self.holder else "returns"] += 1
            if len(body) > 2:
                self.dead.add(body[2])
                self.counts["revoked"] += 1
            if self.epoch != before + 1:
                raise Violation("an epoch was used twice")
        elif kind == entries.CLOSE and self.holder in body[0]:
            self.epoch, self.holder = self.epoch + 1, 0

    def accept(self) -> None:
        """The accepted entry reaches a majority, some later than others."""
        payload = self.accepted[1] if self.accepted is not None and self.sluggish else b""
        if kind_of(payload) != entries.DELEGATION or self.random.random() < 0.1:
            super().accept()

    def absorb(self, home: Home, core: HomeCore, payload: bytes) -> None:
        """The proposer learns of its entry."""
        before = core.epoch
        super().absorb(home, core, payload)
        if core.epoch != before:
            self.standing(home).ended(self.now(home))

    def standing(self, home: Home) -> Standing:
        """What a home remembers."""
        return self.standings[self.homes.index(home)]

    # --------------------------------------------------------------------------------- homes

    def home_message(self, home: Home, m: dict[str, Any]) -> None:
        """A message arrives; homes rarely take the ballot: that starts all silences anew."""
        if home.core is not None or self.random.random() < 0.05:
            super().home_message(home, m)

    def serve(self, home: Home, core: HomeCore, m: dict[str, Any]) -> None:
        """A message arrives at a home that believes that it owns the ballot."""
        now, standing, sid = self.now(home), self.standing(home), m["sid"]
        m = {**m, "mark": core.launched}
        if sid:
            standing.heard(sid, now)
        if m["k"] == "delegate":
            if sid not in core.sessions or core.claimant == sid:
                self.confirm(home, ("watch", m))
            elif self.mutant == "grant_at_once" or (
                not core.claimant and not standing.wait(sid, core.sessions, now)
            ):
                request: Request = Delegate(sid)
                request.token = m
                core.submit(request)
            else:
                self.send(~m["client"], {**m, "k": "later"})
        elif m["k"] == "return":
            request = Return(sid, m["epoch"])
            request.token = m
            core.submit(request)
        else:
            super().serve(home, core, m)

    def turn(self, home: Home) -> None:
        """A home does one piece of its work, or revokes."""
        core = home.core
        if core is not None and core.holder:
            standing = self.standing(home)
            session = core.sessions.get(core.holder)
            due = standing.due(core.holder, session.no if session else 0, self.now(home))
            if standing.wanted_at is not None and due <= 0 and not core.losing(core.holder):
                core.submit(Revoke(core.epoch))
        for _ in range(3):  # who owns nothing has nothing to do
            owners = [h for h in self.homes if h.core is not None]
            super().turn(self.random.choice(owners or self.homes))

    def blocked(self, home: Home, core: HomeCore, sid: int, past: str) -> bool:
        """Whether a session must not be told about now; it asks again, and its wish counts."""
        claimant = core.holder if self.mutant == "unclaimed" else core.claimant
        if claimant not in (0, sid):
            self.want(home, core)
            return self.mutant != past
        return core.losing(sid)

    def want(self, home: Home, core: HomeCore) -> None:
        """Another session needs the volume."""
        if core.holder:
            session = core.sessions.get(core.holder)
            self.standing(home).want(session.no if session else 0, self.now(home))

    def state(self, home: Home, core: HomeCore) -> tuple[int, int, bool]:
        """What an answer says of the delegation."""
        return core.epoch, core.holder, self.standing(home).wanted_at is not None

    def watched(self, home: Home, core: HomeCore, m: dict[str, Any]) -> None:
        """Answer a watch, or the delegate request of a session that has it."""
        sid = m["sid"]
        if sid not in core.sessions:
            self.send(~m["client"], {**m, "k": "fenced", "watch": True})
        elif m["k"] == "delegate" and core.holder != sid:
            self.send(~m["client"], {**m, "k": "busy"})
        elif self.blocked(home, core, sid, "watches_past"):
            self.send(~m["client"], {**m, "k": "busy", "watch": True})
        else:
            self.standing(home).heard(sid, self.now(home))
            kind = "granted" if m["k"] == "delegate" else "watched"
            self.speak(m, kind, core.seq, self.state(home, core))

    def speak(self, m: dict[str, Any], kind: str, seq: int, state: Any, **more: Any) -> None:
        """Send an answer about now; it must hold what a holder acknowledged before the question."""
        asked = m["asked"] / SECONDS / self.rates[m["client"]]
        for client in self.clients:
            if isinstance(client, Holder) and client.sid == self.holder != m["sid"]:
                for op_id, _ in client.pending + client.sent:
                    at, seq_of = self.acks[op_id][0], self.ledger.applied.get(op_id)
                    if client.epoch == self.epoch and at < asked - 1 and seq_of is None:
                        raise Violation("an answer leaves out what the holder acknowledged")
        about = {key: m[key] for key in ("sid", "no", "asked")}
        self.send(~m["client"], {**about, **more, "k": kind, "seq": seq, "state": state})

    def answer(self, home: Home, request: Request, answer: Answer) -> None:
        """Turn an outcome of the core into a message."""
        core, m = home.core, request.token
        if core is None or m is None or isinstance(answer, Fenced):
            super().answer(home, request, answer)
        elif isinstance(answer, Delegated):
            self.want(home, core)
            self.reply(request, {"k": "busy"})
        elif isinstance(request, Commit) and isinstance(answer, tuple):
            self.ledger.check_final(request.sid, request.no, answer[1])
            if core.proved <= m["mark"] and self.mutant != "resend_beats":
                self.confirm(home, ("told", (request, answer)))
            else:
                self.tell(home, core, request, answer)
        elif isinstance(request, Delegate) and isinstance(answer, int):
            if self.blocked(home, core, request.sid, ""):
                self.reply(request, {"k": "busy"})
            else:
                self.speak(m, "granted", core.seq, self.state(home, core))
        elif isinstance(request, Return):
            self.reply(request, {"k": "returned", "seq": core.seq})
        elif type(request).__name__ == "Open" and isinstance(answer, int):
            if self.blocked(home, core, answer, "opens_past"):
                self.reply(request, {"k": "busy"})
            else:
                self.standing(home).heard(answer, self.now(home))
                self.speak(m, "opened", core.seq, self.state(home, core), new=answer)
        else:
            super().answer(home, request, answer)

    def tell(self, home: Home, core: HomeCore, request: Commit, answer: Answer) -> None:
        """Answer a commit, unless its session is about to lose the delegation."""
        told = True in answer[1] or core.losing(request.sid)
        if told and self.blocked(home, core, request.sid, "memory_past"):
            self.reply(request, {"k": "busy"})
            return
        self.standing(home).heard(request.sid, self.now(home))
        message = {"k": "done", "seq": answer[0], "verdicts": answer[1]}
        self.reply(request, {**message, "state": self.state(home, core)})

    def confirmed(self, home: Home, kind: str, what: Any) -> None:
        """A majority confirmed the ballot."""
        if kind == "told" and home.core is not None:
            self.tell(home, home.core, *what)
        else:
            super().confirmed(home, kind, what)

    # ------------------------------------------------------------------------------- clients

    def client_turn(self, client: Client) -> None:
        """A client does something, and most of the time only some of them do."""
        r = self.random
        if not isinstance(client, Holder):
            raise TypeError
        if client.quiet > self.time or client.stopped > self.time:
            awake = [c for c in self.clients if isinstance(c, Holder)]
            awake = [c for c in awake if max(c.quiet, c.stopped) <= self.time]
            if not awake:
                return
            client = r.choice(awake)
        if self.homes[client.guess].core is None and r.random() < 0.7:  # homes say who the owner is
            client.guess = next((i for i, h in enumerate(self.homes) if h.core), client.guess)
        if client.number and not client.epoch and r.random() < 0.06 * (4 - self.crowd):
            client.quiet = self.time + r.randint(200, 1200)
            if client.sid and r.random() < 0.2:
                self.dead.add(client.sid)
                client.restart()
            return
        if client.epoch or client.asking > self.time or client.stray:
            self.hold(client)
        elif client.sid and client.request is None and not client.ops and r.random() < 0.3:
            client.asking = self.time + 100
        else:
            super().client_turn(client)

    def ask(self, client: Client, kind: str, **message: Any) -> None:
        """Send a request, unless the client is cut off."""
        if not isinstance(client, Holder) or client.cut <= self.time:
            super().ask(client, kind, **message)

    def hold(self, client: Holder) -> None:
        """Turn of a client that has the delegation, or asks for it."""
        r = self.random
        if r.random() < 0.01:
            client.stopped = self.time + r.choice((r.randint(10, 700), r.randint(230, 330)))
            return
        if r.random() < 0.01:
            client.cut = self.time + r.randint(150, 400)
        if r.random() < 0.002:
            self.dead.add(client.sid)
            client.restart()
            return
        if r.random() < 0.2:
            client.guess = r.randrange(3)
        if r.random() < 0.25:
            self.ids += 1
            client.watch = (self.ids, self.ledger.floor)
            self.ask(client, "watch", no=self.ids)
        if not client.epoch:
            if client.stray:
                self.ask(client, "return", no=-1, epoch=client.stray)
            elif r.random() < 0.5:
                client.question = self.ids = self.ids + 1
                self.ask(client, "delegate", no=self.ids)
            return
        leased = self.clock(client) < client.heard + LEASE or self.mutant == "past_lease"
        if leased and (not client.recalled or self.mutant == "deaf"):
            for _ in range(r.choice((0, 1, 1, 2))):
                self.answer_here(client)
        if client.request is not None:
            if client.recalled and r.random() < 0.03:  # it gives up what it cannot commit
                self.lose_pending(client)
                client.request, client.pending, client.sent = None, [], []
            elif client.pause <= self.time and r.random() < 0.6:
                self.ask(client, "commit", **client.request)
        elif client.pending and r.random() < 0.4 and self.mutant != "drops_on_return":
            self.flush(client)
        elif (client.recalled or r.random() < 0.01) and (
            not client.pending or self.mutant == "drops_on_return"
        ):
            client.recalled = True  # it serves no more
            self.ask(client, "return", no=-1, epoch=client.epoch)

    def answer_here(self, client: Holder) -> None:
        """Run an operation on the client's own view and acknowledge it."""
        if (self.epoch, self.holder) != (client.epoch, client.sid):
            raise Violation("a holder served after it had lost the delegation")
        for other in self.clients:
            if not isinstance(other, Holder) or other is client or not other.sid or other.epoch:
                continue
            if self.clock(other) < other.heard + FRESH:
                raise Violation("a view is fresh although another session has the delegation")
        self.counts["served"] += 1
        self.inos += 1
        op = invent(self.random, client.state, self.inos)
        result, _, _, effects = run_op(client.state, op)
        if result == "ok" and effects:
            self.ids += 1
            apply(client.state, effects)
            number = self.flushed.get(client.sid, 0) + len(client.pending) + len(client.sent) + 1
            if client.sent and client.sent[0][0] in self.ledger.applied:
                number -= len(client.sent)
            self.acks[self.ids] = (self.time, client.sid, number)
            client.pending.append((self.ids, op))

    def flush(self, client: Holder) -> None:
        """Make one request of what comes first."""
        count = self.random.randint(1, len(client.pending))
        client.sent, client.pending = client.pending[:count], client.pending[count:]
        state = Target(self.ledger.states[client.seq])
        txns = []
        for _, op in client.sent:
            effects = run_op(state, op)[3]
            apply(state, effects)
            txns.append(((), (), tuple(effects)))
        client.no += 1
        self.epochs[client.sid, client.no] = client.epoch
        self.ledger.submit(client.sid, client.no, client.sent, txns)
        epoch, base = client.epoch, client.seq
        client.request = {"no": client.no, "base": base, "txns": tuple(txns), "epoch": epoch}

    def client_message(self, client: Client, m: dict[str, Any]) -> None:
        """An answer arrives at a client."""
        if not isinstance(client, Holder):
            raise TypeError
        if client.stopped > self.time:
            return
        kind, fresh = m["k"], not client.sid
        if kind == "opened":
            super().client_message(client, m)
            if fresh and client.sid:
                client.heard = max(client.heard, m["asked"])
            return
        if m["sid"] != client.sid or m.get("watch"):
            if kind == "fenced" and m["sid"] == client.sid:
                self.fenced(client)
            return
        if kind == "fenced" and client.epoch and client.request and m["no"] == client.request["no"]:
            self.fenced(client)
            return
        if kind == "returned":
            self.returned(client, m)
            return
        if kind == "granted" and m["no"] == client.question and client.asking > self.time:
            client.epoch, client.asking = m["state"][0], 0.0
            client.recalled, client.question = m["state"][2], 0
            client.seq = max(client.seq, m["seq"])
            client.state = Target(self.ledger.states[client.seq])
            client.ops.clear()
        if "state" in m and kind != "opened":
            self.heard(client, m)
        if kind == "done" and client.epoch and client.request is not None:
            if m["no"] == client.request["no"]:
                if not all(m["verdicts"]):
                    raise Violation("a commit under the delegation was refused")
                if any(op_id not in self.ledger.applied for op_id, _ in client.sent):
                    raise Violation("a commit was acknowledged that is not in the journal")
                client.request, client.sent = None, []
                client.seq = max(client.seq, m["seq"])
                self.ledger.floor = max(self.ledger.floor, m["seq"])
            return
        if kind == "watched" and client.epoch:
            if client.watch is not None and m["no"] == client.watch[0]:
                if m["seq"] < client.watch[1]:
                    raise Violation("a watch missed a commit that was answered before it began")
                client.watch = None
            return
        if kind not in ("later", "granted"):
            super().client_message(client, m)

    def heard(self, client: Holder, m: dict[str, Any]) -> None:
        """Note what an answer says of the delegation, and when its question was asked."""
        epoch, holder, wanted = m["state"]
        if not client.epoch:
            if m["k"] == "watched" or True in m.get("verdicts", ()):
                client.heard = max(client.heard, m["asked"])
            if holder == client.sid and client.asking <= self.time:
                client.stray, client.question = epoch, 0  # what it gives back it never uses
        elif (epoch, holder) == (client.epoch, client.sid):
            client.heard = max(client.heard, m["asked"])
            client.recalled = client.recalled or wanted
        elif epoch > client.epoch and client.sid not in self.dead and not client.recalled:
            raise Violation("a holder lost the delegation without losing its session")

    def returned(self, client: Holder, m: dict[str, Any]) -> None:
        """The delegation is given back, or was not held any more."""
        if client.epoch and client.recalled and not client.request and self.epoch > client.epoch:
            if client.pending:
                raise Violation("a live session lost what it had acknowledged")
            client.epoch, client.recalled, client.state = 0, False, Target()
            client.seq = max(client.seq, m["seq"])
        client.stray = 0

    def fenced(self, client: Holder) -> None:
        """The session is over: what was acknowledged and not sent can never get in."""
        if client.sid not in self.dead:
            raise Violation("a live session was ended")
        self.lose_pending(client)
        client.restart()

    def lose_pending(self, client: Holder) -> None:
        """What was acknowledged and not sent is lost: it must never get in."""
        self.counts["lost"] += bool(client.pending)
        self.ledger.failed.update(op_id for op_id, _ in client.pending)


def play(
    seed: int, *, mutant: str | None = None, steps: int = STEPS
) -> tuple[DelegationWorld, list[str]]:
    """Run one schedule; the world at its end and what was violated."""
    world = DelegationWorld(seed, mutant)
    return world, judged(world, steps, f"{NAME} seed {seed}")


def run(seed: int, *, mutant: str | None = None) -> list[str]:
    """Violations of one schedule; empty is good."""
    return play(seed, mutant=mutant)[1]
