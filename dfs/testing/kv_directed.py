"""What random schedules of registers meet too seldom, step by step, by the rule that it is about.

Each runs on the nodes of `dfs.testing.kv_cores` (`dfs.testing.kv_stage`), raises `ViolationError`
with the broken rule and ends well with the real ones.  Their assertions say that the schedule did
what it is meant to.
"""

from collections.abc import Callable

from dfs.testing.kv_stage import stage

Schedule = Callable[[str | None], None]

SWAP = 12  # chain: the homes 2, 0, 1 move to 5, 3, 4, and back
ONE = 0  # chain: of 2, 3, 4 the node 3 leaves, 0 comes; five nodes
FIVE = 5  # chain: N = 5 of seven nodes, homes 2, 3, 4, 0, 1


def stale_reader(mutant: str | None) -> None:
    """Phase 2 may not be left while R members of A would still answer readers of A."""
    with stage(SWAP, mutant) as s:
        assert s.ask(2, b"first")
        s.advance()
        s.tell(s.nodes)
        s.push((2, 0, 1))
        assert s.advance()
        s.tell((5, 3, 4))
        s.push((2, 0, 1))
        if s.advance():
            s.tell((5, 3, 4))
        s.ask(5, b"second")
        s.check_quorums(s.row)


def late_writer(mutant: str | None) -> None:
    """A coordinator with an old map writes to members of A that have pushed and are fenced."""
    with stage(SWAP, mutant) as s:
        s.advance()
        s.tell((0, 1, 5, 3, 4))
        s.push((0, 1))
        assert s.advance()
        s.tell((5, 3, 4))
        s.network.cut((2, n) for n in (5, 3, 4))
        s.ask(2, b"late", b"")
        s.check_quorums(s.row)


def too_few_fenced(mutant: str | None) -> None:
    """N - W + 1 members of A must have pushed: one of them has what W of A acknowledged."""
    with stage(SWAP, mutant) as s:
        s.away(1)
        assert s.ask(2, b"value")
        s.back()
        s.advance()
        s.tell((1, 5, 3, 4))
        s.push((1,))
        s.advance()
        s.check_quorums(s.row)


def too_few_pushed(mutant: str | None) -> None:
    """N - R + 1 members of B must have been pushed to: R of B meet one of them."""
    with stage(SWAP, mutant) as s:
        s.away(1)
        assert s.ask(2, b"value")
        s.back()
        s.advance()
        s.tell(s.nodes)
        s.away(5, 3)
        s.push((2, 0))
        s.back()
        s.advance()
        s.check_quorums(s.row)


def pushed_by_some_that_wait(mutant: str | None) -> None:
    """Homes that wait withhold old registers: what they push meanwhile is not all they have."""
    with stage(ONE, mutant) as s:
        s.away(4)
        assert s.ask(2, b"value")
        s.back()
        s.hours(25.5)
        for number in (2, 3):  # as if each had skipped a map in which it may have been no home
            process = s.process(number)
            process.enqueue(("o", process.pull_first.begin([s.partition])), lambda _: None)
        s.advance()
        s.tell(s.nodes)
        s.push(s.nodes)
        assert not s.advance()  # a broken rule has raised here
        for number in (2, 3):
            s.pull(number)
        s.push(s.nodes)
        assert s.advance()


def lost_and_regained(mutant: str | None) -> None:
    """A home that was none for a while, and lacks what it wrote before, is another actor."""
    with stage(SWAP, mutant) as s:
        assert s.ask(2, b"first", b"")
        s.move()
        s.process(2).discard()
        s.run_for()
        assert s.advance()
        s.tell(s.nodes)
        s.network.cut((n, 2) for n in (5, 3, 4))
        s.push((5, 3, 4))
        assert s.advance()
        s.tell(s.nodes)
        s.away(2)
        s.ask(2, b"second", b"")
        s.back()
        s.run_for()


def purged_while_away(mutant: str | None) -> None:
    """A home that did not hear of the delete must not be there when it is forgotten."""
    with stage(ONE, mutant) as s:
        assert s.ask(2, b"value")
        s.away(4)
        assert s.ask(2, None)
        s.forget(2)
        s.back()
        s.exchange(4, 2)
        s.check_quorums(s.row)


def purged_while_moving(mutant: str | None) -> None:
    """A member of A may still push what all of B has forgotten."""
    with stage(SWAP, mutant) as s:
        assert s.ask(2, b"value")
        s.advance()
        s.tell(s.nodes)
        s.away(1)
        assert s.ask(2, None)
        s.forget(5)
        s.back()
        s.push((1,))
        s.check_quorums(s.row)


def a_hint_too_late(mutant: str | None) -> None:
    """A hint that waits for a day is older than the tombstone."""
    with stage(ONE, mutant) as s:
        s.away(4)
        assert s.ask(2, b"value")
        s.back()
        s.exchange(4, 2)
        assert s.ask(2, None)
        s.forget(2)
        s.deliver_hints(0)
        s.deliver_hints(1)
        s.check_quorums(s.row)


def a_hint_on_its_way(mutant: str | None) -> None:
    """A hint that was sent in time and comes a day later."""
    with stage(ONE, mutant) as s:
        s.away(4)
        assert s.ask(2, b"value")
        s.back()
        with s.holding("hints.deliver"):
            for keeper in (0, 1):
                s.process(keeper).deliver_hints()
            s.run_for()
        s.exchange(4, 2)
        assert s.ask(2, None)
        s.forget(2)
        s.release()


