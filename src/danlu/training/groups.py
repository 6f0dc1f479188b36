"""Groups of answers to one prompt: drawn and scored, read by policy and reference, cut into micro-batches, counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev

import numpy as np
import torch
from torch import Tensor

from danlu.alignment_config import GrpoSettings
from danlu.data.collate import EncodedPrompt
from danlu.data.packing import micro_batches
from danlu.exceptions import RewardError
from danlu.generation.protocol import Engine
from danlu.generation.seeds import mix_seed
from danlu.losses.baselines import overlong_penalty
from danlu.losses.policy import importance, kl_k3
from danlu.models.root import RootModel
from danlu.text.chat_template import ChatTemplate
from danlu.training import distributed
from danlu.training.compute import Compute
from danlu.training.heldout import Scorer
from danlu.training.methods import Method
from danlu.training.rollouts import engine_gap, prompt_order, read_actions, sampling_of, share_rollout
from danlu.training.sharding import share_forwards
from danlu.tree import Trajectory, TreeBatch, forest, group

# What draws of further batches are told apart by from an iteration's first one.
FURTHER = 0xD1


@dataclass(frozen=True)
class Drawn:
    """Groups of equal size, one after the other.

    Attributes:
        prompts, trajectories, scores: of every answer.
        size: answers of a group.
        stats: of all that was drawn, also of groups that were replaced.
    """

    prompts: list[EncodedPrompt]
    trajectories: list[Trajectory]
    scores: list[float]
    size: int
    stats: dict[str, float]

    @property
    def groups(self) -> list[range]:
        """The places of each group's answers."""
        return [range(start, start + self.size) for start in range(0, len(self.trajectories), self.size)]

    def pick(self, groups: Sequence[range]) -> Drawn:
        """Some of the groups."""
        places = [i for g in groups for i in g]
        return replace(
            self,
            prompts=[self.prompts[i] for i in places],
            trajectories=[self.trajectories[i] for i in places],
            scores=[self.scores[i] for i in places],
        )


def draw(
    engine: Engine,
    prompts: Sequence[EncodedPrompt],
    scorer: Scorer,
    settings: GrpoSettings,
    template: ChatTemplate,
    step: int,
    method: Method,
) -> Drawn:
    """An iteration's groups, a function of (seed, step) and the engine's weights alone.

    With `max_resample` groups of equal scores are replaced by groups of other prompts, from so many further batches at most
    (Yu et al. 2025, DAPO, section 3.2); what is still missing then is filled with groups of equal scores.
    """
    wanted = settings.rollout.batch // settings.grpo.group_size
    order = prompt_order(len(prompts), wanted, step, settings.seed)
    drawn = _batch(engine, [prompts[i] for i in order], scorer, settings, template, step, settings.seed, method)
    telling = [g for g in drawn.groups if not _equal(drawn, g)]
    batches = 1
    while len(telling) < wanted and batches <= method.max_resample:
        order = prompt_order(len(prompts), wanted, batches - 1, mix_seed(settings.seed, FURTHER, step))
        seed = mix_seed(settings.seed, FURTHER, batches)
        more = _batch(engine, [prompts[i] for i in order], scorer, settings, template, step, seed, method)
        drawn = replace(
            drawn,
            prompts=drawn.prompts + more.prompts,
            trajectories=drawn.trajectories + more.trajectories,
            scores=drawn.scores + more.scores,
        )
        telling = [g for g in drawn.groups if not _equal(drawn, g)]
        batches += 1
    equal = [g for g in drawn.groups if _equal(drawn, g)]
    chosen = sorted([*telling[:wanted], *equal[: max(0, wanted - len(telling))]], key=lambda g: g.start)
    stats = _counts(drawn)
    return replace(drawn.pick(chosen), stats=stats | ({"batches": float(batches)} if method.max_resample else {}))


def _batch(
    engine: Engine,
    asked: Sequence[EncodedPrompt],
    scorer: Scorer,
    settings: GrpoSettings,
    template: ChatTemplate,
    step: int,
    seed: int,
    method: Method,
) -> Drawn:
    size, limit = settings.grpo.group_size, settings.rollout.max_new_tokens
    repeated = [p for p in asked for _ in range(size)]
    found = share_rollout(engine, [p.ids for p in repeated], sampling_of(settings, template), seed=seed, step=step)
    repeated, found, scores = _whole_groups(repeated, found, scorer(repeated, found), size)
    cache = round(method.overlong * limit)
    if cache:
        scores = [s + overlong_penalty(len(t.actions), limit, cache) for s, t in zip(scores, found, strict=True)]
    return Drawn(repeated, found, scores, size, {})


