"""The map of uncommitted bytes, against a plain array."""

from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dfs.client import writebuffer
from dfs.client.store import Prepared
from dfs.client.writebuffer import Upload, WriteBuffer

steps = st.lists(
    st.tuples(st.sampled_from("wwwwwwcgpsf"), st.integers(0, 60), st.integers(0, 40)), max_size=40
)


def check(buffer, model):
    """The buffer holds what the model, offset -> (byte, ...), holds."""
    held, end = {}, 0
    for s in buffer:
        assert s.start >= end
        end = s.end
        assert s.start // writebuffer.WINDOW == (s.end - 1) // writebuffer.WINDOW
        whole = b"".join(s.read(s.start, s.length))
        assert len(whole) == s.length > 0
        held.update({s.start + i: whole[i] for i in range(s.length)})
    assert held == {k: v[0] for k, v in model.items()}
    assert bool(buffer) == bool(model)
    assert len(buffer) == sum(1 for _ in buffer)
    assert buffer.size == len(model)
    assert buffer.end == max(model, default=-1) + 1
    loose = {}
    for s in buffer:
        if not isinstance(s.source, Upload):
            window = s.start // writebuffer.WINDOW
            loose[window] = loose.get(window, 0) + s.length
    assert buffer.loose == loose
    for start in range(0, 100, 7):
        found = [s for s in buffer if s.start < start + 9 and s.end > start]
        assert buffer.overlapping(start, start + 9) == found
    assert buffer.overlapping(5, 5) == []


def run(todo):
    buffer = WriteBuffer()
    model = {}  # offset -> (byte, the write it came with, how often it was gathered since)
    committed, then = [], {}
    for n, (what, start, length) in enumerate(todo):
        stop = start + length
        if what == "w":
            data = bytes((n + i) % 256 for i in range(length))
            buffer.write(start, data)
            model.update({start + i: (data[i], n, 0) for i in range(length)})
        elif what == "c":
            buffer.cut(start, stop)
            model = {k: v for k, v in model.items() if not start <= k < stop}
        elif what == "g" and buffer.overlapping(start, stop):  # all that a range touches
            within = buffer.overlapping(start, stop)
            pieces = [piece for s in within for piece in s.read(s.start, s.length)]
            offsets = [sum(s.length for s in within[:i]) for i in range(len(within))]
            upload = Upload(pieces)
            buffer.gather([(s.start, s.length) for s in within], upload, offsets)
            assert {id(s.source) for s in buffer.overlapping(start, stop)} == {id(upload)}
            for s in within:
                model.update({k: (*model[k][:2], n) for k in range(s.start, s.end)})
        elif what == "p":
            loose = [s for s in buffer if not isinstance(s.source, Upload)]
            uploads = buffer.pack()
            assert sum(upload.length for upload in uploads) == sum(s.length for s in loose)
            assert all(0 < upload.length <= writebuffer.WINDOW for upload in uploads)
            assert {id(u) for u in uploads} <= {id(s.source) for s in buffer}
            for s in loose:
                model.update({k: (*model[k][:2], n) for k in range(s.start, s.end)})
        elif what == "s":
            committed = list(buffer)[start % 3 :]
            then = {k: model[k] for s in committed for k in range(s.start, s.end)}
        elif what == "f":
            buffer.forget(committed)
            model = {k: v for k, v in model.items() if then.get(k) != v}
            committed, then = [], {}
        check(buffer, model)


@given(steps, st.sampled_from([16, 4 << 20]))
def test_it_holds_what_was_written_and_not_committed(todo, window):
    with mock.patch.object(writebuffer, "WINDOW", window):
        run(todo)


def later_without_places(segments, committed):
    """What was cut off a committed segment, or written over it, counts as committed, too."""
    gone = [(s.start, s.end) for s in committed]
    return [s for s in segments if not any(a <= s.start and s.end <= b for a, b in gone)]


def later_by_identity(segments, committed):
    """What is left of a committed segment counts as new."""
    return [s for s in segments if s not in committed]


@pytest.mark.parametrize("mutant", [later_without_places, later_by_identity])
def test_a_buffer_that_forgets_the_wrong_bytes_is_found(monkeypatch, mutant):
    monkeypatch.setattr(writebuffer, "_later", mutant)
    with pytest.raises(AssertionError):
        run([("w", 0, 30), ("s", 0, 0), ("w", 5, 3), ("f", 0, 0)])


def test_nothing_is_copied():
    buffer = WriteBuffer()
    pages = [bytes([i]) * 4096 for i in range(100)]
    for i, page in enumerate(pages):
        buffer.write(i * 10_000, page)
    (upload,) = buffer.pack()
    assert all(piece.obj is page for piece, page in zip(upload.pieces, pages, strict=True))
    whole = b"".join(pages)
    upload.exchange(Prepared(b"id", [whole], [whole]))
    assert len(upload.pieces) == 1
    check(buffer, {i * 10_000 + k: (i,) for i in range(100) for k in range(4096)})
