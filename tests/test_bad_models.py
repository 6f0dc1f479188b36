"""Model folders with a fault: each is told in a sentence with exit status 1, by every verb that opens one and by `danlu.load`."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import make
from originals import original
from safetensors.torch import load_file, save_file
from seq2seq_models import VOCAB, tokenizer

import danlu
from danlu.cli.main import run
from danlu.exceptions import ModelError
from danlu.models.glm import BlankGlmForConditionalGeneration
from danlu.models.glm_config import BlankGlmConfig
from danlu.models.load import load_model, save_model

KINDS = ("llama", "t5", "glm", "chatglm_v1", "chatglm2", "moss")
Harm = Callable[[Path], str]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A whole folder of a kind, made once."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            path = tmp_path_factory.mktemp("healthy") / kind
            ids = {"vocab_size": VOCAB, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
            if kind == "llama":
                save_model(make("llama", **ids), tokenizer(), path)
            elif kind == "t5":
                import seq2seq_models

                seq2seq_models.folder(path, "t5")
            elif kind == "glm":
                size = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "max_sequence_length": 64}
                config = BlankGlmConfig(**size, **ids, sop_token_id=3, eop_token_id=1, mask_token_ids=[2])
                save_model(BlankGlmForConditionalGeneration(config), tokenizer(), path)
            else:
                shutil.copytree(original(kind), path, copy_function=shutil.copyfile)
                path.chmod(0o755)
                config = json.loads((path / "config.json").read_text("utf-8"))
                config.pop("auto_map", None)
                (path / "config.json").write_text(json.dumps(config), "utf-8")
            made[kind] = path
        return made[kind]

    return folder


@pytest.fixture
def copy(healthy: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(healthy(kind), tmp_path / kind))


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values), "utf-8")


def unknown_family(folder: Path) -> str:
    change(folder, model_type="mystery")
    return "'mystery' is a family that neither danlu nor transformers knows\n  -> danlu loads LLaMA, OPT, BLOOM"


def remote_code(folder: Path) -> str:
    change(folder, model_type="mystery", auto_map={"AutoModelForCausalLM": "modeling_mystery.Mystery"})
    (folder / "modeling_mystery.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')\n", "utf-8")
    return "knows; its folder wants to run code of its own, which danlu never does"


def missing_shard(folder: Path) -> str:
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    where: dict[str, str] = {}
    for part in range(3):
        name = f"model-{part + 1:05d}-of-00003.safetensors"
        own = {n: t for i, (n, t) in enumerate(sorted(state.items())) if i % 3 == part}
        save_file(own, folder / name, {"format": "pt"})
        where |= dict.fromkeys(own, name)
    (folder / "model-00002-of-00003.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}), "utf-8")
    return "1 of 3 weight files are missing, the first is model-00002-of-00003.safetensors"


def other_shape(folder: Path) -> str:
    """A matrix of the last layer has a row too few."""
    state = load_file(folder / "model.safetensors")
    layers = [n for n, t in state.items() if t.dim() == 2 and ("mlp" in n or "DenseReluDense" in n)]
    name = max(layers)
    rows, columns = state[name].shape
    state[name] = state[name][:-1].clone()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return f"{name} has the shape [{rows - 1}, {columns}] in the weights, and config.json asks for [{rows}, {columns}]"


def cut_short(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "model.safetensors: the file is cut short or damaged"


def other_tokenizer(folder: Path) -> str:
    for name in (
        "ice_text.model",
        "tokenizer.model",
        "tokenizer.json",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
    ):
        (folder / name).unlink(missing_ok=True)
    larger = tokenizer()
    larger.add_tokens([f"<new {i}>" for i in range(3000)])
    larger.save_pretrained(folder)
    return "tokens and the model's embedding"


def told(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    capfd.readouterr()
    status = run(arguments)
    said = capfd.readouterr().err
    assert status == 1, said
    assert "Traceback" not in said
    return said


def verbs(folder: Path, where: Path) -> dict[str, list[str]]:
    turns = [{"role": "user", "content": "the door?"}, {"role": "assistant", "content": "red"}]
    (where / "rows.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 4, "utf-8")
    (where / "text.jsonl").write_text(json.dumps({"text": "the cat sat"}) + "\n", "utf-8")
    return {
        "chat": ["chat", str(folder), "--prompt", "hello"],
        "sft": ["sft", "--model", str(folder), "--data", str(where / "rows.jsonl"), "--out", str(where / "out")],
        "convert": ["convert-model", str(folder), str(where / "plain")],
        "base": ["base", str(folder), "--text", str(where / "text.jsonl")],
    }


HARMS: tuple[Harm, ...] = (unknown_family, remote_code, missing_shard, other_shape, cut_short, other_tokenizer)


@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_in_says_what_is_wrong(
    kind: str, harm: Harm, copy: Callable[[str], Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """`danlu.load` always; of the commands one, which is another for the next family and for the next harm."""
    folder = copy(kind)
    words = harm(folder)
    with pytest.raises(ModelError) as caught:
        danlu.load(folder)
    assert words in str(caught.value) and str(folder) in str(caught.value)
    commands = verbs(folder, tmp_path)
    verb = list(commands)[(KINDS.index(kind) + HARMS.index(harm)) % len(commands)]
    assert words in told(commands[verb], capfd), verb
    assert not (folder / "was-run").exists() and not (tmp_path / "plain").exists()


@pytest.fixture
def adapter(healthy: Callable[[str], Path], tmp_path: Path) -> Path:
    """A LoRA of the healthy LLaMA, as PEFT saves it."""
    from peft import LoraConfig, get_peft_model

    base = load_model(healthy("llama"))
    with warnings.catch_warnings():  # peft 0.21 reads an attribute that transformers 5.23 renamed
        warnings.simplefilter("ignore", FutureWarning)
        made = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        made.peft_config["default"].base_model_name_or_path = str(healthy("llama"))
        made.save_pretrained(str(tmp_path / "adapter"))
    return tmp_path / "adapter"


def test_an_adapter_is_told_from_a_model(adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Where a model is run, its base is looked for; where a whole model is wanted, it is refused."""
    assert danlu.load(adapter).tokenizer is not None
    work = verbs(adapter, tmp_path)
    for verb in ("convert", "base"):
        said = told(work[verb], capfd)
        assert f"{adapter}: this folder is an adapter, and a whole model is needed" in said and "danlu merge" in said
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = str(tmp_path / "gone" / "base")
    (adapter / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    tokenizer().save_pretrained(adapter)
    words = f"{adapter}: this folder is an adapter, and its base is not there: {tmp_path / 'gone' / 'base'}"
    with pytest.raises(ModelError) as caught:
        danlu.load(adapter)
    assert words in str(caught.value)
    for verb in ("chat", "sft"):
        assert words in told(work[verb], capfd), verb


def test_an_adapter_that_is_cut_short_is_named(
    adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    words = "adapter_model.safetensors: the file is cut short or damaged"
    with pytest.raises(ModelError, match=words):
        danlu.load(adapter)
    for verb in ("chat", "sft"):
        assert words in told(verbs(adapter, tmp_path)[verb], capfd), verb


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "LOHA"}, "PEFT's 'LOHA' adapters are not supported"),
        ({"trainable_token_indices": [3, 9]}, "trains single tokens of the embedding"),
    ],
)
def test_kinds_of_adapters_that_are_not_known_are_named(
    change: dict[str, Any], words: str, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    (adapter / "adapter_config.json").write_text(json.dumps(config | change), "utf-8")
    with pytest.raises(ModelError, match=words):
        danlu.load(adapter)
    assert words in told(verbs(adapter, tmp_path)["chat"], capfd)
