"""Proof 1: PPO, GRPO and RLOO reach an optimum that is known exactly.

One prompt, answers of at most two tokens of a small starter over bytes, so that all answers can be counted out. Then

    J(pi) = E_pi[r] - beta KL(pi || ref)

is exact, and its greatest value over all policies is J* = beta log E_ref[exp(r / beta)], reached by pi* = ref exp(r / beta) /
Z (Korbak et al. 2022, section 3; Rafailov et al. 2023, eq. 4). Goal: every mean over the seeds is at least 95% of J*. The
score has mean 0 in the language that the reference has learnt, so the reference itself has J of about 0; the share of the
gain, (J - J_ref) / (J* - J_ref), is told beside it.

Not every method has J as its objective. With the probability ratio at 1:

- PPO here (k1 in the reward, kl_coef = beta) and RLOO (the same, as one number an answer) have.
- GRPO divides a group's advantages by their deviation, and not the KL: for one prompt it climbs E[r] - beta std(r) KL, and
  over several, a prompt whose scores hardly differ counts as much as one whose scores do.
- A KL term in the loss is taken token by token at the tokens that were sampled. The gradient of k2 = (log pi / ref)^2 / 2 is
  that of KL(pi || ref) of each token's own choice; what the choice does to the KL of later tokens is left out. The gradient
  of k3 = ref / pi - log(ref / pi) - 1 is (1 - ref / pi) d log pi: its first part has mean 0, its second is -sum_a ref_a d log
  pi_a, so it is that of KL(ref || pi), again of each token's own choice. Where these lead is worked out exactly here, too
  (`own_optimum`), and told beside what the trainer reaches.
- So the claim is made for GRPO with the switches that leave all this out: the group's mean without its deviation, one
  normaliser for all answers (dr_grpo), and the KL taken from the score. Plain grpo and dr_grpo with k2 and k3 in the loss
  stand beside it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.proofs.bench import Bench, Job, Trained, Verdict
from benchmarks.proofs.figures import over_seeds

GOAL, QUICK_GOAL = 0.95, 0.90
BETA = 1.0
LETTERS = "abcdefgh"
ASIDE = -1.0  # the score of what is no word
SHAPE = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 1, "context": 64}
ROWS = 2000  # of the reference's SFT
PROMPT = [{"role": "user", "content": "?"}]
NAME = "1 optimum"


@dataclass(frozen=True)
class Language:
    """All words of one or two letters: how often the reference says each, and what each is worth."""

    shares: dict[str, float]
    scores: dict[str, float]

    @classmethod
    def of(cls, seed: int) -> Language:
        """Zipf-like shares 1 / (rank + 3), and normal scores of mean 0 under them."""
        rng = Random(f"optimum/{seed}")
        words = [*LETTERS, *map("".join, product(LETTERS, repeat=2))]
        rng.shuffle(words)
        weights = [1 / (rank + 3) for rank in range(len(words))]
        shares = {word: weight / sum(weights) for word, weight in zip(words, weights, strict=True)}
        drawn = {word: rng.gauss(0, 1) for word in words}
        mean = sum(shares[word] * drawn[word] for word in words)
        return cls(shares, {word: score - mean for word, score in drawn.items()})

    def rows(self, count: int) -> list[dict[str, Any]]:
        """Conversations with every word as often as its share says."""
        said = [word for word, share in self.shares.items() for _ in range(round(share * count))]
        return [{"messages": [*PROMPT, {"role": "assistant", "content": word}]} for word in said]

    def write_reward(self, path: Path) -> str:
        """A reward of kind `python`, as users write one; returns how settings name it."""
        path.write_text(
            f"SCORES = {self.scores!r}\n\n\n"
            "def reward(responses, prompts, references):\n"
            f"    return [SCORES.get(text, {ASIDE}) for text in responses]\n",
            "utf-8",
        )
        return f"{path}:reward"


@dataclass(frozen=True)
class Answers:
    """Every answer that can be sampled, as the two tables of `logprobs_of` laid end to end: what each is worth."""

    stop_ids: list[int]
    scores_Y: Tensor


def answers_of(template: Any, language: Language, vocabulary: int) -> Answers:
    """All answers of at most two tokens: a stop token alone, or another token and then any token."""
    stops = sorted(template.stop_ids)
    others = [i for i in range(vocabulary) if i not in template.stop_ids]
    every = [[s] for s in stops] + [[a, b] for a in others for b in range(vocabulary)]
    scores = [language.scores.get(template.decode(ids), ASIDE) for ids in every]
    return Answers(stops, torch.tensor(scores, dtype=torch.float64))


@torch.no_grad()
def logprobs_of(model: Any, prompt: list[int], stop_ids: list[int]) -> Tensor:
    """Log-probabilities of all answers, in the order of `answers_of`, in float64; their exponentials add up to 1."""
    vocabulary = model.config.vocab_size
    first = model(input_ids=torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)
    others = [i for i in range(vocabulary) if i not in stop_ids]
    rows = torch.tensor([[*prompt, i] for i in others])
    second = model(input_ids=rows).logits[:, -1].double().log_softmax(-1)
    return torch.cat([first[stop_ids], (first[others, None] + second).flatten()])


def objective(logp_Y: Tensor, ref_Y: Tensor, scores_Y: Tensor, beta: float) -> float:
    """J(pi) = sum_y pi(y) [r(y) - beta (log pi(y) - log ref(y))]."""
    return float((logp_Y.exp() * (scores_Y - beta * (logp_Y - ref_Y))).sum())


def optimum(ref_Y: Tensor, scores_Y: Tensor, beta: float) -> float:
    """J* = beta log sum_y ref(y) exp(r(y) / beta)."""
    return beta * float(torch.logsumexp(ref_Y + scores_Y / beta, 0))


def own_optimum(ref_Y: Tensor, scores_Y: Tensor, stops: int, beta: float, estimator: str) -> float:
    """J of the policy at which a method with the KL term in the loss comes to rest.

    Token by token from the last: with Q the expected score of each choice under what follows, k2 rests at ref exp(Q / beta) / Z,
    and k3 at beta ref / (c - Q) with c > max Q such that it adds up to 1: there the derivative of E[Q] - beta KL(ref || pi) is 0.

    Args:
        ref_Y, scores_Y: in the order of `answers_of`; stops: how many answers are a stop token alone.
        estimator: k2 or k3.
    """
    rest = {"k2": lambda q, r: (q + r / beta).log_softmax(-1), "k3": lambda q, r: _forward_rest(q, r, beta)}[estimator]
    width = (
        int((4 * (len(ref_Y) - stops) + stops**2) ** 0.5 - stops) // 2 + stops
    )  # n (n + stops) answers of two tokens
    joint, scores = ref_Y[stops:].view(-1, width), scores_Y[stops:].view(-1, width)
    first = joint.logsumexp(-1)
    second = rest(joint - first[:, None], scores)
    values = torch.cat([scores_Y[:stops], (second.exp() * scores).sum(-1)])
    begun = rest(torch.cat([ref_Y[:stops], first]), values)
    return objective(torch.cat([begun[:stops], (begun[stops:, None] + second).flatten()]), ref_Y, scores_Y, beta)


def _forward_rest(ref: Tensor, values: Tensor, beta: float) -> Tensor:
    """log of beta ref / (c - Q) along the last axis; c is found by halving."""
    top = values.amax(-1, keepdim=True)
    low, high = top, top + beta  # at c = max Q + beta the sum is at most 1
    for _ in range(100):
        middle = (low + high) / 2
        more = (beta * ref.exp() / (middle - values)).sum(-1, keepdim=True) > 1
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return (beta * ref.exp() / (high - values)).log().log_softmax(-1)


# -- settings ------------------------------------------------------------------------------------------------------------

COMMON = {
    "dtype": "float32",
    "max_length": 48,
    "eval_fraction": 0.0,
    "warmup": 0.0,
    "schedule": "linear",
    "learning_rate": 4e-3,
    "save_every": 10**6,
    "log_every": 10,
    "health": {"on": False},  # corrections would change what is compared
    "rollout": {"batch": 256, "max_new_tokens": 2},
}
STEPS, QUICK_STEPS = 200, 120
GROUP = {"group_size": 16, "missing_stop_penalty": 0.0, "max_kl": 1e3, "kl_coef": BETA, "epochs": 2, "minibatches": 2}
# What is to be proven, and what stands beside it.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "ppo": (
        "ppo",
        {
            "ppo": {
                "kl_coef": BETA,
                "missing_stop_penalty": 0.0,
                "score_clip": 100.0,
                "max_kl": 1e3,
                "gae_lambda": 1.0,
                "epochs": 2,
                "minibatches": 2,
                "critic_learning_rate": 3e-3,
            }
        },
    ),
    "grpo, mean, KL in the score": ("grpo", {"method": "dr_grpo", "grpo": {**GROUP, "kl_in": "reward"}}),
    "rloo": ("grpo", {"method": "rloo", "grpo": GROUP}),
}
BESIDE: dict[str, tuple[str, dict[str, Any]]] = {
    "dr_grpo, k2": ("grpo", {"method": "dr_grpo", "grpo": {**GROUP, "kl_estimator": "k2"}}),
    "dr_grpo, k3": ("grpo", {"method": "dr_grpo", "grpo": {**GROUP, "kl_estimator": "k3"}}),
    "grpo": ("grpo", {"method": "grpo", "grpo": GROUP}),
}


def prove(bench: Bench) -> list[Verdict]:
    """One verdict for each method."""
    from danlu.models.load import load_model
    from danlu.text.chat_template import ChatTemplate
    from danlu.text.tokenizer import load_tokenizer

    folder = bench.place("optimum")
    language = Language.of(0)
    reference = _reference(bench, folder, language)
    function = language.write_reward(folder / "reward.py")
    (folder / "prompt.jsonl").write_text(json.dumps({"prompt": PROMPT}) + "\n", "utf-8")

    seeds = bench.seeds(5, 2)
    methods = METHODS if bench.quick else METHODS | BESIDE
    common = COMMON | {"model": str(reference), "data": str(folder / "prompt.jsonl")}
    common |= {
        "max_steps": QUICK_STEPS if bench.quick else STEPS,
        "rewards": [{"kind": "python", "function": function}],
    }
    jobs = {
        f"{name}, seed {seed}": Job(kind, common | settings | {"seed": seed, "out": str(folder / f"{name}-{seed}")})
        for name, (kind, settings) in methods.items()
        for seed in seeds
    }
    found = bench.train(jobs)

    template = ChatTemplate(load_tokenizer(reference))
    model = load_model(reference)
    answers = answers_of(template, language, model.config.vocab_size)
    prompt = template.encode_prompt(PROMPT)
    ref = logprobs_of(model, prompt, answers.stop_ids)
    best, start = optimum(ref, answers.scores_Y, BETA), objective(ref, ref, answers.scores_Y, BETA)

    def reached(trained: Trained) -> float:
        return objective(logprobs_of(load_model(trained.model), prompt, answers.stop_ids), ref, answers.scores_Y, BETA)

    own = {
        name: own_optimum(ref, answers.scores_Y, len(answers.stop_ids), BETA, name[-2:]) / best
        for name in methods
        if name.startswith("dr_grpo")
    }
    return [
        verdict(
            name,
            [reached(found[f"{name}, seed {seed}"]) for seed in seeds],
            seeds,
            best=best,
            start=start,
            goal=(QUICK_GOAL if bench.quick else GOAL) if name in METHODS else None,
            seconds=fmean(found[f"{name}, seed {seed}"].seconds for seed in seeds),
            own=own.get(name),
        )
        for name in methods
    ]


def verdict(
    name: str,
    reached: list[float],
    seeds: list[int],
    *,
    best: float,
    start: float,
    goal: float | None,
    seconds: float,
    own: float | None = None,
) -> Verdict:
    """The mean of J over the seeds as a share of J*.

    Args:
        reached: J of each seed; best: J*; start: J of the reference.
        goal: the share that is to be reached; None: the method stands beside, and nothing is claimed for it.
        own: the share at which the method's own objective is greatest, where that is another one.
    """
    shares = [value / best for value in reached]
    mean, low, high = over_seeds(shares)
    gain = fmean((value - start) / (best - start) for value in reached)
    details = {
        "shares": shares,
        "low": low if math.isfinite(low) else None,
        "high": high if math.isfinite(high) else None,
        "share_of_gain": gain,
        "J_best": best,
        "J_reference": start,
        "beta": BETA,
        "own_optimum": own,
        "seconds_a_run": seconds,
    }
    said = f"mean J / J* >= {goal:.2f}" if goal is not None else "none: another objective, for comparison"
    return Verdict(f"{NAME}: {name}", mean, said, goal is None or mean >= goal, seeds, details)


def _reference(bench: Bench, folder: Path, language: Language) -> Path:
    """A starter that has learnt the language by SFT."""
    from danlu.models.load import save_model
    from danlu.models.starters import starter
    from danlu.text.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["?"], 260, context=SHAPE["context"])
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    save_model(starter(len(tokenizer), **SHAPE, seed=0, ids=ids), tokenizer, folder / "fresh")
    data = folder / "language.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in language.rows(ROWS)), "utf-8")
    settings = reference_settings(folder / "fresh", data, folder / "sft")
    return bench.train({"reference": Job("sft", settings)})["reference"].model


def reference_settings(fresh: Path, data: Path, out: Path) -> dict[str, Any]:
    """Of the SFT that makes the reference."""
    kept = {k: v for k, v in COMMON.items() if k not in ("rollout", "health")}
    sizes = {"max_steps": 120, "tokens_per_step": 8192, "micro_tokens": 8192}
    names = {"model": str(fresh), "data": str(data), "out": str(out)}
    return kept | names | sizes | {"learning_rate": 1e-2, "schedule": "cosine"}
