"""`danlu runs` and `danlu report` through the command line's own entry."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from fake_run import STAGES, TABLE, write_run
from rich.console import Console

from danlu.cli.main import run
from danlu.cli.runs import results_table
from danlu.exceptions import RunError
from danlu.pipeline.listing import Link, describe, find_run, lineage, list_runs


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


def test_describe_is_exactly_this(here: Path) -> None:
    found = describe(write_run(here / "runs" / "quickstart"))
    assert list(found) == ["run", "seconds", "stages", "table"]
    assert found["seconds"] == pytest.approx(851.1)
    assert [s["name"] for s in found["stages"]] == list(STAGES)
    assert all(list(s) == ["name", "kind", "status", "seconds", "metrics", "gates"] for s in found["stages"])
    assert found["stages"][2]["gates"][0] == {"code": "G-STOP", "passed": True, "value": 1.0, "threshold": 0.99}
    assert [r["model"] for r in found["table"]] == ["base", "sft", "ppo", "int8"]
    assert list(found["table"][0]) == ["model", "rubric", "correct", "stop_rate", "length"]
    assert found["table"][1]["rubric"] == TABLE[1]["rubric"]


def test_pending_and_killed_stages(here: Path) -> None:
    folder = write_run(here / "runs" / "r", done=2, status="interrupted")
    (folder / "04-reward").mkdir()
    statuses = [s["status"] for s in describe(folder)["stages"]]
    assert statuses == ["done", "done", "interrupted", "interrupted", "pending", "pending", "pending"]
    assert describe(folder)["seconds"] == pytest.approx(3.4 + 211.0 + 96.2)


def test_lineage_from_recipe_and_from_paths(here: Path) -> None:
    folder = write_run(here / "runs" / "r")
    assert Link("ppo", "model", "sft") in lineage(folder)
    assert Link("ppo", "reward_model", "reward") in lineage(folder)
    assert [link.source for link in lineage(folder) if link.stage == "eval"] == ["pretrain", "sft", "ppo"]
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        recipe.read_text("utf-8").replace("model: stage:sft", "model: /x/runs/old/03-chat/model"), "utf-8"
    )
    assert Link("reward", "model", "chat") in lineage(folder)


def test_list_without_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "No runs yet" in err
    assert run(["runs", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_list(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "runs" / "quickstart")
    write_run(here / "runs" / "half", done=3, status="failed", description="[red]odd[/red]")
    (here / "runs" / "no-run").mkdir()
    assert run(["runs"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    for words in ("quickstart", "7/7 done", "14 min 11 s", "int8: 74.1% correct", "3/7 failed", "[red]odd[/red]"):
        assert words in err
    assert run(["runs", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert [(r["run"], r["status"], r["done"]) for r in json.loads(out)] == [
        ("half", "failed", 3),
        ("quickstart", "done", 7),
    ]
    assert list_runs(here / "nowhere") == []


def test_show(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "runs" / "quickstart")
    for text in ("quickstart", "runs/quickstart", str(here / "runs" / "quickstart")):
        assert run(["runs", text]) == 0
        out, err = capsys.readouterr()
        assert out == ""
        for words in (
            "eval_accuracy 0.874",
            "sft, reward",
            "G-RM",
            "holds",
            "warning",
            "82.3%  78.3% – 86.3%",
            "97.8%",
        ):
            assert words in err, words
    assert run(["runs", "quickstart", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and json.loads(out) == describe(Path("runs/quickstart"))


def test_show_unfinished(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "runs" / "half", done=0)
    assert run(["runs", "half"]) == 0
    assert "No results yet: stage “eval” has not finished." in capsys.readouterr().err


def test_show_an_evaluation_without_answers(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for manifest in write_run(here / "runs" / "perplexity").glob("*/manifest.json"):
        manifest.write_text(json.dumps({**json.loads(manifest.read_text("utf-8")), "table": []}), "utf-8")
    assert run(["runs", "perplexity"]) == 0
    assert "The evaluation compares no answers" in capsys.readouterr().err


def test_report_prints_its_path(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(here / "runs" / "half", done=1)
    assert run(["report", "half"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and Path(out.removesuffix("\n")).is_file()
    assert Path(out.strip()) == Path("runs/half/report.html")


def test_unknown_runs(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs", "nothing"]) == 1
    assert "danlu run" in capsys.readouterr().err
    write_run(here / "runs" / "quickstart", done=0)
    for verb in ("runs", "report"):
        assert run([verb, "quikstart"]) == 1
        out, err = capsys.readouterr()
        assert out == "" and "there is no run 'quikstart'" in err and "did you mean 'quickstart'?" in err
    assert run(["runs", "zzz"]) == 1
    assert "runs here: quickstart" in capsys.readouterr().err
    with pytest.raises(RunError, match=r"no recipe\.yaml"):
        find_run(str(here / "runs"))
    assert run(["report"]) == 2


def test_broken_recipe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(here / "runs" / "r", done=0)
    (folder / "recipe.yaml").write_text("stages: [", "utf-8")
    assert run(["runs", "r"]) == 1
    assert "not valid YAML" in capsys.readouterr().err


def test_moved_run(here: Path) -> None:
    folder = write_run(here / "runs" / "r")
    before = describe(folder)
    moved = Path(shutil.move(folder, here / "elsewhere"))
    assert {**describe(moved), "run": ""} == {**before, "run": ""}


def test_results_table_of_overlap() -> None:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(
        results_table(
            {"table": [{"model": "sft", "bleu-4": {"mean": 8.1, "low": 7.5, "high": 8.75}, "stop_rate": 1.0}]}
        )
    )
    text = console.export_text()
    assert "bleu-4" in text and "8.10  7.50 – 8.75" in text and "rubric" not in text


def test_results_table_with_gaps() -> None:
    console = Console(width=120, file=io.StringIO())
    console.print(results_table({"table": [{"model": "[b]x", "rubric": {"mean": 0.5}, "correct": None}]}))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[b]x" in text and "50.0%" in text and "–" in text
