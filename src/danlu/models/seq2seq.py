"""Encoder-decoders (T5, mT5, BART, CPM-2): padded batches of sources and targets, and the log-probabilities of targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from danlu.exceptions import ModelError
from danlu.text.text_to_text import Pair

Result = TypeVar("Result")


@dataclass(frozen=True)
class PairBatch:
    """Rows padded on the right.

    source_BS, source_mask_BS: what the encoder reads; decoder_BT: the start token and the target but its last token; target_BT:
    the target; weight_BT: 1 on its tokens, 0 on padding.
    """

    source_BS: Tensor
    source_mask_BS: Tensor
    decoder_BT: Tensor
    target_BT: Tensor
    weight_BT: Tensor

    @classmethod
    def of(cls, pairs: Sequence[Pair], start: int) -> PairBatch:
        """Pads pairs; padding is token 0, which no weight and no mask lets in."""
        sources, mask = _padded([p.source_ids for p in pairs])
        decoder, _ = _padded([[start, *p.target_ids[:-1]] for p in pairs])
        targets, weight = _padded([p.target_ids for p in pairs])
        return cls(sources, mask, decoder, targets, weight.float())

    def to(self, device: str | torch.device) -> PairBatch:
        """The batch on a device."""
        return PairBatch(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.int64)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.int64)
    return ids, mask


def start_id(model: Any) -> int:
    """The token with which the decoder begins.

    Raises:
        ModelError: the configuration names none.
    """
    for config in (model.generation_config, model.config):
        for name in ("decoder_start_token_id", "bos_token_id"):
            value = getattr(config, name, None)
            if isinstance(value, int):
                return value
    raise ModelError(
        "the configuration names no token with which the decoder begins",
        field="decoder_start_token_id",
        hint="T5 begins with its padding token: set decoder_start_token_id in config.json",
    )


def target_logprobs(model: Any, batch: PairBatch) -> Tensor:
    """fp32 log-probabilities `[B, T]` of the targets given their sources; what stands on padding is 0.

    Logits are made for the whole batch at once, `[B, T, V]`.
    """
    logits: Tensor = model(
        input_ids=batch.source_BS,
        attention_mask=batch.source_mask_BS,
        decoder_input_ids=batch.decoder_BT,
        use_cache=False,
    ).logits
    where = batch.weight_BT > 0
    rows = logits[where].float()
    found = -nn.functional.cross_entropy(rows, batch.target_BT[where], reduction="none")
    return torch.zeros_like(batch.weight_BT).masked_scatter(where, found)


class Seq2SeqRoot(nn.Module):
    """The root module of an encoder-decoder: every training forward goes through it, as decoders' goes through `RootModel`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PairBatch, role: str, head_fn: Callable[[Tensor], Result]) -> Result:
        """`head_fn` gets the log-probabilities of the targets, `[B, T]`."""
        return head_fn(target_logprobs(self.model, batch))
