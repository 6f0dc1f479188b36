"""The command line: exit statuses, errors without tracebacks, one JSON document on stdout; and `danlu.load`, the same in Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import chain

import danlu
from danlu.cli import doctor
from danlu.cli.main import VERBS, run
from danlu.cli.run import _as_called
from danlu.exceptions import ModelError
from danlu.generation.protocol import SamplingParams

HEAVY = ("torch", "transformers", "pydantic", "peft", "numpy", "sqlalchemy", "fastapi", "matplotlib", "prompt_toolkit")


@pytest.fixture(autouse=True)
def plain_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """No `--debug` of another test, and no line breaks inside sentences."""
    monkeypatch.setenv("DANLU_DEBUG", "")
    monkeypatch.setenv("COLUMNS", "400")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


# -- light and offline ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [None, ["--help"], ["--version"], ["feedback", "--help"], ["nonsense"]])
def test_help_imports_nothing_heavy(arguments: list[str] | None) -> None:
    call = f"from danlu.cli.main import run; run({arguments!r})" if arguments else "import danlu, danlu.cli.main"
    found = python(f"import sys\n{call}\nprint([m for m in {HEAVY!r} if m in sys.modules], file=sys.stdout)")
    assert found.returncode == 0, found.stderr
    assert found.stdout.splitlines()[-1] == "[]"


def test_help_names_every_verb(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    said = capfd.readouterr().err
    assert all(verb in said for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([verb, "--help"]) == 0
    assert f"Usage: danlu {verb}" in capfd.readouterr().out


BLOCK = """
import socket
def refuse(self, address, *rest):
    # Loopback and files are no network.
    if self.family == socket.AF_UNIX or (isinstance(address, tuple) and address[0] in ("127.0.0.1", "::1", "localhost")):
        return real(self, address, *rest)
    print("NETWORK", address, file=__import__("sys").stderr, flush=True)
    __import__("os")._exit(77)
real = socket.socket.connect
socket.socket.connect = refuse
socket.socket.connect_ex = refuse
def lookup(host, *rest, **options):
    if host not in (None, "localhost", "127.0.0.1", "::1"):
        print("NETWORK", host, file=__import__("sys").stderr, flush=True)
        __import__("os")._exit(77)
    return resolve(host, *rest, **options)
