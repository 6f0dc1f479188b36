"""`danlu export`: a model for other programs, checked by them, with a card beside it; whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch

from danlu.exceptions import GateError, ModelError, SettingsError
from danlu.models import export as folders
from danlu.models import gguf
from danlu.models.gguf_layout import architecture_of, context_of
from danlu.models.gguf_vocab import vocabulary_of
from danlu.models.modelfile import MARK as MODELFILE_MARK
from danlu.models.modelfile import modelfile
from danlu.models.patches import apply_patches
from danlu.models.places import is_adapter, resolve, tokenizer_place
from danlu.pipeline import card, export_check
from danlu.pipeline.export_check import Verdict
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import load_tokenizer
from danlu.training.runs import patches_folder, resolve_model

Format = Literal["hf", "gguf"]
CARD: Final = "README.md"
MODELFILE: Final = "Modelfile"
SAMPLING: Final = {"temperature": 0.7, "top_p": 0.9}  # those of `danlu chat`


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for.

    Attributes:
        model: a folder, a hub id, a run or a stage of one.
        kind: f16, q8_0 or q4_0 for GGUF; bf16, f16 or f32 for a folder.
        out: a folder; for GGUF also a file that ends in `.gguf`.
        check: True: wanted; False: left out; None: where it can be done.
        dequantize: export rounded weights as ordinary ones.
        patches: put the facts that the model was taught into the weights.
        force: overwrite what is there, and keep an export that its gate fails.
    """

    model: str
    format: Format
    kind: str
    out: Path
    name: str = ""
    licence: str = ""
    max_shard_size: str = "5GB"
    check: bool | None = None
    dequantize: bool = False
    patches: bool = True
    force: bool = False


@dataclass(frozen=True, slots=True)
class Exported:
    """What was written: `folder` holds `files`; the verdict of G-EXPORT; sentences that people should read."""

    folder: Path
    files: list[Path]
    verdict: Verdict
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "folder": str(self.folder),
            "files": [{"path": str(f), "bytes": f.stat().st_size} for f in self.files],
            "gate": self.verdict.gate.as_dict() | {"checked": self.verdict.numbers["checked"]},
            "numbers": self.verdict.numbers,
            "notes": self.notes,
        }


def export(order: Order, say: Callable[[str], None] = lambda _: None) -> Exported:
    """Writes a model for other programs, has one of them check it, and moves it to its place.

    Raises:
        ModelError: the family has no such form, the disk is too small, or the model cannot be loaded.
        KnowledgeError: the model's patches are damaged or belong to another one.
        SettingsError: the place is taken, or a package is missing.
        GateError: the program that opened it says something else; nothing is left of the export.
    """
    if order.format == "hf":
        return _export_folder(order, say)
    return _export_gguf(order, say)


# -- GGUF ---------------------------------------------------------------------------------------------------------------


