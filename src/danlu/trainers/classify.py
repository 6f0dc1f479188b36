"""Fine-tuning for understanding: a head that says a class for each text, or for each token, as GLM and UniLM are tuned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from danlu.config import SftSettings
from danlu.data.labelled_text import LabelledText, TaggedTokens, read_labelled, read_tagged
from danlu.data.split import split_heldout
from danlu.exceptions import DataError, ModelError, SettingsError
from danlu.models.load import load_model
from danlu.models.prefix import attached
from danlu.models.rows import ClassOutput, ClassRoot, RowBatch
from danlu.training import distributed
from danlu.training.compute import Compute, choose
from danlu.training.denoise import padded
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import save_result
from danlu.training.runs import refuse_patches, resolve_model
from danlu.training.session import Session
from danlu.training.setup import plan_of, sample_records
from danlu.training.sharding import shard, share_forwards
from danlu.training.step import TrainResult, accumulate, apply, shortest_first
from danlu.training.templates import tokenizer_of


@dataclass(frozen=True)
class Labelled:
    """Encoded rows: ids, and a class for each (or one for each token, -1 where there is none)."""

    rows: Sequence[tuple[list[int], list[int]]]
    config: Any
    pad: int
    per_token: bool

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row."""
        return np.array([len(ids) for ids, _ in self.rows], dtype=np.int64)

    def batch(self, indices: Sequence[int]) -> RowBatch:
        """Some rows, padded; models that would read a plain mask causally are told to read both ways."""
        chosen = [self.rows[i] for i in indices]
        real = padded([[1] * len(ids) for ids, _ in chosen])
        inputs = {"input_ids": padded([ids for ids, _ in chosen], self.pad), "attention_mask": real}
        blocks = getattr(self.config, "block_position_encoding", None)
        if blocks is not None:
            places = (real.cumsum(1) - 1).clamp(min=0)
            inputs["position_ids"] = torch.stack([places, torch.zeros_like(places)], dim=1)
            inputs["attention_mask"] = real if blocks else real[:, None, None]
        targets = padded([classes for _, classes in chosen], -1).flatten()
        return RowBatch(inputs, targets.clamp(min=0), (targets >= 0).float())


@within_limits
def train(settings: SftSettings) -> TrainResult:
    """Trains and writes `out/model` with its labels in config.json; resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: there is no data, or LoRA is asked for.
        DataError: there are fewer than two classes, or a held-out one that is not learnt.
    """
    distributed.start()
    if settings.adapter != "full":
        raise SettingsError("a classifier trains all weights", field="adapter", hint="adapter: full")
    per_token = settings.task == "token-classify"
    refuse_patches(settings.model, "sft")
    tokenizer = tokenizer_of(settings.model, stage="sft")
    train_rows, heldout_rows = _read(settings, per_token)
    labels = sorted({label for row in train_rows for label in labels_of(row)})
    if len(labels) < 2:
        raise DataError(f"found {len(labels)} class to tell apart ({', '.join(labels)})", field="label")
    model = classifier(resolve_model(settings.model), labels, tokenizer, per_token=per_token)
    pad = int(model.config.pad_token_id or 0)
    encoded, heldout = (
        Labelled([encode(r, labels, tokenizer, settings.max_length) for r in rows], model.config, pad, per_token)
        for rows in (train_rows, heldout_rows)
    )
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    lengths = encoded.lengths
    steps = plan_of(lengths, settings)

    root = shard(ClassRoot(model).to(compute.device).train(), settings, compute)
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    with Session(settings, "sft", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            made = [encoded.batch(m) for m in micro]
            weight = sum(float(b.loss_weight_R.sum()) for b in made)
            batches = [(batch, weight) for batch in distributed.mine(made)]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "policy", batches, class_loss, compute)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {"loss": sums["loss"], "accuracy": sums["right"] / weight, "grad_norm": norm}
            metrics |= {"learning_rate": optimizer.param_groups[0]["lr"]}
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=f"loss {sums['loss']:.3f}")
            if heldout.rows and session.eval_due(step):
                root.eval()
                session.extra["heldout"] = held(root, heldout, settings.micro_tokens, compute)
                session.evaluated(step, session.extra["heldout"])
                root.train()
        best = session.restore_best()
        metrics = dict(session.extra.get("last", {})) | session.extra.get("heldout", {}) | best

    folder = Path(settings.out) / "model"
    save_result(model, tokenizer, folder)
    facts = {"records": len(train_rows), "heldout": len(heldout_rows), "labels": labels, **session.facts}
    return TrainResult(folder, metrics, facts)


