"""Llama-like layers in fewer and larger operations: a fused query-key-value product, norms and rotations in few passes.

A layer of transformers makes some sixty tensors of the size of its input; on small models on a CPU the passes over them cost as
much as its matrix products. Here a layer is two functions around the attention, each with its own backward pass. Products run in
the autocast dtype, the residual stream and all norms in the stream's own (fp32 under autocast), as in transformers. Generation has
a forward of its own, in which query, key and value, and gate and up, are one product each, over weights that lie side by side.
Layers with adapters, hooks in between or another shape keep transformers' forward.

Axes: T tokens, D model width, H query heads, G key/value heads, K head width, I width of the feed-forward part.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from danlu.models import prepacked
from danlu.models.attention import PLAN_ARGUMENT, TreePlan
from danlu.models.packed import PackedLinear, joined

LAYERS = (LlamaDecoderLayer, MistralDecoderLayer, Qwen2DecoderLayer)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def install(trunk: nn.Module) -> int:
    """Gives the layers of a trunk that can have it the lean forward pass; returns how many. Parameters stay what they are."""
    found: list[Any] = [m for m in trunk.modules() if type(m) in LAYERS]
    layers = [m for m in found if m.self_attn.config.hidden_act == "silu"]
    for layer in layers:
        layer.__class__ = _lean(type(layer))  # type: ignore[arg-type]
    return len(layers)


@functools.cache
def _lean(kind: Any) -> type[nn.Module]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        plan = kwargs.get(PLAN_ARGUMENT)
        known = plan is not None and (not isinstance(plan, TreePlan) or plan.on_key_value is None)
        layers = _plain_layers(self) if known and not args else ""
        if not layers or (layers == "packed" and isinstance(plan, TreePlan)):
            reads = _reads(self, plan)
            if reads is not None and not args:
                return _narrow(self, hidden_states, reads, **kwargs)
            return kind.forward(self, hidden_states, *args, **kwargs)
        if isinstance(plan, TreePlan):
            return _forward(self, hidden_states[0], plan, *kwargs["position_embeddings"])[None]
        if torch.is_grad_enabled() or torch.is_autocast_enabled(hidden_states.device.type):
            return kind.forward(self, hidden_states, *args, **kwargs)
        return _generate(self, hidden_states[0], plan, *kwargs["position_embeddings"])[None]

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


def _plain_layers(layer: Any) -> str:
    """Whether a layer's products are all linear ones ("dense") or all "packed"; "" where it has adapters, hooks or dropout."""
    parts = [getattr(layer.self_attn, n) for n in ATTENTION] + [getattr(layer.mlp, n) for n in FEED_FORWARD]
    around = [layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm]
    dropout = layer.self_attn.attention_dropout if layer.training else 0.0
    hooked = any(p._forward_hooks or p._forward_pre_hooks for p in (*around, *parts))
    if dropout or hooked:
        return ""
    if all(type(p) is nn.Linear for p in parts):
        return "dense"
    return "packed" if all(isinstance(p, PackedLinear) for p in parts) else ""


def _forward(layer: Any, x_TD: Tensor, plan: TreePlan, cos: Tensor, sin: Tensor) -> Tensor:
    attention, feed_forward = layer.self_attn, layer.mlp
    device, reads = x_TD.device.type, _reads(layer, plan)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    with torch.autocast(device, enabled=False):
        q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
        query, key, value = _Before.apply(
            x_TD, first.weight, first.variance_epsilon, q.weight, k.weight, v.weight, q.bias, k.bias, v.bias,
            cos[0], sin[0], attention.head_dim, dtype,
        )  # fmt: skip
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {"window": _window(layer), "last": reads is not None}
        mixed = plan.attend(attention.layer_idx, query, key, value, attention.scaling, **options)
        if reads is not None:
            x_TD, mixed = x_TD.index_select(0, reads), mixed.index_select(0, reads)
        o, gate, up, down = attention.o_proj, feed_forward.gate_proj, feed_forward.up_proj, feed_forward.down_proj
        out: Tensor = _After.apply(
            x_TD, mixed.flatten(1), o.weight, o.bias, second.weight, second.variance_epsilon,
            gate.weight, up.weight, gate.bias, up.bias, down.weight, down.bias, dtype,
        )  # fmt: skip
    return out


