"""Supervised fine-tuning: cross entropy on every assistant turn and its stop token."""

from __future__ import annotations

from pathlib import Path

import torch

from danlu.config import SftSettings
from danlu.data.collate import Trees, encode_conversations, require_items
from danlu.data.packing import plan_steps
from danlu.models.load import save_model
from danlu.models.root import RootModel
from danlu.training import distributed
from danlu.training.compute import Compute, choose
from danlu.training.logprobs import logprobs
from danlu.training.optim import adamw, rate_factor, set_rate
from danlu.training.session import Session
from danlu.training.setup import final_state, limits_of, policy_roles, records_of
from danlu.training.step import TrainResult, accumulate, apply, batches_of, heldout_loss, language_loss
from danlu.training.templates import template_facts, template_of
from danlu.training.tokens import trees_of

STOP_SAMPLE = 64


def train(settings: SftSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`."""
    distributed.start()
    template = template_of(settings.model, settings, stage="sft")
    train_records, heldout_records, dataset = records_of(settings, "conversation")
    trees = trees_of(encode_conversations, train_records, template, stage="sft", max_length=limits_of(settings))
    heldout = trees_of(encode_conversations, heldout_records, template, stage="sft", max_length=limits_of(settings))
    require_items(trees, "conversation", settings.max_length)
    lengths, weights = trees.lengths, trees.weights
    steps = plan_steps(
        lengths,
        tokens_per_step=settings.tokens_per_step,
        micro_tokens=settings.micro_tokens,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
        ranks=distributed.world()[1],
    )

    roles, model = policy_roles(settings)
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    root = RootModel(roles).to(compute.device).train()
    optimizer = adamw(root, settings.learning_rate, settings.weight_decay)
    metrics: dict[str, float] = {}
    with Session(settings, "sft", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        metrics = dict(session.extra.get("last", {}))
        if heldout.items and "first_eval_loss" not in session.extra:
            root.eval()
            session.extra["first_eval_loss"] = heldout_loss(root, heldout, settings.micro_tokens, compute)
            root.train()
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            weight = float(weights[items].sum())
            batches = [(trees.batch(m), weight) for m in distributed.mine(micro)]
            set_rate(optimizer, settings.learning_rate * rate_factor(step, len(steps), settings))
            sums = accumulate(root, "policy", batches, language_loss, compute)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm)
            metrics = {"loss": sums["loss"], "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=f"loss {sums['loss']:.3f}")
            if heldout.items and session.eval_due(step):
                root.eval()
                session.extra["eval_loss"] = heldout_loss(root, heldout, settings.micro_tokens, compute)
                session.evaluated(step, {"eval_loss": session.extra["eval_loss"]})
                root.train()
        best = session.restore_best()
        metrics |= {k: session.extra[k] for k in ("eval_loss", "first_eval_loss") if k in session.extra}
        metrics |= best

    root.eval()
    stop_probability = _stop_probability(root, trees, settings.micro_tokens, compute)
    folder = Path(settings.out) / "model"
    model.generation_config.eos_token_id = sorted(template.stop_ids)
    if distributed.is_main():
        save_model(model.to("cpu"), template.tokenizer, folder, final_state(roles, "policy"))
    stop_rows = model.get_output_embeddings().weight
    facts = {
        "records": len(train_records),
        "heldout": len(heldout_records),
        "answers": trees.answers,
        "answers_with_stop": trees.answers_with_stop,
        "answers_cut": trees.answers_cut,
        "answers_kept": trees.answers - trees.answers_cut,
        "stop_ids": sorted(template.stop_ids),
        # With adapters the head is frozen: then a stop token must be one that the base already produces.
        "stop_row_learns": bool(stop_rows.requires_grad) or stop_probability >= 0.5,
        "stop_probability": stop_probability,
        **template_facts(template),
        "dropped": {**dataset.left_out, **trees.dropped},
        "origins": dataset.origins,
    }
    return TrainResult(folder, metrics, facts)


@torch.no_grad()
def _stop_probability(root: RootModel, trees: Trees, micro_tokens: int, compute: Compute) -> float:
    """Mean probability of the stop token where answers end, over the first conversations."""
    sample = Trees(items=trees.items[:STOP_SAMPLE])
    total = 0.0
    for tree in batches_of(sample, micro_tokens):
        with compute.autocast():
            logp, _ = root(tree.to(compute.device), "policy", lambda out: logprobs(out, out.tree.node_end_N - 1))
        total += float(logp.exp().sum())
    return total / len(sample.items)