def _export_gguf(order: Order, say: Callable[[str], None]) -> Exported:
    name, source = _source(order)
    file, beside = _gguf_place(order, name)
    gguf.library()
    python = export_check.llama_python() if order.check is not False else None
    if order.check and python is None:
        raise SettingsError(f"the export was to be checked, but it can be {export_check.HOW}")
    if folders.is_scalar(source):
        raise ModelError(
            "this is a reward model; llama.cpp has no place for its head",
            file=source,
            hint="danlu export --format hf writes a folder for transformers",
        )
    _refuse_family_early(source)
    tokenizer = _tokenizer(source)
    if tokenizer is None:
        raise ModelError("this model folder has no tokenizer files, and a GGUF file needs them", file=source)
    model = folders.load_exact(source, dequantize=order.dequantize)
    architecture_of(model.config)
    taught = _taught(order, model, source)
    template = ChatTemplate(tokenizer)
    vocabulary = vocabulary_of(tokenizer, int(model.config.vocab_size), template.stop_ids)
    notes = [*taught, *vocabulary.notes]
    kind: Any = order.kind
    twin = kind != "f16" and python is not None  # see `_checked_in_halves`
    folders.need_disk(
        file.parent, gguf.plan(model, kind).bytes + (gguf.plan(model, "f16").bytes if twin else 0) + (8 << 20)
    )
    origin = card.origin_of(Path(source))
    bos = tokenizer.bos_token if vocabulary.add_bos and tokenizer.bos_token else ""
    parameters = SAMPLING | {"num_ctx": context_of(model.config)}
    stops = [tokenizer.convert_ids_to_tokens(i) for i in sorted(template.stop_ids)]
    recipe, note = modelfile(file.name, template, parameters, stop_texts=stops, bos=bos)
    notes += [note] if note else []
    count = _parameters(model)
    family = str(model.config.model_type)
    with _made_beside(file.parent) as folder:
        made = folder / file.name
        facts: dict[str, Any] = {"general.license": order.licence} if order.licence else {}
        gguf.write(made, model, vocabulary, kind, name=name, chat_template=template.source, facts=facts)
        say(f"written: {made.stat().st_size / 2**20:,.1f} MB as {order.kind}")
        verdict = _checked(
            order,
            made,
            model,
            tokenizer,
            python,
            against=None if kind == "f16" else lambda: gguf.read_back(made, model),
            lossy=vocabulary.model == "t5",
        )
        if twin:
            halves = folder / "halves.gguf"
            gguf.write(halves, model, vocabulary, "f16", name=name, chat_template=template.source, facts=facts)
            verdict = _checked_in_halves(order, verdict, halves, model, tokenizer, python, vocabulary.model == "t5")
            halves.unlink()
        (folder / MODELFILE).write_text(recipe, "utf-8")
        shipped = _shipped(
            order,
            name,
            family,
            count,
            context_of(model.config),
            "f16-gguf" if kind == "f16" else kind,
            [(file.name, made.stat().st_size)],
            template.source,
            _run_gguf(file.name, name, has_template=not note),
            verdict,
            notes,
        )
        (folder / CARD).write_text(card.write(origin, shipped), "utf-8")
        file.parent.mkdir(parents=True, exist_ok=True)
        for part in (file.name, MODELFILE, CARD):
            (folder / part).replace(file.parent / part)
    return Exported(file.parent, [file, *beside], verdict, notes)


def _refuse_family_early(source: str) -> None:
    """Before gigabytes are read for nothing."""
    from transformers import AutoConfig

    if (Path(source) / "config.json").is_file():
        try:
            config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except (ValueError, KeyError, OSError):
            return  # loading says what is wrong with it
        architecture_of(config)


def _gguf_place(order: Order, name: str) -> tuple[Path, list[Path]]:
    out = order.out
    file = out if out.suffix == ".gguf" else out / f"{name}-{order.kind}.gguf"
    beside = [file.parent / MODELFILE, file.parent / CARD]
    if file.exists() and not order.force:
        raise SettingsError("this file exists", field="out", hint=f"{file}: --force overwrites it")
    for path, mark in zip(beside, (MODELFILE_MARK, card.MARK), strict=True):
        if path.is_file() and mark not in path.read_text("utf-8", errors="replace")[:4096] and not order.force:
            raise SettingsError(
                f"{path} exists and is not danlu's, and the export puts a file of this name beside the weights",
                field="out",
                hint="give --out a folder of its own, or --force",
            )
    return file, beside


# -- folders ------------------------------------------------------------------------------------------------------------


