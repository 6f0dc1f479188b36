"""GPTQ against a slow version of algorithm 1 and against rounding; calibration text that will not do; the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch

from danlu.cli.main import run
from danlu.exceptions import ModelError
from danlu.models import stored_tensors
from danlu.models.gptq import gptq_codes, quantize_gptq, scales_by_error
from danlu.models.load import load_model, save_model
from danlu.models.packed import Int4Linear, quantize_groups
from danlu.models.quantize import load_in_bits, load_quantized, packed_layers, quantize_model, save_quantized

Tiny = Callable[..., Any]
IDS = torch.tensor([[5, 9, 30, 7, 44]])


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[N, K]` and inputs `[T, K]` whose columns lean on each other."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(64, 64, generator=generator)
    return torch.randn(24, 64, generator=generator), torch.randn(400, 64, generator=generator) @ mixed * torch.rand(64)


def slowly(
    weight: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, damp: float
) -> torch.Tensor:
    """Optimal brain quantisation column by column: the inverse of what is left is computed anew each time."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    hessian += torch.eye(len(hessian)) * damp * hessian.diagonal().mean()
    codes = torch.zeros(weight.shape, dtype=torch.uint8)
    group = weight.shape[1] // scale.shape[1]
    for k in range(weight.shape[1]):
        inverse = torch.linalg.inv(hessian[k:, k:])
        step, middle = scale[:, k // group].double(), zero[:, k // group].double()
        code = torch.round(weight[:, k] / step + middle).clamp(0, 15)
        codes[:, k] = code.to(torch.uint8)
        error = (weight[:, k] - (code - middle) * step) / inverse[0, 0]
        weight[:, k:] -= error[:, None] * inverse[0][None]
    return codes


def test_codes_are_those_of_the_slow_version() -> None:
    weight, x = problem()
    hessian = x.T @ x / len(x)
    _, scale, zero = quantize_groups(weight, 32)
    assert zero is not None
    found = gptq_codes(weight, hessian, scale, zero, act_order=False)
    expected = slowly(weight, hessian, scale, zero, 0.01)
    assert (found != expected).float().mean() < 0.01  # fp32 against fp64: a tie may fall to the other side
    assert (found != quantize_groups(weight, 32)[0]).float().mean() > 0.1


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_outputs_are_nearer_than_rounded_ones(symmetric: bool, act_order: bool) -> None:
    weight, x = problem()
    hessian = x.T @ x / len(x)

    def error(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> float:
        middle = 8.0 if zero is None else zero[..., None].float()
        values = (codes.float().view(24, -1, 32) - middle) * scale[..., None].float()
        return float((x @ (values.flatten(1) - weight).T).square().mean())

    rounded = error(*quantize_groups(weight, 32, symmetric=symmetric))
    scale, zero = scales_by_error(weight, hessian.diagonal(), 32, symmetric=symmetric)
    found = error(gptq_codes(weight, hessian, scale, zero, act_order=act_order), scale, zero)
    assert found < 0.6 * rounded


def test_inputs_that_are_always_zero() -> None:
    weight, x = problem()
    x[:, 3] = 0
    _, scale, zero = quantize_groups(weight, 32)
    codes = gptq_codes(weight, x.T @ x / len(x), scale, zero)
    assert zero is not None and torch.equal(codes[:, 3], zero[:, 0])


@pytest.mark.parametrize("family", ["llama", "qwen3", "bloom", "gpt2"])
def test_whole_models(family: str, tiny: Tiny) -> None:
    rows = torch.randint(3, 60, (12, 32), generator=torch.Generator().manual_seed(0))
    exact = tiny(family)
    calibrated = quantize_gptq(tiny(family), rows, group_size=32)
    rounded = quantize_model(tiny(family), 4, group_size=32)
    assert all(isinstance(m, Int4Linear) for m in packed_layers(calibrated).values())
    with torch.no_grad():
        far = [(m(input_ids=rows).logits - exact(input_ids=rows).logits).square().mean() for m in (calibrated, rounded)]
    assert 0 < far[0] < 0.9 * far[1]
    with pytest.raises(ModelError, match="already"):
        quantize_gptq(calibrated, rows)


# -- reading and writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounded_while_reading_is_rounded_afterwards(family: str, bits: int, tiny: Tiny, tmp_path: Path) -> None:
    model = tiny(family)
    model.save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    assert (tmp_path / "plain" / "model.safetensors.index.json").is_file()
    read = load_in_bits(tmp_path / "plain", bits, group_size=32)
    expected = quantize_model(load_model(tmp_path / "plain"), bits, group_size=32)
    with torch.no_grad():
        assert torch.equal(read(input_ids=IDS).logits, expected(input_ids=IDS).logits)
    folder = save_quantized(read, None, tmp_path / "small", max_shard=15_000)
    assert len(list(folder.glob("*.safetensors"))) > 1
    with torch.no_grad():
        again = load_in_bits(folder, bits)(input_ids=IDS).logits
        assert torch.equal(again, expected(input_ids=IDS).logits)
    with pytest.raises(ModelError, match=f"{bits}-bit weights"):
        load_in_bits(folder, 12 - bits)


def test_the_16_bit_model_is_never_whole(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tiny("llama"), None, tmp_path / "plain")
    monkeypatch.setattr("danlu.models.quantize.load_model", lambda *a, **k: pytest.fail("loaded whole"))
    assert all(isinstance(m, Int4Linear) for m in packed_layers(load_in_bits(folder, 4)).values())


def test_a_disk_that_is_too_small(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantize_model(tiny("llama"), 4)
    usage = stored_tensors.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stored_tensors.shutil, "disk_usage", lambda place: usage._replace(free=2**20))
    with pytest.raises(ModelError, match=r"the disk is too small: 32 MiB are needed, 1 MiB are free"):
        save_quantized(model, None, tmp_path / "small")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_cut_short(tiny: Tiny, tmp_path: Path) -> None:
    folder = save_quantized(quantize_model(tiny("llama"), 4), None, tmp_path / "small")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ModelError, match="cut short"):
        load_quantized(folder)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("200 MB", 2 * 10**8), ("1.5GiB", 3 * 2**29), ("77", 77)]
)
def test_sizes(text: str, size: int) -> None:
    assert stored_tensors.parse_size(text) == size
    for wrong in ("", "GB", "-1", "0", "5XB"):
        with pytest.raises(ModelError, match="no size"):
            stored_tensors.parse_size(wrong)


