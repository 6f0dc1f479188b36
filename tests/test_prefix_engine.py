"""Prefixes in the engine, in files and in PEFT: what was trained is what answers."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, make
from torch import Tensor

from danlu.exceptions import EngineError, ModelError
from danlu.generation.engine import LocalEngine
from danlu.generation.kv_cache import ROOT_MULTIPLE
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.generation.speculative import ModelDrafter, NgramDrafter
from danlu.models.prefix import (
    PrefixRoles,
    attach,
    attached,
    detach,
    is_prefix,
    load_prefix,
    save_prefix,
)
from danlu.models.root import RootModel, prepare
from danlu.models.virtual_root import Prefix, shape_of
from danlu.training.logprobs import logprobs
from danlu.training.rollouts import push_weights
from danlu.tree import TreeBatch, branches, conversation

Near = Callable[..., None]
TOKENS = 5


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def states_of(model: Any, kind: str, tokens: int = TOKENS, seed: int = 5) -> Prefix:
    shape = shape_of(prepare(model).base_model)
    width = shape.numbers if kind == "ptuning" else model.get_input_embeddings().weight.shape[1]
    states = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return Prefix("ptuning" if kind == "ptuning" else "prompt", states, shape)


def carrying(family: str, kind: str = "ptuning", *, seed: int = 0, shift: bool = True, **options: Any) -> Any:
    model = make(family, seed=seed, **options)
    prefix = states_of(model, kind)
    return attach(model, Prefix(prefix.kind, prefix.states, prefix.shape, shift))


def tree_logits(model: Any, text: list[int]) -> Tensor:
    """After each token, read whole on a tree."""
    from danlu.models.roles import SeparateModels

    root = RootModel(SeparateModels({"policy": model}, []))
    tree = TreeBatch.of(conversation(text, [0.0] * len(text)))
    with torch.no_grad():
        return root(tree, "policy", lambda out: out.logits(torch.arange(tree.tokens)))


def result(completion: Any) -> tuple[Any, ...]:
    return completion.ids, completion.logprobs, completion.finish_reason


@pytest.mark.parametrize("kind", ["ptuning", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_a_full_forward(family: str, kind: str, near: Near) -> None:
    """Greedy, three lanes of different lengths, past windows; log-probabilities are those that a trainer computes."""
    model = carrying(family, kind)
    plain = copy.deepcopy(model)
    prompts = [ids(n, length) for n, length in enumerate((2, 27, 11))]
    params = SamplingParams(max_new_tokens=9, temperature=0)
    for prompt, done in zip(prompts, generate(LocalEngine(model), [Request(p, params) for p in prompts]), strict=True):
        logits = tree_logits(plain, [*prompt, *done.ids])[len(prompt) - 1 : -1]
        assert list(done.ids) == logits.argmax(-1).tolist()
        near(torch.tensor(done.logprobs), torch.log_softmax(logits, -1).amax(-1))


@functools.cache
def llama() -> Any:
    return carrying("llama", max_position_embeddings=512)


def alone(model: Any, request: Request) -> tuple[Any, ...]:
    [done] = generate(LocalEngine(model, memory=1 << 24), [request])
    return result(done)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gemma2"])
def test_bits_do_not_depend_on_the_batch(family: str) -> None:
    """Sampled, greedy, and with guesses; four slots for seven requests; prompts that share a beginning are read once."""
    size = {"n_positions": 512} if family == "gpt2" else {"max_position_embeddings": 512}
    model = carrying(family, **size)
    shared = ids(1, 90)
    requests = [
        Request(
            [*shared[: 30 * (n % 4)], *ids(n, 3 + 25 * n)],
            SamplingParams(max_new_tokens=6 + 2 * n, seed=n, temperature=float(n % 3 > 0)),
        )
        for n in range(7)
    ]
    expected = [alone(model, r) for r in requests]
    for drafter in (None, NgramDrafter()):
        engine = LocalEngine(model, max_slots=4, drafter=drafter)
        assert [result(c) for c in generate(engine, requests)] == expected
        assert [result(c) for c in generate(engine, requests)] == expected  # prompts are recalled now


def test_a_model_drafter_guesses_behind_its_own_prefix() -> None:
    model, draft = carrying("llama"), carrying("llama", "prompt")
    drafter = ModelDrafter(draft, vocab_size=61)
    assert drafter.context == 64 - TOKENS
    requests = [Request(ids(n, 9), SamplingParams(max_new_tokens=12, seed=n)) for n in range(3)]
    expected = [alone(model, r) for r in requests]
    assert [result(c) for c in generate(LocalEngine(model, drafter=drafter), requests)] == expected


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neo"])
@pytest.mark.parametrize("search", [{"num_beams": 3}, {"penalty_alpha": 0.6, "top_k": 4}])
def test_searches_behind_a_prefix(family: str, search: dict[str, Any]) -> None:
    """The beams of transformers' own search over rows that hold the prefix in their cache; contrastive search ends alike alone."""
    model = carrying(family)
    params = SamplingParams(max_new_tokens=8, temperature=0, **search)
    requests = [Request(ids(n, 4 + 5 * n), params) for n in range(3)]
    done = generate(LocalEngine(model), requests)
    for request, completion in zip(requests, done, strict=True):
        assert completion.ids == generate(LocalEngine(model), [request])[0].ids
        if "num_beams" in search:
            assert list(completion.ids) == beams(model, list(request.prompt_ids), 3, 8)


