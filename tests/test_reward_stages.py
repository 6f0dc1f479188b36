"""Rewards in stages: several as one, what is refused before training, answers without a score, and servers that die midway."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import transformers
from hypothesis import given
from hypothesis import strategies as st
from score_server import lengths, serving
from tokenizers import Tokenizer, models, pre_tokenizers

from danlu.alignment_config import GrpoSettings, PpoSettings, RolloutSettings
from danlu.cli.main import run
from danlu.data.collate import EncodedPrompt
from danlu.exceptions import DataError, ModelError, RewardError, SettingsError, TemplateError
from danlu.models.load import load_model, save_model
from danlu.parsing import parse
from danlu.pipeline.ranks import Runner
from danlu.pipeline.run import run_stage
from danlu.pipeline.stages import STAGES
from danlu.rewards.build import gold_of, rewards_of
from danlu.rewards.combine import Combined, Term
from danlu.rewards.protocol import Episode, Score, Unscored, never
from danlu.text.chat_template import ChatTemplate
from danlu.training import checkpoint
from danlu.types import Message

OWN = "def f(responses, prompts, references, factor=1):\n    return [factor * len(r) for r in responses]\n"


class Fixed:
    """Gives the same scores to whatever it is asked."""

    def __init__(self, name: str, scores: Sequence[float | Score] | Exception) -> None:
        self.name, self.scores, self.calls = name, scores, 0

    def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
        self.calls += 1
        if isinstance(self.scores, Exception):
            raise self.scores
        return [s if isinstance(s, Score) else Score(s) for s in self.scores]


def episodes(count: int) -> list[Episode]:
    return [Episode((1,), (2, i), True, ({"role": "user", "content": "q"},), f"answer {i}") for i in range(count)]


# -- one reward of several ---------------------------------------------------------------------------------------------------


def test_the_sum_by_hand() -> None:
    one, two = Fixed("one", [1.0, 2.0]), Fixed("two", [10.0, -4.0])
    combined = Combined([Term("a", 1.0, one), Term("b", -0.5, two, waits=True)])
    found = combined.score(episodes(2))
    assert [s.value for s in found] == [1 - 5, 2 + 2]
    assert combined.settle(episodes(2), found, step=0, keep=None) == [-4.0, 4.0]
    assert combined.metrics == {"reward_a": 1.5, "reward_b": 3.0, "reward_failed": 0.0}
    assert one.calls == two.calls == 1 and combined.facts == {"judges": ["one", "two"]}
    assert combined.score([]) == [] and one.calls == 1


@given(
    st.lists(st.tuples(st.floats(-3, 3), st.lists(st.floats(-9, 9), min_size=3, max_size=3)), min_size=1, max_size=4)
)
def test_the_sum_is_that_of_a_plain_loop(terms: list[tuple[float, list[float]]]) -> None:
    combined = Combined([Term(f"t{i}", w, Fixed(f"t{i}", v), waits=i % 2 == 1) for i, (w, v) in enumerate(terms)])
    for index, score in enumerate(combined.score(episodes(3))):
        assert score.value == pytest.approx(math.fsum(w * v[index] for w, v in terms), abs=1e-9)


def test_an_error_of_one_term_is_the_answer_s_and_names_the_term() -> None:
    half = Fixed("half", [1.0, Score(None, "no verdict", "R-VERDICT"), 3.0])
    combined = Combined([Term("whole", 1.0, Fixed("whole", [1.0, 1.0, 1.0])), Term("half", 1.0, half)])
    found = combined.score(episodes(3))
    assert [s.value for s in found] == [2.0, None, 4.0]
    assert found[1].error == "half: no verdict" and found[1].code == "R-VERDICT"


@pytest.mark.parametrize(
    ("scores", "code", "said"),
    [
        ([1.0], "R-COUNT", "t: gave 1 scores for 2 answers"),
        ([float("nan"), 1.0], "R-NAN", "t: score is nan"),
        ([float("-inf"), 1.0], "R-NAN", "t: score is -inf"),
        (Unscored("R-ENDPOINT", "http://x cannot be reached"), "R-ENDPOINT", "t: http://x cannot be reached"),
        (TemplateError("roles must alternate"), "R-TEMPLATE", "t: roles must alternate"),
    ],
)
def test_what_a_term_may_do_wrong(scores: Any, code: str, said: str) -> None:
    found = Combined([Term("t", 1.0, Fixed("t", scores))]).score(episodes(2))
    assert found[0].value is None and (found[0].code, found[0].error) == (code, said)


def test_a_bug_is_no_failed_score() -> None:
    with pytest.raises(ZeroDivisionError):
        Combined([Term("t", 1.0, Fixed("t", ZeroDivisionError()), waits=True)]).score(episodes(2))


def test_terms_that_wait_do_so_while_others_compute() -> None:
    computing = threading.Event()

    class Waits(Fixed):
        def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
            assert computing.wait(10), "nothing computed meanwhile"
            return [Score(1.0)] * len(episodes)

    class Computes(Fixed):
        def score(self, episodes: Sequence[Episode], *, cancelled: Callable[[], bool] = never) -> list[Score]:
            assert threading.current_thread() is threading.main_thread()
            computing.set()
            return [Score(2.0)] * len(episodes)

    combined = Combined([Term("w", 1.0, Waits("w", []), waits=True), Term("c", 1.0, Computes("c", []))])
    assert [s.value for s in combined.score(episodes(2))] == [3.0, 3.0]


def test_too_many_failures_stop_and_the_batch_is_kept(tmp_path: Path) -> None:
    some = Fixed("some", [1.0, Score(None, "no verdict", "R-VERDICT"), 2.0, 3.0])
    terms = [Term("length", 1.0, Fixed("length", [0.0, -1.0, 0.0, 0.0])), Term("some", 2.0, some)]
    lenient = Combined(terms, max_failed=0.25)
    assert lenient.settle(episodes(4), lenient.score(episodes(4)), step=3, keep=tmp_path) == [2.0, None, 4.0, 6.0]
    assert lenient.metrics["reward_failed"] == 0.25 and lenient.metrics["reward_some"] == 2.0
    assert not list(tmp_path.iterdir())
    strict = Combined(terms, max_failed=0.2)
    with pytest.raises(RewardError) as caught:
        strict.settle(episodes(4), strict.score(episodes(4)), step=3, keep=tmp_path)
    assert caught.value.message == (
        "R-VERDICT: 1 of 4 answers of iteration 4 have no score (max_failed 0.2); the first (answer 1): some: no verdict"
    )
    path = tmp_path / "failed" / "rewards-step-3.jsonl"
    assert str(path) in caught.value.hint
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [r["score"] for r in rows] == [2.0, None, 4.0, 6.0] and rows[1]["response"] == "answer 1"
    assert rows[1]["terms"] == {"length": -1.0, "some": {"code": "R-VERDICT", "error": "no verdict"}}
    assert rows[0]["prompt"] == [{"role": "user", "content": "q"}] and rows[0]["finished"] is True


def test_no_score_at_all_always_stops() -> None:
    combined = Combined([Term("t", 1.0, Fixed("t", Unscored("R-ENDPOINT", "gone")))], max_failed=0.99)
    with pytest.raises(RewardError, match="R-ENDPOINT: 2 of 2"):
        combined.settle(episodes(2), combined.score(episodes(2)), step=0, keep=None)


# -- what is refused before anything is trained ---------------------------------------------------------------------------------


def prompt(**reference: Any) -> EncodedPrompt:
    return EncodedPrompt([1, 2], [{"role": "user", "content": "What?"}], reference)


def built(prompts: Sequence[EncodedPrompt], **settings: Any) -> Combined:
    return rewards_of(parse(RolloutSettings, settings), prompts, Path("unused"), judge=None)


def test_terms_get_names_and_weights(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    terms = [
        {"kind": "length", "limit": 3, "weight": 0.5},
        {"kind": "length", "target": 3},
        {"kind": "format", "pattern": "x", "name": "has_x"},
        {"kind": "python", "function": f"{tmp_path}/own.py:f", "options": {"factor": 2}},
        {"kind": "http", "url": "http://127.0.0.1:1"},
        {"kind": "repetition", "weight": -1},
    ]
    asked = [prompt(verifier="number", answer="1")]
    settings = parse(RolloutSettings, {"rewards": terms, "reward_model": "somewhere", "verifier_weight": 3})
    loaded: list[int] = []

    def judge() -> Fixed:
        loaded.append(1)
        return Fixed("reward_model", [1.0])

    combined = rewards_of(settings, asked, tmp_path, judge=judge)
    assert [(t.name, t.weight, t.waits) for t in combined.terms] == [
        ("model", 1.0, False),
        ("verifier", 3.0, False),
        ("length", 0.5, False),
        ("length2", 1.0, False),
        ("has_x", 1.0, False),
        ("python", 1.0, False),
        ("http", 1.0, True),
        ("repetition", -1.0, False),
    ]
    assert loaded == [1]


@pytest.mark.parametrize(
    ("terms", "field", "said"),
    [
        (
            [{"kind": "length", "limit": 3, "name": "a"}, {"kind": "repetition", "name": "a"}],
            "rewards.1.name",
            "'a' is taken",
        ),
        ([{"kind": "length", "limit": 3, "name": "failed"}], "rewards.0.name", "'failed' is taken"),
        ([{"kind": "length", "limit": 3, "name": "model"}], "rewards", "'model' is the name"),
        ([{"kind": "python", "function": "nowhere.py:f"}], "rewards.0.function", "no file nowhere.py"),
        ([{"kind": "format", "json_schema": {"iff": {}}}], "rewards.0.json_schema", "no keyword 'iff'"),
    ],
)
def test_terms_that_are_refused(terms: list[dict[str, Any]], field: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said) as caught:
        built([prompt()], rewards=terms)
    assert caught.value.field == field


def test_a_reference_that_cannot_be_used_is_found_first() -> None:
    with pytest.raises(DataError, match=r"'regex' cannot use the reference: .*; the prompt: 'What\?'"):
        built([prompt(verifier="number", answer="1"), prompt(verifier="regex", pattern="(")])


def test_terms_alone_need_no_references() -> None:
    combined = built([prompt(), prompt(verifier="number", answer="1")], rewards=[{"kind": "repetition"}])
    assert [t.name for t in combined.terms] == ["verifier", "repetition"]
    assert [t.name for t in built([prompt()], rewards=[{"kind": "repetition"}]).terms] == ["repetition"]


def test_gold_is_apart(tmp_path: Path) -> None:
    settings = parse(RolloutSettings, {"eval_rewards": [{"kind": "length", "limit": 1}]})
    gold = gold_of(settings, tmp_path)
    assert gold is not None and [t.name for t in gold.terms] == ["length"]
    assert gold_of(parse(RolloutSettings, {}), tmp_path) is None


# -- in stages -------------------------------------------------------------------------------------------------------------------


def settings_of(kind: str, out: Path, **changes: Any) -> Any:
    cls = {"ppo": PpoSettings, "grpo": GrpoSettings}[kind]
    return parse(cls, small.stage(kind, out, **{"reward_model": "", **changes}))


def train(kind: str, out: Path, **changes: Any) -> Any:
    return STAGES[kind].run(settings_of(kind, out, **changes))


def updates(out: Path) -> list[dict[str, float]]:
    return [r for r in small.metrics_of(out) if "grad_norm" in r]


@pytest.fixture
def own(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(OWN)
    return f"{tmp_path}/own.py:f"


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_terms_alone_train_a_policy(kind: str, own: str, tmp_path: Path) -> None:
    """Without a reward model, a verifier or references; the critic of PPO starts from the policy."""
    terms = [{"kind": "python", "function": own, "weight": 0.01}, {"kind": "length", "limit": 4, "weight": -1}]
    result = train(kind, tmp_path / "out", rewards=terms, max_steps=2)
    assert result.facts["judges"] == ["python", "length"] and result.gates[0].passed
    for row in updates(tmp_path / "out"):
        told = 0.01 * row["reward_python"] - row["reward_length"]
        assert row["score"] == pytest.approx(told - (1 - row["stop_rate"])) and row["reward_failed"] == 0.0


def test_ppo_with_a_verifier_alone(tmp_path: Path) -> None:
    rows = [
        {"prompt": small.user(f"{n}: which?"), "reference": {"verifier": "choice", "answer": "AB"[n % 2]}}
        for n in range(40)
    ]
    data = small.write_rows(tmp_path / "choices.jsonl", rows)
    result = train("ppo", tmp_path / "out", data=str(data), max_steps=1)
    assert result.facts["judges"] == ["verifier"]


def test_ppo_says_when_nothing_scores(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="nothing scores the answers"):
        train("ppo", tmp_path)


def test_code_is_run_and_said_how(tmp_path: Path) -> None:
    reference = {"verifier": "tests", "tests": ["assert f(1) == 1"]}
    rows = [{"prompt": small.user(f"{n}: write f"), "reference": reference} for n in range(20)]
    data = small.write_rows(tmp_path / "tasks.jsonl", rows)
    rollout = {"batch": 4, "max_new_tokens": 4}
    result = train("grpo", tmp_path / "out", data=str(data), max_steps=1, rollout=rollout, eval_fraction=0)
    assert "with limits on time" in result.facts["sandbox"] and updates(tmp_path / "out")[0]["reward_verifier"] == 0.0


class Foreign(ChatTemplate):
    """A chat template that wants a system message."""

    def encode_answer(self, prompt: Sequence[Message], answer: Sequence[Message], **rest: Any) -> Any:
        raise TemplateError("a system message must come first")


@pytest.mark.parametrize("kind", ["ppo", "grpo"])
def test_a_reward_model_that_cannot_read_the_chats(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.trainers.scoring.ChatTemplate", Foreign)
    model = str(small.reward_model())
    with pytest.raises(
        RewardError, match=f"R-TEMPLATE: the reward model {model} cannot read.*a system message"
    ) as caught:
        train(kind, tmp_path / "out", reward_model=model)
    assert caught.value.field == "reward_model" and not updates(tmp_path / "out")


def foreign_judge(folder: Path, tokenizer: Any, positions: int) -> Path:
    """A GPT-2, whose positions are a table."""
    shape = {"vocab_size": len(tokenizer), "n_positions": positions, "n_embd": 16, "n_layer": 1, "n_head": 2}
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    judge = transformers.GPT2ForSequenceClassification(transformers.GPT2Config(**shape, **ids, num_labels=1))
    return save_model(judge, tokenizer, folder)


@pytest.mark.parametrize("kind", ["policy", "adapter", "classes"])
def test_what_is_no_reward_model(kind: str, tmp_path: Path) -> None:
    """A head that is not there would be zeros, or chance: all answers alike."""
    folder = small.model()
    if kind == "classes":
        two = transformers.AutoModelForSequenceClassification.from_pretrained(small.model(), num_labels=2)
        two.config.pad_token_id = small.tokenizer().pad_token_id
        folder = save_model(two, small.tokenizer(), tmp_path / "two")
        assert not load_model(folder, scalar=True).score.weight.any(), "what learns from it begins at zero"
    if kind == "adapter":
        assert (
            run([*small.arguments("sft", small.stage("sft", tmp_path / "sft", adapter="lora", max_steps=1)), "--force"])
            == 0
        )
        folder = tmp_path / "sft" / "adapter"
    with pytest.raises(RewardError, match=r"R-HEAD: .* is no reward model") as caught:
        train("grpo", tmp_path / "out", reward_model=str(folder))
    assert caught.value.field == "reward_model"


def test_the_folder_of_a_stage_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "rm" / "model").mkdir(parents=True)
    with pytest.raises(ModelError) as caught:
        train("grpo", tmp_path / "out", reward_model=str(tmp_path / "rm"))
    assert caught.value.hint == f"the model is in {tmp_path / 'rm' / 'model'}"


def test_a_reward_model_whose_window_is_too_small(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It is refused before anything is sampled; `overlength: truncate` shows it the end of the prompt."""
    values = small.stage("grpo", tmp_path / "out", max_steps=1, eval_fraction=0)
    values["reward_model"] = str(foreign_judge(tmp_path / "judge", small.tokenizer(), 24))
    assert run(small.arguments("grpo", values)) == 1
    said = capfd.readouterr().err
    assert (
        "R-WINDOW" in said
        and "do not fit the 24 positions of the reward model" in said
        and not updates(tmp_path / "out")
    )
    assert run(small.arguments("grpo", {**values, "overlength": "truncate", "out": str(tmp_path / "cut")})) == 0
    assert updates(tmp_path / "cut")[0]["reward_failed"] == 0.0


