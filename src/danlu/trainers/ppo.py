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

from danlu.config import PpoSettings
from danlu.data.collate import EncodedPrompt, encode_prompts
from danlu.data.packing import micro_batches
from danlu.exceptions import DataError, SettingsError, TrainingError
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import SamplingParams
from danlu.generation.rollout import rollout
from danlu.generation.sampling import mix_seed
from danlu.losses.advantages import gae, token_rewards, whiten
from danlu.losses.policy import clipped_policy, kl_k3
from danlu.losses.value import clipped_value
from danlu.models.load import load_model, save_model
from danlu.models.roles import AdapterRoles, SeparateModels
from danlu.models.root import RoleName, RootModel, TrunkOutput
from danlu.rewards.model import ModelReward, fold_normaliser, normaliser_of, values_of
from danlu.rewards.protocol import Episode
from danlu.text.chat_template import ChatTemplate
from danlu.training import distributed
from danlu.training.compute import Compute, choose
from danlu.training.logprobs import logprobs
from danlu.training.optim import adamw, rate_factor, set_rate
from danlu.training.runs import resolve_model
from danlu.training.session import Session
from danlu.training.setup import final_state, limits_of, lora_roles, records_of
from danlu.training.step import TrainResult, accumulate, apply
from danlu.training.templates import template_facts, template_of, tokenizer_of
from danlu.tree import Trajectory, TreeBatch, forest

HELDOUT_PROMPTS = 128


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
    prompts, heldout, facts = _prompts(settings, template)
    players = _players(settings, template)
    root, compute, options = players.root, players.compute, settings.ppo
    total = settings.max_steps or max(1, round(settings.epochs * len(prompts) / settings.rollout.batch))
    policy = [p for n, p in root.named_parameters() if p.requires_grad and not _is_critic(n)]
    critic = [p for n, p in root.named_parameters() if p.requires_grad and _is_critic(n)]
    actor_optimizer = adamw(nn.ParameterList(policy), settings.learning_rate, settings.weight_decay)
    critic_optimizer = adamw(nn.ParameterList(critic), options.critic_learning_rate, settings.weight_decay)
    optimizers = {"actor": actor_optimizer, "critic": critic_optimizer}

    metrics: dict[str, float] = {}
    with Session(settings, "ppo", total=total, module=root, optimizers=optimizers) as session:
        metrics = dict(session.extra.get("last", {}))
        if heldout and "first_eval_score" not in session.extra:
            session.extra["first_eval_score"] = _evaluate(players, heldout, settings)["eval_score"]
        for step in session.steps():
            factor = rate_factor(step, total, settings)
            set_rate(actor_optimizer, settings.learning_rate * factor)
            set_rate(critic_optimizer, options.critic_learning_rate * factor)
            _push_weights(players, root, step)

            chosen = [prompts[i] for i in _order(len(prompts), settings.rollout.batch, step, settings.seed)]
            asked = [p.ids for p in chosen]
            trajectories = rollout(players.engine, asked, _sampling(settings, template), seed=settings.seed, step=step)
            scores = _scores(players, chosen, trajectories, settings)
            parts, stats = _experience(players, trajectories, scores, settings)

            updates: list[dict[str, float]] = []
            for epoch in range(options.epochs):
                order = np.random.default_rng([settings.seed, step, epoch]).permutation(len(parts)).tolist()
                for index in order if epoch else range(len(parts)):
                    minibatch = parts[index]
                    actions = float(sum(e.actions for e in minibatch))
                    batches = distributed.mine([(e.tree, (e, actions)) for e in minibatch])
                    actor = accumulate(root, "policy", batches, _policy_loss(settings), compute)
                    norm = apply(actor_optimizer, policy, settings.max_grad_norm)
                    value = accumulate(root, "critic", batches, _value_loss(settings), compute)
                    apply(critic_optimizer, critic, settings.max_grad_norm)
                    updates.append(
                        {**actor, "value_loss": value["loss"], "value_error": value["value_error"], "grad_norm": norm}
                    )

            metrics = {**stats, **_mean(updates), "ratio_error_first": updates[0]["ratio_error"]}
            if step == 0:
                session.extra["first"] = {"ratio_error": updates[0]["ratio_error"], "kl": abs(stats["kl"])}
            note = f"reward {stats['score']:.2f} kl {stats['kl']:.2f} len {stats['length']:.0f}"
            session.log(step, metrics, tokens=int(stats["tokens"]), note=note)
            if stats["kl"] > options.max_kl:
                raise TrainingError(
                    f"the policy is {stats['kl']:.1f} nats from the reference at iteration {step + 1} (max_kl {options.max_kl})",
                    hint="raise ppo.kl_coef or lower learning_rate",
                )
            if heldout and session.eval_due(step):
                held = _evaluate(players, heldout, settings)
                session.extra["held"] = held
                session.evaluated(step, held)
        best = session.restore_best()
        metrics |= session.extra.get("held", {})
        metrics |= best
        if "first_eval_score" in session.extra:
            metrics["first_eval_score"] = session.extra["first_eval_score"]
        facts |= {"first": session.extra.get("first", {}), **template_facts(template)}

    folder = Path(settings.out) / "model"
    if distributed.is_main():
        players.policy.generation_config.eos_token_id = sorted(template.stop_ids)
        save_model(players.policy.to("cpu"), template.tokenizer, folder, final_state(root.trunks, "policy"))
    return TrainResult(folder, metrics, facts)


# -- who plays ----------------------------------------------------------------------------------------------------------


