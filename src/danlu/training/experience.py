"""From scored answers to what PPO's losses need: readings of policy, reference and critic, rewards, advantages, returns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from danlu.alignment_config import Ppo, PpoSettings
from danlu.data.packing import micro_batches
from danlu.losses.advantages import gae, token_rewards, whiten
from danlu.losses.policy import importance, kl_estimate, kl_k3
from danlu.losses.value import explained_variance
from danlu.models.root import RoleName, RootModel, TrunkOutput
from danlu.training import distributed
from danlu.training.buffer import ScoredAnswer
from danlu.training.compute import Compute
from danlu.training.rollouts import engine_gap, read_actions, read_head
from danlu.training.sharding import share_forwards
from danlu.tree import Trajectory, TreeBatch, forest


@dataclass(frozen=True)
class Experience:
    """A micro-batch of trajectories with what the losses need; tensors hold one number per action token, in tree order.

    importance: None where tokens count alike; kept: what the trunks made of the micro-batch, with their graphs, by role; `read`
    takes it away.
    """

    tree: TreeBatch
    old_logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    importance: Tensor | None
    lengths: list[int]
    kept: dict[RoleName, TrunkOutput] = field(default_factory=dict)

    @property
    def actions(self) -> int:
        return sum(self.lengths)

    def read(self, role: RoleName) -> TreeBatch | TrunkOutput:
        """What the role's next update begins with: the trunk's output where it was kept, once; else the micro-batch."""
        return self.kept.pop(role, self.tree)


@dataclass(frozen=True)
class _Reading:
    """Of a micro-batch: which answers it holds, and what was read of their action tokens `[M]`, on the CPU."""

    indices: list[int]
    tree: TreeBatch
    old: Tensor
    entropies: Tensor
    ref: Tensor
    values: Tensor
    kept: dict[RoleName, TrunkOutput]

    def parts(self, trajectories: Sequence[Trajectory]) -> Iterator[tuple[int, slice]]:
        """Each answer with the place of its tokens."""
        offset = 0
        for i in self.indices:
            part = slice(offset, offset + len(trajectories[i].actions))
            offset = part.stop
            yield i, part


def experience_of(
    root: RootModel,
    answers: Sequence[ScoredAnswer],
    scores: Sequence[float],
    settings: PpoSettings,
    compute: Compute,
    *,
    kl_coef: float,
    version: int,
    keep: Sequence[RoleName] = (),
) -> tuple[list[list[Experience]], dict[str, float]]:
    """Answers as mini-batches of micro-batches with advantages, and the iteration's statistics, the same on every rank.

    Args:
        root: with the roles policy, ref and critic.
        scores: the answers' rewards, normalised and clipped.
        kl_coef: weight of the KL.
        version: of the policy as it is now.
        keep: roles (of policy and critic) whose graphs of the first mini-batch wait for its update.
    """
    options = settings.ppo
    trajectories = [a.trajectory for a in answers]
    groups = _read(root, trajectories, settings, compute, keep)
    readings = [reading for group in groups for reading in group]
    sampled = [torch.tensor(t.logprobs) for t in trajectories]

    rewards: dict[int, Tensor] = {}
    values: dict[int, Tensor] = {}
    in_reward = kl_coef if options.kl_in == "reward" else 0.0
    for reading in readings:
        for i, part in reading.parts(trajectories):
            old, ref = reading.old[part], reading.ref[part]
            rewards[i] = token_rewards(scores[i], old, ref, kl_coef=in_reward, estimator=options.kl_estimator)
            values[i] = reading.values[part]
    advantages, returns = _advantages(rewards, values, options)
    white = whiten(advantages)

    def built(reading: _Reading) -> Experience:
        clip, device = options.importance_clip, compute.device
        behaviour = torch.cat([sampled[i] for i in reading.indices])
        weights = importance(reading.old, behaviour, clip).to(device) if clip is not None else None
        return Experience(
            tree=reading.tree.to(device),
            old_logprobs=reading.old.to(device),
            ref_logprobs=reading.ref.to(device),
            values=reading.values.to(device),
            advantages=torch.cat([white[i] for i in reading.indices]).to(device),
            returns=torch.cat([returns[i] for i in reading.indices]).to(device),
            importance=weights,
            lengths=[white[i].numel() for i in reading.indices],
            kept=reading.kept,
        )

    tokens = torch.cat(advantages)
    stats = {
        "score": sum(scores) / len(scores),
        "score_raw": sum(a.score for a in answers) / len(answers),
        **_read_statistics(readings, trajectories, sampled, options, compute, version),
        "explained_variance": explained_variance(
            torch.cat([values[i] for i in range(len(answers))]), torch.cat(returns)
        ),
        "advantage_std": float(tokens.double().std(unbiased=False)),
        "advantage_max": float(tokens.abs().max()),
        "kl_coef": kl_coef,
    }
    stats["reward_total"] = stats["score"] - kl_coef * stats.pop("kl_estimate")
    return [[built(reading) for reading in group] for group in groups], stats


# -- reading ------------------------------------------------------------------------------------------------------------


def _read(
    root: RootModel,
    trajectories: Sequence[Trajectory],
    settings: PpoSettings,
    compute: Compute,
    keep: Sequence[RoleName] = (),
) -> list[list[_Reading]]:
    """What policy, reference and critic say of every action token, by mini-batch and micro-batch."""
    heat = settings.rollout.temperature
    sizes = [sum(len(s.ids) for s in t.segments) for t in trajectories]
    kept: dict[int, dict[RoleName, TrunkOutput]] = {}

    def read_tree(tree: TreeBatch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        graphs = kept.setdefault(id(tree), {}) if keep and not groups else None  # of the first mini-batch
        policy, critic = (graphs if role in keep else None for role in ("policy", "critic"))
        old, entropies = read_actions(root, "policy", tree, compute, temperature=heat, entropy=True, kept=policy)
        ref, _ = read_actions(root, "ref", tree, compute, temperature=heat)
        return old, entropies, ref, _read_values(root, tree, compute, critic)

    groups: list[list[_Reading]] = []
    for share in (s.tolist() for s in np.array_split(np.arange(len(trajectories)), settings.ppo.minibatches)):
        if not share:
            continue
        cut = micro_batches(share, [sizes[i] for i in share], settings.micro_tokens, ranks=distributed.world()[1])
        trees = [TreeBatch.of(forest(trajectories[i].nodes() for i in indices)) for indices in cut]
        found = share_forwards(root, ["policy", "ref", "critic"], trees, read_tree, compute)
        read = zip(cut, trees, found, strict=True)
        groups.append([_Reading(i, tree, *said, kept=kept.get(id(tree), {})) for i, tree, said in read])
    return groups


def _read_values(
    root: RootModel, tree: TreeBatch, compute: Compute, kept: dict[RoleName, TrunkOutput] | None
) -> Tensor:
    """The critic's value before each action, on the CPU."""
    values = read_head(root, "critic", tree, compute, lambda out: out.values(out.tree.action_index()), kept)
    return values.cpu()


