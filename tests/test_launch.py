"""Processes that danlu or torchrun starts: how many, and what is said when they are interrupted, fail or die."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from danlu.cli.main import run
from danlu.exceptions import DataError, SettingsError
from danlu.pipeline.recipe import load_recipe
from danlu.training import checkpoint, distributed, launch
from danlu.training.launch import Crew, resolve_count

SOON = 120.0  # against what hangs (the process group alone would wait half an hour), not for a machine that is busy


def ranks_of(parent: int) -> dict[int, int]:
    """Process ids of the ranks that a process started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = dict(v.partition("=")[::2] for v in (folder / "environ").read_text().split("\0"))
        except OSError:  # ended meanwhile, or not ours
            continue
        if above == parent and "RANK" in variables:
            found[int(variables["RANK"])] = int(folder.name)
    return found


def gone(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def begin(out: Path, **changes: Any) -> tuple[Any, dict[int, int], list[str]]:
    """An SFT stage of two processes at work: the parent, its ranks, and the command line."""
    call = tiny.arguments("sft", tiny.stage("sft", out, max_steps=300, save_every=7, processes=2, **changes))
    parent = tiny.start(call, out.with_suffix(".log"))
    tiny.wait_for(lambda: (tiny.steps_of(out) or [0])[-1] >= 20, parent)
    return parent, ranks_of(parent.pid), call


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_a_killed_rank_ends_the_others_and_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    parent, ranks, _ = begin(out)
    killed = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    parent.join(SOON)
    assert parent.exitcode == 1 and time.monotonic() - killed < SOON
    assert all(gone(process) for process in ranks.values())
    said = out.with_suffix(".log").read_text("utf-8")
    assert said.count("danlu:") == 1 and "rank 1 of 2 was killed by SIGKILL" in said and "Traceback" not in said
    manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    assert manifest["status"] == "failed" and "rank 1 of 2" in manifest["error"]
    assert checkpoint.latest(out / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_interrupted_ranks_save_once_and_go_on_exactly(how: signal.Signals, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    parent, ranks, call = begin(out)
    os.kill(parent.pid, how)
    parent.join(SOON)
    assert parent.exitcode == (-how if how == signal.SIGKILL else 130)
    tiny.wait_for(lambda: all(gone(process) for process in ranks.values()), parent)
    said = out.with_suffix(".log").read_text("utf-8")
    if how != signal.SIGKILL:
        assert said.count("danlu:") == 1 and "interrupted; saved after step" in said and "Traceback" not in said
    assert run(call) == 0
    assert run([str(whole) if part == str(out) else part for part in call]) == 0
    assert tiny.weights(out / "model") == tiny.weights(whole / "model")
    assert (out / "metrics.jsonl").read_text("utf-8") == (whole / "metrics.jsonl").read_text("utf-8")


# -- errors of a rank ---------------------------------------------------------------------------------------------------


def fail_on_rank_1(text: str) -> int:
    rank, _ = distributed.world()
    if rank == 1:
        raise DataError(text, file="rows.jsonl", line=3, hint="mend it")
    return distributed.most(rank)  # waits for the other in vain


@pytest.mark.slow
def test_a_ranks_own_error_is_what_is_raised(capfd: pytest.CaptureFixture[str]) -> None:
    """Rank 0's answer would be that rank 1 is gone."""
    with Crew(2) as crew, pytest.raises(DataError) as caught:
        crew.run(fail_on_rank_1, "a broken row")
    assert (caught.value.file, caught.value.line, caught.value.hint) == ("rows.jsonl", 3, "mend it")
    assert str(caught.value) == "rows.jsonl:3: a broken row\n  -> mend it"
    assert "Traceback" not in capfd.readouterr().err


def test_which_error_counts() -> None:
    """A rank's own, before that of one which died without a word, before what the end of another did to it."""
    lost, died, own = distributed.PeerLost("gone"), launch._Died("killed"), DataError("broken")
    for order in ([lost, died, own], [own, died, lost], [died, own, lost]):
        assert min(order, key=launch._is_consequence) is own
    assert min([lost, died], key=launch._is_consequence) is died


def test_errors_that_cannot_be_sent_still_say_what_they_said() -> None:
    class Local(Exception):
        pass

    assert str(launch._portable(Local("odd"))) == "Local: odd"
    assert isinstance(launch._portable(ValueError("plain")), ValueError)


# -- how many -----------------------------------------------------------------------------------------------------------


def test_automatic_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launch, "physical_cores", lambda: 8)
    monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 1 << 22}.__getitem__)  # 16 GiB
    assert resolve_count(7) == 7
    assert resolve_count("auto", 2_000_000) == 4
    # 16 bytes per parameter: 8 GiB hold 2 x 200M parameters, and not 2 x 300M.
    assert (resolve_count("auto", 200_000_000), resolve_count("auto", 300_000_000)) == (2, 1)
    monkeypatch.setattr(launch, "physical_cores", lambda: 3)
    assert resolve_count("auto") == 3
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 6)
    assert resolve_count("auto", 10**12) == 6


