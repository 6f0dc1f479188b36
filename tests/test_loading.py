"""Loading of published folders: shards, pickles, what is refused and how, and that nothing in a folder is run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny
from safetensors.torch import load_file, save_file
from tiny import tokenizer as own_tokenizer

import danlu
from danlu.cli.main import run
from danlu.exceptions import ModelError
from danlu.models import load as loading
from danlu.models.load import check_tokenizer, load_model, save_model
from danlu.models.registry import families, family_of
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.training.step import language_loss
from danlu.tree import TreeBatch, conversation, forest

IDS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(make_tiny("llama"), None, tmp_path_factory.mktemp("loading") / "llama")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({k: v for k, v in (config | values).items() if v is not None}), "utf-8")


def shard(folder: Path, suffix: str, dtype: torch.dtype = torch.float32) -> dict[str, str]:
    """The folder's weights in three files with an index; the names of its parameters and their files."""
    state = {n: t.to(dtype) for n, t in load_file(folder / "model.safetensors").items()}
    (folder / "model.safetensors").unlink()
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    weight_map = {}
    for part in range(3):
        name = f"{stem}-{part + 1:05d}-of-00003.{suffix}"
        own = {n: t for i, (n, t) in enumerate(sorted(state.items())) if i % 3 == part}
        save_file(own, folder / name, {"format": "pt"}) if suffix == "safetensors" else torch.save(own, folder / name)
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index), "utf-8")
    return weight_map


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards_with_an_index(folder: Path, copy: Path, suffix: str) -> None:
    expected = load_model(folder)
    weight_map = shard(copy, suffix)
    loaded = load_model(copy)
    assert all(loaded.state_dict()[n].equal(t) for n, t in expected.state_dict().items())
    lost = sorted(set(weight_map.values()))[1]
    (copy / lost).unlink()
    with pytest.raises(ModelError, match=f"1 of 3 weight files are missing, the first is {lost}"):
        load_model(copy)


def test_half_precision_pickle(folder: Path, copy: Path) -> None:
    shard(copy, "bin", torch.float16)
    loaded = load_model(copy)
    assert loaded.dtype == torch.float32
    with torch.no_grad():
        assert (loaded(IDS).logits - load_model(folder)(IDS).logits).abs().max() < 0.05


def test_gpt2_as_published_can_be_trained(tmp_path: Path) -> None:
    """Its configuration says 0.1, which token trees would refuse."""
    model = load_model(save_model(make_tiny("gpt2", attn_pdrop=0.1), None, tmp_path / "m")).train()
    root = RootModel(SeparateModels({"policy": model}, ["policy"])).train()
    tree = TreeBatch.of(forest([conversation([3, 4, 5], [1.0] * 3)]))
    root(tree, "policy", lambda out: language_loss(out, 3.0))[0].backward()


# -- what is refused -----------------------------------------------------------------------------------------------------


