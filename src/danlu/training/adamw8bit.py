"""AdamW whose two averages are kept in 8 bits, block by block (Dettmers et al. 2022), in plain torch.

A block of 256 numbers shares one fp32 scale, its largest magnitude; each number is kept as the nearest of 256 codes on
[-1, 1] (or [0, 1] for the second average). The codes are Dettmers' dynamic data type: a decimal exponent of unary length, and
what bits are left for a linear fraction, so that they span seven orders of magnitude. 2.03 bytes a parameter in place of 8.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from torch import Tensor

from danlu.training.own_adamw import OwnAdamW, fused_adamw

BLOCK = 256
SMALL = 4096  # tensors up to this many numbers (norms, biases, heads) keep fp32 averages
PIECE = BLOCK << 13  # numbers worked on at once: what is unpacked stays small beside the model

Codes = tuple[Tensor, Tensor]


def dynamic_codes(*, signed: bool) -> Tensor:
    """The 256 values of the dynamic data type, ascending, fp32 `[256]` (Dettmers 2016, figure 2).

    With e leading zeros the magnitude is 10^-e times a fraction in (0.1, 1) cut into 2^(6 - e) (signed) or 2^(7 - e) equal parts;
    0 and 1 fill the two places left.
    """
    bits = 7
    values: list[float] = []
    for zeros in range(bits):
        parts = 1 << (bits - 1 - zeros if signed else bits - zeros)
        edges = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0**-zeros
        values += middles.tolist()
    if signed:
        values += [-v for v in values]
    values += [0.0, 1.0]
    return torch.tensor(sorted(values), dtype=torch.float32)


@functools.cache
def tables(signed: bool, device: torch.device) -> Codes:
    """(code -> value `[256]`, bits of a bf16 number -> nearest code `[65536]` uint8). Rounding to bf16 first moves a number by
    at most 0.4%, a fraction of the distance between codes. A positive second average is never rounded to 0, which would divide
    the step by eps alone."""
    codes = dynamic_codes(signed=signed)
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float().nan_to_num(0.0)
    middles = (codes[:-1] + codes[1:]) / 2
    if not signed:
        middles[0] = 0.0
    return codes.to(device), torch.bucketize(every, middles).to(torch.uint8).to(device)


def pack(values: Tensor, *, signed: bool) -> Codes:
    """(codes uint8, one fp32 scale a block) of a flat fp32 tensor."""
    rows = torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)
    scale = rows.abs().amax(1)
    shares = rows / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    _, nearest = tables(signed, values.device)
    # int16 bits count from -32768; as an index they must not be negative.
    index = shares.to(torch.bfloat16).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
    return nearest.index_select(0, index.flatten())[: values.numel()], scale


def unpack(packed: Codes, *, signed: bool) -> Tensor:
    """The flat fp32 tensor of `pack`."""
    codes, scale = packed
    values, _ = tables(signed, codes.device)
    rows = values.index_select(0, codes.to(torch.int32))
    return rows.mul_(scale.repeat_interleave(BLOCK)[: codes.numel()])


class AdamW8bit(OwnAdamW):
    """AdamW over packed averages; tensors of at most `SMALL` numbers keep fp32 ones."""

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state |= {"step": torch.zeros(()), **self._empty(parameter)}
        state["step"] += 1
        weight, grad = parameter.view(-1), cast(Tensor, parameter.grad).reshape(-1)
        if "exp_avg" in state:
            fused_adamw(weight, grad, state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), state["step"], group)
            return
        for begin in range(0, weight.numel(), PIECE):
            part = slice(begin, begin + PIECE)
            blocks = slice(begin // BLOCK, -(-min(begin + PIECE, weight.numel()) // BLOCK))
            kept = {
                key: (state[f"{key}_codes"][part], state[f"{key}_scale"][blocks]) for key in ("exp_avg", "exp_avg_sq")
            }
            first, second = unpack(kept["exp_avg"], signed=True), unpack(kept["exp_avg_sq"], signed=False)
            fused_adamw(weight[part], grad[part], first, second, state["step"], group)
            for (codes, scale), now, signed in (
                (kept["exp_avg"], first, True),
                (kept["exp_avg_sq"], second, False),
            ):
                new_codes, new_scale = pack(now, signed=signed)
                codes.copy_(new_codes)
                scale.copy_(new_scale)

    @staticmethod
    def _empty(parameter: Tensor) -> dict[str, Tensor]:
        if parameter.numel() <= SMALL:
            return {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        found: dict[str, Tensor] = {}
        for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            zero = int(dynamic_codes(signed=signed).eq(0).nonzero())
            found[f"{key}_codes"] = torch.full((parameter.numel(),), zero, dtype=torch.uint8, device=parameter.device)
            found[f"{key}_scale"] = torch.zeros(-(-parameter.numel() // BLOCK), device=parameter.device)
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `Optimizer.load_state_dict`, which would turn the codes into the parameters' dtype."""
        super().load_state_dict(state_dict)
        own = [p for group in self.param_groups for p in group["params"]]
        for number, state in state_dict["state"].items():
            device = own[int(number)].device
            self.state[own[int(number)]] = {
                k: v.clone() if k == "step" else v.to(device, copy=True) for k, v in state.items()
            }
