"""Pairwise reward model (Bradley-Terry): a scalar head on the trunk, read at the last token of each answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from danlu.config import RewardSettings
from danlu.data.collate import Trees, encode_comparisons, require_items
from danlu.data.packing import plan_steps
from danlu.losses.preference import pairwise
from danlu.models.load import save_model
from danlu.models.roles import AdapterRoles
from danlu.models.root import RootModel, TrunkOutput
from danlu.rewards.model import CONFIG_KEY
from danlu.training import distributed
from danlu.training.compute import Compute, choose
from danlu.training.optim import adamw, rate_factor, set_rate
from danlu.training.session import Session
from danlu.training.setup import limits_of, policy_roles, records_of
from danlu.training.step import TrainResult, accumulate, apply, batches_of
from danlu.training.templates import template_facts, template_of
from danlu.training.tokens import trees_of

NORMALISER_PAIRS = 2000


def train(settings: RewardSettings) -> TrainResult:
    """Trains and writes `out/model` (AutoModelForSequenceClassification); resumes from the last checkpoint in `out`."""
    distributed.start()
    template = template_of(settings.model, settings, stage="reward")
    train_records, heldout_records, dataset = records_of(settings, "comparison")
    trees = trees_of(encode_comparisons, train_records, template, stage="reward", max_length=limits_of(settings))
    heldout = trees_of(encode_comparisons, heldout_records, template, stage="reward", max_length=limits_of(settings))
    require_items(trees, "comparison", settings.max_length)
    lengths = trees.lengths
    steps = plan_steps(
        lengths,
        tokens_per_step=settings.tokens_per_step,
        micro_tokens=settings.micro_tokens,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
        ranks=distributed.world()[1],
    )

    roles, model = policy_roles(settings, trained="reward")
    model.config.pad_token_id = template.tokenizer.pad_token_id
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    root = RootModel(roles).to(compute.device).train()
    optimizer = adamw(root, settings.learning_rate, settings.weight_decay)

    def loss_fn(out: TrunkOutput, extra: tuple[Tensor, float]) -> tuple[Tensor, dict[str, float]]:
        margins, denominator = extra
        chosen, rejected = pair_scores(out)
        margin = margins.to(chosen.device) if settings.margin else None
        return pairwise(chosen, rejected, denominator, margin_B=margin, centring=settings.centring)

    metrics: dict[str, float] = {}
    with Session(settings, "reward", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        metrics = dict(session.extra.get("last", {}))
        if heldout.items and "first_eval_loss" not in session.extra:
            root.eval()
            session.extra["first_eval_loss"] = evaluate(root, heldout, settings.micro_tokens, compute)["eval_loss"]
            root.train()
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            pairs = float(len(items))
            batches = [
                (trees.batch(m), (torch.tensor([trees.margins[i] for i in m]), pairs)) for m in distributed.mine(micro)
            ]
            set_rate(optimizer, settings.learning_rate * rate_factor(step, len(steps), settings))
            sums = accumulate(root, "reward", batches, loss_fn, compute)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm)
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
        metrics |= session.extra.get("held", {})
        metrics |= best
        if "first_eval_loss" in session.extra:
            metrics["first_eval_loss"] = session.extra["first_eval_loss"]

    root.eval()
    sample = _sample(trees, NORMALISER_PAIRS, settings.seed)
    scores = torch.cat([torch.stack(s, 1).flatten() for s in _all_scores(root, sample, settings.micro_tokens, compute)])
    mean, std = float(scores.mean()), float(scores.std()) or 1.0
    folder = Path(settings.out) / "model"
    if distributed.is_main():
        result = scalar_model(roles, model, settings) if isinstance(roles, AdapterRoles) else model
        setattr(result.config, CONFIG_KEY, {"mean": mean, "std": std})
        save_model(result.to("cpu"), template.tokenizer, folder)
    facts = {
        "pairs": len(trees.items),
        "heldout_pairs": len(heldout.items),
        "score_mean": mean,
        "score_std": std,
        **template_facts(template),
        "dropped": {**dataset.left_out, **trees.dropped},
        "origins": dataset.origins,
    }
    return TrainResult(folder, metrics, facts)


def pair_scores(out: TrunkOutput) -> tuple[Tensor, Tensor]:
    """Scores of chosen and rejected answers `[B]` of a batch of prompt -> {chosen, rejected} trees."""
    scores = out.scores(out.tree.node_end_N - 1)
    return scores[1::3], scores[2::3]


def _sample(trees: Trees, count: int, seed: int) -> Trees:
    """At most `count` items, drawn by seed: the mean of 4,000 scores is known to 0.02 of their standard deviation."""
    if len(trees.items) <= count:
        return trees
    chosen = sorted(np.random.default_rng([seed, 0x5C]).choice(len(trees.items), count, replace=False).tolist())
    return replace(trees, items=[trees.items[i] for i in chosen], margins=[trees.margins[i] for i in chosen])


@torch.no_grad()
def _all_scores(root: RootModel, trees: Trees, micro_tokens: int, compute: Compute) -> list[tuple[Tensor, Tensor]]:
    found = []
    for tree in batches_of(trees, micro_tokens):
        with compute.autocast():
            chosen, rejected = root(tree.to(compute.device), "reward", pair_scores)
        found.append((chosen.cpu(), rejected.cpu()))
    return found


@torch.no_grad()
def evaluate(root: RootModel, trees: Trees, micro_tokens: int, compute: Compute) -> dict[str, float]:
    """Held-out loss, pair accuracy with its 95% interval (Wilson), mean margin, and correlation of score and answer length."""
    pairs = _all_scores(root, trees, micro_tokens, compute)
    chosen, rejected = torch.cat([c for c, _ in pairs]), torch.cat([r for _, r in pairs])
    loss, sums = pairwise(chosen, rejected, float(chosen.numel()))
    count = chosen.numel()
    accuracy = sums["right"] / count
    low, high = wilson(accuracy, count)
    lengths = torch.cat([(b.node_end_N - b.node_start_N).view(-1, 3)[:, 1:] for b in batches_of(trees, micro_tokens)])
    scores = torch.stack([chosen, rejected], 1)
    both = torch.stack([scores.flatten().double(), lengths.flatten().double()])
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


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a share of `count` trials (Wilson 1927)."""
    centre = share + z * z / (2 * count)
    spread = z * ((share * (1 - share) + z * z / (4 * count)) / count) ** 0.5
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def scalar_model(roles: AdapterRoles, base: torch.nn.Module, settings: RewardSettings) -> torch.nn.Module:
    """An adapter and its head, merged into a sequence-classification model that others can load."""
    from danlu.models.load import load_model
    from danlu.training.runs import resolve_model

    merged = roles.merged("reward")
    model: torch.nn.Module = load_model(resolve_model(settings.model), scalar=True)
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in merged.items():
            if name in own:
                own[name].copy_(value)
        from danlu.models.roles import head_of

        head_of(model).weight.copy_(roles.head("reward").weight)
    model.config.pad_token_id = base.config.pad_token_id  # type: ignore[union-attr]
    return model
