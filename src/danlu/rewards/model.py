"""A trained reward model as a judge, several of them as one, and what travels with their weights."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

import torch

from danlu import atomic
from danlu.alignment_config import Ensemble
from danlu.exceptions import RewardError
from danlu.models.adapter_files import INFO
from danlu.models.families import hard_limit
from danlu.models.heads import head_of
from danlu.models.places import is_adapter
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel, TrunkOutput
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
        window: the most tokens that the model can read; None: no limit.
        truncate: a prompt that does not fit loses its left end, as in `overlength: truncate`; else its answers have no score.
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
        window: int | None = None,
        truncate: bool = False,
    ) -> None:
        self.root, self.template, self.micro_tokens, self.device = root, template, micro_tokens, device
        self.window, self.truncate = window, truncate
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
            over = len(prompt) + len(answer) - (self.window if self.window is not None else sys.maxsize)
            if not answer:
                scores[index] = Score(None, "empty answer", "R-EMPTY")
            elif over <= 0:
                encoded[index] = (prompt, answer)
            elif self.truncate and over < len(prompt):
                encoded[index] = (prompt[over:], answer)
            else:
                what = f"{len(prompt) + len(answer)} tokens exceed the {self.window} positions of the reward model"
                scores[index] = Score(None, what, "R-WINDOW")
        for batch in _batches({i: len(p) + len(a) for i, (p, a) in encoded.items()}, self.micro_tokens):
            if cancelled():
                break
            tree = TreeBatch.of(forest(branches(encoded[i][0], [encoded[i][1]]) for i in batch)).to(self.device)
            raw = self.root(tree, "reward", _at_ends, reads=TreeBatch.answer_ends).tolist()
            for index, value in zip(batch, raw, strict=True):
                fine = math.isfinite(value)
                scores[index] = (
                    Score((value - self.mean) / self.std) if fine else Score(None, f"score is {value}", "R-NAN")
                )
        return scores


def _at_ends(out: TrunkOutput) -> torch.Tensor:
    return out.scores(out.tree.answer_ends())


class EnsembleReward:
    """Several reward models as one judge (Coste et al. 2023): where they disagree, a policy has left what they know.

    Each member normalises its own scores (mean 0, variance 1 on its training answers), so that one is as loud as another, and
    may have a tokenizer of its own. `min` is the paper's worst-case optimisation, eq. 3. `mean-std` is its uncertainty-weighted
    one, eq. 4, with the standard deviation in place of the variance and weight 1, so that the result is in units of the score.

    Args:
        members: at least one.
        how: what becomes of an answer's scores. An answer that a member cannot score has that member's error.
    """

    name = "reward_model"

    def __init__(self, members: Sequence[ModelReward], how: Ensemble = "mean") -> None:
        self.members, self.how = list(members), how

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        """See `Reward.score`."""
        found = [member.score(episodes, cancelled=cancelled) for member in self.members]
        scores: list[Score] = []
        for own in zip(*found, strict=True):
            bad = next(((i, s) for i, s in enumerate(own) if s.value is None), None)
            if bad is not None:
                scores.append(Score(None, f"member {bad[0] + 1} of {len(own)}: {bad[1].error}", bad[1].code))
                continue
            values = [s.value for s in own if s.value is not None]
            scores.append(Score(_together(values, self.how), spread=pstdev(values)))
        return scores


def _together(values: Sequence[float], how: Ensemble) -> float:
    if how == "min":
        return min(values)
    return fmean(values) - (pstdev(values) if how == "mean-std" else 0.0)


def judge_of(
    model: Any | Sequence[Any],
    own: ChatTemplate | Sequence[ChatTemplate],
    policy: ChatTemplate,
    *,
    micro_tokens: int,
    device: str,
    ensemble: Ensemble = "mean",
    truncate: bool = False,
) -> ModelReward | EnsembleReward:
    """A frozen reward model, or several, as the judge of a policy's answers.

    Args:
        model: with a scalar head; or a list of such.
        own, policy: the chat seams of the reward model (one for each) and of the policy. Where they differ, text is tokenised
            anew.
        ensemble: see `EnsembleReward`; one model alone, also in a list, is asked as it is.
        truncate: see `ModelReward`.
    """
    models = list(model) if isinstance(model, Sequence) else [model]
    seams = list(own) if isinstance(own, Sequence) else [own]
    members = [
        ModelReward(
            RootModel(SeparateModels({"reward": one}, [])).to(device).eval(),
            normaliser_of(one),
            template=None if same_text(seam, policy) else seam,
            micro_tokens=micro_tokens,
            device=device,
            window=hard_limit(one),
            truncate=truncate,
        )
        for one, seam in zip(models, seams, strict=True)
    ]
    return members[0] if len(members) == 1 else EnsembleReward(members, ensemble)


def same_text(own: ChatTemplate, policy: ChatTemplate) -> bool:
    """Whether a reward model reads the policy's own ids: one vocabulary, one template."""
    same_ids: bool = own.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    return same_ids and own.source == policy.source


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


def store_verdict(folder: Path, verdict: Mapping[str, Any]) -> None:
    """Writes what G-RM said of a saved reward model beside its normaliser, so that it goes wherever the model goes."""
    path, config = _config_of(folder)
    values = config["config"] if path.name == INFO else config
    values[CONFIG_KEY] = {**(values.get(CONFIG_KEY) or {}), "gate": dict(verdict)}
    atomic.write_text(path, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def _config_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The file that holds a model's configuration, or an adapter's values of it, and its content."""
    path = folder / (INFO if is_adapter(folder) else "config.json")
    return path, json.loads(path.read_text("utf-8")) if path.is_file() else {}


def stored_verdict(folder: Path) -> dict[str, Any] | None:
    """What G-RM said of a saved reward model; None if nobody asked it, as of a model that danlu did not train."""
    path, config = _config_of(folder)
    values = config.get("config", {}) if path.name == INFO else config
    verdict: dict[str, Any] | None = (values.get(CONFIG_KEY) or {}).get("gate")
    return verdict


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
