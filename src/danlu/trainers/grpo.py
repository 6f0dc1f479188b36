"""GRPO: several answers to each prompt, scored; what is better than its group becomes likelier; no critic. One visible loop.

Shao et al. 2024 (DeepSeekMath), section 4.1. A group is one token tree, prompt -> {response} * G; old log-probs are the
trainer's own, computed on the very batches that are trained on; the KL to the reference is part of the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from danlu.alignment_config import GrpoSettings
from danlu.data.collate import EncodedPrompt
from danlu.data.packing import micro_batches
from danlu.exceptions import RewardError
from danlu.generation.engine import LocalEngine
from danlu.losses.grpo import clipped_with_kl, group_advantages
from danlu.losses.policy import kl_k3
from danlu.models.load import load_model
from danlu.models.roles import SeparateModels, reference_model
from danlu.models.root import RootModel, TrunkOutput
from danlu.rewards.combine import Combined
from danlu.text.chat_template import ChatTemplate
from danlu.trainers import scoring
from danlu.training import distributed
from danlu.training.compute import Compute, choose
from danlu.training.health import Health
from danlu.training.heldout import Heldout
from danlu.training.logprobs import logprobs
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import save_result
from danlu.training.rollouts import (
    prompt_order,
    prompts_of,
    push_weights,
    read_actions,
    refuse_runaway,
    sampling_of,
    share_rollout,
)
from danlu.training.runs import resolve_model
from danlu.training.session import Session
from danlu.training.setup import lora_roles
from danlu.training.sharding import shard, share_forwards
from danlu.training.step import TrainResult, accumulate, apply
from danlu.training.templates import template_facts, template_of
from danlu.training.text_signs import text_signs
from danlu.tree import Trajectory, TreeBatch, forest, group


@dataclass(frozen=True)
class Experience:
    """A micro-batch of answers with what the loss needs; tensors hold one number per action token, in tree order."""

    tree: TreeBatch
    old_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Players:
    """Everything that takes part: the root with policy and ref; what scores answers; the engine with its own model."""

    root: RootModel
    policy: Any
    reward: Combined
    engine: LocalEngine
    compute: Compute
    template: ChatTemplate


@within_limits
def train(settings: GrpoSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: there is nothing that scores answers.
        DataError: no prompt is left, or one cannot be verified.
        RewardError: answers could not be scored (more than max_failed).
        TrainingError: the policy has left the reference (max_kl) or the loss is no number.
    """
    distributed.start()
    template = template_of(settings.model, settings, stage="grpo")
    prompts, held_prompts, facts = prompts_of(settings, template)
    players = _players(settings, template, prompts)
    root, engine, compute, options = players.root, players.engine, players.compute, settings.grpo
    per_step = settings.rollout.batch // options.group_size
    total = settings.max_steps or max(1, round(settings.epochs * len(prompts) / per_step))
    trained = [p for p in root.parameters() if p.requires_grad]
    optimizer = optimizer_of(root, settings.learning_rate, settings)

    def scorer(asked: Sequence[EncodedPrompt], found: Sequence[Trajectory]) -> list[float | None]:
        return _scores(players, asked, found, settings)

    gold = scoring.gold_for(settings, template, compute)
    with Session(settings, "grpo", total=total, module=root, optimizers={"optimizer": optimizer}) as session:
        heldout = Heldout(held_prompts, engine, root, settings, template, scorer, gold)
        heldout.begin(session)
        health = Health(settings.health, session)
        for step in session.steps():
            corrections = health.corrections
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step) * corrections["learning_rate"])
            loss_fn = _loss(settings, options.kl_coef * corrections["kl_coef"])
            push_weights(engine, root, step)

            chosen = prompt_order(len(prompts), per_step, step, settings.seed)
            asked = [prompts[i] for i in chosen for _ in range(options.group_size)]
            params = sampling_of(settings, template)
            trajectories = share_rollout(engine, [p.ids for p in asked], params, seed=settings.seed, step=step)
            trajectories, scores = _whole_groups(trajectories, scorer(asked, trajectories), options.group_size)
            parts, stats = _experience(players, trajectories, scores, settings)
            stats |= players.reward.metrics

            updates: list[dict[str, float]] = []
            for epoch in range(options.epochs):
                order = np.random.default_rng([settings.seed, step, epoch]).permutation(len(parts)).tolist()
                for index in order if epoch else range(len(parts)):
                    minibatch, denominator = parts[index]
                    batches = distributed.mine([(e.tree, (e, denominator)) for e in minibatch])
                    sums = accumulate(root, "policy", batches, loss_fn, compute)
                    norm = apply(optimizer, trained, settings.max_grad_norm, session.judge(sums["loss"]))
                    updates.append({**sums, "grad_norm": norm})

            metrics = {**stats, **_mean(updates), "ratio_error_first": updates[0]["ratio_error"]}
            metrics |= text_signs([t.actions for t in trajectories], template.stop_ids)
            health.watch(step, metrics)
            if step == 0:
                session.extra["first"] = {"ratio_error": updates[0]["ratio_error"], "kl": abs(stats["kl"])}
            note = f"score {stats['score']:.2f} kl {stats['kl']:.2f} len {stats['length']:.0f}"
            session.log(step, metrics, tokens=int(stats["tokens"]), note=note)
            refuse_runaway(stats["kl"], options.max_kl, step, group="grpo")
            if heldout.prompts and session.eval_due(step):
                held = heldout.evaluate(session, step)
                session.extra["held"] = held
                session.evaluated(step, held)
                health.evaluated(step, held)
        best = session.restore_best()
        metrics = dict(session.extra.get("last", {}))
        metrics |= session.extra.get("held", {})
        metrics |= best
        start = session.extra.get("start", {}).get("metrics", {})
        if start:
            metrics["first_eval_score"] = start["eval_score"]
        facts |= {"start": start, "health": health.facts()}
        facts |= {"first": session.extra.get("first", {}), **players.reward.facts}
        facts |= {**template_facts(template), **session.facts}

    folder = Path(settings.out) / "model"
    players.policy.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(players.policy, template.tokenizer, folder, root.trunks, "policy")
    return TrainResult(folder, metrics, facts)