def _export_folder(order: Order, say: Callable[[str], None]) -> Exported:
    name, source = _source(order)
    out = order.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not order.force:
        raise SettingsError("this folder exists and is not empty", field="out", hint=f"{out}: --force replaces it")
    if out.resolve() == Path(source).resolve():
        raise SettingsError("the export would replace the model that it is made from", field="out")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise SettingsError(
            "this folder holds something other than a model, which --force will not delete", field="out", hint=str(out)
        )
    kind: Any = order.kind
    folders.shard_size(order.max_shard_size)
    scalar = folders.is_scalar(source)
    model = folders.load_exact(source, dequantize=order.dequantize)
    folders.refuse_foreign(model)
    taught = _taught(order, model, source)
    folders.need_disk(out, folders.folder_bytes(model, kind))
    tokenizer = _tokenizer(source)
    template = ChatTemplate(tokenizer) if tokenizer is not None and not scalar else None
    stop_ids = template.stop_ids if template is not None else frozenset[int]()
    origin = card.origin_of(Path(source))
    with _made_beside(out.absolute().parent) as folder:
        made = folder / "model"
        folders.write_folder(
            made, model, tokenizer, kind, stop_ids=stop_ids, sampling=SAMPLING, max_shard_size=order.max_shard_size
        )
        size = sum(f.stat().st_size for f in made.iterdir())
        say(f"written: {size / 2**20:,.1f} MB as {order.kind}")
        folders.cast(model, torch.float32)  # the rounded weights, in the precision that both sides compute with
        verdict = _checked(order, made, model, tokenizer, sys.executable, scalar=scalar)
        notes = taught if tokenizer is not None else [*taught, "the model came without tokenizer files"]
        files = [(f.name, f.stat().st_size) for f in sorted(made.iterdir()) if f.suffix == ".safetensors"]
        shipped = _shipped(
            order,
            name,
            str(model.config.model_type),
            _parameters(model),
            int(getattr(model.config, "max_position_embeddings", 0) or 0),
            order.kind,
            files,
            template.source if template is not None else "",
            _run_folder(name, str(model.config.model_type), scalar=scalar),
            verdict,
            notes,
            tag="text-classification" if scalar else "text-generation",
        )
        (made / CARD).write_text(card.write(origin, shipped), "utf-8")
        if out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        made.replace(out)
    return Exported(out, sorted(f for f in out.iterdir() if f.is_file()), verdict, notes)


# -- shared -------------------------------------------------------------------------------------------------------------


def _source(order: Order) -> tuple[str, str]:
    """The model's name, fit for a file, and where it is."""
    given = resolve_model(order.model)
    source, _ = resolve(given)
    path = Path(order.model.partition(":")[0] if ":" in order.model else order.model)
    words = order.name or (path.parent.parent.name if path.name == "model" and path.parent.parent.name else path.name)
    return re.sub(r"[^\w.-]+", "-", words).strip("-.") or "model", source


def _tokenizer(source: str) -> Any | None:
    place = tokenizer_place(source)
    return load_tokenizer(place, local=Path(place).is_dir())


def _taught(order: Order, model: Any, source: str) -> list[str]:
    """Puts the facts that were taught to a model into its weights, as loading it does; a sentence that says so, for the card."""
    local = Path(source).is_dir()
    if not order.patches or (local and is_adapter(source)):
        return []
    applied = apply_patches(model, patches_folder(source, local=local), order.model)
    return [f"patches of taught facts are in the weights: {', '.join(applied)}"] if applied else []


