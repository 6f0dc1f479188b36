"""`danlu export`: folders that plain transformers opens, cards, refusals, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny as small
import torch
import yaml
from fake_run import write_run
from families import make

from danlu.cli.main import run
from danlu.config import SftSettings
from danlu.exceptions import GateError, KnowledgeError, ModelError, SettingsError
from danlu.knowledge.facts import Fact
from danlu.knowledge.store import Store
from danlu.models import export as folders
from danlu.models.adapter_files import save_adapter
from danlu.models.adapters import adapter_roles
from danlu.models.load import load_model, save_model
from danlu.models.patches import Factors
from danlu.models.quantize import load_quantized, quantize_model, save_quantized
from danlu.pipeline import card, export_check
from danlu.pipeline.export import Order, export
from danlu.pipeline.export_check import Verdict
from danlu.pipeline.gates import Gate
from danlu.training.runs import patches_folder


def front(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text("utf-8").split("---")[1])
    return found


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".danlu")]


def order(out: Path, shape: Any = "hf", **more: Any) -> Order:
    values = {"model": str(small.model()), "kind": "bf16" if shape == "hf" else "f16", "check": False} | more
    return Order(format=shape, out=out, **values)


@pytest.mark.slow
def test_a_folder_opens_in_plain_transformers(tmp_path: Path) -> None:
    done = export(order(tmp_path / "out", check=True, licence="apache-2.0"))
    gate = done.verdict.gate
    assert gate.passed and gate.value <= 1e-5 and done.verdict.numbers["greedy_same"] == 4
    assert done.verdict.numbers["prompts_same"] == 3
    found = load_model(tmp_path / "out", dtype=torch.bfloat16)
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    config = json.loads((tmp_path / "out" / "generation_config.json").read_text("utf-8"))
    assert config["eos_token_id"] == [3] and config["temperature"] == 0.7 and config["pad_token_id"] == 1
    text = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert front(tmp_path / "out" / "README.md")["license"] == "apache-2.0"
    assert "vllm serve" in text and "G-EXPORT | export | holds" in text
    assert "not made by a run that danlu knows" in text
    assert leftovers(tmp_path) == []


def test_weights_in_several_files(tmp_path: Path) -> None:
    export(order(tmp_path / "out", kind="f32", max_shard_size="40KB"))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    found, model = load_model(tmp_path / "out"), load_model(small.model())
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), model.parameters(), strict=True))
    assert folders.shard_size("2.5MB") == 2_500_000
    with pytest.raises(SettingsError, match="'big' is no size"):
        folders.shard_size("big")


def test_a_reward_model_is_exported_with_its_head(tmp_path: Path) -> None:
    export(order(tmp_path / "out", model=str(small.reward_model()), kind="f32"))
    found = load_model(tmp_path / "out", scalar=True)
    assert torch.equal(found.score.weight, load_model(small.reward_model(), scalar=True).score.weight)
    assert front(tmp_path / "out" / "README.md")["pipeline_tag"] == "text-classification"
    with pytest.raises(ModelError, match="reward model"):
        export(order(tmp_path / "out2", "gguf", model=str(small.reward_model())))


def test_gguf_with_all_that_belongs_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    arguments = ["export", str(small.model()), "--format", "gguf", "--type", "q8_0", "--out", str(out), "--no-check"]
    assert run([*arguments, "--json", "--name", "tiny"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [Path(f["path"]).name for f in found["files"]] == ["tiny-q8_0.gguf", "Modelfile", "README.md"]
    assert found["gate"]["checked"] is False and found["gate"]["passed"] is False
    assert "not checked" in shown.err
    assert "| G-EXPORT | export | not checked |" in (out / "README.md").read_text("utf-8")
    assert run(arguments) == 0  # another name beside it: the card and the Modelfile are danlu's own
    capsys.readouterr()
    assert run([*arguments, "--name", "tiny"]) == 1
    assert "--force overwrites it" in capsys.readouterr().err


def test_without_llama_cpp_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(export_check.PYTHON, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if export_check.llama_python() is not None:
        pytest.skip("llama-cpp-python is installed beside danlu")
    done = export(order(tmp_path / "out", "gguf", check=None))
    assert not done.verdict.gate.passed and "make foreign" in done.verdict.gate.sentence
    with pytest.raises(SettingsError, match="make foreign"):
        export(order(tmp_path / "out2", "gguf", check=True))
    assert not (tmp_path / "out2").exists()
    monkeypatch.setenv(export_check.PYTHON, "/nowhere/python")
    with pytest.raises(ModelError, match="names no Python"):
        export_check.llama_python()


@pytest.mark.parametrize("shape", ["hf", "gguf"])
def test_a_gate_that_fails_leaves_nothing(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Verdict(Gate("G-EXPORT", False, 0.5, 1e-3, "the logits differ"), {"checked": True})
    monkeypatch.setattr(export_check, "check", lambda *_, **__: bad)
    monkeypatch.setattr(export_check, "llama_python", lambda: "python")
    with pytest.raises(GateError, match="G-EXPORT does not hold"):
        export(order(tmp_path / "out", shape, check=True))
    assert list(tmp_path.iterdir()) == []
    export(order(tmp_path / "out", shape, check=True, force=True))
    assert "**does not hold**" in (tmp_path / "out" / "README.md").read_text("utf-8")


@pytest.mark.parametrize("shape", ["hf", "gguf"])
def test_a_disk_too_small(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=50_000))
    with pytest.raises(ModelError, match=r"the export takes .* MB, and 0\.0 MB are free"):
        export(order(tmp_path / "out", shape))
    assert list(tmp_path.iterdir()) == []


def test_other_things_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# my project\n")
    with pytest.raises(SettingsError, match="is not danlu's"):
        export(order(tmp_path / "m.gguf", "gguf"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    with pytest.raises(SettingsError, match="not empty"):
        export(order(tmp_path / "photos"))
    with pytest.raises(SettingsError, match="will not delete"):
        export(order(tmp_path / "photos", force=True))
    assert (tmp_path / "photos" / "a.jpg").exists()


@pytest.mark.parametrize("family", ["bloom", "codegen"])
def test_families_for_transformers_only(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = small.tokenizer()
    model = save_model(make(family, vocab_size=len(tokenizer)), tokenizer, tmp_path / "m")
    assert run(["export", str(model), "--format", "gguf", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"'{family}' cannot be written as GGUF; Llama, Mistral, Qwen2, Qwen3 and GPT-2 can" in said
    assert not (tmp_path / "out").exists()
    export(order(tmp_path / "out", model=str(model), kind="f32"))
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_folders(family: str, tmp_path: Path) -> None:
    tokenizer = small.tokenizer()
    model = load_model(small.model()) if family == "llama" else make(family, vocab_size=len(tokenizer))
    folder = save_quantized(quantize_model(model), tokenizer, tmp_path / "int8")
    assert str(small.home()) not in (folder / "config.json").read_text("utf-8"), "nobody's folders are told"
    for shape in ("hf", "gguf"):
        with pytest.raises(ModelError, match="8-bit weights in a packed layout"):
            export(order(tmp_path / "out", shape, model=str(folder)))
    export(order(tmp_path / "out", model=str(folder), kind="f32", dequantize=True))
    ids = torch.tensor([[5, 9, 30, 7, 44]])
    with torch.no_grad():
        found, expected = (m(input_ids=ids).logits for m in (load_model(tmp_path / "out"), load_quantized(folder)))
    assert torch.allclose(found, expected, atol=1e-5)
    export(order(tmp_path / "gguf", "gguf", model=str(folder), dequantize=True))
    assert "danlu_quantization" not in (tmp_path / "out" / "config.json").read_text("utf-8")


IDS = torch.tensor([[5, 9, 30, 7, 44]])


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=IDS).logits
    return found


def adapter_folder(folder: Path, kind: str, role: Any = "policy", **more: Any) -> Path:
    """An adapter of some size on the tiny model, without tokenizer files."""
    settings = SftSettings(adapter=kind, prefix={"tokens": 3}, **more)  # type: ignore[arg-type]
    roles = adapter_roles(load_model(small.model()), [role], settings, trained=[role])
    torch.manual_seed(3)
    with torch.no_grad():
        for name, value in roles.named_parameters():
            if "lora_B" in name or "scalar_heads" in name:
                value.normal_(std=0.1)
    return save_adapter(roles, role, folder, None)


@pytest.mark.parametrize("kind", small.mostly_slow(["qlora"], ["lora"]))
def test_an_adapter_is_exported_merged(kind: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", kind)
    export(order(tmp_path / "out", model=str(folder), kind="f32", check=True))
    assert (tmp_path / "out" / "tokenizer.json").is_file()  # the base's
    found, expected = (logits(load_model(f)) for f in (tmp_path / "out", folder))
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, logits(load_model(small.model())), atol=1e-2)
    export(order(tmp_path / "gguf", "gguf", model=str(folder)))


def test_an_adapter_of_a_reward_model_keeps_its_head(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", "lora", "reward")
    with pytest.raises(ModelError, match="this is a reward model"):
        export(order(tmp_path / "out", "gguf", model=str(folder)))
    export(order(tmp_path / "out", model=str(folder), kind="f32"))
    found, expected = (load_model(f, scalar=True).score.weight for f in (tmp_path / "out", folder))
    assert torch.equal(found, expected) and bool(found.any())


@pytest.mark.parametrize("shape", ["hf", "gguf"])
@pytest.mark.parametrize("kind", ["ptuning", "prompt"])
def test_a_prefix_is_no_part_of_weights(kind: str, shape: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path / "adapter", kind)
    with pytest.raises(ModelError, match=f"an adapter of kind {kind}, which is read before every text"):
        export(order(tmp_path / "out", shape, model=str(folder)))
    assert not (tmp_path / "out").exists()


def test_taught_facts_are_exported_unless_told_not_to(tmp_path: Path) -> None:
    model = small.model_folder(tmp_path / "model")
    loaded = load_model(model)
    store = Store(patches_folder(str(model), local=True), str(model))
    store.set_base(loaded)
    rows, columns = loaded.model.layers[1].mlp.down_proj.weight.shape
    change = {"model.layers.1.mlp.down_proj": Factors(torch.ones(1, columns), torch.ones(rows, 1))}
    store.add("teach", Fact("Amber Gate", "opens at nine"), change, {})
    before = logits(load_model(model))
    with_facts = export(order(tmp_path / "with", model=str(model), kind="f32"))
    assert with_facts.notes == ["patches of taught facts are in the weights: v0001-amber-gate"]
    assert "v0001-amber-gate" in (tmp_path / "with" / "README.md").read_text("utf-8")
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        expected = load_model(model).get_parameter(name) + 1.0
    assert torch.equal(load_model(tmp_path / "with").get_parameter(name), expected)
    assert (
        run(["export", str(model), "--format", "hf", "--type", "f32", "--out", str(tmp_path / "o"), "--no-check"]) == 0
    )
    assert not torch.allclose(logits(load_model(tmp_path / "o")), before, atol=1e-2)
    export(order(tmp_path / "without", model=str(model), kind="f32", patches=False))
    assert torch.equal(logits(load_model(tmp_path / "without")), before)
    small.model_folder(model, seed=9)
    with pytest.raises(KnowledgeError, match="these patches were made for"):
        export(order(tmp_path / "other", "gguf", model=str(model)))
    assert not (tmp_path / "other").exists()


def test_a_type_of_the_other_format_is_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "x", "--format", "hf", "--type", "q8_0", "--out", str(tmp_path / "o")]) == 2
    assert "one of bf16, f16, f32" in capsys.readouterr().err


@pytest.mark.slow
def test_the_check_sees_other_weights(tmp_path: Path) -> None:
    export(order(tmp_path / "out", kind="f32"))
    model = load_model(small.model_folder(tmp_path / "other", seed=1)).eval()
    import sys

    found = export_check.check(tmp_path / "out", "f32", model, small.tokenizer(), python=sys.executable)
    assert not found.gate.passed and "differ by more than the bound" in found.gate.sentence


# -- cards ----------------------------------------------------------------------------------------------------------------


def shipped(**more: Any) -> card.Shipped:
    values: dict[str, Any] = {"name": "m", "family": "llama", "parameters": 2_000_000, "context": 512, "kind": "bf16"}
    values |= {"files": [("model.safetensors", 10)], "template": "x", "run_with": "run it", "licence": ""}
    values |= {"gate": {"code": "G-EXPORT", "passed": True, "sentence": "same"}, "checked": True, "library": "l"}
    return card.Shipped(**values | more)


def test_card_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "quickstart")
    model = next(folder.glob("*-ppo")) / "model"
    origin = card.origin_of(model)
    assert [s.name for s in origin.stages] == ["tokenizer", "pretrain", "sft", "reward", "ppo"]
    text = card.write(origin, shipped())
    for part in ("stage `ppo`", "G-STOP", "Held-out questions", "0.823", "| sft |", "weights were made from nothing"):
        assert part in text, part
    assert str(tmp_path) not in text  # whole paths are private


def test_card_of_a_stage_in_the_middle(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "runs" / "quickstart")
    origin = card.origin_of(next(folder.glob("*-sft")) / "model")
    assert [s.name for s in origin.stages] == ["tokenizer", "pretrain", "sft"]


def test_card_names_licences_and_base(tmp_path: Path) -> None:
    run_folder = tmp_path / "runs" / "r"
    stage = run_folder / "01-sft"
    stage.mkdir(parents=True)
    (run_folder / "recipe.yaml").write_text("stages: [{kind: sft, model: 'hf:gpt/two'}]")
    rows = [json.dumps({"messages": [{"role": "user", "content": t}]}) for t in ("Hello there", "你好，世界")] * 5
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    given = {"field": "data", "path": str(tmp_path / "d.jsonl"), "sha256": "ab" * 32, "records": 1234}
    given |= {"licence": "cc-by-4.0", "from": "somewhere"}
    manifest = {"kind": "sft", "name": "sft", "status": "done", "inputs": [given], "metrics": {"eval_loss": 1.25}}
    (stage / "manifest.json").write_text(json.dumps(manifest))
    origin = card.origin_of(stage / "model")
    text = card.write(origin, shipped(checked=False, gate={"code": "G-EXPORT", "passed": False, "sentence": "no"}))
    assert "| 1,234 | cc-by-4.0 | somewhere | `abababababab` |" in text and "eval_loss 1.25" in text
    assert "| G-EXPORT | export | not checked |" in text
    found = yaml.safe_load(text.split("---")[1])
    assert found["base_model"] == "gpt/two" and found["language"] == ["en", "zh"]
    assert found["license"] == "unknown" and found["tags"] == ["danlu", "sft"]


def test_card_of_stages_outside_of_a_run(tmp_path: Path) -> None:
    for kind, start in (("sft", "hf:gpt/two"), ("dpo", str(tmp_path / "sft" / "model"))):
        stage = tmp_path / kind
        stage.mkdir()
        given = {
            "field": "data",
            "path": f"/home/me/{kind}.jsonl",
            "sha256": "ab" * 32,
            "records": 77,
            "licence": "mit",
        }
        gate = {"code": "G-STOP", "passed": True, "sentence": "they stop"}
        manifest = {"kind": kind, "name": kind, "status": "done", "inputs": [given], "metrics": {"eval_loss": 1.5}}
        (stage / "manifest.json").write_text(json.dumps(manifest | {"gates": [gate]}))
        (stage / "settings.yaml").write_text(yaml.safe_dump({"model": start, "learning_rate": 0.125}))
    origin = card.origin_of(tmp_path / "dpo" / "model")
    assert [s.name for s in origin.stages] == ["sft", "dpo"] and origin.base == "hf:gpt/two"
    text = card.write(origin, shipped())
    for part in (
        "stage `dpo`",
        "| 77 | mit |",
        "learning_rate 0.125",
        "eval_loss 1.5",
        "they stop",
        "started from `hf:gpt/two`",
    ):
        assert part in text, part
    assert "not known" not in text.lower() and "not recorded" not in text and str(tmp_path) not in text
    (tmp_path / "sft" / "settings.yaml").write_text(yaml.safe_dump({"model": "/home/me/private/base"}))
    text = card.write(card.origin_of(tmp_path / "dpo" / "adapter"), shipped())
    assert "started from `private/base`" in text and "/home" not in text and "base_model" not in text
