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
from danlu.models.families import hard_limit
from danlu.models.heads import SCALAR_HEADS
from danlu.models.load import load_model
from danlu.models.places import adapter_place, is_adapter
from danlu.models.resting import rest
from danlu.rewards.build import gold_of, rewards_of
from danlu.rewards.combine import Combined
from danlu.rewards.model import ModelReward, judge_of, same_text
from danlu.rewards.protocol import Reward, episodes_of
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import unknown_share
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
UNKNOWN = 0.1  # share of unknown tokens from which answers that differ read alike; rare signs stay far below it


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
        RewardError: the reward model cannot read the chats (R-TEMPLATE, R-TOKENIZER), or not as long ones (R-WINDOW).
    """
    known = opinions(settings)
    named = as_models(settings.reward_model)

    def judge() -> Reward:
        return _judge(named, "reward_model", settings, template, prompts, compute, stage=stage, policy=policy)

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


def _judge(
    named: Sequence[str],
    field: str,
    settings: RolloutSettings,
    template: ChatTemplate,
    prompts: Sequence[EncodedPrompt],
    compute: Compute,
    *,
    stage: str,
    policy: Any = None,
) -> Reward:
    """Reward models as one judge, tried on the prompts.

    Args:
        field: that names them in the settings.
        policy: on whose weights an adapter of the same base may stand.

    Raises:
        RewardError: see `rewards_for`.
    """
    seams = [readable(name, template, settings.template, prompts, stage=stage, field=field) for name in named]
    models = [_beside(name, settings, policy) or _at_rest(name, compute, field) for name in named]
    for name, model, own in zip(named, models, seams, strict=True):
        if settings.overlength != "truncate":
            _refuse_long(name, hard_limit(model), own, template, prompts, settings.rollout.max_new_tokens, field)
    return judge_of(
        models,
        seams,
        template,
        micro_tokens=settings.micro_tokens,
        device=compute.device,
        ensemble=settings.ensemble,
        truncate=settings.overlength == "truncate",
    )


def _at_rest(name: str, compute: Compute, field: str) -> Any:
    """A reward model that will only be asked.

    Raises:
        RewardError: it has no head that gives one number; one of zeros would score all answers alike.
    """
    path = resolve_model(name)
    model = load_model(path, scalar=True).requires_grad_(False)
    if is_adapter(path):
        has_head = read_info(path).scalar
    else:
        has_head = not any(n.split(".")[0] in SCALAR_HEADS for n in getattr(model, "danlu_missing", ()))
    if not has_head:
        raise RewardError(
            f"R-HEAD: {name} is no reward model: it has no head that gives one number",
            field=field,
            hint="train one from it with `danlu reward --model`, or give another",
        )
    rest(model, DTYPES[compute.dtype])
    return model


def gold_for(
    settings: RolloutSettings, template: ChatTemplate, held: Sequence[EncodedPrompt], compute: Compute, *, stage: str
) -> Scorer | None:
    """What held-out answers are measured with beside the reward (`eval_rewards`, `eval_reward_model`), or None.

    Args:
        held: the held-out prompts; without any nothing is loaded.

    Raises:
        RewardError: a reward model cannot read them, as in `rewards_for`.
    """
    named = as_models(settings.eval_reward_model) if held else []

    def judge() -> Reward:
        return _judge(named, "eval_reward_model", settings, template, held, compute, stage=stage)

    gold = gold_of(settings, Path(settings.out), judge=judge if named else None)
    if gold is None:
        return None

    def scorer(asked: Sequence[EncodedPrompt], found: Sequence[Trajectory]) -> list[float | None]:
        return score(gold, asked, found, template, compute, settings.out)

    return scorer


def readable(
    name: str,
    policy: ChatTemplate,
    template: str | None,
    prompts: Sequence[EncodedPrompt],
    *,
    stage: str,
    field: str = "reward_model",
) -> ChatTemplate:
    """A reward model's own chat seam, tried on some prompts.

    Args:
        name: of the reward model, as the settings have it.
        policy: the policy's chat seam.
        template: one that danlu ships, in place of its tokenizer's own.
        field: that names it in the settings.

    Raises:
        RewardError: its template cannot render them, or its tokenizer does not know what they are written in.
    """
    probes = prompts[:PROBES]
    try:
        own = ChatTemplate(tokenizer_of(name, stage=stage), template)
        for prompt in probes:
            own.encode_answer(list(prompt.messages), [{"role": "assistant", "content": "..."}])
    except TemplateError as error:
        raise RewardError(
            f"R-TEMPLATE: the reward model {name} cannot read these chats: {error.message}",
            field=field,
            hint=error.hint or "a reward model with another chat template, or another --template",
        ) from error
    if not same_text(own, policy):
        share = unknown_share(own.tokenizer, [str(m["content"] or "") for p in probes for m in p.messages])
        if share > UNKNOWN:
            raise RewardError(
                f"R-TOKENIZER: the reward model {name} cannot read these chats: its tokenizer does not know {share:.0%} of what "
                f"the first {len(probes)} prompts are written in",
                field=field,
                hint="a reward model whose tokenizer knows this language",
            )
    return own


def _refuse_long(
    name: str,
    window: int | None,
    own: ChatTemplate,
    policy: ChatTemplate,
    prompts: Sequence[EncodedPrompt],
    max_new_tokens: int,
    field: str,
) -> None:
    """Raises RewardError where a reward model cannot read a prompt with an answer, before anything is sampled.

    With a tokenizer of its own how long answers are there is not known yet: what exceeds the window then has no score.
    """
    if window is None:
        return
    if same_text(own, policy):
        lengths = [len(p.ids) + max_new_tokens for p in prompts]
    else:
        lengths = [len(ids) + 1 for ids, _ in own.encode_branches([(list(p.messages), []) for p in prompts])]
    over = [length for length in lengths if length > window]
    if over:
        raise RewardError(
            f"R-WINDOW: {len(over)} of {len(prompts)} prompts do not fit the {window} positions of the reward model {name} (with "
            f"an answer the longest has {max(over)} tokens)",
            field=field,
            hint=f"set max_length to {window} or less, or overlength: truncate, and it reads the last part of such a prompt",
        )


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
