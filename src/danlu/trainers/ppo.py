"""PPO: roll out, score, compare with the reference, estimate advantages, update policy and critic; one visible loop.

Schulman et al. 2017 as Ouyang et al. 2022 apply it to language models: reward per token = -kl_coef * KL, plus the score at
the last action; old log-probs are the trainer's own, computed on the very batches that are trained on.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from danlu.alignment_config import PpoSettings
from danlu.data.collate import EncodedPrompt
from danlu.data.packing import micro_batches
from danlu.exceptions import SettingsError
from danlu.generation.engine import LocalEngine
from danlu.losses.advantages import gae, token_rewards, whiten
from danlu.losses.policy import clipped_policy, kl_k3
from danlu.losses.value import clipped_value
from danlu.models.load import load_model
from danlu.models.roles import SeparateModels, reference_model
from danlu.models.root import RootModel, TrunkOutput
from danlu.rewards.model import ModelReward, fold_normaliser, judge_of, values_of
from danlu.rewards.protocol import episodes_of
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
from danlu.tree import Trajectory, TreeBatch, forest


@dataclass(frozen=True)
class Experience:
    """A micro-batch of trajectories with what the losses need; tensors hold one number per action token, in tree order."""

    tree: TreeBatch
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    lengths: list[int]

    @property
    def actions(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True)
class Players:
    """Everything that takes part: the root with policy, ref and critic; the judge; the engine with its own weights."""

    root: RootModel
    policy: Any
    reward: ModelReward
    engine: LocalEngine
    compute: Compute
    template: ChatTemplate


@within_limits
def train(settings: PpoSettings) -> TrainResult:
    """Trains and writes `out/model` (the policy); resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: no reward model is given.
        DataError: no prompt is left.
        TrainingError: the policy has left the reference (max_kl) or the loss is no number.
    """
    distributed.start()
    if not settings.reward_model:
        raise SettingsError("no reward model is given", field="reward_model", hint="train one with `danlu reward`")
    template = template_of(settings.model, settings, stage="ppo")
    prompts, held_prompts, facts = prompts_of(settings, template)
    players = _players(settings, template)
    root, engine, compute, options = players.root, players.engine, players.compute, settings.ppo
    total = settings.max_steps or max(1, round(settings.epochs * len(prompts) / settings.rollout.batch))
    policy = [p for n, p in root.named_parameters() if p.requires_grad and not _is_critic(n)]
    critic = [p for n, p in root.named_parameters() if p.requires_grad and _is_critic(n)]
    actor_optimizer = optimizer_of(nn.ParameterList(policy), settings.learning_rate, settings)
    critic_optimizer = optimizer_of(nn.ParameterList(critic), options.critic_learning_rate, settings)
    optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}

    def scorer(asked: Sequence[EncodedPrompt], found: Sequence[Trajectory]) -> list[float]:
        return _scores(players, asked, found, settings)

    with Session(settings, "ppo", total=total, module=root, optimizers=optimizers) as session:
        heldout = Heldout(held_prompts, engine, root, settings, template, scorer)
        heldout.begin(session)
        health = Health(settings.health, session)
        for step in session.steps():
            corrections = health.corrections
            factor = session.rate_factor(step) * corrections["learning_rate"]
            set_rate(actor_optimizer, settings.learning_rate * factor)
            set_rate(critic_optimizer, options.critic_learning_rate * factor)
            push_weights(engine, root, step)

            asked = [prompts[i] for i in prompt_order(len(prompts), settings.rollout.batch, step, settings.seed)]
            params = sampling_of(settings, template)
            trajectories = share_rollout(engine, [p.ids for p in asked], params, seed=settings.seed, step=step)
            scores = scorer(asked, trajectories)
            kl_coef = options.kl_coef * corrections["kl_coef"]
            parts, stats = _experience(players, trajectories, scores, settings, kl_coef)

            updates: list[dict[str, float]] = []
            for epoch in range(options.epochs):
                order = np.random.default_rng([settings.seed, step, epoch]).permutation(len(parts)).tolist()
                for index in order if epoch else range(len(parts)):
                    minibatch = parts[index]
                    actions = float(sum(e.actions for e in minibatch))
                    batches = distributed.mine([(e.tree, (e, actions)) for e in minibatch])
                    actor = accumulate(root, "policy", batches, _policy_loss(settings), compute)
                    judge = session.judge(actor["loss"], "policy")
                    norm = apply(actor_optimizer, policy, settings.max_grad_norm, judge)
                    value = accumulate(root, "critic", batches, _value_loss(settings), compute)
                    judge = session.judge(value["loss"], "critic")
                    apply(critic_optimizer, critic, settings.max_grad_norm, judge)
                    updates.append(
                        {**actor, "value_loss": value["loss"], "value_error": value["value_error"], "grad_norm": norm}
                    )

            metrics = {**stats, **_mean(updates), "ratio_error_first": updates[0]["ratio_error"]}
            metrics |= text_signs([t.actions for t in trajectories], template.stop_ids)
            health.watch(step, metrics)
            if step == 0:
                session.extra["first"] = {"ratio_error": updates[0]["ratio_error"], "kl": abs(stats["kl"])}
            note = f"reward {stats['score']:.2f} kl {stats['kl']:.2f} len {stats['length']:.0f}"
            session.log(step, metrics, tokens=int(stats["tokens"]), note=note)
            refuse_runaway(stats["kl"], options.max_kl, step, group="ppo")
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
        facts |= {"first": session.extra.get("first", {}), **template_facts(template), **session.facts}

    folder = Path(settings.out) / "model"
    players.policy.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(players.policy, template.tokenizer, folder, root.trunks, "policy")
    return TrainResult(folder, metrics, facts)


# -- who plays ----------------------------------------------------------------------------------------------------------


def _players(settings: PpoSettings, template: ChatTemplate) -> Players:
    path = resolve_model(settings.model)
    reward_path = resolve_model(settings.reward_model)
    policy = load_model(path)
    compute = choose(Path(settings.out), settings.dtype, policy.config.hidden_size)
    engine = LocalEngine(copy.deepcopy(policy).to(compute.device), template.tokenizer)
    judge_model = load_model(reward_path, scalar=True)
    trunks: nn.Module
    if settings.adapter == "lora":
        trunks = lora_roles(policy, ["policy", "ref", "critic"], settings, trained=["policy", "critic"])
    else:
        # The critic starts from the reward model if that has the policy's shape (arXiv 2403.17031), else from the policy.
        same = judge_model.config.to_dict().get("hidden_size") == policy.config.to_dict().get("hidden_size") and (
            judge_model.config.vocab_size == policy.config.vocab_size
        )
        critic = load_model(reward_path if same else path, scalar=True)
        if same:
            fold_normaliser(critic)
        ref = reference_model(path, settings.ref_bits)
        trunks = SeparateModels({"policy": policy, "ref": ref, "critic": critic}, ["policy", "critic"])
    root = shard(RootModel(trunks).to(compute.device).eval(), settings, compute)  # dropout stays off in RL
    own = ChatTemplate(tokenizer_of(settings.reward_model, stage="ppo"), settings.template)
    judge = judge_of(judge_model, own, template, micro_tokens=settings.micro_tokens, device=compute.device)
    return Players(root, policy, judge, engine, compute, template)


def _is_critic(name: str) -> bool:
    return ".critic." in name


# -- roll-outs ----------------------------------------------------------------------------------------------------------


def _scores(
    players: Players, prompts: Sequence[EncodedPrompt], trajectories: Sequence[Trajectory], settings: PpoSettings
) -> list[float]:
    episodes = episodes_of(prompts, trajectories, players.template.decode)
    with players.compute.autocast():
        raw = values_of(distributed.share(episodes, players.reward.score), name=players.reward.name)
    clip, penalty = settings.ppo.score_clip, settings.ppo.missing_stop_penalty
    return [max(-clip, min(clip, v)) - (0.0 if t.finished else penalty) for v, t in zip(raw, trajectories, strict=True)]


@torch.no_grad()
def _read_values(players: Players, tree: TreeBatch) -> Tensor:
    """The critic's value before each action, on the CPU."""
    with players.compute.autocast():
        found: Tensor = players.root(
            tree.to(players.compute.device), "critic", lambda out: out.values(out.tree.action_index())
        )
    return found.cpu()


