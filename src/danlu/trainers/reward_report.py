"""What held-out answers say of a reward model: how often it is right, where, how sure it is, and whether length fools it.

Pure functions of scores and targets, in float64. What a target is depends on the loss: a rank (pairwise, kwise), a score that
was given (pointwise), or 1 for a liked answer and 0 for another (unpaired).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from danlu.training.interval import wilson
from danlu.types import Comparison, Ranking, Record, Unpaired

Array = NDArray[np.float64]
Indices = NDArray[np.int64]
BINS: Final = 10
MARGIN_BINS: Final = 20
SAME_LENGTH: Final = 0.1  # lengths this close (as a share of the longer one) count as one length


@dataclass(frozen=True)
class Judged:
    """Held-out answers with their scores; one entry per answer in all fields but `sources`.

    Attributes:
        scores_A: as the model gives them, not normalised.
        targets_A: see the module.
        items_A: which record an answer belongs to.
        lengths_A: tokens.
        sources: where each record came from.
        weights: unpaired: of an answer that was not liked, and of a liked one, in the loss.
    """

    scores_A: Array
    targets_A: Array
    items_A: Indices
    lengths_A: Indices
    sources: Sequence[str]
    weights: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Trials:
    """Decisions of a model that were right (gap above 0) or wrong: pairs, or answers on one side of 0.

    Attributes:
        gap_P: score of the better answer less that of the worse one; of a single answer, its score in the right direction.
        weight_P: the pairs of a record weigh 1 together.
        item_P: which record.
        better_P, worse_P: of pairs, the tokens of both answers.
    """

    gap_P: Array
    weight_P: Array
    item_P: Indices
    better_P: Indices
    worse_P: Indices

    @property
    def right(self) -> Array:
        """1, a half for a tie, or 0."""
        found: Array = (self.gap_P > 0) + 0.5 * (self.gap_P == 0)
        return found


def pairs_of(judged: Judged) -> Trials:
    """All pairs of answers to one prompt whose targets differ.

    Where no prompt has two (ChatLLaMA scores one answer to each), answers of different prompts are compared instead, drawn
    with a fixed seed, every answer in one pair at most, so that pairs are independent.
    """
    order = np.argsort(judged.items_A, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(judged.items_A[order])) + 1)
    found = [pair for group in groups for pair in _differing(judged, combinations(group.tolist(), 2))]
    if not found:
        half = len(order) // 2
        order = np.random.default_rng(0).permutation(order)  # files may be sorted, or repeat themselves
        found = _differing(judged, zip(order[:half].tolist(), order[half : 2 * half].tolist(), strict=True))
    better, worse = np.array(found, dtype=np.int64).reshape(-1, 2).T
    items = judged.items_A[better]
    _, inverse, counts = np.unique(items, return_inverse=True, return_counts=True)
    gaps = judged.scores_A[better] - judged.scores_A[worse]
    return Trials(gaps, 1 / counts[inverse], items, judged.lengths_A[better], judged.lengths_A[worse])


def _differing(judged: Judged, pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs with different targets, the better answer first."""
    targets = judged.targets_A
    return [(a, b) if targets[a] > targets[b] else (b, a) for a, b in pairs if targets[a] != targets[b]]


def answers_of(judged: Judged) -> Trials:
    """Liked and other answers, each held against 0."""
    gaps = judged.scores_A * (2 * judged.targets_A - 1)
    return Trials(gaps, np.ones(len(gaps)), judged.items_A, judged.lengths_A, judged.lengths_A)


# -- the numbers that go through training ---------------------------------------------------------------------------------


def metrics_of(judged: Judged, loss: str) -> dict[str, float]:
    """The held-out metrics of a loss; what the answers do not allow to say is left out.

    eval_loss is the plain loss (no margin, smoothing or centring, at the last token). Of a ranking the mean over its pairs
    counts, and its prompt as one trial of the interval: its pairs share their answers.
    """
    correlation = _correlation(judged.scores_A, judged.lengths_A.astype(np.float64))
    told = {"eval_length_correlation": correlation if correlation is not None else 0.0}
    if loss == "unpaired":
        return _label_metrics(judged) | told
    pairs = pairs_of(judged)
    found: dict[str, float] = {}
    if len(pairs.gap_P):
        share = _share(pairs)
        found = {
            "eval_loss": float(np.average(np.logaddexp(0, -pairs.gap_P), weights=pairs.weight_P)),
            "eval_accuracy": share["share"],
            "eval_accuracy_low": share["low"],
            "eval_accuracy_high": share["high"],
            "eval_margin": float(np.average(pairs.gap_P, weights=pairs.weight_P)),
        }
    if loss == "pointwise":
        errors = judged.scores_A - judged.targets_A
        found["eval_loss"] = float(np.mean(errors**2))
        spread = float(np.var(judged.targets_A))
        if spread > 0:
            found["eval_r2"] = 1 - found["eval_loss"] / spread
        spearman = _correlation(_ranks(judged.scores_A), _ranks(judged.targets_A))
        if spearman is not None:
            found["eval_spearman"] = spearman
    return found | told


