"""How a stage's roll-outs are scored: the reward that its settings ask for, and one call of it for all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from danlu.alignment_config import RolloutSettings
from danlu.data.collate import EncodedPrompt
from danlu.exceptions import RewardError, TemplateError
from danlu.models.adapter_files import read_info, reads_beside, scalar_beside
from danlu.models.load import load_model
from danlu.models.places import adapter_place, is_adapter
from danlu.models.resting import rest
from danlu.rewards.build import gold_of, rewards_of
from danlu.rewards.combine import Combined
from danlu.rewards.model import ModelReward, judge_of
from danlu.rewards.protocol import Reward, episodes_of
from danlu.text.chat_template import ChatTemplate
from danlu.train_config import as_models
from danlu.trainers.judges import opinions
from danlu.training import distributed
from danlu.training.compute import DTYPES, Compute
from danlu.training.heldout import Scorer
from danlu.training.runs import resolve_model
from danlu.training.sharding import splits
from danlu.training.templates import tokenizer_of
from danlu.tree import Trajectory

PROBES = 16
BESIDE = "danlu_beside"  # on a reward model: its trunk has the policy's weights


def rewards_for(
    settings: RolloutSettings,
    template: ChatTemplate,
    prompts: Sequence[EncodedPrompt],
    compute: Compute,
    *,
    stage: str,
    policy: Any = None,
) -> Combined:
    """The reward of a stage, from its settings; see `rewards_of` for what is refused.

    Args:
        template: the policy's chat seam.
        prompts: that are trained on.
        policy: not adapted yet. Reward models that are adapters of the same base stand on its weights; `rest_beside` then follows
            when it has been placed.

    Raises:
        GateError: a reward model did not pass G-RM, and `follow_failed` is not set.
        RewardError: the reward model cannot read the chats.
    """
    known = opinions(settings)
    named = as_models(settings.reward_model)

    def judge() -> Reward:
        return judge_of(
            [_beside(name, settings, policy) or _at_rest(name, compute) for name in named],
            [readable(name, settings.template, prompts, stage=stage) for name in named],
            template,
            micro_tokens=settings.micro_tokens,
            device=compute.device,
            ensemble=settings.ensemble,
        )

    reward = rewards_of(settings, prompts, Path(settings.out), judge=judge if named else None)
    if known:
        reward.facts["reward_models"] = [opinion.as_dict() for opinion in known]
    return reward


def _beside(name: str, settings: RolloutSettings, policy: Any) -> Any:
    """A reward model on the policy's own weights; None where it is no adapter of the same base, or these do not stay whole."""
    place = adapter_place(resolve_model(name))
    if (
        policy is None
        or not settings.adapted
        or settings.frozen_bits != 16
        or splits(settings)
        or not is_adapter(place)
    ):
        return None
    info = read_info(place)
    if not reads_beside(policy, info):
        return None
    model = scalar_beside(policy, info)
    setattr(model, BESIDE, True)
    return model


def rest_beside(reward: Combined, policy: Any) -> None:
    """Lets what stands on the policy's weights know in which dtype they rest."""
    dtype = getattr(policy.base_model, "danlu_rests", None) or torch.float32
    for model in judges_in(reward):
        if getattr(model, BESIDE, False):
            rest(model, dtype)


def judges_in(reward: Combined) -> list[Any]:
    """The reward models of a reward."""
    members = [m for term in reward.terms for m in getattr(term.reward, "members", [term.reward])]
    trunks: list[Any] = [m.root.trunks for m in members if isinstance(m, ModelReward)]
    return [t.models["reward"] for t in trunks]


def _at_rest(name: str, compute: Compute) -> Any:
    """A reward model that will only be asked."""
    path = resolve_model(name)
    model = load_model(path, scalar=True).requires_grad_(False)
    rest(model, DTYPES[compute.dtype])
    return model


def gold_for(settings: RolloutSettings, template: ChatTemplate, compute: Compute) -> Scorer | None:
    """What held-out answers are measured with beside the reward (`eval_rewards`), or None."""
    gold = gold_of(settings, Path(settings.out))
    if gold is None:
        return None

    def scorer(asked: Sequence[EncodedPrompt], found: Sequence[Trajectory]) -> list[float | None]:
        return score(gold, asked, found, template, compute, settings.out)

    return scorer


def readable(name: str, template: str | None, prompts: Sequence[EncodedPrompt], *, stage: str) -> ChatTemplate:
    """A reward model's own chat seam, tried on some prompts.

    Args:
        name: of the reward model, as the settings have it.
        template: one that danlu ships, in place of its tokenizer's own.

    Raises:
        RewardError: its template cannot render them.
    """
    try:
        own = ChatTemplate(tokenizer_of(name, stage=stage), template)
        for prompt in prompts[:PROBES]:
            own.encode_answer(list(prompt.messages), [{"role": "assistant", "content": "..."}])
    except TemplateError as error:
        raise RewardError(
            f"R-TEMPLATE: the reward model {name} cannot read these chats: {error.message}",
            field="reward_model",
            hint=error.hint or "a reward model with another chat template, or another --template",
        ) from error
    return own


def score(
    reward: Combined,
    asked: Sequence[EncodedPrompt],
    found: Sequence[Trajectory],
    template: ChatTemplate,
    compute: Compute,
    out: str,
) -> list[float | None]:
    """Scores of roll-outs, each rank at work on its own; None for answers that could not be scored and are to be left out.

    Raises:
        RewardError: too many could not be scored; the batch is kept in `out/failed`.
    """
    episodes = episodes_of(asked, found, template.decode)

    with compute.autocast():
        scores = distributed.share(episodes, reward.score)
    keep = Path(out) if distributed.is_main() else None
    return reward.settle(episodes, scores, step=found[0].policy_version, keep=keep)