def beams(model: Any, prompt: list[int], width: int, steps: int) -> list[int]:
    """Beam search over full forwards; all beams end at the limit, so that the best sum wins."""
    going: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(steps):
        options = []
        for score, answer in going:
            row = torch.log_softmax(tree_logits(model, [*prompt, *answer])[-1], -1)
            best, index = row.topk(width)
            options += [(score + float(b), [*answer, int(i)]) for b, i in zip(best, index, strict=True)]
        going = sorted(options, key=lambda o: o[0], reverse=True)[:width]
    return going[0][1]


def test_positions_context_and_memory() -> None:
    model = llama()
    engine = LocalEngine(model, memory=1 << 20)
    assert engine.context == 512 - TOKENS
    runner: Any = engine._runner()
    unit = runner.shape.bytes_per_position
    assert runner.cache.limit == int((1 << 20) * 0.75) // unit - ROOT_MULTIPLE
    with pytest.raises(EngineError, match="holds 507"):
        engine.submit(Request(ids(1, 507), SamplingParams()))
    stay = carrying("llama", shift=False)
    assert LocalEngine(stay).context == 64
    assert not torch.allclose(tree_logits(stay, ids(1, 9)), tree_logits(carrying("llama"), ids(1, 9)), atol=1e-2)
    small = LocalEngine(carrying("gpt_neo"), memory=100 * 2 * 2 * 32 * 4)
    with pytest.raises(EngineError, match="the request needs 128 positions"):  # 60 + 5 do not fit into 64
        small.submit(Request(ids(1, 50), SamplingParams(max_new_tokens=10)))


@pytest.mark.parametrize("family", ["llama", "bloom", "gpt_neo"])
@pytest.mark.parametrize("kind", ["ptuning", "prompt"])
def test_roll_outs_follow_the_policy(family: str, kind: Any, near: Near) -> None:
    """An engine with the bare base gets a role's prefix as an update of weights, again and again."""
    roles = PrefixRoles(make(family), ["policy", "ref"], tokens=TOKENS, kind=kind)
    root = RootModel(roles)
    engine = LocalEngine(make(family))
    params = SamplingParams(max_new_tokens=7, seed=3)
    found = [generate(engine, [Request(ids(1, 6), params)])[0].ids]
    for version in (1, 2):
        with torch.no_grad():
            roles.encoder("policy").embedding.weight.normal_(generator=torch.Generator().manual_seed(version))
        push_weights(engine, root, version)
        [done] = generate(engine, [Request(ids(1, 6), params)])
        tree = TreeBatch.of(branches(ids(1, 6), [list(done.ids)]))
        with torch.no_grad():
            expected, _ = root(tree, "policy", lambda out: logprobs(out, out.tree.action_index(), 1.0))
        near(torch.tensor(done.logprobs), expected)
        found.append(done.ids)
    assert len(set(found)) == 3 and engine.version == 2


