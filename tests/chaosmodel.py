"""What one worker's part of a file system may look like: now, and after its mount has died.

The worker is the only one that changes anything below its directory, one operation at a time.  It
says what it is about to do (`make`, `write`, ...), does it, and says so (`ack`).  The model keeps

- the present: what every read on a living mount must return, exactly;
- a line of *states* of the names since the last one that is known to be durable.  After a crash the
  names are as in one of them: operations on names are lost as a suffix;
- for each file its *versions*: what its content may be on stable storage.  A state knows the oldest
  version of each file that goes with it, a version the state that it came after: nothing that was
  done later is there while something earlier is missing.

A write of more than a page may reach the mount in several requests, so what is not synced may also
be cut at a page within such a write.  With `pages` the kernel sends pages when and in which order it
likes, so each page of what is not synced is as in any version.
"""

from dataclasses import dataclass, field

PAGE = 4096


def over(content, at, data):
    """Content with `data` written at an offset."""
    return content.ljust(at, b"\0")[:at] + data + content[at + len(data) :]


def resized(content, size):
    """Content cut or filled with zeros to a size."""
    return content[:size].ljust(size, b"\0")


@dataclass(slots=True)
class Version:
    content: bytes
    after: int  # the state that it came after
    write: tuple[bytes, int, bytes] | None = None  # (content before, offset, data) of a long write

    def allows(self, found):
        """Whether this may be what was found, some of its last write missing perhaps."""
        if found == self.content:
            return True
        if self.write is None:
            return False
        before, at, data = self.write
        edges = range(PAGE - at % PAGE, len(data), PAGE)
        return any(over(before, at, data[:cut]) == found for cut in edges)


NOTHING = Version(b"", 0)  # in the place of a version that is never looked at again


@dataclass(slots=True)
class File:
    versions: list[Version]
    floor: int = 0  # the oldest that may be found

    @property
    def content(self):
        return self.versions[-1].content


@dataclass(slots=True)
class State:
    """The names after an operation: path -> number of a file, or None for a directory."""

    names: dict[str, int | None]
    floors: dict[int, int] = field(default_factory=dict)
    what: str = ""


class Model:
    """`durable`: operations on names and closed files are so when they return; `pages`: see above."""

    def __init__(self, *, durable=False, pages=False):
        self.durable, self.pages = durable, pages
        self.files = {}
        self.states = [State({})]
        self.floor = 0  # index of the oldest state that may be found
        self._forgotten = 0
        self._number = 0

    @property
    def names(self):
        """What there is now: path -> number of a file, or None for a directory."""
        return self.states[-1].names

    def content(self, path):
        """What a file contains now."""
        return self.files[self.names[path]].content

    def _step(self, what, names=None, **floors):
        last = self.states[-1]
        floors = {int(k[1:]): v for k, v in floors.items()}
        self.states.append(
            State(last.names if names is None else names, last.floors | floors, what)
        )

    # -- what is about to be done

    def make(self, path, directory=False):
        """A file or directory is created."""
        number = None
        if not directory:
            number = self._number = self._number + 1
            self.files[number] = File([Version(b"", len(self.states))])
        self._step(f"make {path}", self.names | {path: number})

    def remove(self, path):
        """A file is unlinked or an empty directory removed."""
        self._step(f"remove {path}", {p: n for p, n in self.names.items() if p != path})

    def rename(self, path, new):
        """A file or directory with all that is in it gets another name."""
        moved = {
            new + p[len(path) :]: n
            for p, n in self.names.items()
            if p == path or p.startswith(path + "/")
        }
        left = {p: n for p, n in self.names.items() if p != path and not p.startswith(path + "/")}
        self._step(f"rename {path} {new}", left | moved)

    def write(self, number, at, data):
        """Something is written to a file."""
        file = self.files[number]
        before = file.content
        after = over(before, at, data) if data else before
        long = at // PAGE != (at + len(data) - 1) // PAGE
        partly = (before, at, data) if long and data else None
        file.versions.append(Version(after, len(self.states) - 1, partly))

    def truncate(self, number, size):
        """A file is cut: at once, whether or not what was written before is committed."""
        file = self.files[number]
        first = len(file.versions)
        state = len(self.states)
        cut = dict.fromkeys(resized(v.content, size) for v in file.versions[file.floor :])
        newest = resized(file.content, size)
        cut.pop(newest, None)
        file.versions += [Version(c, state) for c in (*cut, newest)]
        self._step(f"truncate {number} to {size}", **{f"f{number}": first})

    def flush(self, number):
        """A file is closed, or synced: what was written before goes with it."""
        file = self.files[number]
        newest = len(file.versions)
        file.versions.append(Version(file.content, len(self.states) - 1))  # all of its last write
        self._step(f"flush {number}", **{f"f{number}": newest})

    # -- what was done

    def ack(self, *, synced=False):
        """The operation has returned; `synced`: it was an fsync, of the file that was flushed."""
        if synced or self.durable:
            self.floor = len(self.states) - 1
            for number, floor in self.states[-1].floors.items():
                file = self.files.get(number)
                if file is None:  # it was removed since
                    continue
                for i in range(file.floor, floor):
                    file.versions[i] = NOTHING
                file.floor = max(file.floor, floor)
            self._forget()

    def _forget(self):
        held = {n for s in self.states[self.floor :] for n in s.names.values()}
        for number in [n for n in self.files if n not in held]:
            del self.files[number]
        for state in self.states[self._forgotten : self.floor]:
            state.names = state.floors = {}
        self._forgotten = self.floor

    # -- what is there

    def differs_now(self, found):
        """Why `found`, path -> content or None, is not what there is now; "" if it is."""
        if wrong := differing_names(self.names, found):
            return wrong
        for path, content in found.items():
            if content is not None and content != self.content(path):
                return f"{path}: {difference(content, self.content(path))}"
        return ""

    def differs_after_crash(self, found):
        """Why `found` cannot be what a crash has left; "" if it can."""
        reasons = []
        for at in range(len(self.states) - 1, self.floor - 1, -1):
            why = self._differs_from(at, found)
            if not why:
                return ""
            reasons.append(f"after {self.states[at].what!r}: {why}")
        return (
            f"none of {len(reasons)} states fits; the newest {reasons[0]}; the durable one"
            f" {reasons[-1]}" + (f"; one before the newest {reasons[1]}" if reasons[2:] else "")
        )

    def _differs_from(self, at, found):
        state = self.states[at]
        if wrong := differing_names(state.names, found):
            return wrong
        for path, content in found.items():
            if content is None:
                continue
            number = state.names[path]
            file = self.files[number]
            floor = max(file.floor, state.floors.get(number, 0))
            maybe = [v for v in file.versions[floor:] if v.after <= at]
            if not (self._mixed(maybe, content) if self.pages else allowed(maybe, content)):
                newest = difference(content, maybe[-1].content) if maybe else "no version"
                oldest = difference(content, maybe[0].content) if maybe else ""
                return f"{path}: none of {len(maybe)} versions; oldest: {oldest}; newest: {newest}"
        return ""

    def _mixed(self, maybe, found):
        if not maybe:
            return False
        longest = max(len(v.content) for v in maybe)
        if not min(len(v.content) for v in maybe) <= len(found) <= longest:
            return False
        for start in range(0, len(found), PAGE):
            page = found[start : start + PAGE]
            if not any(page) and start + PAGE > len(maybe[0].content):
                continue  # it was not there, and a later page was written
            if all(resized(v.content[start : start + PAGE], len(page)) != page for v in maybe):
                return False
        return True

    def rebase(self, found):
        """From now on `found` is what there is, durably."""
        self.files, names = {}, {}
        for path, content in found.items():
            names[path] = None
            if content is not None:
                number = names[path] = self._number = self._number + 1
                self.files[number] = File([Version(content, 0)])
        self.states, self.floor, self._forgotten = [State(names, what="rebase")], 0, 0


