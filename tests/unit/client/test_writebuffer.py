"""The map of uncommitted bytes, against a plain array."""

from hypothesis import given
from hypothesis import strategies as st

from dfs.client.writebuffer import Upload, WriteBuffer

steps = st.lists(
    st.tuples(st.sampled_from("wwwwcgf"), st.integers(0, 60), st.integers(0, 20)), max_size=40
)


@given(steps)
def test_it_holds_what_was_written_and_not_committed(todo):
    buffer, model = WriteBuffer(), {}
    n = 0
    for what, start, length in todo:
        if what == "w":
            n += 1
            data = bytes((n + i) % 256 for i in range(length))
            buffer.write(start, data)
            model.update({start + i: data[i] for i in range(length)})
        elif what == "c":
            buffer.cut(start, start + length)
            model = {k: v for k, v in model.items() if not start <= k < start + length}
        elif what == "g" and buffer:  # gather everything in one upload
            parts = [(s.start, s.length) for s in buffer]
            upload = Upload([piece for s in buffer for piece in s.read(s.start, s.length)])
            offsets = [sum(length for _, length in parts[:i]) for i in range(len(parts))]
            buffer.gather(parts, upload, offsets)
            assert len({id(s.source) for s in buffer}) <= 1
        elif what == "f":
            committed = list(buffer)[: start % 5]
            buffer.forget(committed)
            for s in committed:
                model = {k: v for k, v in model.items() if not s.start <= k < s.end}
        held = {}
        for s in buffer:
            whole = b"".join(s.read(s.start, s.length))
            assert len(whole) == s.length > 0
            held.update({s.start + i: whole[i] for i in range(s.length)})
        assert held == model
        assert buffer.size == len(model)
        assert sum(buffer.loose.values()) == sum(
            s.length for s in buffer if not isinstance(s.source, Upload)
        )
        assert buffer.end == max(model, default=-1) + 1
