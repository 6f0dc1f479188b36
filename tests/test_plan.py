"""The estimate before a run: parameters exactly, the rest in sane proportions, and nothing written."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from conftest import make_tiny
from transformers import CodeGenConfig

from danlu.alignment_config import PpoSettings
from danlu.cli.main import run
from danlu.config import KINDS, SftSettings, Starter
from danlu.models.chatglm_config import ChatGLM2Config, ChatGLMConfig
from danlu.models.load import load_model, save_model
from danlu.models.registry import families
from danlu.models.roles import AdapterRoles
from danlu.models.starters import starter
from danlu.parsing import parse
from danlu.pipeline import footprint, plan
from danlu.pipeline.footprint import (
    adapter_parameters,
    kept,
    learnt_parameters,
    shape_of_folder,
    shape_of_starter,
    stage_memory,
)
from danlu.pipeline.plan import estimate
from danlu.pipeline.recipe import load_recipe
from danlu.training.peak import peak_memory_mb, reset_peak_memory

ROW = ["stage", "kind", "parameters", "trained_parameters", "tokens", "tokens_per_parameter", "flops"]
ROW += ["inference_mb", "tuning_mb", "memory_mb", "seconds", "fits", "parts", "strategies"]


@pytest.fixture(autouse=True)
def a_known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "gemm_rate", lambda: 1e11)


def rows(path: Path, *overrides: str) -> dict[str, dict[str, Any]]:
    return {r["stage"]: r for r in estimate(load_recipe(path, overrides))}


@pytest.mark.parametrize("shape", [tiny.SHAPE, Starter().model_dump(), {**tiny.SHAPE, "layers": 3, "kv_heads": 2}])
def test_starter_parameters_are_those_of_the_model(shape: dict[str, int]) -> None:
    model = starter(700, **shape, seed=0, ids={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    assert shape_of_starter(Starter(**shape), 700).parameters == sum(p.numel() for p in model.parameters())


def test_a_row_for_every_stage(tmp_path: Path) -> None:
    found = estimate(load_recipe(tiny.recipe(tmp_path)))
    assert [r["stage"] for r in found] == list(tiny.STAGES)
    assert all(list(r) == ROW for r in found)
    assert all(r["seconds"] > 0 and r["memory_mb"] > 0 for r in found)
    assert all(r["tokens"] > 0 for r in found if r["kind"] != "tokenizer")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.yaml", "town"], "a plan writes nothing"


def test_what_costs_more_is_said_to_cost_more(tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path)
    base = rows(path)
    longer = rows(path, "sft.max_steps=40")
    assert longer["sft"]["tokens"] == 2 * base["sft"]["tokens"] and longer["sft"]["seconds"] > base["sft"]["seconds"]
    wider = rows(path, "pretrain.starter.hidden_size=64")
    assert wider["ppo"]["parameters"] > 2 * base["ppo"]["parameters"]
    assert wider["ppo"]["memory_mb"] > base["ppo"]["memory_mb"] and wider["ppo"]["seconds"] > base["ppo"]["seconds"]
    large = ["pretrain.starter.hidden_size=2048", "sft.dtype=float32"]
    full, lora = (rows(path, *large, f"sft.adapter={a}")["sft"]["memory_mb"] for a in ("full", "lora"))
    assert lora < full
    assert base["ppo"]["memory_mb"] > base["sft"]["memory_mb"], "PPO holds several models"


def test_seconds_are_work_over_rate(tmp_path: Path) -> None:
    """6 N D over the machine's rate (the training cost of a transformer, Kaplan et al. 2020), and two seconds to begin."""
    row = rows(tiny.recipe(tmp_path))["pretrain"]
    assert row["tokens"] == 4 * 512
    assert row["seconds"] == pytest.approx(2 + 6 * row["parameters"] * 4 * 512 / (1e11 * plan.EFFICIENCY))


def test_records_are_limited(tmp_path: Path) -> None:
    """Each of half the greatest length: 3 records, 2 epochs."""
    path = tiny.recipe(tmp_path)
    limit = ["sft.max_steps=null", "sft.max_records=3", "sft.epochs=2", "sft.max_length=40"]
    assert rows(path, *limit)["sft"]["tokens"] == 3 * 20 * 2


def test_parameters_of_a_given_model(tmp_path: Path) -> None:
    path = tiny.recipe(tmp_path)
    actual = sum(p.numel() for p in load_model(tiny.model()).parameters())
    found = rows(path, f"model={tiny.model()}")
    assert "tokenizer" not in found
    assert found["sft"]["parameters"] == actual


