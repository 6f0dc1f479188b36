"""GLM (blank infilling): every recorded case of the original, and what danlu needs of a model beyond them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoModelForTokenClassification

from danlu.exceptions import ModelError
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models.blank import BlankIds, choice_inputs, generation_inputs
from danlu.models.glm import BlankGlmForConditionalGeneration
from danlu.models.glm_config import BlankGlmConfig
from danlu.models.load import load_model
from danlu.models.megatron import joined
from danlu.models.own import splits_of
from danlu.models.registry import family_of
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.text.sentencepiece import read_model
from danlu.text.tokenizer import load_tokenizer
from danlu.tree import TreeBatch, branches, forest

IDS = BlankIds(masks=(306, 307, 308), sop=309, eop=310, pad=304)


@pytest.fixture(scope="module")
def folder(shared_data: Path) -> Path:
    return shared_data.parent / "fixtures" / "glm"


def load(folder: Path) -> Any:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    family = family_of(config)
    assert family is not None and family.name.startswith("GLM")
    return load_model(folder).eval()


def changed(folder: Path, into: Path, **keys: Any) -> Path:
    """A copy of the fixture's folder with other keys in its configuration."""
    found = json.loads((folder / "config.json").read_text("utf-8")) | keys
    (into / "config.json").write_text(json.dumps(found), "utf-8")
    (into / "model.safetensors").symlink_to(folder / "model.safetensors")
    return into


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def notes(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "cases.json").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in load_file(folder / "cases.safetensors").items():
        case, _, field = name.partition(".")
        found.setdefault(case, {})[field] = value
    return found


