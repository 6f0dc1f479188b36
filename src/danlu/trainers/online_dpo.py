"""Online DPO: the policy answers, a judge compares, and DPO learns from the best and the worst answer to each prompt.

Guo et al. 2024. With a group of two these are the paper's pairs. Where all answers to a prompt have one score there is nothing
to prefer: the prompt is left out of the step, and counted (`equal_groups`). A pair is one token tree, prompt -> {best, worst}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
from torch import Tensor

from danlu.alignment_config import GrpoSettings
from danlu.models.root import TrunkOutput
from danlu.trainers.players import Players, iterations_of, players_of, scorer_of, watch_of
from danlu.training import distributed
from danlu.training.groups import Drawn, draw, group_batches, read_groups, reading_stats, tree_of
from danlu.training.memory import within_limits
from danlu.training.methods import method_of
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.pairs import means, pair_logprobs, read_answers, reference_loss
from danlu.training.result import save_result
from danlu.training.rollouts import first_pass, prompts_of, push_weights, refuse_runaway
from danlu.training.session import Session
from danlu.training.step import TrainResult, accumulate, apply
from danlu.training.templates import template_facts, template_of
from danlu.tree import TreeBatch

# What a step without a pair reports: nothing was compared and nothing changed.
NO_PAIR = {
    "loss": 0.0,
    "accuracy": 0.5,
    "margin": 0.0,
    "chosen_reward": 0.0,
    "rejected_reward": 0.0,
    "chosen_logprob": 0.0,
    "rejected_logprob": 0.0,
    "grad_norm": 0.0,
}


@dataclass(frozen=True)
class Pairs:
    """A micro-batch of prompt -> {best, worst} trees, and what the reference says of both: `[B, 2]`."""

    tree: TreeBatch
    ref: Tensor


@within_limits
def train(settings: GrpoSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: there is nothing that scores answers.
        DataError: no prompt is left, or one cannot be verified.
        GateError: a reward model did not pass G-RM, and `follow_failed` is not set.
        TrainingError: the policy has left the reference (max_kl) or the loss is no number.
    """
    distributed.start()
    template = template_of(settings.model, settings, stage="online-dpo")
    prompts, heldout, facts = prompts_of(settings, template)
    players = players_of(settings, template, prompts)
    root, engine, compute, options = players.root, players.engine, players.compute, settings.grpo
    scorer, method, rule = scorer_of(players, settings), method_of(settings), settings.online_dpo
    total = iterations_of(settings, len(prompts))
    trained = [p for p in root.parameters() if p.requires_grad]
    optimizer = optimizer_of(root, settings.learning_rate, settings)

    def loss_fn(out: TrunkOutput, extra: tuple[Pairs, float]) -> tuple[Tensor, dict[str, float]]:
        batch, count = extra
        policy_B2 = pair_logprobs(out, settings.rollout.temperature)
        return reference_loss(rule.loss, policy_B2, batch.ref, count, rule.beta)

    with Session(settings, "online-dpo", total=total, module=root, optimizers={"optimizer": optimizer}) as session:
        watch = watch_of(players, heldout, scorer, settings, session)
        for step in session.steps():
            if session.cannot_draw(step):
                continue
            rate = settings.learning_rate * session.rate_factor(step) * watch.corrections["learning_rate"]
            set_rate(optimizer, rate)
            push_weights(engine, root, step)

            drawn = draw(engine, prompts, scorer, settings, template, step, method)
            minibatches = _pairs(players, drawn, settings)
            stats = {**drawn.stats, **reading_stats(read_groups(root, drawn, 1, settings, compute), None, compute)}
            stats["pairs"] = float(sum(count for _, count in minibatches))

            updates: list[dict[str, float]] = []
            for epoch in range(options.epochs):
                order = np.random.default_rng([settings.seed, step, epoch]).permutation(len(minibatches)).tolist()
                for index in order if epoch else range(len(minibatches)):
                    parts, count = minibatches[index]
                    batches = distributed.mine([(p.tree, (p, float(count))) for p in parts])
                    sums = accumulate(root, "policy", batches, loss_fn, compute, reads=TreeBatch.before_actions)
                    norm = apply(optimizer, trained, settings.max_grad_norm, session.judge(sums["loss"]))
                    updates.append({"loss": sums["loss"], **means(sums, float(count)), "grad_norm": norm})

            metrics = {**stats, **({k: fmean(u[k] for u in updates) for k in NO_PAIR} if updates else NO_PAIR)}
            if step == 0:  # policy and reference are one model still
                apart = abs(updates[0]["margin"]) / rule.beta if updates else 0.0
                session.extra["first"] = first_pass(0.0, {**stats, "kl": max(apart, abs(stats["kl"]))})
            metrics = watch.step(step, metrics | players.reward.metrics, drawn.trajectories, drawn.scores)
            note = f"score {stats['score']:.2f} kl {stats['kl']:.2f} acc {metrics['accuracy']:.2f}"
            session.log(step, metrics, tokens=int(stats["tokens"]), note=note)
            refuse_runaway(stats["kl"], options.max_kl, step, group="online_dpo", setting="beta")
            watch.evaluate(step)
        metrics, told = watch.outcome()
        facts |= {"method": settings.method, **players.reward.facts, **template_facts(template), **told}

    folder = Path(settings.out) / "model"
    players.leave()
    players.policy.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(players.policy, template.tokenizer, folder, root.trunks, "policy")
    return TrainResult(folder, metrics, facts)


def _pairs(players: Players, drawn: Drawn, settings: GrpoSettings) -> list[tuple[list[Pairs], int]]:
    """Mini-batches of micro-batches of pairs, and how many pairs each mini-batch has; none is empty.

    The reference is read in these very micro-batches, so that the first step compares equal numbers.
    """
    chosen = [pair for pair in (best_and_worst(drawn.scores, places) for places in drawn.groups) if pair is not None]
    compute, heat = players.compute, settings.rollout.temperature
    built: list[tuple[list[Pairs], int]] = []
    for share in np.array_split(np.arange(len(chosen)), settings.grpo.minibatches):
        if not len(share):
            continue
        batches = group_batches(drawn.trajectories, [chosen[n] for n in share], settings.micro_tokens, whole=True)
        trees = [tree_of(drawn.trajectories, batch) for batch in batches]
        refs = read_answers(
            players.root, "ref", trees, lambda tree: tree, compute, lambda out: pair_logprobs(out, heat)
        )
        parts = [Pairs(t.to(compute.device), r.to(compute.device)) for t, r in zip(trees, refs, strict=True)]
        built.append((parts, len(share)))
    return built


def best_and_worst(scores: Sequence[float], places: Sequence[int]) -> list[int] | None:
    """Of these places the first with the best and the first with the worst score; None where all are equal."""
    best, worst = max(places, key=lambda i: scores[i]), min(places, key=lambda i: scores[i])
    return [best, worst] if scores[best] > scores[worst] else None
