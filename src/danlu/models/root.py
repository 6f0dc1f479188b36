"""The root module: every training forward goes through `RootModel.forward(tree, role, head_fn)`.

It runs the trunk of a role on a token tree, and then the head and whatever the loss needs inside the same call, so that a
sharding wrapper around the root sees every parameter that is used. Roles (policy, ref, critic, reward) are separate models,
or adapters on one base (`models/roles.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models import attention, padded
from danlu.models.attention import TreePlan
from danlu.tree import Node, TreeBatch, branches, forest

RoleName = Literal["policy", "ref", "critic", "reward"]
Result = TypeVar("Result")


class Trunks(Protocol):
    """Who runs a role: implemented in `models/roles.py`."""

    def trunk(self, role: RoleName) -> nn.Module:
        """The transformer of a role (no head), ready to be called; adapters are selected here."""
        ...

    def head(self, role: RoleName) -> nn.Linear:
        """The role's head: `[V, D]` for policy and ref, `[1, D]` for critic and reward."""
        ...


@dataclass(frozen=True)
class TrunkOutput:
    """What a `head_fn` gets.

    hidden_TD: after the final norm; tree: the batch; linear: the role's head. Log-probabilities: `training/logprobs.py`.
    """

    hidden_TD: Tensor
    tree: TreeBatch
    linear: nn.Linear

    def logits(self, index_M: Tensor) -> Tensor:
        """fp32 logits `[M, V]` after the tokens at `index_M`; for tests and scoring, not for training."""
        logits: Tensor = self.linear(self.hidden_TD.index_select(0, index_M))
        return logits.float()

    def values(self, index_M: Tensor) -> Tensor:
        """The scalar head, in fp32, before the tokens at `index_M` are taken: `V(s_t)` of the state that predicts token t."""
        return self.scores(self.tree.predictor_T[index_M])

    def scores(self, index_M: Tensor) -> Tensor:
        """The scalar head, in fp32, at the tokens `index_M` themselves."""
        rows = self.hidden_TD.index_select(0, index_M).float()
        with torch.autocast(rows.device.type, enabled=False):
            bias = self.linear.bias.float() if self.linear.bias is not None else None
            return nn.functional.linear(rows, self.linear.weight.float(), bias).squeeze(-1)


class RootModel(nn.Module):
    """The root. `trunks` must be an `nn.Module` that also is a `Trunks`."""

    def __init__(self, trunks: nn.Module) -> None:
        super().__init__()
        self.trunks = trunks

    def forward(
        self,
        tree: TreeBatch,
        role: RoleName,
        head_fn: Callable[[TrunkOutput], Result],
    ) -> Result:
        """Runs the role's trunk on the tree and then `head_fn` on its output."""
        trunks: Trunks = self.trunks  # type: ignore[assignment]
        trunk = trunks.trunk(role)
        hidden = run_trunk(trunk, tree, role)
        return head_fn(TrunkOutput(hidden, tree, trunks.head(role)))


def run_trunk(trunk: nn.Module, tree: TreeBatch, role: RoleName | None = None) -> Tensor:
    """Hidden states `[T, D]` of a transformer without head on a tree: the fast path if `prepare` found it, else padded."""
    if getattr(trunk, "danlu_fast_path", False):
        output = trunk(
            input_ids=tree.input_ids_T[None],
            position_ids=tree.position_ids_T[None],
            use_cache=False,
            **{attention.PLAN_ARGUMENT: TreePlan(tree, role)},
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden
    return padded.run_trunk(trunk, tree)


def prepare(model: Any) -> Any:
    """Sets a transformers model up for token trees, and finds out by trying whether its attention takes a plan.

    Raises:
        ModelError: the model's rotary positions depend on the longest row of a batch, so that no layout can be exact.
    """
    config = model.config
    scaling = getattr(config, "rope_parameters", None) or {}
    # One dictionary, or (Gemma 3) one for each type of layer.
    kinds = {scaling.get("rope_type"), *(v.get("rope_type") for v in scaling.values() if isinstance(v, dict))}
    for kind in kinds & {"dynamic", "longrope"}:
        raise ModelError(
            f"rotary positions of type '{kind}' depend on the longest row of a batch and are not supported",
            hint="set rope_parameters.rope_type to 'default' (or 'linear', 'yarn', 'llama3') in config.json if the context allows",
        )
    trunk = model.base_model
    trunk.danlu_fast_path = _takes_plan(model, trunk)
    return model


def _takes_plan(model: Any, trunk: nn.Module) -> bool:
    before = model.config._attn_implementation
    layers = model.config.num_hidden_layers
    probe = TreeBatch.of(forest([branches([0], [[0], [0, 0]]), [Node([0], [0.0])]]))
    calls: list[int] = []

    class _Counting(TreePlan):
        def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
            calls.append(layer)
            return super().attend(layer, query, key, value, scale)

    try:
        model.set_attn_implementation(attention.NAME)
        with torch.no_grad():
            device = next(trunk.parameters()).device
            probe = probe.to(device)
            trunk(
                input_ids=probe.input_ids_T[None],
                position_ids=probe.position_ids_T[None],
                use_cache=False,
                **{attention.PLAN_ARGUMENT: _Counting(probe)},
            )
    except (ValueError, TypeError, ModelError, AttributeError):
        calls = []  # the family has its own attention: the padded path below is right for every family
    if sorted(calls) == list(range(layers)):
        return True
    model.set_attn_implementation(before if before != attention.NAME else "eager")
    return False