def _experience(
    players: Players, trajectories: Sequence[Trajectory], scores: Sequence[float], settings: PpoSettings, kl_coef: float
) -> tuple[list[list[Experience]], dict[str, float]]:
    """Trajectories as mini-batches of micro-batches with advantages, and the iteration's statistics."""
    options, heat = settings.ppo, settings.rollout.temperature
    sizes = [sum(len(s.ids) for s in t.segments) for t in trajectories]
    groups = [
        micro_batches(share, [sizes[i] for i in share], settings.micro_tokens, ranks=distributed.world()[1])
        for share in (s.tolist() for s in np.array_split(np.arange(len(trajectories)), options.minibatches))
        if share
    ]

    def read_tree(tree: TreeBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        old, entropies = read_actions(players.root, "policy", tree, players.compute, temperature=heat, entropy=True)
        ref, _ = read_actions(players.root, "ref", tree, players.compute, temperature=heat)
        return old, entropies, ref, _read_values(players, tree)

    read: list[list[tuple[list[int], TreeBatch, Tensor, Tensor, Tensor]]] = []
    entropy = gap = 0.0
    for group in groups:
        read.append([])
        trees = [TreeBatch.of(forest(trajectories[i].nodes() for i in indices)) for indices in group]
        found = share_forwards(players.root, ["policy", "ref", "critic"], trees, read_tree, players.compute)
        for indices, tree, (old, entropies, ref, values) in zip(group, trees, found, strict=True):
            sampled = torch.tensor([p for i in indices for p in trajectories[i].logprobs])
            gap = max(gap, float((sampled - old).abs().max()))
            entropy += float(entropies.sum())
            read[-1].append((indices, tree, old, ref, values))

    advantages: dict[int, Tensor] = {}
    returns: dict[int, Tensor] = {}
    kl = k3 = 0.0
    for indices, _, old, ref, values in (part for group in read for part in group):
        offset = 0
        for i in indices:
            part = slice(offset, offset + len(trajectories[i].actions))
            offset = part.stop
            rewards = token_rewards(scores[i], old[part], ref[part], kl_coef=kl_coef)
            advantages[i], returns[i] = gae(rewards, values[part], gamma=options.gamma, gae_lambda=options.gae_lambda)
            kl += float((old[part] - ref[part]).sum())
            k3 += float(kl_k3(old[part], ref[part]).sum())
    order = sorted(advantages)
    white = dict(zip(order, whiten([advantages[i] for i in order]), strict=True))

    built = [
        [
            _part(players, tree, (old, ref, values), [white[i] for i in indices], [returns[i] for i in indices])
            for indices, tree, old, ref, values in group
        ]
        for group in read
    ]
    count, tokens = len(trajectories), float(sum(len(t.actions) for t in trajectories))
    stats = {
        "score": sum(scores) / count,
        "kl": kl / count,
        "kl_k3": k3 / count,
        "entropy": entropy / tokens,
        "length": tokens / count,
        "stop_rate": sum(t.finished for t in trajectories) / count,
        "engine_gap": gap,
        "tokens": float(sum(len(t.prompt) for t in trajectories)) + tokens,
    }
    return built, stats


def _part(
    players: Players,
    tree: TreeBatch,
    read: tuple[Tensor, Tensor, Tensor],
    advantages: list[Tensor],
    returns: list[Tensor],
) -> Experience:
    device = players.compute.device
    old, ref, values = (x.to(device) for x in read)
    lengths = [a.numel() for a in advantages]
    joined = torch.cat(advantages).to(device), torch.cat(returns).to(device)
    return Experience(tree.to(device), old, ref, values, *joined, lengths)


# -- losses -------------------------------------------------------------------------------------------------------------


def _policy_loss(settings: PpoSettings) -> Any:
    def loss_fn(out: TrunkOutput, extra: tuple[Experience, float]) -> tuple[Tensor, dict[str, float]]:
        batch, actions = extra
        logp, _ = logprobs(out, out.tree.action_index(), settings.rollout.temperature)
        ones = torch.ones_like(logp)
        return clipped_policy(
            logp, batch.old_logprobs, batch.advantages, ones, actions, clip_range=settings.ppo.clip_range
        )

    return loss_fn


def _value_loss(settings: PpoSettings) -> Any:
    def loss_fn(out: TrunkOutput, extra: tuple[Experience, float]) -> tuple[Tensor, dict[str, float]]:
        batch, actions = extra
        values = out.values(out.tree.action_index())
        ones = torch.ones_like(values)
        return clipped_value(
            values, batch.values, batch.returns, ones, actions, clip_range=settings.ppo.value_clip_range
        )

    return loss_fn


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}
