"""Entries for another process: read as often as it likes, gone afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest

from dfs.errors import Corrupt
from metadata.spool import Spooled, spool

ENTRIES = [b"one", b"", bytes(100_000), b"four"]
READ = (
    "import sys; from metadata.spool import Spooled; print([len(e) for e in Spooled(sys.argv[1])])"
)


def test_another_process_reads_them_in_order_and_again():
    with spool(iter(ENTRIES)) as path:
        spooled = Spooled(path)
        assert [*spooled] == [*spooled] == ENTRIES
        first, second = iter(spooled), iter(spooled)
        assert (next(first), next(second), next(first)) == (b"one", b"one", b"")
        root = Path(__file__).parents[3]
        done = subprocess.run(
            [sys.executable, "-c", READ, path], cwd=root, capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["[3,", "0,", "100000,", "4]"]
    assert not Path(path).exists()
    with pytest.raises(FileNotFoundError):
        next(iter(spooled))
    with spool([]) as path:
        assert [*Spooled(path)] == []


@pytest.mark.parametrize("missing", [1, 4, 6])
def test_what_is_cut_off_is_refused(tmp_path, missing):
    with spool([b"one", b"four"]) as path:
        data = Path(path).read_bytes()
    cut = tmp_path / "cut"
    cut.write_bytes(data[:-missing])
    entries = iter(Spooled(str(cut)))
    assert next(entries) == b"one"
    with pytest.raises(Corrupt, match="cut off"):
        next(entries)