def test_physical_cores_are_among_those_this_process_may_use() -> None:
    assert 1 <= launch.physical_cores() <= launch.cores()


def recipe(folder: Path, **top: Any) -> Path:
    stages = [{"kind": "sft", "data": "x.jsonl"}, {"kind": "eval", "data": "y.jsonl"}]
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"model": "m", **top, "stages": stages}), "utf-8")
    return path


def counts(path: Path, **options: Any) -> list[Any]:
    return [getattr(s.settings, "processes", None) for s in load_recipe(path, **options).stages]


def test_processes_of_a_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path)
    assert counts(path) == [1, None]
    assert counts(path, overrides=["processes=3"]) == [3, None]
    assert counts(path, overrides=["sft.processes=auto"]) == ["auto", None]
    path = recipe(tmp_path, processes=2, strategy="fsdp2")
    assert counts(path) == [2, None]
    assert counts(path, processes="4") == [4, None]  # --processes
    assert [getattr(s.settings, "strategy", None) for s in load_recipe(path).stages] == ["fsdp2", None]
    for wrong in (0, -1, "many", 1.5):
        with pytest.raises(SettingsError, match="expected a number from 1 on, or auto"):
            load_recipe(recipe(tmp_path, processes=wrong))


# -- torchrun -----------------------------------------------------------------------------------------------------------


def torchrun(arguments: list[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    place = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "danlu"]
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*command, *arguments], env=os.environ | place | environment, stdout=stream, stderr=stream
        )


@pytest.mark.slow
def test_torchrun_runs_a_whole_recipe(tmp_path: Path) -> None:
    """Rank 0 alone writes and speaks; metrics are those of one process."""
    path, log = tiny.recipe(tmp_path), tmp_path / "log"
    assert torchrun(["run", str(path)], log, DANLU_RUNS=str(tmp_path / "runs")).wait(240) == 0, log.read_text()
    said = log.read_text("utf-8")
    assert said.count("ppo: begins") == said.count("quantize: done in") == 1
    assert "Traceback" not in said and "rank" not in said
    one = tiny.chain()
    for kind in tiny.STAGES:
        name = f"{tiny.STAGES.index(kind) + 1:02d}-{kind}"
        ours, other = (
            json.loads((r / name / "manifest.json").read_text("utf-8")) for r in (tmp_path / "runs" / "tiny", one.run)
        )
        assert ours["key"] == other["key"] or kind not in ("tokenizer", "pretrain")  # later inputs differ by rounding
        losses = {k for k in ours["metrics"] if "loss" in k}
        assert {k: ours["metrics"][k] for k in losses} == pytest.approx(
            {k: other["metrics"][k] for k in losses}, rel=1e-3
        )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_torchrun_with_a_killed_rank(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    agent = torchrun(tiny.arguments("sft", tiny.stage("sft", out, max_steps=4000, save_every=7)), log)
    limit = time.monotonic() + 120
    while (tiny.steps_of(out) or [0])[-1] < 20 and agent.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.05)
    os.kill(ranks_of(agent.pid)[1], signal.SIGKILL)
    assert agent.wait(SOON) != 0
    said = log.read_text("utf-8")
    assert "danlu: rank 1 of 2" in said and "this is a bug" not in said


def test_a_faulty_row_comes_whole_out_of_another_process() -> None:
    from danlu.data.problems import RowError

    error = RowError("found x", code="json", hint="write y", file="a.jsonl", line=3, field="text")
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.code, found.line) == (str(error), "json", 3)
