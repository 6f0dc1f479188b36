"""Log-probabilities and cross entropy of given tokens without ever holding the `[T, V]` logits.

With `z = rule(W h + b)` and `log p(t) = z_t - logsumexp(z)`, rows go through in chunks, and a chunk's logits are turned in
place into `onehot(t) - softmax(z)`, from which all gradients follow. Where the row's weight in the loss is known beforehand
(cross entropy), or only hidden states learn, the forward pass takes the gradients at once; otherwise the backward pass
computes a chunk's logits again. Peak memory is one chunk and the gradient of the head, whatever T is. Products run in the
dtype of the hidden states; exponentials, sums and the head's gradient are fp32 (fp64 for hidden states in fp64).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from danlu.shapes import compiles, rounded

# Entries of a chunk of logits, and of the part of a chunk that is held in fp32 on a CPU: a part stays in the cache, and its
# memory is not asked from the system anew for every chunk.
CHUNK_ENTRIES = 1 << 23
CHUNK_ENTRIES_CUDA = 1 << 26  # a card wants large products
PART_ENTRIES = 1 << 19


@dataclass(frozen=True)
class _Rule:
    """`softcap * tanh(scale * z / softcap) / temperature`; without a cap `scale * z / temperature`."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def apply_(self, logits: Tensor) -> Tensor:
        """In place on fp32 (or fp64) logits."""
        if self.softcap is None:
            factor = self.scale / self.temperature
            return logits if factor == 1.0 else logits.mul_(factor)
        return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | float:
        """`d rule(z) / d z` from the rule's result."""
        factor = self.scale / self.temperature
        if self.softcap is None:
            return factor
        return logits.mul(self.temperature / self.softcap).square_().neg_().add_(1.0).mul_(factor)


