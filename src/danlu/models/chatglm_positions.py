"""ChatGLM-6B's masks and positions, derived from ids.

The context is everything before the first `<sop>` (bos): its tokens see all of it. From bos on, tokens see what is before
them. Positions in two rows: row 0 counts the context and stays at the mask token's place from bos on; row 1 is 0 in the
context and counts 1, 2, 3, ... from bos on (Du et al. 2022, section 2.1). In one dimension there is row 0 alone.

Without a bos, which the original refuses, all is causal: row 0 counts and row 1 is 0. Without a mask token, the place before
bos stands for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from danlu.exceptions import ModelError


@dataclass(frozen=True)
class Rules:
    """Token ids that positions depend on, and which rules hold.

    Attributes:
        first_revision: of March 2023: the prefill's row 0 goes on counting behind a [gMASK], and [MASK] wins over it.
    """

    bos: int
    mask: int
    gmask: int
    two_dimensional: bool
    first_revision: bool

    @classmethod
    def of(cls, config: Any) -> Self:
        return cls(
            config.bos_token_id,
            config.mask_token_id,
            config.gmask_token_id,
            config.position_encoding_2d,
            bool(config.first_revision),
        )


@dataclass(frozen=True)
class _Marks:
    """Of each row: real `[B, T]`, place `[B, T]` among the real tokens; and columns `[B, 1]`."""

    real: Tensor
    place: Tensor
    has_bos: Tensor
    bos_column: Tensor  # T where there is none
    bos_place: Tensor
    mask_place: Tensor
    uses_gmask: Tensor


def _first(found: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each row has one, and the column of the first."""
    return found.any(1, keepdim=True), found.int().argmax(1, keepdim=True)


def _marks(rules: Rules, ids: Tensor, real: Tensor | None) -> _Marks:
    real = torch.ones_like(ids, dtype=torch.bool) if real is None else real.bool()
    place = (real.long().cumsum(1) - 1).clamp_min(0)
    has_bos, bos = _first((ids == rules.bos) & real)
    has_mask, mask = _first((ids == rules.mask) & real)
    has_gmask, gmask = _first((ids == rules.gmask) & real)
    uses_gmask = has_gmask & ~has_mask if rules.first_revision else has_gmask
    bos_place = place.gather(1, bos)
    mask_place = torch.where(uses_gmask, place.gather(1, gmask), place.gather(1, mask))
    mask_place = torch.where(has_mask | has_gmask, mask_place, (bos_place - 1).clamp_min(0))
    bos_column = torch.where(has_bos, bos, torch.full_like(bos, ids.shape[1]))
    return _Marks(real, place, has_bos, bos_column, bos_place, mask_place, uses_gmask)


def positions_of(rules: Rules, ids: Tensor, real: Tensor | None = None) -> Tensor:
    """Positions of whole texts: `[B, 2, T]`, or `[B, T]` in one dimension; 0 at padding.

    Args:
        ids: `[B, T]`; real: `[B, T]`, 0 at padding on either side. None: padding counts like text, as in the original.
    """
    m = _marks(rules, ids, real)
    answer = (torch.arange(ids.shape[1], device=ids.device) >= m.bos_column) & m.real
    goes_back = ~m.uses_gmask if rules.first_revision or not rules.two_dimensional else torch.ones_like(m.has_bos)
    first = torch.where(answer & goes_back, m.mask_place, m.place) * m.real
    if not rules.two_dimensional:
        return first
    second = torch.where(answer, m.place - m.bos_place + 1, torch.zeros_like(m.place))
    return torch.stack([first, second], dim=1)


def positions_of_step(rules: Rules, ids: Tensor, real: Tensor | None, new: int) -> Tensor:
    """Positions of the last `new` tokens of whole texts as single cached steps take them: the mask's place in row 0.

    In one dimension the original does so for a [gMASK], too, where the prefill goes on counting.
    """
    m = _marks(rules, ids, real)
    place = m.place[:, -new:]
    first = torch.where(m.has_bos, m.mask_place, place)
    if not rules.two_dimensional:
        return first
    second = torch.where(m.has_bos, place - m.bos_place + 1, torch.zeros_like(place))
    return torch.stack([first, second], dim=1)


