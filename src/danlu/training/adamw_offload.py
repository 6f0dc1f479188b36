"""AdamW whose two averages lie in the CPU's memory (after ZeRO-Offload, Ren et al. 2021) and visit the device for the update.

On a GPU a parameter's 8 bytes of averages are copied in, updated by the same fused kernel as always, and copied back: the
numbers are those of AdamW, and the device holds the averages of one parameter at a time. On a CPU it is AdamW.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from danlu.training.own_adamw import OwnAdamW, fused_adamw

AVERAGES = ("exp_avg", "exp_avg_sq")


class AdamWOffload(OwnAdamW):
    """AdamW over averages in the CPU's memory."""

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, device = self.state[parameter], parameter.device
        if not state:
            state["step"] = torch.zeros(())
            for key in AVERAGES:
                state[key] = torch.zeros_like(parameter, device="cpu", pin_memory=device.type == "cuda")
        state["step"] += 1
        first, second = (state[key].to(device, non_blocking=True) for key in AVERAGES)
        fused_adamw(parameter, cast(Tensor, parameter.grad), first, second, state["step"], group)
        for key, new in zip(AVERAGES, (first, second), strict=True):
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
