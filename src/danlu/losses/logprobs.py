"""Log-probabilities of given tokens without ever holding the `[T, V]` logits.

`log p(t) = z_t - logsumexp(z)` with `z = W h (+ b)`. The forward pass walks over chunks of rows and keeps the row's
logsumexp; the backward pass computes the chunk's logits again: `d log p / d z = onehot(t) - softmax(z)`. Peak memory is
`chunk * V`, whatever T is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CHUNK_ROWS = 1024


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    return logits if temperature == 1.0 else logits / temperature


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk: int,
        entropies: bool,
    ) -> tuple[Tensor, Tensor]:
        rows = hidden.shape[0]
        logprobs = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        entropy = torch.zeros_like(logprobs)
        norm = torch.empty_like(logprobs)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits = _logits(hidden[part], weight, bias, temperature)
            norm[part] = torch.logsumexp(logits, dim=-1)
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - norm[part]
            if entropies:
                probs = torch.exp(logits - norm[part, None])
                entropy[part] = norm[part] - (probs * logits).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, norm)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norm = ctx.saved_tensors
        grad = grads[0]
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = torch.zeros(weight.shape[0], dtype=torch.float32, device=weight.device)
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, min(start + ctx.chunk, hidden.shape[0]))
            logits = _logits(hidden[part], weight, bias, ctx.temperature)
            scale = grad[part] / ctx.temperature
            delta = logits.sub_(norm[part, None]).exp_().mul_(-scale[:, None])
            delta.scatter_add_(1, targets[part, None], scale[:, None])
            small = delta.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = small @ weight
            if ctx.needs_input_grad[1]:
                grad_weight += (small.T @ hidden[part]).float()
            if bias is not None and ctx.needs_input_grad[2]:
                grad_bias += delta.sum(0)
        return (
            grad_hidden,
            grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            grad_bias.to(bias.dtype) if bias is not None and ctx.needs_input_grad[2] else None,
            None,
            None,
            None,
            None,
        )


def token_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = CHUNK_ROWS,
    entropy: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and, if asked for, the entropy of each row's distribution (else zeros); fp32 `[T]`.

    Args:
        hidden_TD: the hidden states that predict the targets; fp32 or bf16.
        weight_VD, bias_V: the language-model head; cast to the dtype of the hidden states for the product.
        targets_T: int64 token ids.
        temperature: > 0; logits are divided by it, as the sampler does.
        chunk: rows whose logits are held at once.
        entropy: whether to compute it (a third of the forward pass); it carries no gradient.
    """
    weight = weight_VD.to(hidden_TD.dtype)
    bias = bias_V.to(hidden_TD.dtype) if bias_V is not None else None
    logprobs, entropies = _TokenLogprobs.apply(hidden_TD, weight, bias, targets_T, temperature, chunk, entropy)
    return logprobs, entropies