resolve = socket.getaddrinfo
socket.getaddrinfo = lookup
"""


@pytest.fixture
def no_network(tmp_path: Path) -> dict[str, str]:
    """Environment of a Python process that ends with status 77 when it looks beyond this machine."""
    folder = tmp_path / "block"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCK, "utf-8")
    return {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}


def test_the_block_does_block(no_network: dict[str, str]) -> None:
    code = "import urllib.request; urllib.request.urlopen('http://example.com')"
    assert python(code, **no_network).returncode == 77


@pytest.mark.parametrize(
    ("until", "compared"), tiny.mostly_slow([("sft", ["03-sft"])], [("quantize", ["03-sft", "05-ppo"])])
)
def test_a_chain_without_network(until: str, compared: list[str], tmp_path: Path, no_network: dict[str, str]) -> None:
    recipe = tiny.recipe(tmp_path)
    code = f"from danlu.cli.main import main; main(['run', {str(recipe)!r}, '--until', {until!r}])"
    found = python(code, DANLU_RUNS=str(tmp_path / "runs"), **no_network)
    assert found.returncode == 0, found.stderr
    assert found.stdout == "", "people's output goes to stderr"
    folder = tmp_path / "runs" / "tiny"
    assert next(folder.glob(f"*-{until}/model")).is_dir()
    for stage in compared:
        assert tiny.weights(folder / stage / "model") == tiny.weights(chain().model(stage[3:]))


# -- results --------------------------------------------------------------------------------------------------------------


def document(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> Any:
    """What a command prints with `--json`: one document and nothing else on stdout."""
    assert run([*arguments, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def test_recipes(capfd: pytest.CaptureFixture[str]) -> None:
    folder = Path(__file__).parents[1] / "recipes"
    found = document(["recipes", "--folder", str(folder)], capfd)
    assert {Path(r["recipe"]).stem for r in found} == {p.stem for p in folder.glob("*.yaml")}
    assert all(list(r) == ["recipe", "description", "stages"] and r["description"] and r["stages"] for r in found)
    assert run(["recipes", "--folder", str(folder)]) == 0
    assert "tokenizer -> pretrain -> sft" in capfd.readouterr().err


def test_no_recipes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert document(["recipes", "--folder", str(tmp_path)], capfd) == []
    assert run(["recipes", "--folder", str(tmp_path)]) == 2


def test_doctor(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("danlu.training.compute.bf16_gain", lambda width: 2.0)
    found = document(["doctor"], capfd)
    assert found["packages"]["danlu"] == danlu.__version__ and found["cpus"] >= 1 and found["memory_gb"] > 0.5
    assert found["dtype"] == "bfloat16" and isinstance(found["gpus"], list)
    assert all(list(e) == ["installed", "for", "install"] for e in found["extras"].values())
    assert run(["doctor"]) == 0
    said = capfd.readouterr()
    assert said.out == "" and "GPUs" in said.err


def test_eval_rubric_and_exact(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = ["--data", str(tiny.data()["prompts"]), "--limit", "5", "--max-new-tokens", "4"]
    for task in ("rubric", "exact"):
        found = document(["eval", str(tiny.model()), "--task", task, *common], capfd)
        assert found["task"] == task and found["questions"] == 5 and 0 <= found["stop_rate"] <= 1
        assert set(found["correct"]) == {"mean", "low", "high"}
        assert ("rubric" in found) == (task == "rubric")
        assert document(["eval", str(tiny.model()), "--task", task, *common], capfd) == found
    assert run(["eval", str(tiny.model()), "--task", "rubric", *common]) == 0
    said = capfd.readouterr()
    assert said.out == "" and "rubric" in said.err


@pytest.mark.parametrize("data", ["conversations", "documents"])
def test_eval_perplexity(data: str, capfd: pytest.CaptureFixture[str]) -> None:
    call = ["eval", str(tiny.model()), "--task", "perplexity", "--data", str(tiny.data()[data]), "--limit", "9"]
    found = document(call, capfd)
    # Fresh weights are nearly uniform over the vocabulary.
    assert found["perplexity"] == pytest.approx(len(tiny.tokenizer()), rel=0.2)
    assert found["tokens"] > 9
    assert document([*call, "--bits", "8"], capfd)["perplexity"] == pytest.approx(found["perplexity"], rel=0.01)


def test_generate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "answers.jsonl"
    call = ["generate", str(tiny.model()), "--out", str(out), "--limit", "3", "--max-new-tokens", "4"]
    for data, label in (("conversations", "The door is red."), ("prompts", [["red"]])):
        assert run([*call, "--data", str(tiny.data()[data]), "--force"]) == 0
        rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        assert [list(r) for r in rows] == [["prompt", "label", "prediction", "finish_reason"]] * 3
        assert rows[0]["label"] == label and rows[0]["prompt"] == tiny.user("0: which colour has the door?")
    assert capfd.readouterr().out == ""
    before = out.read_bytes()
    assert run([*call, "--data", str(tiny.data()["prompts"])]) == 2
    assert "--force" in capfd.readouterr().err and out.read_bytes() == before


# -- one stage by hand ------------------------------------------------------------------------------------------------------


def test_stages_from_flags(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = tmp_path / "words"
    documents = str(tiny.data()["documents"])
    assert run(["tokenizer", "--data", documents, "--vocab-size", "300", "--out", str(words)]) == 0
    base = tmp_path / "base"
    values = tiny.stage("pretrain", base, tokenizer=str(words / "model"), max_steps=2)
    assert run(tiny.arguments("pretrain", values)) == 0
    said = capfd.readouterr()
    assert said.out == "" and f"danlu chat {base}/model" in said.err
    small = ["quantize", "--model", str(base / "model"), "--eval-data", documents, "--out", str(tmp_path / "small")]
    assert run(small) == 0
    tokenizer = danlu.load(tmp_path / "small" / "model").tokenizer
    # What documents end with, so that an adapter that is to end answers knows that their end is new.
    end = json.loads((base / "model" / "config.json").read_text("utf-8"))["eos_token_id"]
    assert end == tokenizer.convert_tokens_to_ids("<|endoftext|>") != tokenizer.eos_token_id


def test_lora_target_from_flags(tmp_path: Path) -> None:
    """The word is the default; given by hand it means the same."""
    call = tiny.arguments("sft", tiny.stage("sft", tmp_path, adapter="lora", max_steps=1))
    assert run([*call, "--lora.target", "all-linear", "--force"]) == 0


# -- what is wrong ----------------------------------------------------------------------------------------------------------


def said_on_failure(arguments: list[str], status: int, capfd: pytest.CaptureFixture[str]) -> str:
    assert run(arguments) == status
    captured = capfd.readouterr()
    assert captured.out == "" and "Traceback" not in captured.err
    return captured.err


def sft(out: Path, **changes: Any) -> list[str]:
    return tiny.arguments("sft", tiny.stage("sft", out, max_steps=1, **changes))


GOOD = {"messages": tiny.user("Hi") + tiny.assistant("Hello.")}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", ["data.jsonl", "empty"]),
        (f"{json.dumps(GOOD)}\n{{broken\n", ["data.jsonl:2", "broken JSON"]),
        (json.dumps({"messages": [{"role": "user"}]}), ["data.jsonl:1", "content"]),
        (json.dumps({"messages": tiny.user("Hi")}), ["data.jsonl:1", "assistant"]),
        (json.dumps({"text": "A document."}), ["data.jsonl", "conversation"]),
        (json.dumps({"qestion": "?"}), ["data.jsonl:1", "qestion"]),
        ('{"messages": "Hi"}', ["data.jsonl:1", "messages"]),
        ("[1, 2]", ["data.jsonl:1", "object"]),
    ],
)
def test_bad_data(content: str, said: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(content, "utf-8")
    error = said_on_failure(sft(tmp_path / "out", data=str(data)), 1, capfd)
    assert error.count("danlu: ") == 1
    for word in said:
        assert word in error, error


def test_missing_data_is_answered_with_the_nearest_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "training.jsonl").write_text(json.dumps(GOOD), "utf-8")
    error = said_on_failure(sft(tmp_path / "out", data=str(tmp_path / "trainig.jsonl")), 1, capfd)
    assert "does not exist" in error and "training.jsonl" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "other"), [("reward", "conversations"), ("sft", "prompts"), ("pretrain", "prompts")])
def test_data_of_another_kind(kind: str, other: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call = tiny.arguments(kind, tiny.stage(kind, tmp_path / "out", data=str(tiny.data()[other]), max_steps=1))
    assert f"{other}.jsonl" in said_on_failure(call, 1, capfd)


def test_model_folders_that_are_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    bare = tiny.model_folder(tmp_path / "bare" / "model", with_tokenizer=False)
    assert "no tokenizer files" in said_on_failure(sft(tmp_path / "a", model=str(bare)), 1, capfd)
    missing = said_on_failure(sft(tmp_path / "b", model=str(tmp_path / "nowhere")), 1, capfd)
    assert "no such model folder" in missing and "nowhere" in missing
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}', "utf-8")
    error = said_on_failure(sft(tmp_path / "c", model=str(adapter)), 1, capfd)
    assert "adapter" in error and "some/base" in error
    for verb in (
        ["chat", str(adapter), "--prompt", "Hi"],
        ["eval", str(adapter), "--data", str(tiny.data()["prompts"])],
    ):
        assert "adapter" in said_on_failure(verb, 1, capfd)
    (tmp_path / "empty").mkdir()
    assert "config.json" in said_on_failure(sft(tmp_path / "d", model=str(tmp_path / "empty")), 1, capfd)


def test_a_model_folder_with_damaged_weights(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny.model(), folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert str(folder) in said_on_failure(["chat", str(folder), "--prompt", "Hi"], 1, capfd)
    (folder / "config.json").write_text("{", "utf-8")
    assert "config.json" in said_on_failure(["chat", str(folder), "--prompt", "Hi"], 1, capfd)


def test_no_model_and_no_data(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = str(tiny.data()["conversations"])
    assert "--model" in said_on_failure(["sft", "--data", data, "--out", str(tmp_path / "a")], 1, capfd)
    assert "data" in said_on_failure(["sft", "--model", str(tiny.model()), "--out", str(tmp_path / "b")], 1, capfd)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stf"], "stf"),
        (["sft", "--max-step", "3"], "--max-step"),
        (["sft", "--max-steps", "many"], "many"),
        (["sft", "--dtype", "float8", "--out", "o"], "float8"),
        (["sft", "--data", "x"], "--out"),
        (["sft", "--out", "o", "--learning-rate", "-1"], "learning_rate"),
        (["sft", "--out", "o", "--max-length", "600", "--micro-tokens", "500"], "micro_tokens"),
        (["tokenizer"], "--out"),
        (["run"], "RECIPE"),
        (["eval", "m"], "--data"),
        (["eval", "m", "--data", "d", "--task", "bleu"], "bleu"),
        (["generate", "m", "--data", "d"], "--out"),
        (["chat", "m", "--temperature", "-1"], "temperature"),
    ],
)
def test_wrong_usage(arguments: list[str], said: str, tmp_path: Path, monkeypatch: Any, capfd: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in said_on_failure(arguments, 2, capfd)
    assert list(tmp_path.iterdir()) == []


def test_questions_without_reference(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tiny.write_rows(tmp_path / "p.jsonl", [{"prompt": tiny.user("Hi")}])
    error = said_on_failure(["eval", str(tiny.model()), "--data", str(data), "--task", "rubric"], 1, capfd)
    assert "p.jsonl:1" in error and "reference" in error


def test_a_bug_is_status_three(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def broken() -> None:
        raise RuntimeError("the roof is leaking")

    monkeypatch.setattr(doctor, "examine", broken)
    error = said_on_failure(["doctor"], 3, capfd)
    assert "RuntimeError: the roof is leaking" in error and "--debug" in error
    assert run(["--debug", "doctor"]) == 3
    error = capfd.readouterr().err
    assert "Traceback" in error and "in broken" in error


def test_debug_shows_where_an_error_of_the_input_came_from(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["--debug", "run", str(tmp_path / "no.yaml")]) == 1
    assert "Traceback" in capfd.readouterr().err


def test_ctrl_c_outside_of_training(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "examine", interrupted)
    assert "interrupted" in said_on_failure(["doctor"], 130, capfd)


# -- danlu.load -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded() -> Any:
    return danlu.load(chain().model("sft"))


def params(**changes: Any) -> SamplingParams:
    return SamplingParams(**{"max_new_tokens": 12, "temperature": 1.0, "seed": 4} | changes)


def test_chat_returns_response_and_history(loaded: Any) -> None:
    given = [("Hi", "Hello.")]
    response, history = loaded.chat("Who are you?", given, params=params())
    assert isinstance(response, str)
    assert history == [("Hi", "Hello."), ("Who are you?", response)]
    assert given == [("Hi", "Hello.")]
    assert loaded.chat("Who are you?", params=params())[1] == [
        ("Who are you?", loaded.chat("Who are you?", params=params())[0])
    ]


@pytest.mark.parametrize("query", ["Who are you?", "你好，今天天气怎么样？", ""])
def test_stream_chat_adds_up_to_chat(loaded: Any, query: str) -> None:
    for seed in range(4):
        response, history = loaded.chat(query, [("Hi", "Hello.")], params=params(seed=seed))
        shown = list(loaded.stream_chat(query, [("Hi", "Hello.")], params=params(seed=seed)))
        assert all(later[0].startswith(earlier[0]) for earlier, later in pairwise(shown))
        assert shown[-1] == (response, history) if response else shown == []
        pieces = loaded.stream([*tiny.user("Hi"), *tiny.assistant("Hello."), *tiny.user(query)], params(seed=seed))
        assert "".join(pieces) == response


def test_the_same_seed_gives_the_same_answer(loaded: Any) -> None:
    answers = [loaded.chat("Who?", params=params(seed=s))[0] for s in (1, 2, 3, 1, 2, 3)]
    assert answers[:3] == answers[3:] and len(set(answers)) > 1


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    bare = danlu.load(tiny.model_folder(tmp_path / "model", with_tokenizer=False))
    assert bare.tokenizer is None and bare.template is None
    for call in (
        lambda: bare.chat("Hi"),
        lambda: list(bare.stream_chat("Hi")),
        lambda: bare.generate([tiny.user("Hi")]),
    ):
        with pytest.raises(ModelError, match="no tokenizer files") as caught:
            call()
        assert "tokenizer.json" in caught.value.hint and caught.value.file == str(tmp_path / "model")
    # It still generates from ids.
    from danlu.generation.protocol import Request, generate

    assert len(next(iter(generate(bare.engine, [Request([3, 4], params())]))).ids) > 0


def test_eight_bits(tmp_path: Path) -> None:
    whole, small = danlu.load(tiny.model()), danlu.load(tiny.model(), bits=8)

    def size(assistant: Any) -> int:
        return sum(t.numel() * t.element_size() for t in assistant.model.model.layers.state_dict().values())

    assert size(small) < size(whole) / 3
    assert isinstance(small.chat("Hi", params=params())[0], str)
    folder = chain().model("quantize")
    assert (
        danlu.load(folder).chat("Hi", params=params())[0] == danlu.load(folder, bits=8).chat("Hi", params=params())[0]
    )
    with pytest.raises(ModelError, match="8-bit weights only"):
        danlu.load(folder, bits=16)
    assert size(danlu.load(tiny.model(), bits=4)) < size(small)
    with pytest.raises(ModelError, match="bits=3"):
        danlu.load(tiny.model(), bits=3)


def test_dtypes() -> None:
    import torch

    assert danlu.load(tiny.model(), dtype="bfloat16").model.dtype == torch.bfloat16
    assert danlu.load(tiny.model(), dtype=torch.float32).model.dtype == torch.float32
    with pytest.raises(ModelError, match="dtype 'float17'") as caught:
        danlu.load(tiny.model(), dtype="float17")
    assert "bfloat16" in caught.value.hint


def test_a_run_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(chain().runs.parent)
    by_name, by_path = danlu.load("runs/tiny"), danlu.load(chain().model("ppo"))
    assert by_name.chat("Hi", params=params())[0] == by_path.chat("Hi", params=params())[0]
    assert by_name.name == "runs/tiny"


@pytest.mark.parametrize(
    ("called", "on_path", "said"),
    [
        (".venv/bin/danlu", None, ".venv/bin/danlu"),
        ("/x/danlu/__main__.py", None, "/env/bin/python -m danlu"),
        (".venv/bin/danlu", "/usr/bin/danlu", "danlu"),
    ],
)
def test_the_next_commands_can_be_called(
    called: str, on_path: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setattr("sys.executable", "/env/bin/python")
    monkeypatch.setattr("shutil.which", lambda name: on_path)
    assert _as_called() == said
