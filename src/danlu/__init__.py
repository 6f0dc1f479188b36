"""danlu: from conversations to an aligned chat model on your own hardware."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

# PEFT imports bitsandbytes where it is installed, which then misses a kernel of the hub on CPUs, in every process, also where no
# weight is in its layout.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

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
