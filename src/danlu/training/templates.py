"""The tokenizer and the chat template that a model brings, or that the settings ask for."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from danlu.exceptions import ModelError
from danlu.models.adapter_files import tokenizer_for
from danlu.models.load import check_vocabulary, is_encoder_decoder, raw_config
from danlu.models.places import resolve
from danlu.text.chat_template import ChatTemplate
from danlu.text.text_to_text import seam_of
from danlu.text.tokenizer import load_tokenizer
from danlu.train_config import TrainSettings
from danlu.training import distributed
from danlu.training.runs import refuse_patches, resolve_model


def tokenizer_of(model: str, *, stage: str) -> Any:
    """The tokenizer of a model, which this stage cannot do without.

    Raises:
        ModelError: the folder has none.
    """
    folder = resolve_model(model)
    if not folder:
        raise ModelError("no model is given", hint="--model FOLDER, or `model:` in the recipe")
    # A tokenizer may stand in a folder of its own, without a model.
    name, local = (folder, True) if (Path(folder) / "tokenizer.json").is_file() else resolve(folder)
    tokenizer = tokenizer_for(name, local=local)
    if tokenizer is None:
        raise ModelError(
            f"this model folder has no tokenizer files, and {stage} needs text",
            file=name,
            hint="copy tokenizer.json and tokenizer_config.json of the model beside config.json",
        )
    return tokenizer


def reads_sources(model: str) -> bool:
    """Whether a model is an encoder-decoder, by its configuration; a folder with a tokenizer alone is none."""
    folder = resolve_model(model)
    if not folder or (Path(folder).is_dir() and not (Path(folder) / "config.json").is_file()):
        return False
    return is_encoder_decoder(raw_config(*resolve(folder)))


def served_template(folder: str | Path) -> ChatTemplate:
    """The chat seam as serving makes it for a model folder."""
    return seam_of(load_tokenizer(folder), encoder_decoder=reads_sources(str(folder)))


def template_of(model: str, settings: TrainSettings, *, stage: str) -> ChatTemplate:
    """The chat seam of a model. What people should know about the choice of template is said on stderr.

    Raises:
        KnowledgeError: the model has facts in patches, which training would lose.
    """
    refuse_patches(model, stage)
    tokenizer = tokenizer_of(model, stage=stage)
    folder = Path(resolve_model(model))
    if (folder / "config.json").is_file():
        check_vocabulary(raw_config(str(folder), True), tokenizer, folder)
    template = seam_of(tokenizer, settings.template, encoder_decoder=reads_sources(model))
    if template.note and distributed.is_main():
        print(f"{stage}: {template.note}", file=sys.stderr)
    return template


def template_facts(template: ChatTemplate) -> dict[str, str]:
    """For the manifest: which template it was, and what people should know about that choice."""
    return {"template": template.name} | ({"template_note": template.note} if template.note else {})