def _read_statistics(
    readings: Sequence[_Reading],
    trajectories: Sequence[Trajectory],
    sampled: Sequence[Tensor],
    options: Ppo,
    compute: Compute,
    version: int,
) -> dict[str, float]:
    """Of the answers and of what was read of them; `engine_gap` of what the policy as it is now has sampled."""
    kl = k3 = estimate = entropy = weight = clipped = 0.0
    fresh: list[tuple[Tensor, Tensor]] = []
    for reading in readings:
        entropy += float(reading.entropies.sum())
        for i, part in reading.parts(trajectories):
            old, ref = reading.old[part], reading.ref[part]
            kl += float((old - ref).sum())
            k3 += float(kl_k3(old, ref).sum())
            estimate += float(kl_estimate(old, ref, options.kl_estimator).sum())
            if trajectories[i].policy_version == version:
                fresh.append((sampled[i], old))
            if options.importance_clip is not None:
                whole = torch.exp(old - sampled[i])
                weight += float(whole.clamp(max=options.importance_clip).sum())
                clipped += float((whole > options.importance_clip).sum())
    count, actions = len(trajectories), float(sum(len(t.actions) for t in trajectories))
    stats = {
        "kl": kl / count,
        "kl_k3": k3 / count,
        "kl_estimate": estimate / count,
        "entropy": entropy / actions,
        "length": actions / count,
        "stop_rate": sum(t.finished for t in trajectories) / count,
        "staleness": sum(version - t.policy_version for t in trajectories) / count,
        "tokens": float(sum(len(t.prompt) for t in trajectories)) + actions,
    }
    stats |= engine_gap(fresh, compute.dtype)
    if options.importance_clip is not None:
        stats |= {"importance_mean": weight / actions, "importance_clipped": clipped / actions}
    return stats


# -- rewards ------------------------------------------------------------------------------------------------------------


def _advantages(
    rewards: dict[int, Tensor], values: dict[int, Tensor], options: Ppo
) -> tuple[list[Tensor], list[Tensor]]:
    """Advantages and returns of every answer, in order."""
    order = range(len(rewards))
    given = [rewards[i] for i in order]
    if options.whiten_rewards:
        given = whiten(given, shift_mean=False)
    found = [
        gae(
            reward,
            values[i],
            gamma=options.gamma,
            gae_lambda=options.gae_lambda,
            critic_lambda=options.critic_lambda,
        )
        for i, reward in zip(order, given, strict=True)
    ]
    return [a for a, _ in found], [r for _, r in found]
