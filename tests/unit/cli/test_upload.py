"""`dfs put` on a cluster in memory: what is copied when something here cannot be read."""

import os
import stat

import pytest

from dfs.cli.place import Place
from dfs.cli.upload import Upload
from dfs.errors import InvalidArgument
from dfs.ids import ROOT_INO
from tests.unit.client.support import filesystem, names, new_home, read_file

ROOT = Place("v", b"/", directory=True)


async def upload(fs, *sources, recursive=False):
    done = Upload(fs, fs.files._chunks, recursive=recursive, force=False)
    await done.run([os.fsencode(source) for source in sources], ROOT)
    return done


async def test_the_rest_is_copied_and_nothing_half(tmp_path, monkeypatch):
    """A file whose reading fails in the middle, one that is gone, a directory without rights."""
    tree = tmp_path / "tree"
    for name in ("a", "broken", "gone", "z"):
        (tree / name).mkdir(parents=True)
        (tree / name / "f").write_bytes(name.encode() * 100_000)
    broken, gone = os.fsencode(tree / "broken" / "f"), os.fsencode(tree / "gone" / "f")
    real_open, real_list = open, os.listdir

    class Broken:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def fileno(self):
            return self.file.fileno()

        def read(self, size):
            data = self.file.read(size)
            if self.file.tell() > 200_000:
                raise OSError(5, "Input/output error")
            return data

    def opened(path, *args, **kw):
        if path == gone:
            raise FileNotFoundError(2, "No such file or directory", path)
        file = real_open(path, *args, **kw)
        return Broken(file) if path == broken else file

    def listed(path):
        if path == os.fsencode(tree / "z"):
            raise PermissionError(13, "Permission denied", path)
        return real_list(path)

    monkeypatch.setattr("builtins.open", opened)
    monkeypatch.setattr("os.listdir", listed)
    async with filesystem(new_home()) as fs:
        done = await upload(fs, tree, recursive=True)
        assert sorted((e.filename, e.errno) for e in done.failed) == [
            (broken, 5),
            (gone, 2),
            (os.fsencode(tree / "z"), 13),
        ]
        assert done.files == 1
        root = await fs.lookup(ROOT_INO, b"tree")
        assert await names(fs, root.ino) == [b"a", b"broken", b"gone", b"z"]
        for name in (b"broken", b"gone", b"z"):
            assert await names(fs, (await fs.lookup(root.ino, name)).ino) == []
        a = await fs.lookup((await fs.lookup(root.ino, b"a")).ino, b"f")
        assert await read_file(fs, a.ino) == b"a" * 100_000


async def test_what_is_no_file_is_refused_when_named_and_skipped_when_found(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "f").write_text("x")
    async with filesystem(new_home()) as fs:
        with pytest.RaisesGroup(
            pytest.RaisesExc(InvalidArgument, match="fifo is a device, pipe or socket")
        ):
            await upload(fs, tmp_path / "fifo")
        assert await names(fs, ROOT_INO) == []
        done = await upload(fs, tmp_path, recursive=True)
        assert (done.files, done.failed) == (1, [])
        assert "fifo is no file or directory, skipped" in capsys.readouterr().err
    assert stat.S_ISFIFO(os.stat(tmp_path / "fifo").st_mode)
