"""Token trees on disk: records that were encoded once are read back as memory-mapped arrays.

A cache entry is a folder named by a key. The key is a hash of all that decides the trees: the records, the encoding function
and its options, the tokenizer, the chat template, danlu's own code for it and the versions of the libraries. So an entry is
never stale; what changes has another key. Entries are made under a temporary name and renamed, carry the hashes of their
files, and are made again when these do not fit. The oldest go when the cache grows too large; all of it may be deleted at
any time.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import pickle
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from danlu.data.collate import Trees
from danlu.data.token_store import COLUMNS, Array, Columns, Gathering, StoredItems, TooManyMarks, to_columns
from danlu.data.token_workers import cores, in_parts
from danlu.types import Record

SCHEMA = 1
INDEX = "index.json"
PARTIAL = ".partial"
MARGINS = "margins"
_DTYPES = {**COLUMNS, MARGINS: "<f8"}
# Below this, encoding takes about a second, and finding out whether it was done before is not worth it.
SMALL_BYTES = 1 << 20
PART_BYTES = 1 << 18
# Children take about three seconds to import torch: they must have at least this much work to do (seconds of one core).
CHILDREN_FROM_SECONDS = 10.0
MOST_CHILDREN = 8
SIZE_VARIABLE = "DANLU_CACHE_GB"
DEFAULT_GB = 20.0
ABANDONED_SECONDS = 86_400


@dataclass(frozen=True)
class Encoder:
    """How records become trees.

    Args:
        function: one of `data/collate.py`; called with records, `text` and the options. It treats each record alone.
        text: the chat template, or the tokenizer for documents.
        options: what can be told apart by its `repr`.
    """

    function: Callable[..., Trees]
    text: Any
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, records: Sequence[Record]) -> Trees:
        return self.function(records, self.text, **self.options)


class OnPart(Protocol):
    """Called when a part has been encoded: parts done, parts in all, tokens in this one."""

    def __call__(self, done: int, total: int, tokens: int) -> None: ...


def tokenise(
    records: Sequence[Record],
    encoder: Encoder,
    *,
    folder: Path | None,
    processes: int | None = None,
    on_part: OnPart = lambda done, total, tokens: None,
) -> Trees:
    """The same trees as `encoder(records)`: from the cache, or encoded and put there. Small sets are only encoded.

    Args:
        folder: the cache; None: encode and keep nothing.
        processes: how many encode; None: as many as the work is worth.
        on_part: for a progress bar; not called when the trees come from the cache.

    Raises:
        DanluError: what `encoder` raises.
    """
    digest, sizes = _digest_records(records)
    if folder is None or sum(sizes) < SMALL_BYTES:
        return encoder(records)
    key = _key(digest, encoder)
    try:
        with _alone(folder, key):
            found = load(folder / key)
            if found is None:
                _build(folder, key, _parts(records, sizes), encoder, processes, on_part)
                found = load(folder / key)
    except TooManyMarks:
        found = None
    except OSError as error:
        warnings.warn(f"the tokens are not kept for the next time: {error}", stacklevel=2)
        found = None
    return found if found is not None else encoder(records)


# -- the key -------------------------------------------------------------------------------------------------------------


def _key(records: str, encoder: Encoder) -> str:
    function, text = encoder.function, encoder.text
    tokenizer = getattr(text, "tokenizer", text)
    template = {} if tokenizer is text else {k: v for k, v in sorted(vars(text).items()) if _is_plain(v)}
    parts: list[Any] = [
        [SCHEMA, _code(), *(metadata.version(n) for n in ("tokenizers", "transformers", "jinja2"))],
        [function.__module__, function.__qualname__, sorted((k, repr(v)) for k, v in encoder.options.items())],
        [type(text).__qualname__, tokenizer_digest(tokenizer), _settled(template)],
        # A template that writes the date renders something else tomorrow.
        date.today().isoformat() if "strftime_now" in f"{template} {getattr(tokenizer, 'chat_template', '')}" else "",
        records,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | bool | None | frozenset | set | tuple | list | dict)


def _settled(value: Any) -> Any:
    """JSON whose order does not depend on the process: that of a set of strings does."""
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    if isinstance(value, Mapping):
        return [[str(k), _settled(v)] for k, v in value.items()]
    return [_settled(v) for v in value] if isinstance(value, list | tuple) else repr(value)


def _digest_records(records: Sequence[Record]) -> tuple[str, list[int]]:
    """A hash of all that the records say, and the size of each as JSON."""
    digest, sizes = hashlib.sha256(), []
    for record in records:
        content = [getattr(record, f.name) for f in fields(record) if f.name != "origin"]
        line = json.dumps([type(record).__name__, *content], default=_as_json).encode()
        digest.update(line)
        digest.update(b"\n")
        sizes.append(len(line))
    return digest.hexdigest(), sizes


def _as_json(value: Any) -> Any:
    return dict(value) if isinstance(value, Mapping) else [type(value).__qualname__, pickle.dumps(value).hex()]


def tokenizer_digest(tokenizer: Any) -> str:
    """A hash of all that decides the ids of a text: of the tokenizer's state, not of where it was loaded from."""
    digest = hashlib.sha256(type(tokenizer).__qualname__.encode())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        state = json.loads(backend.to_str())
        # A call that does not ask for them turns these off, so the first text that is encoded would change the hash.
        state |= {"truncation": None, "padding": None}
        digest.update(json.dumps(state).encode())
    else:
        with tempfile.TemporaryDirectory() as folder:
            for file in sorted(Path(name) for name in tokenizer.save_pretrained(folder)):
                content = file.read_bytes()
                digest.update(file.name.encode())
                digest.update(_without_place(content) if file.name == "tokenizer_config.json" else content)
    added = sorted((i, repr(t)) for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items())
    special = sorted((k, str(v)) for k, v in getattr(tokenizer, "special_tokens_map", {}).items())
    digest.update(json.dumps([added, special, repr(getattr(tokenizer, "chat_template", None))]).encode())
    return digest.hexdigest()


