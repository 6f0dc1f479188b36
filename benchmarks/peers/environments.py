"""One virtual environment per peer, with every version pinned: `python -m benchmarks peers`.

They stand outside the repository: $DANLU_BENCH_PEERS, or `danlu/peers` in the user's cache folder. A finished one is made again
only when its list of versions changes. torch comes first and alone (TORCH_INDEX names another index, such as that of the CPU
builds); all else is installed without dependencies, so that nothing can bring another torch, torchvision or torchaudio.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

NAMES = ("trl", "trl-ppo", "llamafactory")
HERE = Path(__file__).parent


def root() -> Path:
    """The folder of all peers' environments."""
    given = os.environ.get("DANLU_BENCH_PEERS")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else cache / "danlu" / "peers"


def python(name: str) -> Path | None:
    """A peer's Python, if its environment was made from today's list of versions."""
    folder = root() / name
    stamp = folder / "installed"
    made = stamp.is_file() and stamp.read_text("utf-8") == _digest(name)
    return folder / "bin" / "python" if made else None


def make(name: str) -> Path:
    """Makes a peer's environment if it is not there, and returns its Python."""
    found = python(name)
    if found is not None:
        return found
    folder = root() / name
    print(f"{name}: installing into {folder}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    pins = (HERE / f"{name}.txt").read_text("utf-8").split()
    index = os.environ.get("TORCH_INDEX")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = [pin for pin in pins if pin.startswith("torch==")]
    subprocess.run([*install, *(["--index-url", index] if index else []), *torch], check=True)
    subprocess.run([*install, "--no-deps", *(pin for pin in pins if pin not in torch)], check=True)
    (folder / "installed").write_text(_digest(name), "utf-8")
    return folder / "bin" / "python"


def make_all() -> None:
    """Makes what is missing."""
    for name in NAMES:
        print(make(name))


def _digest(name: str) -> str:
    return hashlib.sha256((HERE / f"{name}.txt").read_bytes()).hexdigest()
