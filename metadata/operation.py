"""One get or put on its way, as its coordinator sees it: read, mint, write, in this order.

A get reads R copies, merges them, and writes the merge back to W when the answers differ, so that
no later read can miss what this one returned (Attiya, Bar-Noy and Dolev, 1995).  A put without a
context reads first; then the coordinator's own replica mints a dot and makes its copy durable; only
then is the very same register sent to all other homes, as often as it takes.

Sloppy quorum: for a home that fails or keeps the writer waiting, the next node of the preference
list keeps a copy as a hint.  Where there is none left, the coordinator keeps the hint itself, which
speeds up the home's return but counts for nothing.

An operation outlives its answer: the copies that were under way then still arrive, or are hinted.
"""

from math import inf
from typing import TYPE_CHECKING, Any

from dfs.errors import (
    Busy,
    DeadlineExceeded,
    DfsError,
    DiskFull,
    NoQuorum,
    StaleEpoch,
    Unreachable,
)
from metadata import versions
from metadata.quorum import Options, Plan, Quota, satisfied
from metadata.registers import GET, HINT, MERGE, MINT

if TYPE_CHECKING:
    from metadata.coordinator import Coordinator

READING, MINTING, WRITING, OVER = range(4)
TRIES = 3  # requests to one node for one step before it counts as failed
PAUSE = 0.05  # seconds before the second; each later one doubles it
TRANSIENT = (Unreachable, Busy, DeadlineExceeded, StaleEpoch)
_WORDS: dict[type[DfsError], str] = {
    Unreachable: "unreachable",
    DeadlineExceeded: "no answer in time",
    Busy: "busy",
    DiskFull: "disk full",
    StaleEpoch: "has a newer map",
}

Ticket = tuple["Operation", int, int, str, int]  # operation, generation, node, kind, hint's target


