"""Texts to blank infilling (Du et al. 2022, GLM, section 2): spans, sentences or a long rest are cut out, and written behind.

Rows are what GLM's own corpus builder makes, draw for draw: `build` takes a source of randomness and asks it in that builder's
order, which `tests/test_blanks.py` replays.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from danlu.exceptions import DataError

SENTENCE_ENDS = ".?!;:。？！；…\n"
Task = Literal["blank", "sentence", "document"]
Span = tuple[int, int]


@dataclass(frozen=True)
class PieceIds:
    """Ids of the tokens that stand for blanks, frame pieces and end documents.

    mask, sentence_mask, document_mask: [MASK], [sMASK], [gMASK]; sop, eop: start and end of a piece; eos: end of a document;
    cls: its beginning, None if there is none; blocked: [dBLOCK]; pad.
    """

    mask: int
    sentence_mask: int
    document_mask: int
    sop: int
    eop: int
    eos: int
    pad: int
    cls: int | None = None
    blocked: int | None = None


@dataclass(frozen=True)
class BlankMix:
    """How texts are corrupted; shares of the three tasks, the rest of 1 being documents. Defaults: the published 10B's.

    blank, sentence: shares in [0, 1]; ratio: of the tokens that are cut out, in (0, 1); mean_span: of the Poisson distribution
    of span lengths, cut to 1..longest_span; single: share of rows with one span only; short: share of texts that are cut to a
    random length; blocked: share of a span's inputs that are hidden; rest_min: least share of a text that a document's blank
    takes; infill: share of documents' blanks that stand at the end (the others stand inside); own_masks: sentences and
    documents have their own mask tokens.
    """

    blank: float = 0.5
    sentence: float = 0.3
    ratio: float = 0.15
    mean_span: float = 3.0
    longest_span: int = 39
    single: float = 0.0
    short: float = 0.02
    blocked: float = 0.1
    rest_min: float = 0.25
    infill: float = 0.5
    own_masks: bool = True


@dataclass(frozen=True)
class BlankRow:
    """A corrupted text: ids and targets are aligned (nothing is shifted).

    context: tokens of part A; places, inside: the two rows of positions; loss: 1 where a target is learnt.
    """

    ids: list[int]
    targets: list[int]
    loss: list[int]
    places: list[int]
    inside: list[int]
    context: int
    task: Task


def span_weights(mix: BlankMix) -> list[float]:
    """Poisson probabilities of the lengths 1..longest_span, not normalised (`random.choices` does)."""
    lam = mix.mean_span
    return [math.exp(-lam + n * math.log(lam) - math.lgamma(n + 1)) for n in range(1, mix.longest_span + 1)]


def build(
    texts: Sequence[Sequence[int]],
    ids: PieceIds,
    mix: BlankMix,
    rng: random.Random,
    *,
    ends: Callable[[int], bool],
    max_length: int,
    blocking: random.Random | None = None,
) -> list[BlankRow]:
    """One task is drawn for all texts, and each becomes a row; a text into which its spans do not fit is left out.

    Args:
        texts: token ids; `ids.cls` first, if there is one, and `ids.eos` last.
        rng: asked in the order of GLM's builder.
        ends: whether a token ends a sentence.
        max_length: of a text; short texts are cut below it.
        blocking: what [dBLOCK] is drawn with; `rng` by default.

    Raises:
        DataError: a sentence that is cut out holds the end of a document.
    """
    given = [list(t) for t in texts]
    blocking = blocking or rng
    if rng.random() < mix.short:
        length = rng.randrange(min(32, max_length // 2), max_length - 1)
        given = [t[:length] for t in given]
    single = rng.random() < mix.single
    choice = 0.0 if single else rng.random()
    if choice < mix.blank:
        found = [_blanks(t, ids, mix, rng, blocking, single) for t in given]
    elif choice < mix.blank + mix.sentence:
        found = [_sentences(t, ids, mix, rng, ends) for t in given]
    else:
        lengths = [len(t) for t in given]
        low = int(mix.rest_min * min(lengths))
        rest = rng.randint(low, max(low, max(lengths) - 2))
        found = [_document(t, ids, mix, rng, rest) for t in given]
    return [row for row in found if row is not None]


def _blanks(
    text: list[int], ids: PieceIds, mix: BlankMix, rng: random.Random, blocking: random.Random, single: bool
) -> BlankRow | None:
    weights, lengths, total = span_weights(mix), list[int](), 0
    while not lengths if single else total < int(mix.ratio * len(text)):
        lengths.append(rng.choices(range(1, len(weights) + 1), weights=weights)[0])
        total += lengths[-1]
    return _row_of(text, lengths, ids, mix, rng, "blank", blocking)


def _row_of(
    text: list[int],
    lengths: list[int],
    ids: PieceIds,
    mix: BlankMix,
    rng: random.Random,
    task: Task,
    blocking: random.Random | None = None,
) -> BlankRow | None:
    """A row with spans of these lengths at random places; None if they do not fit, or there are none."""
    rng.shuffle(lengths)
    spans = _places(text, lengths, ids, mix, rng)
    if not spans or len(spans) < len(lengths):
        return None
    return cut_out(text, spans, ids, mix, rng, task, blocking)


def _places(text: list[int], lengths: list[int], ids: PieceIds, mix: BlankMix, rng: random.Random) -> list[Span]:
    """Spans that do not cross documents, with a token between any two; documents by length, the longest takes what is left."""
    rng.shuffle(lengths)
    borders = [-1, *(i for i, token in enumerate(text) if token == ids.eos)]
    documents: list[tuple[int, int]] = []
    end = len(text)
    for border in reversed(borders):
        start = border + 1
        if start < len(text) and ids.cls is not None and text[start] == ids.cls:
            start += 1
        length = end - start
        if end == len(text) and length > 0:  # the last token, an end or a text that was cut, stays
            length -= 1
        documents.append((start, length))
        end = border
    documents.sort(key=lambda d: d[1])
    found: list[Span] = []
    used = 0
    for index, (start, length) in enumerate(documents):
        last = index == len(documents) - 1
        taken, total = 0, 0
        for wanted in lengths[used:]:
            fits = wanted + total + taken <= length if last else wanted + total <= int(length * mix.ratio)
            if not fits:
                break
            taken, total = taken + 1, total + wanted
        if taken:
            found += _scatter(lengths[used : used + taken], start, length, rng)
            used += taken
    return found


def _scatter(lengths: list[int], start: int, length: int, rng: random.Random) -> list[Span]:
    room = length - sum(lengths) - len(lengths) + 1
    spans: list[Span] = []
    for place, wanted in zip(sorted(rng.randrange(room + 1) for _ in lengths), lengths, strict=True):
        spans.append((start + place, start + place + wanted))
        start += wanted + 1
    return spans


def _sentences(
    text: list[int], ids: PieceIds, mix: BlankMix, rng: random.Random, ends: Callable[[int], bool]
) -> BlankRow | None:
    """Whole sentences, in random order until `ratio` of the tokens is reached."""
    sentences: list[Span] = []
    last = 1 if ids.cls is not None and text[0] == ids.cls else 0
    for place, token in enumerate(text):
        if ends(token):
            if last < place + 1:
                sentences.append((last, place + 1))
            last = place + 1
        elif token == ids.eos:
            last = place + 1
    if last < len(text):
        sentences.append((last, len(text)))
    rng.shuffle(sentences)
    chosen: list[Span] = []
    for start, end in sentences:
        chosen.append((start, end))
        if sum(e - s for s, e in chosen) >= int(mix.ratio * len(text)):
            break
    return cut_out(text, chosen, ids, mix, rng, "sentence") if chosen else None


def _document(text: list[int], ids: PieceIds, mix: BlankMix, rng: random.Random, rest: int) -> BlankRow | None:
    """One long blank: the end of the text, or, in a text that is one document, a part inside it."""
    several = ids.eos in text[:-1]
    if several or rng.random() < mix.infill:
        return suffix(text, max(1, len(text) - rest), ids, "document", ids.document_mask if mix.own_masks else ids.mask)
    return _row_of(text, [rest], ids, mix, rng, "document")


def suffix(text: Sequence[int], context: int, ids: PieceIds, task: Task, mask: int) -> BlankRow:
    """The text from `context` on as one blank at its end; the text's last token ends the piece, in place of an end token."""
    before, rest = list(text[:context]), list(text[context:])
    return BlankRow(
        ids=[*before, mask, ids.sop, *rest[:-1]],
        targets=[*before, mask, *rest],
        loss=[0] * (context + 1) + [1] * len(rest),
        places=[*range(context + 1), *[context] * len(rest)],
        inside=[*[0] * (context + 1), *range(1, len(rest) + 1)],
        context=context + 1,
        task=task,
    )


