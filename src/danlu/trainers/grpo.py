"""GRPO: several answers to each prompt, scored; what is better than its group becomes likelier; no critic. One visible loop.

Shao et al. 2024 (DeepSeekMath), section 4.1, and what became of it (`training/methods.py`): the same loop with another
baseline, average, ratio or place of the KL. A group is one token tree, prompt -> {response} * G; old log-probs are the
trainer's own, computed on the very batches that are trained on. What the engine's own differ from them is weighed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from danlu.alignment_config import GrpoSettings
from danlu.losses.advantages import whiten
from danlu.losses.baselines import group_advantages, leave_one_out, returns_to_go
from danlu.losses.grpo import clipped_with_kl
from danlu.losses.policy import importance
from danlu.models.root import TrunkOutput
from danlu.trainers.players import Players, iterations_of, players_of, scorer_of, watch_of
from danlu.training import distributed
from danlu.training.groups import Drawn, Reading, draw, read_groups, reading_stats
from danlu.training.logprobs import logprobs
from danlu.training.memory import within_limits
from danlu.training.methods import Method, method_of
from danlu.training.natural import look, policy_optimizer
from danlu.training.optim import set_rate
from danlu.training.result import save_result
from danlu.training.rollouts import first_pass, prompts_of, push_weights, refuse_runaway
from danlu.training.session import Session
from danlu.training.step import TrainResult, accumulate, apply
from danlu.training.templates import template_facts, template_of
from danlu.tree import TreeBatch


@dataclass(frozen=True)
class Experience:
    """A micro-batch of answers with what the loss needs; tensors hold one number per action token, in tree order.

    Attributes:
        answers: the number of the token's answer within the micro-batch.
        importance: None: no weights.
    """

    tree: TreeBatch
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    answers: Tensor
    importance: Tensor | None


@dataclass(frozen=True)
class Minibatch:
    """What one optimizer step sees.

    Attributes:
        denominator: what its loss is divided by; total_weight: the sum of its tokens' weights.
    """

    parts: list[Experience]
    denominator: float
    total_weight: float


@within_limits
def train(settings: GrpoSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: there is nothing that scores answers.
        DataError: no prompt is left, or one cannot be verified.
        GateError: a reward model did not pass G-RM, and `follow_failed` is not set.
        RewardError: answers could not be scored (more than max_failed).
        TrainingError: the policy has left the reference (max_kl) or the loss is no number.
    """
    distributed.start()
    template = template_of(settings.model, settings, stage="grpo")
    prompts, heldout, facts = prompts_of(settings, template)
    players, method = players_of(settings, template, prompts), method_of(settings)
    if distributed.is_main():
        print(f"grpo: {settings.method}: {method}", file=sys.stderr)
    root, engine, compute, options = players.root, players.engine, players.compute, settings.grpo
    scorer = scorer_of(players, settings)
    total = iterations_of(settings, len(prompts))
    named = {n: p for n, p in root.named_parameters() if p.requires_grad}
    optimizer = policy_optimizer(players.policy, named, settings.learning_rate, settings)
    trained = [p for p in root.parameters() if p.requires_grad]

    with Session(settings, "grpo", total=total, module=root, optimizers={"optimizer": optimizer}) as session:
        watch = watch_of(players, heldout, scorer, settings, session)
        for step in session.steps():
            if session.cannot_draw(step):
                continue
            corrections = watch.corrections
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step) * corrections["learning_rate"])
            held_back = replace(method, kl_coef=method.kl_coef * corrections["kl_coef"])
            push_weights(engine, root, step)

            drawn = draw(engine, prompts, scorer, settings, template, step, method)
            minibatches, stats = _experience(players, drawn, settings, held_back)
            trees = (e.tree for m in minibatches for e in m.parts)
            look(optimizer, players.policy, root, trees, compute)

            updates: list[dict[str, float]] = []
            for epoch in range(options.epochs):
                order = np.random.default_rng([settings.seed, step, epoch]).permutation(len(minibatches)).tolist()
                for index in order if epoch else range(len(minibatches)):
                    minibatch = minibatches[index]
                    batches = distributed.mine([(e.tree, (e, minibatch)) for e in minibatch.parts])
                    sums = accumulate(
                        root, "policy", batches, _loss(settings, held_back), compute, reads=TreeBatch.before_actions
                    )
                    norm = apply(optimizer, trained, settings.max_grad_norm, session.judge(sums["loss"]))
                    updates.append({**sums, "grad_norm": norm})

            metrics = {**stats, **_over_updates(updates), "ratio_error_first": updates[0]["ratio_error"]}
            if step == 0:
                session.extra["first"] = first_pass(updates[0]["ratio_error"], stats)
            metrics = watch.step(step, metrics | players.reward.metrics, drawn.trajectories, drawn.scores)
            note = f"score {stats['score']:.2f} kl {stats['kl']:.2f} len {stats['length']:.0f}"
            session.log(step, metrics, tokens=int(stats["tokens"]), note=note)
            refuse_runaway(stats["kl"], options.max_kl, step, group="grpo")
            watch.evaluate(step)
        metrics, told = watch.outcome()
        facts |= {"method": settings.method, "switches": method.facts()}
        facts |= {**players.reward.facts, **template_facts(template), **told}

    folder = Path(settings.out) / "model"
    players.leave()
    players.policy.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(players.policy, template.tokenizer, folder, root.trunks, "policy")
    return TrainResult(folder, metrics, facts)


