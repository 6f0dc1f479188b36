"""Terms of `rewards`: rules by hand, functions, and servers that are right, wrong, slow or dead."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from score_server import lengths, says, serving

from danlu.exceptions import SettingsError
from danlu.reward_config import FormatTerm, HttpTerm, JudgeTerm, LengthTerm, PythonTerm, RepetitionTerm
from danlu.rewards.function import FunctionReward, load_function
from danlu.rewards.http import HttpReward
from danlu.rewards.judge import JudgeReward, verdict_in
from danlu.rewards.protocol import Episode, Score, Unscored
from danlu.rewards.rules import RuleReward, format_of, length_of, repetition, repetition_of
from danlu.types import Message

QUESTION: tuple[Message, ...] = ({"role": "user", "content": "How many?"},)
FAST = {"retries": 1, "backoff": 0.01, "timeout": 0.5}


def answer(text: str, *ids: int, finished: bool = True, **reference: Any) -> Episode:
    return Episode((1,), ids or (5, 2), finished, QUESTION, text, reference)


def values(scores: list[Score]) -> list[float | None]:
    return [s.value for s in scores]


# -- rules -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "tokens", "value"),
    [
        (LengthTerm(limit=10), 10, 0.0),
        (LengthTerm(limit=10), 3, 0.0),
        (LengthTerm(limit=10), 15, -0.5),
        (LengthTerm(limit=10), 30, -2.0),
        (LengthTerm(target=8), 8, 0.0),
        (LengthTerm(target=8), 6, -0.25),
        (LengthTerm(target=8), 10, -0.25),
        (LengthTerm(target=8), 0, -1.0),
    ],
)
def test_length_by_hand(term: LengthTerm, tokens: int, value: float) -> None:
    ids = tuple(range(3, 3 + tokens))
    rule = length_of(term)
    assert rule(Episode((1,), (*ids, 2), True)) == value, "the stop token does not count"
    assert rule(Episode((1,), ids, False)) == value


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [
        ([7, 7, 7, 7], 3, 0.5),  # two 3-grams, one of them new
        ([7, 7, 7, 7], 1, 0.75),
        ([1, 2, 3, 1, 2, 3], 3, 0.25),  # 123 231 312 123
        ([1, 2, 3, 4, 5], 3, 0.0),
        ([1, 2], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_repetition_by_hand(ids: list[int], n: int, share: float) -> None:
    assert repetition(ids, n) == share


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 4))
def test_repetition_is_a_share_and_counts_what_stood_before(ids: list[int], n: int) -> None:
    found = repetition(ids, n)
    grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
    seen = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert found == pytest.approx(seen / len(grams) if grams else 0.0) and 0 <= found < 1


def test_repetition_of_chinese_is_that_of_its_tokens() -> None:
    rule = repetition_of(RepetitionTerm(n=2))
    assert rule(answer("好好好", 9, 9, 9, 2)) == 0.5  # 99 99, and the stop token is none of them


@pytest.mark.parametrize(
    ("options", "text", "value"),
    [
        ({"pattern": r"\d+"}, "it is 42", 1.0),
        ({"pattern": r"\d+"}, "it is", 0.0),
        ({"pattern": r"\d+", "match": "fullmatch"}, "it is 42", 0.0),
        ({"pattern": r"\d+", "match": "fullmatch"}, "42", 1.0),
        ({"json_schema": {"type": "array"}}, "[1]", 1.0),
        ({"json_schema": {"type": "array"}}, "{}", 0.0),
        ({"json_schema": {"type": "array"}}, "[1", 0.0),
        ({"json_schema": {}}, "no JSON", 0.0),
        ({"json_schema": {"type": "array"}, "pattern": "2"}, "[1]", 0.0),
    ],
)
def test_format(options: dict[str, Any], text: str, value: float) -> None:
    rule = format_of(FormatTerm(**options), "rewards.0")
    assert values(RuleReward("format", rule).score([answer(text)])) == [value]


def test_a_faulty_schema_is_refused_with_its_place() -> None:
    with pytest.raises(SettingsError, match="no keyword 'than'") as caught:
        format_of(FormatTerm(json_schema={"than": {}}), "rewards.2")
    assert caught.value.field == "rewards.2.json_schema"


# -- functions ---------------------------------------------------------------------------------------------------------------

OWN = """
def short(responses, prompts, references, most=5):
    return [float(len(r) <= most and p[-1]["role"] == "user") for r, p in zip(responses, prompts)]