Row = LabelledText | TaggedTokens


def _read(settings: SftSettings, per_token: bool) -> tuple[list[Any], list[Any]]:
    if not settings.data:
        raise SettingsError("no data is given", field="data", hint="give a file, folder or glob")
    read: Any = read_tagged if per_token else read_labelled
    rows: list[Any] = read(settings.data)
    if settings.eval_data is not None:
        train, heldout = rows, read(settings.eval_data)
    else:
        key = (lambda r: " ".join(r.tokens)) if per_token else (lambda r: r.text)
        train, heldout = split_heldout(rows, settings.eval_fraction, key)
    if settings.max_records is not None:
        train = sample_records(train, settings.max_records, settings.seed)
    return train, heldout


def labels_of(row: Row) -> list[str]:
    """The classes that a row names."""
    return row.tags if isinstance(row, TaggedTokens) else [row.label]


def encode(row: Row, labels: Sequence[str], tokenizer: Any, max_length: int) -> tuple[list[int], list[int]]:
    """Ids and classes, cut to max_length. A word's tag belongs to its first token.

    Raises:
        DataError: a class that training rows do not have.
    """
    unknown = sorted(set(labels_of(row)) - set(labels))
    if unknown:
        raise DataError(f"the class {unknown[0]!r} does not occur in the training rows", field="label")
    if isinstance(row, TaggedTokens):
        ids: list[int] = []
        classes: list[int] = []
        for number, (word, tag) in enumerate(zip(row.tokens, row.tags, strict=True)):
            pieces = tokenizer(f" {word}" if number and word.isascii() else word, add_special_tokens=False)["input_ids"]
            ids += pieces
            classes += [labels.index(tag), *[-1] * (len(pieces) - 1)] if pieces else []
        return ids[:max_length], classes[:max_length]
    known = tokenizer.get_vocab()
    start = known.get("[CLS]", tokenizer.bos_token_id)
    end = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    ends = [end] if end is not None else []
    whole = [start] if start is not None else []
    for text in filter(None, (row.text, row.second)):
        whole += [*tokenizer(text, add_special_tokens=False)["input_ids"], *ends]
    return whole[:max_length], [labels.index(row.label)]


def classifier(path: str, labels: Sequence[str], tokenizer: Any, *, per_token: bool) -> Any:
    """A model's trunk under a fresh head that starts at zero.

    Raises:
        ModelError: the family has no such head in transformers or here, or the model reads a prefix, which would be lost.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    base = load_model(path)
    if (prefix := attached(base)) is not None:
        raise ModelError(
            f"this model reads {prefix.tokens} virtual tokens before every text, which a classifier would lose",
            file=path,
            hint="start from the model under them",
        )
    config = base.config
    config.num_labels = len(labels)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    auto = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"'{config.model_type}' is an encoder-decoder", hint="write the class as an answer: danlu sft")
    try:
        model: Any = auto.from_config(config)
    except ValueError as error:
        raise ModelError(f"'{config.model_type}' has no head for {'tokens' if per_token else 'texts'}") from error
    own = dict(base.base_model.named_parameters())
    with torch.no_grad():
        for name, parameter in model.base_model.named_parameters():
            parameter.copy_(own[name])
        trunk = {id(p) for p in model.base_model.parameters()}
        for parameter in model.parameters():
            if id(parameter) not in trunk:
                parameter.zero_()
    return model


def class_loss(out: ClassOutput, denominator: float) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy over what has a class; `right`: how many of these the model would name."""
    index = out.rows.loss_index()
    logits, targets = out.hidden_TD[index].float(), out.rows.targets_R[index]
    loss = functional.cross_entropy(logits, targets, reduction="sum")
    right = float((logits.argmax(-1) == targets).sum())
    return loss / denominator, {"right": right, "classes": float(targets.numel())}


def held(root: ClassRoot, rows: Labelled, micro_tokens: int, compute: Compute) -> dict[str, float]:
    """Held-out loss and accuracy."""

    def sums(indices: list[int]) -> tuple[float, float, float]:
        with compute.autocast():
            loss, found = root(rows.batch(indices).to(compute.device), "policy", lambda out: class_loss(out, 1.0))
        return float(loss), found["right"], found["classes"]

    parts = share_forwards(root, ["policy"], shortest_first(rows, micro_tokens), sums, compute)
    loss, right, count = (sum(column) for column in zip(*parts, strict=True))
    return {"eval_loss": loss / count, "eval_accuracy": right / count}