def test_missing_data_is_left_to_the_run(tmp_path: Path) -> None:
    assert rows(tiny.recipe(tmp_path), f"data_root={tmp_path / 'nowhere'}")["sft"]["seconds"] > 0


def test_a_town_that_is_not_written_yet(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(
        yaml.safe_dump({"model": str(tiny.model()), "stages": [{"kind": "sft", "data": "town:sft"}]}), "utf-8"
    )
    assert rows(path)["sft"]["tokens"] == plan.TOWN_TOKENS["sft"]


def test_plan_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny.recipe(tmp_path)
    assert run(["plan", str(path), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert [list(r) for r in found] == [ROW] * 7
    assert run(["plan", str(path)]) == 0
    said = capfd.readouterr()
    assert said.out == "" and "quantize" in said.err and "FLOPs" in said.err and "Time, by strategy" in said.err


def test_every_strategy_has_memory_work_and_time(tmp_path: Path) -> None:
    row = rows(tiny.recipe(tmp_path))["sft"]
    found = {s["strategy"]: s for s in row["strategies"]}
    assert list(found) == ["full", "lora", "qlora", "prefix", "zero1", "zero2", "zero3"]
    assert all(list(s) == ["strategy", "memory_mb", "flops", "seconds", "fits"] for s in found.values())
    assert found["full"]["flops"] == row["flops"] == 6 * row["parameters"] * row["tokens"]
    assert found["lora"]["flops"] == pytest.approx(row["flops"] * 2 / 3)
    assert found["zero3"]["flops"] == row["flops"] / plan.MANY


@pytest.mark.parametrize("shares", [True, False])
def test_a_reward_model_on_the_policys_base_is_not_counted_twice(shares: bool, tmp_path: Path) -> None:
    common = {"data": "town:prompts", "adapter": "lora", "dtype": "float32"}
    ppo = {"kind": "ppo", "reward_model": "stage:reward", "rollout": {"batch": 8}, **common}
    stages = [{"kind": "reward", **common, "data": "town:comparisons"} | ({} if shares else {"adapter": "full"}), ppo]
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"model": str(tiny.model()), "stages": stages}), "utf-8")
    base = sum(p.numel() for p in load_model(tiny.model()).parameters()) * 4 / 2**20
    found = rows(path)["ppo"]["parts"]["weights"]
    assert found == pytest.approx(base * (2 if shares else 3)), "the base and the engine's copy, and a whole judge"


def test_the_machine_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert plan.gemm_rate(64) > 1e6


# -- memory ---------------------------------------------------------------------------------------------------------------

WIDE = Starter(hidden_size=64, layers=3, heads=4, kv_heads=2, context=256)


def parts(strategy: str, **settings: Any) -> dict[str, float]:
    shape = shape_of_starter(WIDE, 1000)
    given = SftSettings(**{"tokens_per_step": 2048, "micro_tokens": 1024, **settings})
    return stage_memory(shape, given, strategy, dtype="float32", length=64, processes=4)  # type: ignore[arg-type]