def words(chat: str) -> Any:
    """A tokenizer of whole words, to which all others are one sign."""
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(chat.split())}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<end>", "bos_token": "<pad>"}
    plain = (
        "{% for m in messages %}{{ m.role }} {{ m.content }} {% if m.role == 'assistant' %}<end>{% endif %}{% endfor %}"
    )
    template = plain + "{% if add_generation_prompt %}assistant {% endif %}"
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **names, chat_template=template)


def test_a_reward_model_that_does_not_know_the_language(tmp_path: Path) -> None:
    control, asked = "<unk> <pad> <end> user assistant", "which colour has the door ? :"
    judge = foreign_judge(tmp_path / "few", words(f"{control} {asked}"), 256)
    with pytest.raises(RewardError, match=r"R-TOKENIZER: .* its tokenizer does not know \d\d% of what the first 16"):
        train("grpo", tmp_path / "out", reward_model=str(judge))
    rest = [*map(str, range(12)), *(t for t in small.THINGS if t != "door")]
    judge = foreign_judge(tmp_path / "many", words(f"{control} {asked} {' '.join(rest)}"), 256)
    assert train("grpo", tmp_path / "fine", reward_model=str(judge), max_steps=1, eval_fraction=0).facts["judges"]


PICKY = """
def f(responses, prompts, references):
    return [float("nan") if i == 2 else float(i % 3) for i in range(len(responses))]
"""