def small(**changes: Any) -> Any:
    """A GLM with random weights that are large enough for a wrong mask to show."""
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 4}
    ids = {"sop_token_id": 3, "eop_token_id": 4, "mask_token_ids": [5, 6], "pad_token_id": 2, "eos_token_id": 4}
    off = {f"{name}_dropout_prob": 0.0 for name in ("embedding", "attention", "output")}
    model = BlankGlmForConditionalGeneration(BlankGlmConfig(max_sequence_length=64, **shape | ids | off | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.2 * noise if parameter.dim() > 1 else parameter + 0.1 * noise)
    return model.eval()


# -- the recorded cases -------------------------------------------------------------------------------------------------

FORWARDS = ["batch_sep", "blank_two_spans_sep", "default_causal", "padding_mask_2d", "scalar_sep", "train_batch"]


@pytest.mark.parametrize("name", FORWARDS)
def test_logits_memories_losses_and_gradients(
    name: str, folder: Path, cases: dict[str, dict[str, Tensor]], notes: dict[str, Any]
) -> None:
    case, model = cases[name], load(folder)
    out = model(case["input_ids"], case.get("position_ids"), case.get("attention_mask"), labels=case.get("labels"))
    torch.testing.assert_close(out.logits, case["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.stack(out.mems), case["mems"], atol=1e-4, rtol=0)
    if "loss" not in case:
        return
    torch.testing.assert_close(out.loss, case["loss"], atol=0, rtol=1e-5)
    if name not in notes["grad_norm_and_sum"]:
        return
    out.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    for parameter, (norm, total) in notes["grad_norm_and_sum"][name].items():
        assert abs(float(gradients[parameter].norm()) - norm) <= 1e-4 * max(norm, 1.0), parameter
        assert abs(float(gradients[parameter].sum()) - total) <= 1e-3, parameter
    for field, expected in case.items():
        if field.startswith("grad."):
            torch.testing.assert_close(gradients[field.removeprefix("grad.")], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["blank_two_spans_sep", "train_batch"])
def test_the_training_repositorys_activation_is_an_option(
    name: str, folder: Path, tmp_path: Path, cases: dict[str, dict[str, Tensor]]
) -> None:
    case, model = cases[name], load(changed(folder, tmp_path, hidden_act="gelu_tanh"))
    logits = model(case["input_ids"], case["position_ids"], case["attention_mask"]).logits.detach()
    torch.testing.assert_close(logits, case["logits_tanh_gelu_original_repo"], atol=1e-4, rtol=0)
    assert float((logits - case["logits"]).abs().max()) > 2e-4


def test_steps_with_memories_and_with_a_cache(model: Any, cases: dict[str, dict[str, Tensor]]) -> None:
    case, mems, cache = cases["incremental"], None, None
    for step in range(4):
        given = {f: case[f"step{step}.{f}"] for f in ("input_ids", "position_ids", "attention_mask")}
        out = model(**given, mems=mems)
        torch.testing.assert_close(out.logits, case[f"step{step}.logits"], atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.stack(out.mems), case[f"step{step}.mems"], atol=1e-4, rtol=0)
        mems = out.mems
        cached = model(**given, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(cached.logits, case[f"step{step}.logits"], atol=1e-4, rtol=0)
        cache = cached.past_key_values


def test_inputs_for_generation_are_built_as_recorded(
    cases: dict[str, dict[str, Tensor]], notes: dict[str, Any]
) -> None:
    case, settings = cases["build_for_generation"], notes["build_for_generation"]
    for part, targets in (("infer", None), ("train", settings["targets"])):
        found = generation_inputs(
            case["input_ids"], case["attention_mask"], IDS, room=settings["max_gen_length"], targets=targets
        )
        expected = {k.partition(".")[2]: v for k, v in case.items() if k.startswith(f"{part}.")}
        assert found.keys() == expected.keys()
        for field, value in expected.items():
            assert torch.equal(found[field], value), field


def test_targets_longer_than_the_room_are_cut() -> None:
    found = generation_inputs(torch.tensor([[9, 306]]), torch.ones(1, 2), IDS, room=3, targets=[[1, 2, 7, 8]])
    assert found["input_ids"].tolist() == [[9, 306, 309, 1, 2]]
    assert found["labels"].tolist() == [[-100, -100, 1, 2, 310]]
    with pytest.raises(ModelError, match="no mask token"):
        generation_inputs(torch.tensor([[9, 9]]), torch.ones(1, 2), IDS, room=3)


def test_greedy_tokens(folder: Path, tmp_path: Path, cases: dict[str, dict[str, Tensor]]) -> None:
    model = load(changed(folder, tmp_path, sop_token_id=IDS.sop, mask_token_ids=IDS.masks))
    inputs = {k.removeprefix("infer."): v for k, v in cases["build_for_generation"].items() if k.startswith("infer.")}
    expected = cases["greedy_batch"]["output_ids"]
    room = expected.shape[1] - inputs["input_ids"].shape[1]
    found = model.generate(**inputs, max_new_tokens=room, do_sample=False)
    assert torch.equal(found, expected)
    # The same from a plain mask: positions and the mask are found from the ids.
    real = (inputs["input_ids"] != 304).long()
    plain = model.generate(input_ids=inputs["input_ids"], attention_mask=real, max_new_tokens=room, do_sample=False)
    assert torch.equal(plain, expected)
    # And with padding on the left.
    row = inputs["input_ids"][1][real[1].bool()]
    left = torch.cat([torch.tensor([304, 304, 304]), row])[None]
    found = model.generate(input_ids=left, attention_mask=(left != 304).long(), max_new_tokens=room, do_sample=False)
    assert torch.equal(found[0, left.shape[1] :], expected[1, -room:])


def test_beams_score_what_the_model_scores(model: Any, cases: dict[str, dict[str, Tensor]]) -> None:
    inputs = {k.removeprefix("infer."): v for k, v in cases["build_for_generation"].items() if k.startswith("infer.")}
    out = model.generate(
        **inputs, max_new_tokens=4, num_beams=3, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    length = out.sequences.shape[1]
    positions, mask = inputs["position_ids"][..., :length], inputs["generation_attention_mask"][..., :length, :length]
    logprobs = model(out.sequences, positions, mask).logits.log_softmax(-1)
    new = out.sequences[:, -4:]
    total = logprobs[:, -5:-1].gather(2, new[..., None]).squeeze(-1).sum(1)
    torch.testing.assert_close(out.sequences_scores, total / 4, atol=1e-4, rtol=1e-4)


def test_choices(model: Any, cases: dict[str, dict[str, Tensor]], notes: dict[str, Any]) -> None:
    case, given = cases["multiple_choice"], notes["multiple_choice"]
    built = choice_inputs(given["context"], given["choices"], BlankIds(IDS.masks, IDS.sop, IDS.eop, pad=0))
    assert built.places == given["choice_indices"] and built.ids == given["choice_ids"]
    real = case["attention_mask"][:, 0].any(-1)
    for field, value in built.inputs.items():
        where = {"input_ids": real, "position_ids": real[:, None].expand(-1, 2, -1)}.get(field, slice(None))
        assert torch.equal(value[where], case[field][where]), field
    found = torch.stack(model.choose(built))
    torch.testing.assert_close(found, case["log_probs"], atol=1e-4, rtol=0)
    loss = torch.nn.functional.cross_entropy(found, torch.tensor(given["labels"]))
    torch.testing.assert_close(loss, case["loss"], atol=1e-4, rtol=0)


# -- beyond them ----------------------------------------------------------------------------------------------------------


def test_the_scale_of_attention_changes_nothing_but_rounding() -> None:
    ids, sep = torch.tensor([[7, 8, 5, 3, 9, 10]]), torch.tensor([3])
    positions = torch.tensor([[[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]])
    expected = small()(ids, positions, sep).logits
    torch.testing.assert_close(small(attention_scale=8.0)(ids, positions, sep).logits, expected, atol=1e-5, rtol=1e-5)


def test_without_block_positions_there_is_one_row() -> None:
    model = small(block_position_encoding=False)
    assert model.glm.transformer.position_embeddings.num_embeddings == 64
    assert not hasattr(model.glm.transformer, "block_position_embeddings")
    ids = torch.tensor([[7, 8, 9, 10]])
    whole = model(ids).logits
    shorter = model(ids[:, :3]).logits
    torch.testing.assert_close(whole[:, :3], shorter)


def test_plain_masks_are_causal_on_either_side_of_padding() -> None:
    model = small()
    row = torch.tensor([[7, 8, 9, 10, 11]])
    alone = model(row).logits
    pad = torch.full((1, 2), 2)
    right = model(torch.cat([row, pad], 1), attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 0]])).logits
    left = model(torch.cat([pad, row], 1), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1, 1]])).logits
    torch.testing.assert_close(right[:, :5], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left[:, 2:], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_context_is_read_both_ways_and_a_span_causally() -> None:
    model = small()
    ids = torch.tensor([[7, 5, 8, 3, 9, 10]])
    given = generation_inputs(ids[:, :3], torch.ones(1, 3), model.config.blank_ids(), room=3)
    out = model(ids, given["position_ids"], given["generation_attention_mask"]).logits
    other = ids.clone()
    other[0, 2] = 20  # the last token of the context changes what its first one says
    found = model(other, given["position_ids"], given["generation_attention_mask"]).logits
    assert float((found[0, 0] - out[0, 0]).abs().max()) > 1e-3
    later = ids.clone()
    later[0, 5] = 20
    found = model(later, given["position_ids"], given["generation_attention_mask"]).logits
    torch.testing.assert_close(found[:, :5], out[:, :5])


def test_trees_and_the_engine_run_it_as_a_causal_model() -> None:
    model = small()
    tree = TreeBatch.of(forest([branches([7, 8, 9], [[10, 11], [12]])]))
    root = RootModel(SeparateModels({"policy": model}, []))
    logits = root(tree, "policy", lambda out: out.logits(torch.arange(tree.tokens)))
    torch.testing.assert_close(logits[:5], model(torch.tensor([[7, 8, 9, 10, 11]])).logits[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[5], model(torch.tensor([[7, 8, 9, 12]])).logits[0, 3], atol=1e-5, rtol=1e-5)
    greedy = model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    [done] = generate(LocalEngine(model), [Request([7, 8, 9], SamplingParams(max_new_tokens=6, temperature=0.0))])
    assert list(done.ids) == greedy[0, 3:].tolist()


def test_saved_folders_open_with_the_auto_classes(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text("utf-8"))["model_type"] == "danlu_glm"
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(again.eval()(ids).logits, model(ids).logits)
    assert load(tmp_path).config.mask_token_ids == [5, 6]
    classes = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert classes(ids, labels=torch.tensor([1])).logits.shape == (1, 3)
    tokens = AutoModelForTokenClassification.from_pretrained(tmp_path, num_labels=4)
    assert tokens(ids, labels=torch.tensor([[1, -100, 2]])).logits.shape == (1, 3, 4)


def test_checkpoints_of_the_training_code_are_merged_over_ranks(tmp_path: Path) -> None:
    model = small()
    state = {k.removeprefix("glm."): v for k, v in model.state_dict().items() if k != "lm_head.weight"}
    ranks: list[dict[str, Tensor]] = [{}, {}]
    for name, value in state.items():
        rows = name.rpartition(".")[0]
        for rank in (0, 1):
            part = value
            if rows.endswith("query_key_value"):  # a rank has its heads of q, of k and of v
                part = torch.cat([block.chunk(2)[rank] for block in value.chunk(3)])
            elif rows.endswith(("word_embeddings", "dense_h_to_4h")):
                part = (
                    torch.cat([value, value.new_zeros(1, value.shape[1])]).chunk(2)[rank]
                    if value.shape[0] % 2
                    else value.chunk(2)[rank]
                )
            elif name.endswith(("attention.dense.weight", "dense_4h_to_h.weight")):
                part = value.chunk(2, dim=1)[rank]
            ranks[rank][name] = part.clone()
    merged = joined(ranks, splits_of({"query_key_value": 3}))
    assert torch.equal(merged["word_embeddings.weight"][:61], state["word_embeddings.weight"])
    assert all(torch.equal(merged[n], v) for n, v in state.items() if n != "word_embeddings.weight")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict() | {"model_type": "glm"}), "utf-8")
    torch.save({"module": state}, tmp_path / "mp_rank_00_model_states.pt")
    ids = torch.tensor([[7, 8, 9]])
    torch.testing.assert_close(load(tmp_path)(ids).logits, model(ids).logits)


