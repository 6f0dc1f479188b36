"""What PPO and GRPO do alike around their roll-outs: prompts and their order, the engine's weights, readings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from danlu.alignment_config import RolloutSettings
from danlu.data.collate import EncodedPrompt, encode_prompts
from danlu.exceptions import DataError, SettingsError, TrainingError
from danlu.generation.protocol import Engine, SamplingParams
from danlu.generation.rollout import rollout
from danlu.models.roles import SeparateModels
from danlu.models.root import RoleName, RootModel, TrunkOutput
from danlu.text.chat_template import ChatTemplate
from danlu.training import distributed
from danlu.training.compute import Compute, Dtype
from danlu.training.logprobs import logprobs
from danlu.training.setup import limits_of, records_of
from danlu.training.sharding import whole_of
from danlu.tree import Trajectory, TreeBatch

Result = TypeVar("Result")
HELDOUT_PROMPTS = 128
# How far the engine's log-probabilities of what it has just sampled may be from the trainer's, nats per token in the mean. What
# rounding in another order of sums makes of it stays a tenth of the bound, see docs/log.md; the greatest of thousands of tokens
# says little, as bf16 keeps 8 bits: where a token's logits are near 20, one of them is off by 0.06.
ENGINE_GAP = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.1}


def prompts_of(
    settings: RolloutSettings, template: ChatTemplate
) -> tuple[list[EncodedPrompt], list[EncodedPrompt], dict[str, Any]]:
    """Training prompts, held-out prompts (at most `HELDOUT_PROMPTS`), and facts about them.

    Raises:
        SettingsError: max_length leaves no room for a prompt beside the answer.
        DataError: no prompt is left.
    """
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


def prompt_order(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Prompts of an iteration: epochs of fresh permutations, cut into batches; a function of the arguments alone."""
    wanted = range(step * batch, (step + 1) * batch)
    orders = {e: np.random.default_rng([seed, 0x90, e]).permutation(count) for e in {i // count for i in wanted}}
    return [int(orders[i // count][i % count]) for i in wanted]


def sampling_of(settings: RolloutSettings, template: ChatTemplate) -> SamplingParams:
    """How roll-outs are drawn."""
    return SamplingParams(
        max_new_tokens=settings.rollout.max_new_tokens,
        temperature=settings.rollout.temperature,
        stop_ids=template.stop_ids,
    )


def push_weights(engine: Engine, root: RootModel, version: int) -> None:
    """The engine answers with the policy as it is now."""
    trunks: Any = root.trunks
    if not isinstance(trunks, SeparateModels):
        engine.update_weights(whole_of(trunks.engine_weights("policy")), version)
    else:
        engine.update_weights(whole_of(trunks.models["policy"].named_parameters()), version)


def share_rollout(
    engine: Engine, prompts: Sequence[Sequence[int]], params: SamplingParams, *, seed: int, step: int
) -> list[Trajectory]:
    """`rollout`, each rank at work on its own prompts; what is drawn does not depend on who draws it."""
    return distributed.share(
        list(enumerate(prompts)),
        lambda part: rollout(
            engine, [ids for _, ids in part], params, seed=seed, step=step, numbers=[number for number, _ in part]
        ),
    )


def read_actions(
    root: RootModel,
    role: RoleName,
    tree: TreeBatch,
    compute: Compute,
    *,
    temperature: float,
    entropy: bool = False,
    kept: dict[RoleName, TrunkOutput] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a tree's action tokens under a role, and the entropies there (else zeros), on the CPU.

    Args:
        kept: see `read_head`.
    """

    def head(out: TrunkOutput) -> tuple[Tensor, Tensor]:
        return logprobs(out, out.tree.action_index(), temperature, entropy=entropy)

    logp, entropies = read_head(root, role, tree, compute, head, kept)
    return logp.cpu(), entropies.cpu()


def read_head(
    root: RootModel,
    role: RoleName,
    tree: TreeBatch,
    compute: Compute,
    head_fn: Callable[[TrunkOutput], Result],
    kept: dict[RoleName, TrunkOutput] | None = None,
) -> Result:
    """What `head_fn` reads before a tree's action tokens, without a graph.

    Args:
        kept: gets the trunk's output, with its graph, under the role's name. None: there is no graph.
    """

    def head(out: TrunkOutput) -> Result:
        if kept is not None:
            kept[role] = out
        with torch.no_grad():
            return head_fn(out)

    with torch.set_grad_enabled(kept is not None), compute.autocast():
        found: Result = root(tree.to(compute.device), role, head, reads=TreeBatch.before_actions)
    return found


def engine_gap(fresh: Sequence[tuple[Tensor, Tensor]], dtype: Dtype) -> dict[str, float]:
    """How far the engine's log-probabilities are from the trainer's, on answers of the policy as it is.

    Args:
        fresh: for each of them, or for several together, what the engine and what the trainer says of their action tokens, `[M]`.
        dtype: that the trainer reads in.

    Returns:
        `engine_gap`, the mean absolute difference, and `engine_gap_max`, the greatest, in nats per token; beyond the bound (and
        where it is no number) also `engine_gap_high`, 1. Nothing without answers.
    """
    if not fresh:
        return {}
    gaps = torch.cat([(sampled - old).abs() for sampled, old in fresh]).double()
    mean = float(gaps.mean())
    found = {"engine_gap": mean, "engine_gap_max": float(gaps.max())}
    return found if mean <= ENGINE_GAP[dtype] else found | {"engine_gap_high": 1.0}


def first_pass(ratio_error: float, stats: Mapping[str, float]) -> dict[str, float]:
    """What G-RATIO is decided by: numbers of the iteration before whose first update nothing had changed."""
    return {"ratio_error": ratio_error, "kl": abs(stats["kl"]), "length": stats["length"]}


def refuse_runaway(kl: float, max_kl: float, step: int, *, group: str, setting: str = "kl_coef") -> None:
    """Raises TrainingError when the policy is further from the reference than `max_kl` (nats per answer).

    Args:
        group, setting: what holds the policy back.
    """
    if kl > max_kl:
        raise TrainingError(
            f"the policy is {kl:.1f} nats from the reference at iteration {step + 1} (max_kl {max_kl})",
            hint=f"raise {group}.{setting} or lower learning_rate",
        )
