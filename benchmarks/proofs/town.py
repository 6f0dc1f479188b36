"""Proof 2: what the same labels are worth to PPO, DPO, best-of-4 and RAFT, on the quickstart's town; and what PTX keeps.

All start from the SFT model of recipes/quickstart.yaml, and all learn from the comparisons of its reward stage (the town's,
and those of the policy's own answers): PPO and RAFT through the reward model, with as many episodes as each other; best-of-4
asks the reward model at inference, which costs four answers each time; DPO trains on the comparisons themselves. Each answers
the questions of town:eval once, at temperature 1, with the same draws, and the rubric scores it. Goal: PPO beats SFT (the
paired 95% interval of the difference is above 0). Who wins is said, whoever it is.

PTX (Ouyang et al. 2022, section 3.5): PPO with the language-model loss on the pre-training text, with so low a kl_coef that
it would forget it otherwise. Goal: the perplexity on held-out text stays within 3% of SFT's, where plain PPO of the same
settings loses more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.proofs.bench import Bench, Job, Town, Verdict, town_of
from benchmarks.proofs.figures import paired

NAME = "2 town"
PTX_GOAL = 0.03
FORGETS = {"kl_coef": 0.0}  # of both sides of the PTX proof
PTX = {"form": "additive", "coef": 0.5, "tokens": 1024}
BEST_OF = 4
QUESTIONS, QUICK_QUESTIONS = 1000, 300
QUICK_PPO: dict[str, Any] = {"max_steps": 15, "rollout": {"batch": 96, "max_new_tokens": 48}}
DPO: dict[str, Any] = {
    "max_length": 256,
    "beta": 0.1,
    "tokens_per_step": 4096,
    "micro_tokens": 8192,
    "learning_rate": 5e-5,
    "warmup": 0.1,
    "eval_every": 10**6,
}
RAFT: dict[str, Any] = {"method": "raft", "grpo": {"group_size": BEST_OF}}

Rows = list[dict[str, Any]]


def prove(bench: Bench) -> list[Verdict]:
    """Two verdicts: equal labels, and PTX."""
    town = town_of(bench)
    folder = bench.place("town")
    seed = 0
    found = bench.train(jobs(town, folder, seed, bench.quick))
    count = QUICK_QUESTIONS if bench.quick else QUESTIONS
    models = {"sft": Path(town.model("sft")), **{n: t.model for n, t in found.items()}}
    answers = {name: answered(model, town, count) for name, model in models.items() if name not in ("forgets", "ptx")}
    answers[f"best of {BEST_OF}"] = best_of(town, count)
    for name, rows in answers.items():
        bench.say(f"  {name}: rubric {fmean(r['rubric'] for r in rows):.3f}")
    seconds = {name: t.seconds for name, t in found.items()}
    texts = {name: perplexity(models[name], town) for name in ("sft", "ppo", "forgets", "ptx")}
    return [equal_labels(answers, seconds, seed, quick=bench.quick), ptx(texts, seed)]


def jobs(town: Town, folder: Path, seed: int, quick: bool) -> dict[str, Job]:
    """PPO, RAFT, DPO; and PPO of a low kl_coef without and with PTX."""
    ppo = (
        town.settings("ppo") | (QUICK_PPO if quick else {}) | {"seed": seed, "eval_fraction": 0.0, "save_every": 10**6}
    )
    ppo |= {"model": town.model("sft"), "data": town.file("prompts"), "reward_model": town.model("reward")}
    dear = ppo["ppo"]
    comparisons = [town.file("comparisons"), town.file("collected")]
    dpo = DPO | {
        "model": town.model("sft"),
        "data": comparisons,
        "eval_fraction": 0.0,
        "save_every": 10**6,
        "seed": seed,
    }
    raft = {k: v for k, v in ppo.items() if k != "ppo"} | RAFT
    forgets = ppo | {"ppo": dear | FORGETS}
    given = {
        "ppo": Job("ppo", ppo),
        "raft": Job("grpo", raft),
        "dpo": Job("dpo", dpo | ({"max_steps": 60} if quick else {})),
        "forgets": Job("ppo", forgets),
        "ptx": Job("ppo", forgets | {"ptx": PTX | {"data": town.file("pretrain")}}),
    }
    return {name: Job(job.kind, job.settings | {"out": str(folder / name)}) for name, job in given.items()}


def answered(model: Path, town: Town, count: int) -> Rows:
    """One answer to each question, with its rubric; the draws are the same for every model."""
    import danlu
    from danlu.evals.generation import evaluate

    options = {"task": "rubric", "temperature": 1.0, "max_new_tokens": 48, "seed": 0}
    return evaluate(danlu.load(model, dtype="float32", device="cpu"), _questions(town, count), **options).rows  # type: ignore[arg-type]


def best_of(town: Town, count: int) -> Rows:
    """SFT's answer that the reward model likes best, of BEST_OF to each question; the first is the one that `answered` has."""
    import danlu
    from danlu.evals.generation import answer
    from danlu.evals.rubric import is_correct, score

    questions = _questions(town, count)
    assistant = danlu.load(town.model("sft"), dtype="float32", device="cpu")
    numbers = [k * len(questions) + i for k in range(BEST_OF) for i in range(len(questions))]
    options = {"temperature": 1.0, "max_new_tokens": 48, "seed": 0, "numbers": numbers}
    replies = answer(assistant, questions * BEST_OF, **options)  # type: ignore[arg-type]
    values = judged(town.model("reward"), assistant, questions * BEST_OF, replies)
    rows: Rows = []
    for i, question in enumerate(questions):
        best = max(range(i, len(replies), len(questions)), key=lambda k: values[k])
        finished = replies[best].finish_reason == "stop"
        rows.append(
            {
                "rubric": score(replies[best].text, question.reference, finished).total,
                "correct": float(is_correct(replies[best].text, question.reference)),
                "finished": finished,
                "tokens": sum(len(replies[k].ids) for k in range(i, len(replies), len(questions))),
            }
        )
    return rows


