"""Blank infilling (Du et al. 2022, GLM): masks, two-row positions, and inputs of models that read a context both ways.


Part A is the context with mask tokens in it; part B are the spans, each begun by a start-of-piece token. A sees all of A; B sees
A and what stands before it in its span. Row 0 of positions is the place in A (for B that of its mask token), row 1 is 0 in A and
counts 1, 2, ... inside a span. Axes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from danlu.exceptions import ModelError


@dataclass(frozen=True)
class BlankIds:
    """Ids of the tokens that blank infilling needs.

    masks: every token that stands for a blank; sop, eop: start and end of a piece; pad: what rows are filled up with.
    """

    masks: tuple[int, ...]
    sop: int
    eop: int
    pad: int


def context_lengths(input_ids_BT: Tensor, sop: int | None) -> Tensor:
    """Tokens before the first start-of-piece token of each row `[B]`; 0 where there is none (everything is causal then)."""
    if sop is None:
        return torch.zeros_like(input_ids_BT[:, 0])
    found = input_ids_BT == sop
    return torch.where(found.any(1), found.int().argmax(1), torch.zeros_like(input_ids_BT[:, 0]))


def visible_prefix(context_B: Tensor, real_BT: Tensor) -> Tensor:
    """Bool `[B, 1, T, T]`, true where a query (row) sees a key (column): the context both ways, the rest causally.

    Args:
        context_B: tokens of the context of each row, padding inside or before it included.
        real_BT: false at padding, which nobody sees.
    """
    length = real_BT.shape[1]
    place = torch.arange(length, device=real_BT.device)
    causal = place[None, :] <= place[:, None]
    both = place[None, None, :] < context_B[:, None, None]
    visible: Tensor = (causal[None] | both) & real_BT[:, None, :].bool()
    return visible[:, None]


def mask_places(input_ids_BT: Tensor, context_B: Tensor, masks: Sequence[int]) -> Tensor:
    """Index of the first mask token in each row's context `[B]`; the context's last token where there is none."""
    place = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)
    known = torch.tensor(list(masks), dtype=input_ids_BT.dtype, device=input_ids_BT.device)
    found = torch.isin(input_ids_BT, known) & (place[None] < context_B[:, None])
    return torch.where(found.any(1), found.int().argmax(1), (context_B - 1).clamp(min=0))


def blank_positions(input_ids_BT: Tensor, real_BT: Tensor, masks: Sequence[int], sop: int | None) -> Tensor:
    """Two-row positions `[B, 2, T]` of rows with one span, found by their ids; rows without a span count on, with zeros below."""
    context = context_lengths(input_ids_BT, sop)
    plain = (real_BT.long().cumsum(1) - 1).clamp(min=0)
    mask = plain.gather(1, mask_places(input_ids_BT, context, masks)[:, None])
    place = torch.arange(input_ids_BT.shape[1], device=input_ids_BT.device)[None]
    span = (place >= context[:, None]) & (context[:, None] > 0)
    first = torch.where(span, mask, plain)
    second = torch.where(span, place - context[:, None] + 1, torch.zeros_like(plain))
    return torch.stack([first, second], dim=1)


def generation_inputs(
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    ids: BlankIds,
    *,
    room: int,
    targets: Sequence[Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Inputs to fill the first blank of each context, to generate from or (with targets) to train on.

    Args:
        input_ids_BT, attention_mask_BT: contexts padded on the right; 1 at tokens, 0 at padding.
        room: tokens of a span, its start included, at most.
        targets: what belongs into each blank, without an end; cut to room - 1 tokens.

    Returns:
        To generate: `input_ids` `[B, T + 1]`, `position_ids` `[B, 2, T + room]`, `generation_attention_mask`
        `[B, 1, T + room, T + room]`. To train: `input_ids`, `labels` (-100 outside of spans), `position_ids`, `attention_mask`
        over T + the longest target with its start and end. 1 is visible.

    Raises:
        ModelError: a context has no mask token.
    """
    rows, length = input_ids_BT.shape
    known = torch.tensor(list(ids.masks), dtype=input_ids_BT.dtype, device=input_ids_BT.device)
    if not bool(torch.isin(input_ids_BT, known).any(1).all()):
        raise ModelError(
            "a context has no mask token, so there is no blank to fill", hint="put [MASK] where text is wanted"
        )
    full = torch.full_like(input_ids_BT[:, 0], length)
    mask = mask_places(input_ids_BT, full, ids.masks)
    cut = [list(t)[: room - 1] for t in targets] if targets is not None else []
    span = max(len(t) for t in cut) + 1 if targets is not None else room
    place = torch.arange(length + span, device=input_ids_BT.device)
    in_span = place >= length
    first = torch.where(in_span[None], mask[:, None], place[None])
    second = torch.where(in_span, place - length + 1, torch.zeros_like(place)).expand(rows, -1)
    positions = torch.stack([first, second], dim=1)
    real = torch.cat([attention_mask_BT.bool(), torch.ones(rows, span, dtype=torch.bool, device=mask.device)], dim=1)
    visible = visible_prefix(full, real).long()
    start = torch.full((rows, 1), ids.sop, dtype=input_ids_BT.dtype, device=input_ids_BT.device)
    if targets is None:
        return {
            "input_ids": torch.cat([input_ids_BT, start], dim=1),
            "position_ids": positions,
            "generation_attention_mask": visible,
        }
    pieces = torch.full((rows, span), ids.pad, dtype=input_ids_BT.dtype, device=input_ids_BT.device)
    labels = torch.full((rows, length + span), -100, dtype=input_ids_BT.dtype, device=input_ids_BT.device)
    for row, target in enumerate(cut):
        written = [ids.sop, *target, ids.eop]
        pieces[row, : min(len(written), span)] = pieces.new_tensor(written[:span])
        labels[row, length : length + len(target) + 1] = labels.new_tensor([*target, ids.eop])
    return {
        "input_ids": torch.cat([input_ids_BT, pieces], dim=1),
        "labels": labels,
        "position_ids": positions,
        "attention_mask": visible,
    }


