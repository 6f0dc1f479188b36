"""AdamW (Loshchilov and Hutter 2019) whose averages are kept in another way: what such optimizers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class OwnAdamW(torch.optim.Optimizer):
    """Args: as `torch.optim.AdamW`."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "danlu's loops have none"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    @abstractmethod
    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None: ...


def fused_adamw(
    weight: Tensor, grad: Tensor, first: Tensor, second: Tensor, step: Tensor, group: dict[str, Any]
) -> None:
    """The update of a weight and its two averages in place, by torch's fused kernel."""
    torch._fused_adamw_(
        [weight],
        [grad],
        [first],
        [second],
        [],
        [step.to(weight.device)],
        amsgrad=False,
        lr=group["lr"],
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