def _prompts(
    settings: PpoSettings, template: ChatTemplate
) -> tuple[list[EncodedPrompt], list[EncodedPrompt], dict[str, Any]]:
    train_records, heldout_records, dataset = records_of(settings, "prompt")
    limit = settings.max_length - settings.rollout.max_new_tokens
    if limit < 1:
        raise SettingsError(f"max_length {settings.max_length} leaves no room for a prompt", field="max_length")
    limits = limits_of(settings, limit)
    prompts, dropped = encode_prompts(train_records, template, limits)  # type: ignore[arg-type]
    heldout, _ = encode_prompts(heldout_records[:HELDOUT_PROMPTS], template, limits)  # type: ignore[arg-type]
    if not prompts:
        raise DataError(f"no prompt is left ({dropped} are longer than {limit} tokens)", hint="raise max_length")
    left_out = {**dataset.left_out, "prompt too long": dropped}
    return prompts, heldout, {"prompts": len(prompts), "dropped": left_out, "origins": dataset.origins}


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
        trunks = SeparateModels({"policy": policy, "ref": load_model(path), "critic": critic}, ["policy", "critic"])
    root = RootModel(trunks).to(compute.device).eval()  # dropout stays off in RL
    judge_tokenizer = tokenizer_of(settings.reward_model, stage="ppo")
    judge_template = ChatTemplate(judge_tokenizer, settings.template)
    same_text = (
        judge_tokenizer.get_vocab() == template.tokenizer.get_vocab() and judge_template.source == template.source
    )
    judge = ModelReward(
        RootModel(SeparateModels({"reward": judge_model}, [])).to(compute.device).eval(),
        normaliser_of(judge_model),
        template=None if same_text else judge_template,
        micro_tokens=settings.micro_tokens,
        device=compute.device,
    )
    return Players(root, policy, judge, engine, compute, template)


def _is_critic(name: str) -> bool:
    return ".critic." in name


def _push_weights(players: Players, root: RootModel, version: int) -> None:
    trunks = root.trunks
    if isinstance(trunks, AdapterRoles):
        players.engine.update_weights(trunks.merged("policy").items(), version)
    else:
        players.engine.update_weights(players.policy.named_parameters(), version)


# -- roll-outs ----------------------------------------------------------------------------------------------------------


def _sampling(settings: PpoSettings, template: ChatTemplate) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=settings.rollout.max_new_tokens,
        temperature=settings.rollout.temperature,
        stop_ids=template.stop_ids,
    )


def _order(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Prompts of an iteration: epochs of fresh permutations, cut into batches; a function of the arguments alone."""
    wanted = range(step * batch, (step + 1) * batch)
    orders = {e: np.random.default_rng([seed, 0x90, e]).permutation(count) for e in {i // count for i in wanted}}
    return [int(orders[i // count][i % count]) for i in wanted]


def _scores(
    players: Players, prompts: Sequence[EncodedPrompt], trajectories: Sequence[Trajectory], settings: PpoSettings
) -> list[float]:
    decode = players.template.decode
    episodes = [
        Episode(t.prompt, t.actions, t.finished, tuple(p.messages), decode(t.actions))
        for p, t in zip(prompts, trajectories, strict=True)
    ]
    with players.compute.autocast():
        raw = values_of(players.reward.score(episodes), name=players.reward.name)
    clip, penalty = settings.ppo.score_clip, settings.ppo.missing_stop_penalty
    return [max(-clip, min(clip, v)) - (0.0 if t.finished else penalty) for v, t in zip(raw, trajectories, strict=True)]


@torch.no_grad()
def _read(players: Players, tree: TreeBatch, role: RoleName, temperature: float) -> tuple[Tensor, Tensor]:
    def head(out: TrunkOutput) -> tuple[Tensor, Tensor]:
        index = out.tree.action_index()
        if role == "critic":
            values = out.values(index)
            return values, torch.zeros_like(values)
        return logprobs(out, index, temperature, entropy=role == "policy")

    with players.compute.autocast():
        first, second = players.root(tree.to(players.compute.device), role, head)
    return first.cpu(), second.cpu()


def _experience(
    players: Players, trajectories: Sequence[Trajectory], scores: Sequence[float], settings: PpoSettings
) -> tuple[list[list[Experience]], dict[str, float]]:
    """Trajectories as mini-batches of micro-batches with advantages, and the iteration's statistics."""
    options, heat = settings.ppo, settings.rollout.temperature
    sizes = [sum(len(s.ids) for s in t.segments) for t in trajectories]
    groups = [
        micro_batches(share, [sizes[i] for i in share], settings.micro_tokens, ranks=distributed.world()[1])
        for share in (s.tolist() for s in np.array_split(np.arange(len(trajectories)), options.minibatches))
        if share
    ]
    read: list[list[tuple[list[int], TreeBatch, Tensor, Tensor, Tensor]]] = []
    entropy = gap = 0.0
    for group in groups:
        read.append([])
        for indices in group:
            tree = TreeBatch.of(forest(trajectories[i].nodes() for i in indices))
            old, entropies = _read(players, tree, "policy", heat)
            ref, _ = _read(players, tree, "ref", heat)
            values, _ = _read(players, tree, "critic", heat)
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
            rewards = token_rewards(scores[i], old[part], ref[part], kl_coef=options.kl_coef)
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


def _evaluate(players: Players, prompts: list[EncodedPrompt], settings: PpoSettings) -> dict[str, float]:
    """Score, length and stop rate on held-out prompts, with draws that are the same at every evaluation."""
    _push_weights(players, players.root, players.engine.version + 1)
    asked = [p.ids for p in prompts]
    found = rollout(
        players.engine, asked, _sampling(settings, players.template), seed=mix_seed(settings.seed, 0xE7), step=0
    )
    scores = _scores(players, prompts, found, settings)
    count = len(found)
    return {
        "eval_score": sum(scores) / count,
        "eval_length": sum(len(t.actions) for t in found) / count,
        "eval_stop_rate": sum(t.finished for t in found) / count,
    }