def _without_place(config: bytes) -> bytes:
    place = {"name_or_path", "is_local", "local_files_only", "_commit_hash"}
    return json.dumps({k: v for k, v in json.loads(config).items() if k not in place}, sort_keys=True).encode()


@functools.cache
def _code() -> str:
    """A hash of the code that makes trees, so that nobody has to remember to raise a version."""
    root = Path(__file__).parents[1]
    files = [root / "tree.py", root / "types.py", *(root / "data").glob("*.py")]
    files += [f for f in (root / "text").rglob("*") if f.suffix in (".py", ".jinja", ".json")]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


# -- entries -------------------------------------------------------------------------------------------------------------


def load(entry: Path) -> Trees | None:
    """The trees of an entry; None if it is not there, damaged or of another schema."""
    try:
        index = json.loads((entry / INDEX).read_text("utf-8"))
        if index["schema"] != SCHEMA:
            return None
        arrays = {name: _open(entry / f"{name}.bin", _DTYPES[name], index["columns"][name]) for name in _DTYPES}
        items = StoredItems(Columns({n: arrays[n] for n in COLUMNS}, [(w, a) for w, a in index["marks"]]))
        trees = Trees(items, margins=arrays[MARGINS].tolist(), **index["counts"])
        with suppress(OSError):
            os.utime(entry / INDEX)  # for `_prune`
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return trees


def _open(file: Path, dtype: str, expected: Mapping[str, Any]) -> Array:
    with file.open("rb") as stream:
        if hashlib.file_digest(stream, "sha256").hexdigest() != expected["sha256"]:
            raise ValueError(f"{file} is damaged")
    if not expected["count"]:
        return np.zeros(0, dtype)  # an empty file cannot be mapped
    return np.memmap(file, dtype, mode="r", shape=(expected["count"],)).view(np.ndarray)


def _build(
    folder: Path,
    key: str,
    parts: list[Sequence[Record]],
    encoder: Encoder,
    processes: int | None,
    on_part: OnPart,
) -> None:
    _clean(folder)
    entry = Path(tempfile.mkdtemp(prefix=f".{key}.", suffix=PARTIAL, dir=folder))
    try:
        _write(entry, _encoded(parts, encoder, processes), len(parts), on_part)
        _replace(entry, folder / key)
    finally:
        shutil.rmtree(entry, ignore_errors=True)
    _prune(folder, keep=key)


