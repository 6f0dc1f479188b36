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
from danlu.models import attention, lean, padded, planned
from danlu.models.attention import TreePlan
from danlu.models.families import TESTED, check_length, check_table, refuse
from danlu.models.heads import LogitRule, head_weights, logits_of
from danlu.models.resting import products, rests
from danlu.models.virtual_root import NAME as PREFIX
from danlu.models.virtual_root import Prefix
from danlu.shapes import compiles, computed_in, part_of, rounded
from danlu.text.tokenizer import quiet
from danlu.tree import Node, TreeBatch, branches, forest

# Of a batch's tokens; with more of them, a twentieth of the time is not worth the memory of more compiled products (docs/log.md).
WORTH_LEAVING_OUT = 0.4

Reads = Callable[[TreeBatch], Tensor]
RoleName = Literal["policy", "ref", "critic", "reward"]
Result = TypeVar("Result")


class Trunks(Protocol):
    """Who runs a role: implemented in `models/roles.py` and `models/prefix.py`.

    Whose roles have prefixes of their own also has `prefix(role) -> Prefix | None`.
    """

    def trunk(self, role: RoleName) -> nn.Module:
        """The transformer of a role (no head), ready to be called; adapters are selected here."""
        ...

    def head(self, role: RoleName) -> Any:
        """The role's head: `[V, D]` for policy and ref, `[1, D]` for critic and reward; see `models/heads.py`."""
        ...