def judged(reward_model: str, assistant: Any, questions: Sequence[Any], replies: Sequence[Any]) -> list[float]:
    """A reward model's scores of replies; an empty one has the lowest."""
    from danlu.models.load import load_model
    from danlu.rewards.model import judge_of
    from danlu.rewards.protocol import Episode
    from danlu.text.chat_template import ChatTemplate
    from danlu.text.tokenizer import load_tokenizer

    own = ChatTemplate(load_tokenizer(reward_model))
    judge = judge_of(load_model(reward_model, scalar=True), own, assistant.template, micro_tokens=8192, device="cpu")
    episodes = [
        Episode(r.prompt_ids, r.ids, r.finish_reason == "stop", tuple(q.prompt), r.text)
        for q, r in zip(questions, replies, strict=True)
    ]
    return [s.value if s.value is not None else float("-inf") for s in judge.score(episodes)]


def perplexity(model: Path, town: Town) -> float:
    """On the town's held-out text."""
    from danlu.evals.perplexity import encode
    from danlu.evals.perplexity import perplexity as of
    from danlu.models.load import load_model
    from danlu.text.tokenizer import load_tokenizer

    return of(load_model(model), encode(town.file("pretrain_heldout"), load_tokenizer(model), 256))


def _questions(town: Town, count: int) -> list[Any]:
    from danlu.data.read import read

    return list(read(town.file("eval"), "prompt").records)[:count]


# -- verdicts ------------------------------------------------------------------------------------------------------------


def equal_labels(answers: dict[str, Rows], seconds: dict[str, float], seed: int, *, quick: bool = False) -> Verdict:
    """PPO against SFT, and everybody's row of the table, best first."""
    from danlu.evals.generation import interval

    table = []
    for name, rows in answers.items():
        scores = interval([r["rubric"] for r in rows], 0)
        line = {"model": name, "rubric": [scores["mean"], scores["low"], scores["high"]]}
        line |= {key: fmean(float(r[key]) for r in rows) for key in ("correct", "finished", "tokens")}
        table.append(line | {"seconds": seconds.get(name)})
    table.sort(key=lambda line: -line["rubric"][0])
    ours = [r["rubric"] for r in answers["ppo"]]
    against = {name: paired(ours, [r["rubric"] for r in rows])[:3] for name, rows in answers.items() if name != "ppo"}
    value, low, high = against["sft"]
    details = {"winner": table[0]["model"], "table": table, "ppo_minus": against, "questions": len(ours)}
    # The quick form's fifteen updates cannot do more than leave it as good.
    said = f"rubric of PPO minus SFT's {'not below' if quick else '>'} 0 (paired 95%)"
    return Verdict(f"{NAME}: equal labels", value, said, high >= 0 if quick else low > 0, [seed], details)


def ptx(texts: dict[str, float], seed: int) -> Verdict:
    """The perplexity on held-out text that PPO with PTX has lost against SFT, and what it loses without."""
    lost = {name: value / texts["sft"] - 1 for name, value in texts.items()}
    holds = lost["ptx"] <= PTX_GOAL < lost["forgets"]
    said = f"perplexity with PTX at most {PTX_GOAL:.0%} above SFT's, where PPO without loses more"
    details = {"perplexity": texts, "lost": lost, **PTX, **FORGETS}
    return Verdict(f"{NAME}: ptx", lost["ptx"], said, holds, [seed], details)