def broken(responses, prompts, references):
    return [1 / 0]

not_a_function = 3
"""


def function(found: Any, **options: Any) -> FunctionReward:
    return FunctionReward("own", "my.py:f", lambda *_: found() if callable(found) else found, options)


def test_a_function_of_a_file_and_of_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    for where in (f"{tmp_path}/my_rewards.py:short", "my_rewards:short"):
        term = PythonTerm(function=where, options={"most": 3})
        reward = FunctionReward("own", where, load_function(where, "rewards.0.function"), term.options)
        assert values(reward.score([answer("abc"), answer("abcd")])) == [1.0, 0.0]
    broken = FunctionReward("own", "b.py:broken", load_function(f"{tmp_path}/my_rewards.py:broken", "f"), {})
    with pytest.raises(
        Unscored, match=r"R-FUNCTION: b.py:broken failed with ZeroDivisionError: .*my_rewards.py, line 6"
    ):
        broken.score([answer("x")])


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("nowhere.py:f", "FileNotFoundError: there is no file nowhere.py"),
        ("no_such_module_here:f", "ModuleNotFoundError"),
        ("{folder}/my_rewards.py:shrt", "has no function 'shrt'"),
        ("{folder}/my_rewards.py:not_a_function", "has no function"),
        ("{folder}/faulty.py:f", "SyntaxError"),
    ],
)
def test_functions_that_are_not_there(where: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "my_rewards.py").write_text(OWN)
    (tmp_path / "faulty.py").write_text("def f(:")
    with pytest.raises(SettingsError, match=said) as caught:
        load_function(where.format(folder=tmp_path), "rewards.0.function")
    assert caught.value.field == "rewards.0.function"
    if "shrt" in where:
        assert "short" in caught.value.hint


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1, 2.5], [Score(1.0), Score(2.5)]),
        ((True, 1), [Score(None, "my.py:f gave True as score 0, expected a number", "R-TYPE"), Score(1.0)]),
        ([np.float32(0.5), torch.tensor(2.0)], [Score(0.5), Score(2.0)]),
        (np.array([1.0, 2.0]), [Score(1.0), Score(2.0)]),
        ([1.0, float("nan")], [Score(1.0), Score(None, "my.py:f gave nan as score 1", "R-NAN")]),
        ([float("inf"), 1], [Score(None, "my.py:f gave inf as score 0", "R-NAN"), Score(1.0)]),
        (["0.5", 1], [Score(None, "my.py:f gave '0.5' as score 0, expected a number", "R-TYPE"), Score(1.0)]),
        ([None, 1], [Score(None, "my.py:f gave None as score 0, expected a number", "R-TYPE"), Score(1.0)]),
    ],
)
def test_what_a_function_may_give(found: Any, expected: list[Score]) -> None:
    assert function(found).score([answer("a"), answer("b")]) == expected


@pytest.mark.parametrize("found", [[], [1.0], [1.0, 2.0, 3.0], np.zeros((2, 2))[:1]])
def test_a_wrong_count_is_the_batch_s_error(found: Any) -> None:
    with pytest.raises(Unscored, match=rf"R-COUNT: my.py:f gave {len(found)} scores for 2 answers"):
        function(found).score([answer("a"), answer("b")])


# -- servers -------------------------------------------------------------------------------------------------------------------


def http(url: str, cache: Path | None = None, **options: Any) -> HttpReward:
    return HttpReward("own", HttpTerm(url=url, **{**FAST, **options}), "rewards.0", cache)


def test_a_server_is_told_everything_and_asked_once(tmp_path: Path) -> None:
    episodes = [answer("a" * n, verifier="number", answer=str(n)) for n in range(5)]
    with serving(lengths) as server:
        reward = http(server.url, tmp_path, batch=2)
        assert values(reward.score(episodes)) == [0.0, 0.1, 0.2, 0.3, 0.4]
        bodies = sorted(server.asked, key=lambda b: str(b["responses"]))
        assert [len(b["responses"]) for b in bodies] == [2, 2, 1]
        assert bodies[0]["prompts"][0] == list(QUESTION) and bodies[-1]["references"] == [
            {"verifier": "number", "answer": "4"}
        ]
        # Another reward on the same folder, as in a resumed run: only what is new is asked.
        again = http(server.url, tmp_path, batch=2)
        assert values(again.score([*episodes, answer("new")])) == [0.0, 0.1, 0.2, 0.3, 0.4, 0.3]
        assert [b["responses"] for b in server.asked[3:]] == [["new"]]
        # Another reference is another question.
        again.score([answer("a", verifier="number", answer="99")])
        assert len(server.asked) == 5


def test_nothing_is_kept_without_a_folder() -> None:
    with serving(lengths) as server:
        for _ in range(2):
            http(server.url).score([answer("a")])
        assert len(server.asked) == 2


@pytest.mark.parametrize(
    ("said", "codes", "words"),
    [
        ({"scores": [1.0]}, ["R-COUNT"] * 3, "gave 1 scores for 3 answers"),
        ({"score": [1, 2, 3]}, ["R-TYPE"] * 3, "without a list of scores"),
        ([1, 2, 3], ["R-TYPE"] * 3, "without a list of scores"),
        ({"scores": [1, "2", None]}, ["", "R-TYPE", "R-TYPE"], "gave '2' as score 1"),
        ('{"scores": [1, NaN, 3]}', ["", "R-NAN", ""], "gave nan as score 1"),
        ("<html>", ["R-ENDPOINT"] * 3, "answered with no JSON: <html>"),
    ],
)
def test_wrong_answers_of_a_server(said: Any, codes: list[str], words: str) -> None:
    with serving(lambda body: (200, said)) as server:
        found = http(server.url).score([answer("a"), answer("b"), answer("c")])
        assert [s.code for s in found] == codes
        error = next(s.error for s in found if s.error)
        assert words in error and server.url in error


@pytest.mark.parametrize(
    ("status", "code", "requests"),
    [(500, "R-ENDPOINT", 2), (429, "R-ENDPOINT", 2), (401, "R-STATUS", 1), (400, "R-STATUS", 1)],
)
def test_statuses(status: int, code: str, requests: int) -> None:
    with serving(lambda body: (status, "no luck")) as server:
        (found,) = http(server.url).score([answer("a")])
        assert found.code == code and f"status {status}: no luck" in str(found.error)
        assert len(server.asked) == requests


def test_a_server_that_recovers_is_asked_again() -> None:
    count = iter(range(9))
    with serving(lambda body: lengths(body) if next(count) >= 2 else (503, "busy")) as server:
        assert values(http(server.url, retries=2).score([answer("abc")])) == [0.3]
        assert len(server.asked) == 3


def test_a_slow_server_is_not_waited_for() -> None:
    def slow(body: dict[str, Any]) -> tuple[int, Any]:
        time.sleep(0.6)
        return lengths(body)

    with serving(slow) as server:
        (found,) = http(server.url, timeout=0.1, retries=0).score([answer("a")])
        assert found.code == "R-ENDPOINT" and "did not answer within 0.1 s" in str(found.error)


def test_a_dead_server_is_not_asked_for_every_answer() -> None:
    with serving(lengths) as server:
        url = server.url
    begun = time.monotonic()
    found = http(url, batch=1, concurrency=1, retries=1, backoff=0.2).score([answer(str(i)) for i in range(50)])
    assert (
        {s.code for s in found} == {"R-ENDPOINT"} and "(2 tries)" in str(found[0].error) and url in str(found[0].error)
    )
    assert time.monotonic() - begun < 5


def test_a_failing_batch_leaves_the_others_their_scores() -> None:
    def picky(body: dict[str, Any]) -> tuple[int, Any]:
        return (400, "bad word") if "bad" in body["responses"] else lengths(body)

    with serving(picky) as server:
        found = http(server.url, batch=1).score([answer("abc"), answer("bad"), answer("a")])
        assert values(found) == [0.3, None, 0.1] and found[1].code == "R-STATUS"


def test_requests_run_at_once() -> None:
    gate = threading.Barrier(3)  # broken, and so an error 500, unless three requests are under way together

    def together(body: dict[str, Any]) -> tuple[int, Any]:
        gate.wait(5)
        return lengths(body)

    with serving(together) as server:
        term = {"batch": 1, "concurrency": 3, "timeout": 10.0}
        assert values(http(server.url, **term).score([answer("a"), answer("bb"), answer("ccc")])) == [0.1, 0.2, 0.3]


def test_cancelled_before_it_begins() -> None:
    with serving(lengths) as server:
        (found,) = http(server.url).score([answer("a")], cancelled=lambda: True)
        assert found == Score(None, "cancelled") and not server.asked


# -- judges ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ('{"score": 7}', 7.0),
        ('Good, 9 of 10 words are right.\n{"score": 6.5}', 6.5),
        ('{"score": 1} no, {"score": 2}', 2.0),
        ('```json\n{"reason": "{9}", "score": 3}\n```', 3.0),
        ('{"reason": {"a": 1}, "score": 4} 5', 4.0),
        ("I give it a 7.", 7.0),
        ("Score: 7/10", 7.0),
        ("8.5 / 10", 8.5),
        ("得分8分", 8.0),
        ("-2", -2.0),
        ("v2.1 is fine", None),
        ('{"score": "7"}', None),
        ('{"score": true}', None),
        ('{"score": NaN}', None),
        ('{"points": 7', 7.0),
        ("no score", None),
        ("", None),
    ],
)
def test_the_verdict_in_a_reply(reply: str, score: float | None) -> None:
    assert verdict_in(reply) == score


def judge(url: str, cache: Path | None = None, **options: Any) -> JudgeReward:
    return JudgeReward("judge", JudgeTerm(base_url=url, model="m", **{**FAST, **options}), "rewards.0", cache)


def test_a_judge_is_asked_by_the_rubric_at_temperature_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "hush-hush")
    (tmp_path / "rubric.txt").write_text("Be kind.")
    with serving(says('{"score": 4}')) as server:
        rubric = {"rubric_file": str(tmp_path / "rubric.txt"), "scale_min": 2, "scale_max": 10}
        reward = judge(f"{server.url}/v1/", tmp_path / "asked", api_key_env="JUDGE_KEY", **rubric)
        assert values(reward.score([answer("Two.")])) == [0.25]  # (4 - 2) / (10 - 2)
        (body,) = server.asked
        assert body["temperature"] == 0 and body["model"] == "m"
        system, user = (m["content"] for m in body["messages"])
        assert "Be kind." in system and "from 2 (worst) to 10" in system and "How many?" in user and "Two." in user
        assert server.headers["authorization"] == "Bearer hush-hush"
        reward.score([answer("Two.")])
        assert len(server.asked) == 1, "kept"
    kept = "".join(p.read_text() for p in (tmp_path / "asked").rglob("*.json"))
    assert kept and "hush-hush" not in kept


def test_a_key_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(SettingsError, match="the environment has no JUDGE_KEY") as caught:
        judge("http://127.0.0.1:1", api_key_env="JUDGE_KEY")
    assert caught.value.field == "rewards.0.api_key_env"


def test_a_rubric_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="the rubric cannot be read"):
        judge("http://127.0.0.1:1", rubric_file=str(tmp_path / "none.txt"))


@pytest.mark.parametrize(
    ("reply", "words"),
    [("fine", "the judge m gave no score: 'fine'"), ('{"score": 11}', "gave the score 11, expected 1 to 10")],
)
def test_replies_without_a_verdict_are_not_kept(reply: str, words: str, tmp_path: Path) -> None:
    with serving(says(reply)) as server:
        for count in (1, 2):
            (found,) = judge(server.url, tmp_path).score([answer("x")])
            assert found.code == "R-VERDICT" and words in str(found.error) and len(server.asked) == count


def test_a_reply_in_another_shape() -> None:
    with serving(lambda body: (200, {"choices": []})) as server:
        found = judge(server.url).score([answer("x"), answer("y")])
        assert [s.code for s in found] == ["R-VERDICT"] * 2 and "without choices[0]" in str(found[0].error)


@pytest.mark.parametrize(
    ("verdicts", "value"),
    [
        ((1, 2), 1.0),  # for the answer, in both places
        ((2, 1), 0.0),
        ((1, 1), 0.5),  # for whatever stands first
        ((2, 2), 0.5),
        ((0, 0), 0.5),
        ((1, 0), 0.75),
    ],
)
def test_pairs_are_asked_in_both_orders(verdicts: tuple[int, int], value: float) -> None:
    def prefers(body: dict[str, Any]) -> tuple[int, Any]:
        text = body["messages"][1]["content"]
        ours_first = text.index("ours") < text.index("theirs")
        return says(json.dumps({"score": verdicts[0] if ours_first else verdicts[1]}))(body)

    with serving(prefers) as server:
        found = judge(server.url, pairwise=True).score([answer("ours", answer="theirs")])
        assert values(found) == [value] and len(server.asked) == 2


def test_pairs_need_a_reference() -> None:
    with serving(says('{"score": 10}')) as server:
        reward = judge(server.url, pairwise=True)
        assert values(reward.score([answer("ours")])) == [1.0] and len(server.asked) == 1
        (found,) = reward.score([answer("ours", answer="theirs")])
        assert "gave the score 10, expected 0, 1 or 2" in str(found.error)
