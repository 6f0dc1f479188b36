"""danlu: from conversations to an aligned chat model on your own hardware."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

# PEFT imports bitsandbytes where it is installed, which then misses a kernel of the hub on CPUs, in every process, also where no
# weight is in its layout.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# MKL multiplies few rows by other kernels than many, and splits sums among threads where that pays, so that a row's bits would
# depend on what else is in the batch. Its strict mode has one way for all, from 16 rows on as fast. MKL reads this at its first
# product: a process that multiplies before it imports danlu goes without.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from danlu.assistant import load


def __getattr__(name: str) -> Any:
    """`danlu.load` imports torch and transformers only when it is first used."""
    if name == "load":
        from danlu.assistant import load

        return load
    raise AttributeError(f"module 'danlu' has no attribute '{name}'")
