"""Supervised fine-tuning: cross entropy on every assistant turn and its stop token."""

from __future__ import annotations

from pathlib import Path

from danlu.config import SftSettings
from danlu.data.collate import encode_conversations, require_items
from danlu.trainers import seq2seq_sft
from danlu.training import distributed
from danlu.training.answers import answer_facts
from danlu.training.compute import choose
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import save_result
from danlu.training.session import Session
from danlu.training.setup import limits_of, placed, plan_of, policy_roles, records_of
from danlu.training.step import TrainResult, accumulate, apply, heldout_loss, language_loss
from danlu.training.templates import reads_sources, template_of
from danlu.training.tokens import trees_of
from danlu.tree import TreeBatch


@within_limits
def train(settings: SftSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`."""
    if reads_sources(settings.model):
        return seq2seq_sft.train(settings)
    distributed.start()
    template = template_of(settings.model, settings, stage="sft")
    train_records, heldout_records, dataset = records_of(settings, "conversation")
    trees = trees_of(encode_conversations, train_records, template, stage="sft", max_length=limits_of(settings))
    heldout = trees_of(encode_conversations, heldout_records, template, stage="sft", max_length=limits_of(settings))
    require_items(trees, "conversation", settings.max_length)
    lengths, weights = trees.lengths, trees.weights
    steps = plan_of(lengths, settings)

    roles, model = policy_roles(settings, updates=len(steps), stop_ids=template.stop_ids)
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    root = placed(roles, settings, compute).train()
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    with Session(settings, "sft", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        if heldout.items and "first_eval_loss" not in session.extra:
            root.eval()
            session.extra["first_eval_loss"] = heldout_loss(root, heldout, settings.micro_tokens, compute)
            root.train()
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            weight = float(weights[items].sum())
            batches = [(trees.batch(m), weight) for m in distributed.mine(micro)]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "policy", batches, language_loss, compute, reads=TreeBatch.before_loss)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {"loss": sums["loss"], "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=f"loss {sums['loss']:.3f}")
            if heldout.items and session.eval_due(step):
                root.eval()
                session.extra["eval_loss"] = heldout_loss(root, heldout, settings.micro_tokens, compute)
                session.evaluated(step, {"eval_loss": session.extra["eval_loss"]})
                root.train()
        best = session.restore_best()
        metrics = dict(session.extra.get("last", {}))
        metrics |= {k: session.extra[k] for k in ("eval_loss", "first_eval_loss") if k in session.extra}
        metrics |= best

    root.eval()
    head = model.get_output_embeddings().weight
    answers = answer_facts(root, head, trees, template, settings.micro_tokens, compute)
    folder = Path(settings.out) / "model"
    model.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(model, template.tokenizer, folder, roles, "policy")
    facts = {
        "records": len(train_records),
        "heldout": len(heldout_records),
        **answers,
        "dropped": {**dataset.left_out, **trees.dropped},
        "origins": dataset.origins,
        **session.facts,
    }
    return TrainResult(folder, metrics, facts)