def positions_after(
    rules: Rules, ids: Tensor, attention_mask: Tensor | None, known: int, *, whole: bool = False
) -> Tensor:
    """Positions of tokens after `known` cached ones.

    Args:
        ids: the new tokens, or (whole) the text from its beginning.
        attention_mask: `[B, S]` with 0 at padding; others say nothing of padding.
    """
    real = attention_mask if attention_mask is not None and attention_mask.dim() == 2 else None
    if not known:
        return positions_of(rules, ids, real[:, -ids.shape[1] :] if real is not None else None)
    if whole:
        return positions_of_step(rules, ids, real, ids.shape[1] - known)
    raise ModelError(
        "ChatGLM's positions after a cache depend on the text before, which is not in input_ids",
        hint="give position_ids: [place of the mask token, length - context]",
    )


def hidden_keys(
    rules: Rules, ids: Tensor, attention_mask: Tensor | None, known: int = 0, prefix: int = 0
) -> Tensor | None:
    """True where a token does not see a key: `[B, 1, T, prefix + known + T]`; None: all see all.

    Args:
        ids: `[B, T]`, the new tokens. known: tokens before them in the cache. prefix: virtual tokens before these.
        attention_mask: None, bool `[B, 1, T, n]` or `[B, n]`, where n may leave out what stands in front: all see that.
    """
    batch, tokens = ids.shape
    total = prefix + known + tokens
    if attention_mask is not None and not tokens <= attention_mask.shape[-1] <= total:
        raise ModelError(
            f"the attention mask has {attention_mask.shape[-1]} columns for {tokens} tokens after {total - tokens} cached keys"
        )
    if attention_mask is not None and attention_mask.dim() == 4:
        return _wider(attention_mask.bool(), total)
    real = attention_mask.bool() if attention_mask is not None else None
    padded = real is not None and not bool(real.all())
    if tokens == 1 and not padded:
        return None
    row = torch.arange(tokens, device=ids.device)
    hidden = (row[None, :] > row[:, None]).expand(batch, -1, -1)
    own = real[:, -tokens:] if real is not None else None
    if not known:
        marks = _marks(rules, ids, own)
        hidden = hidden & ~(row < marks.bos_column * marks.has_bos)[:, None]
    if own is not None:
        hidden = hidden | ~own[:, :, None]
    hidden = _wider(hidden[:, None], total)
    return hidden if real is None else hidden | _wider(~real[:, None, None], total)


def _wider(hidden: Tensor, columns: int) -> Tensor:
    """So many columns; those that are put in front are seen by all."""
    return torch.nn.functional.pad(hidden, (columns - hidden.shape[-1], 0), value=False)


def step_inputs(rules: Rules, rows: Sequence[Sequence[int]], new: int, device: torch.device) -> dict[str, Tensor]:
    """`attention_mask` `[B, 1, new, S]` and `position_ids` for the last `new` tokens of texts padded on the left.

    Whole texts (`new` is the length of all) are prefills; else the tokens are single steps after a cache.
    """
    longest = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    for n, row in enumerate(rows):
        ids[n, longest - len(row) :] = torch.tensor(row)
        real[n, longest - len(row) :] = True
    prefill = new == longest
    positions = positions_of(rules, ids, real) if prefill else positions_of_step(rules, ids, real, new)
    if prefill:
        hidden = hidden_keys(rules, ids, real)
    else:
        hidden = hidden_keys(rules, ids[:, -new:], real, longest - new)
    if hidden is None:
        hidden = torch.zeros(len(rows), 1, new, longest, dtype=torch.bool)
    return {"attention_mask": hidden.to(device), "position_ids": positions.to(device)}
