"""What changes logits before the temperature: biases, penalties of what was said, and bans."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu.generation.protocol import SamplingParams

Ids = NDArray[np.int64]
NO_CHANCE = float("-inf")


def adjust(
    logits_SV: Tensor, params: Sequence[SamplingParams], steps: Sequence[int], history: Sequence[Sequence[int]]
) -> Tensor:
    """float32 logits with the changes that each row's parameters ask for, in the order that `SamplingParams` gives.

    Token ids that the vocabulary does not have are passed over. The arguments are those of `sampling.sample`.
    """
    logits = logits_SV.float()
    changed = [row for row, (p, step) in enumerate(zip(params, steps, strict=True)) if _changes(p, step)]
    if not changed:
        return logits
    if logits is logits_SV:
        logits = logits.clone()
    said = {r: np.asarray(history[r], np.int64) for r in changed if params[r].reads_history}
    biased = [r for r in changed if params[r].logit_bias]
    repeating = [r for r in changed if params[r].repetition_penalty != 1.0]
    counted = [r for r in changed if params[r].presence_penalty or params[r].frequency_penalty]
    if biased:
        _add_biases(logits, biased, params)
    if repeating:
        _divide_by_repetition(logits, repeating, params, said)
    if counted:
        _subtract_counts(logits, counted, params, {r: said[r][len(said[r]) - steps[r] :] for r in counted})
    banning = {r: list(_banned(params[r], steps[r], said.get(r))) for r in changed}
    banning = {r: ids for r, ids in banning.items() if ids}
    if banning:
        _put(logits, *_places(banning, logits.shape[1]), NO_CHANCE)
    suspects = sorted({*banning, *(r for r in biased if NO_CHANCE in params[r].logit_bias.values())})
    if suspects:
        _leave_a_choice(logits, logits_SV, suspects, params)
    return logits


def _changes(p: SamplingParams, step: int) -> bool:
    return bool(p.logit_bias or p.bad_words or p.reads_history or (step < p.min_new_tokens and p.stop_ids))


def _add_biases(logits: Tensor, rows: Sequence[int], params: Sequence[SamplingParams]) -> None:
    flat, _ = _places({r: list(params[r].logit_bias) for r in rows}, logits.shape[1])
    bias = [b for r in rows for i, b in params[r].logit_bias.items() if i < logits.shape[1]]
    place = torch.from_numpy(flat).to(logits.device)
    logits.view(-1)[place] += torch.tensor(bias, device=logits.device)


def _divide_by_repetition(
    logits: Tensor, rows: Sequence[int], params: Sequence[SamplingParams], said: dict[int, Ids]
) -> None:
    flat, lengths = _places({r: said[r] for r in rows}, logits.shape[1])
    penalty = np.repeat(np.array([params[r].repetition_penalty for r in rows], np.float32), lengths)
    place, divisor = (torch.from_numpy(x).to(logits.device) for x in (flat, penalty))
    values = logits.view(-1)[place]
    # A token said twice has two places with one value: each writes the same.
    logits.view(-1)[place] = torch.where(values < 0, values * divisor, values / divisor)


def _subtract_counts(
    logits: Tensor, rows: Sequence[int], params: Sequence[SamplingParams], answered: dict[int, Ids]
) -> None:
    flat, counts = np.unique(_places(answered, logits.shape[1])[0], return_counts=True)
    owner = flat // logits.shape[1]
    presence, frequency = np.zeros(len(params)), np.zeros(len(params))
    for r in rows:
        presence[r], frequency[r] = params[r].presence_penalty, params[r].frequency_penalty
    penalty = (presence[owner] + frequency[owner] * counts).astype(np.float32)
    logits.view(-1)[torch.from_numpy(flat).to(logits.device)] -= torch.from_numpy(penalty).to(logits.device)


def _banned(p: SamplingParams, step: int, said: Ids | None) -> Iterator[int]:
    if p.no_repeat_ngram_size and said is not None:
        yield from repeating_ids(said, p.no_repeat_ngram_size)
    for word in p.bad_words:
        *before, last = word
        if not before or (said is not None and _ends_with(said, before)):
            yield last
    if step < p.min_new_tokens:
        yield from p.stop_ids


def repeating_ids(said: Ids, size: int) -> list[int]:
    """Tokens that would complete an n-gram that has been said."""
    starts = len(said) - size + 1
    if starts <= 0:
        return []
    same = np.ones(starts, bool)
    for offset in range(size - 1):
        same &= said[offset : offset + starts] == said[starts + offset]
    ids: list[int] = np.unique(said[size - 1 :][same]).tolist()
    return ids


def _ends_with(said: Ids, ids: Sequence[int]) -> bool:
    return len(said) >= len(ids) and said[len(said) - len(ids) :].tolist() == list(ids)


def _places(ids: Mapping[int, Iterable[int] | Ids], vocab: int) -> tuple[Ids, list[int]]:
    """Token ids of rows as places in the flattened logits, and how many each row has."""
    known = {r: _known(i, vocab) for r, i in ids.items()}
    flat = np.concatenate([r * vocab + i for r, i in known.items()])
    return flat, [len(i) for i in known.values()]


def _known(ids: Iterable[int] | Ids, vocab: int) -> Ids:
    array = ids if isinstance(ids, np.ndarray) else np.fromiter(ids, np.int64)
    return array[array < vocab]


def _put(logits: Tensor, flat: Ids, lengths: list[int], value: float) -> None:
    logits.view(-1)[torch.from_numpy(flat).to(logits.device)] = value


def _leave_a_choice(logits: Tensor, model: Tensor, rows: list[int], params: Sequence[SamplingParams]) -> None:
    """Where everything is banned: the smallest stop id, or without one what the model itself says."""
    highest = logits[torch.tensor(rows, device=logits.device)].amax(-1).tolist()
    for row, value in zip(rows, highest, strict=True):
        if value > NO_CHANCE or value != value:
            continue
        stops = [i for i in params[row].stop_ids if i < logits.shape[1]]
        if stops:
            logits[row, min(stops)] = 0.0
        else:
            logits[row] = model[row]
