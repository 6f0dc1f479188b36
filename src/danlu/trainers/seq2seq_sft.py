"""Supervised fine-tuning of encoder-decoders (T5, mT5, BART, CPM-2): cross entropy on answers, given what was said before.

The loop of `trainers/sft.py` over padded pairs of source and target; `sft` hands encoder-decoders over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from danlu.config import SftSettings
from danlu.data.pairs import Pairs, encode_pairs
from danlu.exceptions import DataError, SettingsError
from danlu.models.load import check_tokenizer, load_model
from danlu.models.seq2seq import PairBatch, Seq2SeqRoot, start_id
from danlu.text.text_to_text import Pair, TextToText
from danlu.training import distributed
from danlu.training.compute import Compute, choose
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import save_result
from danlu.training.runs import resolve_model
from danlu.training.session import Session
from danlu.training.setup import limits_of, plan_of, records_of
from danlu.training.step import TrainResult, accumulate, apply
from danlu.training.templates import template_facts, template_of

STOP_SAMPLE = 64


@within_limits
def train(settings: SftSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`."""
    distributed.start()
    _check(settings)
    template = template_of(settings.model, settings, stage="sft")
    assert isinstance(template, TextToText), "asked for by sft, which looked at the configuration"
    train_records, heldout_records, dataset = records_of(settings, "conversation")
    pairs = encode_pairs(train_records, template, limits_of(settings))  # type: ignore[arg-type]
    heldout = encode_pairs(heldout_records, template, limits_of(settings))  # type: ignore[arg-type]
    if not pairs.items:
        raise DataError(
            f"no conversation is left to train on (dropped: {pairs.dropped or 'none'})",
            hint=f"raise max_length (now {settings.max_length})",
        )
    lengths, weights = pairs.lengths, pairs.weights
    steps = plan_of(lengths, settings)

    model = load_model(resolve_model(settings.model))
    check_tokenizer(model, template.tokenizer, settings.model)
    start = start_id(model)
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    root: Any = Seq2SeqRoot(model).to(compute.device).train()  # has what the functions below ask of a `RootModel`
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    with Session(settings, "sft", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        if heldout.items and "first_eval_loss" not in session.extra:
            session.extra["first_eval_loss"] = heldout_loss(root, heldout, start, settings.micro_tokens, compute)
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            weight = float(weights[items].sum())
            mine = distributed.mine(micro)
            batches: Any = [(PairBatch.of([pairs.items[i] for i in m], start), weight) for m in mine]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "policy", batches, target_loss, compute)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {"loss": sums["loss"], "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=f"loss {sums['loss']:.3f}")
            if heldout.items and session.eval_due(step):
                session.extra["eval_loss"] = heldout_loss(root, heldout, start, settings.micro_tokens, compute)
                session.evaluated(step, {"eval_loss": session.extra["eval_loss"]})
        best = session.restore_best()
        metrics = dict(session.extra.get("last", {}))
        metrics |= {k: session.extra[k] for k in ("eval_loss", "first_eval_loss") if k in session.extra}
        metrics |= best

    folder = Path(settings.out) / "model"
    facts = {
        "records": len(train_records),
        "heldout": len(heldout_records),
        **answer_facts(root, pairs, template, start, settings.micro_tokens, compute),
        "dropped": {**dataset.left_out, **pairs.dropped},
        "origins": dataset.origins,
        **session.facts,
    }
    model.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(model, template.tokenizer, folder)
    return TrainResult(folder, metrics, facts)


def _check(settings: SftSettings) -> None:
    if settings.adapter != "full":
        raise SettingsError(
            "encoder-decoders train all their weights", field="adapter", hint="set adapter to full for this model"
        )
    if settings.strategy != "ddp" and distributed.world()[1] > 1:
        raise SettingsError("encoder-decoders are not sharded", field="strategy", hint="set strategy to ddp")


def target_loss(logprobs_BT: Tensor, denominator: float) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of a batch's targets; padding counts nothing."""
    loss = -logprobs_BT.sum() / denominator
    return loss, {"loss_sum": float(loss.detach()) * denominator}


@torch.no_grad()
def heldout_loss(root: Any, pairs: Pairs, start: int, micro_tokens: int, compute: Compute) -> float:
    """Mean loss per target token over held-out pairs, in nats; the root is left as it was."""
    training = root.training
    root.eval()
    total = 0.0
    for batch in batches_of(pairs, start, micro_tokens):
        with compute.autocast():
            total -= float(root(batch.to(compute.device), "policy", lambda logprobs_BT: logprobs_BT.sum()))
    root.train(training)
    return total / max(float(pairs.weights.sum()), 1.0)


def batches_of(pairs: Pairs, start: int, micro_tokens: int) -> list[PairBatch]:
    """All pairs once, shortest first, in batches of at most `micro_tokens` with their padding."""
    order = sorted(pairs.items, key=lambda pair: (len(pair.source_ids), len(pair.target_ids)))
    batches: list[list[Pair]] = [[]]
    for pair in order:
        widest = max([pair.tokens, *(p.tokens for p in batches[-1])])
        if batches[-1] and widest * (len(batches[-1]) + 1) > micro_tokens:
            batches.append([])
        batches[-1].append(pair)
    return [PairBatch.of(batch, start) for batch in batches if batch]


@torch.no_grad()
def answer_facts(
    root: Any, pairs: Pairs, template: TextToText, start: int, micro_tokens: int, compute: Compute
) -> dict[str, Any]:
    """What G-STOP and G-TRUNC are decided by; see `training/answers.py`."""
    root.eval()
    sample = Pairs(items=pairs.items[:STOP_SAMPLE])
    total = 0.0
    for batch in batches_of(sample, start, micro_tokens):
        last = batch.weight_BT.sum(dim=1).long() - 1
        with compute.autocast():
            logprobs = root(batch.to(compute.device), "policy", lambda logprobs_BT: logprobs_BT).cpu()
        total += float(logprobs.gather(1, last[:, None]).exp().sum())
    return {
        "answers": pairs.answers,
        "answers_with_stop": pairs.answers_with_stop,
        "answers_cut": pairs.answers_cut,
        "answers_kept": len(pairs.items),
        "stop_ids": sorted(template.stop_ids),
        "stop_row_learns": True,
        "stop_probability": total / max(len(sample.items), 1),
        **template_facts(template),
    }
