"""The same operations on a mount and on tmpfs: whatever programs can tell apart is a difference.

A script is a function of one `Side`.  It runs twice, each time in an empty directory as the working
directory, and notes what it sees: results, errnos, attributes, which times an operation changed.  In
the end the trees are compared too.  So the expectation is Linux, not somebody's memory of it.
"""

import contextlib
import ctypes
import errno
import hashlib
import os
import stat
import time

TICK = 0.012  # seconds: longer than a tick of the kernel's clock for file times, on any kernel
_libc = ctypes.CDLL(None, use_errno=True)
AT_FDCWD = -100
NOREPLACE, EXCHANGE, WHITEOUT = 1, 2, 4


@contextlib.contextmanager
def user(uid, gid=None, groups=()):
    """Act as somebody else than root for the length of the block; only effective ids change."""
    old = os.getgroups()
    os.setgroups(groups)
    os.setegid(uid if gid is None else gid)
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(old)


@contextlib.contextmanager
def umask(mask):
    """Another umask for the length of the block."""
    old = os.umask(mask)
    try:
        yield
    finally:
        os.umask(old)


def call(name, *args):
    """A function of the C library that Python does not have; raises OSError."""
    got = getattr(_libc, name)(*(os.fsencode(a) if isinstance(a, str) else a for a in args))
    if got == -1:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return got


def renameat2(old, new, flags):
    """rename with flags."""
    call("renameat2", AT_FDCWD, old, AT_FDCWD, new, flags)


def create(name, content=b"", mode=0o644):
    """A new file of exactly that mode."""
    fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode)
    try:
        os.write(fd, content)
        os.fchmod(fd, mode)
    finally:
        os.close(fd)


def content(name):
    """All of a file."""
    with open(name, "rb") as f:
        return f.read()


def errno_of(fn, *args):
    """What a call fails with; 0 = it does not."""
    try:
        fn(*args)
    except OSError as e:
        return e.errno
    return 0


def put(name, data, flags=0):
    """Open for writing with more flags, write, close."""
    fd = os.open(name, os.O_WRONLY | flags)
    try:
        return os.write(fd, data)
    finally:
        os.close(fd)


def attributes(s):
    """What two file systems must agree on: all but numbers of inodes, times and directory sizes."""
    size = s.st_size if not stat.S_ISDIR(s.st_mode) else None
    rdev = s.st_rdev if stat.S_ISCHR(s.st_mode) or stat.S_ISBLK(s.st_mode) else None
    return oct(s.st_mode), s.st_nlink, s.st_uid, s.st_gid, size, rdev


def tree(top="."):
    """Everything below a directory: path -> attributes and content."""
    found = {}
    for entry in os.scandir(top):
        s = entry.stat(follow_symlinks=False)
        told = [attributes(s)]
        if stat.S_ISLNK(s.st_mode):
            told.append(os.readlink(entry.path))
        elif stat.S_ISREG(s.st_mode) and s.st_size < 1 << 24:
            told.append(hashlib.sha256(content(entry.path)).hexdigest())
        found[entry.path] = told
        if stat.S_ISDIR(s.st_mode):
            found |= tree(entry.path)
    return found


class Side:
    """One of the two file systems, and what was noted on it."""

    def __init__(self):
        self.notes = []

    def note(self, what, *value):
        """Note anything that must be equal on both sides."""
        self.notes.append((what, *value))

    def do(self, fn, *args, **kw):
        """Call; note the result or the errno; returns the result, None after an error."""
        label = f"{getattr(fn, '__name__', fn)}{tuple(short(a) for a in args)}{kw or ''}"
        try:
            got = fn(*args, **kw)
        except OSError as e:
            self.notes.append((label, errno.errorcode[e.errno]))
            return None
        told = attributes(got) if isinstance(got, os.stat_result) else got
        self.notes.append((label, "ok", told))
        return got

    def look(self, *paths):
        """Note the attributes of files, links not followed."""
        for path in paths:
            self.do(os.lstat, path)

    def changes(self, fn, *args, watch=(".",), **kw):
        """Call, and note which times of the watched files it changed: some of "amc" each.

        `watch` holds paths, or descriptors where a path would not do.
        """
        before = [times(w) for w in watch]
        time.sleep(TICK)
        got = self.do(fn, *args, **kw)
        for w, old in zip(watch, before, strict=True):
            new = times(w)
            changed = "".join(x for x in "amc" if old is None or new is None or old[x] != new[x])
            if new is not None and old is not None and new["ino"] == old["ino"]:
                assert all(new[x] >= old[x] for x in changed), (fn, w, old, new)
            self.notes.append(("changed", w if isinstance(w, str) else "fd", changed))
        return got

    def fd(self, *args):
        """Open as `os.open`; an error is noted as a result would be, and raised."""
        return os.open(*args)


def times(path):
    """Times of a file by letter, None if it is not there."""
    try:
        s = os.stat(path) if isinstance(path, int) else os.lstat(path)
    except FileNotFoundError:
        return None
    return {"ino": s.st_ino, "a": s.st_atime_ns, "m": s.st_mtime_ns, "c": s.st_ctime_ns}


def short(value):
    if type(value) is int and value > 2:
        return "n"  # perhaps a descriptor, which differs
    text = repr(value)
    return text if len(text) < 60 else f"{text[:40]}...{len(text)}"


def compare(script, mine, reference):
    """Run the script in both directories, which are empty, and compare what it noted."""
    home = os.getcwd()
    told = []
    for where in (reference, mine):
        side = Side()
        os.chdir(where)
        try:
            with umask(0o022):
                script(side)
            os.chdir(where)
            side.note("tree", tree())
        finally:
            os.chdir(home)
        told.append(side.notes)
    theirs, ours = told
    for i, (want, got) in enumerate(zip(theirs, ours, strict=False)):
        assert got == want, f"step {i}: {got}, where Linux has {want}; before it {ours[:i][-3:]}"
    assert len(ours) == len(theirs)
