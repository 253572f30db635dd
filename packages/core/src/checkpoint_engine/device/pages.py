"""Mappings of shared memory, and what the kernel is told about their pages. Other threads run meanwhile."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Any

__all__ = [
    "COLLAPSE",
    "HUGE",
    "HUGE_PAGE",
    "REMOVE",
    "TOUCH_TO_READ",
    "TOUCH_TO_WRITE",
    "advise",
    "map_read_only",
    "map_shared",
    "unmap",
]

HUGE_PAGE = 2 << 20
"""Bytes."""

# Advice; what `mmap` has no name for, or only in newer versions of Python.
REMOVE = 9
HUGE = mmap.MADV_HUGEPAGE
TOUCH_TO_READ = 22
TOUCH_TO_WRITE = 23
COLLAPSE = 25
"""Makes huge pages of what is there and of holes, whatever the administrator has chosen short of `deny` (Linux 6.1)."""

_FIXED = 0x10  # MAP_FIXED
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mmap.restype = ctypes.c_void_p
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.munmap.restype = ctypes.c_int


def advise(address: int, nbytes: int, advice: int) -> int:
    """Gives advice about whole pages; returns the number of the error, 0 if the kernel takes it."""
    return ctypes.get_errno() if _libc.madvise(address, nbytes, advice) else 0


def map_shared(descriptor: int, nbytes: int, start: int = 0) -> Any:  # noqa: ANN401 - ctypes makes a type for each size
    """Maps a part of a file for reading and writing; it stays mapped as long as anything refers to the result.

    Huge pages of the file are mapped as such: the address is at the same distance from one as the place in the file.

    Args:
        descriptor: Of a file that has these bytes, and is not truncated meanwhile; it may be closed afterwards.
        nbytes: Above 0.
        start: A multiple of the page size.

    Raises:
        OSError: the kernel refuses.
    """
    reserved = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    begin = _map(None, reserved + HUGE_PAGE, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    address = begin + (start - begin) % HUGE_PAGE
    try:
        _map(address, nbytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, descriptor, start)
    except OSError:
        _libc.munmap(begin, reserved + HUGE_PAGE)
        raise
    for spare, end in ((begin, address), (address + reserved, begin + reserved + HUGE_PAGE)):
        if end > spare:
            _libc.munmap(spare, end - spare)
    memory = (ctypes.c_ubyte * nbytes).from_address(address)
    weakref.finalize(memory, _libc.munmap, address, nbytes).atexit = False  # others may still use it then
    return memory


def map_read_only(descriptor: int, nbytes: int, start: int = 0) -> int:
    """Maps a part of a file for reading, until `unmap`; returns the address.

    Raises:
        OSError: the kernel refuses.
    """
    return _map(None, nbytes, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, start)


def unmap(address: int, nbytes: int) -> None:
    """Takes `map_read_only` back."""
    _libc.munmap(address, nbytes)


def _map(address: int | None, nbytes: int, access: int, flags: int, descriptor: int, start: int) -> int:
    mapped = _libc.mmap(address, nbytes, access, flags, descriptor, start)
    if mapped in (None, _FAILED):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return mapped
