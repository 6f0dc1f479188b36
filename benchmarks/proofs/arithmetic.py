"""Proof 5: problems with a verifier, made here in GSM8K's file shape, in English and Chinese.

recipes/gsm8k-grpo.yaml runs on them as it runs on GSM8K, up to its SFT stage (`problems=FILE`, a smaller starter and fewer
steps); then GRPO and PPO go on from there with the verifier `number` alone. A problem has two steps on numbers from 1 to 9,
and its solution writes both out. Problems are held out by their numbers: no triple of a held-out problem occurs in training,
in either language or wording.

pass@1 is the share of held-out problems whose one answer, sampled at temperature 1, ends with the right number; the greedy
share is told beside it, for sampling alone gets better when a policy only becomes surer. Goals: SFT leaves 20% to 50%, and
each method raises it by at least 20 points (quick: 3) within 15 minutes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.proofs import plots
from benchmarks.proofs.bench import Bench, Job, Trained, Verdict, recipe_run
from benchmarks.proofs.figures import paired

NAME = "5 arithmetic"
GOAL, QUICK_GOAL = 20.0, 3.0
START = (0.20, 0.50)
MINUTES = 15
HELDOUT = 0.2  # of the triples of numbers

NAMES = {"en": ("Tom", "Mia", "Ben", "Eva"), "zh": ("小明", "小红", "小华", "小丽")}
THINGS = {"en": ("apples", "books", "stones", "cards"), "zh": ("个苹果", "本书", "块石头", "张卡片")}
# Plus then minus, minus then plus, plus then plus; the two steps of a solution.
WORDINGS = {
    "en": {
        "+-": "{n} has {a} {t}, gets {b} more and gives {c} away. How many {t} does {n} have?",
        "-+": "{n} has {a} {t}, loses {b} and then finds {c}. How many {t} does {n} have?",
        "++": "{n} has {a} {t} and buys {b}, then {c} more. How many {t} does {n} have?",
    },
    "zh": {
        "+-": "{n}有{a}{t}，又得到{b}，送出{c}。{n}现在有多少？",
        "-+": "{n}有{a}{t}，丢了{b}，又找到{c}。{n}现在有多少？",
        "++": "{n}有{a}{t}，买了{b}，又买了{c}。{n}现在有多少？",
    },
}


@dataclass(frozen=True)
class Problem:
    """A problem: numbers, signs of its two steps, and its row of the file."""

    numbers: tuple[int, int, int]
    signs: str
    row: dict[str, str]


def problem(numbers: tuple[int, int, int], signs: str, language: str, rng: Random) -> Problem:
    """One wording of a problem, as GSM8K writes its rows: steps with `<<a+b=c>>`, then `#### number`."""
    a, b, c = numbers
    middle = a + b if signs[0] == "+" else a - b
    end = middle + c if signs[1] == "+" else middle - c
    person, thing = rng.choice(NAMES[language]), rng.choice(THINGS[language])
    question = WORDINGS[language][signs].format(n=person, t=thing, a=a, b=b, c=c)
    first, second = f"{a}{signs[0]}{b}={middle}", f"{middle}{signs[1]}{c}={end}"
    answer = f"{a}{signs[0]}{b}=<<{first}>>{middle}\n{middle}{signs[1]}{c}=<<{second}>>{end}\n#### {end}"
    return Problem(numbers, signs, {"question": question, "answer": answer})


def possible(numbers: tuple[int, int, int], signs: str) -> bool:
    """Whether nobody gives away more than there is."""
    a, b, c = numbers
    return not (signs == "+-" and a + b < c) and not (signs == "-+" and a < b)


def problems(seed: int, *, copies: int, heldout: int) -> tuple[list[Problem], list[Problem]]:
    """Training problems (`copies` wordings of every problem and language) and `heldout` held-out ones, of other triples."""
    rng = Random(f"arithmetic/{seed}")
    triples = [(a, b, c) for a in range(1, 10) for b in range(1, 10) for c in range(1, 10)]
    rng.shuffle(triples)
    cut = round(HELDOUT * len(triples))

    def worded(chosen: Iterable[tuple[int, int, int]], times: int) -> list[Problem]:
        found = [
            problem(numbers, signs, language, rng)
            for numbers in chosen
            for signs in ("+-", "-+", "++")
            if possible(numbers, signs)
            for language in ("en", "zh")
            for _ in range(times)
        ]
        rng.shuffle(found)
        return found

    return worded(triples[cut:], copies), worded(triples[:cut], 1)[:heldout]


def write(path: Path, found: Sequence[Problem]) -> Path:
    """JSON Lines with GSM8K's two keys."""
    path.write_text("".join(json.dumps(p.row, ensure_ascii=False) + "\n" for p in found), "utf-8")
    return path


# -- the run -------------------------------------------------------------------------------------------------------------

