"""Schedules that random search seldom finds: the replica stays right, a broken one goes wrong."""

import pytest

from dfs.errors import InvalidArgument, NoQuorum, NotHome
from dfs.testing.journal_cores import genesis, operation
from dfs.testing.journal_mutants import replica_class
from dfs.volume import entries
from metadata.journal import PROBES
from metadata.journalacceptor import (
    ACCEPT,
    ACK,
    ALARM,
    ANNOUNCE,
    CHOSEN,
    CONFIRMED,
    FILL,
    NEED,
    OUTCOME,
    PERSIST,
    PREPARE,
    PROMISE,
    REPLY,
    RESET,
    SEND,
)
from metadata.journalstate import ENTRY, NO_HASH, replay

LATE = 1e9


class Bench:
    """Replicas whose messages wait in `net` until the test delivers them."""

    def __init__(self, count, members, mutant=None, tail_bytes=1 << 20):
        first = [(ENTRY, 1, (0, 0), NO_HASH, genesis(members), True)]
        self.records = [list(first) if i in members else [] for i in range(count)]
        self.mutant = mutant
        self.tail_bytes = tail_bytes
        self.net = []
        self.results = {}
        self.resets = []
        self.history = [{1: genesis(members)} if i in members else {} for i in range(count)]
        self.replicas = [self.make(i) for i in range(count)]
        self.tickets = 0
        self.now = 0.0
        self.hold_own = set()  # nodes whose disk is slow: their own votes wait in `net`

    def make(self, i):
        return replica_class(self.mutant)(
            i,
            replay(self.records[i]),
            fetch=lambda seq: self.fetch(i, seq),
            jitter=lambda: 0.5,
            tail_bytes=self.tail_bytes,
        )

    def fetch(self, i, seq):
        return next(r[3:5] for r in reversed(self.records[i]) if r[0] == ENTRY and r[1] == seq)

    def run(self, i, effects):
        for effect in effects:
            kind = effect[0]
            if kind in (SEND, REPLY):
                to, message = effect[1:]
                if to == i and i not in self.hold_own:
                    self.run(i, self.replicas[i].handle(i, message, self.now))
                else:
                    self.net.append((to, i, message))
            elif kind == PERSIST:
                self.records[i].append(effect[1])
            elif kind == CHOSEN:
                self.history[i][effect[1]] = effect[2]
            elif kind == RESET:
                self.resets.append((i, effect[1]))
            elif kind == OUTCOME:
                self.results[effect[1]] = effect[2]
            else:
                assert kind == ALARM
                raise AssertionError(effect[1])

    def do(self, i, verb, *args, until=LATE):
        self.tickets += 1
        call = getattr(self.replicas[i], verb)
        self.run(i, call(self.tickets, *args, until, self.now))
        return self.tickets

    def own(self, i):
        return self.do(i, "acquire")

    def propose(self, i, payload):
        return self.do(i, "propose", payload)

    def go(self, among, kinds=range(1, 12), rounds=20):
        """Deliver messages of these kinds between these nodes; the others stay in `net`."""
        for _ in range(rounds):
            net, self.net = self.net, []
            for to, sender, message in net:
                if to in among and sender in among and message[0] in kinds:
                    self.run(to, self.replicas[to].handle(sender, message, self.now))
                else:
                    self.net.append((to, sender, message))

    def take(self, kind):
        """Take the messages of a kind out of `net`."""
        found = [m for m in self.net if m[2][0] == kind]
        self.net = [m for m in self.net if m[2][0] != kind]
        return found

    def agree(self):
        for a in self.history:
            for b in self.history:
                for seq in a.keys() & b.keys():
                    assert a[seq] == b[seq], f"agreement at seq {seq}"
        for r in self.replicas:
            assert r.chosen == max(self.history[r.me], default=0), "chosen and delivered differ"


def config(version, *members):
    return entries.encode(entries.CONFIG, 0, version, members)


def disturbed(mutant, kinds):
    """An entry waits behind a config; another's entry comes before the new members promise."""
    b = Bench(4, (0, 1, 2), mutant)
    b.own(0)
    b.go({0, 1, 2})
    b.propose(0, config(2, 0, 1, 3))
    waiting = b.propose(0, operation(1))
    b.replicas[0].seen = (9, 0)  # so that its next ballot is the higher one
    b.go({0, 1}, (ACCEPT, ACK), rounds=2)
    assert b.replicas[0].members == (0, 1, 3)
    held, b.net = b.net, []  # that ballot is on its way
    b.own(1)
    b.go({1, 2})
    b.go({1, 3})
    b.propose(1, operation(2))
    b.go({1, 3}, kinds)
    assert b.replicas[1].chosen >= 2
    assert b.replicas[3].pending or b.replicas[3].chosen == 3
    b.net += held
    b.go({0, 3})
    b.go({0, 1, 3})
    b.agree()
    assert isinstance(b.results.get(waiting), NotHome)