def a_hint_at_a_new_home(mutant: str | None) -> None:
    """Who keeps a hint becomes a home: nobody else looks at the age of its own hints."""
    with stage(ONE, mutant) as s:
        s.away(1)
        s.network.cut(((2, 3), (4, 3)))
        assert s.ask(2, b"value")
        s.back()
        s.exchange(3, 2)
        assert s.ask(2, None)
        s.forget(2)
        s.move()
        s.deliver_hints(0)
        s.check_quorums(s.row)


def a_push_on_its_way(mutant: str | None) -> None:
    """A home sends what it has to one that has nothing; both learn of the old tombstone then."""
    with stage(FIVE, mutant) as s:
        s.away(1)
        assert s.ask(0, b"value")
        s.away(0)
        assert s.ask(2, None)
        s.hours(25.5)
        s.back()
        with s.holding("sync.push"):
            s.process(0).exchange(1)
            s.run_for()
        s.process(2).prepare(s.partition)
        s.run_for()
        s.process(2).purge()
        s.run_for()
        s.release()
        s.hours(4.5)
        s.process(2).purge()
        s.run_for()
        s.check_quorums(s.row)


def restored_young(mutant: str | None) -> None:
    """A restored node gives away what is younger than a day: that cannot have been purged."""
    with stage(ONE, mutant) as s:
        assert s.ask(2, b"value")
        s.back_up(4)
        assert s.ask(2, None)
        s.purge(2)
        s.restore(4)
        s.run_for()
        for _ in range(3):
            s.pull(4)
        s.exchange(4, 2)
        s.check_quorums(s.row)


def former_home(mutant: str | None) -> None:
    """A former home still has what its successors have deleted and forgotten."""
    with stage(SWAP, mutant) as s:
        assert s.ask(2, b"value")
        s.move()
        assert s.ask(5, None)
        s.forget(5)
        for old in (2, 0, 1):
            s.exchange(old, 5)
        s.check_quorums(s.row)


def home_again(mutant: str | None) -> None:
    """A home that comes back forgets its old registers."""
    with stage(ONE, mutant) as s:
        assert s.ask(2, b"value")
        s.move()
        assert s.ask(2, None)
        s.forget(2)
        s.move()
        s.check_quorums(s.row)


def several_homes_again(mutant: str | None) -> None:
    """All homes come back to their old registers at once, and nobody else is a home any more."""
    with stage(SWAP, mutant) as s:
        assert s.ask(2, b"value")
        s.move()
        assert s.ask(5, None)
        s.forget(5)
        s.move()
        s.check_quorums(s.row)


def home_again_to_a_new_value(mutant: str | None) -> None:
    """What was purged is written again before the former home is back with the old value."""
    with stage(ONE, mutant) as s:
        assert s.ask(4, b"value")
        s.move()
        assert s.ask(2, None)
        s.forget(2)
        assert s.advance()
        s.tell(s.nodes)
        assert s.ask(2, b"new value", b"")
        s.push((2, 4, 0))
        assert s.advance()
        s.tell(s.nodes)
        s.run_for(40.0)  # until the new value is no longer fresh
        s.exchange(3, 2)
        s.check_quorums(s.row)


def ghost_beside_a_new_value(mutant: str | None) -> None:
    """A restored home gets a new value before it has judged what it held: the row looks young."""
    with stage(ONE, mutant) as s:
        assert s.ask(2, b"value")
        s.back_up(4)
        assert s.ask(2, None)
        s.forget(2)
        s.restore(4)
        assert s.ask(3, b"new value", b"")  # another actor: it does not cover the old
        s.run_for(40.0)  # until the new value is no longer fresh
        s.exchange(3, 4)
        s.pull(4)
        s.exchange(4, 2)
        s.check_quorums(s.row)


def early_reader(mutant: str | None) -> None:
    """In phase 1 members of B may have nothing yet: they answer and coordinate no read."""
    with stage(SWAP, mutant) as s:
        assert s.ask(2, b"value")
        s.advance()
        s.tell(s.nodes)
        s.get(5)
        s.get(2)


def clock_set_back(mutant: str | None) -> None:
    """A node restarts with a clock an hour behind: what it writes then is later all the same."""
    with stage(ONE, mutant) as s:
        s.nodes[2].skew = 1800.0
        assert s.ask(2, b"first", b"")
        s.nodes[2].crash()
        s.nodes[2].skew = -1800.0
        s.nodes[2].start()
        s.ask(2, b"second", b"")
        s.check_quorums(s.row)


SCHEDULES: dict[str, Schedule] = {
    "readfence-1": stale_reader, "anyreport": stale_reader,
    "nofence": late_writer, "nowritefence": late_writer, "m3": late_writer,
    "pushwaiting": pushed_by_some_that_wait,
    "push-1": too_few_pushed, "fence-1": too_few_fenced,
    "readb": early_reader,
    "oldclock": clock_set_back,
    "sameactor": lost_and_regained,
    "purgeearly": purged_while_away, "notall": purged_while_away,
    "purgemoving": purged_while_moving,
    "oldhints": a_hint_too_late, "hintreceiver": a_hint_on_its_way,
    "hintsender": a_hint_at_a_new_home,
    "settle0": a_push_on_its_way, "nograce": a_push_on_its_way,
    "grace0": restored_young, "mixesold": ghost_beside_a_new_value, "expush": former_home,
    "keepsold": several_homes_again,
}  # fmt: skip