def test_a_prefix_is_exchanged_between_requests_only() -> None:
    model = carrying("llama")
    engine = LocalEngine(model)
    request = Request(ids(1, 9), SamplingParams(max_new_tokens=6, temperature=0))
    first = generate(engine, [request])[0].ids
    old = detach(model)
    assert old is not None
    engine.forget_prompts()
    bare = generate(engine, [request])[0].ids
    assert bare == generate(LocalEngine(make("llama")), [request])[0].ids != first and engine.context == 64
    attach(model, old)
    engine.forget_prompts()
    assert generate(engine, [request])[0].ids == first
    engine.submit(request)
    engine.step()
    with pytest.raises(EngineError, match="while requests are running"):
        engine.forget_prompts()


# --- files, and PEFT ------------------------------------------------------------------------------------------------------


def peft_logits(family: str, folder: Path, text: list[int]) -> Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        model = PeftModel.from_pretrained(make(family), str(folder)).eval()
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([text])).logits[0]
    return logits[-len(text) :]


@pytest.mark.parametrize("kind", ["ptuning", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma", "bloom", "codegen", "falcon_alibi", "gpt_neo"])
def test_peft_loads_what_danlu_saved_and_the_other_way(family: str, kind: Any, near: Near, tmp_path: Path) -> None:
    """Equal logits, with grouped heads and head widths of their own; a projection is saved as what it says."""
    roles = PrefixRoles(make(family), ["policy"], tokens=TOKENS, kind=kind, projection=kind == "ptuning")
    with torch.no_grad():
        for parameter in roles.encoder("policy").parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4)))
    folder = save_prefix(roles, "policy", tmp_path / "adapter", "some/base")
    assert is_prefix(folder) and not is_prefix(tmp_path)
    model = make(family)
    prefix = load_prefix(folder, model)
    assert prefix.shift and prefix.kind == kind and attached(model) is not None
    text = ids(3, 12)
    with torch.no_grad():
        tree = TreeBatch.of(conversation(text, [0.0] * 12))
        own = RootModel(roles)(tree, "policy", lambda out: out.logits(torch.arange(12)))
    near(tree_logits(model, text), own)
    near(peft_logits(family, folder, text), own)


def test_a_folder_of_peft_itself(near: Near, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, get_peft_model

    torch.manual_seed(2)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=TOKENS)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        theirs = get_peft_model(make("llama"), config).eval()
        theirs.save_pretrained(tmp_path)
        with torch.no_grad():
            expected = theirs(input_ids=torch.tensor([ids(3, 12)])).logits[0]
    model = make("llama")
    load_prefix(tmp_path, model)
    near(tree_logits(model, ids(3, 12)), expected)


def test_the_rule_of_positions_and_a_scalar_head_are_kept(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    model = make("llama")
    model.base_model.danlu_prefix_shift = False
    roles = PrefixRoles(model, ["reward"], tokens=3, trained=["reward"])
    with torch.no_grad():
        roles.scalar_heads["reward"].weight.fill_(0.25)
    folder = save_prefix(roles, "reward", tmp_path, "base")
    scalar = tiny("llama", scalar=True)
    prefix = load_prefix(folder, scalar)
    assert not prefix.shift and prefix.offset == 0
    assert torch.equal(scalar.score.weight[0], roles.scalar_heads["reward"].weight[0])


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    folder = save_prefix(PrefixRoles(make("llama"), ["policy"], tokens=3), "policy", tmp_path / "a", "the/llama")
    with pytest.raises(
        ModelError, match=r"64 numbers a token, and GPT2LMHeadModel .* needs 128\n.*trained for the/llama"
    ):
        load_prefix(folder, make("gpt2"))
    with pytest.raises(ModelError, match="cannot be read as an adapter"):
        load_prefix(tmp_path, make("llama"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "LORA"}))
    with pytest.raises(ModelError, match="holds a 'LORA' adapter, not a prefix"):
        load_prefix(folder, make("llama"))
