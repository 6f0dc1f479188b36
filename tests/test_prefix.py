"""Prefixes on token trees against plain transformers with `past_key_values`, one row per path; roles, and recomputed layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES, FAST, make
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import SCALE, compare, emulated, forests, inputs, sees
from torch import Tensor
from transformers import DynamicCache

from danlu.exceptions import ModelError
from danlu.models import blocks, varlen
from danlu.models.attention import TreePlan, VirtualRoot
from danlu.models.blocks import Blocks, attend
from danlu.models.prefix import PrefixEncoder, PrefixRoles, attach, attached, detach
from danlu.models.recompute import recompute_layers
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel, prepare
from danlu.models.virtual_root import Prefix, PrefixShape, shape_of
from danlu.training.step import language_loss
from danlu.tree import Node, TreeBatch, branches, conversation, forest

Near = Callable[..., None]
TOKENS = 5


def ids(seed: int, length: int) -> list[int]:
    return torch.randint(3, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


# A single node past every window, a pair, and three levels.
NODES = forest(
    [
        conversation(ids(1, 13), [1.0] * 13),
        branches(ids(2, 9), [ids(3, 4), ids(4, 1)], [1.0, -0.5]),
        [
            Node(ids(5, 5), [0.0, 1.0, 0.0, 1.0, 1.0]),
            Node(ids(6, 3), [1.0, 0.0, 0.5], 0),
            Node(ids(7, 4), [1.0] * 4, 1),
        ],
    ]
)
TREE = TreeBatch.of(NODES)
TOTAL = float(TREE.loss_weight_T.sum())


def roles_of(
    family: str, kind: Any = "ptuning", *, shift: bool = True, std: float = 1.0, **options: Any
) -> PrefixRoles:
    """Policy and critic whose prefixes are large enough to show."""
    model = make(family)
    model.base_model.danlu_prefix_shift = shift
    roles = PrefixRoles(model, ["policy", "critic"], tokens=TOKENS, kind=kind, seed=3, **options)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for part in (roles.encoders, roles.scalar_heads):
            for parameter in part.parameters():
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return roles


def path_of(node: int) -> list[int]:
    found: list[int] = []
    while node >= 0:
        found = [*NODES[node].ids, *found]
        node = NODES[node].parent
    return found


def plain_logits(model: Any, states: Tensor, kind: str, shift: bool, path: Sequence[int]) -> Tensor:
    """What transformers makes of one row behind the virtual tokens: a filled cache, or embeddings before its own."""
    row = torch.tensor([path])
    if kind == "prompt":
        embeds = torch.cat([states[None], model.get_input_embeddings()(row)], dim=1)
        return model(inputs_embeds=embeds, use_cache=False).logits[0, TOKENS:]
    shape = shape_of(prepare(make(model.family)).base_model)
    each = states.view(TOKENS, shape.layers, 2, shape.heads, shape.width)
    pairs = [(each[:, n, 0].transpose(0, 1)[None], each[:, n, 1].transpose(0, 1)[None]) for n in range(shape.layers)]
    begin = TOKENS if shift else 0
    given = {} if model.config.model_type == "bloom" else {"position_ids": torch.arange(begin, begin + len(path))[None]}
    mask = torch.ones(1, TOKENS + len(path), dtype=torch.int64)
    return model(input_ids=row, past_key_values=DynamicCache(pairs), attention_mask=mask, **given).logits[0]


@functools.cache
def expected(family: str, kind: str, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, loss, and the gradient of the policy's states, from a row of its own for every node's path."""
    roles = roles_of(family, kind, shift=shift)
    states = roles.encoder("policy")().detach().requires_grad_()
    model = make(family).requires_grad_(False)
    model.family = family
    logits, loss = [], torch.zeros(())
    for index, node in enumerate(NODES):
        path = path_of(index)
        rows = plain_logits(model, states, kind, shift, path)
        logits.append(rows[len(path) - len(node.ids) :])
        for place, weight in enumerate(node.loss_weights, start=len(path) - len(node.ids)):
            if weight:
                loss = loss - weight * torch.log_softmax(rows[place - 1], -1)[path[place]]
    (loss / TOTAL).backward()
    assert states.grad is not None
    return torch.cat(logits).detach(), (loss / TOTAL).detach(), states.grad


def logits_TV(root: RootModel, role: Any = "policy") -> Tensor:
    with torch.no_grad():
        return root(TREE, role, lambda out: out.logits(torch.arange(TREE.tokens)))


