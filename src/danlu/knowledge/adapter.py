"""A trainable low-rank change of a frozen model: PEFT's AdaLoRA or LoRA under danlu's root, and its plain factors afterwards."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from danlu.exceptions import ModelError, SettingsError
from danlu.knowledge_config import TeachSettings
from danlu.models.heads import head_of
from danlu.models.patches import Factors
from danlu.models.root import RoleName, prepare

ADAPTER = "fact"
ORTHOGONAL = 0.1  # weight of AdaLoRA's regulariser (Zhang et al. 2023, equation 4)


class Patched(nn.Module):
    """A model with one adapter that learns; everything else is frozen. A `Trunks` of `models/root.py` for the role "policy"."""

    def __init__(self, model: Any, settings: TeachSettings, seed: int) -> None:
        """
        Args:
            model: a causal language model; it is changed in place until `unload`.
            seed: of the adapter's first weights.

        Raises:
            ModelError: no module of the model fits `settings.target`.
        """
        from peft import get_peft_model

        super().__init__()
        self._kind = settings.adapter
        prepare(model)
        trunk = model.base_model
        fast = trunk.danlu_fast_path
        self._before = {name: p.requires_grad for name, p in model.named_parameters()}
        config = _config(settings, fan_in_fan_out=any(isinstance(m, Conv1D) for m in model.modules()))
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(seed)
            # peft 0.21 reads an attribute that transformers 5.23 renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            try:
                self.peft = get_peft_model(model, config, adapter_name=ADAPTER)
            except ValueError as error:
                raise ModelError(f"the adapter does not fit this model: {error}", hint="change target") from error
        self.base.base_model.danlu_fast_path = fast
        self.learning = [p for p in self.peft.parameters() if p.requires_grad]

    @property
    def base(self) -> Any:
        return self.peft.get_base_model()

    def trunk(self, role: RoleName) -> nn.Module:
        trunk: nn.Module = self.base.base_model
        return trunk

    def head(self, role: RoleName) -> Any:
        return head_of(self.base)

    def penalty(self) -> Tensor | None:
        """AdaLoRA's `||A A^T - I||_F^2 + ||B^T B - I||_F^2`, the mean over matrices, times its weight; LoRA has none."""
        if self._kind != "adalora":
            return None
        found = []
        for name, p in self.peft.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                found.append((gram - torch.eye(len(gram), device=p.device)).square().sum())
        return ORTHOGONAL * torch.stack(found).mean()

    def prune(self, step: int) -> None:
        """After the optimizer's step (1, 2, ...) and before gradients are cleared: AdaLoRA gives its ranks out anew."""
        if self._kind == "adalora":
            self.peft.base_model.update_and_allocate(step)

    def factors(self) -> dict[str, Factors]:
        """The change as plain products, scale included; ranks that were pruned, and modules without any left, are not in it."""
        found = {}
        with torch.no_grad():
            for name, module in self.base.named_modules():
                if ADAPTER not in getattr(module, "lora_A", {}):
                    continue
                a, b = module.lora_A[ADAPTER], module.lora_B[ADAPTER]
                if self._kind == "adalora":
                    scale = module.scaling[ADAPTER] / (module.ranknum[ADAPTER] + 1e-5)
                    a, b = a * module.lora_E[ADAPTER], b * scale
                else:
                    a, b = a.weight, b.weight * module.scaling[ADAPTER]
                kept = (a.abs().sum(1) > 0) & (b.abs().sum(0) > 0)
                if kept.any():
                    found[name] = Factors(a[kept].detach().clone(), b[:, kept].detach().clone())
        return found

    def unload(self) -> Any:
        """Takes the adapter off and returns the model as it was."""
        model = self.peft.unload()
        model.base_model.danlu_fast_path = getattr(model.base_model, "danlu_fast_path", False)
        for name, p in model.named_parameters():
            p.requires_grad_(self._before.get(name, True))
        if hasattr(model, "peft_config"):
            del model.peft_config
        return model


def _config(settings: TeachSettings, *, fan_in_fan_out: bool) -> Any:
    from peft import AdaLoraConfig, LoraConfig

    target = settings.target if isinstance(settings.target, str) else list(settings.target)
    common: dict[str, Any] = {
        "lora_dropout": settings.dropout,
        "target_modules": target,
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": fan_in_fan_out,
    }
    if settings.adapter == "lora":
        return LoraConfig(r=settings.rank, lora_alpha=settings.alpha, **common)
    steps = settings.max_steps
    if steps < 10:
        raise SettingsError(
            "AdaLoRA needs at least 10 steps to prune", field="max_steps", hint="raise it, or take adapter: lora"
        )
    return AdaLoraConfig(
        init_r=settings.rank + settings.rank // 2 + 1,
        target_r=settings.rank,
        tinit=steps // 10,
        tfinal=steps // 3,
        deltaT=max(1, steps // 50),
        total_step=steps,
        lora_alpha=settings.alpha * (settings.rank + settings.rank // 2 + 1) / settings.rank,
        orth_reg_weight=ORTHOGONAL,
        **common,
    )
