"""AdaLoRA while training (Zhang et al. 2023): ranks are taken from where they matter least, until the mean is what was asked for.

PEFT's allocator does the counting; here it is called after every optimizer step with the gradients still there, for every role
that learns, and its state goes into the checkpoints.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from danlu.models.roles import AdapterRoles
from danlu.models.root import RootModel

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankAllocation:
    """The allocators of all roles that learn; a `checkpoint.Stateful`.

    An update that is not made (a bad step, an early stop by KL) leaves the schedule behind, so each iteration begins at
    its own share of it.
    """

    def __init__(self, roles: AdapterRoles, iterations: int) -> None:
        """
        Args:
            roles: of kind adalora.
            iterations: of the stage.
        """
        from peft.tuners.adalora.model import RankAllocator

        self.roles, self.model = roles, roles.peft.base_model
        self.parameters = {n: p for n, p in self.model.model.named_parameters() if "lora_" in n}
        learning = {n.rpartition(".")[2] for n, p in self.parameters.items() if p.requires_grad}
        self.allocators = {r: RankAllocator(self.model.model, self.model.peft_config[r], r) for r in sorted(learning)}
        total = next(iter(self.model.peft_config.values())).total_step
        self.per_iteration = max(1, total // max(1, iterations))
        self.counts = dict.fromkeys(self.allocators, 0)
        self.settled: set[str] = set()

    def begin(self, iteration: int) -> None:
        """Before the updates of a 0-based iteration."""
        for role, count in self.counts.items():
            self.counts[role] = max(count, iteration * self.per_iteration)

    def watch(self, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
        """From now on the roles whose parameters an optimizer holds are allocated after each of its steps."""
        for optimizer in optimizers.values():
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            own = [r for r in self.allocators if any(id(p) in held for n, p in self._own(r))]
            optimizer.register_step_post_hook(functools.partial(self._stepped, own))

    def _stepped(self, roles: list[str], optimizer: Any, arguments: Any, options: Any) -> None:
        for role in roles:
            self.update(role)

    def _own(self, role: str) -> list[tuple[str, nn.Parameter]]:
        return [(n, p) for n, p in self.parameters.items() if n.endswith(f".{role}")]

    def update(self, role: str) -> None:
        """After an optimizer step with this role's gradients: importances, and where it is time, ranks."""
        config = self._take(role)
        last = config.total_step - config.tfinal
        if not self._weighed(
            role
        ):  # the singular values begin at zero, so a first update says of nothing that it matters
            self.allocators[role].update_ipt(self.model.model)
            self.counts[role] += 1
            return
        step = self.counts[role] + 1  # PEFT counts from 1: nothing is cut before the warm-up is over
        if step >= last and role not in self.settled:
            step = last
            self.settled.add(role)
        self.model.update_and_allocate(step)
        self.counts[role] += 1

    def _weighed(self, role: str) -> bool:
        return any(bool(t.any()) for n, t in self.allocators[role].exp_avg_ipt.items() if ".lora_E." in n)

    def finish(self) -> None:
        """Where a stage ends before its schedule does, ranks fall to their target now."""
        for role in self.allocators:
            config = self._take(role)
            if role not in self.settled and self._weighed(role):
                self.settled.add(role)
                self.model.update_and_allocate(config.total_step - config.tfinal)

    def _take(self, role: str) -> Any:
        self.model.trainable_adapter_name, self.model.rankallocator = role, self.allocators[role]
        return self.model.peft_config[role]

    def facts(self) -> dict[str, Any]:
        """`{"ranks": {role: {module: rank}}, "rank_total", "rank_before", "adapter_parameters", "adapter_parameters_before"}`."""
        ranks: dict[str, dict[str, int]] = {}
        before = after = numbers = kept = 0
        for role in self.allocators:
            pattern = self.model.peft_config[role].rank_pattern or {}
            ranks[role] = {}
            for name, parameter in self._own(role):
                if ".lora_E." not in name:
                    continue
                module = name.split(".lora_E.")[0]
                whole = parameter.shape[0]
                mask = pattern.get(name, pattern.get(name.removesuffix(f".{role}")))
                rank = int(sum(mask)) if mask is not None else whole
                ranks[role][module] = rank
                layer: Any = self.model.model.get_submodule(module)
                size = 1 + layer.in_features + layer.out_features
                before, after = before + whole, after + rank
                numbers, kept = numbers + whole * size, kept + rank * size
        return {
            "ranks": ranks,
            "rank_before": before,
            "rank_total": after,
            "adapter_parameters_before": numbers,
            "adapter_parameters": kept,
        }

    def state_dict(self) -> dict[str, Any]:
        """See `checkpoint.Stateful`."""
        return {
            role: {
                "count": self.counts[role],
                "settled": role in self.settled,
                "pattern": dict(self.model.peft_config[role].rank_pattern or {}),
                **{name: dict(getattr(allocator, name)) for name in AVERAGES},
            }
            for role, allocator in self.allocators.items()
        }

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `checkpoint.Stateful`."""
        if state.keys() != self.allocators.keys():
            raise ValueError(f"ranks of {sorted(state)}, expected {sorted(self.allocators)}")
        for role, kept in state.items():
            self.counts[role] = kept["count"]
            self.settled = self.settled - {role} | ({role} if kept["settled"] else set())
            self.model.peft_config[role].rank_pattern = kept["pattern"] or None
            for name in AVERAGES:
                own = {n: t.to(self.parameters[n].device) for n, t in kept[name].items()}
                setattr(self.allocators[role], name, own)


def allocation_of(module: nn.Module, iterations: int) -> RankAllocation | None:
    """For a root whose roles are AdaLoRA adapters; else None."""
    roles = module.trunks if isinstance(module, RootModel) else None
    if not isinstance(roles, AdapterRoles) or roles.peft_type != "ADALORA":
        return None
    return RankAllocation(roles, iterations)


def orthogonality(module: nn.Module, role: str) -> Tensor | None:
    """The weighted mean of `|A A^T - I|` and `|B^T B - I|` (Frobenius) over an AdaLoRA role, equation 4; None for others."""
    roles = module.trunks if isinstance(module, RootModel) else None
    if not isinstance(roles, AdapterRoles) or roles.peft_type != "ADALORA" or role not in roles.peft.peft_config:
        return None
    weight = roles.peft.peft_config[role].orth_reg_weight
    parts = []
    for name, value in roles.base.named_parameters():
        if name.endswith((f".lora_A.{role}", f".lora_B.{role}")):
            product = value @ value.t() if ".lora_A." in name else value.t() @ value
            parts.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=value.device)))
    return weight * torch.stack(parts).mean() if weight and parts else None
