"""Adapters merged into their base: against the adapter itself, and task arithmetic by hand."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import tiny
import torch
from families import make
from torch import Tensor

from danlu import assistant
from danlu.cli.chat import Conversation
from danlu.cli.main import run
from danlu.config import SftSettings
from danlu.models.adapter_files import load_adapted, save_adapter
from danlu.models.adapters import adapter_roles
from danlu.models.load import load_model, save_model
from danlu.models.merging import combined, probe
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.tree import TreeBatch, branches


def adapter(
    folder: Path, base: Path, kind: str = "lora", *, seed: int = 1, noise: float = 0.05, **options: Any
) -> Path:
    """A folder of an adapter with random weights."""
    settings = SftSettings(adapter=kind, adalora={"initial_r": 3, "target_r": 2}, **options)  # type: ignore[arg-type]
    roles = adapter_roles(load_model(base), ["policy"], settings, updates=20)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in roles.parameters():
            if parameter.requires_grad:
                parameter.add_(noise * torch.randn(parameter.shape, generator=draw))
    return save_adapter(roles, "policy", folder, tiny.tokenizer())


@torch.no_grad()
def read(model: Any) -> Tensor:
    """Logits of a model that may have an engine already."""
    tree = TreeBatch.of(branches([5, 9, 30], [[7, 8, 44, 12]]))
    root = RootModel(SeparateModels({"policy": model}, []))
    found: Tensor = root(tree, "policy", lambda out: out.logits(torch.arange(7)))
    return found


def test_ties_by_hand() -> None:
    # Kept are the two largest of four: [4, 0, -3, 0] and [-2, 0, 0, 5]. Signs: 4 - 2 > 0, -, +; those that agree are averaged.
    given = [torch.tensor([4.0, 1.0, -3.0, 0.5]), torch.tensor([-2.0, 1.0, 0.1, 5.0])]
    assert combined(given, [1.0, 1.0], "ties", density=0.5).tolist() == [4.0, 0.0, -3.0, 5.0]
    # With weights 1 and 3 the first entry's sign is that of 4 - 6 < 0.
    assert combined(given, [1.0, 3.0], "ties", density=0.5).tolist() == [-2.0, 0.0, -3.0, 5.0]


def test_dare_keeps_the_mean_and_linear_adds() -> None:
    given = [torch.ones(40_000), 3 * torch.ones(40_000)]
    found = combined(given, [0.5, 0.5], "dare", density=0.25, seed=3)
    # Each entry is 0 or 4 times itself: 0, 2, 6 or 8, of mean 2; the mean of 40,000 of variance 3 + 27 * ... is known to 0.05.
    assert set(found.unique().tolist()) == {0.0, 2.0, 6.0, 8.0} and abs(float(found.mean()) - 2.0) < 0.05
    assert torch.equal(found, combined(given, [0.5, 0.5], "dare", density=0.25, seed=3))
    assert combined(given, [2.0, -1.0], "linear").unique().tolist() == [-1.0]


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "ia3", "qlora"])
def test_merged_is_the_adapter(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], near: Any) -> None:
    folder = adapter(tmp_path / "a", tiny.model(), kind, **({"base_bits": 8} if kind == "qlora" else {}))
    assert run(["merge", str(folder), "--into", str(tmp_path / "m"), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["logit_difference"] < 1e-4 and "G-MERGE holds" in err
    near(probe(load_model(tmp_path / "m")), probe(load_adapted(folder, dense=False)), 1e-4)
    assert (tmp_path / "m" / "tokenizer.json").is_file() and not list(tmp_path.glob("*.checking"))


def test_two_adapters_are_added_by_weight(tmp_path: Path, near: Any) -> None:
    base = tiny.model()
    folders = [adapter(tmp_path / n, base, seed=i) for i, n in enumerate("ab")]
    call = ["merge", *map(str, folders), "--into", str(tmp_path / "m"), "--weights", "0.25,0.5"]
    assert run(call) == 0
    plain, one, two, found = (dict(load_model(m).named_parameters()) for m in (base, *folders, tmp_path / "m"))
    for name, value in found.items():
        near(value, plain[name] + 0.25 * (one[name] - plain[name]) + 0.5 * (two[name] - plain[name]), 1e-5)


def test_weights_in_several_files(tmp_path: Path, near: Any) -> None:
    folder, out = adapter(tmp_path / "a", tiny.model()), tmp_path / "m"
    assert run(["merge", str(folder), "--into", str(out), "--max-shard-size", "100KB"]) == 0
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 1
    assert max(f.stat().st_size for f in files[:-1]) < 400_000  # a tensor is not cut
    assert run(["merge", str(folder), "--into", str(tmp_path / "w")]) == 0
    whole = dict(load_model(tmp_path / "w").named_parameters())
    for name, value in load_model(out).named_parameters():
        near(value, whole[name], 0.0)
    assert run(["merge", str(folder), "--into", str(tmp_path / "n"), "--max-shard-size", "many"]) != 0


@pytest.mark.parametrize("part", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_tables_leaves_the_other(part: str, tmp_path: Path, near: Any) -> None:
    """A folder as PEFT writes it; merged it gives what PEFT gives beside the weights, also once it is saved and loaded."""
    base = save_model(make("llama", tie_word_embeddings=True), None, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of tied weights and of an attribute that transformers renamed
        model = peft.get_peft_model(load_model(base), peft.LoraConfig(r=3, target_modules=["q_proj", part]))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=draw))
        expected = model(torch.tensor([[5, 9, 30, 7]])).logits
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    merged = load_adapted(tmp_path / "adapter")
    again = load_model(save_model(merged, None, tmp_path / "merged"))
    for found in (merged, again):
        with torch.no_grad():
            near(found(torch.tensor([[5, 9, 30, 7]])).logits, expected)
    assert not again.config.tie_word_embeddings


def test_what_cannot_be_merged_is_a_sentence_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny.model_folder(tmp_path / "other", seed=4)
    one, two = adapter(tmp_path / "a", tiny.model()), adapter(tmp_path / "b", other)

    def refused(*arguments: object) -> str:
        assert run(["merge", *map(str, arguments), "--into", str(tmp_path / "m")]) == 1
        assert not (tmp_path / "m").exists() and not list(tmp_path.glob("m.*"))
        return capsys.readouterr().err

    said = refused(one, two)
    assert str(other) in said and str(tiny.model().resolve()) in said
    assert "not an adapter folder" in refused(tiny.model())
    assert "2 weights for 1" in refused(one, "--weights", "1,2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("danlu.models.merging.merge_into", lambda model: load_model(tiny.model()))
        assert "G-MERGE" in refused(one)


def test_adapters_are_swapped_in_chat_over_one_copy_of_the_weights(tmp_path: Path, near: Any) -> None:
    folder = adapter(tmp_path / "a", tiny.model())
    loaded = assistant.load(tiny.model())
    voice = loaded.with_adapter(folder, "kind")
    own = {p.data_ptr() for p in loaded.model.parameters()}
    assert own <= {p.data_ptr() for p in voice.model.parameters()}
    near(read(voice.model), read(load_model(folder)))
    near(read(loaded.model), read(load_model(tiny.model())))
    talk = Conversation(loaded, loaded.defaults, voices={"base": loaded, "kind": voice})
    assert "no adapter 'x'" in talk.choose("x") and talk.assistant is loaded
    assert talk.choose("kind") == "adapter 'kind' answers" and talk.assistant is voice
    assert talk.choose("") == "adapters: base, kind"
    assert talk.answer("0: which colour has the door?") in ("stop", "length")


def test_the_server_answers_by_the_adapter_that_is_asked_for(tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from danlu.data.feedback import FeedbackDatabase
    from danlu.serve.app import create_app

    loaded = assistant.load(tiny.model())
    voice = loaded.with_adapter(adapter(tmp_path / "a", tiny.model(), seed=5, noise=0.4), "kind")
    database = FeedbackDatabase(tmp_path / "votes.sqlite3", create=True)
    client = TestClient(create_app(loaded, database, adapters={"kind": voice}), base_url="http://127.0.0.1")
    name = loaded.name
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == [name, "kind"]
    ask = {"messages": [{"role": "user", "content": "which colour"}], "max_tokens": 8, "temperature": 0}

    def text(**more: Any) -> tuple[str, str]:
        found = client.post("/v1/chat/completions", json=ask | more).json()
        return found["model"], found["choices"][0]["message"]["content"]

    assert text() == text(model=name) and text()[0] == name
    assert text(model="kind")[0] == "kind" and text(model="kind")[1] != text()[1]
    assert client.post("/v1/chat/completions", json=ask | {"model": "nobody"}).status_code == 404


@pytest.mark.parametrize("family", ["gpt2", "bloom", "gemma2"])
def test_families_merge(family: str, tmp_path: Path, near: Any) -> None:
    base = save_model(make(family), None, tmp_path / "base")
    roles = adapter_roles(load_model(base), ["policy"], SftSettings(adapter="lora"))
    with torch.no_grad():
        for parameter in (p for p in roles.parameters() if p.requires_grad):
            parameter.add_(0.05)
    folder = save_adapter(roles, "policy", tmp_path / "a", None)
    assert run(["merge", str(folder), "--into", str(tmp_path / "m")]) == 0
    near(probe(load_model(tmp_path / "m")), probe(load_model(folder)), 1e-4)
