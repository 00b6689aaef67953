"""Names: hard links, renames, symbolic links, special files, link counts, errors; against tmpfs."""

import ctypes
import os
import socket
import stat
import subprocess

import pytest

from tests.mount.differential import (
    EXCHANGE,
    NOREPLACE,
    WHITEOUT,
    call,
    content,
    create,
    renameat2,
    tree,
    user,
)

pytestmark = pytest.mark.mount
LONG = "n" * 255
DEEP = "d" * 200


def zoo():
    """One of everything, by name."""
    create("file", b"file")
    create("other", b"other")
    os.mkdir("dir")
    os.mkdir("empty")
    os.mkdir("full")
    create("full/x")
    os.symlink("file", "link")
    os.symlink("none", "dangling")
    os.symlink("dir", "dirlink")
    os.symlink("loop", "loop")
    os.mkfifo("fifo")
    os.mknod("sock", stat.S_IFSOCK | 0o600)
    os.mknod("null", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    return (
        "file",
        "other",
        "dir",
        "empty",
        "full",
        "link",
        "dangling",
        "dirlink",
        "loop",
        "fifo",
        "sock",
        "null",
    )


def opened(*args):
    os.close(os.open(*args))


WRONG = (
    "", ".", "..", "none", "none/x", "file/x", "file/.", "file/", "loop/x", "dangling/x", "empty/", "none/",
    "empty/.", "empty/..", "link/", "dirlink/", LONG, LONG + "n", f"{LONG}n/x", "x/" * 2100, "a" * 5000,
)  # fmt: skip


@pytest.mark.parametrize(
    "what",
    [
        "mkdir",
        "rmdir",
        "unlink",
        "mkfifo",
        "symlink",
        "stat",
        "open",
        "excl",
        "link",
        "chmod",
        "chdir",
    ],
)
def test_errors_of_every_kind_of_name(same, what):
    def script(s):
        os.mkdir("in")
        os.chdir("in")  # so that `..` is the same on both sides
        names = zoo()
        fn = {
            "mkdir": os.mkdir,
            "rmdir": os.rmdir,
            "unlink": os.unlink,
            "mkfifo": os.mkfifo,
            "symlink": lambda n: os.symlink("target", n),
            "stat": os.stat,
            "open": lambda n: opened(n, os.O_RDWR | os.O_NONBLOCK),
            "excl": lambda n: opened(n, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
            "link": lambda n: os.link("other", n),
            "chmod": lambda n: os.chmod(n, 0o700),
            "chdir": lambda n: os.close(os.open(n, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)),
        }[what]
        for name in names + WRONG:
            s.note(name[:30])
            s.do(fn, name)

    same(script)


def test_open_flags_on_every_kind_of_file(same):
    def script(s):
        names = zoo()
        for name in (*names, "none", "none/x"):
            for flags in (
                os.O_RDONLY | os.O_NOFOLLOW,
                os.O_RDONLY | os.O_DIRECTORY,
                os.O_WRONLY | os.O_TRUNC,
                os.O_WRONLY | os.O_CREAT,
                os.O_PATH,
                os.O_PATH | os.O_NOFOLLOW,
                os.O_RDONLY | os.O_CREAT | os.O_DIRECTORY,
            ):
                s.note(name, flags)
                s.do(opened, name, flags | os.O_NONBLOCK)

    same(script)


def test_every_rename(same):
    """Each kind of file over each kind, with and without flags, and every wrong name."""

    def script(s):
        os.mkdir("in")
        os.chdir("in")
        kinds = zoo()
        os.chdir("..")
        for flags in (0, NOREPLACE, EXCHANGE, NOREPLACE | EXCHANGE, 1 << 7):
            for i, a in enumerate(kinds):
                for j, b in enumerate((*kinds, "none")):
                    # with flags only some kinds: the rules do not tell the others apart
                    if flags and not {a, b} <= {"file", "full", "link", "none"}:
                        continue
                    d = f"{flags}-{i}-{j}"
                    os.mkdir(d)
                    os.chdir(d)
                    for name in {a, b} - {"none"}:
                        copy(name)
                    s.note(flags, a, b)
                    if flags:
                        s.do(renameat2, a, b, flags)
                    else:
                        s.do(os.rename, a, b)
                    os.chdir("..")

    def copy(name):
        if name in ("dir", "empty", "full"):
            os.mkdir(name)
            if name == "full":
                create("full/x")
        elif name in ("link", "dangling", "dirlink", "loop"):
            os.symlink(name, name)
        elif name == "fifo":
            os.mkfifo(name)
        elif name in ("sock", "null"):
            os.mknod(name, stat.S_IFSOCK | 0o600)
        else:
            create(name, name.encode())

    same(script)


CALLS = {
    "create": lambda p: opened(p, os.O_CREAT | os.O_WRONLY),
    "exclusive": lambda p: opened(p, os.O_CREAT | os.O_EXCL | os.O_WRONLY),
    "open": lambda p: opened(p, os.O_RDONLY),
    "nofollow": lambda p: opened(p, os.O_RDONLY | os.O_NOFOLLOW),
    "directory": lambda p: opened(p, os.O_DIRECTORY),
    "truncating": lambda p: opened(p, os.O_RDWR | os.O_TRUNC),
    "mkdir": os.mkdir,
    "mknod": lambda p: os.mknod(p, 0o100644),
    "symlink": lambda p: os.symlink("x", p),
    "link to": lambda p: os.link("f", p),
    "link": lambda p: os.link(p, "hard", follow_symlinks=False),
    "link followed": lambda p: os.link(p, "hard", follow_symlinks=True),
    "lstat": os.lstat,
    "stat": os.stat,
    "readlink": os.readlink,
    "truncate": lambda p: os.truncate(p, 0),
    "chmod": lambda p: os.chmod(p, 0o755),
    "lchown": lambda p: os.lchown(p, 0, 0),
    "utime": os.utime,
    "rmdir": os.rmdir,
    "unlink": os.unlink,
}


def test_slashes_at_the_end_and_links_to_nothing(same):
    """Every call with every kind of last component, with `/`, `//` and `/.` behind it."""

    def kinds():
        os.mkdir("d")
        create("f")
        for name, target in (
            ("ld", "d"), ("lf", "f"), ("dangling", "none"), ("ld/", "d/"), ("lf/", "f/"), ("dangling/", "none/"),
        ):  # fmt: skip
            os.symlink(target, name.replace("/", "slash"))

    def script(s):
        kinds()
        before = set(os.listdir("."))
        for kind in (*sorted(before), "new"):
            for ending in ("", "/", "//", "/."):
                for name, fn in CALLS.items():
                    s.note(kind + ending, name)
                    s.do(fn, kind + ending)
                    if set(os.listdir(".")) != before:
                        s.note(tree())
                        for entry in list(os.scandir(".")):
                            remove = os.rmdir if entry.is_dir(follow_symlinks=False) else os.unlink
                            remove(entry.name)
                        kinds()

    same(script)


def back(old, new):
    """Undo a rename, if it took place."""
    if not os.path.lexists(new) and os.path.lexists(old):
        os.rename(old, new)


def test_rename_with_wrong_names(same):
    def script(s):
        zoo()
        os.mkdir("dir/sub")
        create("dir/sub/f")
        for name in WRONG:
            s.note(name[:30])
            s.do(os.rename, "file", name)
            back(name, "file")
            s.do(os.rename, name, "new")
            back("new", name)
            s.do(renameat2, name, "other", EXCHANGE)
            s.do(renameat2, "other", name, EXCHANGE)
            s.do(renameat2, "file", name, NOREPLACE)
            back(name, "file")
            s.do(os.rename, "dir", name)
            back(name, "dir")
        for a, b in (
            ("dir", "dir/sub/x"), ("dir", "dir/sub"), ("dir/sub", "dir"), ("dir/sub/f", "dir/sub"), ("dir", "dir"),
            ("dir/sub", "dir/new"), ("empty", "full"), ("full", "empty"), ("file", "file"),
        ):  # fmt: skip
            s.note(a, b)
            for flags in (0, NOREPLACE, EXCHANGE):
                s.do(renameat2, a, b, flags)

    same(script)


def test_rename_between_directories_and_link_counts(same):
    def script(s):
        for d in "abc":
            os.mkdir(d)
        os.mkdir("a/x")
        os.mkdir("a/y")
        create("b/f", b"f")
        os.mkdir("b/z")
        steps = (
            (os.rename, "a/x", "b/x"),
            (os.rename, "b/f", "a/f"),
            (renameat2, "b/x", "a/f", EXCHANGE),
            (renameat2, "b/f", "a/f", EXCHANGE),
            (os.rename, "b/z", "a/y"),
            (os.rename, "a", "c/a"),
            (os.link, "b/x", "c/hard"),
            (os.rename, "b/x", "c/hard"),
            (os.rename, "c/hard", "b/x"),
            (os.rmdir, "c/a/y"),
            (os.rmdir, "c/a"),
            (os.unlink, "b"),
            (os.rmdir, "c/a/f"),
        )
        for step in steps:
            s.do(*step)
            s.note(
                tuple(
                    (d, os.stat(d).st_nlink)
                    for d in (".", "a", "b", "c", "c/a")
                    if os.path.isdir(d)
                )
            )

    same(script)


def test_dot_dot_follows_a_moved_directory(same):
    def script(s):
        os.makedirs("a/b/c")
        os.mkdir("z")
        fd = os.open("a/b/c", os.O_RDONLY)
        os.rename("a/b", "z/b")
        s.note(os.path.samestat(os.stat("..", dir_fd=fd), os.stat("z/b")))
        s.note(os.path.samestat(os.stat("../..", dir_fd=fd), os.stat("z")))
        os.close(fd)

    same(script)


def test_hard_links(same):
    def script(s):
        zoo()
        for name in ("file", "link", "fifo", "sock", "null"):
            os.link(name, f"{name}2", follow_symlinks=False)
            s.look(name, f"{name}2")
            s.note(os.path.samestat(os.lstat(name), os.lstat(f"{name}2")))
        s.do(os.link, "dir", "dir2")
        s.do(os.link, "file", "file2")
        s.do(os.link, "none", "n")
        s.do(os.link, "file", "none/n")
        os.link("link", "followed", follow_symlinks=True)
        s.look("followed", "file")
        with open("file2", "ab") as f:
            f.write(b"more")
        s.do(content, "followed")
        os.chmod("file", 0o600)
        s.look("file2")
        for name in ("file", "followed"):
            os.unlink(name)
            s.look("file2")
        fd = os.open("file2", os.O_RDONLY)
        os.unlink("file2")
        s.do(os.fstat, fd)
        s.do(os.link, f"/proc/self/fd/{fd}", "again", follow_symlinks=True)
        os.close(fd)
        with user(4001):
            s.do(os.link, "other", "/proc/none")

    same(script)


def test_a_file_may_have_many_links(mnt):
    create(mnt / "f")
    assert os.pathconf(mnt / "f", "PC_LINK_MAX") >= 127  # what the C library thinks of unknown ones
    for i in range(100):
        os.link(mnt / "f", mnt / f"l{i}")
    assert os.stat(mnt / "f").st_nlink == 101
    # EMLINK comes at 65,000, as on ext4: tests/unit/client/test_links.py, it takes long here
    os.unlink(mnt / "f")
    for i in range(99):
        os.unlink(mnt / f"l{i}")
    assert os.stat(mnt / "l99").st_nlink == 1


def test_symlinks_up_to_path_max(same):
    def script(s):
        for length in (1, 254, 255, 256, 1000, 4094, 4095, 4096, 5000):
            target = ("t/" * length)[:length]
            s.do(os.symlink, target, f"l{length}")
            if os.path.lexists(f"l{length}"):
                s.note(os.readlink(f"l{length}") == target)
                s.note(os.lstat(f"l{length}").st_size)
        s.do(os.symlink, "", "empty")
        raw = bytes(range(1, 256))
        os.symlink(raw, b"raw")
        s.note(os.readlink(b"raw") == raw)
        for i in range(45):  # more than 40 in a row are a loop
            os.symlink(f"c{i + 1}", f"c{i}")
        create("c45", b"end")
        s.do(content, "c4")
        s.do(content, "c5")
        s.do(content, "c6")
        s.do(os.chmod, "raw", 0o600)

    same(script)


def test_names_of_255_arbitrary_bytes(same):
    def script(s):
        ordinary = bytes(x for x in range(1, 256) if x != ord("/"))
        names = [
            ordinary,
            b"\xff" * 255,
            b"\xc3" * 255,
            b" " * 255,
            b"\n",
            b"-",
            b"\\",
            b"...",
            b"~",
            b"\x7f",
        ]
        names += [bytes([x]) for x in range(1, 256) if x not in b"./"]
        for name in dict.fromkeys(names):
            os.mkdir(name) if len(name) % 2 else create(name, name)
        s.note(sorted(os.listdir(b".")) == sorted(set(names)))
        s.note(content(ordinary) == ordinary if len(ordinary) % 2 == 0 else os.path.isdir(ordinary))
        s.do(os.mkdir, b"\xff" * 256)
        s.do(os.rename, names[1], b"\xfe" * 255)
        s.do(os.stat, b"\xfe" * 255)
        s.do(os.stat, b"\xfe" * 256)

    same(script)


def test_a_path_as_deep_as_path_max(same):
    def script(s):
        top = os.open(".", os.O_RDONLY)
        for _ in range(30):  # 30 * 201 bytes: deeper than any path can say
            os.mkdir(DEEP)
            os.chdir(DEEP)
        create("bottom", b"deep")
        s.do(content, "bottom")
        os.fchdir(top)
        s.do(os.stat, "/".join([DEEP] * 20))
        s.do(os.stat, "/".join([DEEP] * 21))
        os.chdir("/".join([DEEP] * 20))
        os.chdir("/".join([DEEP] * 10))
        os.unlink("bottom")
        for _ in range(30):
            os.chdir("..")
            os.rmdir(DEEP)
        os.fchdir(top)
        os.close(top)

    same(script)


def test_renames_in_directories_deeper_than_any_path(same):
    """tests/unit/client/test_filesystem.py goes deeper."""

    def script(s):
        top = os.open(".", os.O_RDONLY)
        for _ in range(1000):
            os.mkdir("d")
            os.chdir("d")
        os.mkdir("x")
        create("f")
        s.do(os.rename, "x", "y")
        os.mkdir("z")
        s.do(os.rename, "z", "y/z")
        s.do(renameat2, "y", "f", EXCHANGE)
        s.do(os.rename, "f", "f/z/f")
        s.note(tree())
        os.fchdir(top)
        s.do(os.rename, "d/d/d", "up")
        os.rename("up", "d/d/d")
        os.close(top)
        subprocess.run(["rm", "-r", "d"], check=True)

    same(script)


def test_special_files(same):
    def script(s):
        os.mkfifo("fifo", 0o640)
        for number in (os.makedev(1, 3), os.makedev(259, 65_537), os.makedev(4095, 1_048_575)):
            os.mknod(f"c{number}", stat.S_IFCHR | 0o600, number)
            os.mknod(f"b{number}", stat.S_IFBLK | 0o600, number)
            s.look(f"c{number}", f"b{number}")
        s.do(os.mknod, "dir", stat.S_IFDIR | 0o755)
        s.do(os.mknod, "lnk", stat.S_IFLNK | 0o755)
        s.do(os.mknod, "none", 0o600)
        s.do(os.mknod, "bad", 0o170000 | 0o755)
        s.look("fifo", "none")
        reader = os.open("fifo", os.O_RDONLY | os.O_NONBLOCK)
        writer = os.open("fifo", os.O_WRONLY)
        os.write(writer, b"through")
        s.do(os.read, reader, 100)
        os.close(reader)
        os.close(writer)
        s.do(opened, "fifo", os.O_WRONLY | os.O_NONBLOCK)  # nobody reads
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            server.bind("sock")
            s.look("sock")
            server.listen()
            client.connect("sock")
            client.sendall(b"hi")
            with server.accept()[0] as got:
                s.note(got.recv(10))
        s.do(opened, "sock", os.O_RDONLY)
        os.rename("fifo", "fifo2")
        os.unlink("fifo2")

    same(script)


def test_link_counts_of_directories(same):
    def script(s):
        def counts():
            s.note(os.stat(".").st_nlink, os.stat("d").st_nlink if os.path.isdir("d") else None)

        os.mkdir("d")
        counts()
        for i in range(5):
            os.mkdir(f"d/{i}")
            create(f"d/f{i}")
            counts()
        os.rename("d/0", "up")
        counts()
        os.rename("d/1", "d/2")
        counts()
        os.rmdir("d/3")
        counts()
        os.rename("d/f0", "d/f1")
        counts()
        fd = os.open("up", os.O_RDONLY)
        os.rmdir("up")
        s.do(os.fstat, fd)
        s.do(os.listdir, fd)
        s.do(os.open, "new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)
        s.do(os.mkdir, "new", dir_fd=fd)
        os.close(fd)
        os.mkdir("old")
        fd = os.open("old", os.O_PATH)
        os.rename("d/2", "old")
        s.do(os.fstat, fd)
        os.close(fd)
        os.mkdir("here")
        os.chdir("here")
        os.rmdir("../here")
        s.look(".")
        s.do(os.listdir, ".")
        fd = os.open(".", os.O_RDONLY)
        for fn in (os.fsync, os.fdatasync, os.fstat, os.listdir):
            s.do(fn, fd)
        os.close(fd)
        s.do(create, "x")
        os.chdir("/")

    same(script)


def test_renameat2_whiteout_and_unknown_flags_are_refused(mnt):
    create(mnt / "f")
    for flags in (WHITEOUT, 8):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is compared
            renameat2(str(mnt / "f"), str(mnt / "g"), flags)
        assert caught.value.errno == 22
    assert ctypes.get_errno() >= 0
    assert call("access", str(mnt / "f"), os.F_OK) == 0
