"""The oracle of the chaos harness sees what it has to see; and a short run of the whole."""

import subprocess
import sys
from pathlib import Path

import pytest
from chaosmodel import PAGE, Journal, Model

SCRIPT = Path(__file__).resolve().parent.parent / "bench" / "chaos.py"


def made(model, path, content, *, synced=False):
    model.make(path)
    model.ack()
    number = model.names[path]
    model.write(number, 0, content)
    model.flush(number)
    model.ack(synced=synced)
    return number


def test_names_are_lost_as_a_suffix():
    model = Model()
    made(model, "a", b"one", synced=True)
    made(model, "b", b"two")
    model.rename("b", "c")
    model.ack()
    made(model, "d", b"")
    good = [
        {"a": b"one"},
        {"a": b"one", "b": b""},
        {"a": b"one", "b": b"two"},
        {"a": b"one", "c": b"two"},
        {"a": b"one", "c": b"two", "d": b""},
    ]
    bad = [
        {},
        {"a": b"on"},
        {"a": b"one", "d": b""},  # what came before it is missing
        {"a": b"one", "c": b""},  # it was closed before it was renamed
        {"a": b"one", "b": b"two", "c": b"two"},
        {"a": b"one", "b": None},
    ]
    assert [model.differs_after_crash(found) for found in good] == [""] * len(good)
    assert all(model.differs_after_crash(found) for found in bad)
    assert model.differs_now(good[-1]) == ""
    assert all(model.differs_now(found) for found in [*good[:-1], *bad])


def test_with_another_mount_a_name_is_durable_when_the_operation_returns():
    model = Model(durable=True)
    number = made(model, "a", b"one")
    model.write(number, 3, b" more")  # not closed
    model.make("b")  # under way
    assert model.differs_after_crash({"a": b"one"}) == ""
    assert model.differs_after_crash({"a": b"one more", "b": b""}) == ""
    assert model.differs_after_crash({"a": b""}) != ""
    model.ack()
    assert model.differs_after_crash({"a": b"one"}) != ""


def test_a_write_is_torn_at_pages_only_and_before_it_is_synced():
    model = Model()
    number = made(model, "a", b"", synced=True)
    data = b"x" * PAGE + b"y" * 100
    model.write(number, 10, data)
    half = bytes(10) + data[: PAGE - 10]
    assert model.differs_after_crash({"a": half}) == ""
    assert model.differs_after_crash({"a": half[:-1]}) != ""
    assert model.differs_after_crash({"a": bytes(10) + data}) == ""
    model.flush(number)
    model.ack(synced=True)
    assert model.differs_after_crash({"a": half}) != ""


def test_a_truncation_cuts_what_is_committed_whatever_else_is():
    model = Model()
    number = made(model, "a", b"AAAA", synced=True)
    model.write(number, 0, b"BB")
    model.truncate(number, 3)
    model.ack()
    for found, fits in [
        (b"AAAA", True), (b"BBAA", True), (b"AAA", True), (b"BBA", True), (b"BB", False), (b"AA", False),
    ]:  # fmt: skip
        assert (model.differs_after_crash({"a": found}) == "") == fits, found
    model.ack(synced=True)
    assert model.differs_after_crash({"a": b"AAAA"}) != ""


def test_pages_of_what_is_not_synced_come_in_any_order():
    model = Model(pages=True)
    old, new = b"o" * 3 * PAGE, b"n" * 3 * PAGE
    number = made(model, "a", old, synced=True)
    model.write(number, 0, new)
    model.write(number, 3 * PAGE, new)
    model.ack()
    for found, fits in [
        (old, True), (old[:PAGE] + new[:PAGE] + old[:PAGE], True), (new + bytes(PAGE) + new[:PAGE], True),
        (old[:-1], False), (b"x" + old[1:], False), (bytes(PAGE) + new[PAGE:], False),
    ]:  # fmt: skip
        assert (model.differs_after_crash({"a": found}) == "") == fits, found[::PAGE]


def test_what_was_found_is_what_is_there_from_then_on():
    model = Model()
    made(model, "a", b"one", synced=True)
    made(model, "b", b"two")
    model.rebase({"a": b"one", "d": None})
    assert model.differs_now({"a": b"one", "d": None}) == ""
    assert model.differs_after_crash({"a": b"one"}) != ""
    model.rename("d", "e")
    made(model, "e/f", b"x")
    model.rename("e", "g")
    assert model.differs_now({"a": b"one", "g": None, "g/f": b"x"}) == ""


def test_a_journal_keeps_every_synced_record():
    journal = Journal()
    journal.write("j0", b"one")
    journal.ack("j0")
    journal.write("j0", b"two")
    for found, fits in [
        ({"j0": b"one"}, True), ({"j0": b"onetw"}, True), ({"j0": b"on"}, False), ({}, False),
        ({"j0": b"oneXX"}, False), ({"j0": b"onetwothree"}, False), ({"j0": b"one", "k": b""}, False),
    ]:  # fmt: skip
        assert (journal.differs_after_crash(found) == "") == fits, found
    assert journal.differs_now({"j0": b"onetwo"}) == ""
    assert journal.differs_now({"j0": b"one"}) != ""
    journal.remove("j0")
    assert journal.differs_after_crash({"j0": b"one"}) == journal.differs_after_crash({}) == ""


@pytest.mark.slow
@pytest.mark.mount
@pytest.mark.parametrize("mode", ["shared", "single", "exclusive"])
def test_nothing_is_lost_while_nodes_and_mounts_die(mode):
    command = [sys.executable, SCRIPT, "--mode", mode, "--seconds", "40", "--databases", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