def disturbed_by_chosen(mutant):
    disturbed(mutant, range(1, 12))


def disturbed_by_accepted(mutant):
    disturbed(mutant, (ACCEPT, NEED, FILL))


def replace(mutant):
    """The old proposer's ballot is high, the fresh members start low."""
    b = Bench(5, (0, 1, 2), mutant)
    b.replicas[0].seen = (5, 0)
    b.own(0)
    b.go({0, 1, 2}, (PREPARE, PROMISE))
    b.propose(0, config(2, 0, 3, 4))
    b.go({0, 1, 2})
    b.go({0, 3, 4}, (ANNOUNCE, NEED, FILL))
    b.own(3)
    b.go({3, 4})
    y = b.propose(3, operation(1))
    b.go({3, 4})
    assert b.results[y] == 3, "y is chosen by 3 and 4"
    b.own(0)
    b.propose(0, operation(2))
    b.go({0, 4})
    b.agree()


def takeover(mutant):
    """The acks of seq 2 reach node 0 after it accepted seq 3 of a higher ballot."""
    b = Bench(3, (0, 1, 2), mutant)
    b.own(0)
    b.go({0, 1, 2})
    b.propose(0, operation(1))
    b.go({0, 1, 2}, (ACCEPT,))
    late = b.take(ACK)
    assert late
    b.own(1)
    b.go({1, 2})  # finds the entry of 0, chooses it, then is told of nothing by 0
    b.net = []
    b.propose(1, operation(2))
    b.net = [m for m in b.net if m[0] == 0]
    b.go({0, 1})
    b.net += late
    b.go({0, 1, 2})
    b.own(2)
    b.propose(2, operation(4))
    b.go({0, 2})
    b.agree()


def atonce(mutant):
    """A config must not be chosen by the members it names."""
    b = Bench(5, (0, 1, 2), mutant)
    b.own(0)
    b.go({0, 1, 2})
    b.propose(0, config(2, 0, 3))
    b.go({0, 3}, (ACCEPT, ACK, NEED, FILL))
    b.net = []
    b.own(1)
    b.go({1, 2})
    b.propose(1, operation(1))
    b.go({1, 2})
    b.agree()


def amnesia(mutant):
    """Node 2 forgets that it accepted what 0 was told is chosen."""
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 2})
    b.net = []
    done = b.propose(0, operation(1))
    b.go({0, 2})
    assert b.results[done] == 2
    b.net = []
    if mutant == "vote":
        b.records[2] = []
        b.replicas[2] = b.make(2)
        b.history[2] = {}
        b.own(1)
        b.go({1, 2})
        b.propose(1, operation(2))
        b.go({1, 2})
    b.agree()


def ownack(mutant):
    """The proposer's vote is not durable when the entry is called chosen; then it crashes."""
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1})
    b.net = []
    if mutant is None:
        b.hold_own = {0}
    durable = list(b.records[0])
    done = b.propose(0, operation(1))
    b.go({0, 1}, (ACCEPT, ACK)) if mutant else b.go({1, 0}, (ACCEPT,))
    b.records[0] = durable
    if mutant is None:
        assert done not in b.results
    b.replicas[0] = b.make(0)
    b.net = []
    b.hold_own = set()
    b.own(2)
    b.go({0, 2})
    b.propose(2, operation(2))
    b.go({0, 2})
    history = [dict(h) for h in b.history]
    for h in history:
        for g in history:
            assert all(h[s] == g[s] for s in h.keys() & g.keys()), "agreement"


def forgetful(mutant):
    """Node 2 restarts between its promise to 1 and the accept of 0's older ballot."""
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1, 2})
    b.own(1)
    b.go({1, 2})
    b.net = []
    assert replay(b.records[2]).promised == (2, 1)
    if mutant == "forgetful":
        b.records[2] = [r for r in b.records[2] if r[0] == ENTRY]
    b.replicas[2] = b.make(2)
    b.propose(0, operation(1))
    b.go({0, 2})
    b.net = []
    b.propose(1, operation(2))
    b.go({1, 2})
    b.agree()


