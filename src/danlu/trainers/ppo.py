"""PPO: roll out, score, compare with the reference, estimate advantages, update policy and critic; one visible loop.

Schulman et al. 2017 as Ouyang et al. 2022 apply it to language models: reward per token = -kl_coef * KL, plus the score at
the last action; old log-probs are the trainer's own, computed on the very batches that are trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from danlu.alignment_config import PpoSettings
from danlu.data.collate import EncodedPrompt
from danlu.exceptions import RewardError, SettingsError
from danlu.generation.seeds import mix_seed
from danlu.models.load import load_model
from danlu.models.roles import reference_model
from danlu.models.root import RoleName, RootModel
from danlu.rewards.model import fold_normaliser
from danlu.text.chat_template import ChatTemplate
from danlu.train_config import as_models
from danlu.trainers import scoring
from danlu.trainers.players import Players, engine_of
from danlu.training import distributed
from danlu.training.buffer import ReplayBuffer, ScoredAnswer
from danlu.training.checkpoint import Stateful
from danlu.training.compute import choose
from danlu.training.controller import KlController, RunningMoments, shaped_scores
from danlu.training.ema import Ema
from danlu.training.experience import Experience, experience_of
from danlu.training.heldout import Heldout
from danlu.training.memory import within_limits
from danlu.training.natural import look, policy_optimizer
from danlu.training.objectives import policy_loss_of, value_loss_of
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.ptx import PtxLoss
from danlu.training.result import save_result
from danlu.training.rollouts import (
    first_pass,
    prompt_order,
    prompts_of,
    push_weights,
    refuse_runaway,
    sampling_of,
    share_rollout,
)
from danlu.training.runs import resolve_model
from danlu.training.session import Session
from danlu.training.setup import load_policy, own_models, placed, shared_roles
from danlu.training.sharding import is_sharded
from danlu.training.step import TrainResult, accumulate, apply
from danlu.training.templates import template_facts, template_of, tokenizer_of
from danlu.training.watch import Watch
from danlu.tree import Trajectory, TreeBatch

REFILLS = 8  # roll-outs more than planned before an iteration gives up on judges that score nothing


@within_limits
def train(settings: PpoSettings) -> TrainResult:
    """Trains and writes `out/model` (the policy), with `ema` also `out/ema`; resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: nothing scores the answers, or the critic's warm-up leaves nothing to the policy.
        DataError: no prompt is left, or one cannot be verified.
        GateError: a reward model did not pass G-RM, and `follow_failed` is not set.
        RewardError: too few answers can be scored.
        TrainingError: the policy has left the reference (max_kl) or the loss is no number.
    """
    distributed.start()
    out, options, size = Path(settings.out), settings.ppo, settings.rollout.batch
    template = template_of(settings.model, settings, stage="ppo")
    prompts, held_prompts, facts = prompts_of(settings, template)
    total = settings.max_steps or max(1, round(settings.epochs * len(prompts) * settings.rollout.reuse / size))
    if options.critic_warmup >= total:
        raise SettingsError(
            f"critic_warmup ({options.critic_warmup}) leaves none of {total} iterations to the policy",
            field="ppo.critic_warmup",
        )
    players = _players(settings, template, prompts, total)
    root, engine, compute = players.root, players.engine, players.compute
    policy = _learner("policy", players, settings.learning_rate, settings)
    critic = _learner("critic", players, options.critic_learning_rate, settings)
    ptx = PtxLoss(settings, template, compute, stage="ppo") if settings.ptx is not None else None
    ema = Ema(policy.named.items(), settings.ema) if settings.ema is not None else None
    folder = out / "buffer" if settings.rollout.buffer == "disk" else None
    buffer, controller, seen = ReplayBuffer(settings.rollout.reuse, folder), KlController(options), RunningMoments()
    states: dict[str, Stateful] = {"buffer": buffer, "kl": controller, "scores": seen}
    states |= {"ema": ema} if ema is not None else {}
    optimizers = {"actor": policy.optimizer, "critic": critic.optimizer}

    def scorer(asked: Sequence[EncodedPrompt], found: Sequence[Trajectory]) -> list[float | None]:
        raw = _scores(players, asked, found, settings)
        known = [(v, t.finished) for v, t in zip(raw, found, strict=True) if v is not None]
        shaped = iter(shaped_scores([v for v, _ in known], [f for _, f in known], options, "none", seen))
        return [None if v is None else next(shaped) for v in raw]

    gold = scoring.gold_for(settings, template, held_prompts, compute, stage="ppo")
    with Session(settings, "ppo", total=total, module=root, optimizers=optimizers, states=states) as session:
        heldout = Heldout(held_prompts, engine, root, settings, template, scorer, gold, players.reward.metrics)
        watch = Watch(session, heldout, template)
        for step in session.steps():
            if session.cannot_draw(step):
                continue
            corrections = watch.corrections
            for learner in (policy, critic):
                set_rate(learner.optimizer, learner.rate * session.rate_factor(step) * corrections["learning_rate"])

            asked = _roll_out(players, prompts, buffer, seen, settings, step) if len(buffer) < size else {}
            answers = buffer.take(size)
            finished = [a.trajectory.finished for a in answers]
            scores = shaped_scores([a.score for a in answers], finished, options, options.score_norm, seen)
            kl_coef = controller.coef * corrections["kl_coef"]
            keep = _roles_kept(root, settings, session, step)
            parts, stats = experience_of(
                root, answers, scores, settings, compute, kl_coef=kl_coef, version=step, keep=keep
            )

            trees = (e.tree for part in parts for e in part)
            look(policy.optimizer, players.policy, root, trees, compute)
            policy_loss = policy_loss_of(settings, kl_coef, ptx.policy_weight if ptx is not None else 1.0)
            value_loss = value_loss_of(settings)
            first_ratio_error: float | None = None
            updates: list[dict[str, float]] = []
            critic_updates: list[dict[str, float]] = []
            for number, minibatch in _passes(parts, settings, step):
                actions = float(sum(e.actions for e in minibatch))
                own = distributed.mine([(e, (e, actions)) for e in minibatch])
                if step >= options.critic_warmup:
                    batches = [(e.read("policy"), extra) for e, extra in own]
                    sums = accumulate(root, "policy", batches, policy_loss, compute, reads=TreeBatch.before_actions)
                    if first_ratio_error is None:
                        first_ratio_error = sums["ratio_error"]
                    if options.update_kl is not None and sums["approx_kl"] > options.update_kl:
                        policy.optimizer.zero_grad(set_to_none=True)
                        break
                    if ptx is not None:
                        mixed = ptx.add(root, list(policy.named.values()), step, number)
                        sums = sums | mixed | {"loss": sums["loss"] + mixed["loss"]}
                    norm, made = policy.update(session, sums["loss"])
                    updates += [{**sums, "grad_norm": norm}] if made else []
                    if made and ema is not None:
                        ema.update()
                batches = [(e.read("critic"), extra) for e, extra in own]
                value = accumulate(root, "critic", batches, value_loss, compute, reads=TreeBatch.before_actions)
                norm, made = critic.update(session, value["loss"])
                row = {"value_loss": value["loss"], "value_error": value["value_error"], "critic_grad_norm": norm}
                critic_updates += [row] if made else []

            metrics = {**stats, **asked, **_mean(updates), **_mean(critic_updates)}
            metrics["passes"] = float(max(len(updates), len(critic_updates)))
            if first_ratio_error is not None:
                metrics["ratio_error_first"] = first_ratio_error
                session.extra.setdefault("first", first_pass(first_ratio_error, stats))
                controller.update(stats["kl"], size)
            metrics = watch.step(step, metrics, [a.trajectory for a in answers], scores)
            note = f"reward {stats['score']:.2f} kl {stats['kl']:.2f} len {stats['length']:.0f}"
            session.log(step, metrics, tokens=int(stats["tokens"]), note=note)
            refuse_runaway(stats["kl"], options.max_kl, step, group="ppo")
            watch.evaluate(step)
        metrics, told = watch.outcome()
        facts |= {**template_facts(template), **told}
        facts |= players.reward.facts
        facts |= ptx.facts if ptx is not None else {}

    players.leave()
    players.policy.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(players.policy, template.tokenizer, out / "model", root.trunks, "policy")
    if ema is not None:
        ema.put()
        save_result(players.policy, template.tokenizer, out / "ema", root.trunks, "policy")
    buffer.clear()
    return TrainResult(out / "model", metrics, facts)


# -- who plays ----------------------------------------------------------------------------------------------------------


def _players(
    settings: PpoSettings, template: ChatTemplate, prompts: Sequence[EncodedPrompt], iterations: int
) -> Players:
    path = resolve_model(settings.model)
    policy = load_policy(settings)
    compute = choose(Path(settings.out), settings.dtype, policy.config.hidden_size)
    reward = scoring.rewards_for(settings, template, prompts, compute, stage="ppo", policy=policy)
    engine = engine_of(policy, settings, template, compute)
    trunks: nn.Module
    if settings.adapted:
        updates, ends = iterations * settings.ppo.epochs * settings.ppo.minibatches, template.stop_ids
        learn: list[RoleName] = ["policy", "critic"]
        trunks = shared_roles(policy, ["policy", "ref", "critic"], settings, learn, updates=updates, stop_ids=ends)
    else:
        critic, ref = _critic(policy, path, settings, template), reference_model(path, settings.ref_bits)
        models: dict[RoleName, Any] = {"policy": policy, "ref": ref, "critic": critic}
        trunks = own_models(models, ["policy", "critic"], settings)
    root = placed(trunks, settings, compute).eval()  # dropout stays off in RL
    scoring.rest_beside(reward, policy)
    return Players(root, policy, reward, engine, compute, template)


def _critic(policy: Any, path: str, settings: PpoSettings, template: ChatTemplate) -> Any:
    """The (first) reward model, speaking in normalised scores, or the policy with a scalar head at zero (`ppo.critic_init`).

    The critic reads the policy's tokens, so it must know them; how large it is does not matter to the policy.

    Raises:
        SettingsError: the reward model is asked for and there is none, or it has another vocabulary.
    """
    wanted, judges = settings.ppo.critic_init, as_models(settings.reward_model)
    if wanted == "reward" and not judges:
        raise SettingsError(
            "there is no reward model that could become the critic", field="ppo.critic_init", hint="critic_init: policy"
        )
    if wanted != "policy" and judges:
        same_words = tokenizer_of(judges[0], stage="ppo").get_vocab() == template.tokenizer.get_vocab()
        if wanted == "reward" and not same_words:
            raise SettingsError(
                "the reward model has another vocabulary than the policy, whose tokens a critic reads",
                field="ppo.critic_init",
                hint="critic_init: policy; auto takes the policy, too, where they differ",
            )
        if same_words:
            critic = load_model(resolve_model(judges[0]), scalar=True)
            if wanted == "reward" or critic.config.hidden_size == policy.config.hidden_size:
                fold_normaliser(critic)
                return critic
    return load_model(path, scalar=True)


@dataclass(frozen=True)
class Learner:
    """A role that is trained: its parameters by name, their optimizer and its peak rate."""

    role: str
    named: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    rate: float

    def update(self, session: Session, loss: float) -> tuple[float, bool]:
        """The gradient's norm, and whether the update was made."""
        before = session.monitor.updates
        parameters, most = list(self.named.values()), session.settings.max_grad_norm
        norm = apply(self.optimizer, parameters, most, session.judge(loss, self.role))
        return norm, session.monitor.updates > before


