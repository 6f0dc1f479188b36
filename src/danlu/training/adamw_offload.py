"""AdamW whose two averages lie in the CPU's memory (after ZeRO-Offload, Ren et al. 2021) and visit the device for the update.

On a GPU a parameter's 8 bytes of averages are copied in, updated by the same fused kernel as always, and copied back: the
numbers are those of AdamW, and the device holds the averages of one parameter at a time. On a CPU it is AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor

AVERAGES = ("exp_avg", "exp_avg_sq")


class AdamWOffload(torch.optim.Optimizer):
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

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, device = self.state[parameter], parameter.device
        if not state:
            state["step"] = torch.zeros(())
            for key in AVERAGES:
                state[key] = torch.zeros_like(parameter, device="cpu", pin_memory=device.type == "cuda")
        state["step"] += 1
        averages = [state[key].to(device, non_blocking=True) for key in AVERAGES]
        torch._fused_adamw_(
            [parameter],
            [cast(Tensor, parameter.grad)],
            [averages[0]],
            [averages[1]],
            [],
            [state["step"].to(device)],
            amsgrad=False,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for key, new in zip(AVERAGES, averages, strict=True):
            if new.device != state[key].device:
                state[key].copy_(new)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, which would move the averages to the parameters' device."""
        super().load_state_dict({**state_dict, "state": {}})
        own = [p for group in self.param_groups for p in group["params"]]
        for number, state in state_dict["state"].items():
            pin = own[int(number)].is_cuda
            self.state[own[int(number)]] = {
                k: v.cpu().clone().pin_memory() if pin and k in AVERAGES else v.cpu().clone() for k, v in state.items()
            }
