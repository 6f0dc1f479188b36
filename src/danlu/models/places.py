"""Where a model is: a folder, or a hub id. Light to import, since much needs no more than that and a tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

from danlu.exceptions import ModelError
from danlu.hub import notice_no_network

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


ADAPTER_CONFIG = "adapter_config.json"


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter (PEFT's layout) and no model of its own."""
    path = Path(folder)
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def adapter_place(name: str) -> str:
    """The adapter folder that is meant: this one, or that beside the merged model which a stage left."""
    beside = Path(name).with_name("adapter")
    return str(beside) if Path(name).is_dir() and not is_adapter(name) and is_adapter(beside) else name


def base_of(adapter: str | Path) -> str:
    """The model that an adapter folder names as its base: a folder if one is there, else what it says; "" if nothing.

    A folder that moved together with the adapter is found by the way from one to the other.
    """
    path = Path(adapter)
    named = str(json.loads((path / ADAPTER_CONFIG).read_text("utf-8")).get("base_model_name_or_path") or "")
    own = path / "danlu_adapter.json"
    relative = json.loads(own.read_text("utf-8")).get("base_relative") if own.is_file() else None
    for place in (Path(named), path / named, path / relative if relative else Path(named)):
        if named and place.is_dir():
            return str(place.resolve())
    return named


def tokenizer_place(name: str) -> str:
    """Where the tokenizer of a model is: with an adapter that brings none, at its base."""
    if not Path(name).is_dir() or not is_adapter(name):
        return name
    own = any((Path(name) / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model"))
    return name if own else tokenizer_place(base_of(name))


def resolve(model: str | Path) -> tuple[str, bool]:
    """What transformers is given, and whether it must stay local.

    Args:
        model: a folder, `hf:owner/name`, or `owner/name` when no such folder exists.

    Raises:
        ModelError: neither a model folder nor a hub id.
    """
    text = str(model)
    if not text:
        raise ModelError("no model is given", hint="--model FOLDER, or `model:` in the recipe")
    if text.startswith("hf:"):
        notice_no_network()
        return text[3:], False
    if text.startswith("ms:"):
        return _from_modelscope(text[3:]), True
    path = Path(text)
    if path.is_dir():
        if is_adapter(path):
            return text, True
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"no config.json in this folder (found: {found})",
                file=path,
                hint=f"the model is in {path / 'model'}"
                if (path / "model").is_dir()
                else "give a transformers model folder, or an adapter",
            )
        return text, True
    if HUB_ID.match(text) and not text.startswith(("runs/", "out/", ".")) and not path.parent.is_dir():
        notice_no_network()
        return text, False
    raise ModelError(
        "no such model folder", file=text, hint="give a folder, a run (runs/NAME) or a hub id (hf:owner/name)"
    )


def _from_modelscope(name: str) -> str:
    try:
        from modelscope import snapshot_download
    except ImportError:
        raise ModelError(f"'ms:{name}' needs the modelscope package", hint="pip install modelscope") from None
    return str(snapshot_download(name))