def _learner(role: str, players: Players, rate: float, settings: PpoSettings) -> Learner:
    """The critic's parameters have its name in theirs, all others that learn are the policy's. Beside natural steps of the policy
    the critic has AdamW: its values are no distribution."""
    trained = {n: p for n, p in players.root.named_parameters() if p.requires_grad}
    named = {n: p for n, p in trained.items() if (".critic." in f"{n}.") == (role == "critic")}
    if role == "policy":
        optimizer = policy_optimizer(players.policy, named, rate, settings)
        return Learner(role, {n: p for n, p in named.items() if p.requires_grad}, optimizer, rate)
    own = settings.model_copy(update={"optimizer": "adamw"}) if settings.optimizer == "natural" else settings
    return Learner(role, named, optimizer_of(named, rate, own), rate)


# -- roll-outs ----------------------------------------------------------------------------------------------------------


def _roll_out(
    players: Players,
    prompts: Sequence[EncodedPrompt],
    buffer: ReplayBuffer,
    seen: RunningMoments,
    settings: PpoSettings,
    step: int,
) -> dict[str, float]:
    """Answers of the policy as it is now, with their scores, into the buffer: as many batches as are drawn at once, and
    further ones while answers that could not be scored are wanting. Draws are a function of (seed, step, draw, sample).

    Returns:
        What the rewards said of the last batch.

    Raises:
        RewardError: there are still too few.
    """
    push_weights(players.engine, players.root, step)
    size, planned, reuse = settings.rollout.batch, settings.rollout.per_update, settings.rollout.reuse
    params = sampling_of(settings, players.template)
    for draw in range(planned + REFILLS):
        if draw >= planned and len(buffer) >= size:
            break
        seed, batch, number = settings.seed, step // (planned * reuse) * planned + draw, step * planned + draw
        if draw >= planned:  # an order and draws of their own
            seed, batch, number = mix_seed(settings.seed, 0xF1, draw), step, step
        asked = [prompts[i] for i in prompt_order(len(prompts), size, batch, seed)]
        found = share_rollout(players.engine, [p.ids for p in asked], params, seed=seed, step=number)
        scores = _scores(players, asked, found, settings)
        scored = [ScoredAnswer(t, v) for t, v in zip(found, scores, strict=True) if v is not None]
        seen.update([a.score for a in scored])
        buffer.add(scored)
    if len(buffer) < size:
        raise RewardError(
            f"only {len(buffer)} of {(planned + REFILLS) * size} answers could be scored at iteration {step + 1}, and an "
            f"update takes {size}"
        )
    return players.reward.metrics


