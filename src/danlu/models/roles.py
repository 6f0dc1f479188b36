"""Four roles: policy, ref, critic, reward; as separate models or as adapters on one base.

With adapters one base is held in memory: policy = adapter "policy", ref = no adapter, critic = adapter "critic" + scalar head,
reward = adapter "reward" + scalar head (Santacroce et al. 2023, Hydra-RLHF).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from danlu.exceptions import ModelError
from danlu.models.attention import PLAN_ARGUMENT
from danlu.models.heads import head_of
from danlu.models.load import load_model
from danlu.models.quantize import load_in_bits
from danlu.models.root import RoleName, prepare

SCALAR_ROLES: tuple[RoleName, ...] = ("critic", "reward")


class SeparateModels(nn.Module):
    """Each role its own transformers model. Frozen ones (ref, reward in PPO) take no gradient."""

    def __init__(self, models: Mapping[RoleName, Any], trained: Sequence[RoleName]) -> None:
        super().__init__()
        self.models = nn.ModuleDict({role: prepare(model) for role, model in models.items()})
        for role, model in self.models.items():
            model.requires_grad_(role in trained)

    def trunk(self, role: RoleName) -> nn.Module:
        return _trunk_of(self._model(role))

    def head(self, role: RoleName) -> Any:
        return head_of(self._model(role))

    def _model(self, role: RoleName) -> Any:
        if role not in self.models:
            raise ModelError(f"role '{role}' has no model here", hint=f"roles present: {', '.join(self.models)}")
        return self.models[role]


def _trunk_of(model: Any) -> nn.Module:
    trunk: nn.Module = model.base_model
    return trunk


def reference_model(path: str, bits: int) -> Any:
    """The frozen reference of a policy that trains all its weights; with 8 bits a quarter of the memory (int8 trunk).

    Raises:
        ModelError: see `load_model`; or 8 bits are asked for and the family has no linear layers that int8 replaces.
    """
    return load_in_bits(path, bits) if bits in (8, 4) else load_model(path)


class AdapterRoles(nn.Module):
    """All roles on one base through LoRA adapters of PEFT.

    PEFT's `set_adapter` switches `requires_grad` of the other adapters off, so a joint backward would leave them without
    gradients and without an error. Here `requires_grad` is set once, and put back after every selection.
    """

    def __init__(
        self,
        base: Any,
        roles: Sequence[RoleName],
        *,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        target: str | Sequence[str] = "all-linear",
        trained: Sequence[RoleName] | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            base: a causal language model; it is changed in place.
            roles: which adapters to add; "ref" needs none.
            rank, alpha, dropout: LoRA's (Hu et al. 2021); rank >= 1, dropout in [0, 1).
            target: PEFT's `target_modules`.
            trained: roles whose adapter and head learn; default: all but ref and reward.
            seed: for the adapters' and heads' first weights.
        """
        from peft import LoraConfig, get_peft_model

        super().__init__()
        prepare(base)
        fast = base.base_model.danlu_fast_path
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=target if isinstance(target, str) else list(target),
            task_type="CAUSAL_LM",
            fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()),  # GPT-2 keeps its weights transposed
        )
        adapters = [role for role in roles if role != "ref"]
        if not adapters:
            raise ModelError("at least one role beside ref is needed to add adapters for")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                # peft 0.21 reads an attribute that transformers 5.23 renamed.
                warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
                self.peft = get_peft_model(base, config, adapter_name=adapters[0])
            for name in adapters[1:]:
                self.peft.add_adapter(name, config)
        width = base.get_output_embeddings().in_features
        self.scalar_heads = nn.ModuleDict({r: nn.Linear(width, 1, bias=False) for r in adapters if r in SCALAR_ROLES})
        for scalar in self.scalar_heads.parameters():
            nn.init.zeros_(scalar)  # a critic that starts at 0 ("N implementation details of RLHF with PPO")
        self.base.base_model.danlu_fast_path = fast
        learning = trained if trained is not None else [r for r in adapters if r != "reward"]
        self._learns = {
            name: any(f".{role}." in f"{name}." for role in learning) and ("lora_" in name or "scalar_heads" in name)
            for name, _ in self.named_parameters()
        }
        self._restore()
        self._selected: str | None = None
        for layer in (m for m in self.base.modules() if isinstance(m, GradientCheckpointingLayer)):
            for part in layer.children():  # a layer's own hooks stay outside of what checkpointing recomputes
                part.register_forward_pre_hook(self._select_again, with_kwargs=True)

    @property
    def base(self) -> Any:
        """The transformers model under the adapters."""
        return self.peft.get_base_model()

    def _select_again(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Before a layer's attention runs, also when it is recomputed: selects the adapter of the call's role."""
        role = getattr(kwargs.get(PLAN_ARGUMENT) or getattr(module, PLAN_ARGUMENT, None), "role", None)
        if role is not None and role != self._selected:
            self._select(role)

    def _restore(self) -> None:
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(self._learns[name])

    def trunk(self, role: RoleName) -> nn.Module:
        self._select(role)
        return _trunk_of(self.base)

    def _select(self, role: RoleName) -> None:
        self._selected = role
        if role == "ref":
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(role)
        self._restore()

    def head(self, role: RoleName) -> Any:
        if role in self.scalar_heads:
            return self.scalar_heads[role]
        return head_of(self.base)

    def merged(self, role: RoleName) -> dict[str, torch.Tensor]:
        """The base's parameters by their plain names, with the role's adapter added."""
        self.trunk(role)
        merged: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            for name, module in self.base.named_modules():
                if hasattr(module, "get_base_layer") and role in getattr(module, "lora_A", {}):
                    layer = module.get_base_layer()
                    for key, value in layer.named_parameters(recurse=False):
                        plus = module.get_delta_weight(role) if key == "weight" else 0
                        merged[f"{name}.{key}"] = value + plus
            for name, value in self.base.named_parameters():
                if ".lora_" not in name and ".base_layer." not in name:
                    merged[name] = value.detach()
        return merged
