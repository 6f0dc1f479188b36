"""Which files a path means: a file, all data files of a folder, a glob, or a list of these."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from danlu.exceptions import DataError

SUFFIXES: Final = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".txt")
"""What data files of a folder end in, or these and `.gz`, or `.zip`."""

HUB: Final = "hf:"
"""What a data set of the Hugging Face hub begins with: `hf:owner/name[:split]`."""

_MAGIC: Final = re.compile(r"[*?\[]")


def is_hub(path: str | Path) -> bool:
    """Whether a path names a data set of the hub."""
    return isinstance(path, str) and path.startswith(HUB)


def suffix(name: str) -> str:
    """A file name's suffix in lower case, the one before `.gz` for compressed files."""
    return Path(name.lower().removesuffix(".gz")).suffix


def is_data_file(name: str) -> bool:
    """Whether a file of a folder or archive is taken for data."""
    return suffix(name) in SUFFIXES or suffix(name) == ".zip"


def find_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `read` reads for `path`, each once; `DataError` if something is not there."""
    if not isinstance(path, (str, Path)):
        if not path:
            raise DataError("no data file is given", hint="Name at least one file, folder or glob.")
        return list({found.resolve(): found for item in path for found in find_files(item)}.values())
    if str(path) == "":
        raise DataError("the path is empty", hint="Name a file, a folder or a glob.")
    if str(path).startswith("~/"):
        path = Path(path).expanduser()
    given = Path(path)
    try:
        if given.is_dir():
            own = len(given.parts)
            visible = (file for file in given.rglob("*") if not any(p.startswith(".") for p in file.parts[own:]))
            return _data_files(visible, given, "the folder")
        if given.exists():
            return [given]
        if _MAGIC.search(str(path)):
            return _data_files(_glob(given), given, "the glob")
    except (OSError, ValueError) as error:
        raise DataError(f"the path cannot be read: {error}", file=given) from error
    raise _missing(given)


def _glob(pattern: Path) -> Iterator[Path]:
    parts = pattern.parts
    first = next(i for i, part in enumerate(parts) if _MAGIC.search(part))
    return Path(*parts[:first]).glob(str(Path(*parts[first:])))


def _data_files(candidates: Iterator[Path], given: Path, what: str) -> list[Path]:
    found = sorted(file for file in candidates if is_data_file(file.name) and file.is_file())
    if not found:
        endings = ", ".join(SUFFIXES)
        raise DataError(
            f"{what} holds no data file", hint=f"Data files end in {endings}, those and .gz, or .zip.", file=given
        )
    return found


def _missing(path: Path) -> DataError:
    """The error for a path that is not there, with the nearest name beside the first part that is missing."""
    wanted, parent = path, path.parent
    while not parent.exists() and parent != parent.parent:
        wanted, parent = parent, parent.parent
    try:
        names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    except OSError:
        names = []
    near = difflib.get_close_matches(wanted.name, names, n=1)
    if near:
        hint = f"Did you mean '{parent / near[0]}'?"
    elif names:
        hint = f"'{parent}' holds: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
    else:
        hint = f"'{parent}' holds nothing that can be read."
    what = "the file does not exist" if wanted == path else f"the folder '{wanted}' does not exist"
    return DataError(what, hint=hint, file=path)
