"""What the C library keeps of freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import ctypes.util
import functools
import sys
from typing import Any


def trim() -> None:
    """Freed memory stays with the C library, torn into pieces of past sizes, until it is trimmed; where that is glibc."""
    function = _malloc_trim()
    if function is not None:
        function(0)


@functools.cache
def _malloc_trim() -> Any:
    name = ctypes.util.find_library("c") if sys.platform == "linux" else None
    return getattr(ctypes.CDLL(name), "malloc_trim", None) if name else None  # musl has none