# -- who plays ----------------------------------------------------------------------------------------------------------


def _players(settings: GrpoSettings, template: ChatTemplate, prompts: Sequence[EncodedPrompt]) -> Players:
    path = resolve_model(settings.model)
    policy = load_model(path)
    compute = choose(Path(settings.out), settings.dtype, policy.config.hidden_size)
    reward = scoring.rewards_for(settings, template, prompts, compute, stage="grpo")
    engine = LocalEngine(copy.deepcopy(policy).to(compute.device), template.tokenizer)
    trunks: nn.Module
    if settings.adapter == "lora":
        trunks = lora_roles(policy, ["policy", "ref"], settings)
    else:
        trunks = SeparateModels({"policy": policy, "ref": reference_model(path, settings.ref_bits)}, ["policy"])
    root = shard(RootModel(trunks).to(compute.device).eval(), settings, compute)  # dropout stays off in RL
    return Players(root, policy, reward, engine, compute, template)


# -- roll-outs ----------------------------------------------------------------------------------------------------------


def _scores(
    players: Players, prompts: Sequence[EncodedPrompt], trajectories: Sequence[Trajectory], settings: GrpoSettings
) -> list[float | None]:
    """The rewards' sum less the penalty for a missing stop token; None for an answer that could not be scored."""
    raw = scoring.score(players.reward, prompts, trajectories, players.template, players.compute, settings.out)
    penalty = settings.grpo.missing_stop_penalty
    return [None if v is None else v - (0.0 if t.finished else penalty) for v, t in zip(raw, trajectories, strict=True)]


def _whole_groups(
    trajectories: Sequence[Trajectory], scores: Sequence[float | None], size: int
) -> tuple[list[Trajectory], list[float]]:
    """Without the groups in which an answer has no score: what is better than its group cannot be told there.

    Raises:
        RewardError: no group is left.
    """
    starts = range(0, len(scores), size)
    kept = [i for start in starts if None not in scores[start : start + size] for i in range(start, start + size)]
    if not kept:
        raise RewardError(
            "every group has an answer without a score",
            hint="lower max_failed: then the run stops at the first failure",
        )
    return [trajectories[i] for i in kept], [s for i in kept if (s := scores[i]) is not None]