@dataclass(frozen=True)
class Choices:
    """Rows that hold a context and every choice for its blank, each choice blind to the others.

    inputs: `input_ids` `[B, T]`, `position_ids` `[B, 2, T]`, `attention_mask` `[B, 1, T, T]`.
    places, ids: for each row and choice, where its tokens are predicted, and which they are.
    """

    inputs: dict[str, Tensor]
    places: list[list[list[int]]]
    ids: list[list[list[int]]]


def choice_inputs(
    contexts: Sequence[Sequence[int]], choices: Sequence[Sequence[Sequence[int]]], ids: BlankIds
) -> Choices:
    """One row for each context: the context, then for each choice a start-of-piece token and all but its last token.

    Raises:
        ModelError: a context has no mask token, or a choice has no token.
    """
    if not all(c for row in choices for c in row):
        raise ModelError("a choice has no token", hint="give a word for every label")
    lengths = [len(c) + sum(len(x) for x in row) for c, row in zip(contexts, choices, strict=True)]
    width = max(lengths)
    tokens = torch.full((len(contexts), width), ids.pad, dtype=torch.int64)
    positions = torch.zeros(len(contexts), 2, width, dtype=torch.int64)
    visible = torch.zeros(len(contexts), 1, width, width, dtype=torch.int64)
    places: list[list[list[int]]] = []
    for row, (context, options) in enumerate(zip(contexts, choices, strict=True)):
        blank = next((i for i, token in enumerate(context) if token in ids.masks), None)
        if blank is None:
            raise ModelError("a context has no mask token, so nothing can be chosen for it")
        begin = len(context)
        tokens[row, :begin] = torch.tensor(list(context))
        positions[row, 0, :begin] = torch.arange(begin)
        visible[row, 0, : lengths[row], :begin] = 1
        places.append([])
        for option in options:
            end = begin + len(option)
            tokens[row, begin:end] = torch.tensor([ids.sop, *option[:-1]])
            positions[row, 0, begin:end] = blank
            positions[row, 1, begin:end] = torch.arange(1, len(option) + 1)
            visible[row, 0, begin:end, begin:end] = torch.ones(len(option), len(option), dtype=torch.int64).tril()
            places[-1].append(list(range(begin, end)))
            begin = end
    inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": visible}
    return Choices(inputs, places, [[list(c) for c in row] for row in choices])


def choice_logprobs(logits_BTV: Tensor, choices: Choices) -> list[Tensor]:
    """Log-probability of every choice of each row: the sum over its tokens; fp32."""
    logprobs = torch.log_softmax(logits_BTV.float(), dim=-1)
    return [
        torch.stack([logprobs[row, at, what].sum() for at, what in zip(places, ids, strict=True)])
        for row, (places, ids) in enumerate(zip(choices.places, choices.ids, strict=True))
    ]