def test_what_is_not_supported_or_wrong_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(ModelError, match="relative_encoding"):
        BlankGlmConfig(relative_encoding=True)
    with pytest.raises(ModelError, match="spell_length"):
        BlankGlmConfig(spell_length=3)
    assert BlankGlmConfig(spell_length=None).num_layers == 24  # as published
    with pytest.raises(ModelError, match="pool_token"):
        BlankGlmConfig(pool_token="max")
    with pytest.raises(ModelError, match="position 70"):
        small()(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[70]]))
    assert family_of({"model_type": "glm", "num_hidden_layers": 2, "num_key_value_heads": 2}) is None
    with pytest.raises(ModelError, match="are missing from the weights"):
        load(changed(folder, tmp_path, num_layers=4))


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("executed",))


def test_a_pickle_that_would_execute_something_is_not_opened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(small().config.to_dict()), "utf-8")
    torch.save({"module": _Evil()}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(ModelError, match="refused: it wants to run"):
        load(tmp_path)
    assert "executed" not in capsys.readouterr().out


def test_the_chinese_tokenizer_has_its_tokens_behind_the_pieces(tmp_path: Path) -> None:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    lines = ["今天天气很好，我们去公园玩。", "明天会下雨吗？我不知道。", "the quick brown fox", "他说：好的！"] * 8
    (tmp_path / "text.txt").write_text("\n".join(lines), "utf-8")
    trainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "cog-pretrain"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    base = len(read_model(tmp_path / "cog-pretrain.model").pieces)
    tokenizer = load_tokenizer(tmp_path)
    names = ["<|endoftext|>", "[CLS]", "[MASK]", "<|startofpiece|>", "<|endofpiece|>", "[sMASK]", "[gMASK]", "[dBLOCK]"]
    assert [tokenizer.convert_tokens_to_ids(n) - base for n in names] == [0, 2, 3, 6, 7, 8, 9, 10]
    ids = tokenizer("今天天气[MASK]好")["input_ids"]
    assert ids[0] == base + 2 and ids[-1] == base and ids.count(base + 3) == 1
    assert tokenizer.decode(tokenizer("明天会下雨吗")["input_ids"], skip_special_tokens=True) == "明天会下雨吗"
    tokenizer.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved")("今天")["input_ids"] == tokenizer("今天")["input_ids"]
