"""What makes the states of virtual tokens, shared by danlu's adapters and ChatGLM's own prefix encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PrefixTable(nn.Module):
    """A table, or a table of embeddings and two layers behind it.

    With the layers ("projection", the reparameterisation of Li and Liang 2021) all states are a function of one embedding for each
    token: `Linear(tanh(Linear(embedding)))`.

    Args:
        tokens: P >= 1.
        numbers: of a row of the result.
        width: of the table behind which the layers are; None: no layers, the table is the result.
        hidden: between the two layers; default `width`.
    """

    def __init__(self, tokens: int, numbers: int, *, width: int | None = None, hidden: int | None = None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, numbers if width is None else width)
        self.trans: nn.Sequential | None = None
        if width is not None:
            middle = hidden or width
            self.trans = nn.Sequential(nn.Linear(width, middle), nn.Tanh(), nn.Linear(middle, numbers))

    def rows(self) -> Tensor:
        """The states `[P, numbers]`, in the weights' dtype also under autocast: they are few."""
        weight = self.embedding.weight
        with torch.autocast(weight.device.type, enabled=False):
            states: Tensor = weight if self.trans is None else self.trans(weight)
        return states