def test_ppo_draws_again_for_what_has_no_score(tmp_path: Path) -> None:
    (tmp_path / "picky.py").write_text(PICKY)
    terms = [{"kind": "python", "function": f"{tmp_path}/picky.py:f"}]
    train("ppo", tmp_path / "out", rewards=terms, max_failed=0.2, max_steps=1, eval_fraction=0)
    (row,) = updates(tmp_path / "out")
    # Of 0 1 nan 0 1 2 0 1 seven are left; the first of the next batch, 0, makes them eight again.
    assert row["reward_failed"] == 1 / 8 and row["reward_python"] == pytest.approx(5 / 7)
    assert row["score_raw"] == pytest.approx(5 / 8)
    assert row["score"] == pytest.approx(5 / 8 - (1 - row["stop_rate"])) and row["stop_rate"] * 8 % 1 == 0


def test_grpo_leaves_out_the_whole_group(tmp_path: Path) -> None:
    (tmp_path / "picky.py").write_text(PICKY)
    terms = [{"kind": "python", "function": f"{tmp_path}/picky.py:f"}]
    options = {"group_size": 4, "missing_stop_penalty": 0.0, "minibatches": 2}
    train("grpo", tmp_path / "out", rewards=terms, max_failed=0.2, max_steps=1, grpo=options, eval_fraction=0)
    (row,) = updates(tmp_path / "out")
    assert row["reward_failed"] == 1 / 8 and row["score"] == (1 + 2 + 0 + 1) / 4, "of 0 1 nan 0 | 1 2 0 1"