def allowed(versions, found):
    """Whether a content may be one of some versions."""
    return any(v.allows(found) for v in versions)


def difference(found, wanted):
    """Two contents compared, for people."""
    if found == wanted:
        return "equal"
    same = 0
    for start in range(0, min(len(found), len(wanted)), PAGE):
        if found[start : start + PAGE] != wanted[start : start + PAGE]:
            break
        same = start + PAGE
    pairs = zip(found[same : same + PAGE], wanted[same : same + PAGE], strict=False)
    first = next(
        (same + i for i, (a, b) in enumerate(pairs) if a != b), min(len(found), len(wanted))
    )
    zeros = " (zeros)" if found[first : first + 16] == bytes(len(found[first : first + 16])) else ""
    return f"{len(found)} bytes, wanted {len(wanted)}; first difference at {first}{zeros}"


def differing_names(names, found):
    """Why the paths and types found are not those of a state; "" if they are."""
    missing = sorted(names.keys() - found.keys())
    more = sorted(found.keys() - names.keys())
    if missing or more:
        return f"missing {missing}, not expected {more}"
    kinds = [p for p, n in names.items() if (n is None) != (found[p] is None)]
    return f"another type: {kinds}" if kinds else ""


class Journal:
    """What a database's journal may look like: files that grow at the end, synced record by record."""

    def __init__(self, *, pages=False):
        self.pages = pages
        self.written = {}  # name -> bytes
        self.synced = {}  # name -> how many of them are durable
        self.removed = {}  # what is removed, and perhaps not durably

    def write(self, name, data):
        """A record is appended; the file is made if it is not there."""
        self.written.setdefault(name, bytearray()).extend(data)

    def ack(self, name):
        """The file was synced."""
        self.synced[name] = len(self.written[name])
        self.removed.clear()

    def remove(self, name):
        """A file is removed."""
        self.removed[name] = self.written.pop(name)
        del self.synced[name]

    def differs_now(self, found):
        """As of `Model`."""
        if wrong := differing_names(dict.fromkeys(self.written, 0), found):
            return wrong
        wrong = [f"{p}: {difference(c, self.written[p])}" for p, c in found.items()]
        return next((w for w in wrong if not w.endswith("equal")), "")

    def differs_after_crash(self, found):
        """As of `Model`."""
        for name, size in self.synced.items():
            content = found.get(name, b"")
            if content[:size] != self.written[name][:size]:
                return f"{name}: {difference(content[:size], self.written[name][:size])}"
        for name, content in found.items():
            wanted = self.written.get(name, self.removed.get(name))
            if wanted is None:
                return f"{name} was never there"
            if len(content) > len(wanted) or (not self.pages and wanted[: len(content)] != content):
                return f"{name}, not synced: {difference(content, wanted)}"
        return ""

    def rebase(self, found):
        """As of `Model`."""
        self.written = {name: bytearray(content) for name, content in found.items()}
        self.synced = {name: len(content) for name, content in found.items()}
        self.removed = {}
