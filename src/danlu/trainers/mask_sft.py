"""Supervised fine-tuning of a UniLM (Dong et al. 2019, section 2.4): masked tokens of answers are predicted, stops among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danlu.config import SftSettings
from danlu.data.truncate import fit_answers
from danlu.exceptions import DataError, SettingsError
from danlu.generation.seeds import mix_seed
from danlu.models.load import load_model
from danlu.models.rows import OneModel, RowsRoot
from danlu.text.chat_template import ChatTemplate
from danlu.training import distributed
from danlu.training.compute import choose
from danlu.training.denoise import Text, Texts, heldout_rows_loss, mask_rows, rows_loss
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import save_result
from danlu.training.runs import resolve_model
from danlu.training.session import Session
from danlu.training.setup import limits_of, plan_of, records_of
from danlu.training.sharding import shard
from danlu.training.step import TrainResult, accumulate, apply
from danlu.training.templates import template_facts, template_of
from danlu.types import Conversation, Record


@within_limits
def train(settings: SftSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`. Of a conversation the last answer is learnt.

    Raises:
        SettingsError: LoRA is asked for.
        DataError: no conversation fits.
    """
    distributed.start()
    if settings.adapter != "full":
        raise SettingsError("a UniLM trains all weights", field="adapter", hint="adapter: full")
    template = template_of(settings.model, settings, stage="sft")
    tokenizer, model = template.tokenizer, load_model(resolve_model(settings.model))
    train_records, heldout_records, dataset = records_of(settings, "conversation")
    make = mask_rows(model.config, tokenizer)
    texts = Texts(encode(train_records, template, settings), make, mix_seed(settings.seed, 0x5F7))
    heldout = Texts(encode(heldout_records, template, settings), make, settings.seed)
    if not texts.items:
        raise DataError("no conversation is left to train on", hint=f"raise max_length (now {settings.max_length})")
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    lengths = texts.lengths
    steps = plan_of(lengths, settings)

    root = shard(RowsRoot(OneModel(model)).to(compute.device).train(), settings, compute)
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    with Session(settings, "sft", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        if heldout.items and "first_eval_loss" not in session.extra:
            root.eval()
            session.extra["first_eval_loss"] = heldout_rows_loss(root, heldout, settings.micro_tokens, compute)
            root.train()
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            made = [texts.batch(m, step) for m in micro]
            weight = sum(float(b.loss_weight_R.sum()) for b in made)
            batches = [(batch, weight) for batch in distributed.mine(made)]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "policy", batches, rows_loss, compute)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {"loss": sums["loss"], "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=f"loss {sums['loss']:.3f}")
            if heldout.items and session.eval_due(step):
                root.eval()
                session.extra["eval_loss"] = heldout_rows_loss(root, heldout, settings.micro_tokens, compute)
                session.evaluated(step, {"eval_loss": session.extra["eval_loss"]})
                root.train()
        best = session.restore_best()
        metrics = dict(session.extra.get("last", {}))
        metrics |= {k: session.extra[k] for k in ("eval_loss", "first_eval_loss") if k in session.extra}
        metrics |= best

    folder = Path(settings.out) / "model"
    save_result(model, tokenizer, folder)
    facts: dict[str, Any] = {
        "records": len(train_records),
        "heldout": len(heldout_records),
        "answers": len(train_records),
        "answers_with_stop": sum(t.ids[-1] in template.stop_ids for t in texts.items),
        "answers_cut": len(train_records) - len(texts.items),
        "answers_kept": len(texts.items),
        "stop_ids": sorted(template.stop_ids),
        "stop_row_learns": True,
        **template_facts(template),
        "dropped": dataset.left_out,
        "origins": dataset.origins,
        **session.facts,
    }
    return TrainResult(folder, metrics, facts)


def encode(records: Sequence[Record], template: ChatTemplate, settings: SftSettings) -> list[Text]:
    """Of each conversation that fits the prompt of its last answer, and that answer with its stop token."""
    found: list[Text] = []
    for record in records:
        if not isinstance(record, Conversation):
            continue
        last = max(i for i, m in enumerate(record.messages) if m["role"] == "assistant")
        fitted = fit_answers(
            record.messages[:last], [[record.messages[last]]], template, limits_of(settings), origin=record.origin
        )
        if not isinstance(fitted, str) and fitted[1][0]:
            prompt, answers, _ = fitted
            found.append(Text([*prompt, *answers[0]], len(prompt)))
    return found
