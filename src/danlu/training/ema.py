"""An exponential moving average of the trained weights: smoother than the last ones, and a model of its own at the end."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from danlu.training.sharding import own_part, part_of, whole_on_main


class Ema:
    """`average <- decay * average + (1 - decay) * weights`, begun at the weights as they are (Polyak and Juditsky 1992; the
    form that DeepSpeed-Chat keeps of its actor).

    Args:
        named: the parameters to follow, by name; with LoRA those of the adapter. Each rank averages its own part.
        decay: in (0, 1).
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(named)
        self.averages = {name: p.detach().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """After an update of the weights."""
        for name, average in self.averages.items():
            own_part(average).lerp_(own_part(self.parameters[name]), 1.0 - self.decay)

    @torch.no_grad()
    def put(self) -> None:
        """Puts the averages in the place of the weights, for what is saved when training is over."""
        for name, average in self.averages.items():
            own_part(self.parameters[name]).copy_(own_part(average))

    def state_dict(self) -> dict[str, Any]:
        """Whole tensors by name."""
        return dict(whole_on_main(self.averages.items()))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any], /) -> None:
        """See `checkpoint.Stateful`."""
        if state.keys() != self.averages.keys():
            raise ValueError(f"parameter {sorted(state.keys() ^ self.averages.keys())[0]} is on one side only")
        for name, average in self.averages.items():
            average.copy_(part_of(state[name], average))
