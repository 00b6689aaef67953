"""A POSIX file system as a plain data structure: what `FileSystem` must behave like.

Small and obvious on purpose: nodes in a dict tree, no times, no permissions.  Every method has the
name of the one of `dfs.client.filesystem.FileSystem` that it judges and raises `OSError` with the
errno that Linux gives.  Nodes stand for inodes; a test keeps the pairs.
"""

import errno
import os

DIR, REG, LNK, FIFO = 4, 8, 10, 1
NOREPLACE, EXCHANGE = 1, 2


def _fail(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class Node:
    """One inode."""

    def __init__(self, kind: int, mode: int, uid: int = 0, gid: int = 0) -> None:
        """Without a name yet."""
        self.kind = kind
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.names = 0
        self.data = bytearray()
        self.target = b""
        self.entries: dict[bytes, Node] = {}
        self.parent: Node | None = None
        self.removed = False  # a directory that was removed

    @property
    def nlink(self) -> int:
        """Link count as `stat` shows it."""
        if self.kind == DIR:
            return 2 + sum(n.kind == DIR for n in self.entries.values())
        return self.names

    @property
    def size(self) -> int:
        """Bytes of a file or target, number of entries of a directory."""
        if self.kind == DIR:
            return len(self.entries)
        return len(self.target) if self.kind == LNK else len(self.data)


class Oracle:
    """The tree, and the rules."""

    def __init__(self) -> None:
        """An empty root directory."""
        self.root = Node(DIR, 0o755)
        self.root.parent = self.root

    @staticmethod
    def _name(name: bytes) -> None:
        if len(name) > 255:
            raise _fail(errno.ENAMETOOLONG)

    @staticmethod
    def _dir(node: Node) -> None:
        if node.removed:
            raise _fail(errno.ENOENT)
        if node.kind != DIR:
            raise _fail(errno.ENOTDIR)

    def lookup(self, parent: Node, name: bytes) -> Node:
        """The node of a name."""
        self._name(name)
        self._dir(parent)
        if name not in parent.entries:
            raise _fail(errno.ENOENT)
        return parent.entries[name]

    def make(
        self, parent: Node, name: bytes, kind: int, mode: int, uid: int = 0, gid: int = 0
    ) -> Node:
        """create, mkdir, symlink, mknod."""
        self._name(name)
        self._dir(parent)
        if name in parent.entries:
            raise _fail(errno.EEXIST)
        if parent.mode & 0o2000:
            gid = parent.gid
            if kind == DIR:
                mode |= 0o2000
        node = Node(kind, mode, uid, gid)
        self._attach(parent, name, node)
        return node

    def _attach(self, parent: Node, name: bytes, node: Node) -> None:
        parent.entries[name] = node
        node.names += 1
        if node.kind == DIR:
            node.parent = parent

    def _detach(self, parent: Node, name: bytes) -> Node:
        node = parent.entries.pop(name)
        node.names -= 1
        return node

    def link(self, node: Node, parent: Node, name: bytes) -> Node:
        """One more name."""
        self._name(name)
        self._dir(parent)
        if name in parent.entries:
            raise _fail(errno.EEXIST)
        if node.kind == DIR:
            raise _fail(errno.ESTALE if node.removed else errno.EPERM)
        if node.names == 0:
            raise _fail(errno.ENOENT)
        self._attach(parent, name, node)
        return node

    def unlink(self, parent: Node, name: bytes) -> None:
        """One name less."""
        if self.lookup(parent, name).kind == DIR:
            raise _fail(errno.EISDIR)
        self._detach(parent, name)

    def rmdir(self, parent: Node, name: bytes) -> None:
        """Remove an empty directory."""
        node = self.lookup(parent, name)
        if node.kind != DIR:
            raise _fail(errno.ENOTDIR)
        if node.entries:
            raise _fail(errno.ENOTEMPTY)
        self._detach(parent, name).removed = True

    def _above(self, node: Node) -> list[Node]:
        found = [node]
        while node is not self.root and node.parent is not None:
            node = node.parent
            found.append(node)
        return found

    def rename(
        self, parent: Node, name: bytes, new_parent: Node, new_name: bytes, flags: int = 0
    ) -> None:
        """renameat2(2)."""
        self._name(name)
        self._name(new_name)
        self._dir(parent)
        self._dir(new_parent)
        source = self.lookup(parent, name)
        victim = new_parent.entries.get(new_name)
        if victim is not None and flags & NOREPLACE:
            raise _fail(errno.EEXIST)
        if victim is None and flags & EXCHANGE:
            raise _fail(errno.ENOENT)
        if source.kind == DIR and source in self._above(new_parent):
            raise _fail(errno.EINVAL)
        if victim is not None and victim.kind == DIR and victim in self._above(parent):
            raise _fail(errno.EINVAL if flags & EXCHANGE else errno.ENOTEMPTY)
        if victim is source:
            return
        if victim is not None and not flags & EXCHANGE:
            if source.kind == DIR and victim.kind != DIR:
                raise _fail(errno.ENOTDIR)
            if source.kind != DIR and victim.kind == DIR:
                raise _fail(errno.EISDIR)
            if victim.kind == DIR and victim.entries:
                raise _fail(errno.ENOTEMPTY)
            if self._detach(new_parent, new_name).kind == DIR:
                victim.removed = True
        self._detach(parent, name)
        if victim is not None and flags & EXCHANGE:
            self._detach(new_parent, new_name)
            self._attach(parent, name, victim)
        self._attach(new_parent, new_name, source)

    # ------------------------------------------------------------------ files

    @staticmethod
    def write(node: Node, offset: int, data: bytes) -> int:
        """pwrite(2)."""
        if data:
            if len(node.data) < offset:
                node.data += bytes(offset - len(node.data))
            node.data[offset : offset + len(data)] = data
            if node.mode & 0o010:
                node.mode &= ~0o2000
            node.mode &= ~0o4000
        return len(data)

    @staticmethod
    def read(node: Node, offset: int, length: int) -> bytes:
        """pread(2)."""
        return bytes(node.data[offset : offset + length])

    @staticmethod
    def truncate(node: Node, size: int) -> None:
        """truncate(2)."""
        if node.kind == DIR:
            raise _fail(errno.EISDIR)
        if node.kind != REG:
            raise _fail(errno.EINVAL)
        del node.data[size:]
        node.data += bytes(size - len(node.data))
        if node.mode & 0o010:
            node.mode &= ~0o2000
        node.mode &= ~0o4000

    @staticmethod
    def chown(node: Node, uid: int, gid: int) -> None:
        """chown(2)."""
        node.uid, node.gid = uid, gid
        if node.kind != DIR:
            if node.mode & 0o010:
                node.mode &= ~0o2000
            node.mode &= ~0o4000