def cut_out(
    text: Sequence[int],
    spans: Sequence[Span],
    ids: PieceIds,
    mix: BlankMix,
    rng: random.Random,
    task: Task,
    blocking: random.Random | None = None,
) -> BlankRow:
    """Part A with a mask token for each span, then the spans in random order: sop + span in, span + eop out.

    Raises:
        DataError: a span holds the end of a document.
    """
    if any(ids.eos in text[start:end] for start, end in spans):
        raise DataError(
            "a span that is cut out holds the end of a document", hint="give texts without their last token"
        )
    own = {"blank": ids.mask, "sentence": ids.sentence_mask, "document": ids.document_mask}
    mask = own[task] if mix.own_masks else ids.mask
    order = list(spans)
    rng.shuffle(order)
    source: list[int] = []
    place_of: dict[Span, int] = {}
    last = 0
    for start, end in sorted(spans):
        source += text[last:start]
        place_of[(start, end)] = len(source)
        source.append(mask)
        last = end
    source += text[last:]
    inputs: list[int] = []
    targets: list[int] = []
    places: list[int] = []
    inside: list[int] = []
    for start, end in order:
        piece = list(text[start:end])
        shown = piece
        if task == "blank" and mix.blocked > 0 and blocking is not None and ids.blocked is not None:
            shown = [ids.blocked if blocking.random() < mix.blocked else token for token in piece]
        inputs += [ids.sop, *shown]
        targets += [*piece, ids.eop]
        places += [place_of[(start, end)]] * (len(piece) + 1)
        inside += range(1, len(piece) + 2)
    return BlankRow(
        ids=source + inputs,
        targets=source + targets,
        loss=[0] * len(source) + [1] * len(inputs),
        places=[*range(len(source)), *places],
        inside=[0] * len(source) + inside,
        context=len(source),
        task=task,
    )