def _label_metrics(judged: Judged) -> dict[str, float]:
    trials, liked = answers_of(judged), judged.targets_A > 0
    weights = np.where(liked, judged.weights[1], judged.weights[0])
    share = _share(trials)
    found = {
        "eval_loss": float(np.mean(weights * np.logaddexp(0, -trials.gap_P))),
        "eval_accuracy": share["share"],
        "eval_accuracy_low": share["low"],
        "eval_accuracy_high": share["high"],
    }
    if 0 < liked.sum() < len(liked):
        found["eval_margin"] = float(judged.scores_A[liked].mean() - judged.scores_A[~liked].mean())
        found["eval_auc"], found["eval_auc_low"], found["eval_auc_high"] = auc(judged.scores_A, liked)
    return found


def auc(scores_A: Array, liked_A: NDArray[np.bool_]) -> tuple[float, float, float]:
    """How often a liked answer scores above another one (a tie is half), with its 95% interval.

    The area under the ROC curve by the rank sum of Mann and Whitney 1947; the interval is that of Hanley and McNeil 1982,
    eq. 1.

    Args:
        scores_A: of all answers.
        liked_A: at least one of each.
    """
    ones = int(liked_A.sum())
    zeros = len(liked_A) - ones
    area = float((_ranks(scores_A)[liked_A].sum() - ones * (ones + 1) / 2) / (ones * zeros))
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = (area * (1 - area) + (ones - 1) * (q1 - area**2) + (zeros - 1) * (q2 - area**2)) / (ones * zeros)
    spread = 1.96 * math.sqrt(max(variance, 0.0))
    return area, max(0.0, area - spread), min(1.0, area + spread)


# -- the report -----------------------------------------------------------------------------------------------------------


def report_of(judged: Judged, loss: str, repeats: dict[str, float] | None) -> dict[str, Any]:
    """Everything that `out/reward_report.json` holds: plain values.

    Keys: `loss`; `heldout` (records and decisions); `metrics` (see `metrics_of`); `accuracy`, and its parts `by_source` and
    `by_length`, as rows of share, low, high and count; `calibration` (rows of from, to, count, predicted, found) with
    `calibration_error`; `margins` (rows of from, to, count); `repeats` (see `repeats_of`).

    Args:
        repeats: of all records.
    """
    single = loss == "unpaired"
    trials = answers_of(judged) if single else pairs_of(judged)
    rows, error = _score_calibration(judged) if loss == "pointwise" else _calibration(judged, trials, single)
    return {
        "loss": loss,
        "heldout": {"records": len(judged.sources), "answers" if single else "pairs": len(trials.gap_P)},
        "metrics": metrics_of(judged, loss),
        "accuracy": _share(trials) if len(trials.gap_P) else None,
        "by_source": _by_source(judged, trials),
        "by_length": [] if single else _by_length(trials),
        "calibration": rows,
        "calibration_error": error,
        "margins": _histogram(trials.gap_P),
        "repeats": repeats,
    }


def _share(trials: Trials) -> dict[str, float]:
    total = float(trials.weight_P.sum())
    share = float((trials.right * trials.weight_P).sum()) / total  # summed as the total is: all right is exactly 1
    low, high = wilson(share, total)
    return {"share": share, "low": min(low, share), "high": max(high, share), "count": len(trials.gap_P)}


def _part(trials: Trials, chosen: NDArray[np.bool_]) -> Trials:
    return Trials(*(getattr(trials, name)[chosen] for name in Trials.__dataclass_fields__))


def _by_source(judged: Judged, trials: Trials) -> list[dict[str, Any]]:
    sources = np.array(judged.sources)[trials.item_P]
    names = dict.fromkeys(sources.tolist())
    return [{"source": name, **_share(_part(trials, sources == name))} for name in names]


def _by_length(pairs: Trials) -> list[dict[str, Any]]:
    near = np.abs(pairs.better_P - pairs.worse_P) <= SAME_LENGTH * np.maximum(pairs.better_P, pairs.worse_P)
    longer = pairs.better_P > pairs.worse_P
    parts = {"longer": longer & ~near, "shorter": ~longer & ~near, "within 10%": near}
    return [{"chosen": name, **_share(_part(pairs, own))} for name, own in parts.items() if own.any()]


def _calibration(judged: Judged, trials: Trials, single: bool) -> tuple[list[dict[str, float]], float | None]:
    """Pairs: how sure the model is of the answer it prefers, sigmoid(|gap|) from 1/2 to 1, against how often that is right.

    Single answers: the probability of being liked, sigmoid(score) from 0 to 1, against the share that was, both labels
    weighed as in the loss. The error is the mean difference, bins weighed by what is in them (Naeini et al. 2015).
    """
    if not single:
        return _binned(_sigmoid(np.abs(trials.gap_P)), trials.right, trials.weight_P, (0.5, 1.0))
    weights = np.where(judged.targets_A > 0, judged.weights[1], judged.weights[0])
    return _binned(_sigmoid(judged.scores_A), judged.targets_A, weights, (0.0, 1.0))


