"""The proofs' own arithmetic: what they count, compare and call held; and each proof's parts on tiny things."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pytest
import tiny
import torch

from benchmarks import learning
from benchmarks.proofs import arithmetic, beside_trl, figures, optimum, overoptimisation, pairs, plots, town
from benchmarks.proofs.bench import Bench, Job, Town, Trained, Verdict
from benchmarks.proofs.optimum import Language
from danlu.config import KINDS
from danlu.data.read import read
from danlu.models.load import load_model
from danlu.models.starters import starter
from danlu.parsing import parse
from danlu.pipeline.recipe import load_recipe
from danlu.rewards.verifiers import number
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import train_tokenizer

BETA = 0.5


# -- figures -------------------------------------------------------------------------------------------------------------


def test_interval_over_seeds() -> None:
    # Mean 3, deviation sqrt((4 + 0 + 4) / 2) = 2, t of 2 degrees 4.303: half is 4.303 * 2 / sqrt(3) = 4.969.
    assert figures.over_seeds([1.0, 3.0, 5.0]) == pytest.approx((3.0, -1.969, 7.969), abs=1e-3)
    assert figures.over_seeds([0.5]) == (0.5, -math.inf, math.inf)


def test_paired_difference() -> None:
    # Differences 1, 0, 1, -1: mean 0.25, mean square 0.75, so the half is 1.96 sqrt((0.75 - 0.0625) / 4) = 0.8126.
    found = figures.paired([1, 1, 1, 0], [0, 1, 0, 1])
    assert found[:3] == pytest.approx((0.25, 0.25 - 0.8126, 0.25 + 0.8126), abs=1e-4)
    # Two won, one lost: p = 2 (C(3, 0) + C(3, 1)) / 2^3 = 1.
    assert found.p == 1.0
    # Five won, none lost: p = 2 / 2^5. A tie against a loss counts half in the mean and nothing in the test.
    five = figures.paired([1] * 5 + [0.5], [0] * 6)
    assert five.p == pytest.approx(1 / 16)
    assert five.difference == pytest.approx(5.5 / 6)


def test_smooth_takes_neighbours_that_are_there() -> None:
    assert figures.smooth([1, 2, 6, 3], 3) == [1.5, 3.0, 11 / 3, 4.5]
    assert figures.smooth([1, 2], 1) == [1, 2]


def test_value_where_a_curve_first_reaches_a_place() -> None:
    # From (1, 10) to (3, 30): at 2 it is 20. The step back to 0.5 is not taken for an earlier arrival.
    assert figures.value_at([0, 1, 0.5, 3], [0, 8, 10, 30], 2) == pytest.approx(20)
    assert figures.value_at([0.2, 1], [5, 7], 0.1) == 5
    assert figures.value_at([0, 1], [5, 7], 1) == 7
    with pytest.raises(ValueError, match="ends at 1"):
        figures.value_at([0, 1], [5, 7], 2)


def test_scores_at_equal_kl() -> None:
    # Both reach 2: ours there is half-way from 1 to 5, theirs its last point.
    found = figures.at_equal_kl([(0, 0), (1, 1), (3, 5)], [(0, 0), (2, 2)], 1)
    assert found == pytest.approx((2, 3, 2))


def test_turn() -> None:
    # From 0 to 10 and down: 9.5 has lost 5%, 8.9 has lost 11%.
    assert figures.turn([0, 4, 10, 9.5, 8.9, 9.9], 0.1) == (2, 4)
    assert figures.turn([0, 1, 2], 0.1) == (2, None)
    assert figures.turn([3, 2, 1], 0.1) == (0, None)  # nothing was gained, so nothing of it can be lost


# -- 1: the optimum --------------------------------------------------------------------------------------------------------


def toy() -> tuple[torch.Tensor, torch.Tensor]:
    """One stop token and two others: answers stop; a stop, aa, ab; b stop, ba, bb."""
    generator = torch.Generator().manual_seed(3)
    ref = torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0)
    return ref, torch.randn(7, generator=generator, dtype=torch.float64)


def test_no_policy_is_better_than_the_optimum() -> None:
    ref, scores = toy()
    best = optimum.optimum(ref, scores, BETA)
    tilted = (ref + scores / BETA).log_softmax(0)
    assert optimum.objective(tilted, ref, scores, BETA) == pytest.approx(best, abs=1e-12)
    assert optimum.objective(ref, ref, scores, BETA) == pytest.approx(float((ref.exp() * scores).sum()), abs=1e-12)
    generator = torch.Generator().manual_seed(4)
    for _ in range(50):
        other = (tilted + 0.3 * torch.randn(7, generator=generator, dtype=torch.float64)).log_softmax(0)
        assert optimum.objective(other, ref, scores, BETA) < best


@pytest.mark.parametrize("estimator", tiny.mostly_slow(["k3"], ["k2"]))
def test_where_a_kl_term_in_the_loss_comes_to_rest(estimator: str) -> None:
    """Against plain gradient steps on the loss as GRPO has it, with all answers in place of sampled ones."""
    ref, scores = toy()
    first_ref = torch.cat([ref[:1], ref[1:].view(2, 3).logsumexp(-1)])
    second_ref = ref[1:].view(2, 3).log_softmax(-1)
    first, second = first_ref.clone().requires_grad_(), second_ref.clone().requires_grad_()
    optimizer = torch.optim.Adam([first, second], lr=0.02)

    def term(logp: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        d = logp - other
        return d.square() / 2 if estimator == "k2" else torch.exp(-d) + d - 1

    for _ in range(3000):
        p, q = first.log_softmax(0), second.log_softmax(-1)
        joint = torch.cat([p[:1], (p[1:, None] + q).flatten()])
        drawn = joint.detach().exp()
        terms = torch.cat([term(p, first_ref)[:1], (term(p, first_ref)[1:, None] + term(q, second_ref)).flatten()])
        optimizer.zero_grad()
        (drawn * (BETA * terms - scores * joint)).sum().backward()
        optimizer.step()
    found = optimum.own_optimum(ref, scores, 1, BETA, estimator)
    assert found == pytest.approx(optimum.objective(joint.detach(), ref, scores, BETA), abs=1e-4)
    assert found < optimum.optimum(ref, scores, BETA) - 1e-3


def test_scores_have_mean_0_under_the_language() -> None:
    language = Language.of(0)
    assert sum(language.shares.values()) == pytest.approx(1)
    assert sum(language.shares[w] * language.scores[w] for w in language.shares) == pytest.approx(0, abs=1e-12)
    assert len(language.scores) == 8 + 64 and Language.of(0) == language != Language.of(1)
    rows = language.rows(2000)
    word = max(language.shares, key=lambda w: language.shares[w])
    said = sum(r["messages"][-1]["content"] == word for r in rows)
    assert said == round(2000 * language.shares[word])


def test_the_reward_file_is_what_the_table_says(tmp_path: Path) -> None:
    language = Language.of(0)
    path, _, name = language.write_reward(tmp_path / "reward.py").rpartition(":")
    space: dict[str, Any] = {}
    exec(Path(path).read_text("utf-8"), space)
    assert space[name](["ab", "no word"], [], []) == [language.scores["ab"], optimum.ASIDE]


def test_all_answers_are_counted_out() -> None:
    """Their probabilities add up to 1 and are those of a forward over each whole answer; each has the score of its text."""
    tokenizer = train_tokenizer(["?"], 260, context=64)
    template = ChatTemplate(tokenizer)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model = starter(len(tokenizer), **optimum.SHAPE, seed=1, ids=ids)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)  # far from uniform
    language = Language.of(0)
    answers = optimum.answers_of(template, language, 260)
    prompt = template.encode_prompt(optimum.PROMPT)
    logp = optimum.logprobs_of(model, prompt, answers.stop_ids)
    stops, others = len(answers.stop_ids), 260 - len(answers.stop_ids)
    assert logp.shape == answers.scores_Y.shape == (stops + others * 260,)
    assert float(logp.exp().sum()) == pytest.approx(1, abs=1e-9)
    others_ids = [i for i in range(260) if i not in template.stop_ids]
    a, b = (tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ab")
    for second, text in ((b, "ab"), (tokenizer.eos_token_id, "a")):
        place = stops + others_ids.index(a) * 260 + second
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, a, second]])).logits[0].double().log_softmax(-1)
        expected = logits[len(prompt) - 1, a] + logits[len(prompt), second]
        assert float(logp[place]) == pytest.approx(float(expected), abs=1e-5)
        assert float(answers.scores_Y[place]) == pytest.approx(language.scores[text])
    assert float(answers.scores_Y[0]) == optimum.ASIDE  # nothing at all is no word


def test_a_mean_below_the_goal_does_not_hold() -> None:
    options: dict[str, Any] = {"best": 2.0, "start": 0.5, "seconds": 3.0}
    held = optimum.verdict("ppo", [1.9, 1.95], [0, 1], goal=0.95, **options)
    assert held.value == pytest.approx(1.925 / 2) and held.holds
    # (1.4 / 1.5 + 1.45 / 1.5) / 2
    assert held.details["share_of_gain"] == pytest.approx(0.95)
    assert not optimum.verdict("ppo", [1.9, 1.85], [0, 1], goal=0.95, **options).holds
    beside = optimum.verdict("grpo", [1.0], [0], goal=None, own=0.7, **options)
    assert beside.holds and beside.goal.startswith("none") and beside.row()["own_optimum"] == 0.7
    assert json.loads(json.dumps(beside.row()))["low"] is None


# -- 2: the town -----------------------------------------------------------------------------------------------------------


def rows_of(*rubric: float) -> list[dict[str, Any]]:
    return [{"rubric": r, "correct": float(r > 0.5), "finished": True, "tokens": 9} for r in rubric]


def test_who_wins_is_said() -> None:
    answers = {"sft": rows_of(0.1, 0.2, 0.3, 0.4), "ppo": rows_of(0.5, 0.6, 0.7, 0.9), "dpo": rows_of(1, 1, 1, 1)}
    found = town.equal_labels(answers, {"ppo": 10.0}, 0)
    # Differences 0.4, 0.4, 0.4, 0.5.
    assert found.value == pytest.approx(0.425) and found.holds
    assert found.details["winner"] == "dpo"
    assert [line["model"] for line in found.details["table"]] == ["dpo", "ppo", "sft"]
    assert found.details["table"][1]["seconds"] == 10.0
    assert found.details["ppo_minus"]["dpo"][0] == pytest.approx(-0.325)
    mixed = {"sft": rows_of(0, 1, 0, 1), "ppo": rows_of(1, 0, 1, 0.1)}
    assert not town.equal_labels(mixed, {}, 0).holds and town.equal_labels(mixed, {}, 0, quick=True).holds
    lower = {"sft": rows_of(1, 1, 1, 1), "ppo": rows_of(0, 0, 0.1, 0)}
    assert not town.equal_labels(lower, {}, 0, quick=True).holds


@pytest.mark.parametrize(
    ("with_ptx", "without", "holds"), [(10.2, 12.0, True), (10.4, 12.0, False), (10.1, 10.2, False)]
)
def test_ptx_must_keep_what_is_lost_without(with_ptx: float, without: float, holds: bool) -> None:
    found = town.ptx({"sft": 10.0, "ppo": 10.0, "forgets": without, "ptx": with_ptx}, 0)
    assert found.value == pytest.approx(with_ptx / 10 - 1) and found.holds is holds


# -- 3: over-optimisation ----------------------------------------------------------------------------------------------------


def points(*gold: float) -> list[dict[str, float]]:
    return [{"step": 5 * (i + 1), "kl": float(i), "gold": g, "proxy": float(i)} for i, g in enumerate(gold)]


FALLS = points(0.0, 1.0, 0.95, 0.5, 0.4, 0.3)


@pytest.mark.parametrize(
    ("step", "lost", "holds"),
    [(15, 0.05, True), (17, 0.05, True), (20, 0.5, False), (None, None, False)],
)
def test_the_rule_must_fire_in_time(step: int | None, lost: float | None, holds: bool) -> None:
    found = overoptimisation.verdict("small", FALLS, step, [0], accuracy=0.6)
    assert found.value == (None if lost is None else pytest.approx(lost)) and found.holds is holds
    assert found.details["turned"] and found.details["peak_at"] == 10 and found.details["lost_tenth_at"] == 20


def test_a_false_alarm_does_not_hold_nor_does_gold_that_never_turns() -> None:
    early = overoptimisation.verdict("small", points(0.0, 0.5, 0.45, 1.0, 0.5, 0.3, 0.2), 15, [0], accuracy=0.6)
    assert early.details["false_alarm"] and not early.holds
    rising = overoptimisation.verdict("small", points(0.0, 0.5, 1.0, 1.0, 1.0), 20, [0], accuracy=0.6)
    assert not rising.details["turned"] and not rising.holds


def test_curves_and_findings_of_a_run() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 0, "eval_gold": 0.2, "eval_score": 1.0},
        {"step": 5, "kl": 0.5, "score": 1.0},
        {"step": 5, "eval_gold": 0.3, "eval_score": 1.1},
        {"step": 6, "kl": 0.6, "score": 1.0},
        {"step": 7, "eval_gold": 0.3, "eval_score": 1.1},  # its KL was not logged
    ]
    assert overoptimisation.curve(rows) == [
        {"step": 0, "kl": 0.0, "gold": 0.2, "proxy": 1.0},
        {"step": 5, "kl": 0.5, "gold": 0.3, "proxy": 1.1},
    ]
    findings = ["P-KL-HIGH at step 3: far", "P-REWARD-HACK at step 19: falls", "P-REWARD-HACK at step 7: falls"]
    assert overoptimisation.fired({"health": {"findings": findings}}) == 7
    assert overoptimisation.fired({}) is None


def test_gold_is_the_rubric() -> None:
    references = [{"answers": [["7:30"]]}, {"answers": [["7:30"]]}]
    right, wrong = overoptimisation.gold(["It opens at 7:30.", "It opens at 8."], [], references)
    assert right == 1.0 > wrong


# -- 4 and 6: beside TRL -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "holds"), [([1, 1, 0, 1] * 20, True), ([0, 1, 0, 0] * 20, False)])
def test_accuracy_below_the_interval_does_not_hold(ours: list[float], holds: bool) -> None:
    found = pairs.verdict({"danlu": [ours, ours], "TRL": [[1, 1, 0, 1] * 20] * 2}, [0, 1], "goal", {"pairs": 9})
    assert found.holds is holds
    assert found.value == pytest.approx(sum(ours) / 80 - 0.75)
    share, low, high = found.details["accuracy"]["TRL"]
    assert share == 0.75 and low < 0.75 < high and found.details["pairs"] == 9
    assert found.details["mcnemar_p"] == [1.0, 1.0] if holds else found.details["mcnemar_p"][0] < 1e-6


def test_a_peer_that_is_missing_is_not_held(capsys: pytest.CaptureFixture[str]) -> None:
    found = pairs.missing("4 pairs", "TRL 1.16", "goal", [0])
    assert not found.holds and found.value is None and "benchmarks peers" in capsys.readouterr().err


def test_pairs_are_judged_by_their_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"prompt": [1], "chosen": [2, 3], "rejected": [4]}
    monkeypatch.setattr(pairs, "scored", lambda model, answers: [2.0, 1.0, 0.0, 0.0, -1.0, 5.0])
    held = pairs.Pairs([], [row] * 3)
    assert pairs.judged(Path("m"), held) == [1.0, 0.5, 0.0]
    assert held.tokens == [4, 4, 4]


def test_scores_of_pairs_are_the_models_logits() -> None:
    answers = [([5, 6], [7, 8, 9]), ([5], [6])]
    found = pairs.scored(tiny.reward_model(), answers)
    model = load_model(tiny.reward_model(), scalar=True)
    for value, (prompt, answer) in zip(found, answers, strict=True):
        with torch.no_grad():
            assert value == pytest.approx(float(model(input_ids=torch.tensor([prompt + answer])).logits), abs=1e-5)


def test_beside_trl_compares_at_equal_kl() -> None:
    ours, theirs = [[(0.0, 0.0), (1.0, 1.0)]] * 2, [[(0.0, 0.0), (2.0, 1.0)], [(0.0, 0.0), (2.0, 1.2)]]
    smooth, beside_trl.SMOOTH = beside_trl.SMOOTH, 1
    try:
        found = beside_trl.verdict({"danlu": ours, "TRL": theirs}, {"danlu": [6.0], "TRL": [30.0]}, [0, 1], "goal", 60)
    finally:
        beside_trl.SMOOTH = smooth
    # At KL 1 theirs has half of its last score: differences 0.5 and 0.4.
    assert found.value == pytest.approx(0.45) and found.holds
    assert found.details["kl"] == [1.0, 1.0]
    assert found.details["seconds_an_episode"] == {"danlu": 0.1, "TRL": 0.5}
    lower = beside_trl.verdict(
        {"danlu": [[(0.0, 0.0), (2.0, v)] for v in (0.1, 0.2)]} | {"TRL": ours}, {}, [0, 1], "g", 1
    )
    assert lower.value is not None and lower.value < 0 and not lower.holds


def test_both_sides_have_the_same_mini_batches(tmp_path: Path) -> None:
    fake = Town(tmp_path)
    for index, name in enumerate(("pretrain", "sft", "reward"), 2):
        (tmp_path / f"{index:02d}-{name}").mkdir()
    settings = parse(KINDS["ppo"], beside_trl.ours(fake, tmp_path, tmp_path / "rows", 3) | {"seed": 0})
    told = beside_trl.theirs(0)
    size = told["per_device_train_batch_size"] * told["gradient_accumulation_steps"]
    assert size == settings.rollout.batch and told["num_mini_batches"] == settings.ppo.minibatches  # type: ignore[attr-defined]
    assert told["kl_coef"] == settings.ppo.kl_coef and told["num_ppo_epochs"] == settings.ppo.epochs  # type: ignore[attr-defined]
    parse(KINDS["reward"], pairs.settings_of(tmp_path, tmp_path, 3, 100.0, 0))
    for name, job in town.jobs(fake, tmp_path, 0, True).items():
        assert job.settings["out"] == str(tmp_path / name)
        parse(KINDS[job.kind], job.settings)


# -- 5: arithmetic -------------------------------------------------------------------------------------------------------------


def test_every_problem_is_right_and_held_out_by_its_numbers(tmp_path: Path) -> None:
    train, heldout = arithmetic.problems(0, copies=1, heldout=200)
    assert len(heldout) == 200 and len(train) > 2000
    assert not {p.numbers for p in train} & {p.numbers for p in heldout}
    assert {p.signs for p in heldout} == {"+-", "-+", "++"}
    for p in heldout:
        a, b, c = p.numbers
        end = a + b * (1 if p.signs[0] == "+" else -1) + c * (1 if p.signs[1] == "+" else -1)
        assert end >= 0 and p.row["answer"].endswith(f"#### {end}") and number(p.row["answer"], {"answer": str(end)})
        assert all(str(n) in p.row["question"] for n in p.numbers)
    file = arithmetic.write(tmp_path / "p.jsonl", heldout[:20])
    prompts: list[Any] = list(read(file, "prompt").records)
    assert [p.reference["verifier"] for p in prompts] == ["number"] * 20
    assert len(read(file, "conversation").records) == 20
    assert any("多少" in p.row["question"] for p in heldout) and any("How many" in p.row["question"] for p in heldout)


def test_problem_as_it_stands_in_the_file() -> None:
    found = arithmetic.problem((3, 4, 2), "+-", "en", Random(0))
    assert found.row["answer"] == "3+4=<<3+4=7>>7\n7-2=<<7-2=5>>5\n#### 5"
    assert not arithmetic.possible((1, 2, 4), "+-") and not arithmetic.possible((1, 2, 4), "-+")


def test_the_gain_is_that_of_the_same_problems(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    begun = {1.0: [0.0, 0.0, 1.0, 0.0], 0.0: [0.0] * 4}
    runs = [Trained(tmp_path / str(i), [], {}, {}, 10.0 + i) for i in range(2)]
    after = {"0": [1.0, 1.0, 1.0, 0.0], "1": [1.0, 0.0, 1.0, 0.0]}
    monkeypatch.setattr(arithmetic, "right", lambda model, held, heat: after[model.name])
    found = arithmetic.raised("grpo", runs, tmp_path, begun, [0, 1], 20.0)
    assert found.value == pytest.approx((50 + 25) / 2) and found.holds
    assert found.details["seconds"] == 11.0 and found.details["pass@1"] == [75.0, 50.0]
    assert not arithmetic.raised("grpo", runs, tmp_path, begun, [0, 1], 40.0).holds
    slow = [Trained(tmp_path / "0", [], {}, {}, 901.0)]
    assert not arithmetic.raised("grpo", slow, tmp_path, begun, [0], 20.0).holds


def test_the_recipe_reads_any_problems(tmp_path: Path) -> None:
    file = arithmetic.write(tmp_path / "p.jsonl", arithmetic.problems(0, copies=1, heldout=4)[1])
    stages = {s.name: s.settings for s in load_recipe("recipes/gsm8k-grpo.yaml", [f"problems={file}"]).stages}
    assert stages["grpo"].data == str(file) and stages["sft"].data.path == str(file)  # type: ignore[attr-defined]
    plain = {s.name: s.settings for s in load_recipe("recipes/gsm8k-grpo.yaml", ["data_root=D"]).stages}
    assert plain["grpo"].data.path == "D/gsm8k/train.jsonl.gz"  # type: ignore[attr-defined]
    changes = [f"{key}={value}" for key, value in arithmetic.RECIPE.items()]
    load_recipe("recipes/gsm8k-grpo.yaml", [*changes, f"problems={file}"])


# -- all together ------------------------------------------------------------------------------------------------------------


def test_a_job_is_trained_as_a_stage_is(tmp_path: Path) -> None:
    bench = Bench(tmp_path, workers=0)
    found = bench.train({"a": Job("ppo", tiny.stage("ppo", tmp_path / "out", max_steps=2))})["a"]
    assert [r["step"] for r in found.rows if "kl" in r] == [1, 2]
    assert (found.model / "config.json").is_file() and found.seconds > 0 and "score" in found.metrics


def test_seeds_and_places(tmp_path: Path) -> None:
    bench = Bench(tmp_path, quick=True)
    assert bench.seeds(5, 2) == [0, 1] and Bench(tmp_path).seeds(5, 2) == [0, 1, 2, 3, 4]
    bench.place("a")
    with pytest.raises(FileExistsError):
        bench.place("a")


def test_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = Verdict("1 optimum: ppo", 0.96, "mean >= 0.95", True, [0, 1], {"low": 0.9})
    bad = Verdict("4 pairs", None, "accuracy", False, [0], {"missing": "TRL 1.16"})
    table = [{"model": "ppo", "rubric": [0.8, 0.7, 0.9], "correct": 0.6, "finished": 1.0, "tokens": 9, "seconds": None}]
    third = Verdict("2 town", 0.1, "> 0", True, [0], {"table": table, "questions": 5})
    monkeypatch.setattr(learning, "PROOFS", {"1": lambda _: [good], "2": lambda _: [third], "4": lambda _: [bad]})
    docs, file = tmp_path / "benchmarks.md", tmp_path / "rows.json"
    rows = learning.measure(quick=True, only=["1", "4", "2"], json_file=file, docs=docs)
    assert json.loads(file.read_text("utf-8")) == rows
    assert [r["holds"] for r in rows] == [True, True, False] and rows[0]["low"] == 0.9 and rows[0]["quick"]
    text = docs.read_text("utf-8")
    assert "## Learning" in text and "| 1 optimum: ppo | 0.960 | mean >= 0.95 | yes | 0, 1 |" in text
    assert "| 4 pairs | not measured | accuracy | **no** | 0 |" in text
    assert "| ppo | 0.800 (0.700 to 0.900) | 0.600 | 1.000 | 9.0 |  |" in text
    assert "python -m benchmarks learning --quick --only 1,4,2" in text
    assert "DOES NOT HOLD: 4 pairs" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no proof 9"):
        learning.measure(only=["9"])


def test_the_same_numbers_give_the_same_plot(tmp_path: Path) -> None:
    for name in ("a", "b"):
        plots.overoptimisation(
            tmp_path / f"{name}.svg", {"small": FALLS, "larger": FALLS}, {"small": 15, "larger": None}
        )
    text = (tmp_path / "a.svg").read_text("utf-8")
    assert text == (tmp_path / "b.svg").read_text("utf-8")
    assert "small proxy" in text and "P-REWARD-HACK" in text
    plots.beside(tmp_path / "c.svg", {"danlu": [[(0.0, 0.0), (1.0, 1.0)]], "TRL": [[(0.0, 0.0), (1.0, 1.0)]]})
    plots.scores(tmp_path / "d.svg", {"grpo": [[1, 0.2], [2, 0.4]]})
    assert "TRL" in (tmp_path / "c.svg").read_text("utf-8") and "grpo" in (tmp_path / "d.svg").read_text("utf-8")


def test_every_setting_of_a_proof_is_one() -> None:
    """What a proof asks of a stage is refused before it runs if there is no such setting, not after an hour."""
    for kind, settings in (optimum.METHODS | optimum.BESIDE).values():
        parse(KINDS[kind], optimum.COMMON | settings | {"rewards": [{"kind": "python", "function": "a.py:b"}]})
    parse(KINDS["sft"], optimum.reference_settings(Path("fresh"), Path("rows"), Path("out")))
    for kind, settings in arithmetic.METHODS.values():
        parse(KINDS[kind], arithmetic.COMMON | settings)
    parse(KINDS["reward"], overoptimisation.REWARD)
    parse(KINDS["ppo"], overoptimisation.PPO)
