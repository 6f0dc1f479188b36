"""GLM's corpus: the recorded builder draw for draw, and properties of every row."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from danlu.data.blanks import BlankMix, BlankRow, PieceIds, build, span_weights, suffix
from danlu.exceptions import DataError

IDS = PieceIds(300, 302, 301, sop=303, eop=304, eos=306, pad=0, cls=305, blocked=307)
NAMES = {
    "bert_prob": "blank",
    "gap_sentence_prob": "sentence",
    "block_mask_prob": "blocked",
    "gpt_min_ratio": "rest_min",
}
NAMES |= {"task_mask": "own_masks"}
ORIGINAL = {"blank": 1.0, "sentence": 0.0, "blocked": 0.0, "rest_min": 0.5, "short": 0.0, "own_masks": False}


def ends(token: int) -> bool:
    return token % 17 == 0 and token < 300


@pytest.fixture(scope="module")
def recorded(shared_data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    folder = shared_data.parent / "fixtures" / "glm_block_lm"
    return json.loads((folder / "cases.json").read_text("utf-8")), load_file(folder / "cases.safetensors")


def padded(rows: list[list[int]]) -> list[list[int]]:
    width = max(len(r) for r in rows)
    return [r + [0] * (width - len(r)) for r in rows]


def test_span_lengths_are_poisson(recorded: tuple[dict[str, Any], dict[str, Any]]) -> None:
    assert span_weights(BlankMix()) == pytest.approx(recorded[0]["block_length_pmf_1_to_39"], rel=1e-12)
    assert span_weights(BlankMix())[2] == pytest.approx(2.718281828459045**-3 * 27 / 6)


@pytest.mark.parametrize("number", range(12))
def test_the_recorded_builder_is_replayed(number: int, recorded: tuple[dict[str, Any], dict[str, Any]]) -> None:
    cases, tensors = recorded
    case = cases["cases"][number]
    key, options = case["key"], dict(case["kwargs"])
    length = options.pop("max_seq_length")
    mix = BlankMix(**ORIGINAL | {NAMES[name]: value for name, value in options.items()})
    rng, blocking = random.Random(case["rng_seed"]), random.Random(case["global_random_seed_for_dBLOCK"])
    samples = tensors[f"{key}.samples"].tolist()
    rows = build(samples, IDS, mix, rng, ends=ends, max_length=length, blocking=blocking)
    assert padded([r.ids for r in rows]) == tensors[f"{key}.text"].tolist()
    assert padded([r.targets for r in rows]) == tensors[f"{key}.target"].tolist()
    assert padded([r.loss for r in rows]) == tensors[f"{key}.loss_mask"].tolist()
    assert [r.context for r in rows] == tensors[f"{key}.attention_mask"].tolist()
    positions = tensors[f"{key}.position_id"]
    assert padded([r.places for r in rows]) == positions[:, 0].tolist()
    inside = [r.inside for r in rows]
    if case["mode"] == "gpt":
        # A suffix: 0 at [gMASK], 1 at sop, as recorded.
        assert all(r.inside[r.context - 1] == 0 and r.inside[r.context] == 1 for r in rows)
    assert padded(inside) == positions[:, 1].tolist()


def restored(row: BlankRow) -> list[int]:
    """The text again: every mask token replaced by the targets that stand at its place."""
    pieces: dict[int, list[int]] = {}
    for target, place, learnt in zip(row.targets, row.places, row.loss, strict=True):
        if learnt:
            pieces.setdefault(place, []).append(target)
    text: list[int] = []
    for place, token in enumerate(row.ids[: row.context]):
        piece = pieces.get(place, [token])
        text += piece[:-1] if piece[-1] == IDS.eop else piece
    return text


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 299), min_size=12, max_size=60), min_size=1, max_size=3),
    st.integers(0, 2**32),
    st.sampled_from(["blank", "sentence", "document"]),
)
def test_every_row_gives_its_text_back(texts: list[list[int]], seed: int, task: str) -> None:
    shares = {"blank": 1.0 * (task == "blank"), "sentence": 1.0 * (task == "sentence")}
    mix = BlankMix(short=0.0, **shares)
    whole = [[305, *t, *([] if task == "sentence" else [306])] for t in texts]
    rows = build(whole, IDS, mix, random.Random(seed), ends=ends, max_length=64)
    originals = {tuple(t) for t in whole}
    for row in rows:
        assert row.task == task
        assert tuple(restored(row)) in originals
        assert len(row.ids) == len(row.targets) == len(row.loss) == len(row.places) == len(row.inside)
        assert row.ids[: row.context] == row.targets[: row.context] and not any(row.loss[: row.context])
        assert row.places[: row.context] == list(range(row.context)) and not any(row.inside[: row.context])
        starts = [i for i, token in enumerate(row.ids) if token == IDS.sop]
        assert len(starts) == sum(t in (300, 301, 302) for t in row.ids[: row.context])
        for start in starts:
            assert row.inside[start] == 1 and row.ids[row.places[start]] in (300, 301, 302)
        cut = sum(row.loss) - sum(t == IDS.eop for t in row.targets[row.context :])
        if task == "blank":
            assert cut >= int(0.15 * len(restored(row)))


def test_tasks_are_mixed_by_their_shares_and_spans_are_shuffled() -> None:
    text = [305, *range(1, 60), 306]
    counts = {"blank": 0, "sentence": 0, "document": 0}
    unsorted = 0
    rng = random.Random(0)
    for _ in range(2000):
        for row in build([text], IDS, BlankMix(short=0.0), rng, ends=ends, max_length=64):
            counts[row.task] += 1
            firsts = [p for p, i in zip(row.places, row.inside, strict=True) if i == 1]
            unsorted += firsts != sorted(firsts)
    # A share p of 2000 draws lies within 5 sqrt(2000 p (1 - p)) of its mean (but for rows that did not fit).
    assert abs(counts["blank"] - 1000) < 112 and abs(counts["document"] - 400) < 90
    assert unsorted > 500


def test_documents_keep_their_spans_and_the_end_of_one_is_never_cut_out() -> None:
    text = [305, *range(1, 21), 306, 305, *range(21, 51), 306]
    for seed in range(50):
        for row in build([text], IDS, BlankMix(blank=1.0, short=0.0), random.Random(seed), ends=ends, max_length=64):
            assert row.ids[: row.context].count(306) == 2 and row.ids[: row.context].count(305) == 2
    with pytest.raises(DataError, match="end of a document"):
        for seed in range(50):
            build(
                [[305, 1, 2, 17, 4, 306]],
                IDS,
                BlankMix(blank=0.0, sentence=1.0, ratio=0.9, short=0.0),
                random.Random(seed),
                ends=lambda t: t in (17, 306),
                max_length=64,
            )


def test_a_suffix_ends_with_the_texts_own_end() -> None:
    row = suffix([305, 1, 2, 3, 306], 3, IDS, "document", IDS.document_mask)
    assert row.ids == [305, 1, 2, 301, 303, 3] and row.targets == [305, 1, 2, 301, 3, 306]
    assert row.places == [0, 1, 2, 3, 3, 3] and row.inside == [0, 0, 0, 0, 1, 2] and row.loss == [0, 0, 0, 0, 1, 1]
