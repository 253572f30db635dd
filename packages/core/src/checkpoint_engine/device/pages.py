"""What the kernel is told about pages of host memory; other threads run meanwhile, unlike with `mmap.madvise`."""

from __future__ import annotations

import ctypes
import mmap

REMOVE = 9
HUGE = mmap.MADV_HUGEPAGE
TOUCH_TO_READ = 22
TOUCH_TO_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.madvise.restype = ctypes.c_int


def advise(address: int, nbytes: int, advice: int) -> int:
    """Gives advice about whole pages; returns the number of the error, 0 if the kernel takes it."""
    return ctypes.get_errno() if _libc.madvise(address, nbytes, advice) else 0