class _Head:
    """The product `h W^T + b` in chunks, and the gradients that a chunk's `d loss / d z` adds to hidden states and head."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rule: _Rule, chunk: int | None) -> None:
        self.rows = hidden.shape[0]
        if self.rows and compiles(hidden.device, hidden.dtype):
            # Rows of zeros, whose gradients are zero and go nowhere.
            hidden = torch.nn.functional.pad(hidden, (0, 0, 0, rounded(self.rows) - self.rows))
        self.hidden, self.weight, self.bias, self.rule, self.chunk = hidden, weight, bias, rule, chunk
        self.computed = weight.to(hidden.dtype)
        self.precise = torch.promote_types(hidden.dtype, torch.float32)
        self.grad_hidden: Tensor | None = None
        self.grad_weight: Tensor | None = None
        self.grad_bias: Tensor | None = None

    def want(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Which gradients to take."""
        self.grad_hidden = torch.empty_like(self.hidden) if hidden else None
        self.grad_weight = torch.zeros_like(self.weight, dtype=self.precise) if weight else None
        self.grad_bias = torch.zeros_like(self.bias, dtype=self.precise) if bias and self.bias is not None else None

    def parts(self) -> Iterator[tuple[slice, Tensor, Tensor | float]]:
        """(rows, logits after the rule, the rule's slope there) of every part, in fp32 or better.

        What the caller leaves in the logits is `d loss / d z`; when a chunk is complete, it goes into the wanted gradients.
        """
        total, vocab = self.hidden.shape[0], self.weight.shape[0]
        entries = CHUNK_ENTRIES_CUDA if self.hidden.is_cuda else CHUNK_ENTRIES
        chunk = max(1, min(total, self.chunk or max(256, entries // vocab)))
        size = chunk if self.hidden.is_cuda else max(1, min(chunk, PART_ENTRIES // vocab))
        buffer = self.hidden.new_empty(chunk, vocab)
        exact = self.hidden.dtype == self.precise
        scratch = buffer[:0] if exact else self.hidden.new_empty(size, vocab, dtype=self.precise)
        graded = any(g is not None for g in (self.grad_hidden, self.grad_weight, self.grad_bias))
        for first in range(0, total, chunk):
            rows = slice(first, min(first + chunk, total))
            raw = buffer[: rows.stop - first]
            real = min(raw.shape[0], self.rows - first)
            torch.mm(self.hidden[rows], self.computed.T, out=raw)
            if self.bias is not None:
                raw.add_(self.bias)
            for start in range(0, real, size):
                part = raw[start : min(start + size, real)]
                logits = self.rule.apply_(part if exact else scratch[: part.shape[0]].copy_(part))
                slope = self.rule.slope(logits) if graded else 1.0
                yield slice(first + start, first + start + part.shape[0]), logits, slope
                if graded:
                    if not isinstance(slope, float) or slope != 1.0:
                        logits.mul_(slope)
                    if self.grad_bias is not None:
                        self.grad_bias += logits.sum(0)
                    if not exact:
                        part.copy_(logits)
            if self.grad_hidden is not None:
                torch.mm(raw, self.computed, out=self.grad_hidden[rows])
            if self.grad_weight is not None:
                if exact:
                    self.grad_weight.addmm_(raw.T, self.hidden[rows])
                else:
                    self.grad_weight += raw.T @ self.hidden[rows]

    def gradients(self, factor: Tensor | None = None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias, in their dtypes; `factor`: one number that all are multiplied by."""
        grad = self.grad_hidden
        found = (grad[: self.rows] if grad is not None else None, self.grad_weight, self.grad_bias)
        if factor is not None:
            found = tuple(g * factor.to(g.dtype) if g is not None else None for g in found)  # type: ignore[assignment]
        grad_hidden, grad_weight, grad_bias = found
        return (
            grad_hidden,
            grad_weight.to(self.weight.dtype) if grad_weight is not None else None,
            grad_bias.to(self.bias.dtype) if grad_bias is not None and self.bias is not None else None,
        )


def _logprobs_(
    logits: Tensor, targets: Tensor, factor: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(log p of the targets, logsumexp, entropies), each one per row.

    Args:
        factor: one number per row; given, the logits become `factor * (onehot(target) - softmax)`, in place.
    """
    top = logits.amax(-1, keepdim=True)
    logits.sub_(top)
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    shifted = logits.clone() if entropy else None
    total = logits.exp_().sum(-1)
    norm = total.log()
    entropies = norm - shifted.mul_(logits).sum(-1) / total if shifted is not None else None
    if factor is not None:
        logits.mul_(-(factor / total)[:, None]).scatter_add_(1, targets[:, None], factor[:, None])
    return picked - norm, norm + top.squeeze(1), entropies


@functools.cache
def _compiled() -> Callable[..., Any]:
    """`_logprobs_` as torch.compile makes it: a pass or two over a chunk in place of one for each operation."""
    return torch.compile(_logprobs_, dynamic=True)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rule: _Rule,
        chunk: int | None,
        entropies: bool,
        compiled: bool,
    ) -> tuple[Tensor, Tensor]:
        head = _Head(hidden, weight, bias, rule, chunk)
        logprobs = hidden.new_empty(hidden.shape[0], dtype=head.precise)
        entropy = torch.zeros_like(logprobs)
        norm = torch.empty_like(logprobs)
        # The gradient of an entropy is not a multiple of that of its log-probability: then the backward pass computes both.
        at_once = ctx.needs_input_grad[0] and not any(ctx.needs_input_grad[1:3]) and not entropies
        if at_once:
            head.want(True, False, False)
        for rows, logits, _ in head.parts():
            ones = torch.ones_like(logprobs[rows]) if at_once else None
            run = _compiled() if compiled else _logprobs_
            logprobs[rows], norm[rows], found = run(logits, targets[rows], ones, entropies)
            if found is not None:
                entropy[rows] = found
        ctx.unit = head.grad_hidden[: head.rows] if head.grad_hidden is not None else None
        if not at_once:
            ctx.save_for_backward(hidden, weight, bias, targets, norm, entropy)
        ctx.rule, ctx.chunk = rule, chunk
        if not entropies:
            ctx.mark_non_differentiable(entropy)
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """`d log p(t) / d z_j = 1[j = t] - p_j` and `d H / d z_j = -p_j (log p_j + H)`, per row."""
        grad, entropy_grad = grads
        if ctx.unit is not None:
            return (ctx.unit * grad[:, None].to(ctx.unit.dtype) if grad is not None else None, *[None] * 7)
        hidden, weight, bias, targets, norm, entropy = ctx.saved_tensors
        grad = torch.zeros_like(norm) if grad is None else grad
        head = _Head(hidden, weight, bias, ctx.rule, ctx.chunk)
        head.want(*ctx.needs_input_grad[:3])
        for rows, logits, _ in head.parts():
            logits.sub_(norm[rows, None])
            if entropy_grad is None:
                logits.exp_().mul_(-grad[rows, None])
            else:
                surprise = logits + entropy[rows, None]
                surprise.mul_(-entropy_grad[rows, None]).sub_(grad[rows, None])
                logits.exp_().mul_(surprise)
            logits.scatter_add_(1, targets[rows, None], grad[rows, None])
        return (*head.gradients(), *[None] * 5)


class _WeightedNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        loss_weights: Tensor,
        rule: _Rule,
        chunk: int | None,
        compiled: bool,
    ) -> Tensor:
        head = _Head(hidden, weight, bias, rule, chunk)
        loss = hidden.new_zeros((), dtype=head.precise)
        head.want(*ctx.needs_input_grad[:3])
        graded = any(ctx.needs_input_grad[:3])
        for rows, logits, _ in head.parts():
            run = _compiled() if compiled else _logprobs_
            logprobs, _, _ = run(logits, targets[rows], -loss_weights[rows] if graded else None, False)
            loss -= (logprobs * loss_weights[rows]).sum()
        ctx.head = head
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        head, ctx.head = ctx.head, None
        return (*head.gradients(grads[0]), *[None] * 5)


def token_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    entropy: bool = False,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and, if asked for, the entropy of each row's distribution (else zeros); fp32 `[T]`.

    Args:
        hidden_TD: the hidden states that predict the targets; fp32 or bf16.
        weight_VD, bias_V: the language-model head; cast to the dtype of the hidden states for the product.
        targets_T: int64 token ids.
        temperature: > 0; logits are divided by it, as the sampler does.
        scale: a family's own factor (Granite, Cohere), before the cap.
        softcap: > 0, a bound on logits (Gemma 2; Bello et al. 2016); None for none.
        chunk: rows whose logits are held at once, default by V.
        entropy: whether to compute it; gradients flow through it, too.
        compiled: by torch.compile, what stands between the products; the first call takes long and needs a C++ compiler on CPUs.
    """
    rule = _Rule(scale, softcap, temperature)
    logprobs, entropies = _TokenLogprobs.apply(hidden_TD, weight_VD, bias_V, targets_T, rule, chunk, entropy, compiled)
    return logprobs, entropies


def weighted_nll(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    loss_weight_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    compiled: bool = False,
) -> Tensor:
    """`-sum_t w_t log p_t` as one fp32 number: `token_logprobs` for losses whose weights are known, a third cheaper.

    Args:
        loss_weight_T: fp32, any sign; no gradient flows to it.
        hidden_TD, weight_VD, targets_T, bias_V, scale, softcap, chunk, compiled: as in `token_logprobs`.
    """
    weights = loss_weight_T.to(torch.promote_types(hidden_TD.dtype, torch.float32))
    rule = _Rule(scale, softcap)
    loss: Tensor = _WeightedNll.apply(hidden_TD, weight_VD, bias_V, targets_T, weights, rule, chunk, compiled)
    return loss