# Transformers lets a prefix fall out of a sliding window; danlu keeps it, and the engine does the same (test_prefix_engine).
WINDOWED = {"mistral", "qwen2", "gemma2", "gemma3", "phi3", "cohere2"}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("kind", ["ptuning", "prompt"])
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WINDOWED])
def test_tree_equals_rows_behind_a_filled_cache(family: str, kind: str, checkpointing: bool, near: Near) -> None:
    roles = roles_of(family, kind)
    root = RootModel(roles)
    assert roles.base.base_model.danlu_fast_path == (family in FAST)
    if checkpointing:
        recompute_layers(root)
    logits, loss, grad = expected(family, kind, True)
    found, _ = root(TREE, "policy", lambda out: language_loss(out, TOTAL))
    found.backward()
    near(found, loss)
    near(roles.encoder("policy").embedding.weight.grad, grad)
    assert all(p.grad is None for p in roles.base.parameters())
    if not checkpointing:
        near(logits_TV(root), logits)


@pytest.mark.parametrize("family", ["llama", "gpt2", "codegen", "gptj", "falcon"])
def test_positions_that_stay(family: str, near: Near) -> None:
    """ChatGLM's rule: the text begins at position 0."""
    roles = roles_of(family, shift=False)
    logits, _, _ = expected(family, "ptuning", False)
    near(logits_TV(RootModel(roles)), logits)
    assert not torch.allclose(logits, expected(family, "ptuning", True)[0], atol=1e-2)


# --- attention ----------------------------------------------------------------------------------------------------------


def with_root(tree: TreeBatch, window: int | None, before: int) -> Tensor:
    """[T, before + T]: every token sees the root, past its window too."""
    return torch.cat([torch.ones(tree.tokens, before, dtype=torch.bool), sees(tree, window)], dim=1)


def slow(qkv: list[Tensor], first: list[Tensor], allowed: Tensor, softcap: float | None) -> Tensor:
    """One row of scores per token over the root's keys and the batch's; query [H, T, K], others [G, .., K]."""
    query, key, value = qkv[0], torch.cat([first[0], qkv[1]], 1), torch.cat([first[1], qkv[2]], 1)
    share = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(share, 0).transpose(1, 2) * SCALE
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    probs = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1)
    return (probs @ value.repeat_interleave(share, 0)).transpose(0, 1)


def root_and_inputs(tree: TreeBatch, heads: tuple[int, int], before: int) -> list[Tensor]:
    """query, key, value, root's key, root's value in fp64; keys as large as those of a model."""
    qkv = inputs(tree.tokens, *heads)
    first = inputs(before, heads[1], heads[1], seed=5)[:2]
    return [x.detach().double().requires_grad_() for x in (*qkv, *first)]


@settings(max_examples=60, deadline=None)
@given(
    forests(),
    st.one_of(st.none(), st.integers(1, 30)),
    st.sampled_from([3, 256]),
    st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    st.sampled_from([None, 1.5]),
    st.integers(1, 40),
)
def test_blocks_with_a_root_in_double_precision(
    tree: TreeBatch, window: int | None, longest: int, heads: tuple[int, int], softcap: float | None, before: int
) -> None:
    made = Blocks(tree, window, longest, before)
    allowed = with_root(tree, window, before)

    def found(x: list[Tensor]) -> Tensor:
        key, value = VirtualRoot([x[3]], [x[4]], 0).in_front(0, x[1], x[2])
        return attend(x[0], key, value, made, SCALE, softcap)

    given_ = root_and_inputs(tree, heads, before)
    compare(found, lambda x: slow(x[:3], x[3:], allowed, softcap), given_)
    upstream = torch.randn(tree.tokens, heads[0], 8, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    own, plain = (
        torch.autograd.grad((r * upstream).sum(), given_)
        for r in (found(given_), slow(given_[:3], given_[3:], allowed, softcap))
    )
    for a, b in zip(own, plain, strict=True):
        assert float((a - b).abs().max()) <= 1e-12 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("window", [None, 1, 4, 100])
@settings(max_examples=20, deadline=None)
@given(tree=forests(), before=st.integers(1, 20))
def test_the_variable_length_kernel_with_a_root(window: int | None, tree: TreeBatch, before: int) -> None:
    """Where its window would hide the root, blocks are taken."""
    allowed = with_root(tree, window, before)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "kernel", lambda: emulated)
        patch.setattr(varlen, "fits", lambda value, softcap: softcap is None)
        compare(
            lambda x: TreePlan(tree, root=VirtualRoot([x[3]], [x[4]], 0)).attend(0, *x[:3], SCALE, window),
            lambda x: slow(x[:3], x[3:], allowed, None),
            root_and_inputs(tree, (4, 2), before),
        )


