"""Reward model (Bradley-Terry) on pairs or rankings: a scalar head on the trunk, read at the last token of each answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from danlu.alignment_config import RewardSettings
from danlu.data.collate import Trees, encode_comparisons, encode_rankings, require_items
from danlu.losses.preference import kwise, pairwise
from danlu.models.heads import head_of
from danlu.models.roles import AdapterRoles
from danlu.models.root import RootModel, TrunkOutput
from danlu.rewards.model import CONFIG_KEY
from danlu.training import distributed
from danlu.training.compute import Compute, choose
from danlu.training.interval import wilson
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import save_result
from danlu.training.session import Session
from danlu.training.setup import limits_of, plan_of, policy_roles, records_of
from danlu.training.sharding import shard, share_forwards, whole, whole_of
from danlu.training.step import TrainResult, accumulate, apply, batches_of
from danlu.training.templates import template_facts, template_of
from danlu.training.tokens import trees_of
from danlu.tree import TreeBatch

NORMALISER_PAIRS = 2000


class Answers(NamedTuple):
    """All answers of a batch: scores, ranks among the answers to one prompt (higher is better), and the prompt's node."""

    scores_A: Tensor
    ranks_A: Tensor
    prompts_A: Tensor


@within_limits
def train(settings: RewardSettings) -> TrainResult:
    """Trains and writes `out/model` (AutoModelForSequenceClassification); resumes from the last checkpoint in `out`."""
    distributed.start()
    template = template_of(settings.model, settings, stage="reward")
    ranked = settings.loss == "kwise"
    train_records, heldout_records, dataset = records_of(settings, "ranking" if ranked else "comparison")
    encode = encode_rankings if ranked else encode_comparisons
    trees = trees_of(encode, train_records, template, stage="reward", max_length=limits_of(settings))
    heldout = trees_of(encode, heldout_records, template, stage="reward", max_length=limits_of(settings))
    require_items(trees, "ranking" if ranked else "comparison", settings.max_length)
    lengths = trees.lengths
    steps = plan_of(lengths, settings)

    roles, model = policy_roles(settings, trained="reward")
    model.config.pad_token_id = template.tokenizer.pad_token_id
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    root = shard(RootModel(roles).to(compute.device).train(), settings, compute)
    optimizer = optimizer_of(root, settings.learning_rate, settings)

    def loss_fn(out: TrunkOutput, extra: tuple[Tensor | None, float]) -> tuple[Tensor, dict[str, float]]:
        margins, denominator = extra
        if ranked:
            return kwise(*answers_of(out), denominator, centring=settings.centring)
        chosen, rejected = pair_scores(out)
        margin = margins.to(chosen.device) if margins is not None else None
        return pairwise(chosen, rejected, denominator, margin_B=margin, centring=settings.centring)

    with Session(settings, "reward", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        if heldout.items and "first_eval_loss" not in session.extra:
            root.eval()
            session.extra["first_eval_loss"] = evaluate(root, heldout, settings.micro_tokens, compute)["eval_loss"]
            root.train()
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            pairs = float(len(items))
            batches = [
                (trees.batch(m), (torch.tensor([trees.margins[i] for i in m]) if settings.margin else None, pairs))
                for m in distributed.mine(micro)
            ]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "reward", batches, loss_fn, compute)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {
                "loss": sums["loss"],
                "accuracy": sums["right"] / pairs,
                "margin": sums["margin"] / pairs,
                "grad_norm": norm,
                "learning_rate": optimizer.param_groups[0]["lr"],
            }
            note = f"loss {sums['loss']:.3f} acc {metrics['accuracy']:.2f}"
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=note)
            if heldout.items and session.eval_due(step):
                root.eval()
                held = evaluate(root, heldout, settings.micro_tokens, compute)
                session.extra["held"] = held
                session.evaluated(step, held)
                root.train()
        best = session.restore_best()
        metrics = dict(session.extra.get("last", {}))
        metrics |= session.extra.get("held", {})
        metrics |= best
        if "first_eval_loss" in session.extra:
            metrics["first_eval_loss"] = session.extra["first_eval_loss"]

    root.eval()
    sample = _sample(trees, NORMALISER_PAIRS, settings.seed)
    scores = _all_answers(root, sample, settings.micro_tokens, compute).scores_A
    mean, std = float(scores.mean()), float(scores.std()) or 1.0
    folder = Path(settings.out) / "model"
    result = scalar_model(roles, model, settings) if isinstance(roles, AdapterRoles) else model
    setattr(result.config, CONFIG_KEY, {"mean": mean, "std": std})
    save_result(result, template.tokenizer, folder)
    facts = {
        "rankings" if ranked else "pairs": len(trees.items),
        "heldout_rankings" if ranked else "heldout_pairs": len(heldout.items),
        "score_mean": mean,
        "score_std": std,
        **template_facts(template),
        "dropped": {**dataset.left_out, **trees.dropped},
        "origins": dataset.origins,
        **session.facts,
    }
    return TrainResult(folder, metrics, facts)


