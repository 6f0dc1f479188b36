"""Processes that danlu or torchrun starts: how many, and what is said when they are interrupted, fail or die."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml

from danlu.cli.main import run
from danlu.exceptions import DataError, PeerLost, SettingsError
from danlu.pipeline.recipe import load_recipe
from danlu.training import checkpoint, distributed, heartbeat, launch, place
from danlu.training.heartbeat import Pulse
from danlu.training.launch import Crew, free_port, resolve_count, told_to_rank

SOON = 120.0  # against what hangs (the process group alone would wait a day), not for a machine that is busy
PROMISED = 30.0  # seconds from a rank's death to the end of the others


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
@pytest.mark.parametrize(
    ("how", "sentence"),
    tiny.mostly_slow(
        [(signal.SIGKILL, "rank 1 of 2 was killed by SIGKILL")], [(signal.SIGSTOP, "rank 1 of 2 (process {})")]
    ),
)
def test_a_lost_rank_ends_the_others_and_is_named(how: signal.Signals, sentence: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    parent, ranks, _ = begin(out)
    os.kill(ranks[1], how)
    parent.join(PROMISED)
    assert parent.exitcode == 1
    assert all(gone(process) for process in ranks.values())
    said = out.with_suffix(".log").read_text("utf-8")
    assert said.count("danlu:") == 1 and sentence.format(ranks[1]) in said.replace(f" on {socket.gethostname()}", "")
    assert "Traceback" not in said
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


# -- no launcher that watches ---------------------------------------------------------------------------------------------


def _on_host(name: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """A rank that takes itself for one of another machine, so that nobody looks for its process."""
    socket.gethostname = lambda: name
    tiny._in_child(arguments, log, environment)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sends SIGSTOP")
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_of_another_machine_is_named(how: signal.Signals, victim: int, tmp_path: Path) -> None:
    """Plain processes: whoever is killed has no parent that would end the other."""
    out, port = tmp_path / "out", free_port()
    call = tiny.arguments("sft", tiny.stage("sft", out, max_steps=100_000, save_every=7))
    ranks = []
    for rank in (0, 1):
        given = (f"host{rank}", call, str(tmp_path / f"log{rank}"), told_to_rank(rank, 2, port, 1))
        ranks.append(tiny._server().Process(target=_on_host, args=given, daemon=True))
        ranks[-1].start()
    tiny.wait_for(lambda: (tiny.steps_of(out) or [0])[-1] >= 20, ranks[0])
    lost, left = ranks[victim], ranks[1 - victim]
    os.kill(lost.pid, how)
    left.join(PROMISED)
    lost.kill()
    assert left.exitcode == 1
    said = (tmp_path / f"log{1 - victim}").read_text("utf-8")
    assert f"danlu: rank {victim} of 2 (process {lost.pid} on host{victim})" in said and "Traceback" not in said


def work_on_rank_1(how: str) -> int:
    """Rank 0 waits for rank 1, which works for longer than a silent rank is given, or stops."""
    heartbeat.SILENT_SECONDS = distributed.SILENT_SECONDS = 4.0
    if distributed.world()[0] == 1:
        if how == "stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        end = time.monotonic() + 10.0
        while time.monotonic() < end:
            torch.save([torch.ones(1 << 20)], os.devnull)
            sum(range(1 << 20))
    return distributed.most(7)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="sends SIGSTOP")
def test_a_busy_rank_is_not_taken_for_a_lost_one() -> None:
    with Crew(2) as crew:
        assert crew.run(work_on_rank_1, "works") == [7, 7]
        with pytest.raises(PeerLost, match=r"rank 1 of 2 .* gave no sign of life for 4 s"):
            crew.run(work_on_rank_1, "stops")


def pulse(beats: dict[float, list[int]]) -> Pulse:
    """Of what the store answered at which second; everybody was heard at 0."""
    found = Pulse(len(beats[0.0]), 0.0)
    for now, counts in beats.items():
        found.heard([b"%d" % count for count in counts], now)
    return found


def test_who_is_silent() -> None:
    beating = pulse({0.0: [0, 0, 0], 10.0: [9, 8, 3], 20.0: [18, 16, 3], 24.0: [22, 16, 3]})
    assert beating.silent(25.0, 20.0) is None
    assert beating.silent(25.0, 12.0) == 2, "last heard at 10, as known at 24"
    assert beating.silent(25.0, 4.0) == 2, "the one that was silent first, though rank 1 is silent, too"
    assert beating.silent(43.9, 20.0) is None, "the store did not answer: who beats is not known"
    assert beating.silent(44.0, 20.0) == 0, "it keeps the store"
    beating.slept(100.0)
    assert beating.silent(119.0, 20.0) is None and beating.silent(120.0, 20.0) == 0
    closed = pulse({0.0: [0, 0], 10.0: [9, 9]})
    closed.broke(11.0)
    assert closed.silent(15.0, 20.0) is None, "time for a rank to leave in order after rank 0"
    assert closed.silent(16.0, 20.0) == 0


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


# -- torchrun, accelerate and MPI ---------------------------------------------------------------------------------------

MEET = {"MASTER_ADDR": "10.0.0.1"}
MPI = {
    "intel": {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
    "open": {
        f"OMPI_COMM_WORLD_{n}": v for n, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "3412", strict=True)
    },
    "mvapich": {
        f"MV2_COMM_WORLD_{n}": v for n, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "3412", strict=True)
    },
}


@pytest.mark.parametrize("kind", MPI)
def test_the_place_that_mpi_tells(kind: str) -> None:
    told = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    environment = MEET | MPI[kind]
    place.adopt(environment)
    assert environment == MEET | MPI[kind] | told | {"MASTER_PORT": "29500"}
    by_torchrun = MEET | MPI[kind] | {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}
    for unchanged in (by_torchrun, MPI[kind], MEET | {"PMI_RANK": "1"}):
        environment = dict(unchanged)
        place.adopt(environment)
        assert environment == unchanged


def test_accelerate_that_starts_one_of_several(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """With --cpu it names a place to meet and starts nobody else."""
    assert run(["--version"]) == 0
    assert "accelerate" not in capfd.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert run(["--version"]) == 0
    assert "accelerate was asked for several processes and started one" in capfd.readouterr().err


@pytest.mark.slow
def test_processes_that_know_their_place_from_mpi(tmp_path: Path) -> None:
    """The variables that `accelerate launch --cpu --mpirun_hostfile` leaves to each."""
    out, port = tmp_path / "out", free_port()
    call = tiny.arguments("sft", tiny.stage("sft", out, max_steps=2))
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "PMI_SIZE": "2"}
    common |= {"ACCELERATE_USE_CPU": "True"}
    ranks = [tiny.start(call, tmp_path / f"log{r}", **common, PMI_RANK=str(r)) for r in (0, 1)]
    for rank in ranks:
        rank.join(SOON)
    assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "log0").read_text("utf-8")
    assert json.loads((out / "compute.json").read_text("utf-8"))["processes"] == 2
    assert "accelerate" not in (tmp_path / "log0").read_text("utf-8")


LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
    "accelerate": ("accelerate.commands.launch", "--num_processes", "2", "--multi_gpu", "--main_process_port", "0"),
}


def launched(
    arguments: list[str], log: Path, options: Sequence[str] = LAUNCHERS["torchrun"], **environment: str
) -> subprocess.Popen[bytes]:
    known = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *options, "-m", "danlu"]
    with log.open("wb") as stream:
        return subprocess.Popen(
            [*command, *arguments], env=os.environ | known | environment, stdout=stream, stderr=stream
        )


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_runs_a_whole_recipe(launcher: str, tmp_path: Path) -> None:
    """Rank 0 alone writes and speaks; metrics are those of one process."""
    path, log = tiny.recipe(tmp_path), tmp_path / "log"
    process = launched(["run", str(path)], log, LAUNCHERS[launcher], DANLU_RUNS=str(tmp_path / "runs"))
    assert process.wait(240) == 0, log.read_text()
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
    compute = json.loads((tmp_path / "runs" / "tiny" / "03-sft" / "compute.json").read_text("utf-8"))
    assert compute["processes"] == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
def test_torchrun_with_a_killed_rank(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    agent = launched(tiny.arguments("sft", tiny.stage("sft", out, max_steps=4000, save_every=7)), log)
    limit = time.monotonic() + 120
    while (tiny.steps_of(out) or [0])[-1] < 20 and agent.poll() is None:
        assert time.monotonic() < limit
        time.sleep(0.05)
    killed = ranks_of(agent.pid)
    os.kill(killed[1], signal.SIGKILL)
    assert agent.wait(PROMISED) != 0 and gone(killed[0])
    said = log.read_text("utf-8")
    assert "danlu: rank 1 of 2" in said and "this is a bug" not in said


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun_whose_other_machine_is_gone(victim: int, tmp_path: Path) -> None:
    """Two torchruns that know nothing of one another; one is killed, and its rank with it."""
    out, port = tmp_path / "out", free_port()
    call = tiny.arguments("sft", tiny.stage("sft", out, max_steps=100_000, save_every=7))
    agents = []
    for node in (0, 1):
        options = ("torch.distributed.run", "--nproc-per-node", "1", "--nnodes", "2", "--node-rank", str(node))
        options += ("--master-addr", "127.0.0.1", "--master-port", str(port))
        agents.append(launched(call, tmp_path / f"log{node}", options, GLOO_SOCKET_IFNAME="lo"))
    limit = time.monotonic() + 240
    while (tiny.steps_of(out) or [0])[-1] < 20:
        assert time.monotonic() < limit and agents[0].poll() is None, (tmp_path / "log0").read_text("utf-8")
        time.sleep(0.05)
    lost, left = (ranks_of(agents[node].pid)[node] for node in (victim, 1 - victim))
    for process in (agents[victim].pid, lost):
        os.kill(process, signal.SIGKILL)
    agents[victim].wait()
    assert agents[1 - victim].wait(PROMISED) != 0 and gone(left)
    said = (tmp_path / f"log{1 - victim}").read_text("utf-8")
    assert f"danlu: rank {victim} of 2 (process {lost} on " in said and "this is a bug" not in said


def test_a_faulty_row_comes_whole_out_of_another_process() -> None:
    from danlu.data.problems import RowError

    error = RowError("found x", code="json", hint="write y", file="a.jsonl", line=3, field="text")
    found = pickle.loads(pickle.dumps(error))
    assert (str(found), found.code, found.line) == (str(error), "json", 3)
