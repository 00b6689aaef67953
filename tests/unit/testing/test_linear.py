"""The linearizability checker: right histories pass, wrong ones do not."""

from random import Random

import pytest

from dfs.testing.linear import (
    EXCHANGE,
    NOREPLACE,
    OK,
    UNKNOWN,
    Operation,
    apply,
    check,
    partitions,
)

A, B, C = b"a", b"b", b"c"


def op(client, what, result, called, returned, session=None, volatile=False):
    return Operation(client, what, result, called, returned, session, volatile)


def linear(*history):
    verdict = check(history)
    assert verdict.undecided == 0
    return not verdict.violations


CREATE_A = op("x", ("create", A, 1), OK, 0, 1)


def test_nothing_is_linear():
    assert linear()


RIGHT = {
    "in order": [CREATE_A, op("y", ("lookup", A), 1, 2, 3)],
    "a look that overlaps sees before or after": [
        op("x", ("create", A, 1), OK, 0, 10),
        op("y", ("lookup", A), "ENOENT", 1, 2),
        op("y", ("lookup", A), 1, 3, 4),
    ],
    "overlapping calls in the other order": [
        op("x", ("create", A, 1), OK, 0, 10),
        op("y", ("unlink", A), OK, 1, 9),
        op("x", ("lookup", A), "ENOENT", 11, 12),
    ],
    "one of two creates wins": [
        op("x", ("create", A, 1), "EEXIST", 0, 10),
        op("y", ("create", A, 2), OK, 5, 15),
    ],
    "renamed over": [
        CREATE_A,
        op("x", ("create", B, 2), OK, 2, 3),
        op("x", ("rename", A, B, 0), OK, 4, 5),
        op("y", ("lookup", A), "ENOENT", 6, 7),
        op("y", ("lookup", B), 1, 6, 7),
    ],
    "unknown, and it happened late": [
        op("x", ("create", A, 1), UNKNOWN, 0, 1),
        op("y", ("lookup", A), "ENOENT", 2, 3),
        op("y", ("lookup", A), 1, 4, 5),
    ],
    "unknown, and it never happened": [
        op("x", ("create", A, 1), UNKNOWN, 0, 1),
        op("y", ("create", A, 2), OK, 2, 3),
        op("y", ("lookup", A), 2, 4, 5),
    ],
    "a lost suffix": [
        op("x", ("create", A, 1), OK, 0, 1, "s"),
        op("x", ("create", B, 2), OK, 2, 3, "s", True),
        op("x", ("rename", B, C, 0), OK, 4, 5, "s", True),
        op("x", ("lookup", C), 2, 6, 7, "s", True),
        op("y", ("lookup", A), 1, 8, 9),
        op("y", ("lookup", B), 2, 8, 9),
        op("y", ("lookup", C), "ENOENT", 8, 9),
    ],
    "volatile, and not lost": [
        op("x", ("create", A, 1), OK, 0, 1, "s", True),
        op("y", ("lookup", A), 1, 2, 3),
    ],
}
WRONG = {
    "a stale look": [CREATE_A, op("y", ("lookup", A), "ENOENT", 2, 3)],
    "a look back in time": [
        op("x", ("create", A, 1), OK, 0, 10),
        op("y", ("lookup", A), 1, 1, 2),
        op("y", ("lookup", A), "ENOENT", 3, 4),
    ],
    "two winners": [CREATE_A, op("y", ("create", A, 2), OK, 0, 1)],
    "nobody wins": [op("x", ("create", A, 1), "EEXIST", 0, 1)],
    "what nobody made": [op("x", ("lookup", A), 7, 0, 1)],
    "removed and seen again": [
        CREATE_A,
        op("x", ("unlink", A), OK, 2, 3),
        op("y", ("lookup", A), 1, 4, 5),
    ],
    "removed twice": [
        CREATE_A,
        op("x", ("unlink", A), OK, 2, 6),
        op("y", ("unlink", A), OK, 2, 6),
    ],
    "the wrong errno": [
        op("x", ("mkdir", A, 1), OK, 0, 1),
        op("y", ("unlink", A), "ENOENT", 2, 3),
    ],
    "half a rename": [
        CREATE_A,
        op("x", ("rename", A, B, 0), OK, 2, 3),
        op("y", ("lookup", A), 1, 4, 5),
        op("y", ("lookup", B), 1, 4, 5),
    ],
    "both names between": [
        CREATE_A,
        op("x", ("rename", A, B, 0), OK, 2, 9),
        op("y", ("lookup", B), 1, 3, 4),
        op("y", ("lookup", A), 1, 5, 6),
    ],
    "unknown happens once": [
        op("x", ("create", A, 1), UNKNOWN, 0, 1),
        op("y", ("unlink", A), OK, 2, 3),
        op("y", ("lookup", A), 1, 4, 5),
    ],
    "unknown happens not before its call": [
        op("y", ("lookup", A), 1, 0, 1),
        op("x", ("create", A, 1), UNKNOWN, 2, 3),
    ],
    "durable and lost": [
        op("x", ("create", A, 1), OK, 0, 1, "s"),
        op("y", ("lookup", A), "ENOENT", 2, 3),
    ],
    "lost is not a suffix": [
        op("x", ("create", A, 1), OK, 0, 1, "s", True),
        op("x", ("rename", A, B, 0), OK, 2, 3, "s", True),
        op("x", ("create", C, 2), OK, 4, 5, "s", True),
        op("x", ("rename", C, A, NOREPLACE), OK, 6, 7, "s", True),
        op("y", ("lookup", B), "ENOENT", 8, 9),
        op("y", ("lookup", A), 2, 8, 9),
    ],
    "a look after others went on, lost or not": [
        op("x", ("create", A, 1), OK, 0, 1, "s", True),
        op("y", ("create", A, 2), OK, 2, 3),
        op("x", ("lookup", A), 1, 4, 5, "s", True),
    ],
    "lost, and not possible one after the other": [
        op("x", ("create", A, 1), OK, 0, 1, "s", True),
        op("x", ("create", A, 3), OK, 2, 3, "s", True),
        op("y", ("lookup", A), "ENOENT", 4, 5),
    ],
    "seen by another, then lost": [
        op("x", ("create", A, 1), OK, 0, 1, "s", True),
        op("y", ("lookup", A), 1, 2, 3),
        op("y", ("lookup", A), "ENOENT", 4, 5),
    ],
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_histories_pass(name):
    assert linear(*RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_wrong_histories_are_refused(name):
    assert not linear(*WRONG[name])
    assert "none of these fits" in check(WRONG[name]).violations[0]


@pytest.mark.parametrize(
    ("state", "what", "result"),
    [
        ((), ("rename", A, B, 0), "ENOENT"),
        (((A, (1, 0)),), ("rename", A, B, EXCHANGE), "ENOENT"),
        (((A, (1, 0)),), ("rename", A, A, 0), OK),
        (((A, (1, 0)),), ("rename", A, A, NOREPLACE), "EEXIST"),
        (((A, (1, 0)), (B, (2, 1))), ("rename", A, B, 0), "EISDIR"),
        (((A, (1, 0)), (B, (2, 1))), ("rename", B, A, 0), "ENOTDIR"),
        (((A, (1, 0)), (B, (2, 1))), ("rename", A, B, NOREPLACE), "EEXIST"),
        (((A, (1, 0)),), ("rmdir", A), "ENOTDIR"),
        (((A, (1, 1)),), ("unlink", A), "EISDIR"),
        (((A, (1, 1)),), ("mkdir", A, 2), "EEXIST"),
    ],
)
def test_the_rules_of_names(state, what, result):
    after, got = apply(state, what)
    assert got == result
    assert after == state


def test_exchange():
    state = ((A, (1, 0)), (B, (2, 1)))
    assert apply(state, ("rename", A, B, EXCHANGE)) == (((A, (2, 1)), (B, (1, 0))), OK)


def test_an_unknown_kind_is_said():
    with pytest.raises(ValueError, match="chmod"):
        apply(((A, (1, 0)),), ("chmod", A))


def test_names_are_partitioned_by_renames():
    history = [
        op("x", ("create", A, 1), OK, 0, 1),
        op("x", ("create", B, 2), OK, 2, 3),
        op("x", ("create", C, 3), OK, 4, 5),
        op("x", ("rename", A, C, 0), OK, 6, 7),
    ]
    assert sorted(len(p) for p in partitions(history)) == [1, 3]


def test_a_search_that_is_too_long_is_undecided():
    many = [op(f"c{i}", ("create", b"%d" % i, i), UNKNOWN, 0, 1) for i in range(8)]
    many += [op(f"r{i}", ("rename", b"%d" % i, b"0", 0), UNKNOWN, 0, 1) for i in range(1, 8)]
    impossible = op("y", ("lookup", b"0"), 99, 2, 3)
    verdict = check([*many, impossible], limit=50)
    assert (verdict.undecided, verdict.violations) == (1, ())


def play(random, *, stale):
    """Clients on one sequential name space, each operation at one moment between call and return.

    With `stale`, looks are answered from an older state now and then.
    """
    state, old, now, history, token = (), (), 0.0, [], 0
    names = [b"%d" % i for i in range(3)]
    busy = {f"c{i}": 0.0 for i in range(3)}
    told_wrong = False
    for _ in range(40):
        now += random.uniform(0, 0.6)
        client = random.choice([c for c, until in busy.items() if until <= now] or ["late"])
        if client == "late":
            continue
        token += 1
        name, other = random.choice(names), random.choice(names)
        what = random.choice(
            [
                ("create", name, token),
                ("mkdir", name, token),
                ("unlink", name),
                ("rmdir", name),
                ("lookup", name),
                ("rename", name, other, random.choice((0, NOREPLACE, EXCHANGE))),
            ]
        )
        after, result = apply(state, what)
        if stale and what[0] == "lookup" and apply(old, what)[1] != result:
            result = apply(old, what)[1]
            told_wrong = True
        if after != state:
            old, state = state, after
        called, returned = now - random.uniform(0, 0.2), now + random.uniform(0, 0.5)
        busy[client] = returned
        history.append(op(client, what, result, max(called, 0), returned))
    return history, told_wrong


@pytest.mark.parametrize("seed", range(30))
def test_what_one_name_space_did_is_linear(seed):
    history, _ = play(Random(seed), stale=False)
    assert linear(*history)


def test_stale_looks_are_found():
    played = [play(Random(seed), stale=True) for seed in range(60)]
    wrong = [history for history, told_wrong in played if told_wrong]
    refused = sum(not linear(*history) for history in wrong)
    assert len(wrong) > 20
    assert refused > len(wrong) * 0.5  # the others overlap what they do not see
