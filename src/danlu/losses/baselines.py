"""What the score of an answer is held against when there is no critic: its group, the others of its group, the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, stdev

from torch import Tensor

EPS = 1e-4


def group_advantages(rewards_G: Sequence[float], *, scale: bool = True, eps: float = EPS) -> list[float]:
    """`A_i = (r_i - mean(r)) / (std(r) + eps)` over the answers to one prompt (Shao et al. 2024, section 4.1.2).

    The standard deviation is that of a sample (G - 1). A group of equal rewards has nothing to teach: exactly 0.

    Args:
        rewards_G: of G >= 2 answers.
        scale: False: `A_i = r_i - mean(r)` (Liu et al. 2025, Dr. GRPO, section 3.2): a group whose rewards hardly differ
            does not count as much as one whose rewards do.
        eps: > 0.
    """
    if max(rewards_G) == min(rewards_G):
        return [0.0] * len(rewards_G)
    mean, std = fmean(rewards_G), stdev(rewards_G) + eps if scale else 1.0
    return [(r - mean) / std for r in rewards_G]


def leave_one_out(rewards_G: Sequence[float]) -> list[float]:
    """`A_i = r_i - mean_{j != i}(r_j)` over the answers to one prompt: RLOO (Ahmadian et al. 2024; Kool et al. 2019).

    The baseline of an answer does not depend on that answer, so REINFORCE stays unbiased. It is G / (G - 1) times the
    distance to the group's mean; equal rewards give exactly 0.

    Args:
        rewards_G: of G >= 2 answers.
    """
    if max(rewards_G) == min(rewards_G):
        return [0.0] * len(rewards_G)
    total, others = sum(rewards_G), len(rewards_G) - 1
    return [r - (total - r) / others for r in rewards_G]


def returns_to_go(score: float, log_ratio_A: Tensor, *, kl_coef: float) -> Tensor:
    """`R_t = score - kl_coef sum_{i >= t} log_ratio_i`: what is still to come from token t on, undiscounted (Hu 2025, REINFORCE++).

    Args:
        score: of the whole answer.
        log_ratio_A: `log pi - log ref` of the answer's A >= 1 tokens; no gradient.
        kl_coef: >= 0.
    """
    return score - kl_coef * log_ratio_A.flip(0).cumsum(0).flip(0)


def overlong_penalty(length: int, limit: int, cache: int) -> float:
    """0 up to `limit - cache` tokens, from there falling in a line to -1 at `limit` (Yu et al. 2025, DAPO, eq. 13).

    Args:
        length: tokens of the answer.
        limit: tokens that an answer may have, >= 1.
        cache: the last tokens before the limit, over which the penalty grows, in [0, limit]; 0: no penalty at all.
    """
    if not cache:
        return 0.0
    return max(-1.0, min(0.0, (limit - cache - length) / cache))