class Operation:
    """A get (`mints` is False) or a put; driven by its `Coordinator` only."""

    __slots__ = (
        "acked", "answers", "asked", "context", "core", "deadline", "done", "failures",
        "generation", "hinted", "hints", "mints", "options", "partition", "phase", "plan",
        "register", "reply", "retry_at", "row", "slow_at", "tokens", "value",
        "waiting",
    )  # fmt: skip

    def __init__(
        self, core: "Coordinator", token: Any, row: bytes, partition: int, plan: Plan,
        options: Options, deadline: float,
    ) -> None:  # fmt: skip
        """Know what is wanted; nothing is sent yet."""
        self.core = core
        self.tokens = [token]
        self.row = row
        self.partition = partition
        self.plan = plan
        self.options = options
        self.deadline = deadline
        self.done = False  # answered; copies may be under way
        self.mints = False
        self.value: bytes | None = None
        self.context: bytes | None = None
        self.register = b""
        self.reply: Any = None  # what DONE will say, once the quotas are met
        self.generation = 0
        self.waiting = 0  # requests of this generation without an answer
        self.phase = READING
        self.slow_at = inf  # when to stop being patient
        self.answers: dict[int, bytes] = {}
        self.acked: dict[int, None] = {}
        self.asked: dict[int, int] = {}  # node -> requests of this step
        self.failures: dict[int, DfsError] = {}
        self.retry_at: dict[int, float] = {}
        self.hints: dict[int, list[int]] = {}  # home -> fallbacks asked to keep its copy
        self.hinted: dict[int, int] = {}  # home -> fallback that keeps it

    # --------------------------------------------------------------------------------- reading

    def read(self, now: float) -> None:
        """Ask as many homes as the quotas need; the quickest first."""
        core, plan = self.core, self.plan
        self.phase = READING
        for members, total, _ in plan.reads:
            for node in core.order(members)[:total]:
                if node not in self.asked:
                    self._get(node)
        self.slow_at = now + core.patience(self.asked)
        core.wake(self, min(self.slow_at, self.deadline))

    def _get(self, node: int) -> None:
        self._send(node, GET, (GET, self.row), 0)

    def _on_answer(self, now: float, node: int, data: bytes) -> None:
        self.answers[node] = data
        if self._enough_read():
            self._merge(now)
        elif not self.waiting:
            self._ask_more(now)

    def _others(self) -> int:
        """Answers of nodes that are no homes."""
        readers = self.plan.readers
        return sum(node not in readers for node in self.answers)

    def _enough_read(self) -> bool:
        answers, plan = self.answers, self.plan
        others = len(answers) and self._others()
        for members, total, homes in plan.reads:
            held = 0
            for member in members:
                if member in answers:
                    held += 1
            if held < homes or held + others < total:
                return False
        return True

    def _ask_more(self, now: float, extra: int = 0) -> None:
        """Ask the next node of every quota that the nodes asked cannot meet; `extra` to hedge."""
        core, plan, asked = self.core, self.plan, self.asked
        failed = self.failures
        for members, total, homes in plan.reads:
            alive = sum(1 for m in members if m in asked and m not in failed)
            others = sum(1 for m in asked if m not in plan.readers and m not in failed)
            missing = max(total + extra - alive - others, homes + extra - alive)
            for node in core.order(members):
                if missing <= 0:
                    break
                if node not in asked:
                    self._get(node)
                    missing -= 1
            if homes < total and missing > 0:
                for node in plan.fallbacks[: len(plan.readers)]:
                    if missing > 0 and node not in asked and core.is_up(node):
                        self._get(node)
                        missing -= 1
        if not self.waiting and not self.retry_at:
            self._give_up()

    def _merge(self, now: float) -> None:
        answers = self.answers
        different = list(dict.fromkeys(answers.values()))
        data = different[0]
        self.generation += 1  # answers to this step that are still under way are ignored
        self.waiting = 0
        if len(different) > 1:
            register = versions.EMPTY
            for answer in different:
                if answer:
                    register = versions.merge(register, versions.decode(answer))
            data = versions.encode(register)
        else:
            register = versions.decode(data) if data else versions.EMPTY
        context = versions.encode_context(register[0])
        if self.mints:
            self.context = context
            self.mint()
            return
        values = tuple([sibling[2] for sibling in register[1]])
        info: dict[str, Any] = {"acked": tuple(answers), "coordinator": self.core.number}
        self.reply = (values, context, info)
        same = len(different) == 1
        if same and (not data or not self.plan.joint or self._weak()):
            self._answer(self.reply)
            self.phase = OVER
            return
        self.register = data
        self.acked = {node: None for node, answer in answers.items() if answer == data}
        if not same:
            self.core.repairs += 1
            info["repaired"] = tuple(n for n in self.plan.writers if n not in self.acked)
        if self._weak():
            self._answer(self.reply)
        self.write(now)

    def _weak(self) -> bool:
        """Whether the caller takes an answer that a later read may not confirm."""
        return self.options.eventual or self.options.level == "one"

    # --------------------------------------------------------------------------------- minting

    def mint(self) -> None:
        """Have the own replica mint a dot and make it durable."""
        self.phase = MINTING
        self.asked = {}
        self.failures = {}
        self.retry_at = {}  # what the read wanted to ask again must not be sent the mint
        self._send(self.core.number, MINT, (MINT, self.row, self.context, self.value), 0)

    def _on_minted(self, now: float, minted: tuple[bytes, bytes, int]) -> None:
        core = self.core
        self.register, context, siblings = minted
        self.reply = (context, siblings, {"coordinator": core.number})
        core.minted(now, self)
        if self.done:  # too late for the caller; a resend sends this register
            self.phase = OVER
            return
        if core.changed_since(self):
            self.phase = WRITING
            self.replan(now)
            return
        if core.number in self.plan.writers:
            self.acked = {core.number: None}
        self.write(now)

    # --------------------------------------------------------------------------------- writing

    def write(self, now: float) -> None:
        """Send the register to every home of every write set that is not known to have it."""
        core, plan = self.core, self.plan
        self.phase = WRITING
        self.asked = {}
        self.failures = {}
        self.retry_at = {}
        request = (MERGE, self.row, self.register)
        acked = self.acked
        for node in plan.writers:
            if node not in acked:
                self._send(node, MERGE, request, 0)
                if not core.is_up(node):
                    self._hint(node)
        self.slow_at = now + core.patience(self.asked)
        core.wake(self, min(self.slow_at, self.deadline))
        self._check_written()

    def _durable(self) -> bool:
        return satisfied(self.plan.writes, self.acked, self.hinted)

    def _check_written(self) -> None:
        if not self.done and self._durable():
            self._answer(self.reply)
        if not self.waiting and (self.done or not self.retry_at):
            if not self.done:
                self._give_up()
            self.phase = OVER

    def _on_copy(self, node: int) -> None:
        self.acked[node] = None
        self.failures.pop(node, None)
        self._check_written()

    def _hint(self, target: int) -> None:
        """Give the copy of a home to the next fallback, or to the own node."""
        core = self.core
        if target in self.hinted or target in self.acked:
            return
        tried = self.hints.setdefault(target, [])
        busy = {node for nodes in self.hints.values() for node in nodes}
        for node in self.plan.fallbacks:
            if node not in busy and core.is_up(node):
                break
        else:
            node = core.number
            if node in tried or target == node:
                return
        tried.append(node)
        request = (HINT, self.row, self.register, target, core.wall_us)
        self._send(node, HINT, request, target)

    # --------------------------------------------------------------------------------- replies

    def on_reply(self, now: float, ticket: Ticket, answer: Any) -> None:
        """Take the answer to one request."""
        _, generation, node, kind, target = ticket
        if generation != self.generation or self.phase == OVER:
            return
        self.waiting -= 1
        if isinstance(answer, DfsError):
            self._on_failure(now, node, kind, target, answer)
        elif kind == GET:
            self._on_answer(now, node, answer)
        elif kind == MERGE:
            self._on_copy(node)
        elif kind == MINT:
            self._on_minted(now, answer)
        else:
            if node != self.core.number:
                self.hinted[target] = node
            self._check_written()

    def _on_failure(self, now: float, node: int, kind: str, target: int, error: DfsError) -> None:
        core = self.core
        if isinstance(error, StaleEpoch) and error.details:
            core.offer(error.details[0])
        if kind == MINT:
            if self.done:
                core.unminted(self)
                self.phase = OVER
            elif not isinstance(error, StaleEpoch) or self.asked[node] >= TRIES:
                self._fail(error)
            elif core.changed_since(self):
                self.replan(now)
            else:
                self.retry_at[node] = when = now + PAUSE
                core.wake(self, when)
            return
        if kind == HINT:
            if target not in self.acked:
                self._hint(target)
            self._check_written()
            return
        self.failures[node] = error
        tries = self.asked[node]
        if isinstance(error, TRANSIENT) and tries < TRIES and not self.done:
            self.retry_at[node] = when = now + PAUSE * 2.0 ** (tries - 1)
            core.wake(self, when)
        if kind == GET:
            self._ask_more(now)
        else:
            self._hint(node)
            self._check_written()

    def tick(self, now: float) -> None:
        """Look at the time."""
        if self.phase == OVER:
            return
        if now >= self.deadline:
            minting = self.phase == MINTING and self.waiting
            if not self.done:
                self._give_up()
            if minting:  # it happens yet: the operation lives until it knows its register
                self.phase = MINTING
                return
            self.phase = OVER
            return
        core = self.core
        if now >= self.slow_at:
            self.slow_at = inf
            if self.phase == READING:
                core.hedges += 1
                self._ask_more(now, 1)
            elif self.phase == WRITING and not self.done:
                for node in self.plan.writers:
                    if node not in self.acked:
                        self._hint(node)
        if self.phase != OVER and self.retry_at:
            due = [node for node, when in self.retry_at.items() if when <= now]
            for node in due:
                del self.retry_at[node]
                if self.done:
                    continue
                if self.phase == READING:
                    self.failures.pop(node, None)
                    self._get(node)
                elif self.phase == MINTING:
                    self._send(node, MINT, (MINT, self.row, self.context, self.value), 0)
                elif node not in self.acked:
                    self._send(node, MERGE, (MERGE, self.row, self.register), 0)
            if self.phase == WRITING:
                self._check_written()
        if self.phase != OVER:
            core.wake(self, min(self.slow_at, self.deadline, *self.retry_at.values(), inf))

    def replan(self, now: float) -> None:
        """The map changed under the operation: begin the step again, with the same register.

        What was acknowledged by the old map is forgotten: the new quotas are met by requests of the
        new epoch only.
        """
        if self.phase == OVER or (self.phase == MINTING and self.waiting):
            return  # a mint is never sent twice: whether the first one happened is not known yet
        core = self.core
        try:
            self.plan = core.plan(self.partition, self.options)
        except DfsError as e:
            self._fail(e)
            return
        core.replans += 1
        self.generation += 1
        self.waiting = 0
        self.acked = {}
        self.hints = {}
        self.hinted = {}
        self.retry_at = {}
        self.answers = {}
        self.asked = {}
        self.failures = {}
        if self.phase == READING:
            self.read(now)
        elif self.phase == MINTING:
            self.mint()
        else:
            self.write(now)

    # ------------------------------------------------------------------------------------- ends

    def _send(self, node: int, kind: str, request: tuple[Any, ...], target: int) -> None:
        if kind != HINT:
            self.asked[node] = self.asked.get(node, 0) + 1
        self.waiting += 1
        ticket = (self, self.generation, node, kind, target)
        self.core.send(node, self.plan.epoch, request, ticket)

    def _answer(self, result: Any) -> None:
        self.done = True
        if not isinstance(result, DfsError):
            info = result[2]
            if self.phase == WRITING:
                info["acked"] = tuple(self.acked)
                if self.hinted:
                    info["hinted"] = tuple(self.hinted)
        self.core.finish(self, result)

    def _fail(self, error: DfsError) -> None:
        self._answer(error)
        self.phase = OVER

    def _give_up(self) -> None:
        self._fail(self._verdict())

    def _verdict(self) -> DfsError:
        """The error that says who answered and who did not."""
        core, plan = self.core, self.plan
        if self.phase == READING:
            quotas, nodes, have = plan.reads, plan.readers, list(self.answers)
            what = "a read"
        else:
            quotas, nodes, have = plan.writes, plan.writers, list(self.acked)
            what = "a write" if self.mints else "repairing what was read"
        told: dict[int, str] = {}
        for node in dict.fromkeys((*nodes, *have, *self.asked)):
            if node in have:
                told[node] = "ok"
            else:
                told[node] = _describe(self.failures.get(node), node in self.asked)
                if node in self.hinted:
                    told[node] += f" (node {self.hinted[node]} keeps its copy)"
        text = "; ".join(f"node {node} {word}" for node, word in told.items())
        wanted = " and ".join(_needs(quota) for quota in quotas)
        message = f"{wanted} needed for {what}: {text}"
        failed = [e for node, e in self.failures.items() if node not in have]
        if failed and all(isinstance(e, DiskFull) for e in failed):
            return DiskFull(message, wanted, told)
        core.failures += 1
        return NoQuorum(message, wanted, told)


def _needs(quota: Quota) -> str:
    members, total, homes = quota
    strict = "" if homes == total else f" ({homes} on homes)"
    return f"{total} of {len(members)}{strict}"


def _describe(error: DfsError | None, asked: bool) -> str:
    if error is None:
        return "no answer in time" if asked else "not asked"
    for kind, word in _WORDS.items():
        if isinstance(error, kind):
            return word if word == "disk full" else f"{word}: {error}"
    return f"{type(error).__name__}: {error}"
