"""LLaMA-Factory's registry, `dataset_info.json`, as a list of sources that danlu's `data:` takes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from danlu.data.columns import FIELDS, format_of
from danlu.data.contents import texts
from danlu.data.files import HUB
from danlu.data.formats.registry import detect
from danlu.exceptions import DataError
from danlu.types import Origin

_PLACES: Final = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_MEDIA: Final = ("images", "videos", "audios")
# LLaMA-Factory's columns: what they are called where an entry names others but not this one, and danlu's field.
_ALPACA: Final = {
    "prompt": ("instruction", "prompt"),
    "query": ("", ""),
    "response": ("", "response"),
    "history": ("", "history"),
    "system": ("", "system"),
    "chosen": ("", "chosen"),
    "rejected": ("", "rejected"),
    "kto_tag": ("", "label"),
}
_TAGS: Final = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}


@dataclass
class Imported:
    """What an import found.

    Attributes:
        sources: name of the entry to source, with the keys of `danlu.config.Source`.
        left_out: name of the entry to the reason why it cannot be used.
    """

    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def reasons(self) -> str:
        """The reasons with their counts."""
        counts = Counter(reason.partition(":")[0] for reason in self.left_out.values())
        return ", ".join(f"{reason}: {count}" for reason, count in counts.items()) or "it has no entries"

    def to_json(self) -> list[dict[str, Any]]:
        """The sources with their names."""
        return [{"name": name, **source} for name, source in self.sources.items()]


class _Unusable(Exception):  # no error: the reason is told with the entry's name
    """An entry that danlu cannot read; the message says why."""


def is_registry(path: Path) -> bool:
    """Whether a file is such a registry rather than data: an object of objects that name a file or a data set."""
    if path.suffix.lower() != ".json":
        return False
    try:
        with path.open("rb") as file:
            if not file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
                return False
        entries = json.loads(path.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return (
        isinstance(entries, dict)
        and len(entries) > 0
        and all(isinstance(e, dict) and any(place in e for place in _PLACES) for e in entries.values())
    )


def import_registry(path: Path, folder: Path) -> Imported:
    """The entries of a registry as sources.

    Args:
        path: a `dataset_info.json`.
        folder: where the files that it names lie.

    Raises:
        DataError: it is no registry.
    """
    if not is_registry(path):
        raise DataError(
            "this is no registry of data sets",
            hint='Expected LLaMA-Factory\'s dataset_info.json: {"name": {"file_name": ..., "columns": ...}, ...}.',
            file=path,
        )
    found = Imported()
    for name, entry in json.loads(path.read_text("utf-8-sig")).items():
        try:
            found.sources[name] = _source(entry, folder)
        except _Unusable as reason:
            found.left_out[name] = str(reason)
    return found


def sources_yaml(found: Imported) -> str:
    """The sources as YAML, each below its name in a comment."""
    lines = ["# Use them in a recipe: paste those you want below `data:`.\n"]
    for name, source in found.sources.items():
        lines += (f"# {name}\n", yaml.safe_dump([source], allow_unicode=True, sort_keys=False))
    return "".join(lines)


def _source(entry: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    columns = entry.get("columns") or {}
    media = [name for name in _MEDIA if name in columns]
    if media:
        raise _Unusable(f"it holds {' and '.join(media)}, and danlu reads text")
    source: dict[str, Any] = {"path": _path(entry, folder)}
    if entry.get("formatting", "alpaca") in ("sharegpt", "openai"):
        _check_messages(columns, entry)
    elif mapped := _alpaca_columns(columns, entry):
        source["columns"] = mapped
    if "num_samples" in entry:
        raise _Unusable("it takes a number of samples; use `danlu data mix` on the file instead")
    return source


def _path(entry: Mapping[str, Any], folder: Path) -> str:
    if "script_url" in entry:
        raise _Unusable("it has a loading script, and remote code is never run")
    if name := entry.get("hf_hub_url"):
        if "folder" in entry:
            raise _Unusable("it is one folder of a data set of the hub: download it and give its path")
        parts = [name]
        if "subset" in entry:
            parts += [entry["subset"], entry.get("split", "train")]
        elif "split" in entry:
            parts.append(entry["split"])
        return HUB + ":".join(parts)
    if name := entry.get("file_name"):
        for candidate in (name, f"{name}.gz"):
            if (folder / candidate).exists():
                return str(folder / candidate)
        raise _Unusable(f"the file is missing: {folder / name}")
    raise _Unusable("it lies on a hub that danlu does not read: download it and give its path")


def _alpaca_columns(columns: Mapping[str, str], entry: Mapping[str, Any]) -> dict[str, str]:
    """The mapping of a table's columns; none if the entry names none, or danlu recognises its rows as they are."""
    if not columns:
        return {}
    # An entry that names columns has no others.
    used = {key: column for key, (default, _) in _ALPACA.items() if (column := columns.get(key, default))}
    used = {key: column for key, column in used.items() if key in columns or key == "prompt"}
    if set(used) == {"prompt"}:
        return {"text": used["prompt"]}
    mapped = {_ALPACA[key][1]: column for key, column in used.items() if _ALPACA[key][1]}
    try:
        format_of({field: mapped[field] for field in FIELDS if field in mapped})
        possible = "query" not in used
    except DataError:
        possible = False
    if possible:
        return mapped
    row = {column: f"<{key}>" for key, column in used.items()} | ({used["kto_tag"]: True} if "kto_tag" in used else {})
    if not _recognised(row):
        raise _Unusable(f"no mapping of danlu takes the columns {', '.join(used)}")
    return {}


def _check_messages(columns: Mapping[str, str], entry: Mapping[str, Any]) -> None:
    """Whether danlu recognises such rows: told by an invented one."""
    tags = {**_TAGS, **(entry.get("tags") or {})}
    question, answer = (
        {tags["role_tag"]: tags[speaker], tags["content_tag"]: f"<{speaker}>"}
        for speaker in ("user_tag", "assistant_tag")
    )
    turns = [question] if entry.get("ranking") else [question, answer]
    row: dict[str, Any] = {columns.get("messages", "conversations"): turns}
    for key in ("chosen", "rejected"):
        if key in columns:
            row[columns[key]] = answer
    if "kto_tag" in columns:
        row[columns["kto_tag"]] = True
    if "tools" in columns:
        row[columns["tools"]] = "[]"
    if not _recognised(row):
        raise _Unusable(f"no format of danlu has rows with {', '.join(repr(key) for key in row)}")


def _recognised(row: dict[str, Any]) -> bool:
    """Whether a format reads an invented row with all its texts, which begin with `<`."""
    entry = detect(row)
    if entry is None:
        return False
    try:
        records = entry.parse(row, Origin("", 1))
    except Exception:  # a row that only looks like one of a format
        return False
    found = "".join(text for record in records for _, text in texts(record))
    return all(text in found for text in re.findall(r"<\w+>", json.dumps(row)))