def confirm_round(mutant):
    """A confirm that began before a takeover says nothing to who asks after it."""
    b = Bench(3, (0, 1, 2), mutant)
    b.own(0)
    b.go({0, 1, 2})
    b.do(0, "confirm")
    b.go({0, 1, 2}, (10,))
    held = b.take(CONFIRMED)
    b.own(1)
    b.go({1, 2})
    acked = b.propose(1, operation(1))
    b.go({1, 2})
    assert b.results[acked] == 2
    b.net = []
    asked = b.do(0, "confirm")
    b.net += held
    b.go({0, 1, 2}, (CONFIRMED,))
    assert asked not in b.results, "confirmed by answers given before it was asked"
    b.go({0, 1, 2})
    assert isinstance(b.results[asked], NotHome)


def confirm_deposed(mutant):
    """Acceptors that promised a higher ballot do not confirm the old one."""
    b = Bench(3, (0, 1, 2), mutant)
    b.own(0)
    b.go({0, 1, 2})
    b.own(1)
    b.go({1, 2})
    b.net = []
    asked = b.do(0, "confirm")
    b.go({0, 2})
    assert isinstance(b.results[asked], NotHome), "a deposed owner was confirmed"


@pytest.mark.parametrize(
    ("schedule", "mutant"),
    [
        (replace, "noprep"),
        (takeover, "nostep"),
        (atonce, "atonce"),
        (amnesia, "vote"),
        (ownack, "ownack"),
        (forgetful, "forgetful"),
        (confirm_round, "staleconfirm"),
        (confirm_deposed, "yesman"),
        (confirm_deposed, "selfconfirm"),
        (disturbed_by_chosen, "undisturbed"),
        (disturbed_by_accepted, "undisturbed"),
    ],
)
def test_a_rule_holds_and_its_breach_is_seen(schedule, mutant):
    schedule(None)
    with pytest.raises(AssertionError):
        schedule(mutant)


def test_one_round_trip_per_entry_and_no_more_messages_than_needed():
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1, 2})
    for k in range(PROBES):  # after that few are asked: test_journal_few.py
        ticket = b.propose(0, operation(k))
        assert sorted(m[0] for m in b.net) == [1, 2]
        assert {m[2][0] for m in b.net} == {ACCEPT}
        b.go({0, 1, 2}, rounds=1)
        assert sorted((m[0], m[2][0]) for m in b.net) == [(0, ACK), (0, ACK)]
        b.go({0, 1, 2}, rounds=1)
        assert b.results[ticket] == k + 2
    assert not b.net
    b.agree()


def test_proposals_wait_in_line():
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1, 2})
    tickets = [b.propose(0, operation(k)) for k in range(4)]
    assert len(b.net) == 2, "only the first is sent"
    b.go({0, 1, 2})
    assert [b.results[t] for t in tickets] == [2, 3, 4, 5]


def test_followers_learn_the_last_entry_when_the_owner_is_idle():
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1, 2})
    b.propose(0, operation(1))
    b.go({0, 1, 2})
    assert [r.chosen for r in b.replicas] == [2, 1, 1]
    due = b.replicas[0].due()
    assert due == pytest.approx(0.2)
    b.now = due
    b.run(0, b.replicas[0].tick(due))
    b.go({0, 1, 2})
    assert [r.chosen for r in b.replicas] == [2, 2, 2]
    assert b.replicas[0].due() is None, "an informed, idle journal needs no timer"


def test_a_wait_ends_at_its_deadline_and_says_who_answered():
    b = Bench(3, (0, 1, 2))
    late = b.do(0, "acquire", until=1.0)
    b.run(0, b.replicas[0].tick(1.0))
    assert isinstance(b.results[late], NoQuorum)
    assert "nodes [0] did, nodes [1, 2] did not" in str(b.results[late])
    b.now = 2.0
    assert b.replicas[0].due() is None
    b.net = []
    b.own(0)
    b.go({0, 1})
    b.net = []
    lost, waiting = (b.do(0, "propose", operation(k), until=3.0) for k in range(2))
    confirm = b.do(0, "confirm", until=3.0)
    b.run(0, b.replicas[0].tick(3.0))
    for ticket in (lost, waiting, confirm):
        assert isinstance(b.results[ticket], NoQuorum)
    assert "accept entry 2" in str(b.results[lost])
    assert "confirm ballot" in str(b.results[confirm])


def test_an_entry_in_doubt_is_finished_by_its_owner_when_the_others_return():
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1, 2})
    doubt = b.do(0, "propose", operation(1), until=1.0)
    b.net = []
    b.now = 1.0
    b.run(0, b.replicas[0].tick(1.0))
    assert isinstance(b.results[doubt], NoQuorum)
    b.now = 3.0
    b.run(0, b.replicas[0].tick(3.0))
    b.go({0, 1, 2})
    assert b.history[0][2] == operation(1)
    after = b.propose(0, operation(2))
    b.go({0, 1, 2})
    b.agree()
    assert b.results[after] == 3