def _score_calibration(judged: Judged) -> tuple[list[dict[str, float]], float | None]:
    """Predicted scores against the means of those that were given, in units of the score."""
    bounds = float(judged.scores_A.min()), float(judged.scores_A.max())
    return _binned(judged.scores_A, judged.targets_A, np.ones(len(judged.scores_A)), bounds)


def _binned(
    predicted: Array, found: Array, weights: Array, bounds: tuple[float, float]
) -> tuple[list[dict[str, float]], float | None]:
    """Bins of equal width, those without an entry left out; and the mean difference."""
    if not len(predicted):
        return [], None
    low, high = bounds
    width = (high - low) / BINS or 1.0
    places = np.clip(((predicted - low) / width).astype(np.int64), 0, BINS - 1)
    rows, error = [], 0.0
    for place in np.unique(places).tolist():
        own = places == place
        row = {
            "from": low + place * width,
            "to": low + (place + 1) * width,
            "count": int(own.sum()),
            "predicted": float(np.average(predicted[own], weights=weights[own])),
            "found": float(np.average(found[own], weights=weights[own])),
        }
        error += float(weights[own].sum()) * abs(row["predicted"] - row["found"])
        rows.append(row)
    return rows, error / float(weights.sum())


def _histogram(gaps: Array) -> list[dict[str, float]]:
    """Counts of margins in bins of equal width, 0 being an edge: left of it the model is wrong."""
    reach = float(np.abs(gaps).max(initial=0.0))
    if not reach:
        return []
    counts, edges = np.histogram(gaps, MARGIN_BINS, (-reach, reach))
    return [
        {"from": float(a), "to": float(b), "count": int(count)}
        for a, b, count in zip(edges, edges[1:], counts, strict=False)
    ]


# -- the same thing judged more than once -----------------------------------------------------------------------------------


def repeats_of(records: Iterable[Record], loss: str) -> dict[str, float] | None:
    """How far labels of one and the same thing agree: no model can be right more often than people are with themselves.

    Comparisons and rankings: the same prompt with the same two answers; single answers: the same answer. `agreement` is the
    share of equal labels among all pairs of labels of one thing. If every label errs with one probability, independently, then
    a model that knows the truth is right on `ceiling` = (1 + sqrt(2 agreement - 1)) / 2 of the labels. Scores (pointwise) have
    their mean `difference` instead.

    Returns:
        `repeated` (things that were judged more than once), `labels` (how often in all), and the above; None if there are none.
    """
    seen: dict[bytes, list[float]] = {}
    for key, label in (entry for record in records for entry in _labels(record, loss)):
        seen.setdefault(key, []).append(label)
    repeated = [labels for labels in seen.values() if len(labels) > 1]
    if not repeated:
        return None
    told: dict[str, float] = {"repeated": len(repeated), "labels": sum(map(len, repeated))}
    if loss == "pointwise":
        gaps = [abs(a - b) for labels in repeated for a, b in combinations(labels, 2)]
        return told | {"difference": sum(gaps) / len(gaps)}
    agree = sum(math.comb(count, 2) for labels in repeated for count in Counter(labels).values())
    share = agree / sum(math.comb(len(labels), 2) for labels in repeated)
    return told | {"agreement": share, "ceiling": (1 + math.sqrt(max(2 * share - 1, 0.0))) / 2}


def _labels(record: Record, loss: str) -> Iterable[tuple[bytes, float]]:
    """What a record says: a key for the thing, and its label."""
    if isinstance(record, Unpaired):
        yield _key(record.prompt, record.completion), float(record.label)
    elif isinstance(record, Comparison):
        a, b = _key(record.chosen), _key(record.rejected)
        yield _key(record.prompt) + min(a, b) + max(a, b), float(a < b)
    elif isinstance(record, Ranking):
        answers = [_key(response) for response in record.responses]
        if loss == "pointwise":
            yield from ((_key(record.prompt) + a, s) for a, s in zip(answers, record.scores, strict=True))
            return
        for (a, one), (b, other) in combinations(zip(answers, record.scores, strict=True), 2):
            if a != b and one != other:
                yield _key(record.prompt) + min(a, b) + max(a, b), float((a < b) == (one > other))


def _key(*parts: Any) -> bytes:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


# -- arithmetic -------------------------------------------------------------------------------------------------------------


def _sigmoid(values: Array) -> Array:
    found: Array = np.exp(-np.logaddexp(0, -values))
    return found


def _ranks(values: Array) -> Array:
    """Ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    found: Array = (last - (counts - 1) / 2)[inverse]
    return found


def _correlation(one: Array, other: Array) -> float | None:
    """Pearson's; None where one of them does not vary."""
    if len(one) < 2 or not one.std() or not other.std():
        return None
    return float(np.corrcoef(one, other)[0, 1])
