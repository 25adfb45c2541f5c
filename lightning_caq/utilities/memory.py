"""Memory: what was freed goes back to the system."""

from __future__ import annotations

import ctypes
import sys


def release_memory() -> None:
    """Hand freed memory back to the system.

    The GNU allocator keeps what a thread has freed for that thread alone. A forward pass in each of eight threads, one
    after the other, then holds eight times what one of them needs. Other allocators do not, and nothing happens there.

    Example:
        >>> release_memory()
    """
    if _trim is not None:
        _trim(0)


_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
