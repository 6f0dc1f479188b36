"""UniLM's masks and T5's spans as pure functions."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.data.masking import SEQ2SEQ, SHARES, mask_tokens, target_row, unilm_row
from danlu.data.spans import corrupt, restore, span_lengths

SENTINELS = list(range(200, 260))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 199), min_size=2, max_size=200), st.integers(0, 2**32), st.sampled_from([0.15, 0.5]))
def test_spans_give_the_text_back(text: list[int], seed: int, ratio: float) -> None:
    row = corrupt(text, SENTINELS, 299, random.Random(seed), ratio=ratio)
    assert restore(row, SENTINELS) == text
    used = [t for t in row.source if t >= 200 and t != 299]
    assert used == [t for t in row.target if t >= 200 and t != 299] == SENTINELS[: len(used)]
    noise, spans = span_lengths(len(text), ratio, 3.0, len(SENTINELS))
    assert len(used) == spans and len(row.target) == noise + spans + 1
    assert len(row.source) == len(text) - noise + spans + 1
    assert row.source[0] == text[0] and row.source[-1] == row.target[-1] == 299
    assert all(not (a >= 200 and b >= 200) for a, b in zip(row.source[:-1], row.source[1:-1], strict=False))


def test_how_much_is_cut() -> None:
    # 100 tokens: 15 of them, in round(15 / 3) = 5 spans. 2 tokens: one. 2 sentinels: two spans at most.
    assert span_lengths(100, 0.15, 3.0, 50) == (15, 5)
    assert span_lengths(2, 0.15, 3.0, 50) == (1, 1)
    assert span_lengths(100, 0.15, 3.0, 2) == (15, 2)
    assert span_lengths(4, 0.9, 1.0, 50) == (3, 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(5, 99), min_size=4, max_size=80), st.integers(0, 2**32))
def test_a_masked_row_keeps_what_it_does_not_predict(text: list[int], seed: int) -> None:
    row = unilm_row([1, *text, 2], 3, 2, 100, random.Random(seed), never={1, 2, 3})
    assert len(row.ids) == len(row.targets) == len(row.loss) and sum(row.loss) >= 1
    assert all(a == b for a, b, learnt in zip(row.ids, row.targets, row.loss, strict=True) if not learnt)
    if row.mode == SEQ2SEQ:
        assert row.targets[row.source - 1] == 2 and 0 < row.source < len(row.ids)
        assert row.targets[: row.source - 1] + row.targets[row.source :] == [1, *text, 2]
    else:
        assert row.targets == [1, *text, 2] and row.source == len(row.ids)
    assert 3 not in row.targets and row.loss[0] == 0


def test_modes_and_masks_come_in_their_shares() -> None:
    rng, modes, fates, learnt, tokens = random.Random(0), Counter[int](), Counter[str](), 0, 0
    for _ in range(3000):
        row = unilm_row([1, *range(10, 50), 2], 3, 2, 100, rng, never={1, 2, 3})
        modes[row.mode] += 1
        learnt, tokens = learnt + sum(row.loss), tokens + len(row.ids)
        for token, target, loss in zip(row.ids, row.targets, row.loss, strict=True):
            if loss:
                fates["mask" if token == 3 else "kept" if token == target else "other"] += 1
    assert SHARES == (1 / 3, 1 / 6, 1 / 6, 1 / 3)
    # Five standard deviations: 5 sqrt(3000 * 2/9) = 129; of about 18,000 predictions 5 sqrt(n p q) < 270.
    assert abs(modes[0] - 1000) < 129 and abs(modes[3] - 1000) < 129 and abs(modes[1] - 500) < 103
    assert abs(learnt / tokens - 0.15) < 0.01
    total = sum(fates.values())
    assert abs(fates["mask"] - 0.8 * total) < 270 and abs(fates["other"] - 0.1 * total) < 250


def test_fine_tuning_masks_the_target_alone_and_its_stop_too() -> None:
    stops = 0
    for seed in range(400):
        row = target_row([1, 10, 11, 2], [20, 21, 22, 23, 2], 3, random.Random(seed))
        assert row.ids[:4] == [1, 10, 11, 2] and row.loss[:4] == [0] * 4 and row.source == 4 and row.mode == SEQ2SEQ
        assert row.loss[4:].count(1) == round(0.7 * 5) and row.ids.count(3) == 4
        stops += row.loss[-1]
    assert 230 < stops < 390  # 4 of 5 places: 320, and five deviations of sqrt(400 * 0.8 * 0.2) = 8
    assert mask_tokens([1, 1], 3, 9, random.Random(0), never={1}) == ([1, 1], [0, 0])