def _experience(
    players: Players, trajectories: Sequence[Trajectory], scores: Sequence[float], settings: GrpoSettings
) -> tuple[list[tuple[list[Experience], float]], dict[str, float]]:
    """Trajectories as mini-batches of micro-batches, each with its denominator, and the iteration's statistics."""
    size, by_token = settings.grpo.group_size, settings.grpo.loss_average == "token"
    groups = [range(start, start + size) for start in range(0, len(trajectories), size)]
    advantages = [a for g in groups for a in group_advantages([scores[i] for i in g])]

    def read(tree: TreeBatch) -> tuple[Tensor, Tensor, Tensor]:
        heat = settings.rollout.temperature
        old, entropies = read_actions(players.root, "policy", tree, players.compute, temperature=heat, entropy=True)
        ref, _ = read_actions(players.root, "ref", tree, players.compute, temperature=heat)
        return old, entropies, ref

    built: list[tuple[list[Experience], float]] = []
    entropy = gap = kl = k3 = 0.0
    for share in np.array_split(np.arange(len(groups)), min(settings.grpo.minibatches, len(groups))):
        batches = _batches(trajectories, [groups[g] for g in share], settings.micro_tokens)
        trees = [TreeBatch.of(forest(group([trajectories[i] for i in piece]) for piece in b)) for b in batches]
        found = share_forwards(players.root, ["policy", "ref"], trees, read, players.compute)
        minibatch: list[Experience] = []
        tokens = 0
        for pieces, tree, (old, entropies, ref) in zip(batches, trees, found, strict=True):
            answers = [i for piece in pieces for i in piece]
            lengths = torch.tensor([len(trajectories[i].actions) for i in answers])
            wins = torch.tensor([advantages[i] for i in answers])
            weights = torch.ones(len(answers)) if by_token else 1 / lengths
            sampled = torch.tensor([p for i in answers for p in trajectories[i].logprobs])
            tokens += int(lengths.sum())
            entropy += float(entropies.sum())
            gap = max(gap, float((sampled - old).abs().max()))
            kl += float((old - ref).sum())
            k3 += float(kl_k3(old, ref).sum())
            tensors = old, ref, wins.repeat_interleave(lengths), weights.repeat_interleave(lengths)
            device = players.compute.device
            minibatch.append(Experience(tree.to(device), *(x.to(device) for x in tensors)))
        built.append((minibatch, float(tokens if by_token else size * len(share))))

    count, actions = len(trajectories), sum(len(t.actions) for t in trajectories)
    stats = {
        "score": fmean(scores),
        "score_std": pstdev(scores),
        "equal_groups": fmean(len({scores[i] for i in g}) == 1 for g in groups),
        "kl": kl / count,
        "kl_k3": k3 / count,
        "entropy": entropy / actions,
        "length": actions / count,
        "stop_rate": fmean(t.finished for t in trajectories),
        "engine_gap": gap,
        "tokens": float(sum(len(trajectories[g[0]].prompt) for g in groups) + actions),
    }
    return built, stats


def _batches(
    trajectories: Sequence[Trajectory], groups: Sequence[Sequence[int]], micro_tokens: int
) -> list[list[list[int]]]:
    """Micro-batches of groups; a group is cut, with the prompt in each piece, where it is longer than a micro-batch."""
    pieces = [piece for g in groups for piece in _pieces(trajectories, g, micro_tokens)]
    sizes = [_tokens(trajectories, piece) for piece in pieces]
    cut = micro_batches(range(len(pieces)), sizes, micro_tokens, ranks=distributed.world()[1])
    return [[pieces[place] for place in batch] for batch in cut]


def _pieces(trajectories: Sequence[Trajectory], members: Sequence[int], micro_tokens: int) -> list[list[int]]:
    """A group as it is where a micro-batch holds it, else in several parts."""
    pieces: list[list[int]] = [[]]
    for member in members:
        if pieces[-1] and _tokens(trajectories, [*pieces[-1], member]) > micro_tokens:
            pieces.append([])
        pieces[-1].append(member)
    return pieces


def _tokens(trajectories: Sequence[Trajectory], piece: Sequence[int]) -> int:
    """Of a tree with the prompt and these answers."""
    tails = sum(len(s.ids) for i in piece for s in trajectories[i].segments[1:])
    return len(trajectories[piece[0]].prompt) + tails


# -- loss ---------------------------------------------------------------------------------------------------------------


def _loss(
    settings: GrpoSettings, kl_coef: float
) -> Callable[[TrunkOutput, tuple[Experience, float]], tuple[Tensor, dict[str, float]]]:
    def loss_fn(out: TrunkOutput, extra: tuple[Experience, float]) -> tuple[Tensor, dict[str, float]]:
        batch, denominator = extra
        logp, _ = logprobs(out, out.tree.action_index(), settings.rollout.temperature)
        return clipped_with_kl(
            logp,
            batch.old_logprobs,
            batch.ref_logprobs,
            batch.advantages,
            batch.weights,
            denominator,
            clip_range=settings.grpo.clip_range,
            kl_coef=kl_coef,
        )

    return loss_fn


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {k: fmean(r[k] for r in rows) for k in rows[0]}
