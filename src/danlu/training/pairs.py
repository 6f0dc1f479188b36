"""What the trainers that compare answers share: roles, log-probabilities of answers, and the loss that the settings name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from danlu.alignment_config import DpoSettings
from danlu.losses import dpo, reference_free
from danlu.losses.reduce import sum_by_node
from danlu.models.roles import reference_model
from danlu.models.root import RoleName, RootModel, TrunkOutput
from danlu.training.compute import Compute
from danlu.training.logprobs import logprobs
from danlu.training.runs import resolve_model
from danlu.training.setup import load_policy, own_models, shared_roles
from danlu.training.sharding import share_forwards
from danlu.tree import TreeBatch

Item = TypeVar("Item")


def policy_and_reference(settings: DpoSettings, *, updates: int, stop_ids: Collection[int]) -> tuple[nn.Module, Any]:
    """The policy, beside it the reference where it is asked for at every step, and the transformers model of the policy.

    Args:
        updates, stop_ids: see `shared_roles`.
    """
    model = load_policy(settings)
    if settings.adapted:
        roles = shared_roles(model, ["policy"], settings, ["policy"], updates=updates, stop_ids=stop_ids)
        return roles, model
    models: dict[RoleName, Any] = {"policy": model}
    if settings.reference == "online":
        models["ref"] = reference_model(resolve_model(settings.model), settings.ref_bits)
    return own_models(models, ["policy"], settings), model


def answer_logprobs(out: TrunkOutput) -> Tensor:
    """Log-probabilities of the answers of a batch of prompts with one answer each, summed over their tokens: `[B]`."""
    return _by_node(out).view(-1, 2)[:, 1]


def pair_logprobs(out: TrunkOutput, temperature: float = 1.0) -> Tensor:
    """Log-probabilities `[B, 2]` of chosen and rejected answers of a batch of prompt -> {chosen, rejected} trees."""
    return _by_node(out, temperature).view(-1, 3)[:, 1:]


def _by_node(out: TrunkOutput, temperature: float = 1.0) -> Tensor:
    index = out.tree.action_index()
    logp, _ = logprobs(out, index, temperature)
    return sum_by_node(logp, index, out.tree)


def pair_tokens(tree: TreeBatch) -> Tensor:
    """Tokens `[B, 2]` of chosen and rejected answers."""
    return (tree.node_end_N - tree.node_start_N).view(-1, 3)[:, 1:]


def read_answers(
    root: RootModel,
    role: RoleName,
    items: Sequence[Item],
    batch: Callable[[Item], TreeBatch],
    compute: Compute,
    head: Callable[[TrunkOutput], Tensor] = pair_logprobs,
) -> list[Tensor]:
    """`head` of a role on the batch of each item, without gradients and on the CPU; a rank reads its share."""

    def read(item: Item) -> Tensor:
        with compute.autocast():
            found: Tensor = root(batch(item).to(compute.device), role, head, reads=TreeBatch.before_actions)
        return found.cpu()

    return share_forwards(root, [role], items, read, compute)


def pair_loss(
    policy_B2: Tensor, ref_B2: Tensor, tokens_B2: Tensor, denominator: float, settings: DpoSettings
) -> tuple[Tensor, dict[str, float]]:
    """The loss that the settings name, on log-probabilities of chosen and rejected answers.

    Args:
        ref_B2: not looked at where the loss knows no reference.
        tokens_B2: see `pair_tokens`.
        denominator: pairs in the whole step.
    """
    answers = (*_two(policy_B2), *_two(tokens_B2), denominator)
    match settings.loss:
        case "simpo":
            loss, metrics = reference_free.simpo(*answers, beta=settings.strength, gamma=settings.gamma)
        case "orpo":
            loss, metrics = reference_free.orpo(*answers, weight=settings.strength)
        case name:
            loss, metrics = reference_loss(
                name, policy_B2, ref_B2, denominator, settings.strength, settings.label_smoothing
            )
    if settings.sft_weight:
        nll, found = reference_free.answer_nll(policy_B2[:, 0], tokens_B2[:, 0], denominator)
        loss, metrics = loss + settings.sft_weight * nll, {**metrics, **found}
    return loss, metrics


def reference_loss(
    name: str, policy_B2: Tensor, ref_B2: Tensor, denominator: float, beta: float, label_smoothing: float = 0.0
) -> tuple[Tensor, dict[str, float]]:
    """A loss of `losses/dpo.py` by name."""
    given = (*_two(policy_B2), *_two(ref_B2), denominator)
    match name:
        case "ipo":
            return dpo.ipo(*given, beta=beta)
        case "hinge":
            return dpo.hinge(*given, beta=beta)
        case "robust":
            return dpo.robust(*given, beta=beta, flip_rate=label_smoothing)
        case _:
            return dpo.sigmoid(*given, beta=beta, label_smoothing=label_smoothing)


def _two(values_B2: Tensor) -> tuple[Tensor, Tensor]:
    return values_B2[:, 0], values_B2[:, 1]


def means(sums: dict[str, float], pairs: float) -> dict[str, float]:
    """Metrics of a step, or of a set, from sums over its pairs."""
    found = {k: v / pairs for k, v in sums.items() if k != "loss"}
    return {"accuracy": found.pop("right"), **found}
