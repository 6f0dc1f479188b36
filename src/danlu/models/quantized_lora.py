"""LoRA on quantised layers (QLoRA, Dettmers et al. 2023): `y = Wq x + s B A x`, gradients flow through `Wq` to its input.

PEFT knows linear layers with weights. Layers of `quantize.py` have none: they hold packed numbers and say how many features go
in and out. bitsandbytes' layers are PEFT's own business.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.layer import Linear
from torch import nn


class QuantizedLora(Linear):  # type: ignore[misc,unused-ignore]
    """A quantised layer with LoRA beside it, unmerged."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, *, config: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **options: Any) -> None:
        """PEFT's, which looks for a weight to find the device by."""
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **options)
        device = next(b for b in self.get_base_layer().buffers()).device
        self.lora_A[adapter_name].to(device)
        self.lora_B[adapter_name].to(device)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Packed numbers cannot take an update; `dense_weight` can."""
        raise NotImplementedError("a quantised layer cannot be merged in place")