def _whole_groups(
    prompts: list[EncodedPrompt], found: list[Trajectory], scores: Sequence[float | None], size: int
) -> tuple[list[EncodedPrompt], list[Trajectory], list[float]]:
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
    return [prompts[i] for i in kept], [found[i] for i in kept], [s for i in kept if (s := scores[i]) is not None]


def _equal(drawn: Drawn, places: range) -> bool:
    return len({drawn.scores[i] for i in places}) == 1


def _counts(drawn: Drawn) -> dict[str, float]:
    answers = drawn.trajectories
    actions = sum(len(t.actions) for t in answers)
    return {
        "score": fmean(drawn.scores),
        "score_std": pstdev(drawn.scores),
        "equal_groups": fmean(_equal(drawn, g) for g in drawn.groups),
        "length": actions / len(answers),
        "stop_rate": fmean(t.finished for t in answers),
        "tokens": float(sum(len(answers[g[0]].prompt) for g in drawn.groups) + actions),
    }


# -- readings -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """A micro-batch of answers as policy and reference read them; tensors hold one number per action, in tree order.

    Attributes:
        answers: which ones, in tree order; lengths: their actions.
        old, ref: log-probabilities; entropies: of the policy; sampled: what the engine said of the same tokens.
    """

    answers: list[int]
    lengths: list[int]
    tree: TreeBatch
    old: Tensor
    ref: Tensor
    entropies: Tensor
    sampled: Tensor

    def parts(self, values: Tensor) -> list[Tensor]:
        """The values of each answer."""
        return list(values.split(self.lengths))


def read_groups(
    root: RootModel, drawn: Drawn, minibatches: int, settings: GrpoSettings, compute: Compute
) -> list[list[Reading]]:
    """Mini-batches of whole groups, in order, each as micro-batches; what is read is the very batch that is trained on."""
    trajectories, heat = drawn.trajectories, settings.rollout.temperature

    def read(tree: TreeBatch) -> tuple[Tensor, Tensor, Tensor]:
        old, entropies = read_actions(root, "policy", tree, compute, temperature=heat, entropy=True)
        ref, _ = read_actions(root, "ref", tree, compute, temperature=heat)
        return old, entropies, ref

    found: list[list[Reading]] = []
    for share in np.array_split(np.arange(len(drawn.groups)), min(minibatches, len(drawn.groups))):
        batches = group_batches(trajectories, [drawn.groups[g] for g in share], settings.micro_tokens)
        trees = [tree_of(trajectories, batch) for batch in batches]
        readings: list[Reading] = []
        for pieces, tree, (old, entropies, ref) in zip(
            batches, trees, share_forwards(root, ["policy", "ref"], trees, read, compute), strict=True
        ):
            answers = [i for piece in pieces for i in piece]
            lengths = [len(trajectories[i].actions) for i in answers]
            sampled = torch.tensor([p for i in answers for p in trajectories[i].logprobs])
            readings.append(Reading(answers, lengths, tree, old, ref, entropies, sampled))
        found.append(readings)
    return found


def reading_stats(
    readings: Sequence[Sequence[Reading]], importance_clip: float | None, compute: Compute
) -> dict[str, float]:
    """KL to the reference in nats per answer (k1 and k3), entropy per token, how the engine differs, and what that weighs."""
    parts = [r for minibatch in readings for r in minibatch]
    answers, actions = sum(len(r.answers) for r in parts), sum(sum(r.lengths) for r in parts)
    stats = {
        "kl": sum(float((r.old - r.ref).sum()) for r in parts) / answers,
        "kl_k3": sum(float(kl_k3(r.old, r.ref).sum()) for r in parts) / answers,
        "entropy": sum(float(r.entropies.sum()) for r in parts) / actions,
        **engine_gap([(r.sampled, r.old) for r in parts], compute.dtype),
    }
    if importance_clip is not None:
        weights = torch.cat([importance(r.old, r.sampled, importance_clip) for r in parts])
        stats["importance_mean"] = float(weights.double().mean())
        stats["importance_clipped"] = float((weights >= importance_clip).double().mean())
    return stats


# -- micro-batches ------------------------------------------------------------------------------------------------------


def tree_of(trajectories: Sequence[Trajectory], batch: Sequence[Sequence[int]]) -> TreeBatch:
    """A micro-batch of pieces of groups as one forest."""
    return TreeBatch.of(forest(group([trajectories[i] for i in piece]) for piece in batch))


def group_batches(
    trajectories: Sequence[Trajectory], groups: Sequence[Sequence[int]], micro_tokens: int, *, whole: bool = False
) -> list[list[list[int]]]:
    """Micro-batches of groups; a group is cut, with the prompt in each piece, where it is longer than a micro-batch.

    Args:
        whole: no group is cut.
    """
    pieces = [piece for g in groups for piece in ([list(g)] if whole else _pieces(trajectories, g, micro_tokens))]
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