# -- the command ------------------------------------------------------------------------------------------------------------


def text_file(path: Path, line: str, count: int) -> Path:
    return small.write_rows(path, [{"text": f"{n}: {line}"} for n in range(count)])


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = text_file(tmp_path / "text.jsonl", "the door is red and the lamp is green, as ever.", 120)
    base = ["quantize", str(small.model()), "--eval-data", str(small.data()["documents"])]
    out = tmp_path / "small"
    calibrated = ["--bits", "4", "--calibration", str(text), "--max-length", "64", "--out", str(out), "--json"]
    assert run([*base, *calibrated, "--max-shard-size", "30KB"]) == 0
    said = json.loads(capfd.readouterr().out)
    assert said["method"] == "gptq" and said["bytes"] < said["bytes_16bit"]
    assert abs(said["perplexity"] / said["perplexity_before"] - 1) < 0.1 and said["gates"][0]["code"] == "G-QUANT"
    assert said["tokens_per_second"] > 0 and said["tokens_per_second_before"] > 0
    assert len(list((out / "model").glob("*.safetensors"))) > 1
    assert run(["quantize", str(out / "model"), "--out", str(tmp_path / "twice")]) == 1
    assert "quantised already" in capfd.readouterr().err and not (tmp_path / "twice" / "model").exists()
    assert run(["chat", str(out / "model"), "--prompt", "1: which colour has the door?", "--max-new-tokens", "4"]) == 0


def test_calibration_text_that_will_not_do(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = ["quantize", str(small.model()), "--bits", "4", "--eval-data", str(small.data()["documents"])]
    short = text_file(tmp_path / "short.jsonl", "the door is red.", 3)
    assert run([*base, "--calibration", str(short), "--out", str(tmp_path / "a")]) == 1
    assert "the calibration text is too short" in capfd.readouterr().err
    chinese = text_file(tmp_path / "chinese.jsonl", "门是红色的, 灯是绿色的, 一直如此", 300)
    assert run([*base, "--calibration", str(chinese), "--out", str(tmp_path / "b")]) == 1
    assert "the calibration text is Chinese (100% of it), of which eval_data has 0%" in capfd.readouterr().err
    assert not (tmp_path / "a" / "model").exists() and not (tmp_path / "b" / "model").exists()
    assert run([*base, "--method", "gptq", "--out", str(tmp_path / "c")]) == 2
    assert "needs calibration" in capfd.readouterr().err


def test_memory_of_a_7b_model_by_bits() -> None:
    from transformers import LlamaConfig

    from danlu.config import SftSettings
    from danlu.pipeline import footprint

    shape = footprint._shape(LlamaConfig(num_hidden_layers=32))  # LLaMA-7B's shape: 6.74e9 parameters, head 1.31e8
    weights = {b: footprint.inference_memory(shape, b)["weights"] * 2**20 / 1e9 for b in (16, 8, 4)}
    # Trunk 6.476e9: 2, 1 and 0.578 bytes each; tables 2.62e8 at 2, 1 and 1.
    assert weights == pytest.approx({16: 13.48, 8: 6.74, 4: 4.01}, abs=0.02)
    tuned = {
        b: sum(footprint.tuning_memory(shape, SftSettings(), b, dtype="bfloat16", length=64).values())
        for b in (16, 8, 4)
    }
    assert tuned[16] > tuned[8] > tuned[4]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_peak_memory_of_loading_half_a_billion_parameters(bits: int, tmp_path: Path) -> None:
    from benchmarks import small as benchmark

    found = benchmark.peak(benchmark.make(benchmark.SHAPES["0.5B"], tmp_path / "model"), bits)
    assert found["peak"] <= 1.3 * found["held"]