def test_a_lost_proposer_whose_entry_was_chosen_by_the_next_one_learns_it():
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1, 2})
    doubt = b.propose(0, operation(1))
    b.go({0, 1}, (ACCEPT,))
    b.net = []
    b.own(1)
    b.go({1, 2})
    b.net = [(0, 1, (ANNOUNCE, b.replicas[1].chosen, b.replicas[1].head))]
    b.go({0, 1, 2})
    assert b.results[doubt] == 2
    assert not b.replicas[0].owned


def test_who_is_no_member_names_the_members_and_tells_them():
    b = Bench(4, (0, 1, 2))
    b.own(0)
    b.go({0, 1, 2})
    done = b.propose(0, config(2, 1, 2, 3))
    b.go({0, 1, 2})
    assert b.results[done] == 2
    assert {(m[0], m[2][0]) for m in b.net} >= {(3, ANNOUNCE)}
    b.net = []
    moved = b.own(0)
    assert isinstance(b.results[moved], NotHome)
    assert b.results[moved].details == (1, 2, 3)
    b.go({0, 1, 2, 3})
    assert b.replicas[3].members == (1, 2, 3)
    b.own(3)
    b.go({1, 3})
    assert b.replicas[3].owned
    b.agree()


def test_a_config_out_of_turn_is_refused_and_ignored():
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1, 2})
    for payload in (config(1, 0), config(3, 0, 1), genesis((0, 1, 2))):
        ticket = b.propose(0, payload)
        assert isinstance(b.results[ticket], InvalidArgument)
    assert not b.net


def test_a_blank_replica_proposes_nothing_but_fills_itself():
    b = Bench(4, (0, 1, 2), tail_bytes=20)
    b.own(0)
    b.go({0, 1, 2})
    for k in range(30):
        b.propose(0, operation(k))
        b.go({0, 1, 2})
    refused = b.own(3)
    assert isinstance(b.results[refused], NotHome)
    assert b.do(3, "propose", operation(9)) in b.results
    b.net = [(3, 0, (ANNOUNCE, 31, b.replicas[0].head))]
    b.go({0, 3})
    assert b.replicas[3].chosen == 31
    assert b.replicas[3].head == b.replicas[0].head
    b.agree()


def test_who_is_behind_a_trimmed_journal_gets_its_base():
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1})
    for k in range(10):
        b.propose(0, operation(k))
        b.go({0, 1})
    b.net = []
    b.run(0, b.replicas[0].trim(8, 0.0))
    assert b.replicas[0].base[:1] == (8,)
    b.net = [(2, 0, (ANNOUNCE, 11, b.replicas[0].head))]
    b.go({0, 2})
    assert b.resets == [(2, 8)]
    assert b.replicas[2].chosen == 11
    assert b.replicas[2].base == b.replicas[0].base
    assert b.replicas[2].base.genesis == genesis((0, 1, 2))
    again = replay(b.records[2])
    assert (again.chosen, again.head) == (11, b.replicas[0].head)
    assert again.configs[-1][2] == (0, 1, 2)


def test_recovery_knows_what_was_promised_and_accepted():
    b = Bench(3, (0, 1, 2))
    b.own(0)
    b.go({0, 1, 2})
    b.propose(0, operation(1))
    b.go({0, 1, 2}, (ACCEPT,))
    state = replay(b.records[1])
    assert state.promised == (1, 0)
    assert state.chosen == 1
    assert state.pending.payload == operation(1)
    b.take(ACK)
    b.own(2)
    assert replay(b.records[2]).promised == (2, 2)


def test_a_malformed_history_raises_the_alarm():
    b = Bench(2, (0, 1))
    b.own(0)
    b.go({0, 1})
    b.net = [(1, 0, (FILL, None, 2, b"x" * 32, (operation(1),), 2))]
    with pytest.raises(AssertionError, match="another history"):
        b.go({0, 1})
    b.net = [(1, 0, (ACCEPT, (9, 0), 2, b"x" * 32, operation(1)))]
    with pytest.raises(AssertionError, match="another history"):
        b.go({0, 1})


def test_who_owns_nothing_proposes_and_confirms_nothing():
    b = Bench(3, (0, 1, 2))
    assert isinstance(b.results[b.propose(0, operation(1))], NotHome)
    assert isinstance(b.results[b.do(0, "confirm")], NotHome)
    assert not b.net