@dataclass(frozen=True)
class TrunkOutput:
    """What a `head_fn` gets.

    hidden_TD: after the final norm; tree: the batch; linear: the role's head; rule: from its product to logits; compiled: whether
    torch.compile makes what turns these into log-probabilities.
    Log-probabilities: `training/logprobs.py`.
    """

    hidden_TD: Tensor
    tree: TreeBatch
    linear: nn.Module
    rule: LogitRule
    compiled: bool = False

    def head_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[V, D]` and bias of the head, with its adapter."""
        return head_weights(self.linear, self.hidden_TD.dtype)

    def logits(self, index_M: Tensor) -> Tensor:
        """fp32 logits `[M, V]` after the tokens at `index_M`; for tests and scoring, not for training."""
        product: Tensor = self.linear(self.hidden_TD.index_select(0, index_M))
        return self.rule(product.float())

    def values(self, index_M: Tensor) -> Tensor:
        """The scalar head, in fp32, before the tokens at `index_M` are taken: `V(s_t)` of the state that predicts token t."""
        return self.scores(self.tree.predictor_T[index_M])

    def scores(self, index_M: Tensor) -> Tensor:
        """The scalar head, in fp32, at the tokens `index_M` themselves."""
        rows = self.hidden_TD.index_select(0, index_M).float()
        with torch.autocast(rows.device.type, enabled=False):
            weight, bias = self.head_weights()
            return nn.functional.linear(rows, weight.float(), bias.float() if bias is not None else None).squeeze(-1)


class RootModel(nn.Module):
    """The root. `trunks` must be an `nn.Module` that also is a `Trunks`; `compiled`: see `TrunkOutput`."""

    def __init__(self, trunks: nn.Module, *, compiled: bool = False) -> None:
        super().__init__()
        self.trunks, self.compiled = trunks, compiled

    def forward(
        self,
        tree: TreeBatch,
        role: RoleName,
        head_fn: Callable[[TrunkOutput], Result],
        *,
        reads: Reads | None = None,
    ) -> Result:
        """Runs the role's trunk on the tree and then `head_fn` on its output.

        Args:
            reads: the tokens whose hidden states `head_fn` reads, as often as it likes (`TreeBatch.before_loss`); the last layer
                then leaves the others out, where that saves something, and their hidden states are no numbers. None: all.
        """
        trunks: Trunks = self.trunks  # type: ignore[assignment]
        trunk = trunks.trunk(role)
        prefix_of = getattr(trunks, "prefix", None)
        prefix = prefix_of(role) if prefix_of is not None else None
        hidden = run_trunk(trunk, tree, role, prefix, reads(tree) if reads is not None else None)
        return head_fn(TrunkOutput(hidden, tree, trunks.head(role), LogitRule.of(trunk.config), self.compiled))


def run_trunk(
    trunk: Any,
    tree: TreeBatch,
    role: RoleName | None = None,
    prefix: Prefix | None = None,
    reads: Tensor | None = None,
) -> Tensor:
    """Hidden states `[T, D]` of a transformer without head on a tree: the fast path if `prepare` found it, else padded.

    Args:
        role: whose adapter reads.
        prefix: what every tree has before it; None: what the trunk carries (`prefix.attach`), if anything.
        reads: indices of the tokens whose hidden states are read; those of others may be NaN. None: all are.

    Raises:
        ModelError: a path is longer than this model's positions allow.
    """
    prefix = prefix if prefix is not None else getattr(trunk, PREFIX, None)
    root = prefix.root(trunk, role) if prefix is not None else None
    longest = int(tree.position_ids_T.max()) + 1
    check_length(trunk.config, longest + (root.offset if root is not None else 0))
    check_table(trunk, longest, root.offset if root is not None else 0)
    fast = getattr(trunk, "danlu_fast_path", False)
    tokens = tree.tokens
    weight = next(trunk.parameters())
    padding = fast and compiles(weight.device, computed_in(weight))
    if padding:
        tree = tree.filled(rounded(tokens) - tokens)
    plan = TreePlan(tree, role, root, _rows_read(reads, tree.tokens, padding) if fast and reads is not None else None)
    if fast:
        return _run_fast(trunk, tree, plan)[:tokens]
    with attention.carrying(trunk, plan):  # roles are found by it
        return padded.run_trunk(trunk, tree, root)


def _rows_read(reads: Tensor, tokens: int, padding: bool) -> Tensor | None:
    """The indices each once, some others with them for a size that comes back; None where that leaves too little out."""
    mask = reads.new_zeros(tokens, dtype=torch.bool)
    mask[reads] = True
    rows = mask.nonzero().squeeze(1)
    size = part_of(tokens, len(rows)) if padding else len(rows)
    if not len(rows) or size > WORTH_LEAVING_OUT * tokens:
        return None
    others = (~mask).nonzero().squeeze(1)
    return torch.cat([rows, others[len(others) - (size - len(rows)) :]])


def _run_fast(trunk: Any, tree: TreeBatch, plan: TreePlan) -> Tensor:
    offset = plan.root.offset if plan.root is not None else 0
    positions_1T = tree.position_ids_T[None] + offset
    output = attention.planned_call(trunk, plan, input_ids=tree.input_ids_T[None], position_ids=positions_1T)
    hidden: Tensor = output.last_hidden_state[0]
    if len(hidden) == tree.tokens:
        return hidden
    assert plan.reads is not None, "or no layer leaves rows out"
    return hidden.new_full((tree.tokens, hidden.shape[1]), float("nan")).index_copy(0, plan.reads, hidden)


def prepare(model: Any) -> Any:
    """Sets a transformers model up for token trees, and finds out by trying whether its attention takes a plan.

    Raises:
        ModelError: the family is one that trees would train wrongly, or its head is not a linear layer and what
            `LogitRule` knows.
    """
    refuse(model.config)
    quiet()  # transformers warns of each family whose attention takes none
    trunk = model.base_model
    trunk.danlu_fast_path = _takes_plan(model, trunk)
    return model


def _takes_plan(model: Any, trunk: Any) -> bool:
    before = model.config._attn_implementation
    before = before if before != attention.NAME else "eager"
    probe = TreeBatch.of(forest([branches([0, 1], [[2], [1, 0]]), [Node([1, 2], [0.0, 0.0])]]))
    probe = probe.to(next(trunk.parameters()).device)
    training = model.training
    if training:
        model.eval()
    try:
        with torch.no_grad(), products(trunk):
            expected = None
            if model.config.model_type not in TESTED:
                model.set_attn_implementation(before)
                expected = padded.run_trunk(trunk, probe)
                _check_head(model, probe, expected)
            model.set_attn_implementation(attention.NAME)
            planned.install(trunk)
            found = _try(trunk, probe)
            if found is None:  # perhaps its layers drop the argument; roles are found by it on the padded path too
                attention.carry(trunk)
                found = _try(trunk, probe)
    finally:
        if training:
            model.train()
    if found is not None and (expected is None or _near(found, expected, exact=not rests(trunk))):
        lean.install(trunk)
        return True
    model.set_attn_implementation(before)
    return False


class _Counting(TreePlan):
    """A plan that notes which layers attended, and with which window."""

    def __init__(self, tree: TreeBatch) -> None:
        super().__init__(tree)
        self.windows: dict[int, int | None] = {}

    def attend(self, layer: int, *args: Any, **options: Any) -> Tensor:
        self.windows[layer] = options.get("window")
        return super().attend(layer, *args, **options)


def _try(trunk: Any, probe: TreeBatch) -> Tensor | None:
    """Hidden states of the fast path; None if a layer does not attend by the plan, or not with the window of its type."""
    plan = _Counting(probe)
    try:
        hidden = _run_fast(trunk, probe, plan)
    except (ValueError, TypeError, ModelError, AttributeError):
        return None  # the family has its own attention: the padded path is right for every family
    config = trunk.config
    layers = range(config.num_hidden_layers)
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    sliding = {layer for layer in layers if types[layer] == "sliding_attention"}
    if not sliding <= {layer for layer, window in plan.windows.items() if window}:
        return None
    return hidden if sorted(plan.windows) == list(layers) else None


def _near(found: Tensor, expected: Tensor, *, exact: bool = True) -> bool:
    tolerance = 1e-3 if found.dtype == torch.float32 and exact else 5e-2
    return float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())


def _check_head(model: Any, probe: TreeBatch, hidden: Tensor) -> None:
    """Compares logits by `logits_of` with the model's own, on the first path of the probe."""
    if model.get_output_embeddings() is None:
        return
    path = probe.token_index(probe.path(probe.leaves()[0])).to(hidden.device)
    own = model(input_ids=probe.input_ids_T[path][None], use_cache=False).logits[0]
    if not _near(logits_of(model, hidden[path]).float(), own.float(), exact=not rests(model.base_model)):
        raise ModelError(
            f"'{model.config.model_type}' makes logits from hidden states in a way that danlu does not know",
            hint="please report the family; until then it cannot be trained or scored",
        )