def pair_scores(out: TrunkOutput) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected answers `[B]` of a batch of prompt -> {chosen, rejected} trees."""
    scores = out.scores(out.tree.node_end_N - 1)
    return scores[1::3], scores[2::3]


def answers_of(out: TrunkOutput) -> Answers:
    """The answers of a batch of pairs or rankings, in tree order."""
    answers = out.tree.node_parent_N >= 0
    ends = out.tree.node_end_N[answers] - 1
    return Answers(out.scores(ends), out.tree.loss_weight_T[ends], out.tree.node_parent_N[answers])


def _sample(trees: Trees, count: int, seed: int) -> Trees:
    """At most `count` items, drawn by seed: the mean of 4,000 scores is known to 0.02 of their standard deviation."""
    if len(trees.items) <= count:
        return trees
    chosen = sorted(np.random.default_rng([seed, 0x5C]).choice(len(trees.items), count, replace=False).tolist())
    return replace(trees, items=[trees.items[i] for i in chosen], margins=[])


def _all_answers(root: RootModel, trees: Trees, micro_tokens: int, compute: Compute) -> Answers:
    """Those of all items on the CPU, prompts numbered from 0."""

    def read(tree: TreeBatch) -> tuple[Tensor, Tensor, Tensor]:
        with compute.autocast():
            scores, ranks, nodes = root(tree.to(compute.device), "reward", answers_of)
        return scores.cpu(), ranks.cpu(), nodes.cpu().unique(return_inverse=True)[1]

    found: list[Answers] = []
    prompts = 0
    for scores, ranks, numbers in share_forwards(root, ["reward"], batches_of(trees, micro_tokens), read, compute):
        found.append(Answers(scores, ranks, numbers + prompts))
        prompts += int(numbers.max()) + 1
    return Answers(*(torch.cat(parts) for parts in zip(*found, strict=True)))


def evaluate(root: RootModel, trees: Trees, micro_tokens: int, compute: Compute) -> dict[str, float]:
    """Held-out loss, pair accuracy with its 95% interval (Wilson), mean margin, and correlation of score and answer length.

    Of a ranking the mean over its pairs counts, and its prompt as one trial of the interval: its pairs share their answers.
    """
    answers = _all_answers(root, trees, micro_tokens, compute)
    count = len(trees.items)
    loss, sums = kwise(*answers, float(count))
    accuracy = sums["right"] / count
    low, high = wilson(accuracy, count)
    batches = batches_of(trees, micro_tokens)
    lengths = torch.cat([(b.node_end_N - b.node_start_N)[b.node_parent_N >= 0] for b in batches])
    both = torch.stack([answers.scores_A.double(), lengths.double()])
    # With one length or one score there is nothing to correlate.
    flat = bool((both.std(dim=1) == 0).any())
    correlation = 0.0 if flat else float(np.corrcoef(both.numpy())[0, 1])
    return {
        "eval_loss": float(loss),
        "eval_accuracy": accuracy,
        "eval_accuracy_low": low,
        "eval_accuracy_high": high,
        "eval_margin": sums["margin"] / count,
        "eval_length_correlation": correlation,
    }


def scalar_model(roles: AdapterRoles, base: torch.nn.Module, settings: RewardSettings) -> torch.nn.Module:
    """An adapter and its head, merged into a sequence-classification model that others can load."""
    from danlu.models.load import load_model
    from danlu.training.runs import resolve_model

    merged = roles.merged("reward")
    model: torch.nn.Module = load_model(resolve_model(settings.model), scalar=True)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in whole_of(merged.items()):
            if name in own:
                own[name].copy_(value)
        head_of(model).get_parameter("weight").copy_(whole(roles.head("reward").get_parameter("weight")))
    model.config.pad_token_id = base.config.pad_token_id  # type: ignore[union-attr]
    return model
