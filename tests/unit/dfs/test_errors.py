"""Errors cross the wire as what they are."""

import errno

import pytest

from dfs.errors import DfsError, DiskFull, FsError, NotFound, from_wire, leaves, to_wire


def every(cls):
    return [cls, *(c for sub in cls.__subclasses__() for c in every(sub))]


def test_codes_are_unique():
    own = [c.code for c in every(DfsError) if "code" in vars(c) and c.__module__ == "dfs.errors"]
    assert len(own) == len(set(own))


@pytest.mark.parametrize("cls", [c for c in every(DfsError) if c.__module__ == "dfs.errors"])
def test_round_trip(cls):
    error = cls("what happened", errno.ENOENT, b"detail")
    back = from_wire(*to_wire(error))
    assert type(back) is cls
    assert str(back) == "what happened"
    assert back.details == (errno.ENOENT, b"detail")
    assert back.errno == error.errno


def test_a_local_subclass_travels_as_its_parent():
    class Special(NotFound):
        pass

    assert type(from_wire(*to_wire(Special("x")))) is NotFound
    assert type(from_wire(NotFound.code, "x", ())) is NotFound


def test_an_unexpected_exception_is_an_internal_error():
    code, text, details = to_wire(KeyError("k"))
    assert (code, details) == (DfsError.code, ())
    assert "KeyError" in text


def test_a_group_around_one_error_travels_as_that():
    lone = ExceptionGroup("nursery", [ExceptionGroup("inner", [NotFound("gone", b"x")])])
    back = from_wire(*to_wire(lone))
    assert (type(back), str(back), back.details) == (NotFound, "gone", (b"x",))
    code, text, _ = to_wire(ExceptionGroup("nursery", [NotFound("a"), DiskFull("b")]))
    assert code == DfsError.code
    assert "nursery" in text


def test_an_unknown_code_is_a_plain_error():
    assert type(from_wire(9999, "from the future", ())) is DfsError


def test_posix_errors_carry_their_errno():
    assert FsError("no", errno.EXDEV).errno == errno.EXDEV
    assert DiskFull("full").errno == errno.ENOSPC


def test_the_leaves_of_groups_are_in_order():
    a, b, c = NotFound("a"), KeyError("b"), DiskFull("c")
    assert list(leaves(ExceptionGroup("", [a, ExceptionGroup("", [b]), c]))) == [a, b, c]
    assert list(leaves(a)) == [a]