def test_weights_gradients_and_averages_by_strategy() -> None:
    """In fp32, of P parameters: 4 P, 4 P and 8 P bytes; adapters learn A of them; ZeRO divides by 4 what its stage says."""
    shape = shape_of_starter(WIDE, 1000)
    count, learnt = shape.parameters, adapter_parameters(shape, 8)
    model = starter(1000, **WIDE.model_dump(), seed=0, ids={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    roles = AdapterRoles(model, ["policy"], rank=8)
    assert learnt == sum(p.numel() for p in roles.parameters() if p.requires_grad)
    mb = 2.0**20
    expected = {
        "full": (4 * count, 4 * count, 8 * count),
        "lora": (4 * count, 4 * learnt, 8 * learnt),
        "zero1": (4 * count, 4 * count, 2 * count),
        "zero2": (4 * count, count, 2 * count),
        "zero3": (count, count, 2 * count),
    }
    for strategy, sizes in expected.items():
        found = parts(strategy)
        assert [found[k] * mb for k in ("weights", "gradients", "optimizer")] == pytest.approx(sizes), strategy
    assert parts("qlora")["weights"] < 0.5 * parts("lora")["weights"]
    assert parts("full", optimizer="adamw8bit")["optimizer"] == pytest.approx(2.03 * count / mb)


@pytest.mark.parametrize(("adapter", "bases"), [("qlora", 1), ("ptuning", 2)])
def test_who_takes_part_in_ppo_on_a_packed_base(adapter: str, bases: int) -> None:
    """Base, reward model, and what answers: it shares packed weights with LoRA, and has a copy of them before a prefix."""
    shape = shape_of_starter(Starter(), 2048)
    values = {"adapter": adapter, "base_bits": 4, "dtype": "bfloat16", "reward_model": "judge"}
    settings = PpoSettings(model="m", data="d", out="o", **values)  # type: ignore[arg-type]
    strategy = footprint.own_strategy(settings)
    parts = stage_memory(shape, settings, strategy, dtype="bfloat16", length=64, processes=1)
    base = (shape.parameters - shape.tables) * 0.55 + shape.tables * 2
    embeddings = 2 * 2 * shape.head  # of the base and the reward model: looked up, so they stay in 32 bits
    assert parts["weights"] * 2**20 == pytest.approx(bases * base + 2 * shape.parameters + embeddings)


def test_activations_grow_with_tokens_and_layers() -> None:
    base = parts("full")["activations"]
    assert parts("full", micro_tokens=2048, tokens_per_step=4096)["activations"] == pytest.approx(2 * base)
    assert parts("full", activation_checkpointing=True)["activations"] < 0.6 * base


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral"])
def test_a_narrowed_probe_counts_as_the_real_one(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a token keeps in a layer is counted on a model half as wide, and scaled back."""
    make_tiny(family).save_pretrained(tmp_path)
    shape = shape_of_folder(str(tmp_path))
    assert shape is not None and shape.layers == 2
    exact = kept(shape, length=16, dtype="float32")
    monkeypatch.setattr(footprint, "WIDEST", 16)
    assert kept(shape, length=16, dtype="float32").layer == pytest.approx(exact.layer, rel=0.1)
    assert exact.layer > 4 * 32 * 8, "at least eight numbers a unit of width"


def test_what_does_not_fit_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "memory_here", lambda: 1.0)
    assert not any(r["fits"] for r in rows(tiny.recipe(tmp_path)).values())


# -- against what is measured ---------------------------------------------------------------------------------------------

SIZES = {
    "narrow": {"hidden_size": 256, "layers": 6, "heads": 8, "kv_heads": 4, "context": 1024},
    "wide": {"hidden_size": 512, "layers": 4, "heads": 8, "kv_heads": 4, "context": 1024},
}


def _stage_in_child(arguments: list[str], result: str) -> None:
    """Writes by how many MB a stage raises the memory of a process that has everything imported."""
    import peft
    import transformers

    assert peft and transformers.LlamaForCausalLM
    torch.set_num_threads(1)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    reset_peak_memory()
    assert run([*arguments, "--force"]) == 0
    Path(result).write_text(str(peak_memory_mb() - before))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("size", "settings"),
    [
        ("narrow", {"dtype": "float32", "micro_tokens": 4096, "tokens_per_step": 4096}),
        ("narrow", {"dtype": "bfloat16", "micro_tokens": 4096, "tokens_per_step": 4096}),
        ("wide", {"dtype": "bfloat16", "micro_tokens": 2048, "tokens_per_step": 2048}),
        ("wide", {"dtype": "float32", "micro_tokens": 1024, "tokens_per_step": 2048}),
    ],
)
def test_memory_is_within_a_tenth_of_the_measured_peak(size: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Over what Python and the imports take; a conversation has 102 tokens on average."""
    text = tiny.tokenizer()
    ids = {f"{n}_token_id": getattr(text, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    model = starter({"narrow": 2048, "wide": 8192}[size], **SIZES[size], seed=0, ids=ids)
    save_model(model, text, tmp_path / "model")
    rows = [{"messages": tiny.user(asked) + tiny.assistant(answer)} for asked, answer, _ in exchanges()]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    values = {"model": str(tmp_path / "model"), "data": str(data), "max_length": 512, "max_steps": 3, "save_every": 2}
    arguments = tiny.arguments("sft", tiny.stage("sft", tmp_path / "out", **values, **settings))
    measured = measured_peak(arguments, tmp_path)
    shape = shape_of_folder(str(tmp_path / "model"))
    assert shape is not None
    given = SftSettings(max_length=512, **settings)
    found = sum(stage_memory(shape, given, "full", dtype=settings["dtype"], length=102, processes=1).values())
    assert found == pytest.approx(measured, rel=0.1)


def exchanges() -> list[tuple[str, str, str]]:
    """Questions with two answers each."""
    rng = random.Random(0)

    def words(count: int) -> str:
        return " ".join(rng.choice(tiny.THINGS + tiny.COLOURS) for _ in range(count))

    counts = [rng.randint(20, 60) for _ in range(400)]
    return [(f"{i} {words(n)}", words(n), words(n + 2)) for i, n in enumerate(counts)]


def measured_peak(arguments: list[str], folder: Path) -> float:
    child = tiny._server().Process(target=_stage_in_child, args=(arguments, str(folder / "peak")))
    child.start()
    child.join(600)
    return float((folder / "peak").read_text())


# 48M parameters: the peak is two to five times what Python and the imports take.
TRUNK = {"hidden_size": 640, "layers": 10, "heads": 10, "kv_heads": 5, "context": 1024}
ROLLS = {"rollout": {"batch": 16, "max_new_tokens": 32}}
LORA = {"adapter": "lora"}
# Kind, settings, and mean tokens of a conversation, a comparison or a prompt.
WAYS = {
    "sft": ("sft", {}, 102),
    "lora": ("sft", LORA, 102),
    "qlora, 8 bits": ("sft", LORA | {"base_bits": 8}, 102),
    "qlora, 4 bits": ("sft", LORA | {"base_bits": 4}, 102),
    "p-tuning": ("sft", {"adapter": "ptuning"}, 102),
    "reward model": ("reward", {"min_accuracy": 0.0}, 157),
    "dpo": ("dpo", {}, 157),
    "ppo": ("ppo", ROLLS, 59),
    "ppo, one trunk": ("ppo", ROLLS | LORA, 59),
    "grpo": ("grpo", ROLLS | {"grpo": {"group_size": 4}}, 59),
    "grpo, natural": ("grpo", ROLLS | {"grpo": {"group_size": 4}, "optimizer": "natural"}, 59),
    "ppo, natural": ("ppo", ROLLS | {"optimizer": "natural"}, 59),
}


@pytest.fixture(scope="module")
def trunk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a reward model of its shape, and data for each kind of stage."""
    import transformers

    folder, text = tmp_path_factory.mktemp("trunk"), tiny.tokenizer()
    ids = {f"{n}_token_id": getattr(text, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    save_model(starter(8192, **TRUNK, seed=0, ids=ids), text, folder / "model")
    judge = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=1)
    torch.nn.init.normal_(judge.score.weight, std=0.02)
    judge.config.pad_token_id = text.pad_token_id
    save_model(judge, text, folder / "judge")
    asked = [(tiny.user(q), tiny.assistant(a), tiny.assistant(b)) for q, a, b in exchanges()]
    tiny.write_rows(folder / "sft.jsonl", [{"messages": q + a} for q, a, _ in asked])
    for kind in ("reward", "dpo"):
        tiny.write_rows(folder / f"{kind}.jsonl", [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in asked])
    for kind in ("ppo", "grpo"):
        tiny.write_rows(folder / f"{kind}.jsonl", [{"prompt": q} for q, _, _ in asked])
    return folder


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("way", WAYS)
def test_memory_of_every_way_is_within_a_tenth_of_its_peak(way: str, trunk: Path, tmp_path: Path) -> None:
    kind, changes, length = WAYS[way]
    values = {"model": str(trunk / "model"), "data": str(trunk / f"{kind}.jsonl"), "max_length": 512, "max_steps": 3}
    values |= {"dtype": "bfloat16", "micro_tokens": 2048, "tokens_per_step": 2048, "save_every": 2, **changes}
    values |= {"reward_model": str(trunk / "judge")} if kind in ("ppo", "grpo") else {}
    stage = tiny.stage(kind, tmp_path / "out", **values)
    shape, settings = shape_of_folder(str(trunk / "model")), parse(KINDS[kind], stage)
    assert shape is not None
    strategy = footprint.own_strategy(settings)
    planned = sum(stage_memory(shape, settings, strategy, dtype="bfloat16", length=length, processes=1).values())
    measured = measured_peak(tiny.arguments(kind, stage), tmp_path)
    print(f"{way}: planned {planned:.0f} MB, measured {measured:.0f}, {planned / measured - 1:+.1%}")
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"lora": {"target": ["q_proj", "down_proj"]}, "prefix": {"projection": True}}])
@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "ia3", "freeze", "ptuning", "prompt"])
def test_the_plan_counts_what_a_kind_of_adapter_trains(kind: str, options: dict[str, Any]) -> None:
    """Against the model itself, made with that adapter."""
    from danlu.models.adapters import adapter_roles, freeze_parts

    settings = SftSettings(adapter=kind, freeze={"layers": 1}, **options)  # type: ignore[arg-type]
    model = starter(1000, **WIDE.model_dump(), seed=0, ids={"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2})
    if kind == "freeze":
        freeze_parts(model, settings.freeze)
        trained = sum(p.numel() for p in model.model.layers.parameters() if p.requires_grad)
    else:
        roles = adapter_roles(model, ["policy"], settings, updates=10)
        trained = sum(p.numel() for p in roles.parameters() if p.requires_grad)
    assert learnt_parameters(shape_of_starter(WIDE, 1000), settings) == trained


def test_tuning_memory_by_adapter_and_bits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny.recipe(tmp_path)
    found = rows(path)["sft"]["tuning_mb"]
    on_few_bits = ("lora", "ptuning", "prompt")
    assert found.keys() == {"full", "freeze", "dora", "adalora", "ia3", *on_few_bits}
    assert all(list(b) == (["16", "8", "4"] if kind in on_few_bits else ["16"]) for kind, b in found.items())
    own = rows(path, "sft.adapter=ptuning", "sft.base_bits=4")["sft"]
    assert own["memory_mb"] == pytest.approx(own["tuning_mb"]["ptuning"]["4"])
    assert run(["plan", str(path)]) == 0
    assert "adalora" in capfd.readouterr().err
    wide = ["pretrain.starter.hidden_size=1024", "sft.dtype=bfloat16"]
    found = rows(path, *wide)["sft"]["tuning_mb"]
    assert found["lora"]["16"] > found["lora"]["8"] > found["lora"]["4"] and found["full"]["16"] > found["lora"]["16"]


GIB = 1024.0


def test_what_chatglm_and_moss_promised() -> None:
    """ChatGLM-6B answers in 13, 8 to 10 and 6 GB; MOSS-16B loads in 31 and 16 GB. By their shapes alone, in GiB.

    Of ChatGLM-6B embedding and head are 2 * 130,528 * 4,096 = 1.07e9 of 6.71e9 parameters and keep 8 bits: 13.4e9 bytes are
    12.5 GiB; 6.71e9 are 6.2; 5.64e9 * 0.578 + 1.07e9 are 4.0; the cache of 2,048 tokens has 0.875, and libraries 0.07.
    """
    families()
    glm = footprint._shape(ChatGLMConfig())
    assert (glm.parameters, glm.tables) == (6_707_929_088, 2 * 130_528 * 4096)
    total = {bits: sum(footprint.inference_memory(glm, bits).values()) / GIB for bits in (16, 8, 4)}
    assert total[16] == pytest.approx(13.0, abs=0.5) and total[8] <= 10.0 and total[4] <= 6.0
    assert (total[8], total[4]) == (pytest.approx(7.2, abs=0.1), pytest.approx(5.0, abs=0.1))
    packed = footprint._shape(ChatGLMConfig(quantization_bit=4))
    assert packed.parameters == glm.parameters
    moss = footprint._shape(
        CodeGenConfig(vocab_size=107_008, n_ctx=2048, n_positions=2048, n_embd=6144, n_layer=34, n_head=24)
    )
    weights = {bits: footprint.inference_memory(moss, bits)["weights"] / GIB for bits in (16, 8, 4)}
    assert weights[16] == pytest.approx(31.1, abs=0.1) and weights[8] == pytest.approx(15.6, abs=0.1)
    # Its 7.8 GB are a quarter of 31, which leaves nothing for scales: here groups have them with zeros (+1.1), and embedding
    # and head keep 8 bits (+0.6).
    assert weights[16] / 4 == pytest.approx(7.8, abs=0.05) and weights[4] == pytest.approx(9.5, abs=0.1)


def test_p_tuning_of_chatglm_on_a_packed_base() -> None:
    """Four bits take less than half of eight's layers; tables stay in 32 bits while training."""
    families()
    glm = footprint._shape(ChatGLM2Config(multi_query_attention=True, multi_query_group_num=2))
    assert glm.key_values == 2 * 28 * 2 * 128
    found = {}
    for bits in (16, 8, 4):
        settings = SftSettings(model="x", data="x", adapter="ptuning", base_bits=bits)
        assert learnt_parameters(glm, settings) == settings.prefix.tokens * glm.key_values
        found[bits] = stage_memory(glm, settings, "prefix", dtype="float32", length=128, processes=1)["weights"] / GIB
    layers, tables = (glm.parameters - glm.tables) / 2**30, glm.tables * 4 / 2**30
    assert found[16] == pytest.approx(4 * layers + tables)
    assert found[8] == pytest.approx(1.02 * layers + tables) and found[4] == pytest.approx(0.55 * layers + tables)
