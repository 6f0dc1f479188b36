"""Where randomness comes from: numbers that are a function of (seed, index), never of history."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_MASK = (1 << 64) - 1
_GOLDEN, _STEP = 0x9E3779B97F4A7C15, 0xD1B54A32D192ED03
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from a counter-based generator (SplitMix64, Steele et al. 2014)."""
    return float(uniforms([seed], [index])[0])


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> np.ndarray:
    """`uniform` of each pair, float64."""
    x = np.array([seed & _MASK for seed in seeds], np.uint64) * np.uint64(_GOLDEN)
    x += (np.array(indices, np.uint64) + np.uint64(1)) * np.uint64(_STEP)
    for shift, factor in _ROUNDS:
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) / float(1 << 53)


def mix_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers (run seed, step, sample, ...)."""
    digest = np.random.SeedSequence([p & _MASK for p in parts]).generate_state(2, np.uint32)
    return (int(digest[0]) << 31) ^ int(digest[1])
