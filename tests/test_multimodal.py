"""Mixtures of experts load, chat and learn as dense models do; models that read pictures are refused by name from every way in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from seq2seq_models import VOCAB, tokenizer

import danlu
from danlu.cli.main import run
from danlu.config import SftSettings
from danlu.exceptions import ModelError
from danlu.generation.protocol import SamplingParams
from danlu.models.load import load_model, save_model
from danlu.trainers import sft

IDS = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
}  # fmt: skip
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 32, "patch_size": 16}


def rows(path: Path) -> Path:
    turns = [{"role": "user", "content": "the door?"}, {"role": "assistant", "content": "red"}]
    path.write_text((json.dumps({"messages": turns}) + "\n") * 8, "utf-8")
    return path


@pytest.mark.parametrize("name", EXPERTS)
def test_a_mixture_of_experts_loads_chats_and_learns(name: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL, **IDS, **EXPERTS[name])
    folder = save_model(getattr(transformers, f"{name}ForCausalLM")(config), tokenizer(), tmp_path / "m")
    answer, history = danlu.load(folder).chat(
        "hello", history=[], params=SamplingParams(max_new_tokens=4, temperature=0)
    )
    assert history == [("hello", answer)]
    settings = SftSettings(
        model=str(folder), data=str(rows(tmp_path / "r.jsonl")), eval_data=str(tmp_path / "r.jsonl"), max_steps=6,
        out=str(tmp_path / "out"), max_length=64, learning_rate=1e-2, tokens_per_step=128, micro_tokens=128, dtype="float32",
    )  # fmt: skip
    result = sft.train(settings)
    assert result.metrics["eval_loss"] < result.metrics["first_eval_loss"] - 0.3
    before, after = load_model(folder).state_dict(), load_model(result.model).state_dict()
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert any("experts" in n for n in moved) and any(n.endswith("gate.weight") for n in moved)


def test_the_balancing_loss_is_refused_by_name(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import transformers

    config = transformers.MixtralConfig(**SMALL, **IDS, **EXPERTS["Mixtral"], output_router_logits=True)
    folder = save_model(transformers.MixtralForCausalLM(config), tokenizer(), tmp_path / "m")
    arguments = ["sft", "--model", str(folder), "--data", str(rows(tmp_path / "r.jsonl")), "--out", str(tmp_path / "o")]
    assert run(arguments) == 1
    assert "'mixtral' is a mixture of experts whose config.json asks for the loss" in capfd.readouterr().err


def llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text, vision = LlamaConfig(**SMALL, **IDS), CLIPVisionConfig(**VISION)
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=5))


def gemma3() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(**SMALL, **IDS, head_dim=8).to_dict()
    vision = SiglipVisionConfig(**VISION).to_dict()
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    return Gemma3ForConditionalGeneration(config)


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = SMALL | IDS | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision))


@pytest.mark.parametrize("make", [llava, gemma3, qwen2_vl])
def test_models_of_pictures_are_refused_by_name(
    make: Callable[[], Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make()
    folder = save_model(model, tokenizer(), tmp_path / "m")
    words = f"'{model.config.model_type}' reads pictures, too; danlu loads models of text alone"
    with pytest.raises(ModelError, match=words):
        danlu.load(folder)
    data = str(rows(tmp_path / "r.jsonl"))
    for arguments in (
        ["chat", str(folder), "--prompt", "hello"],
        ["sft", "--model", str(folder), "--data", data, "--out", str(tmp_path / "o")],
        ["convert-model", str(folder), str(tmp_path / "c")],
    ):
        assert run(arguments) == 1
        assert words in capfd.readouterr().err, arguments[0]