def _write(entry: Path, encoded: Iterator[tuple[Columns, Trees]], total: int, on_part: OnPart) -> None:
    counted = Trees()
    with ExitStack() as stack:
        files = {name: stack.enter_context((entry / f"{name}.bin").open("wb")) for name in _DTYPES}
        hashes = {name: hashlib.sha256() for name in _DTYPES}

        def put(name: str, array: Array) -> None:
            content = np.ascontiguousarray(array, dtype=_DTYPES[name]).tobytes()
            hashes[name].update(content)
            files[name].write(content)

        gathering = Gathering(put)
        for done, (columns, rest) in enumerate(encoded, start=1):
            gathering.add(columns)
            put(MARGINS, np.asarray(rest.margins))
            counted.count(rest)
            on_part(done, total, len(columns.arrays["ids"]))
        written = {
            name: {"count": file.tell() // np.dtype(_DTYPES[name]).itemsize, "sha256": hashes[name].hexdigest()}
            for name, file in files.items()
        }
    index = {"schema": SCHEMA, "counts": counted.counts(), "marks": gathering.marks, "columns": written}
    (entry / INDEX).write_text(json.dumps(index, indent=1), "utf-8")


def _replace(entry: Path, target: Path) -> None:
    """Puts a finished entry in its place. Another process may have been quicker: then its entry stays, if it is whole."""
    for _ in range(3):
        try:
            entry.rename(target)
            return
        except OSError:
            if load(target) is not None:
                return
            shutil.rmtree(target, ignore_errors=True)
    entry.rename(target)


@contextmanager
def _alone(folder: Path, key: str) -> Iterator[None]:
    """One process at a time looks for an entry and makes it: the ranks of a run wait for the first. Ends with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{key}.lock"
    with path.open("w") as file:
        with suppress(OSError):  # a file system without locks: then several may make it, and the first one's stays
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _clean(folder: Path) -> None:
    """Removes what processes that were killed left behind."""
    for path in folder.glob(f".*{PARTIAL}"):
        if time.time() - max(map(_changed, [path, *path.glob("*")])) > ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:  # another process removed it just now
        return time.time()


def _prune(folder: Path, *, keep: str) -> None:
    """Removes entries that were not used for longest until the cache is within its bound. Who has one open keeps it."""
    bound = float(os.environ.get(SIZE_VARIABLE, DEFAULT_GB)) * 1e9
    entries = [index.parent for index in sorted(folder.glob(f"*/{INDEX}"), key=_changed)]
    sizes = {entry: sum(f.stat().st_size for f in entry.glob("*")) for entry in entries}
    excess = sum(sizes.values()) - bound
    for entry in entries:
        if excess > 0 and entry.name != keep:
            shutil.rmtree(entry, ignore_errors=True)
            excess -= sizes[entry]


# -- encoding ------------------------------------------------------------------------------------------------------------


def _parts(records: Sequence[Record], sizes: Sequence[int]) -> list[Sequence[Record]]:
    """The records in parts of about `PART_BYTES`: the same parts for any number of processes."""
    parts: list[Sequence[Record]] = []
    begin = size = 0
    for end, own in enumerate(sizes, start=1):
        size += own
        if size >= PART_BYTES or end == len(records):
            parts.append(records[begin:end])
            begin, size = end, 0
    return parts


def _encoded(
    parts: Sequence[Sequence[Record]], encoder: Encoder, processes: int | None
) -> Iterator[tuple[Columns, Trees]]:
    encode = _Columns(encoder)
    if processes is None:
        # The first part is the measure of the rest. The result does not depend on who encodes it.
        begun = time.perf_counter()
        yield encode(parts[0])
        parts, seconds = parts[1:], (time.perf_counter() - begun) * (len(parts) - 1)
        processes = min(cores(), MOST_CHILDREN, len(parts)) if seconds > CHILDREN_FROM_SECONDS else 1
    yield from in_parts(encode, parts, processes)


@dataclass(frozen=True)
class _Columns:
    encoder: Encoder

    def __call__(self, records: Sequence[Record]) -> tuple[Columns, Trees]:
        trees = self.encoder(records)
        columns = to_columns(trees.items)
        trees.items = []
        return columns, trees