def test_weights_made_again_in_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = TreeBatch.of([Node([1] * 30, [0.0] * 30), Node([1] * 9, [0.0] * 9, 0)])
    monkeypatch.setattr(blocks, "KEPT_KEYS", 0)
    compare(
        lambda x: plan_with(tree, x).attend(0, *x[:3], SCALE),
        lambda x: slow(x[:3], x[3:], with_root(tree, None, 6), None),
        root_and_inputs(tree, (4, 2), 6),
    )


def plan_with(tree: TreeBatch, x: list[Tensor]) -> TreePlan:
    return TreePlan(tree, root=VirtualRoot([x[3]], [x[4]], 0))


@pytest.mark.parametrize("kind", ["ptuning", "prompt"])
@pytest.mark.parametrize("family", sorted(WINDOWED))
def test_a_window_does_not_move_past_the_root(family: str, kind: str, near: Near) -> None:
    """A model whose window holds all and one whose window hides text: the prefix is seen by the last token of either."""
    roles = roles_of(family, kind)
    assert roles.base.base_model.danlu_fast_path
    root = RootModel(roles)
    last = int(TREE.node_end_N[0]) - 1
    root(TREE, "policy", lambda out: out.hidden_TD[last].sum()).backward()
    weight = roles.encoder("policy").embedding.weight
    assert weight.grad is not None and float(weight.grad.view(TOKENS, -1).abs().amin(1).max()) > 0
    # Without a window it is what transformers makes of a filled cache.
    open_window = {"max_window_layers": 2} if family == "qwen2" else {"sliding_window": 64}
    if family in ("mistral", "phi3"):
        wide = PrefixRoles(make(family, **open_window), ["policy"], tokens=TOKENS, kind=kind)  # type: ignore[arg-type]
        wide.encoder("policy").begin_at(roles.encoder("policy").prefix())
        model = make(family, **open_window)
        model.family = family
        states = weight.detach()
        rows = [plain_logits(model, states, kind, True, path_of(n)) for n in range(len(NODES))]
        plain = torch.cat([r[-len(node.ids) :] for r, node in zip(rows, NODES, strict=True)])
        near(logits_TV(RootModel(wide)), plain)


# --- roles --------------------------------------------------------------------------------------------------------------


def role_loss(role: str) -> Callable[[Any], Tensor]:
    if role == "critic":
        return lambda out: out.values(out.tree.action_index()).square().sum()
    return lambda out: language_loss(out, TOTAL)[0]


def backward(roles: PrefixRoles, *, joint: bool) -> dict[str, Tensor]:
    root = RootModel(roles)
    losses = []
    for role in ("policy", "critic"):
        loss = root(TREE, role, role_loss(role))  # type: ignore[arg-type]
        if not joint:
            loss.backward()
        losses.append(loss)
    if joint:
        torch.stack(losses).sum().backward()
    return {n: p.grad.clone() for n, p in roles.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["ptuning", "prompt"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "stablelm", "bloom", "codegen"])
def test_two_roles_on_one_base(family: str, kind: str, near: Near) -> None:
    """Joint and separate backward passes, layers recomputed or kept, with a projection or without: the same gradients."""
    for projection in (False, True):
        results = []
        for joint in (False, True):
            for recompute in (False, True):
                roles = roles_of(family, kind, projection=projection, std=0.3)
                if recompute:
                    recompute_layers(roles)
                results.append(backward(roles, joint=joint))
        names = {n for n, _ in roles.named_parameters() if n.startswith(("encoders.", "scalar_heads."))}
        assert len(names) == (5 * 2 if projection else 2) + 1
        for found in results:
            assert found.keys() == names
            for name in names:
                near(found[name], results[0][name])
                assert float(found[name].abs().max()) > 0


def test_layers_are_done_twice_and_read_the_root_twice() -> None:
    for family in ("llama", "bloom"):
        roles = roles_of(family)
        recompute_layers(roles)
        trunk = roles.base.base_model
        layer = trunk.layers[1] if family == "llama" else trunk.h[1]
        calls: list[int] = []
        layer.input_layernorm.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        root = RootModel(roles)
        root(TREE, "policy", role_loss("policy")).backward()
        assert len(calls) == 2


