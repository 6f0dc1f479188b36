"""A trained reward model as a judge."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from danlu.exceptions import RewardError
from danlu.models.heads import head_of
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.rewards.protocol import Episode, Score, never
from danlu.text.chat_template import ChatTemplate
from danlu.tree import TreeBatch, branches, forest

CONFIG_KEY = "danlu_reward"


class ModelReward:
    """Scores with the scalar head at the last token of the answer, normalised to mean 0 and variance 1 on the training answers.

    Args:
        root: has the role "reward".
        normaliser: (mean, standard deviation) of raw scores on the training answers.
        template: the reward model's own chat seam, if its tokenizer differs from the policy's; then text is tokenised anew.
        micro_tokens: tokens scored at once.
    """

    name = "reward_model"

    def __init__(
        self,
        root: RootModel,
        normaliser: tuple[float, float],
        *,
        template: ChatTemplate | None = None,
        micro_tokens: int = 4096,
        device: str = "cpu",
    ) -> None:
        self.root, self.template, self.micro_tokens, self.device = root, template, micro_tokens, device
        self.mean, self.std = normaliser

    def _ids(self, episode: Episode) -> tuple[Sequence[int], Sequence[int]]:
        if self.template is None:
            return episode.prompt_ids, episode.response_ids
        if not episode.prompt:
            raise RewardError("a reward model with its own tokenizer needs the episode's text")
        prompt, answer = self.template.encode_answer(
            list(episode.prompt), [{"role": "assistant", "content": episode.response}]
        )
        if not episode.finished and answer and answer[-1] in self.template.stop_ids:
            answer = answer[:-1]
        return prompt, answer

    @torch.no_grad()
    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """See `Reward.score`."""
        scores = [Score(None, "cancelled")] * len(episodes)
        encoded: dict[int, tuple[Sequence[int], Sequence[int]]] = {}
        for index, episode in enumerate(episodes):
            prompt, answer = self._ids(episode)
            if answer:
                encoded[index] = (prompt, answer)
            else:
                scores[index] = Score(None, "empty answer", "R-EMPTY")
        for batch in _batches({i: len(p) + len(a) for i, (p, a) in encoded.items()}, self.micro_tokens):
            if cancelled():
                break
            tree = TreeBatch.of(forest(branches(encoded[i][0], [encoded[i][1]]) for i in batch)).to(self.device)
            raw = self.root(tree, "reward", lambda out: out.scores(out.tree.node_end_N[1::2] - 1)).tolist()
            for index, value in zip(batch, raw, strict=True):
                fine = math.isfinite(value)
                scores[index] = (
                    Score((value - self.mean) / self.std) if fine else Score(None, f"score is {value}", "R-NAN")
                )
        return scores


def judge_of(model: Any, own: ChatTemplate, policy: ChatTemplate, *, micro_tokens: int, device: str) -> ModelReward:
    """A frozen reward model as the judge of a policy's answers.

    Args:
        model: with a scalar head.
        own, policy: the chat seams of the reward model and of the policy. Where they differ, text is tokenised anew.
    """
    same_text = own.tokenizer.get_vocab() == policy.tokenizer.get_vocab() and own.source == policy.source
    return ModelReward(
        RootModel(SeparateModels({"reward": model}, [])).to(device).eval(),
        normaliser_of(model),
        template=None if same_text else own,
        micro_tokens=micro_tokens,
        device=device,
    )


def _batches(lengths: dict[int, int], budget: int) -> list[list[int]]:
    batches: list[list[int]] = []
    room = 0
    for index in sorted(lengths, key=lambda i: lengths[i]):
        if not batches or lengths[index] > room:
            batches.append([])
            room = budget
        batches[-1].append(index)
        room -= lengths[index]
    return batches


def normaliser_of(model: Any) -> tuple[float, float]:
    """Mean and standard deviation that the reward stage stored in the model's configuration; (0, 1) for foreign models."""
    stored = getattr(model.config, CONFIG_KEY, None) or {}
    return float(stored.get("mean", 0.0)), float(stored.get("std", 1.0)) or 1.0


def fold_normaliser(model: Any) -> None:
    """Puts the normaliser into the scalar head, so that the model speaks in the normalised scores that PPO's returns are made of.

    A critic started from the raw reward model would be wrong by the normaliser's mean and scale from the first step on.
    """
    mean, std = normaliser_of(model)
    head = head_of(model)
    assert isinstance(head, torch.nn.Linear), "a scalar head is one"
    bias = torch.zeros(head.out_features, dtype=head.weight.dtype) if head.bias is None else head.bias.detach()
    with torch.no_grad():
        head.weight /= std
        head.bias = torch.nn.Parameter((bias - mean) / std)
    setattr(model.config, CONFIG_KEY, {"mean": 0.0, "std": 1.0})
