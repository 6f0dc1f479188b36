"""Who takes part in the methods that score roll-outs without a critic: policy, reference, judges, engine; and the scoring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from danlu.alignment_config import GrpoSettings, RolloutSettings
from danlu.data.collate import EncodedPrompt
from danlu.exceptions import SettingsError
from danlu.generation.engine import LocalEngine
from danlu.generation.vllm import VllmEngine
from danlu.models.adapters import PREFIX_KINDS, copy_of, engine_model
from danlu.models.places import base_of, is_adapter
from danlu.models.roles import reference_model
from danlu.models.root import RoleName, RootModel
from danlu.rewards.combine import Combined
from danlu.text.chat_template import ChatTemplate
from danlu.trainers import scoring
from danlu.training import distributed
from danlu.training.compute import DTYPES, Compute, choose
from danlu.training.heldout import Heldout, Scorer
from danlu.training.methods import method_of
from danlu.training.runs import resolve_model
from danlu.training.session import Session
from danlu.training.setup import load_policy, own_models, placed, shared_roles, trains_embeddings
from danlu.training.watch import Watch
from danlu.tree import Trajectory


@dataclass(frozen=True)
class Players:
    """Everything that takes part: the root with its roles; what scores answers; the engine with its own model."""

    root: RootModel
    policy: Any
    reward: Combined
    engine: LocalEngine | VllmEngine
    compute: Compute
    template: ChatTemplate

    def leave(self) -> None:
        """All but the policy go: what is written at the end of a stage is made of another copy of its weights."""
        self.engine.close()
        self.reward.terms.clear()


def players_of(
    settings: GrpoSettings,
    template: ChatTemplate,
    prompts: Sequence[EncodedPrompt],
    *,
    reference: bool = True,
) -> Players:
    """Loads them.

    Args:
        reference: whether there is one, beside the policy.

    Raises:
        SettingsError, DataError, GateError, RewardError: see `rewards_for`.
    """
    path = resolve_model(settings.model)
    policy = load_policy(settings)
    compute = choose(Path(settings.out), settings.dtype, policy.config.hidden_size)
    reward = scoring.rewards_for(settings, template, prompts, compute, stage=settings.method, policy=policy)
    engine = engine_of(policy, settings, template, compute)
    trunks: nn.Module
    if settings.adapted:
        updates, ends = (
            iterations_of(settings, len(prompts)) * settings.grpo.epochs * settings.grpo.minibatches,
            template.stop_ids,
        )
        trunks = shared_roles(policy, ["policy", "ref"], settings, ["policy"], updates=updates, stop_ids=ends)
    else:
        models: dict[RoleName, Any] = {"policy": policy}
        if reference:
            models["ref"] = reference_model(path, settings.ref_bits)
        trunks = own_models(models, ["policy"], settings)
    root = placed(trunks, settings, compute).eval()  # dropout stays off in RL
    scoring.rest_beside(reward, policy)
    return Players(root, policy, reward, engine, compute, template)


def engine_of(
    policy: Any, settings: RolloutSettings, template: ChatTemplate, compute: Compute
) -> LocalEngine | VllmEngine:
    """What draws answers, with weights of its own; call it before the policy gets its adapters.

    Raises:
        SettingsError: vLLM is asked for and cannot have this policy's weights, or there are several processes.
        EngineError: vLLM is not installed.
    """
    if settings.rollout.engine == "danlu":
        return LocalEngine(answering_model(policy, settings, template, compute), template.tokenizer)
    hint = "rollout.engine: danlu"
    if settings.adapter in PREFIX_KINDS or settings.frozen_bits != 16:
        what = settings.adapter if settings.adapter in PREFIX_KINDS else f"a base of {settings.frozen_bits} bits"
        raise SettingsError(f"vLLM cannot follow a policy with {what}", field="rollout.engine", hint=hint)
    if distributed.world()[1] > 1:
        raise SettingsError("vLLM draws for one process", field="rollout.engine", hint=f"processes: 1, or {hint}")
    path = resolve_model(settings.model)
    folder = base_of(path) if is_adapter(path) else path  # what it begins with is replaced before the first answer
    return VllmEngine(
        folder, dtype=compute.dtype, memory_share=settings.rollout.vllm_memory, context=settings.max_length
    )


def answering_model(policy: Any, settings: RolloutSettings, template: ChatTemplate, compute: Compute) -> Any:
    """The engine's own copy of a policy, in the dtype of products; call it before the policy gets its adapters."""
    dtype = DTYPES[compute.dtype]
    if not settings.adapted:
        return copy_of(policy, dtype).to(compute.device)
    if settings.frozen_bits != 16:
        policy.to(compute.device)  # before its packed weights are shared
    embeddings = trains_embeddings(policy, settings, template.stop_ids)
    return engine_model(policy, settings, embeddings=embeddings, dtype=dtype).to(compute.device)


def iterations_of(settings: GrpoSettings, prompts: int) -> int:
    """Of the whole stage: as many as are asked for, or as the prompts make in its epochs."""
    per_step = settings.rollout.batch // settings.grpo.group_size
    return settings.max_steps or max(1, round(settings.epochs * prompts / per_step))


def scorer_of(players: Players, settings: GrpoSettings) -> Scorer:
    """Scores of answers as roll-outs and evaluations have them: the rewards' sum, less the penalty for a missing stop token.

    None for an answer that could not be scored.
    """
    penalty = method_of(settings).missing_stop_penalty

    def scorer(asked: Sequence[EncodedPrompt], found: Sequence[Trajectory]) -> list[float | None]:
        raw = scoring.score(players.reward, asked, found, players.template, players.compute, settings.out)
        pairs = zip(raw, found, strict=True)
        return [None if v is None else v - (0.0 if t.finished else penalty) for v, t in pairs]

    return scorer


def watch_of(
    players: Players, held: Sequence[EncodedPrompt], scorer: Scorer, settings: GrpoSettings, session: Session
) -> Watch:
    """The held-out prompts with their gold, and health."""
    gold = scoring.gold_for(settings, players.template, held, players.compute, stage=settings.method)
    heldout = Heldout(
        held, players.engine, players.root, settings, players.template, scorer, gold, players.reward.metrics
    )
    return Watch(session, heldout, players.template)