# In place of the recipe's: a starter and lengths for small problems; text of the questions to begin from.
RECIPE = {
    "processes": 1,
    "tokenizer.vocab_size": 400,
    "pretrain.starter": "{hidden_size: 128, layers: 3, heads: 4, kv_heads: 2, context: 192}",
    "pretrain.max_steps": 40,
    "pretrain.max_length": 192,
    "pretrain.micro_tokens": 4096,
    "sft.max_length": 192,
    "sft.micro_tokens": 4096,
    "sft.max_steps": 250,
    "sft.learning_rate": 3e-3,
    "sft.tokens_per_step": 4096,
}
COMMON = {
    "dtype": "float32",
    "processes": 2,  # a run has the whole machine that its quarter of an hour is counted on
    "verifier": "number",
    "max_length": 160,
    "micro_tokens": 8192,
    "eval_fraction": 0.0,
    "optimizer": "natural",  # no rate of AdamW raised pass@1 by more than 12 points (docs/log.md)
    "learning_rate": 1e-4,  # of the natural steps only its schedule counts
    "warmup": 10,
    "schedule": "linear",
    "save_every": 10**6,
    "log_every": 5,
    "rollout": {"batch": 256, "max_new_tokens": 64},
}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("grpo", {"grpo": {"group_size": 8, "kl_coef": 0.01, "epochs": 1, "minibatches": 1}}),
    "ppo": (
        "ppo",
        {"ppo": {"kl_coef": 0.01, "epochs": 1, "minibatches": 1, "gae_lambda": 1.0, "critic_learning_rate": 1e-3}},
    ),
}
STEPS = {"grpo": 560, "ppo": 270}  # 11 to 13 minutes of two cores
QUICK_STEPS = {"grpo": 90, "ppo": 45}  # about two minutes each
QUICK_NATURAL = {"trust": 6e-7, "momentum": 0.9}  # fewer steps, so longer ones
EVALUATED, QUICK_EVALUATED = 600, 300


def prove(bench: Bench) -> list[Verdict]:
    """SFT's pass@1, then a verdict for each method and seed together."""
    folder = bench.place("arithmetic")
    train, heldout = problems(0, copies=2, heldout=QUICK_EVALUATED if bench.quick else EVALUATED)
    file, held = write(folder / "train.jsonl", train), write(folder / "heldout.jsonl", heldout)
    texts = folder / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": p.row["question"]}, ensure_ascii=False) + "\n" for p in train), "utf-8"
    )
    changes = {
        **RECIPE,
        "problems": file,
        "data_root": folder,
        "tokenizer.data": f"[{file}]",
        "pretrain.data": f"[{texts}]",
    }
    given = [f"{key}={value}" for key, value in changes.items()]
    start = recipe_run(bench, "gsm8k-grpo.yaml", "arithmetic", "sft", given, root=folder / "runs")
    sft = next(start.glob("[0-9][0-9]-sft")) / "model"

    seeds = bench.seeds(2, 1)
    common = COMMON | {"model": str(sft), "data": str(file)} | ({"natural": QUICK_NATURAL} if bench.quick else {})
    steps = QUICK_STEPS if bench.quick else STEPS
    found = bench.train(
        {
            f"{name}, seed {seed}": Job(
                kind,
                common | settings | {"seed": seed, "max_steps": steps[name], "out": str(folder / f"{name}-{seed}")},
            )
            for name, (kind, settings) in METHODS.items()
            for seed in seeds
        }
    )
    begun = {heat: right(sft, held, heat) for heat in (1.0, 0.0)}
    share = sum(begun[1.0]) / len(heldout)
    bench.say(f"  after SFT: pass@1 {share:.3f}, greedy {sum(begun[0.0]) / len(heldout):.3f}")
    low, high = START
    verdicts = [
        Verdict(
            f"{NAME}: sft",
            100 * share,
            f"pass@1 on held-out problems of {100 * low:.0f}% to {100 * high:.0f}%",
            low <= share <= high,
            [0],
            {"greedy": 100 * sum(begun[0.0]) / len(heldout), "problems": len(train), "heldout": len(heldout)},
        )
    ]
    if bench.images is not None:
        curves = {n: [[r["step"], r["score"]] for r in found[f"{n}, seed 0"].rows if "score" in r] for n in METHODS}
        plots.scores(bench.images / "learning-arithmetic.svg", curves)
    goal = QUICK_GOAL if bench.quick else GOAL
    for name in METHODS:
        runs = [found[f"{name}, seed {seed}"] for seed in seeds]
        verdicts.append(raised(name, runs, held, begun, seeds, goal))
    return verdicts


def raised(
    name: str, runs: Sequence[Trained], held: Path, begun: dict[float, list[float]], seeds: list[int], goal: float
) -> Verdict:
    """By how many points a method raised pass@1, as the mean over its seeds; the slowest run counts for the time."""
    after = {heat: [right(run.model, held, heat) for run in runs] for heat in begun}
    gains = [paired(one, begun[1.0]) for one in after[1.0]]
    value = 100 * sum(g.difference for g in gains) / len(gains)
    seconds = max(run.seconds for run in runs)
    details = {
        "pass@1": [100 * sum(one) / len(one) for one in after[1.0]],
        "greedy": [100 * sum(one) / len(one) for one in after[0.0]],
        "gains": [[100 * g.difference, 100 * g.low, 100 * g.high] for g in gains],
        "seconds": seconds,
    }
    said = f"pass@1 rises by >= {goal:.0f} points within {MINUTES} minutes"
    return Verdict(f"{NAME}: {name}", value, said, value >= goal and seconds <= 60 * MINUTES, seeds, details)


def right(model: Path, heldout: Path, temperature: float) -> list[float]:
    """1 for each held-out problem whose answer ends with the right number, else 0; draws are the same for every model."""
    import danlu
    from danlu.data.read import read
    from danlu.evals.generation import answer
    from danlu.rewards.verifiers import number

    prompts: list[Any] = list(read(heldout, "prompt").records)
    options = {"temperature": temperature, "max_new_tokens": COMMON["rollout"]["max_new_tokens"], "seed": 0}  # type: ignore[index]
    replies = answer(danlu.load(model, dtype="float32", device="cpu"), prompts, **options)
    return [float(number(reply.text, p.reference)) for p, reply in zip(prompts, replies, strict=True)]
