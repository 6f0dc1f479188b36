"""What a stage computes with: chosen once, kept, and float16 only where nothing is better."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from danlu.exceptions import SettingsError
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.models.starters import starter
from danlu.training import compute
from danlu.training.compute import Compute, choose
from danlu.training.step import accumulate, language_loss
from danlu.tree import TreeBatch, branches


@pytest.fixture(autouse=True)
def cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_bf16_where_it_is_measured_to_be_faster_and_never_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for gain, dtype in ((1.1, "float32"), (1.3, "bfloat16")):
        monkeypatch.setattr(compute, "bf16_gain", lambda width, g=gain: g)
        assert choose(tmp_path / dtype, "auto", 32).dtype == dtype
    monkeypatch.setattr(compute, "bf16_gain", lambda width: pytest.fail("measured again"))
    assert choose(tmp_path / "bfloat16", "auto", 32).dtype == "bfloat16"
    assert choose(tmp_path / "bfloat16", "float32", 32).dtype == "float32"


def test_threads_are_kept_while_as_many_processes_share_the_work(tmp_path: Path) -> None:
    here = torch.get_num_threads()
    try:
        for processes, expected in ((1, 3), (4, here)):
            saved = {"device": "cpu", "dtype": "bfloat16", "threads": 3, "processes": processes}
            (tmp_path / "compute.json").write_text(json.dumps(saved))
            assert choose(tmp_path, "auto", 32) == Compute("cpu", "bfloat16", expected, 1)
            assert torch.get_num_threads() == expected
            torch.set_num_threads(here)
    finally:
        torch.set_num_threads(here)


def test_a_choice_of_before_there_were_processes_is_read(tmp_path: Path) -> None:
    saved = {"device": "cpu", "dtype": "float32", "threads": torch.get_num_threads()}
    (tmp_path / "compute.json").write_text(json.dumps(saved))
    assert choose(tmp_path, "auto", 32) == Compute("cpu", "float32", torch.get_num_threads(), 1)


def test_float16_is_refused_where_there_is_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=r"overflows at 65,504.*a CPU has bfloat16") as caught:
        choose(tmp_path, "float16", 32)
    assert caught.value.field == "dtype" and "bfloat16" in caught.value.hint
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Card")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    with pytest.raises(SettingsError, match="the Card has bfloat16"):
        choose(tmp_path, "float16", 32)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert choose(tmp_path, "float16", 32).dtype == "float16"
    assert choose(tmp_path / "auto", "auto", 32).dtype == "float32"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_gradients_are_near_those_of_float32(dtype: compute.Dtype) -> None:
    """Weights and gradients stay fp32, and float16's scale is taken out again."""
    found = {}
    for kind in ("float32", dtype):
        ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
        model = starter(40, hidden_size=32, layers=2, heads=2, kv_heads=1, context=32, seed=3, ids=ids)
        root = RootModel(SeparateModels({"policy": model}, ["policy"]))
        tree = TreeBatch.of(branches([3, 4, 5], [[6, 7, 8], [9, 10]]))
        settings = Compute("cpu", kind, 1)
        loss = accumulate(root, "policy", [(tree, 5.0)], language_loss, settings)["loss"]
        assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in root.parameters())
        found[kind] = loss, torch.cat([p.grad.flatten() for p in root.parameters()])
    assert Compute("cpu", "float16", 1).loss_scale == 1024.0 and Compute("cpu", "bfloat16", 1).loss_scale == 1.0
    assert found[dtype][0] == pytest.approx(found["float32"][0], rel=1e-2)
    assert float((found[dtype][1] - found["float32"][1]).norm()) < 0.05 * float(found["float32"][1].norm())