def _parameters(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


@contextmanager
def _made_beside(parent: Path) -> Iterator[Path]:
    """A folder on the same disk as the result, which is gone afterwards, whatever happens; so are folders made for it."""
    there = next(p for p in (parent, *parent.parents) if p.is_dir())
    folder = Path(tempfile.mkdtemp(prefix=f".danlu-export-{os.getpid()}-", dir=there))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _checked(
    order: Order, made: Path, model: Any, tokenizer: Any | None, python: str | None, *, lossy: bool = False, **more: Any
) -> Verdict:
    """The verdict of G-EXPORT.

    Raises:
        GateError: it does not hold, and the order is not to go on anyway.
    """
    if order.check is False:
        return export_check.not_checked("not checked: --no-check was given")
    if python is None:
        return export_check.not_checked()
    verdict = export_check.check(made, order.kind, model, tokenizer, python=python, lossy_tokens=lossy, **more)
    if not verdict.gate.passed and not order.force:
        raise GateError(
            f"gate {export_check.CODE} does not hold: {verdict.gate.sentence} (bound {verdict.gate.threshold:.0e})",
            hint="nothing was written; --force keeps the export and says so in its card",
        )
    return verdict


def _checked_in_halves(
    order: Order, verdict: Verdict, made: Path, model: Any, tokenizer: Any, python: str | None, lossy: bool
) -> Verdict:
    """G-EXPORT of a quantised file once more, as an F16 file with the same values, keys and order of rows.

    llama.cpp rounds activations to 8 bits before blocks of 8 or 4 bits, which moves logits as far as twice the rotary base does; in
    halves it does not, and the bound is thirty times tighter. The model takes the file's halves first: what rounding an 8-bit value
    with its scale to one of them changes is not what is looked for.

    Args:
        verdict: of the quantised file; the model holds that file's values since.

    Raises:
        GateError: it does not hold, and the order is not to go on anyway.
    """
    order = replace(order, kind="f16")
    halves = _checked(order, made, model, tokenizer, python, against=lambda: gguf.read_back(made, model), lossy=lossy)
    found, bound = halves.numbers["logits"], halves.numbers["bound"]
    numbers = verdict.numbers | {"logits_f16": found, "bound_f16": bound}
    if not verdict.gate.passed:
        return Verdict(verdict.gate, numbers)
    sentence = f"{verdict.gate.sentence}; written as F16, its values give the logits within {found:.1e}"
    if halves.gate.passed:
        return Verdict(replace(verdict.gate, sentence=sentence), numbers)
    return Verdict(replace(halves.gate, sentence=f"{sentence} ({halves.gate.sentence})"), numbers)


def _shipped(
    order: Order,
    name: str,
    family: str,
    parameters: int,
    context: int,
    kind: str,
    files: list[tuple[str, int]],
    template: str,
    run_with: str,
    verdict: Verdict,
    notes: list[str],
    tag: str = "text-generation",
) -> card.Shipped:
    return card.Shipped(
        name=name,
        family=family,
        parameters=parameters,
        context=context,
        kind=kind,
        files=files,
        template=template,
        run_with=run_with,
        licence=order.licence,
        gate=verdict.gate.as_dict(),
        checked=bool(verdict.numbers["checked"]),
        library=str(verdict.numbers.get("library", "")),
        tag=tag,
        notes=notes,
    )


def _run_gguf(file: str, name: str, *, has_template: bool) -> str:
    ollama = f"ollama create {name.lower()} -f Modelfile\nollama run {name.lower()}"
    warning = "" if has_template else "\n\nOllama gets no chat template here; see Limitations."
    return (
        f"Ollama:\n\n```bash\n{ollama}\n```{warning}\n\n"
        f"llama.cpp:\n\n```bash\nllama-cli -m {file} --jinja -cnv\nllama-server -m {file} --jinja\n```\n\n"
        "llama-cpp-python:\n\n```python\nfrom llama_cpp import Llama\n\n"
        f'model = Llama("{file}", n_ctx=0)\n'
        'print(model.create_chat_completion([{"role": "user", "content": "Hello"}]))\n```'
    )


def _run_folder(name: str, family: str, *, scalar: bool) -> str:
    if scalar:
        return (
            "A reward model: one number for a conversation.\n\n```python\n"
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
            'tokenizer = AutoTokenizer.from_pretrained(".")\n'
            'model = AutoModelForSequenceClassification.from_pretrained(".")\n'
            'talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi!"}]\n'
            'inputs = tokenizer.apply_chat_template(talk, return_tensors="pt", return_dict=True)\n'
            "print(model(**inputs).logits)\n```"
        )
    text = (
        "transformers:\n\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained(".")\n'
        'model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")\n'
        'talk = [{"role": "user", "content": "Hello"}]\n'
        'inputs = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)\n'
        "out = model.generate(**inputs, max_new_tokens=256)\n"
        'print(tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))\n```\n\n'
        "danlu:\n\n```bash\ndanlu chat .\ndanlu serve .\n```"
    )
    if family in folders.VLLM_FAMILIES:
        text += f"\n\nvLLM:\n\n```bash\nvllm serve . --served-model-name {name}\n```"
    return text