def _reads(layer: Any, plan: Any) -> Tensor | None:
    """Which rows of its result are read, where the layer is the last one and they are not all."""
    if not isinstance(plan, TreePlan) or layer.self_attn.layer_idx != layer.self_attn.config.num_hidden_layers - 1:
        return None
    return plan.reads


def _narrow(layer: Any, x_1TD: Tensor, reads: Tensor, **kwargs: Any) -> Tensor:
    """transformers' forward pass of a layer, whose feed-forward part sees the rows that are read alone: [1, M, D]."""
    mixed, _ = layer.self_attn(hidden_states=layer.input_layernorm(x_1TD), **{"attention_mask": None, **kwargs})
    middle = x_1TD.index_select(1, reads) + mixed.index_select(1, reads)
    out: Tensor = middle + layer.mlp(layer.post_attention_layernorm(middle))
    return out


def _window(layer: Any) -> int | None:
    window: int | None = getattr(layer.self_attn, "sliding_window", None)
    if window is None and isinstance(layer, MistralDecoderLayer):
        window = layer.self_attn.config.sliding_window
    return window


# -- generation -----------------------------------------------------------------------------------------------------------


def _generate(layer: Any, x_TD: Tensor, plan: Any, cos: Tensor, sin: Tensor) -> Tensor:
    """A layer without gradients."""
    attention, feed_forward = layer.self_attn, layer.mlp
    dtype, width = x_TD.dtype, attention.head_dim
    normed, _ = _norm(x_TD, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon, dtype)
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    rows = _together(attention, [q, k, v], normed).view(len(x_TD), -1, width)
    heads, groups = q.out_features // width, k.out_features // width
    turned = _rotate(rows[:, : heads + groups], cos[0], sin[0]).transpose(0, 1)
    value = rows[:, heads + groups :].transpose(0, 1)
    mixed = plan.attend(
        attention.layer_idx, turned[:heads], turned[heads:], value, attention.scaling, window=_window(layer)
    )
    middle = _product(attention.o_proj, mixed.flatten(1).to(dtype)).add_(x_TD)
    second = layer.post_attention_layernorm
    normed, _ = _norm(middle, second.weight, second.variance_epsilon, dtype)
    inner = feed_forward.gate_proj.out_features
    both = _together(feed_forward, [feed_forward.gate_proj, feed_forward.up_proj], normed)
    active = torch.nn.functional.silu(both[:, :inner]).mul_(both[:, inner:])
    out: Tensor = _product(feed_forward.down_proj, active).add_(middle)
    return out


def products(trunk: nn.Module) -> list[tuple[nn.Module, list[nn.Linear]]] | None:
    """Every product of generation with its owner and the layers that it takes together; None where a layer has another forward."""
    layers: list[Any] = [m for m in trunk.modules() if hasattr(m, "self_attn") and hasattr(m, "mlp")]
    if not layers or any(type(m).__mro__[1] not in LAYERS or _plain_layers(m) != "dense" for m in layers):
        return None
    found: list[tuple[nn.Module, list[nn.Linear]]] = []
    for layer in layers:
        attention, feed_forward = layer.self_attn, layer.mlp
        found.append((attention, [attention.q_proj, attention.k_proj, attention.v_proj]))
        found.append((feed_forward, [feed_forward.gate_proj, feed_forward.up_proj]))
        found += [(part, [part]) for part in (attention.o_proj, feed_forward.down_proj)]
    return found


def _product(part: Any, rows: Tensor) -> Tensor:
    if isinstance(part, PackedLinear):
        out: Tensor = part(rows)
        return out
    return prepacked.linear(part, rows, part.weight, part.bias, [part])


def _together(owner: Any, parts: list[Any], rows: Tensor) -> Tensor:
    """The products of several layers with the same rows, side by side `[T, sum of N]`."""
    if not isinstance(parts[0], PackedLinear):
        return prepacked.linear(owner, rows, *_side_by_side(parts), parts)
    # Kept outside of the module's own attributes, so that it is neither saved nor counted; made again when a part was replaced.
    kept: _Joined | None = owner.__dict__.get("danlu_joined")
    if kept is None or any(a is not b for a, b in zip(kept.codes, (p.codes_as_stored() for p in parts), strict=True)):
        fits = rows.dtype == torch.bfloat16 or parts[0].bits == 8
        layer = joined(parts) if fits else None
        kept = _Joined([p.codes_as_stored() for p in parts], layer)
        owner.__dict__["danlu_joined"] = kept
    if kept.layer is None:
        return torch.cat([p(rows) for p in parts], dim=-1)
    out: Tensor = kept.layer(rows)
    return out


