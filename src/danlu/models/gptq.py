"""GPTQ: 4-bit weights that are calibrated on text (Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization").

Layer by layer: a layer's inputs X, as the layers quantised before it give them, make the Hessian `H = 2 X X^T` of the error of its
output; columns are rounded one after the other, and what a column is off by is taken out of those that are still to come, by the
Cholesky factor of the inverse Hessian (algorithm 1). Inside a transformer layer, products that read the same input are done
together, in the order they run, and the later ones see what the earlier ones became.

Departures: the text is rows of equal length without padding; groups keep the columns they have in the file (the scales of all
groups are fixed first, from the weights as they were), so that with act-order, too, nothing is reordered when the model runs.

Axes: N outputs, K inputs of a linear layer, R rows and L tokens of the calibration text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models.packed import Int4Linear, PackedLinear, codes4, group_of, group_scales, pack, pack4
from danlu.models.quantized_layers import linear_layers, replace, weight_of

BLOCK = 128  # columns whose corrections to the rest are applied at once
SEARCH = tuple(1.0 - 0.05 * i for i in range(9))  # shares of a group's span that are tried for its scale


class _Stop(Exception):
    """Ends a forward pass once the first layer's input is known."""


def quantize_gptq(
    model: Any,
    rows_RL: Tensor,
    *,
    group_size: int = 64,
    symmetric: bool = False,
    act_order: bool = True,
    damp: float = 0.01,
    on_layer: Callable[[int, int], None] | None = None,
) -> Any:
    """Replaces the linear layers of a causal language model by calibrated 4-bit ones, in place.

    Args:
        rows_RL: token ids of the calibration text.
        group_size: columns that share a scale; rows that no group divides are kept in 8 bits.
        symmetric: without zeros.
        act_order: columns with the largest inputs are rounded first.
        damp: share of the Hessian's mean diagonal that is added to it; > 0.
        on_layer: called with (layers done, layers).

    Raises:
        ModelError: the model is quantised already, has no linear layers, or its layers are not a list of modules.
    """
    named = {id(m): n for n, m in linear_layers(model).items()}
    blocks = transformer_layers(model)
    with torch.no_grad():
        calls = _first_inputs(model, blocks[0], rows_RL)
        for number, block in enumerate(blocks):
            for group in _in_order(block, calls[0], named):
                hessian = _hessian(block, calls, group[0])
                for linear in group:
                    layer = _calibrated(linear, hessian, group_size, symmetric, act_order, damp)
                    replace(model, named.pop(id(linear)), layer)
            calls = [((_first(block(*args, **kwargs)), *args[1:]), kwargs) for args, kwargs in calls]
            if on_layer is not None:
                on_layer(number + 1, len(blocks))
        for name, left in linear_layers_left(model, named).items():  # outside of the layers, or never run
            replace(model, name, pack(weight_of(left), _bias(left), 8))
    return model


def linear_layers_left(model: Any, named: dict[int, str]) -> dict[str, nn.Module]:
    """The layers that have not been replaced yet, by name."""
    return {name: model.get_submodule(name) for name in named.values()}


def transformer_layers(model: Any) -> nn.ModuleList:
    """The longest list of modules in a model that holds linear layers.

    Raises:
        ModelError: there is none.
    """
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of layers to calibrate one by one", hint="--method rtn")
    return max(lists, key=len)


Call = tuple[tuple[Any, ...], dict[str, Any]]


def _first_inputs(model: Any, block: nn.Module, rows_RL: Tensor) -> list[Call]:
    """The first layer's arguments for every row."""
    calls: list[Call] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not args:  # hidden states by name
            args, kwargs = (kwargs["hidden_states"],), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        calls.append((args, kwargs))
        raise _Stop

    handle = block.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for row in rows_RL.to(model.device):
            try:
                model(input_ids=row[None], use_cache=False)
            except _Stop:
                continue
    finally:
        handle.remove()
    return calls


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _in_order(block: nn.Module, call: Call, named: dict[int, str]) -> list[list[nn.Module]]:
    """The block's linear layers as they run; those that read the same tensor together."""
    order: list[list[nn.Module]] = []
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        if seen and args[0] is seen[-1]:
            order[-1].append(module)
        else:
            order.append([module])
            seen.append(args[0])

    handles = [m.register_forward_pre_hook(note) for m in block.modules() if id(m) in named]
    try:
        block(*call[0], **call[1])
    finally:
        for handle in handles:
            handle.remove()
    return order


