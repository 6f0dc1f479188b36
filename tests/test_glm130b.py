"""GLM-130B: the recorded cases, masks and positions from ids, caches, trees, quantised and divided checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from danlu.exceptions import ModelError
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models.blank import choice_inputs
from danlu.models.glm130b import Glm130bConfig, Glm130bForCausalLM, Glm130bForSequenceClassification, rotate
from danlu.models.load import load_model
from danlu.models.registry import family_of
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.tree import TreeBatch, branches, forest

IDS = {"mask_token_id": 270, "gmask_token_id": 271, "sop_token_id": 274, "eop_token_id": 275}


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data.parent / "fixtures" / "glm130b"


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "cases.safetensors")


def load(folder: Path, scalar: bool = False) -> Any:
    family = family_of(json.loads((folder / "config.json").read_text("utf-8")))
    assert family is not None and family.name == "GLM-130B"
    return load_model(folder, scalar=scalar).eval()


def small(**changes: Any) -> Any:
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "inner_hidden_size": 44, "num_layers": 2}
    ids = {"mask_token_id": 5, "gmask_token_id": 6, "sop_token_id": 3, "eop_token_id": 4, "pad_token_id": 2}
    model = Glm130bForCausalLM(Glm130bConfig(num_attention_heads=4, max_sequence_length=64, **shape | ids | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval()


@pytest.mark.parametrize("name", ["gmask", "mask"])
def test_recorded_logits(name: str, folder: Path, cases: dict[str, Tensor]) -> None:
    model = load(folder)
    ids, expected = cases[f"{name}.input_ids"], cases[f"{name}.logits"]
    out = model(ids, cases[f"{name}.position_ids"], cases[f"{name}.attention_mask"])
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=0)
    for field, value in IDS.items():
        setattr(model.config, field, value)
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)  # masks and positions found from the ids
    torch.testing.assert_close(model(ids, attention_mask=torch.ones_like(ids)).logits, expected, atol=1e-4, rtol=0)


def test_the_fixtures_positions_come_from_the_ids(folder: Path, cases: dict[str, Tensor]) -> None:
    from danlu.models.glm130b import positions_of

    config = Glm130bConfig(vocab_size=280, hidden_size=64, num_attention_heads=4, **IDS)
    for name in ("gmask", "mask"):
        ids = cases[f"{name}.input_ids"]
        assert torch.equal(positions_of(config, ids, torch.ones_like(ids)), cases[f"{name}.position_ids"])
    two = Glm130bConfig(vocab_size=280, hidden_size=64, num_attention_heads=4, position_encoding_2d=True, **IDS)
    found = positions_of(two, cases["gmask.input_ids"], torch.ones_like(cases["gmask.input_ids"]))
    assert found[0].tolist() == [[*range(8), *[7] * 6], [*[0] * 8, 1, 2, 3, 4, 5, 6]]


def test_rotation_is_complex_multiplication() -> None:
    states, positions = torch.randn(1, 1, 3, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[0, 1, 5]])
    found = rotate(states, positions, 100.0)
    for t, p in enumerate(positions[0].tolist()):
        for j in range(4):
            angle = torch.tensor(p * 100.0 ** (-j / 4))
            turned = torch.complex(states[0, 0, t, j], states[0, 0, t, j + 4]) * torch.polar(torch.tensor(1.0), angle)
            torch.testing.assert_close(torch.complex(found[0, 0, t, j], found[0, 0, t, j + 4]), turned)


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize("mask", [5, 6])
@torch.no_grad()
def test_cached_generation_equals_full_forwards(two: bool, mask: int) -> None:
    model = small(position_encoding_2d=two)
    prompt = torch.tensor([[7, mask, 8, 9, 3]])
    found = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)
    for length in range(5, 11):
        assert int(model(found[:, :length]).logits[0, -1].argmax()) == int(found[0, length])
    padded = torch.cat([torch.full((1, 3), 2), prompt], dim=1)
    real = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    again = model.generate(padded, attention_mask=real, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert again[0, 8:].tolist() == found[0, 5:].tolist()


def test_trees_and_the_engine_read_the_context_both_ways() -> None:
    model = small()
    tree = TreeBatch.of(forest([branches([7, 8, 6, 3], [[10, 11], [12]])]))
    root = RootModel(SeparateModels({"policy": model}, []))
    logits = root(tree, "policy", lambda out: out.logits(torch.arange(tree.tokens)))
    expected = model(torch.tensor([[7, 8, 6, 3, 10, 11]])).logits[0]
    torch.testing.assert_close(logits[:6], expected, atol=1e-5, rtol=1e-5)
    greedy = model.generate(torch.tensor([[7, 8, 6, 3]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    [done] = generate(LocalEngine(model), [Request([7, 8, 6, 3], SamplingParams(max_new_tokens=6, temperature=0.0))])
    assert list(done.ids) == greedy[0, 4:].tolist()


@pytest.mark.parametrize("mask", [5, 6])
@torch.no_grad()
def test_choices_are_blind_to_one_another(mask: int) -> None:
    model = small()
    ids, context, options = model.config.blank_ids(), [7, mask, 8], [[10, 11], [12]]
    together = model.choose(choice_inputs([context], [options], ids))[0]
    for option, found in zip(options, together, strict=True):
        logits = model(torch.tensor([[*context, ids.sop, *option[:-1]]])).logits[0].log_softmax(-1)
        alone = sum(float(logits[len(context) + i, token]) for i, token in enumerate(option))
        assert float(found) == pytest.approx(alone, abs=1e-4)


def test_the_residual_follows_the_number_of_layers() -> None:
    assert [layer.alpha for layer in small(num_layers=8).transformer.layers] == [4.0] * 8


def test_quantised_and_divided_checkpoints(tmp_path: Path) -> None:
    model = small()
    state = {k: v.detach() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    config = model.config.to_dict()
    for bits in (8, 4):
        packed, whole = {}, {}
        for name, value in state.items():
            packed[name], whole[name] = value.clone(), value
            if value.dim() == 2 and "layers" in name:
                scale = (value.abs().amax(1) / (2 ** (bits - 1) - 1)).half()
                numbers = (
                    (value / scale[:, None].float())
                    .round()
                    .clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
                    .to(torch.int8)
                )
                whole[name] = (numbers.half() * scale[:, None]).float()
                packed[name] = (numbers[:, ::2] << 4) | (numbers[:, 1::2] & 15) if bits == 4 else numbers
                packed[f"{name}_scale"] = scale
        folder = tmp_path / str(bits)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"quantization_bit": bits}), "utf-8")
        save_file({k: v.contiguous() for k, v in packed.items()}, folder / "model.safetensors")
        found = load(folder).state_dict()
        assert all(torch.equal(found[k], v) for k, v in whole.items())
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    (ranks / "config.json").write_text(json.dumps(config), "utf-8")
    for rank in (0, 1):
        part = {}
        for name, value in state.items():
            if name.endswith(("query_key_value.weight", "query_key_value.bias")):
                value = value.chunk(2)[rank]  # heads one after the other
            elif "dense_h_to_4h" in name:  # both halves of the gate on every rank
                value = torch.cat([half.chunk(2)[rank] for half in value.chunk(2)])
            elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                value = value.chunk(2, dim=1)[rank]
            elif "word_embeddings" in name:
                value = value[:31] if rank == 0 else value[31:]
            part[name] = value.clone()
        torch.save({"module": part}, ranks / f"mp_rank_0{rank}_model_states.pt")
    found = load(ranks).state_dict()
    assert all(torch.equal(found[k], v) for k, v in state.items())


def test_saved_folders_scalar_heads_and_refusals(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[7, 8, 6, 3, 9]])
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path).eval()(ids).logits, model(ids).logits)
    scalar = load(tmp_path, scalar=True)
    assert (
        isinstance(scalar, Glm130bForSequenceClassification) and float(scalar(ids).logits.detach().abs().sum()) == 0.0
    )
    with pytest.raises(ModelError, match="layernorm_order"):
        Glm130bConfig(layernorm_order="pre")
    with pytest.raises(ModelError, match="quantization_bit"):
        Glm130bConfig(quantization_bit=3)
