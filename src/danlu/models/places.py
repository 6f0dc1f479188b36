"""Where a model is: a folder, or a hub id. Light to import, since much needs no more than that and a tokenizer."""

from __future__ import annotations

import json
import re
from pathlib import Path

from danlu.exceptions import ModelError

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


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
        return text[3:], False
    if text.startswith("ms:"):
        return _from_modelscope(text[3:]), True
    path = Path(text)
    if path.is_dir():
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            base = json.loads((path / "adapter_config.json").read_text("utf-8")).get("base_model_name_or_path")
            raise ModelError(
                "this folder holds an adapter, not a model", file=path, hint=f"merge it with its base ({base}) first"
            )
        if not (path / "config.json").is_file():
            found = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise ModelError(
                f"no config.json in this folder (found: {found})", file=path, hint="give a transformers model folder"
            )
        return text, True
    if HUB_ID.match(text) and not text.startswith(("runs/", "out/", ".")) and not path.parent.is_dir():
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