def _hessian(block: nn.Module, calls: Sequence[Call], linear: nn.Module) -> Tensor:
    """fp32 `2 X X^T / tokens` `[K, K]` of a linear layer's inputs over all rows."""
    found: list[Tensor] = []
    count = 0

    def add(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal count
        x = args[0].reshape(-1, args[0].shape[-1]).float()
        count += len(x)
        product = x.T @ x
        found[:] = [product if not found else found[0].add_(product)]

    handle = linear.register_forward_pre_hook(add)
    try:
        for args, kwargs in calls:
            block(*args, **kwargs)
    finally:
        handle.remove()
    return found[0].mul_(2.0 / max(1, count))


def _bias(linear: nn.Module) -> Tensor | None:
    bias = getattr(linear, "bias", None)
    return None if bias is None else bias.detach()


def _calibrated(
    linear: nn.Module, hessian: Tensor, group_size: int, symmetric: bool, act_order: bool, damp: float
) -> PackedLinear:
    weight = weight_of(linear)
    group = group_of(weight.shape[1], group_size)
    if not group:
        return pack(weight, _bias(linear), 8)
    scale, zero = scales_by_error(weight.float(), hessian.diagonal(), group, symmetric=symmetric)
    codes = gptq_codes(weight.float(), hessian, scale, zero, act_order=act_order, damp=damp)
    return Int4Linear(pack4(codes), scale, zero, _bias(linear))


def scales_by_error(
    weight: Tensor, importance_K: Tensor, group: int, *, symmetric: bool
) -> tuple[Tensor, Tensor | None]:
    """Scales and zeros of a weight's groups with the least squared error of rounding, inputs weighted by the Hessian's diagonal.

    Of every group, shares of its span are tried (`SEARCH`): cutting few large weights off can make all others finer.
    """
    grouped = weight.view(len(weight), -1, group)
    heavy = importance_K.float().view(-1, group)
    best = torch.full(grouped.shape[:2], torch.inf)
    scale, zero = group_scales(grouped, symmetric=symmetric)
    for share in SEARCH:
        tried, middle = group_scales(grouped * share, symmetric=symmetric)
        column, level = tried[..., None].float(), None if middle is None else middle[..., None]
        values = (codes4(grouped, column, level) - (8.0 if level is None else level.float())) * column
        error = ((values - grouped).square_() * heavy).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale = torch.where(better, tried, scale)
        zero = middle if zero is None or middle is None else torch.where(better, middle, zero)
    return scale, zero


def gptq_codes(
    weight: Tensor, hessian: Tensor, scale: Tensor, zero: Tensor | None, *, act_order: bool = True, damp: float = 0.01
) -> Tensor:
    """uint8 codes `[N, K]` of an fp32 weight by algorithm 1, for given scales `[N, G]` and zeros.

    Args:
        hessian: `[K, K]`, symmetric, not negative definite; inputs that were always 0 may have empty rows.
    """
    columns = weight.shape[1]
    group = columns // scale.shape[1]
    weight, hessian = weight.clone(), hessian.clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    weight[:, dead] = 0.0
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
    weight, hessian = weight[:, order], hessian[order][:, order]
    hessian.diagonal().add_(damp * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    places = order.tolist()
    for first in range(0, columns, BLOCK):
        last = min(first + BLOCK, columns)
        errors = torch.empty(len(weight), last - first)
        for at in range(first, last):
            own = places[at] // group
            column, middle = scale[:, own].float(), 8.0 if zero is None else zero[:, own].float()
            code = torch.round(weight[:, at] / column + middle).clamp_(0, 15)
            codes[:, places[at]] = code.to(torch.uint8)
            error = (weight[:, at] - (code - middle) * column) / factor[at, at]
            weight[:, at:last] -= error[:, None] * factor[at, at:last]
            errors[:, at - first] = error
        weight[:, last:] -= errors @ factor[first:last, last:]
    return codes
