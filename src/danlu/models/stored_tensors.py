"""Weight files, one tensor at a time: what is read is never held whole, and disk space is asked for before anything is written.

Memory that is mapped from a file counts as the process's own while it is mapped, so tensors are read, not mapped.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from danlu.exceptions import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMG]?)i?B?", re.IGNORECASE)
SMALL_FILES = 32 * 2**20  # room for configuration and tokenizer
WHOLE = "model.safetensors"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape, and how to read it, or some rows of it."""

    name: str
    shape: tuple[int, ...]
    rows: Callable[[slice], Tensor]

    def read(self) -> Tensor:
        """All of it."""
        return self.rows(slice(None))


def stored_tensors(folder: Path) -> Iterator[Stored]:
    """The tensors of a model folder, file by file: safetensors, else `pytorch_model*.bin` (no code is executed).

    Raises:
        ModelError: there are no weight files, or one is missing, cut short or no such file.
    """
    for index, whole in ((f"{WHOLE}.index.json", WHOLE), ("pytorch_model.bin.index.json", "pytorch_model.bin")):
        files = [whole]
        if (folder / index).is_file():
            files = sorted(set(json.loads((folder / index).read_text("utf-8"))["weight_map"].values()))
        elif not (folder / whole).is_file():
            continue
        for file in files:
            path = folder / Path(file).name
            if not path.is_file():
                raise ModelError(f"{index} names {file}, which is missing", file=folder, hint="download it again")
            yield from _of_safetensors(path) if path.suffix == ".safetensors" else _of_pickle(path)
        return
    raise ModelError(f"no weights in this folder (expected {WHOLE} or its index)", file=folder)


def _of_safetensors(path: Path) -> Iterator[Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= size - 8:
            raise ModelError("this is not a safetensors file", file=path, hint="the download may be incomplete")
        try:
            header: dict[str, Any] = json.loads(file.read(length))
        except ValueError as error:
            raise ModelError(f"the header of this file is broken: {error}", file=path) from error
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size or entry["dtype"] not in DTYPES:
            found = (
                f"is cut short ({size:,} bytes)" if end > size else f"holds {entry['dtype']}, which is not known here"
            )
            raise ModelError(f"the file {found} at {name}", file=path, hint="the download may be incomplete")
        shape = tuple(entry["shape"])
        yield Stored(name, shape, _reader(path, start, end, DTYPES[entry["dtype"]], shape))


def _reader(path: Path, start: int, end: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Callable[[slice], Tensor]:
    def rows(own: slice) -> Tensor:
        first, last, _ = own.indices(shape[0] if shape else 1)
        tensor = torch.empty((last - first, *shape[1:]) if shape else shape, dtype=dtype)
        if tensor.numel():
            with path.open("rb") as file:
                file.seek(start + first * ((end - start) // (shape[0] if shape else 1)))
                file.readinto(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        return tensor

    return rows


def _of_pickle(path: Path) -> Iterator[Stored]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError):  # the format before torch 1.6 cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True)
    for name, tensor in state.items():
        yield Stored(name, tuple(tensor.shape), _copier(tensor))


def _copier(tensor: Tensor) -> Callable[[slice], Tensor]:
    return lambda own: tensor[own].clone() if tensor.dim() else tensor.clone()


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `200MB`, `1.5GiB` or a plain number; as transformers reads them (1 GB is 10^9 bytes).

    Raises:
        ModelError: something else, or nothing.
    """
    found = SIZE.fullmatch(text.strip())
    count = 0
    if found:
        unit = 1024 if "ib" in text.lower() else 1000
        count = int(float(found[1]) * unit ** " KMG".index(found[2].upper() or " "))
    if count <= 0:
        raise ModelError(f"'{text}' is no size of a file", hint="5GB, 200MB, ...")
    return count


def require_space(folder: Path, size: int) -> None:
    """Refuses to begin what the disk cannot hold.

    Raises:
        ModelError: with the numbers.
    """
    place = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if size + SMALL_FILES > free:
        raise ModelError(
            f"the disk is too small: {(size + SMALL_FILES) / 2**20:,.0f} MiB are needed, {free / 2**20:,.0f} MiB are free",
            file=folder,
            hint="nothing was written; free space, or give another folder",
        )


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard: int | None = None) -> list[Path]:
    """Writes tensors into an existing folder as safetensors: one file, or shards of at most so many bytes with an index.

    A tensor that is larger than a shard gets one of its own.
    """
    shards: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if max_shard is not None and shards[-1] and held + size > max_shard:
            shards.append({})
            held = 0
        shards[-1][name] = tensor
        held += size
    if len(shards) == 1:
        save_file(shards[0], folder / WHOLE, metadata={"format": "pt"})
        return [folder / WHOLE]
    places: dict[str, str] = {}
    files = []
    for number, shard in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file.name)
        files.append(file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{WHOLE}.index.json").write_text(json.dumps(index, indent=2), "utf-8")
    return files