@dataclass(frozen=True)
class _Joined:
    """Several packed layers as one (None: they cannot be), and the codes that they had; copies of a model share it, as they share
    the codes."""

    codes: list[Tensor]
    layer: PackedLinear | None

    def __deepcopy__(self, memo: Any) -> Self:
        return self


def _side_by_side(parts: list[Any]) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of several linear layers as one; the layers' own become views of them, so nothing is held twice.

    Whoever gives a layer other memory (`.to(device)`) finds them laid side by side again at the next call.
    """
    weight = _view_of([p.weight for p in parts])
    biases = [p.bias for p in parts]
    if all(b is None for b in biases):
        return weight, None
    if all(b is not None for b in biases):
        return weight, _view_of(biases)
    return weight, torch.cat([p.weight.new_zeros(p.out_features) if p.bias is None else p.bias for p in parts])


def _view_of(parts: list[Tensor]) -> Tensor:
    first, end = parts[0], parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != end or not part.is_contiguous():
            break
        end += part.numel() * part.element_size()
    else:
        if first.untyped_storage().data_ptr() + first.untyped_storage().nbytes() >= end:
            return first.as_strided((sum(len(p) for p in parts), *first.shape[1:]), first.stride())
    with torch.inference_mode(False):  # the layers may be trained later
        joined = torch.cat([p.detach() for p in parts])
        for part, own in zip(parts, joined.split([len(p) for p in parts]), strict=True):
            part.data = own
    return joined


# -- training -------------------------------------------------------------------------------------------------------------


class _Before(torch.autograd.Function):
    """Norm, the three projections as one product, rotary positions: x -> query [T, H, K], key and value [T, G, K]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, eps: float,
        w_q: Tensor, w_k: Tensor, w_v: Tensor, b_q: Tensor | None, b_k: Tensor | None, b_v: Tensor | None,
        cos: Tensor, sin: Tensor, width: int, dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        normed, scale = _norm(x, norm, eps, dtype)
        weight, bias = _joined([w_q, w_k, w_v], [b_q, b_k, b_v], dtype)
        rows = torch.nn.functional.linear(normed, weight, bias).view(len(x), -1, width)
        heads, groups = w_q.shape[0] // width, w_k.shape[0] // width
        turned = _rotate(rows[:, : heads + groups], cos, sin)
        ctx.save_for_backward(x, norm, scale, normed, weight, cos, sin)
        ctx.sizes = [w.shape[0] for w in (w_q, w_k, w_v)]
        ctx.dtypes = [None if p is None else p.dtype for p in (norm, w_q, w_k, w_v, b_q, b_k, b_v)]
        return turned[:, :heads], turned[:, heads:], rows[:, heads + groups :]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, scale, normed, weight, cos, sin = ctx.saved_tensors
        turned = torch.cat([grads[0], grads[1]], dim=1)
        width = turned.shape[2]
        rows = normed.new_empty(len(x), weight.shape[0] // width, width)
        rows[:, : turned.shape[1]] = _rotate(turned, cos, -sin)
        rows[:, turned.shape[1] :] = grads[2]
        flat = rows.view(len(x), -1)
        needs = ctx.needs_input_grad
        grad_x, grad_norm = _norm_backward(flat @ weight, x, norm, scale)
        weights = [None, None, None]
        if any(needs[3:6]):
            weights = list((flat.T @ normed).split(ctx.sizes))
        biases = [None, None, None]
        if any(needs[6:9]):
            biases = list(flat.float().sum(0).split(ctx.sizes))
        found = [grad_norm, *weights, *biases]
        asked = [needs[1], *needs[3:9]]
        given = [g.to(d) if a and g is not None else None for g, d, a in zip(found, ctx.dtypes, asked, strict=True)]
        return (grad_x if needs[0] else None, given[0], None, *given[1:], None, None, None, None)


class _After(torch.autograd.Function):
    """Output projection, residual, norm, gated feed-forward part, residual."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mixed: Tensor, w_o: Tensor, b_o: Tensor | None, norm: Tensor, eps: float,
        w_gate: Tensor, w_up: Tensor, b_gate: Tensor | None, b_up: Tensor | None, w_down: Tensor, b_down: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        ctx.dtypes = [
            None if p is None else p.dtype for p in (w_o, b_o, norm, w_gate, w_up, b_gate, b_up, w_down, b_down)
        ]
        mixed = mixed.to(dtype)
        weights = [w.to(dtype) for w in (w_o, w_gate, w_up, w_down)]
        b_o, b_gate, b_up, b_down = (None if b is None else b.to(dtype) for b in (b_o, b_gate, b_up, b_down))
        middle = x + torch.nn.functional.linear(mixed, weights[0], b_o)
        normed, scale = _norm(middle, norm, eps, dtype)
        # Two products: halves of a fused one would be strided, and passes over those cost more than the fusion saves.
        gate = torch.nn.functional.linear(normed, weights[1], b_gate)
        up = torch.nn.functional.linear(normed, weights[2], b_up)
        active = torch.nn.functional.silu(gate).mul_(up)
        result = torch.nn.functional.linear(active, weights[3], b_down)
        ctx.save_for_backward(mixed, middle, norm, scale, normed, gate, up, *weights)
        return middle + result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mixed, middle, norm, scale, normed, gate, up, w_o, w_gate, w_up, w_down = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grad = grads[0]
        low = grad.to(normed.dtype)
        silu = torch.nn.functional.silu(gate)
        grad_active = low @ w_down
        grad_down = low.T @ (silu * up) if needs[10] else None
        grad_up = silu.mul_(grad_active)
        grad_gate = torch.ops.aten.silu_backward(grad_active.mul_(up), gate)
        grad_x, grad_norm = _norm_backward((grad_gate @ w_gate).addmm_(grad_up, w_up), middle, norm, scale)
        grad_x += grad
        low_x = grad_x.to(normed.dtype)
        found = [
            low_x.T @ mixed if needs[2] else None,
            grad_x.float().sum(0) if needs[3] else None,
            grad_norm,
            grad_gate.T @ normed if needs[6] else None,
            grad_up.T @ normed if needs[7] else None,
            grad_gate.float().sum(0) if needs[8] else None,
            grad_up.float().sum(0) if needs[9] else None,
            grad_down,
            grad.float().sum(0) if needs[11] else None,
        ]
        asked = [*needs[2:5], *needs[6:12]]
        given = [g.to(d) if a and g is not None else None for g, d, a in zip(found, ctx.dtypes, asked, strict=True)]
        grad_mixed = low_x @ w_o if needs[1] else None
        return (grad_x if needs[0] else None, grad_mixed, *given[:3], None, *given[3:], None)


def _joined(weights: list[Tensor], biases: list[Tensor | None], dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Weights one below the other, in the dtype of products, and their biases."""
    joined = weights[0].new_empty(sum(w.shape[0] for w in weights), weights[0].shape[1], dtype=dtype)
    for part, weight in zip(joined.split([w.shape[0] for w in weights]), weights, strict=True):
        part.copy_(weight)
    present = [b for b in biases if b is not None]
    return joined, torch.cat(present).to(dtype) if present else None


def _norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Root-mean-square norm (Zhang and Sennrich 2019) in `dtype`, and `1 / rms` as fp32 [T, 1]."""
    exact = x.float()
    scale = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_().div_(x.shape[1]).add_(eps).rsqrt_()
    normed = (exact * scale).mul_(weight)
    return normed.to(dtype), scale


def _norm_backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x (in its dtype) and of the weight (fp32)."""
    exact = x.float()
    unit = exact * scale
    grad_weight = torch.mul(unit, grad).sum(0)
    grad_unit = grad * weight.float()
    share = torch.linalg.vecdot(grad_unit, unit)[:, None].div_(x.shape[1])
    grad_x = grad_unit.addcmul_(unit, share, value=-1).mul_(scale)
    return grad_x.to(x.dtype), grad_weight


def _rotate(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), halves of a head against each other: [T, n, K] -> the same in the dtype of cos."""
    half = rows.shape[2] // 2
    cos, sin = cos[:, None, :half], sin[:, None, :half]
    exact = rows.to(cos.dtype)
    low, high = exact[..., :half], exact[..., half:]
    out = torch.empty_like(exact)
    torch.mul(low, cos, out=out[..., :half]).addcmul_(high, sin, value=-1)
    torch.mul(high, cos, out=out[..., half:]).addcmul_(low, sin)
    return out