class _Malicious:
    """A pickle that writes a file when it is read as pickles are."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.path}'",))


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_malicious_pickle_is_refused_and_not_run(
    copy: Path, tmp_path: Path, zipped: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "it-was-run"
    weights = {**load_file(copy / "model.safetensors"), "extra": _Malicious(mark)}
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert run(["eval", str(copy), "--data", "x.jsonl"]) == 1
    capfd.readouterr()
    with pytest.raises(ModelError, match=r"refused: it wants to run posix\.system, which reading weights never needs"):
        load_model(copy)
    assert not mark.exists()


def test_a_bare_pickle_is_refused(copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it-was-run"
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(pickle.dumps(_Malicious(mark)))
    with pytest.raises(ModelError, match=r"refused: it wants to run posix\.system"):
        load_model(copy)
    assert not mark.exists()


@pytest.mark.parametrize("share", [0.5, 0.0001])
def test_a_truncated_file_is_named(copy: Path, share: float) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: max(4, int(len(content) * share))])
    with pytest.raises(ModelError, match=r"model\.safetensors: the file is cut short or damaged"):
        load_model(copy)


def test_a_truncated_pickle_is_named(copy: Path) -> None:
    torch.save(load_file(copy / "model.safetensors"), copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    content = (copy / "pytorch_model.bin").read_bytes()
    (copy / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match=r"pytorch_model\.bin: the file is cut short or damaged"):
        load_model(copy)


def test_a_pointer_of_git_lfs_is_told(copy: Path) -> None:
    (copy / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="a Git LFS pointer, not the weights"):
        load_model(copy)


def test_no_weights_at_all(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights in this folder \(found: config.json"):
        load_model(copy)


def test_a_shape_that_does_not_fit_is_named_with_both(copy: Path) -> None:
    change(copy, intermediate_size=40)
    message = r"layers\.0\.mlp\.down_proj\.weight has the shape \[32, 48\] in the weights, and config.json asks for \[32, 40\]"
    with pytest.raises(ModelError, match=message):
        load_model(copy)


def test_missing_parameters_are_counted(copy: Path) -> None:
    change(copy, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"9 parameters are missing .* model\.layers\.2\.input_layernorm\.weight"):
        load_model(copy)


def test_an_unknown_family_is_named(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change(copy, model_type="mystery")
    with pytest.raises(
        ModelError, match=r"'mystery' is a family that neither.*knows\n.*LLaMA, OPT.*MOSS, CPM-1"
    ) as caught:
        load_model(copy)
    assert "code" not in caught.value.message
    change(copy, auto_map={"AutoModelForCausalLM": "modeling_mystery.Mystery"})
    with pytest.raises(ModelError, match="wants to run code of its own, which danlu never does"):
        load_model(copy)
    assert run(["convert-model", str(copy), str(copy / "plain")]) == 1
    assert "'mystery'" in capfd.readouterr().err
    change(copy, model_type=None)
    with pytest.raises(ModelError, match=r"config\.json has no model_type"):
        load_model(copy)


def test_a_model_of_another_trade_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}', "utf-8")
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="'vit' is no language model that answers in text"):
        load_model(tmp_path)


def test_a_model_of_pictures_is_named(tmp_path: Path) -> None:
    from transformers import LlavaConfig

    LlavaConfig().save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"'llava' reads pictures, too(.|\n)*take the 'llama' model"):
        load_model(tmp_path)


def test_code_in_a_folder_is_noted_once_and_never_run(copy: Path, capfd: pytest.CaptureFixture[str]) -> None:
    change(copy, auto_map={"AutoModelForCausalLM": "modeling_llama.Evil", "AutoConfig": "modeling_llama.EvilConfig"})
    (copy / "modeling_llama.py").write_text(f"open({str(copy / 'ran')!r}, 'w')\n", "utf-8")
    loading._note_code.cache_clear()
    for _ in range(2):
        assert type(load_model(copy)).__name__ == "LlamaForCausalLM"
    assert capfd.readouterr().err.count("names code of its own (auto_map), which is not run") == 1
    assert not (copy / "ran").exists()


def test_a_tokenizer_of_another_model_is_refused(copy: Path) -> None:
    tokenizer = own_tokenizer()
    with pytest.raises(
        ModelError, match=rf"the tokenizer has {len(tokenizer)} tokens and the model's embedding 61 rows"
    ):
        check_tokenizer(load_model(copy), tokenizer, copy)
    tokenizer.save_pretrained(copy)
    with pytest.raises(ModelError, match="the tokenizer is of another model"):
        danlu.load(copy)


def test_families_are_told_by_their_configuration() -> None:
    assert len({family.name for family in families()}) == len(families())
    for config, name in (
        ({"model_type": "moss"}, "MOSS"),
        ({"model_type": "cpm2"}, "CPM-1 and CPM-2"),
        ({"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2, "vocab_size": 9, "max_sequence_length": 8}
         | {"layernorm_epsilon": 1e-5}, "CPM-1 and CPM-2"),
        ({"d_model": 8, "do_dim_trick": False}, "CPM-1 and CPM-2"),
    ):  # fmt: skip
        found = family_of(config)
        assert found is not None and found.name == name
    for kind in ("llama", "codegen", "gpt2", "t5"):
        assert family_of({"model_type": kind}) is None
