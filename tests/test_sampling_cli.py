"""The flags that say how answers are sampled, in the commands that have them."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import tiny

from danlu.assistant import load
from danlu.cli.generate import generate
from danlu.cli.main import run
from danlu.cli.sampling import DRAWING, SEARCHING, SEVERAL, chosen
from danlu.cli.serve import serve
from danlu.config import EngineSettings
from danlu.exceptions import UsageError
from danlu.generation.protocol import SamplingParams
from danlu.generation.seeds import mix_seed

PROMPTS = [f"{n}: which colour has the door?" for n in range(3)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tiny.write_rows(tmp_path / "prompts.jsonl", [{"prompt": tiny.user(text)} for text in PROMPTS])


def rows(data: Path, *flags: str) -> list[dict[str, Any]]:
    out = data.parent / "out.jsonl"
    call = ["generate", str(tiny.model()), "--data", str(data), "--out", str(out), "--force", "--max-new-tokens", "6"]
    assert run([*call, *flags]) == 0
    return [json.loads(line) for line in out.read_text("utf-8").splitlines()]


def test_flags_are_the_sampling_parameters() -> None:
    names = {name for name, _, _ in DRAWING + SEARCHING} | {name for name, *_ in SEVERAL} | {"seed", "logprobs"}
    assert names == {f.name for f in fields(SamplingParams)}
    assert names <= {p.name for p in generate.params if isinstance(p, click.Option)}
    assert set(EngineSettings.model_fields) <= {p.name for p in generate.params} & {p.name for p in serve.params}


def test_several_answers_are_rows_in_a_row(data: Path) -> None:
    found = rows(data, "--n", "2", "--temperature", "1", "--seed", "5")
    assert [r["prompt"][0]["content"] for r in found] == [text for text in PROMPTS for _ in range(2)]
    assert all(a["prediction"] != b["prediction"] for a, b in zip(found[::2], found[1::2], strict=True))
    assert found == rows(data, "--n", "2", "--temperature", "1", "--seed", "5")
    single = rows(data, "--temperature", "1", "--seed", "5")
    assert [r["prediction"] for r in single] == [r["prediction"] for r in found[::2]]
    params = SamplingParams(max_new_tokens=6, seed=mix_seed(5, 1), n=2)
    expected = load(tiny.model()).generate(tiny.user(PROMPTS[1]), params)  # type: ignore[arg-type]
    assert [r["prediction"] for r in found[2:4]] == [r.text for r in expected]


@pytest.mark.parametrize(
    "flags",
    [
        ["--repetition-penalty", "5"],
        ["--no-repeat-ngram-size", "1"],
        ["--num-beams", "3"],
        ["--penalty-alpha", "0.9", "--top-k", "6"],
        ["--temperature", "3", "--typical-p", "0.2"],
        ["--temperature", "3", "--min-p", "0.9"],
        ["--temperature", "3", "--best-of", "4"],
    ],
)
def test_flags_change_answers(flags: list[str], data: Path) -> None:
    drawing = ["--temperature", "3"] if "--temperature" in flags else []
    changed = [r["prediction"] for r in rows(data, *flags)]
    assert changed != [r["prediction"] for r in rows(data, *drawing)]


def test_what_ends_or_bans_texts_and_tokens(data: Path) -> None:
    plain = rows(data, "--logprobs", "2")[0]
    first = plain["logprobs"][0]
    assert "".join(t["token"] for t in plain["logprobs"]).strip() == plain["prediction"].strip()
    assert [t["top"][0]["id"] for t in plain["logprobs"]] == [t["id"] for t in plain["logprobs"]]
    assert first["top"][0] == {k: first[k] for k in ("id", "token", "logprob")} and len(first["top"]) == 2
    assert "top" not in rows(data, "--logprobs", "0")[0]["logprobs"][0]
    ended = rows(data, "--stop-id", str(first["id"]))[0]
    assert ended["finish_reason"] == "stop" and "logprobs" not in ended
    text = plain["prediction"][2:4]
    assert text not in rows(data, "--stop", text)[0]["prediction"]
    second = first["top"][1]["id"]
    for flags in (["--logit-bias", f"{first['id']}=-inf"], ["--logit-bias", f"{second}=50", "--logit-bias", "5=-1"]):
        assert rows(data, *flags, "--logprobs", "0")[0]["logprobs"][0]["id"] == second
    drawn = rows(data, "--temperature", "3", "--logprobs", "0")[0]["logprobs"]
    word = next(t["token"].strip() for t in drawn if t["token"].strip())
    others = rows(data, "--temperature", "3", "--bad-word", word, "--logprobs", "0")[0]["logprobs"]
    assert word not in [t["token"].strip() for t in others]


def test_guesses_leave_the_answers(data: Path) -> None:
    expected = rows(data, "--temperature", "1")
    assert rows(data, "--temperature", "1", "--speculate", "ngram", "--guesses", "2", "--slots", "2") == expected
    assert rows(data, "--temperature", "1", "--speculate", str(tiny.model())) == expected


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--num-beams", "2", "--temperature", "0.5"], "num_beams draws nothing"),
        (["--penalty-alpha", "0.5"], "give top_k"),
        (["--best-of", "3"], "always gives the same"),
        (["--min-p", "2"], "min-p"),
        (["--logit-bias", "five"], "is not ID=NUMBER"),
    ],
)
def test_wrong_flags(flags: list[str], says: str, data: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call = ["generate", str(tiny.model()), "--data", str(data), "--out", str(data.parent / "out.jsonl")]
    assert run([*call, *flags]) == 2
    assert says in capfd.readouterr().err
    assert not (data.parent / "out.jsonl").exists()


def test_chat_takes_the_drawing_flags(capfd: pytest.CaptureFixture[str]) -> None:
    call = ["chat", str(tiny.model()), "--prompt", PROMPTS[0], "--seed", "3", "--max-new-tokens", "8"]

    def said(*flags: str) -> str:
        assert run([*call, *flags]) == 0
        return capfd.readouterr().out

    assert said("--temperature", "3", "--top-k", "1") == said("--temperature", "0") != said("--temperature", "3")
    assert run([*call, "--num-beams", "2"]) == 2


def test_flags_without_a_value_keep_the_defaults() -> None:
    defaults = SamplingParams(temperature=0.3, top_p=0.8)
    assert chosen(defaults, {"temperature": None, "top_p": 0.5}) == SamplingParams(temperature=0.3, top_p=0.5)
    with pytest.raises(UsageError, match="top_p must be"):
        chosen(defaults, {"top_p": 0.0})
