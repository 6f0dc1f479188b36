"""The last layer of a language model: which weight multiplies the hidden states, and what becomes of the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.models import prepacked
from danlu.models.packed import PackedLinear

SCALAR_HEADS = ("score", "classifier")  # transformers' names for heads of one number, or of classes


@dataclass(frozen=True)
class LogitRule:
    """`softcap * tanh(scale * z / softcap)`; without a cap `scale * z`.

    Args:
        scale: a family's own factor: Granite divides by `logits_scaling`, Cohere multiplies by `logit_scale`, a tied T5 divides
            by the root of its width.
        softcap: > 0, Gemma 2's `final_logit_softcapping`; None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> LogitRule:
        """The rule of a model by its configuration."""
        divisor = getattr(config, "logits_scaling", None) or 1.0
        scale = getattr(config, "logit_scale", None) or 1.0
        if getattr(config, "scale_decoder_outputs", False):  # T5 with a tied head
            scale *= config.d_model**-0.5
        return cls(float(scale) / float(divisor), getattr(config, "final_logit_softcapping", None))

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def logits_of(model: Any, hidden: Tensor) -> Tensor:
    """Logits `[..., V]` of a causal language model from hidden states `[..., D]` after its last norm."""
    head, rule = model.get_output_embeddings(), LogitRule.of(model.config)
    if type(head) is nn.Linear and hidden.dim() == 2:
        return rule(prepacked.linear(head, hidden, head.weight, head.bias, [head]))
    return rule(head(hidden))


def head_of(model: Any) -> Any:
    """The head of a causal language model or of a scalar (sequence classification) model; a linear layer, LoRA on it or not.

    Raises:
        ModelError: the model has neither.
    """
    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, nn.Linear):
            return head
    head = _selected(model.get_output_embeddings())
    if not isinstance(getattr(head, "base_layer", head), nn.Linear | PackedLinear):
        raise ModelError(
            f"{type(model).__name__} has no linear head", hint="use a causal language model or a reward model"
        )
    return head


def _selected(head: Any) -> Any:
    """Of a head that adapters have copies of (PEFT's `modules_to_save`) the copy that is selected, or the head itself."""
    if not hasattr(head, "modules_to_save"):
        return head
    active = [] if head.disable_adapters else [name for name in head.active_adapters if name in head.modules_to_save]
    return head.modules_to_save[active[0]] if active else head.original_module


def head_weights(head: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor | None]:
    """Weight `[V, D]` and bias of a head with its selected adapter added, if it has one; gradients flow to all of them.

    Args:
        dtype: of the whole weight of a packed head; others come as they are.

    Raises:
        ModelError: the adapter is more than a product of two matrices (DoRA), or drops out.
    """
    adapted: Any = head
    linear = getattr(head, "base_layer", adapted)
    weight = linear.dequantized(dtype) if isinstance(linear, PackedLinear) else linear.weight
    bias = linear.bias
    if linear is head or adapted.disable_adapters:
        return weight, bias
    for name in adapted.active_adapters:
        if name not in adapted.lora_A:
            continue
        if name in adapted.lora_variant or (head.training and isinstance(adapted.lora_dropout[name], nn.Dropout)):
            raise ModelError("an adapter on the output head can be plain LoRA without dropout only")
        weight = weight + adapted.get_delta_weight(name).to(weight.dtype)
    return weight, bias
