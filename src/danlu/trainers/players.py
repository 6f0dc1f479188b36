"""Who takes part in the methods that score roll-outs without a critic: policy, reference, judges, engine; and the scoring."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from danlu.alignment_config import GrpoSettings
from danlu.data.collate import EncodedPrompt
from danlu.exceptions import DataError, SettingsError
from danlu.generation.engine import LocalEngine
from danlu.models.load import load_model
from danlu.models.roles import SeparateModels, reference_model
from danlu.models.root import RoleName, RootModel
from danlu.rewards.model import judge_of, values_of
from danlu.rewards.protocol import Reward, episodes_of
from danlu.rewards.verifiers import VERIFIERS, Verifier
from danlu.text.chat_template import ChatTemplate
from danlu.training import distributed
from danlu.training.compute import Compute, choose
from danlu.training.methods import method_of
from danlu.training.rollouts import Scorer
from danlu.training.runs import resolve_model
from danlu.training.setup import lora_roles
from danlu.training.sharding import shard
from danlu.training.templates import tokenizer_of
from danlu.tree import Trajectory


@dataclass(frozen=True)
class Players:
    """Everything that takes part: the root with its roles; the judges with their weights; the engine with its own model."""

    root: RootModel
    policy: Any
    judges: list[tuple[float, Reward]]
    engine: LocalEngine
    compute: Compute
    template: ChatTemplate


def players_of(
    settings: GrpoSettings, template: ChatTemplate, prompts: Sequence[EncodedPrompt], *, reference: bool = True
) -> Players:
    """Loads them; a verifier joins the judges where prompts have something to verify by.

    Args:
        reference: whether there is one, beside the policy.

    Raises:
        SettingsError: there is neither a verifier nor a reward model.
        DataError: a prompt has nothing to be judged by, or wants a verifier that does not exist.
    """
    verifier = _verifier(settings, prompts)
    path = resolve_model(settings.model)
    policy = load_model(path)
    compute = choose(Path(settings.out), settings.dtype, policy.config.hidden_size)
    engine = LocalEngine(copy.deepcopy(policy).to(compute.device), template.tokenizer)
    trunks: nn.Module
    if settings.adapter == "lora":
        trunks = lora_roles(policy, ["policy", "ref"], settings)
    else:
        models: dict[RoleName, Any] = {"policy": policy}
        if reference:
            models["ref"] = reference_model(path, settings.ref_bits)
        trunks = SeparateModels(models, ["policy"])
    root = shard(RootModel(trunks).to(compute.device).eval(), settings, compute)  # dropout stays off in RL
    judges: list[tuple[float, Reward]] = []
    if settings.reward_model:
        own = ChatTemplate(tokenizer_of(settings.reward_model, stage=settings.method), settings.template)
        judge_model = load_model(resolve_model(settings.reward_model), scalar=True)
        judge = judge_of(judge_model, own, template, micro_tokens=settings.micro_tokens, device=compute.device)
        judges.append((1.0, judge))
    if verifier is not None:
        judges.append((settings.verifier_weight, verifier))
    return Players(root, policy, judges, engine, compute, template)


def _verifier(settings: GrpoSettings, prompts: Sequence[EncodedPrompt]) -> Verifier | None:
    """The verifier, if any prompt has something to verify by."""
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


def scorer_of(players: Players, settings: GrpoSettings) -> Scorer:
    """Scores of answers as roll-outs and evaluations have them."""
    penalty = method_of(settings).missing_stop_penalty

    def scorer(asked: Sequence[EncodedPrompt], found: Sequence[Trajectory]) -> list[float]:
        return _scores(players, asked, found, penalty)

    return scorer


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
