"""Rules on the curves of PPO and its relatives: pure functions of logged rows, every threshold a constant with its reason.

A rule looks at the rows so far (those of metrics.jsonl) and says what it saw, or nothing. What a finding means and what helps
stands beside it in `RULES`; what is done about it is for `health.py`. The first and the last few rows stand for the begin and the
end of a curve, so that a rule decides while the run goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Final, Literal

from danlu.training.curves import Rows, near, noise, points, trend, values
from danlu.training.rollouts import ENGINE_GAP

FEW: Final = 5  # iterations whose mean is the begin or the end of a curve: one batch says little
ITERATIONS: Final = 10  # before that nothing has had a chance
PATIENCE: Final = 20  # a warm-up and a critic that begins from nothing need longer

KL_FAR: Final = 10.0  # nats per answer: far beyond what InstructGPT-like runs spend on their whole gain
KL_GROWTH: Final = 1.5  # end against middle: a controlled run levels out
KL_STEADY: Final = 0.8  # gain of the last quarter against the quarter before it: levelling out brings it down
KL_NEGATIVE: Final = -0.1  # nats per answer: the mean of k1 is a KL, so it is not below 0 but by chance
KL_ERRORS: Final = 3.0  # standard errors below 0 that are no chance
KL_NEAR: Final = 0.05  # nats per answer: sampling twice from one model looks like this
SCORE_FLAT: Final = 0.1  # scores have deviation 1; smaller is within the noise of a few batches of 64
SCORE_FALL: Final = 0.2  # a fall of the training score that is clearly one
SCORE_ERRORS: Final = 4.0  # standard errors of that fall: the rule asks again at every iteration
LENGTH_FACTOR: Final = 2.0  # answers twice or half as long are other answers, not better ones
LENGTH_TOKENS: Final = 4.0  # but two tokens more than two are nothing
STOP_FALL: Final = 0.10  # share of answers that end by themselves
ENTROPY_SHARE: Final = 0.25  # below a quarter of its start nothing new is tried any more
REPEATED: Final = 0.2  # a fifth of all 3-grams seen before: people's answers stay below a tenth ...
REPEATED_RISE: Final = 0.1  # ... and it was not so at the start
DISTINCT_SHARE: Final = 0.4  # 2-grams of a batch: below that share of the start, prompts get one and the same answer
EMPTY: Final = 0.1  # some answers that say nothing are a habit, not chance
HACK_POINTS: Final = 4  # held-out evaluations that a fall is read from: three can fall by chance
HACK_ERRORS: Final = 4.0  # standard errors of the fall: several stretches of the curve are tried, at every evaluation
HACK_FALL: Final = 0.03  # of the peak, or of what was gained: less is a plateau, and 10% is what must not be waited for
HACK_PROXY: Final = -1.0  # the reward is held to have risen or stayed unless its own trend is further below 0 than this
RATIO_FIRST: Final = 1e-3  # on the first pass nothing has changed: it is 1 but for rounding, and G-RATIO asks for 1e-4
RATIO_HUGE: Final = 10.0  # a token ten times likelier within one iteration: far beyond any clip range
GAP_LEAST: Final = 1e-5  # nats per token, the bound of float32: below it no growth means anything
GAP_GROWTH: Final = (
    3.0  # against the first iteration, when both had the same weights: rounding keeps the mean within a tenth
)
GAP_FAR: Final = 0.5  # nats, of the greatest token in any precision: rounding in bf16 stays below 0.15
CLIP_HIGH: Final = 0.3  # healthy runs clip 5% to 20%; where a third is clipped, most of the batch is thrown away
EQUAL_GROUPS: Final = 0.5  # where most groups have nothing to compare, most of the roll-outs teach nothing
GRAD_GROWTH: Final = 10.0  # a norm drifts by a factor of two or three in healthy training
GRAD_CLIP: Final = 1.0  # below the usual clip a growing norm harms nothing
PTX_HIGH: Final = 0.9  # share of the gradient norm: beyond it the reward is a rounding error
PTX_LOW: Final = 0.01  # below it the language-model loss costs its time and does nothing

READ: Final = (  # metrics of an iteration and of an evaluation that rules look at
    *(
        "kl",
        "score",
        "ratio_error_first",
        "ratio_max",
        "engine_gap",
        "engine_gap_max",
        "engine_gap_high",
        "clip_fraction",
        "length",
        "stop_rate",
    ),
    *("entropy", "repetition", "distinct_2", "empty_rate", "equal_groups", "explained_variance", "grad_norm"),
    *("critic_grad_norm", "ptx_share", "eval_score", "eval_gold"),
)

Severity = Literal["warning", "error"]
Check = Callable[[Rows], str | None]


@dataclass(frozen=True)
class Finding:
    """What a rule found.

    Args:
        code: short and stable.
        severity: error: something is broken, or soon will be; warning: it goes the wrong way.
        seen: with numbers.
        cause: the likely one.
        change: what to try, with names of settings.
        step: 1-based, of the last row that was looked at.
    """

    code: str
    severity: Severity
    seen: str
    cause: str
    change: str
    step: int


@dataclass(frozen=True)
class Rule:
    """`check` says what it saw, or nothing; `when` says in words when that is."""

    check: Check
    severity: Severity
    when: str
    cause: str
    change: str


def examine(rows: Rows, codes: Iterable[str]) -> list[Finding]:
    """What the rules of these codes find in the rows so far, in the order of `RULES`."""
    step = max((int(r["step"]) for r in rows if isinstance(r.get("step"), int | float)), default=0)
    wanted = set(codes)
    found = []
    for code, rule in RULES.items():
        seen = rule.check(rows) if code in wanted else None
        if seen is not None:
            found.append(Finding(code, rule.severity, seen, rule.cause, rule.change, step))
    return found


# -- how far the policy went ------------------------------------------------------------------------------------------


def kl_high(rows: Rows) -> str | None:
    """The policy goes ever further from the reference."""
    kl = points(rows, "kl")
    if len(kl) < ITERATIONS:
        return None
    last = fmean(s for s, _ in kl[-FEW:])  # the end's own middle
    quarters = [near(kl, share * last, FEW) for share in (0.5, 0.75)]
    end = _end([v for _, v in kl])
    if end < KL_FAR or end < KL_GROWTH * quarters[0] or end - quarters[1] < KL_STEADY * (quarters[1] - quarters[0]):
        return None
    return f"the policy is {end:.1f} nats per answer from the reference, after {quarters[0]:.1f} half-way, and goes on"


def kl_negative(rows: Rows) -> str | None:
    """The mean of `log p - log q` over samples of p is clearly negative, which a KL cannot be."""
    kl = values(rows, "kl")[-ITERATIONS:]
    if len(kl) < ITERATIONS:
        return None
    mean = fmean(kl)
    error = (sum((v - mean) ** 2 for v in kl) / (len(kl) - 1) / len(kl)) ** 0.5
    if mean > KL_NEGATIVE or mean > -KL_ERRORS * error:
        return None
    return f"the mean KL of the last {ITERATIONS} iterations is {mean:.2f} nats per answer (standard error {error:.2f})"


def timid(rows: Rows) -> str | None:
    """Neither the policy nor its score moved."""
    kl, score = values(rows, "kl"), values(rows, "score")
    if min(len(kl), len(score)) < PATIENCE:
        return None
    if abs(_end(kl)) >= KL_NEAR or abs(_end(score) - _begin(score)) >= SCORE_FLAT:
        return None
    return f"after {len(kl)} iterations the KL is {_end(kl):.3f} and the score {_begin(score):.2f} -> {_end(score):.2f}"


def ratio(rows: Rows) -> str | None:
    """The probability ratio is not 1 where nothing has changed yet, or huge afterwards."""
    first, most = values(rows, "ratio_error_first"), values(rows, "ratio_max")
    if first and first[-1] > RATIO_FIRST:
        return f"on the first pass the ratio is off by {first[-1]:.1e}, where nothing has been updated yet"
    if len(most) >= FEW and median(most[-FEW:]) > RATIO_HUGE:
        return f"the largest ratio of an iteration is {median(most[-FEW:]):.0f}"
    return None


def engine_gap(rows: Rows) -> str | None:
    """The engine gives its tokens other probabilities than the trainer."""
    gap, most = values(rows, "engine_gap"), values(rows, "engine_gap_max")
    if len(gap) < 2:
        return None
    recent, far = median(gap[-3:]), median(most[-3:]) if most else 0.0
    beyond = sum(bool(row.get("engine_gap_high")) for row in [r for r in rows if "engine_gap" in r][-3:])
    if recent <= max(GAP_LEAST, GAP_GROWTH * gap[0]) and far <= GAP_FAR and beyond < 2:
        return None
    return (
        f"log-probabilities of the engine and of the trainer differ by {recent:.2g} nats per token ({gap[0]:.2g} at first), the "
        f"greatest by {far:.2g}"
    )


def clip_high(rows: Rows) -> str | None:
    """A large share of the tokens is clipped, for long."""
    clipped = values(rows, "clip_fraction")
    if len(clipped) < ITERATIONS or fmean(clipped[-ITERATIONS:]) <= CLIP_HIGH:
        return None
    return f"{fmean(clipped[-ITERATIONS:]):.0%} of the tokens were clipped over the last {ITERATIONS} iterations"


# -- what the answers look like -----------------------------------------------------------------------------------------


def length_growth(rows: Rows) -> str | None:
    """Answers become much longer."""
    length = values(rows, "length")
    if len(length) < ITERATIONS:
        return None
    first, last = _begin(length), _end(length)
    if last < LENGTH_FACTOR * first or last - first < LENGTH_TOKENS:
        return None
    return f"answers grew from {first:.0f} to {last:.0f} tokens"


def length_collapse(rows: Rows) -> str | None:
    """Answers become much shorter."""
    length = values(rows, "length")
    if len(length) < ITERATIONS:
        return None
    first, last = _begin(length), _end(length)
    if last * LENGTH_FACTOR > first or first - last < LENGTH_TOKENS:
        return None
    return f"answers shrank from {first:.0f} to {last:.0f} tokens"


def stop_lost(rows: Rows) -> str | None:
    """Fewer answers end by themselves."""
    rate = values(rows, "stop_rate")
    if len(rate) < ITERATIONS or _begin(rate) - _end(rate) < STOP_FALL:
        return None
    return f"{_end(rate):.0%} of the answers end by themselves, {_begin(rate):.0%} did at the start"


def entropy_lost(rows: Rows) -> str | None:
    """The policy became so sure that it tries nothing new."""
    entropy = values(rows, "entropy")
    if len(entropy) < ITERATIONS or _begin(entropy) <= 0 or _end(entropy) > ENTROPY_SHARE * _begin(entropy):
        return None
    return f"the entropy fell from {_begin(entropy):.2f} to {_end(entropy):.2f} nats per token"


def repeats(rows: Rows) -> str | None:
    """Answers repeat themselves, or one another."""
    repeated, distinct = values(rows, "repetition"), values(rows, "distinct_2")
    if len(repeated) >= ITERATIONS and _end(repeated) >= max(REPEATED, _begin(repeated) + REPEATED_RISE):
        return f"{_end(repeated):.0%} of the 3-grams of an answer repeat, {_begin(repeated):.0%} did at the start"
    if len(distinct) >= ITERATIONS and _end(distinct) <= DISTINCT_SHARE * _begin(distinct):
        return (
            f"{_end(distinct):.0%} of a batch's 2-grams are different ones, {_begin(distinct):.0%} were at the start: "
            "the answers have become alike"
        )
    return None


def empty(rows: Rows) -> str | None:
    """Answers without any text."""
    rate = values(rows, "empty_rate")
    if len(rate) < FEW or _end(rate) < EMPTY:
        return None
    return f"{_end(rate):.0%} of the answers are empty"


# -- what they are worth -------------------------------------------------------------------------------------------------


def reward_hack(rows: Rows) -> str | None:
    """What is not trained on falls while the reward rises.

    Held-out gold is held against the held-out score, or, without gold, the held-out score against that of the roll-outs. Any
    stretch of at least `HACK_POINTS` evaluations up to the last one may show the fall: a line through it, against the noise of
    the series. Proxy and gold part in this way when a reward is optimised too far (Gao et al. 2022, arXiv 2210.10760).
    """
    gold = points(rows, "eval_gold")
    name, proxy_name = ("gold score", "eval_score") if gold else ("held-out score", "score")
    held, proxy = gold or points(rows, "eval_score"), points(rows, proxy_name)
    if len(held) < HACK_POINTS or len(proxy) < HACK_POINTS:
        return None
    scatter, peak = noise([v for _, v in held]), max(v for _, v in held)
    least = HACK_FALL * max(abs(peak), peak - held[0][1])
    for count in range(HACK_POINTS, len(held) + 1):
        part = held[-count:]
        fall, errors = trend(part, scatter)
        if fall > -least or errors > -HACK_ERRORS:
            continue
        beside = [p for p in proxy if p[0] >= part[0][0]]
        if len(beside) < 3 or trend(beside, noise([v for _, v in beside]))[1] < HACK_PROXY:
            continue
        return (
            f"the {name} has fallen by {-fall:.2f} since step {part[0][0]:g} (peak {peak:.2f}, now {held[-1][1]:.2f}; "
            f"{-errors:.1f} standard errors), while the reward went from {beside[0][1]:.2f} to {beside[-1][1]:.2f}"
        )
    return None


def score_falls(rows: Rows) -> str | None:
    """The score of the roll-outs goes down steadily."""
    score = points(rows, "score")
    recent = score[-max(ITERATIONS, len(score) // 2) :]
    if len(recent) < ITERATIONS:
        return None
    fall, errors = trend(recent, noise([v for _, v in recent]))
    if fall > -SCORE_FALL or errors > -SCORE_ERRORS:
        return None
    return f"the score of the roll-outs fell by {-fall:.2f} over the last {len(recent)} iterations ({-errors:.0f} standard errors)"


def equal_groups(rows: Rows) -> str | None:
    """Most groups of answers have one score, so that there is nothing to compare."""
    equal = values(rows, "equal_groups")
    if len(equal) < FEW or _end(equal) < EQUAL_GROUPS:
        return None
    return f"in {_end(equal):.0%} of the groups all answers have the same score"


# -- how it is learnt ---------------------------------------------------------------------------------------------------


def critic_blind(rows: Rows) -> str | None:
    """The critic explains nothing of the returns."""
    explained = values(rows, "explained_variance")
    if len(explained) < PATIENCE or fmean(explained[-ITERATIONS:]) > 0:
        return None
    mean = fmean(explained[-ITERATIONS:])
    return (
        f"after {len(explained)} iterations the critic explains {mean:.2f} of the returns' variance (1: all, 0: none)"
    )


def grad(rows: Rows) -> str | None:
    """Gradients grow, or there are none."""
    for name, label in (("grad_norm", "the policy's"), ("critic_grad_norm", "the critic's")):
        norms = values(rows, name)
        if len(norms) >= FEW and max(norms[-FEW:]) == 0:
            return f"{label} gradient is zero"
        if len(norms) < 2 * ITERATIONS:
            continue
        first, last = median(norms[:FEW]), median(norms[-FEW:])
        if last > GRAD_CLIP and last > GRAD_GROWTH * first:
            return f"{label} gradient norm grew from {first:.2f} to {last:.2f}"
    return None


def ptx_share(rows: Rows) -> str | None:
    """The language-model loss drowns the reward, or does nothing."""
    share = values(rows, "ptx_share")
    if len(share) < FEW or PTX_LOW <= _end(share) <= PTX_HIGH:
        return None
    return f"the language-model loss makes {_end(share):.1%} of the gradient"


def _begin(curve: list[float]) -> float:
    return fmean(curve[:FEW])


def _end(curve: list[float]) -> float:
    return fmean(curve[-FEW:])


RULES: Final[dict[str, Rule]] = {
    "P-KL-HIGH": Rule(
        kl_high,
        "error",
        f"the KL to the reference is above {KL_FAR:g} nats per answer and does not level out",
        "the policy exploits the reward: it can leave the reference cheaply",
        "raise kl_coef, lower learning_rate, or make fewer epochs over each batch",
    ),
    "P-KL-NEGATIVE": Rule(
        kl_negative,
        "error",
        f"the mean KL of {ITERATIONS} iterations is below {KL_NEGATIVE:g} and clearly below 0",
        "the log-probabilities are not those of the distribution that was sampled: another temperature, a cut "
        "distribution (top-p, top-k), or dropout in one of the models",
        "sample with rollout.temperature and nothing else; look at engine_gap and ratio_error_first; this should not happen: "
        "please report it",
    ),
    "P-TIMID": Rule(
        timid,
        "warning",
        f"after {PATIENCE} iterations neither the KL ({KL_NEAR:g}) nor the score ({SCORE_FLAT:g}) has moved",
        "the rate is too low, or all answers are scored alike",
        "raise learning_rate, lower kl_coef, or run more iterations; look whether scores of different answers differ",
    ),
    "P-LEN-GROWTH": Rule(
        length_growth,
        "warning",
        f"answers are {LENGTH_FACTOR:g} times as long as at the start",
        "the reward prefers length",
        "look at the reward model's length correlation (G-RM) and train it on pairs in which the short answer is the better one; "
        "lower rollout.max_new_tokens, raise kl_coef",
    ),
    "P-LEN-COLLAPSE": Rule(
        length_collapse,
        "warning",
        f"answers are 1/{LENGTH_FACTOR:g} as long as at the start",
        "the reward prefers brevity, or a penalty is so high that saying little is safest",
        "look at the samples for answers that say nothing; train the reward model on pairs in which the fuller answer is the "
        "better one, lower missing_stop_penalty, raise kl_coef",
    ),
    "P-STOP-LOST": Rule(
        stop_lost,
        "warning",
        f"the share of answers that end by themselves fell by {STOP_FALL:.0%}",
        "an answer that goes on is scored no worse than one that ends",
        "raise missing_stop_penalty, or rollout.max_new_tokens if good answers are cut off; in PPO let the critic learn first what "
        "a cut answer costs (critic_warmup), since a reward model that becomes it does not know",
    ),
    "P-ENTROPY-LOST": Rule(
        entropy_lost,
        "warning",
        f"the entropy is at {ENTROPY_SHARE:.0%} of its start",
        "the policy is sure of one answer and tries nothing new, so that it can learn nothing more",
        "lower learning_rate, raise kl_coef, or give an entropy bonus",
    ),
    "P-REPEATS": Rule(
        repeats,
        "warning",
        f"{REPEATED:.0%} of the 3-grams of an answer repeat, or a batch has {DISTINCT_SHARE:.0%} of its different 2-grams left",
        "the reward likes a phrase, or does not mind repetition",
        "look at the samples; add a reward against repetition, raise kl_coef, lower learning_rate",
    ),
    "P-EMPTY": Rule(
        empty,
        "error",
        f"{EMPTY:.0%} of the answers have no text",
        "ending at once is scored no worse than answering",
        "look at how empty answers are scored; start from a model that answers (SFT), raise kl_coef",
    ),
    "P-REWARD-HACK": Rule(
        reward_hack,
        "error",
        f"held-out gold (without gold: the held-out score) falls by {HACK_FALL:.0%} of its peak and {HACK_ERRORS:g} standard "
        "errors, while the reward does not",
        "the policy has learnt what the reward gets wrong (Gao et al. 2022)",
        "keep the weights from before the fall; use a larger kl_coef, fewer iterations or more prompts, and train the reward model "
        "again on answers of this policy",
    ),
    "P-CRITIC-BLIND": Rule(
        critic_blind,
        "warning",
        f"after {PATIENCE} iterations the explained variance is still not above 0",
        "the critic has not learnt the returns: advantages are noise",
        "raise or lower ppo.critic_learning_rate, let the critic learn alone at first, or start it from the reward model",
    ),
    "P-RATIO": Rule(
        ratio,
        "error",
        f"the ratio is off by {RATIO_FIRST:g} on the first pass, or one of them is above {RATIO_HUGE:g} again and again",
        "first pass: old log-probabilities of another policy, dropout left on, or a mask that counts other tokens; later: a rate "
        "far too high for the number of updates on each batch",
        "first pass: please report it; later: lower learning_rate, fewer epochs, larger minibatches",
    ),
    "P-ENGINE-GAP": Rule(
        engine_gap,
        "error",
        f"the engine's log-probabilities are off by {GAP_GROWTH:g} times what they were at first, or in the mean by more than "
        f"{ENGINE_GAP['float32']:g} nats (bf16: {ENGINE_GAP['bfloat16']:g}), or one of them by {GAP_FAR:g}",
        "the engine does not have the policy's weights, or samples from another distribution",
        "set dtype: float32, where rounding explains nothing; if it stays, please report it",
    ),
    "P-CLIP-HIGH": Rule(
        clip_high,
        "warning",
        f"more than {CLIP_HIGH:.0%} of the tokens are clipped, over {ITERATIONS} iterations",
        "updates are so large that most of them are thrown away",
        "lower learning_rate, or make fewer epochs and minibatches over each batch",
    ),
    "P-SCORE-FALLS": Rule(
        score_falls,
        "error",
        f"the score of the roll-outs falls by {SCORE_FALL:g} over at least {ITERATIONS} iterations",
        "the sign of the reward or of its weight is the wrong one, the rate is ruinous, or the KL outweighs the score",
        "look at how good and bad answers are scored; lower learning_rate, lower kl_coef",
    ),
    "P-EQUAL-GROUPS": Rule(
        equal_groups,
        "warning",
        f"in {EQUAL_GROUPS:.0%} of the groups all answers have one score",
        "the prompts are too easy or too hard, so that there is nothing to compare",
        "raise grpo.group_size, or use prompts that the policy answers rightly now and then, but not always",
    ),
    "P-GRAD": Rule(
        grad,
        "warning",
        f"a gradient norm grows by a factor of {GRAD_GROWTH:g}, or is zero",
        "growing: the rate is too high; zero: nothing is trained, or all advantages are equal",
        "growing: lower learning_rate or ppo.critic_learning_rate; zero: look at the adapter and at the scores",
    ),
    "P-PTX-SHARE": Rule(
        ptx_share,
        "warning",
        f"the language-model loss makes more than {PTX_HIGH:.0%} or less than {PTX_LOW:.0%} of the gradient",
        "its coefficient does not fit the size of the policy's gradient",
        "lower or raise ptx.coef",
    ),
}
