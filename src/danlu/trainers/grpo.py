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
from danlu.exceptions import DataError, SettingsError
from danlu.generation.engine import LocalEngine
from danlu.losses.grpo import clipped_with_kl, group_advantages
from danlu.losses.policy import kl_k3
from danlu.models.load import load_model
from danlu.models.roles import SeparateModels, reference_model
from danlu.models.root import RootModel, TrunkOutput
from danlu.rewards.model import judge_of, values_of
from danlu.rewards.protocol import Reward, episodes_of
from danlu.rewards.verifiers import VERIFIERS, Verifier
from danlu.text.chat_template import ChatTemplate
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
from danlu.training.templates import template_facts, template_of, tokenizer_of
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
    """Everything that takes part: the root with policy and ref; the judges with their weights; the engine with its own model."""

    root: RootModel
    policy: Any
    judges: list[tuple[float, Reward]]
    engine: LocalEngine
    compute: Compute
    template: ChatTemplate


@within_limits
def train(settings: GrpoSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: there is nothing that scores answers.
        DataError: no prompt is left, or one cannot be verified.
        TrainingError: the policy has left the reference (max_kl) or the loss is no number.
    """
    distributed.start()
    template = template_of(settings.model, settings, stage="grpo")
    prompts, held_prompts, facts = prompts_of(settings, template)
    verifier = _verifier(settings, prompts)
    players = _players(settings, template, verifier)
    root, engine, compute, options = players.root, players.engine, players.compute, settings.grpo
    per_step = settings.rollout.batch // options.group_size
    total = settings.max_steps or max(1, round(settings.epochs * len(prompts) / per_step))
    trained = [p for p in root.parameters() if p.requires_grad]
    optimizer = optimizer_of(root, settings.learning_rate, settings)

    def scorer(asked: Sequence[EncodedPrompt], found: Sequence[Trajectory]) -> list[float]:
        return _scores(players, asked, found, options.missing_stop_penalty)

    with Session(settings, "grpo", total=total, module=root, optimizers={"optimizer": optimizer}) as session:
        heldout = Heldout(held_prompts, engine, root, settings, template, scorer)
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
            scores = scorer(asked, trajectories)
            parts, stats = _experience(players, trajectories, scores, settings)

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
        facts |= {"first": session.extra.get("first", {}), "judges": [judge.name for _, judge in players.judges]}
        facts |= {**template_facts(template), **session.facts}

    folder = Path(settings.out) / "model"
    players.policy.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(players.policy, template.tokenizer, folder, root.trunks, "policy")
    return TrainResult(folder, metrics, facts)


# -- who plays ----------------------------------------------------------------------------------------------------------


def _verifier(settings: GrpoSettings, prompts: Sequence[EncodedPrompt]) -> Verifier | None:
    """The verifier, if any prompt has something to verify by.

    Raises:
        SettingsError: there is neither a verifier nor a reward model.
        DataError: a prompt has nothing to be judged by, or wants a verifier that does not exist.
    """
    verifier = Verifier(settings.verifier)
    names = [verifier.of(p.reference) for p in prompts] if settings.verifier != "none" else []
    unknown = sorted(set(names) - {"", *VERIFIERS})
    if unknown:
        raise DataError(
            f"prompts want the verifier '{unknown[0]}', which does not exist",
            field="verifier",
            hint=f"known: {', '.join(VERIFIERS)}",
        )
    if not settings.reward_model:
        if not any(names):
            raise SettingsError(
                "nothing scores the answers: there is no reward model, and no prompt has a reference to verify by",
                field="reward_model",
                hint='train one with `danlu reward`, or give prompts like {"prompt": [...], "reference": '
                '{"verifier": "number", "answer": "72"}}',
            )
        if not all(names):
            raise DataError(
                f"{names.count('')} of {len(names)} prompts have no reference to verify by, and there is no reward model",
                field="reference",
                hint="leave these prompts out, or give --reward-model",
            )
    return verifier if any(names) else None


def _players(settings: GrpoSettings, template: ChatTemplate, verifier: Verifier | None) -> Players:
    path = resolve_model(settings.model)
    policy = load_model(path)
    compute = choose(Path(settings.out), settings.dtype, policy.config.hidden_size)
    engine = LocalEngine(copy.deepcopy(policy).to(compute.device), template.tokenizer)
    trunks: nn.Module
    if settings.adapter == "lora":
        trunks = lora_roles(policy, ["policy", "ref"], settings)
    else:
        trunks = SeparateModels({"policy": policy, "ref": reference_model(path, settings.ref_bits)}, ["policy"])
    root = shard(RootModel(trunks).to(compute.device).eval(), settings, compute)  # dropout stays off in RL
    judges: list[tuple[float, Reward]] = []
    if settings.reward_model:
        own = ChatTemplate(tokenizer_of(settings.reward_model, stage="grpo"), settings.template)
        judge_model = load_model(resolve_model(settings.reward_model), scalar=True)
        judge = judge_of(judge_model, own, template, micro_tokens=settings.micro_tokens, device=compute.device)
        judges.append((1.0, judge))
    if verifier is not None:
        judges.append((settings.verifier_weight, verifier))
    return Players(root, policy, judges, engine, compute, template)


# -- roll-outs ----------------------------------------------------------------------------------------------------------


def _scores(
    players: Players, prompts: Sequence[EncodedPrompt], trajectories: Sequence[Trajectory], missing_stop_penalty: float
) -> list[float]:
    """The judges' scores, weighted and added up, less the penalty for a missing stop token."""
    episodes = episodes_of(prompts, trajectories, players.template.decode)
    totals = [0.0 if e.finished else -missing_stop_penalty for e in episodes]
    for weight, judge in players.judges:
        with players.compute.autocast():
            values = values_of(distributed.share(episodes, judge.score), name=judge.name)
        totals = [total + weight * value for total, value in zip(totals, values, strict=True)]
    return totals


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
    for share in np.array_split(np.arange(len(groups)), settings.grpo.minibatches):
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