def test_ref_reads_the_base_and_what_it_carries(near: Near) -> None:
    roles = roles_of("llama")
    plain = logits_TV(RootModel(SeparateModels({"policy": make("llama")}, [])))
    near(logits_TV(RootModel(roles), "ref"), plain)
    assert (logits_TV(RootModel(roles)) - plain).abs().max() > 0.1
    # The next stage: the prefix is attached, policy and ref begin at it.
    model = attach(make("llama"), roles.encoder("policy"))
    for projection in (False, True):
        after = RootModel(PrefixRoles(model, ["policy", "ref"], tokens=TOKENS, projection=projection))
        near(logits_TV(after, "ref"), logits_TV(RootModel(roles)))
        near(logits_TV(after), logits_TV(RootModel(roles)))
    near(logits_TV(RootModel(SeparateModels({"policy": model}, []))), logits_TV(RootModel(roles)))
    assert detach(model) is not None and attached(model) is None and detach(model) is None
    near(logits_TV(RootModel(SeparateModels({"policy": model}, []))), plain)


def test_what_learns_and_first_weights() -> None:
    roles = PrefixRoles(make("llama"), ["policy", "ref", "critic", "reward"], tokens=4, seed=1)
    learns = {n for n, p in roles.named_parameters() if p.requires_grad}
    assert learns == {
        "encoders.policy.embedding.weight",
        "encoders.critic.embedding.weight",
        "scalar_heads.critic.weight",
    }
    assert torch.count_nonzero(roles.scalar_heads["critic"].weight) == 0
    torch.manual_seed(9)
    again = PrefixRoles(make("llama"), ["policy"], tokens=4, seed=1)
    other = PrefixRoles(make("llama"), ["policy"], tokens=4, seed=2)
    states = [r.encoder("policy")() for r in (roles, again, other)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    # A prompt begins as embeddings of real tokens.
    prompt = PrefixRoles(make("llama"), ["policy"], tokens=4, kind="prompt")
    table = prompt.base.get_input_embeddings().weight
    rows = prompt.encoder("policy")()
    assert all((table == row).all(1).any() for row in rows)


def test_bf16_autocast_is_near_fp32() -> None:
    for kind in ("ptuning", "prompt"):
        roles = roles_of("llama", kind)
        exact = logits_TV(RootModel(roles))
        with torch.autocast("cpu", torch.bfloat16):
            rough = logits_TV(RootModel(roles))
        assert 0 < float((rough - exact).abs().max()) < 0.05 * float(exact.abs().max())


# --- learning -------------------------------------------------------------------------------------------------------------


def sharp(family: str) -> Any:
    """A frozen model that can be sure of a token: its last norm is four times as large, as training makes it."""
    model = make(family)
    trunk = model.base_model
    norm = trunk.norm if family == "llama" else trunk.ln_f
    with torch.no_grad():
        norm.weight.mul_(4)
    return model


def learn(family: str, kind: Any, *, projection: bool, rate: float, steps: int) -> list[float]:
    """Losses of Adam on eight prompts, each with an answer and a stop token of its own."""
    rows = TreeBatch.of(forest([branches(ids(n, 4), [[*ids(50 + n, 3), 1]]) for n in range(8)]))
    roles = PrefixRoles(sharp(family), ["policy"], tokens=32, kind=kind, projection=projection)
    root = RootModel(roles)
    optimizer = torch.optim.Adam([p for p in roles.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss, _ = root(rows, "policy", lambda out: language_loss(out, float(rows.loss_weight_T.sum())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("projection", [False, True], ids=["table", "projection"])
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gpt2", "bloom", "codegen"))]
)
def test_a_prefix_learns_eight_rows(family: str, projection: bool) -> None:
    """The weights are random and frozen: all that is learnt is in 32 virtual tokens."""
    losses = learn(
        family,
        "ptuning",
        projection=projection,
        rate=1e-2 if projection else 2e-2,
        steps=120 if family == "llama" else 240,
    )
    assert losses[0] > 5 and losses[-1] < 0.1, losses[::20]


# --- what is refused ------------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    roles = PrefixRoles(make("gpt2"), ["policy"], tokens=4)
    with pytest.raises(ModelError, match="cannot be merged into a model's weights"):
        roles.merged("policy")
    with pytest.raises(ModelError, match="role 'critic' has no prefix here"):
        roles.prefix("critic")
    with pytest.raises(ModelError, match="at least one role beside ref"):
        PrefixRoles(make("gpt2"), ["ref"], tokens=4)
    long = TreeBatch.of(conversation([3] * 61, [1.0] * 61))
    with pytest.raises(
        ModelError, match=r"61 tokens behind a prefix of 4 exceed the 64 positions of this model\n.*together can be 64"
    ):
        RootModel(roles)(long, "policy", lambda out: out.hidden_TD)
    RootModel(PrefixRoles(make("llama"), ["policy"], tokens=4))(long, "policy", lambda out: out.hidden_TD)
    carrying = attach(make("gpt2"), roles.encoder("policy"))
    with pytest.raises(ModelError, match=r"carries a prefix of 4 tokens \(ptuning\), and 8 \(ptuning\) are asked for"):
        PrefixRoles(carrying, ["policy"], tokens=8)


def test_a_family_that_does_not_look_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix without effect must not be trained in silence, as where layers drop their cache."""
    roles = roles_of("gpt_neo")
    forward = type(roles.base.base_model.h[0].attn).forward

    def deaf(self: Any, *args: Any, layer_past: Any = None, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(self, *args, attention_mask=attention_mask[..., TOKENS:], **kwargs)

    monkeypatch.setattr(type(roles.base.base_model.h[0].attn), "forward", deaf)
    with pytest.raises(ModelError, match="2 layers of GPTNeoModel do not read"):
        RootModel(roles)(TREE, "policy", lambda out: out.hidden_TD)


# --- ChatGLM's encoders ---------------------------------------------------------------------------------------------------


def test_an_encoder_of_chatglm_with_a_projection() -> None:
    """embedding [P, D] -> Linear -> tanh -> Linear, cut into [P, 2 * L, heads, K]; slots 2i are keys, 2i + 1 values."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"embedding.weight": (3, 16), "trans.0.weight": (10, 16), "trans.0.bias": (10,)}
    sizes |= {"trans.2.weight": (2 * 2 * 16, 10), "trans.2.bias": (2 * 2 * 16,)}
    state = {f"transformer.prefix_encoder.{n}": torch.randn(s, generator=generator) for n, s in sizes.items()}
    encoder = PrefixEncoder.from_chatglm(state, layers=2, kv_heads=4, head_dim=4, hidden=10)
    root = encoder.prefix().root(make("gpt2").base_model)
    own = {n.rsplit("prefix_encoder.")[1]: t for n, t in state.items()}
    middle = torch.tanh(own["embedding.weight"] @ own["trans.0.weight"].T + own["trans.0.bias"])
    flat = middle @ own["trans.2.weight"].T + own["trans.2.bias"]
    slots = flat.view(3, 4, 4, 4).permute(1, 2, 0, 3)  # [slot, head, P, K]
    for layer in range(2):
        assert torch.allclose(root.keys[layer], slots[2 * layer], atol=1e-6)
        assert torch.allclose(root.values[layer], slots[2 * layer + 1], atol=1e-6)
    assert root.offset == 0
    with pytest.raises(ModelError, match=r"64 numbers a token .*2 \* 3 layers"):
        PrefixEncoder.from_chatglm(state, layers=3, kv_heads=4, head_dim=4)
    with pytest.raises(ModelError, match="a prefix encoder has the tensors"):
        PrefixEncoder.from_chatglm({"x": torch.zeros(1)}, layers=3, kv_heads=4, head_dim=4)


@pytest.mark.parametrize(
    ("name", "heads", "case"), [("chatglm_v1_ptuning", 4, "step0"), ("chatglm2_ptuning", 2, "step0")]
)
def test_recorded_prefixes_of_chatglm(name: str, heads: int, case: str, shared_data: Any) -> None:
    """The first six positions of the recorded caches are the prefix: `[layer, key or value, position, 1, head, K]`."""
    from safetensors.torch import load_file

    folder = shared_data.parent / "fixtures" / name
    encoder = PrefixEncoder.from_chatglm(
        load_file(folder / "prefix_encoder.safetensors"), layers=2, kv_heads=heads, head_dim=16
    )
    recorded = load_file(folder / "cases.safetensors")[f"incremental.{case}.past_key_values"]
    root = encoder.prefix().root(make("gpt2").base_model)
    for layer in range(2):
        for part, side in enumerate((root.keys, root.values)):
            assert torch.allclose(side[layer], recorded[layer, part, :6, 0].transpose(0, 1), atol=1e-6)


def test_shapes_are_found_by_reading() -> None:
    """Falcon keeps one key for all heads and Gemma chooses its head width, which configurations name in their own ways."""
    assert shape_of(prepare(make("falcon")).base_model) == PrefixShape(2, 1, 8)
    assert shape_of(prepare(make("gemma")).base_model) == PrefixShape(2, 1, 8)
    assert shape_of(prepare(make("qwen3")).base_model) == PrefixShape(2, 2, 8)
    assert PrefixShape(2, 2, 8).numbers == 2 * 2 * 2 * 8
    assert Prefix("prompt", torch.zeros(4, 32), PrefixShape(2, 2, 8), shift=False).offset == 4
