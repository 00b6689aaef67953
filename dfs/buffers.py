"""Large buffers that are about to be filled: not cleared first, and aligned where disks need it."""

import ctypes
from collections.abc import Callable

PAGE = 4096

_new: Callable[[None, int], bytearray] = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_char_p, ctypes.c_ssize_t
)(("PyByteArray_FromStringAndSize", ctypes.pythonapi))
_address = ctypes.c_char.from_buffer


def allocate(size: int) -> bytearray:
    """A bytearray of `size` bytes of whatever was there; the caller overwrites all of it.

    `bytearray(size)` clears the memory, which for a megabyte takes as long as hashing a third of
    it.  The C interface leaves the bytes alone when it is given none to copy.
    """
    return _new(None, size)


def allocate_aligned(size: int) -> memoryview:
    """The same at an address that is a multiple of a page, as O_DIRECT wants it."""
    raw = allocate(size + PAGE)
    start = -ctypes.addressof(_address(raw)) % PAGE
    return memoryview(raw)[start : start + size]