def test_a_failure_stops_the_run_and_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "picky.py").write_text(PICKY)
    terms = [{"kind": "python", "function": f"{tmp_path}/picky.py:f"}]
    with pytest.raises(RewardError, match=r"R-NAN: 1 of 8 .*answer 2\): python: .*picky.py:f gave nan as score 2"):
        train("ppo", tmp_path / "out", rewards=terms, max_steps=1, eval_fraction=0)
    rows = (tmp_path / "out" / "failed" / "rewards-step-0.jsonl").read_text("utf-8").splitlines()
    assert len(rows) == 8 and json.loads(rows[2])["terms"]["python"]["code"] == "R-NAN"


def test_held_out_answers_without_a_score_are_counted_from_the_first_iteration(tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("def f(responses, prompts, references):\n    return [None] * len(responses)\n")
    terms = [{"kind": "python", "function": f"{tmp_path}/none.py:f"}]
    with pytest.raises(RewardError, match=r"R-TYPE: \d+ of \d+ answers of iteration 1 have no score"):
        train("grpo", tmp_path / "out", rewards=terms, max_steps=1)
    assert [p.name for p in (tmp_path / "out" / "failed").iterdir()] == ["rewards-step-0.jsonl"]


# -- a server that dies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", small.mostly_slow(["grpo"], ["ppo"]))
def test_a_server_that_dies_midway_and_comes_back(kind: str, tmp_path: Path) -> None:
    """The second start goes on from the checkpoint, asks only what was never answered, and ends like an untroubled run."""
    options = {"max_steps": 6, "save_every": 2, "eval_every": 3, "learning_rate": 1e-2}
    term = {"kind": "http", "batch": 4, "retries": 0, "concurrency": 1, "timeout": 5}

    def call(out: Path, url: str) -> list[str]:
        values = small.stage(kind, out, **options, reward_model="", rewards=[term | {"url": url}])
        return small.arguments(kind, values)

    out = tmp_path / "out"
    with serving(lengths) as server:
        assert run(call(tmp_path / "whole", server.url)) == 0
        whole, port = list(server.asked), server.port
    with serving(lengths, die_after=len(whole) * 2 // 3, port=port) as server:
        url = server.url
        assert run(call(out, url)) == 1
        first = list(server.asked)
    said = json.loads((out / "manifest.json").read_text("utf-8"))["error"]
    assert "R-ENDPOINT" in said and url in said and "failed/rewards-step-" in said
    assert list((out / "failed").glob("rewards-step-*.jsonl")) and checkpoint.latest(out / "checkpoints") is not None
    with serving(lengths, port=port) as server:
        # More patience is no other run.
        term |= {"retries": 2, "timeout": 9}
        assert run(call(out, url)) == 0
        second = list(server.asked)
    answered = [(r, json.dumps(p)) for body in first for r, p in zip(body["responses"], body["prompts"], strict=True)]
    again = [(r, json.dumps(p)) for body in second for r, p in zip(body["responses"], body["prompts"], strict=True)]
    assert first and second and not set(answered) & set(again), "nothing is asked twice"
    assert small.weights(out / "model") == small.weights(tmp_path / "whole" / "model")
    assert small.metrics_of(out) == small.metrics_of(tmp_path / "whole")


def test_another_rubric_is_another_run(own: str, tmp_path: Path) -> None:
    """The content of files that terms are made of is part of what was asked for."""
    settings = settings_of("grpo", tmp_path / "out", rewards=[{"kind": "python", "function": own}], max_steps=1)
    run_stage("grpo", "grpo", settings)
    said: list[str] = []
    run_stage("grpo", "grpo", settings, say=said.append)
    assert "done before" in said[0]
    Path(own.partition(":")[0]).write_text(OWN + "# changed\n")
    with pytest.raises(Exception, match=r"own.py has changed since"):
        run_stage("grpo", "grpo", settings)


@pytest.mark.slow
def test_two_processes_are_one(own: str, tmp_path: Path) -> None:
    """Each rank scores its own answers; the means of the terms are those of all."""
    terms = [{"kind": "python", "function": own, "weight": 0.1}, {"kind": "repetition", "weight": -1}]
    with Runner() as runner:
        rows = []
        for processes in (1, 2):
            out = tmp_path / str(processes)
            runner.run("grpo", settings_of("grpo", out, rewards=terms, processes=processes, max_steps=3))
            rows.append(small.metrics_of(out))
    for one, two in zip(*rows, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"engine_gap", "engine_gap_max"}:
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key
