"""Memory and disk that run out for real, in processes that may have only so much of them."""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from danlu.alignment_config import PpoSettings
from danlu.cli.main import run
from danlu.config import SftSettings
from danlu.training import checkpoint, memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of other systems differ")
MB = 1 << 20


def _limited(arguments: list[str], log: str, which: int, size: int) -> None:
    """`danlu ARGUMENTS` with a limit: of address space, beyond what the process has already, or of a file's size."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing fails, as on a full disk
    torch.ones(64, 64) @ torch.ones(64, 64)
    if which == resource.RLIMIT_AS:
        size += int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(which, (size, resource.RLIM_INFINITY))
    tiny._in_child(arguments, log, {})


def limited(arguments: list[str], log: Path, which: int, size: int) -> tuple[int, str]:
    """(exit status, what was said)."""
    child = tiny._server().Process(target=_limited, args=(arguments, str(log), which, size), daemon=True)
    child.start()
    child.join(120)
    assert child.exitcode is not None
    return child.exitcode, " ".join(log.read_text("utf-8").split())


# -- memory ---------------------------------------------------------------------------------------------------------------


def big_step(out: Path, folder: Path, **changes: Any) -> list[str]:
    """A stage whose one micro-batch a step needs well over 200 MB for activations."""
    rows = [json.loads(line) for line in tiny.data()["conversations"].read_text("utf-8").splitlines()]
    data = tiny.write_rows(folder / "many.jsonl", rows * 14)
    values = {"data": str(data), "tokens_per_step": 40960, "micro_tokens": 40960, "max_steps": 3, "save_every": 1}
    return tiny.arguments("sft", tiny.stage("sft", out, **values, **changes))


def test_out_of_memory_is_a_sentence(tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, said = limited(big_step(out, tmp_path), tmp_path / "log", resource.RLIMIT_AS, 200 * MB)
    assert status == 1, said
    assert "memory ran out at micro_tokens 40960" in said and "micro_tokens: 20480" in said
    assert "activation_checkpointing: true" in said and "adapter: lora" in said and "Traceback" not in said
    assert json.loads((out / "manifest.json").read_text("utf-8"))["status"] == "failed"
    assert not (out / "model").exists()


@pytest.mark.slow
def test_halving_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    call = big_step(out, tmp_path, on_oom="halve")
    status, said = limited(call, tmp_path / "log", resource.RLIMIT_AS, 260 * MB)
    assert status == 0, said
    kept = json.loads((out / "micro_tokens.json").read_text("utf-8"))["micro_tokens"]
    assert kept in (1280, 2560, 5120, 10240, 20480)
    assert run(big_step(whole, tmp_path)) == 0
    found, expected = ([r["loss"] for r in tiny.metrics_of(f) if "grad_norm" in r] for f in (out, whole))
    assert found == pytest.approx(expected, rel=1e-5), "micro-batches change nothing but the order of sums"


def test_nothing_is_left_to_halve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    @memory.within_limits
    def train(settings: SftSettings) -> int:
        sizes.append(settings.micro_tokens)
        raise torch.OutOfMemoryError("CUDA out of memory")

    settings = SftSettings(out=str(tmp_path), micro_tokens=5000, max_length=1024, on_oom="halve")
    with pytest.raises(memory.TrainingError, match="memory ran out at micro_tokens 1024"):
        train(settings)
    assert sizes == [5000, 2500, 1250, 1024]
    sizes.clear()
    with pytest.raises(memory.TrainingError):
        train(settings)
    assert sizes == [1024], "what was found before is kept"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("x"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert memory.out_of_memory(error) is expected
    wrapped = ValueError("in a step")
    wrapped.__cause__ = error
    assert memory.out_of_memory(wrapped) is expected


def test_the_advice_names_what_is_left_to_change() -> None:
    hint = memory.memory_sentence(
        SftSettings(micro_tokens=512, max_length=512, activation_checkpointing=True, adapter="lora")
    ).hint
    assert hint.startswith("a smaller max_length (now 512).")
    assert "rollout.batch" in memory.memory_sentence(PpoSettings()).hint


# -- disk -----------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_sentence_and_costs_nothing(tmp_path: Path) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    values = {"max_steps": 12, "save_every": 5, "eval_every": 100}
    call = tiny.arguments("sft", tiny.stage("sft", out, **values))
    assert run(tiny.arguments("sft", tiny.stage("sft", whole, **values))) == 0
    # Weights and averages of the tiny model are larger than that; manifest and metrics are not.
    status, said = limited(call, tmp_path / "log", resource.RLIMIT_FSIZE, 60_000)
    assert status == 1, said
    assert "is full" in said and "MB free" in said and "make room" in said and "Traceback" not in said
    assert list((out / "checkpoints").iterdir()) == [], "nothing half-written is left"
    assert checkpoint.latest(out / "checkpoints") is None
    assert run(call) == 0
    assert tiny.weights(out / "model") == tiny.weights(whole / "model")


def test_a_full_disk_in_any_stage(tmp_path: Path) -> None:
    arguments = [
        "tokenizer",
        "--data",
        str(tiny.data()["documents"]),
        "--out",
        str(tmp_path / "out"),
        "--vocab-size",
        "400",
    ]
    status, said = limited(arguments, tmp_path / "log", resource.RLIMIT_FSIZE, 9000)
    assert status == 1 and "is full" in said, said


def test_a_disk_that_fills_later_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    call = tiny.arguments("sft", tiny.stage("sft", out, max_steps=12, save_every=5, eval_every=100))
    real, saves = torch.save, []

    def full_at_the_second(*args: Any) -> None:
        saves.append(args)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_at_the_second)
        assert run(call) == 1
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000005"]
    assert run(call) == 0
    assert tiny.steps_of(out) == list(range(1, 13))
