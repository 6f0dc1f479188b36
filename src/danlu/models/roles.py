"""Four roles: policy, ref, critic, reward; as separate models or as adapters on one base.

With adapters one base is held in memory: policy = adapter "policy", ref = no adapter, critic = adapter "critic" + scalar head,
reward = adapter "reward" + scalar head (Santacroce et al. 2023, Hydra-RLHF).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from danlu.exceptions import ModelError
from danlu.models import lean_lora
from danlu.models.attention import PLAN_ARGUMENT
from danlu.models.heads import head_of
from danlu.models.load import load_model
from danlu.models.quantize import load_in_bits
from danlu.models.quantized_layers import is_quantized_layer, shown_to_peft
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


# What the names of an adapter's parameters contain, whatever its kind (PEFT's names, and danlu's scalar heads).
ADAPTER_PARTS = ("lora_", "ia3_l.", "modules_to_save.", "scalar_heads.")
START = "start"  # of PiSSA: the adapter's first weights, taken off again


class AdapterRoles(nn.Module):
    """All roles on one base through adapters of PEFT.

    PEFT's `set_adapter` switches `requires_grad` of the other adapters off, so a joint backward would leave them without
    gradients and without an error. Here `requires_grad` is set once, and put back after every selection.

    PiSSA (Meng et al. 2024) starts A and B from the principal singular vectors of W and trains `W - s B0 A0 + s B A`. Here W stays
    as it is, so that the base still is the reference: the term `- s B0 A0` is a frozen adapter that all roles share.
    """

    def __init__(
        self,
        base: Any,
        roles: Sequence[RoleName],
        *,
        config: Any = None,
        pissa: bool = False,
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
            config: of PEFT (`models/adapters.py` makes it of settings); None: LoRA of the four arguments below.
            pissa: LoRA that starts from the base's singular vectors.
            rank, alpha, dropout: LoRA's (Hu et al. 2021); rank >= 1, dropout in [0, 1).
            target: PEFT's `target_modules`.
            trained: roles whose adapter and head learn; default: all but ref and reward.
            seed: for the adapters' and heads' first weights.
        """
        from peft import LoraConfig, get_peft_model

        super().__init__()
        prepare(base)
        fast = base.base_model.danlu_fast_path
        self._before = {name: p.requires_grad for name, p in base.named_parameters()}
        if config is None:
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
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), shown_to_peft(base):
            torch.manual_seed(seed)
            # peft 0.21 reads an attribute that transformers 5.23 renamed.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            # Embeddings and head that are one tensor are tied again below, for every role.
            warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`", UserWarning)
            warnings.filterwarnings("ignore", "Model with `tie_word_embeddings=True`", UserWarning)
            # PEFT names experts' joined weights for ranks of their own, also where they get no adapter.
            warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match", RuntimeWarning)
            self.peft = get_peft_model(base, config, adapter_name=adapters[0])
            # AdaLoRA knows one trained adapter only: the others come as frozen ones, and what learns is decided below.
            for name in adapters[1:]:
                self.peft.add_adapter(name, _frozen_copy(config))
            if pissa:  # selected beside a role, whose embeddings and head there can be only one of
                self.peft.add_adapter(START, _frozen_copy(config, modules_to_save=None))
        lean_lora.install(self.peft)
        self.pissa = pissa
        if pissa:
            _principal_start(self.base, adapters)
        width = base.get_output_embeddings().in_features
        self.scalar_heads = nn.ModuleDict({r: nn.Linear(width, 1, bias=False) for r in adapters if r in SCALAR_ROLES})
        for scalar in self.scalar_heads.parameters():
            nn.init.zeros_(scalar)  # a critic that starts at 0 ("N implementation details of RLHF with PPO")
        self.base.base_model.danlu_fast_path = fast
        self._tie()
        learning = trained if trained is not None else [r for r in adapters if r != "reward"]
        self._learns = {
            name: any(f".{role}." in f"{name}." for role in learning) and any(part in name for part in ADAPTER_PARTS)
            for name, _ in self.named_parameters()
        }
        self._restore()
        self._selected: str | None = None
        self._hooks = [
            part.register_forward_pre_hook(self._select_again, with_kwargs=True)
            for layer in self.base.modules()
            if isinstance(layer, GradientCheckpointingLayer)
            for part in layer.children()  # a layer's own hooks stay outside of what checkpointing recomputes
        ]

    @property
    def base(self) -> Any:
        """The transformers model under the adapters."""
        return self.peft.get_base_model()

    def unload(self) -> Any:
        """Takes all adapters off and returns the base as it was; the roles are of no use afterwards."""
        for hook in self._hooks:
            hook.remove()
        fast = self.base.base_model.danlu_fast_path
        base = self.peft.unload()
        base.base_model.danlu_fast_path = fast
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(self._before.get(name, True))
        if hasattr(base, "peft_config"):
            del base.peft_config
        return base

    def _tie(self) -> None:
        """Where the base has one tensor for embedding and head, each role's copies are one, too."""
        first, last = self.base.get_input_embeddings(), self.base.get_output_embeddings()
        if not hasattr(first, "modules_to_save") or not hasattr(last, "modules_to_save"):
            return
        if first.original_module.weight is last.original_module.weight:
            for name, own in last.modules_to_save.items():
                own.weight = first.modules_to_save[name].weight

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

    def _select(self, role: str) -> None:
        self._selected = role
        if role == "ref":
            self.peft.base_model.disable_adapter_layers()
        else:
            self.peft.base_model.enable_adapter_layers()
            self.peft.set_adapter(role)
            if self.pissa:
                self.peft.base_model.set_adapter([role, START])
        self._restore()

    def head(self, role: RoleName) -> Any:
        if role in self.scalar_heads:
            return self.scalar_heads[role]
        return head_of(self.base)

    @property
    def peft_type(self) -> str:
        """PEFT's name of the adapters' kind."""
        return str(next(iter(self.peft.peft_config.values())).peft_type.value)

    @property
    def mergeable(self) -> bool:
        """Whether a role can become a plain model: not on a quantised base."""
        return not any(is_quantized_layer(m) for m in self.base.modules())

    def weights(self, role: str) -> dict[str, torch.Tensor]:
        """The role's own parameters by their names in the base, scalar head apart."""
        return {
            name: parameter
            for name, parameter in self.base.named_parameters(remove_duplicate=False)
            if f".{role}." in f"{name}." and any(part in name for part in ADAPTER_PARTS)
        }

    @torch.no_grad()
    def mask_ranks(self) -> None:
        """AdaLoRA: takes off again the ranks that were given up, which averaged or restored weights may have."""
        patterns = {r: getattr(c, "rank_pattern", None) or {} for r, c in self.peft.peft_config.items()}
        for name, values in self.base.named_parameters():
            role = name.rpartition(".")[2]
            if ".lora_E." in name and patterns.get(role):
                kept = patterns[role].get(name, patterns[role].get(name.removesuffix(f".{role}")))
                if kept is not None:
                    values.mul_(torch.tensor(kept, device=values.device).view(-1, 1))

    def engine_weights(self, role: RoleName) -> Iterator[tuple[str, torch.Tensor]]:
        """What an engine needs to answer as the role does, for `Engine.update_weights`: merged weights where its model is the
        plain base, else the adapter's own (see `adapters.engine_model`).
        """
        yield from self.merging(role) if self.mergeable else self.weights(role).items()

    def merged(self, role: RoleName) -> dict[str, torch.Tensor]:
        """The base's parameters by their plain names, with the role's adapter added.

        Raises:
            ModelError: the base is quantised.
        """
        return dict(self.merging(role))

    @torch.no_grad()
    def merging(
        self, role: RoleName, exact: Mapping[str, torch.Tensor] = MappingProxyType({})
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """`merged`, one after the other: a copy of all weights is never held.

        Args:
            exact: the base's weights by their plain names where it holds rounded ones; they may change while this goes on.
        """
        if not self.mergeable:
            raise ModelError(
                "an adapter cannot be merged into a quantised base",
                hint="merge it into the base as it was: danlu merge",
            )
        self.trunk(role)
        tied = _tied_name(self.base)
        for name, module in self.base.named_modules():
            found: Iterable[tuple[str, torch.Tensor]] = ()
            if hasattr(module, "modules_to_save"):
                found = module.modules_to_save[role].named_parameters()
            elif hasattr(module, "get_base_layer"):
                found = self._merged_layer(module, role, name, exact)
            yield from ((f"{name}.{key}", value.detach()) for key, value in found if f"{name}.{key}" != tied)
        own = (*ADAPTER_PARTS, ".base_layer.", ".original_module.", ".ranknum.")
        for name, value in self.base.named_parameters():
            if name != tied and not any(part in name for part in own):
                yield name, exact.get(name, value).detach()

    def _merged_layer(
        self, module: Any, role: str, prefix: str, exact: Mapping[str, torch.Tensor]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Weight and bias of an adapted layer; see `merged_parameter`."""
        for key, held in module.get_base_layer().named_parameters(recurse=False):
            value = exact.get(f"{prefix}.{key}", held).to(held.device)
            found = merged_parameter(module, role, key, value)
            if self.pissa and key == "weight":
                found = found + module.get_delta_weight(START)
            yield key, found


def merged_parameter(module: Any, name: str, key: str, value: torch.Tensor) -> torch.Tensor:
    """A parameter of a layer under an adapter of any kind, with the adapter in it.

    LoRA and its like add `s B A`; DoRA scales every row of that sum to a learned length (Liu et al. 2024, equation 5); (IA)^3
    multiplies rows (with the bias) or columns.
    """
    found: torch.Tensor
    scales = getattr(module, "ia3_l", None)
    if scales is not None:
        if name not in scales or (key == "bias" and module.is_feedforward):
            return value
        scale: torch.Tensor = scales[name]
        if key == "bias":
            return value * scale.reshape(value.shape)
        return value * (scale.t() if module.fan_in_fan_out else scale)
    if name not in getattr(module, "lora_A", {}) or key != "weight":
        return value
    found = value + module.get_delta_weight(name)
    magnitude = getattr(module, "lora_magnitude_vector", {})
    if name in magnitude:
        axis = 0 if module.fan_in_fan_out else 1
        lengths = torch.linalg.norm(found, dim=axis, keepdim=True)
        found = found * (magnitude[name].weight.reshape(lengths.shape) / lengths)
    return found


def _tied_name(base: Any) -> str | None:
    """Name of the head's weight where it is the embedding."""
    first, last = base.get_input_embeddings(), base.get_output_embeddings()
    one, other = (getattr(m, "original_module", m).weight for m in (first, last))
    if one is not other:
        return None
    return next(f"{name}.weight" for name, module in base.named_modules() if module is last)


def _frozen_copy(config: Any, **changes: Any) -> Any:
    found = copy.deepcopy(config)
    for name, value in {"inference_mode": True, **changes}.items():
        setattr(found, name, value)
    return found


@torch.no_grad()
def _principal_start(base: Any, adapters: Sequence[str]) -> None:
    """PiSSA, equations 2 to 4: B0 = U sqrt(S), A0 = sqrt(S) V^T of the r greatest singular values, s B0 A0 in sum."""
    for module in base.modules():
        if START not in getattr(module, "lora_A", {}):
            continue
        weight = module.get_base_layer().weight.float()
        left, values, right = torch.linalg.svd(weight.t() if module.fan_in_fan_out else weight, full_matrices=False)
        rank = min(module.r[START], len(values))
        root = (values[:rank] / module.scaling[START]).sqrt()
        for name in [*adapters, START]:
            sign = -1.0 if name == START else 1.0
            module.lora_A[name].weight.zero_()[:rank].copy_(root[:, None] * right[:rank])
            module.lora_B[name].weight.zero_()[:, :rank].copy_(sign * left[:, :rank] * root)