# -- from scores to advantages ------------------------------------------------------------------------------------------


def _experience(
    players: Players, drawn: Drawn, settings: GrpoSettings, method: Method
) -> tuple[list[Minibatch], dict[str, float]]:
    """Mini-batches with advantages and weights, and the iteration's statistics."""
    clip = settings.grpo.importance_clip
    readings = read_groups(players.root, drawn, settings.grpo.minibatches, settings, players.compute)
    advantages = _advantages(drawn, readings, method)
    device = players.compute.device

    built: list[Minibatch] = []
    for minibatch in readings:
        answers, actions = sum(len(r.answers) for r in minibatch), sum(sum(r.lengths) for r in minibatch)
        parts: list[Experience] = []
        for r in minibatch:
            lengths = torch.tensor(r.lengths)
            weights = 1 / lengths if method.loss_average == "sequence" else torch.ones(len(r.lengths))
            weighed = importance(r.old, r.sampled, clip).to(device) if clip is not None else None
            part = Experience(
                tree=r.tree.to(device),
                old_logprobs=r.old.to(device),
                ref_logprobs=r.ref.to(device),
                advantages=torch.cat([advantages[i] for i in r.answers]).to(device),
                weights=weights.repeat_interleave(lengths).to(device),
                answers=torch.arange(len(r.lengths)).repeat_interleave(lengths).to(device),
                importance=weighed,
            )
            parts.append(part)
        denominator = {
            "sequence": answers,
            "token": actions,
            "constant": answers * settings.rollout.max_new_tokens,
            "sum": answers,
        }[method.loss_average]
        total_weight = answers if method.loss_average == "sequence" else actions
        built.append(Minibatch(parts, float(denominator), float(total_weight)))

    spread = torch.cat([advantages[i] for i in sorted(advantages)]).double().std(correction=0)
    stats = {**drawn.stats, **reading_stats(readings, clip, players.compute), "advantage_std": float(spread)}
    if method.kl_in == "reward":
        stats["reward_total"] = stats["score"] - method.kl_coef * stats["kl"]
    return built, stats


def _advantages(drawn: Drawn, readings: Sequence[Sequence[Reading]], method: Method) -> dict[int, Tensor]:
    """One number per action token of each answer: what its score, less the KL if that is in the reward, is above the baseline."""
    log_ratios = {
        i: part for m in readings for r in m for i, part in zip(r.answers, r.parts(r.old - r.ref), strict=True)
    }
    kl_coef = method.kl_coef if method.kl_in == "reward" else 0.0
    order = sorted(log_ratios)
    if method.advantage == "batch":
        returns = [returns_to_go(drawn.scores[i], log_ratios[i], kl_coef=kl_coef) for i in order]
        return dict(zip(order, whiten(returns), strict=True))
    rewards = [drawn.scores[i] - (kl_coef * float(log_ratios[i].sum()) if kl_coef else 0.0) for i in order]
    above: dict[int, float] = {}
    for places in drawn.groups:
        of_group = [rewards[i] for i in places]
        if method.advantage == "leave-one-out":
            found = leave_one_out(of_group)
        else:
            found = group_advantages(of_group, scale=method.advantage == "group")
        above |= dict(zip(places, found, strict=True))
    spread = [torch.full((len(log_ratios[i]),), above[i], dtype=torch.float32) for i in order]
    return dict(zip(order, whiten(spread) if method.advantage == "group-batch" else spread, strict=True))


# -- loss ---------------------------------------------------------------------------------------------------------------


def _loss(
    settings: GrpoSettings, method: Method
) -> Callable[[TrunkOutput, tuple[Experience, Minibatch]], tuple[Tensor, dict[str, float]]]:
    def loss_fn(out: TrunkOutput, extra: tuple[Experience, Minibatch]) -> tuple[Tensor, dict[str, float]]:
        batch, minibatch = extra
        logp, _ = logprobs(out, out.tree.action_index(), settings.rollout.temperature)
        return clipped_with_kl(
            logp,
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.advantages,
            batch.weights,
            minibatch.denominator,
            clip_range=method.clip_range,
            clip_range_high=method.clip_range_high,
            kl_coef=method.kl_coef if method.kl_in == "loss" else 0.0,
            kl_estimator=method.kl_estimator,
            answer_T=batch.answers if method.ratio == "sequence" else None,
            importance_T=batch.importance,
            total_weight=minibatch.total_weight,
        )

    return loss_fn


def _over_updates(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over an iteration's updates; of `ratio_max` the greatest."""
    return {k: fmean(r[k] for r in rows) for k in rows[0]} | {"ratio_max": max(r["ratio_max"] for r in rows)}
