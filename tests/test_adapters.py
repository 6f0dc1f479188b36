"""Kinds of adapters: what a stage leaves, what plain PEFT makes of it, and what comes back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import make
from torch import Tensor

from danlu import assistant
from danlu.config import KINDS, SftSettings
from danlu.exceptions import ModelError
from danlu.models.adapter_files import load_adapted, read_info
from danlu.models.adapters import adapter_roles, fingerprint, quantize_base
from danlu.models.load import load_model, save_model
from danlu.models.merging import merge_adapters
from danlu.models.packed import PackedLinear
from danlu.models.places import resolve
from danlu.models.quantize import load_in_bits, quantize_model, save_quantized
from danlu.models.quantized_lora import QuantizedLora
from danlu.models.root import RootModel
from danlu.parsing import parse
from danlu.pipeline.stages import STAGES
from danlu.trainers import sft
from danlu.training.setup import load_policy
from danlu.tree import TreeBatch, branches

IDS = torch.tensor([[5, 9, 30, 7, 8, 44, 12]])


def trained(out: Path, kind: str, **changes: Any) -> Path:
    """A tiny SFT stage with an adapter kind; its folder."""
    values = tiny.stage("sft", out, adapter=kind, max_steps=4, learning_rate=2e-2, **changes)
    sft.train(parse(SftSettings, values))
    return out


@torch.no_grad()
def logits(model: Any) -> Tensor:
    found: Tensor = model.eval()(input_ids=IDS).logits[0]
    return found


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning",
    "ignore:Model has `tie_word_embeddings:UserWarning",
    "ignore:The following rank_pattern keys:RuntimeWarning",
)
@pytest.mark.parametrize(
    "kind", tiny.mostly_slow(["lora", "dora", "adalora", "pissa-embeddings"], ["rslora", "ia3", "pissa", "embeddings"])
)
def test_what_a_stage_saves_is_one_model_to_peft_danlu_and_transformers(kind: str, tmp_path: Path, near: Any) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    pissa, embeddings = (word in kind for word in ("pissa", "embeddings"))
    lora = ({"r": 4, "init": "pissa"} if pissa else {}) | ({"embeddings": "on"} if embeddings else {})
    changes: dict[str, Any] = {"lora": lora} if lora else {}
    changes |= {"adalora": {"initial_r": 4, "target_r": 2}} if kind == "adalora" else {}
    out = trained(tmp_path, "lora" if pissa or embeddings else kind, **changes)
    base = AutoModelForCausalLM.from_pretrained(tiny.model())
    plain = logits(base)
    by_peft = logits(PeftModel.from_pretrained(base, out / "adapter"))
    assert (by_peft - plain).abs().max() > 1e-3, "nothing was learnt"
    near(logits(load_model(out / "adapter")), by_peft)
    near(logits(AutoModelForCausalLM.from_pretrained(out / "model")), by_peft)
    assert resolve(out / "adapter") == (str(out / "adapter"), True)


def test_a_quantised_base_keeps_its_adapter_beside_it(tmp_path: Path, near: Any) -> None:
    out = trained(tmp_path, "qlora", base_bits=8)
    info = read_info(out / "model")
    assert (info.kind, info.base_bits, info.base) == ("qlora", 8, str(tiny.model().resolve()))
    packed, dense = load_adapted(out / "model", dense=False), load_model(out / "model")
    assert any(isinstance(m, QuantizedLora) for m in packed.modules())
    assert {type(m) for m in dense.modules()} == {type(m) for m in load_model(tiny.model()).modules()}
    near(logits(packed), logits(dense))
    loaded = assistant.load(out / "model")
    assert any(isinstance(m, QuantizedLora) for m in loaded.model.modules())
    ask = [{"role": "user", "content": "0: which colour has the door?"}]
    assert loaded.generate([ask])[0].ids  # type: ignore[list-item]


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize("layout", ["rounded", "nf4"])
def test_a_base_in_few_bits_is_rounded_as_it_is_read(
    family: str, layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if layout == "nf4":
        pytest.importorskip("bitsandbytes", reason="NF4 NOT TESTED: pip install bitsandbytes")
    folder = save_model(make(family), None, tmp_path / "model")
    whole = quantize_base(load_model(folder), 4, layout)

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the 16-bit model was held whole")

    for place in (
        "danlu.training.setup.load_model",
        "danlu.models.quantize.load_model",
        "danlu.models.load.load_model",
    ):
        monkeypatch.setattr(place, never)
    settings = SftSettings(model=str(folder), adapter="qlora", base_format=layout)  # type: ignore[arg-type]
    found = load_policy(settings)
    expected, tensors = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (whole, found))
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(expected[name], tensors[name]) for name in expected)
    assert fingerprint(found) == fingerprint(whole) != "" and found.name_or_path == whole.name_or_path == str(folder)
    turned = [[getattr(m, "danlu_transposed", None) for m in model.modules()] for model in (whole, found)]
    assert turned[0] == turned[1] and (True in turned[0]) == (family == "gpt2")


def test_a_trained_qlora_opens_without_its_whole_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, near: Any
) -> None:
    out = trained(tmp_path, "qlora")
    dense = logits(load_model(out / "model"))

    def never(*_: Any, **__: Any) -> None:
        pytest.fail("the 16-bit model was held whole")

    monkeypatch.setattr("danlu.models.load._from_transformers", never)
    near(logits(load_adapted(out / "model", dense=False)), dense)


@pytest.mark.parametrize(
    ("stage", "bits"),
    tiny.mostly_slow(
        [("sft", 4), ("dpo", 8), ("ppo", 4), ("grpo", 8)], [("sft", 8), ("dpo", 4), ("ppo", 8), ("grpo", 4)]
    ),
)
def test_a_base_that_is_packed_on_disk(stage: str, bits: int, tmp_path: Path, near: Any) -> None:
    base = save_quantized(quantize_model(load_model(tiny.model()), bits), tiny.tokenizer(), tmp_path / "packed")
    values = tiny.stage(stage, tmp_path / "out", model=str(base), adapter="qlora", base_bits=bits, max_steps=2)
    assert STAGES[stage].run(parse(KINDS[stage], values)).metrics
    place = tmp_path / "out" / "model"
    packed, dense = load_adapted(place, dense=False), load_model(place)
    assert any(isinstance(m, QuantizedLora) for m in packed.modules())
    near(logits(packed), logits(dense), 1e-4)
    if stage == "sft":
        report = merge_adapters([place], tmp_path / "merged", dtype=torch.float32)
        assert report["logit_difference"] < 1e-4
        near(logits(load_model(tmp_path / "merged")), logits(packed), 1e-4)
        assert merge_adapters([place], tmp_path / "stored")["dtype"] == "bfloat16"


NF4 = [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626]
NF4 += [0.7230, 1.0]  # table in appendix E of Dettmers et al. 2023, rounded


@pytest.fixture
def bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="NF4 NOT TESTED: pip install bitsandbytes")


def test_nf4_is_the_nearest_of_its_sixteen_values(bitsandbytes: None, near: Any) -> None:
    from danlu.models.nf4 import pack_nf4

    torch.manual_seed(0)
    weight, bias = torch.randn(24, 32), torch.randn(24)
    layer = pack_nf4(weight, bias)
    blocks = weight.view(-1, 64)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    code = torch.tensor(NF4)
    nearest = code[(scaled[..., None] - code).abs().argmin(-1)] * blocks.abs().amax(1, keepdim=True)
    near(layer.dequantized(), nearest.view(weight.shape), 1e-3)
    odd = torch.randn(5, 20)  # no whole number of blocks
    assert float((pack_nf4(odd, None).dequantized() - odd).abs().max()) < 0.16 * float(odd.abs().max())
    x = torch.randn(5, 32, requires_grad=True)
    out = layer(x)
    near(out, x @ layer.dequantized().T + bias)
    out.square().sum().backward()
    assert x.grad is not None
    near(x.grad, 2 * out @ layer.dequantized(), 1e-4)
    assert sum(b.numel() * b.element_size() for n, b in layer.named_buffers() if n != "code" and n != "bias") * 8 == (
        4.5 * weight.numel()
    )


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_base_in_nf4(stage: str, bitsandbytes: None, tmp_path: Path, near: Any) -> None:
    from danlu.models.nf4 import Nf4Linear

    values = tiny.stage(stage, tmp_path, adapter="qlora", base_format="nf4", max_steps=2, learning_rate=2e-2)
    assert STAGES[stage].run(parse(KINDS[stage], values)).metrics
    info = read_info(tmp_path / "model")
    assert (info.base_bits, info.base_format) == (4, "nf4")
    packed, dense = load_adapted(tmp_path / "model", dense=False), load_model(tmp_path / "model")
    kinds = {type(m.get_base_layer()) for m in packed.modules() if isinstance(m, QuantizedLora)}
    assert kinds == {Nf4Linear}
    ask = [{"role": "user", "content": "0: which colour has the door?"}]
    assert assistant.load(tmp_path / "model").generate([ask])[0].ids  # type: ignore[list-item]
    near(logits(packed), logits(dense), 1e-4)


@pytest.mark.slow
def test_bitsandbytes_is_quiet_where_nobody_asked_for_it(bitsandbytes: None) -> None:
    done = subprocess.run([sys.executable, "-c", "import danlu, peft"], capture_output=True, text=True, check=True)
    assert "Failed to load" not in done.stderr


def test_nf4_without_bitsandbytes_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = make("llama")
    before = fingerprint(model)
    with pytest.raises(ModelError, match="needs bitsandbytes") as found:
        adapter_roles(model, ["policy"], SftSettings(adapter="qlora", base_format="nf4"))
    assert "base_format: rounded" in str(found.value) and fingerprint(model) == before
    with pytest.raises(ValueError, match="nf4 is of 4 bits"):
        SftSettings(adapter="lora", base_format="nf4")


def test_an_adapter_on_another_base_is_refused_with_both_names(tmp_path: Path) -> None:
    out = trained(tmp_path / "out", "lora")
    other = tiny.model_folder(tmp_path / "other", seed=9)
    folder = out / "adapter"
    for name in ("adapter_config.json", "danlu_adapter.json"):
        values = json.loads((folder / name).read_text("utf-8"))
        values |= {k: str(other) for k in ("base_model_name_or_path", "base") if k in values} | {"base_relative": ""}
        (folder / name).write_text(
            json.dumps(
                values if name.startswith("danlu") else {k: v for k, v in values.items() if k != "base_relative"}
            ),
            "utf-8",
        )
    with pytest.raises(ModelError) as found:
        load_model(folder)
    assert str(other) in found.value.message and "other weights" in found.value.message
    (folder / "danlu_adapter.json").unlink()  # without the hash only shapes can tell
    wide = save_model(make("llama"), None, tmp_path / "wide")
    config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    config["base_model_name_or_path"] = str(wide)
    (folder / "adapter_config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(ModelError, match="does not fit"):
        load_model(folder)


def test_the_fingerprint_is_that_of_the_weights_in_any_dtype() -> None:
    model = make("llama")
    known = fingerprint(model)
    assert fingerprint(make("llama").to(torch.bfloat16)) == known
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1.01)
    assert fingerprint(model) != known


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_a_model_that_is_quantised_while_loading_keeps_its_fingerprint(family: str, tmp_path: Path) -> None:
    folder = save_model(make(family), None, tmp_path / "model")
    assert fingerprint(load_in_bits(folder, 4)) == fingerprint(load_model(folder)) != ""


def test_adapters_in_few_bits(tmp_path: Path, near: Any) -> None:
    out = trained(tmp_path / "lora", "lora")
    other = tiny.model_folder(tmp_path / "other", seed=9)
    assert assistant.load(tiny.model(), bits=4).with_adapter(out / "adapter")
    with pytest.raises(ModelError, match="other weights") as found:
        assistant.load(other, bits=4).with_adapter(out / "adapter")
    assert str(other) in found.value.message and str(tiny.model().resolve()) in found.value.message
    for kind in ("lora", "ptuning"):
        place = out / "adapter" if kind == "lora" else trained(tmp_path / kind, kind) / "adapter"
        packed = assistant.load(place, bits=4)
        assert any(isinstance(m, PackedLinear) for m in packed.model.modules())
        ask = [{"role": "user", "content": "0: which colour has the door?"}]
        assert packed.generate([ask])[0].ids  # type: ignore[list-item]
    small = trained(tmp_path / "qlora", "qlora", base_bits=8)
    with pytest.raises(ModelError, match="base of 8 bits, and 4 are asked for"):
        assistant.load(small / "adapter", bits=4)
    dense = assistant.load(small / "adapter", bits=16, dtype="float32").model
    assert not any(isinstance(m, PackedLinear) for m in dense.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2", "bloom"])
def test_pissa_starts_at_the_base_with_its_principal_directions(family: str, near: Any) -> None:
    settings = SftSettings(adapter="lora", lora={"r": 3, "init": "pissa"})  # type: ignore[arg-type]
    roles = adapter_roles(make(family), ["policy", "ref"], settings)
    tree, every = TreeBatch.of(branches(IDS[0, :3].tolist(), [IDS[0, 3:].tolist()])), torch.arange(7)
    root = RootModel(roles)
    with torch.no_grad():
        policy, ref = (root(tree, role, lambda out: out.logits(every)) for role in ("policy", "ref"))
    near(policy, ref)
    # The update that A and B make alone is the best one of rank 3 (Eckart and Young): singular values say how far it is off.
    layer = next(m for m in roles.base.modules() if "policy" in getattr(m, "lora_A", {}))  # type: ignore[attr-defined]
    weight = layer.get_base_layer().weight
    values = torch.linalg.svdvals(weight)
    rest = torch.linalg.matrix_norm(weight - layer.get_delta_weight("policy"))
    near(rest, values[3:].square().sum().sqrt(), 1e-4)


KINDS_OF_STAGES = {
    "sft": ("ptuning", "prompt"),
    "reward": ("lora", "qlora", "ptuning"),
    "dpo": ("dora", "adalora", "freeze"),
    "ppo": ("lora", "qlora", "ptuning", "ia3"),
    "grpo": ("lora", "freeze", "prompt"),
}
EVERY_KIND = ("lora", "dora", "adalora", "ia3", "qlora", "freeze", "ptuning", "prompt")
CHOSEN = [(stage, kind) for stage, kinds in KINDS_OF_STAGES.items() for kind in kinds]
OTHERS = [(stage, kind) for stage in KINDS_OF_STAGES for kind in EVERY_KIND if (stage, kind) not in CHOSEN]


@pytest.mark.parametrize(("stage", "kind"), tiny.mostly_slow(CHOSEN, OTHERS))
def test_every_stage_has_every_kind(stage: str, kind: str, tmp_path: Path) -> None:
    changes = {"base_bits": 8} if kind == "qlora" else {}
    values = tiny.stage(stage, tmp_path, adapter=kind, max_steps=2, **changes)
    values |= {"adalora": {"initial_r": 3, "target_r": 2}, "prefix": {"tokens": 4}}
    outcome = STAGES[stage].run(parse(KINDS[stage], values))
    assert outcome.metrics
    model = load_model(tmp_path / "model", scalar=stage == "reward")
    assert sum(p.numel() for p in model.parameters()) > 10_000
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file() == (kind != "freeze")


# -- AdaLoRA, LoRA+, NEFTune, freeze ----------------------------------------------------------------------------------------


ADA = {"adapter": "adalora", "adalora": {"initial_r": 6, "target_r": 2, "every": 2}, "learning_rate": 1e-2}


def test_ranks_fall_to_their_target_and_the_saved_adapter_is_small(tmp_path: Path) -> None:
    values = tiny.stage("sft", tmp_path, max_steps=12, **ADA)
    found = sft.train(parse(SftSettings, values)).facts
    layers = 2 * 7
    # 14 layers begin with rank 6 and end with 2 in the mean; an even importance may cost a rank more.
    assert found["rank_before"] == layers * 6 and layers <= found["rank_total"] <= layers * 2
    assert found["rank_total"] == sum(found["ranks"]["policy"].values())
    assert len(set(found["ranks"]["policy"].values())) > 1, "ranks go where they matter"
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(w.numel() for w in saved.values()) == found["adapter_parameters"] < found["adapter_parameters_before"]
    for name, rank in found["ranks"]["policy"].items():
        assert saved[f"base_model.model.{name}.lora_A"].shape[0] == rank


def test_the_allocator_sees_every_step_and_a_resumed_run_goes_on_exactly(tmp_path: Path) -> None:
    whole = parse(SftSettings, tiny.stage("sft", tmp_path / "whole", max_steps=10, save_every=4, **ADA))
    facts = sft.train(whole).facts
    begun = parse(SftSettings, tiny.stage("sft", tmp_path / "again", max_steps=10, save_every=4, **ADA))
    from danlu.training import rank_allocation

    calls: list[int] = []
    original = rank_allocation.RankAllocation.update

    def stopping(self: Any, role: str) -> None:
        original(self, role)
        calls.append(self.counts[role])
        if len(calls) == 6:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_allocation.RankAllocation, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            sft.train(begun)
    assert calls == [1, 2, 3, 4, 5, 6]
    assert sft.train(begun).facts["ranks"] == facts["ranks"]
    assert tiny.weights(tmp_path / "again" / "model") == tiny.weights(tmp_path / "whole" / "model")


def test_orthogonality_by_hand() -> None:
    from danlu.training.rank_allocation import orthogonality

    settings = SftSettings(adapter="adalora", adalora={"initial_r": 3, "target_r": 2})  # type: ignore[arg-type]
    roles = adapter_roles(make("llama"), ["policy", "critic"], settings, updates=10)
    layer = next(m for m in roles.base.modules() if "policy" in getattr(m, "lora_E", {}))  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, value in roles.named_parameters():
            if name.endswith((".lora_A.policy", ".lora_B.policy")):
                torch.nn.init.orthogonal_(value)
        layer.lora_A["policy"].mul_(2.0)  # A A^T = 4 I: 3 I off, of length 3 sqrt(3)
    found = orthogonality(RootModel(roles), "policy")
    assert found is not None and found.item() == pytest.approx(0.5 * 3 * 3**0.5 / 28, rel=1e-3)


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    from danlu.training.optim import optimizer_of, set_rate

    settings = SftSettings(adapter="lora", lora={"rate_ratio": 16})  # type: ignore[arg-type]
    roles = adapter_roles(make("llama"), ["policy"], settings)
    optimizer = optimizer_of(roles, 1e-3, settings)
    set_rate(optimizer, 1e-4)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    trained = {n: p for n, p in roles.named_parameters() if p.requires_grad}
    assert {rate[id(p)] for n, p in trained.items() if "lora_A" in n} == {1e-4}
    assert {rate[id(p)] for n, p in trained.items() if "lora_B" in n} == {16e-4}
    assert len(rate) == len(trained) and optimizer.param_groups[0]["lr"] == 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt_neo"])
def test_neftune_noise_is_bounded_seeded_and_for_training_alone(family: str) -> None:
    from danlu.models.roles import SeparateModels
    from danlu.training.noise import EmbeddingNoise, lengths_of

    tree = TreeBatch.of(branches([5, 9, 30], [[7, 8, 44, 12], [3]]))
    assert lengths_of(tree).tolist() == [7] * 7 + [4]  # the prompt's longest path has 7 tokens
    model = make(family)
    root = RootModel(SeparateModels({"policy": model}, ["policy"]))
    seen: list[Tensor] = []
    noise = EmbeddingNoise(root, 5.0, 0, "sft")
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.detach()))

    def forward(step: int) -> Tensor:
        noise.begin_step(step)
        root(tree, "policy", lambda out: out.hidden_TD)
        return seen[-1]

    root.eval()
    clean = forward(0)
    root.train()
    first, again, other = forward(0), forward(0), forward(1)
    assert torch.equal(first, again) and not torch.equal(first, other)
    lengths = lengths_of(tree) if family == "llama" else torch.full(first.shape[:2], float(first.shape[1]))
    drawn = (first - clean) * (lengths.view(*first.shape[:2], 1) * clean.shape[-1]).sqrt() / 5.0
    assert 0.9 < float(drawn.abs().max()) <= 1.001 and abs(float(drawn.mean())) < 0.15
    with torch.no_grad():
        assert torch.equal(forward(0), clean)


def test_freeze_trains_the_last_layers_alone(tmp_path: Path) -> None:
    values = tiny.stage("sft", tmp_path, adapter="freeze", freeze={"layers": 1}, max_steps=2)
    sft.train(parse(SftSettings, values))
    before, after = (dict(load_model(m).named_parameters()) for m in (tiny.model(), tmp_path / "model"))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == {n for n in before if n.startswith(("model.layers.1.", "model.norm."))}


def test_a_new_stop_token_makes_embeddings_learn() -> None:
    from danlu.training.setup import trains_embeddings

    model = make("llama")  # ends with token 1
    settings = SftSettings(adapter="lora")
    assert not trains_embeddings(model, settings, [1]) and trains_embeddings(model, settings, [1, 7])
    assert not trains_embeddings(model, settings, [])
    off = SftSettings(adapter="lora", lora={"embeddings": "off"})  # type: ignore[arg-type]
    assert not trains_embeddings(model, off, [7])
    roles = adapter_roles(model, ["policy"], settings, embeddings=True)
    learning = {n for n, p in roles.named_parameters() if p.requires_grad and "lora_" not in n}
    assert {n.split(".")[-4] for n in learning} == {"embed_tokens", "lm_head"}