def _scores(
    players: Players, prompts: Sequence[EncodedPrompt], trajectories: Sequence[Trajectory], settings: PpoSettings
) -> list[float | None]:
    """The scores as they come; None: this answer has none and is left out."""
    return scoring.score(players.reward, prompts, trajectories, players.template, players.compute, settings.out)


# -- updates ------------------------------------------------------------------------------------------------------------


def _roles_kept(root: RootModel, settings: PpoSettings, session: Session, step: int) -> list[RoleName]:
    """Whose graphs of the readings serve the first update: nobody's before the first ratios are measured (G-RATIO), which takes
    a second forward pass, nor where layers are gathered for each pass."""
    if not settings.ppo.keep_graphs or "first" not in session.extra or is_sharded(root):
        return []
    return ["policy", "critic"] if step >= settings.ppo.critic_warmup else ["critic"]


def _passes(
    parts: Sequence[list[Experience]], settings: PpoSettings, step: int
) -> Iterator[tuple[int, list[Experience]]]:
    """Mini-batches of all epochs, numbered: first in order, then shuffled."""
    for epoch in range(settings.ppo.epochs):
        order = np.random.default_rng([settings.seed, step, epoch]).permutation(len(parts)).tolist()
        for place, index in enumerate(order if epoch else range(len(parts))):
            yield epoch * len(parts) + place, parts[index]


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the updates that were made; of the greatest ratio the greatest."""
    if not rows:
        return {}
    found = {k: sum(r[k] for r in rows) / len(rows) for k in rows[0]}
    return found | {k: max(r[k] for r in rows) for k in ("ratio_max",) if k in found}
