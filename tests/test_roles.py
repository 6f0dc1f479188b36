"""Four roles on one trunk (design, section 4): gradients against a model that has the adapter's product in its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make
from torch import Tensor
from torch.func import functional_call

from danlu.exceptions import ModelError
from danlu.models.heads import head_of
from danlu.models.load import save_model
from danlu.models.recompute import recompute_layers
from danlu.models.roles import AdapterRoles, SeparateModels, reference_model
from danlu.models.root import RoleName, RootModel, TrunkOutput
from danlu.training.logprobs import logprobs
from danlu.tree import TreeBatch, branches

RANK, ALPHA = 3, 6.0
PROMPT, ANSWER = [5, 9, 30], [7, 8, 44, 12]
TREE = TreeBatch.of(branches(PROMPT, [ANSWER]))
Tiny = Callable[..., Any]
Near = Callable[..., None]
ROLES: list[RoleName] = ["policy", "critic"]


def make_roles(tiny: Tiny, roles: list[RoleName], *, family: str = "llama", **options: Any) -> AdapterRoles:
    """Adapters whose every weight is random: LoRA's own start (B = 0) would hide a wrong adapter."""
    return randomise(AdapterRoles(tiny(family), roles, rank=RANK, alpha=ALPHA, **options))


def randomise(made: AdapterRoles) -> AdapterRoles:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name or "scalar_heads" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


def policy_loss(out: TrunkOutput) -> Tensor:
    logp, _ = logprobs(out, out.tree.action_index())
    return -logp.sum()


def critic_loss(out: TrunkOutput) -> Tensor:
    return (out.values(out.tree.action_index()) - 1.0).square().sum()


LOSSES = {"policy": policy_loss, "critic": critic_loss}


def lora_pairs(roles: AdapterRoles, role: str) -> Iterator[tuple[str, str, str]]:
    """(base weight's plain name, A's name, B's name) of a role's adapter."""
    for name, _ in roles.named_parameters():
        if f".lora_A.{role}." in name:
            plain = name.removeprefix("peft.base_model.model.").split(".lora_A.")[0] + ".weight"
            yield plain, name, name.replace(".lora_A.", ".lora_B.")


def separate_gradients(tiny: Tiny, roles: AdapterRoles, role: str) -> dict[str, Tensor]:
    """The role as a model of its own: W + (alpha / r) B A put into plain transformers, differentiated by autograd."""
    plain = tiny("llama").requires_grad_(False)
    own = {n: p.detach().clone().requires_grad_() for n, p in roles.named_parameters() if f".{role}." in f"{n}."}
    base = dict(plain.named_parameters())
    weights = {w: base[w] + ALPHA / RANK * own[b] @ own[a] for w, a, b in lora_pairs(roles, role)}
    assert len(weights) == 14  # 7 linear layers in each of 2 blocks
    row = {"input_ids": torch.tensor([PROMPT + ANSWER])}
    if role == "policy":
        logits = functional_call(plain, weights, kwargs=row).logits[0, 2:-1]
        loss = -torch.log_softmax(logits, -1)[torch.arange(4), torch.tensor(ANSWER)].sum()
    else:
        trunk = {n.removeprefix("model."): w for n, w in weights.items()}
        hidden = functional_call(plain.model, trunk, kwargs=row).last_hidden_state[0, 2:-1]
        loss = (hidden @ own[f"scalar_heads.{role}.weight"][0] - 1.0).square().sum()
    loss.backward()
    return {n: p.grad for n, p in own.items() if p.grad is not None}


def backward(roles: AdapterRoles, *, joint: bool) -> None:
    root = RootModel(roles)
    losses = []
    for role in ROLES:
        loss = root(TREE, role, LOSSES[role])
        if joint:
            losses.append(loss)
        else:
            loss.backward()
    if joint:
        torch.stack(losses).sum().backward()


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_every_role_gets_the_gradient_of_a_model_of_its_own(
    joint: bool, checkpointing: bool, tiny: Tiny, near: Near
) -> None:
    # Joint with checkpointing: a layer is computed again when another role was selected since.
    roles = make_roles(tiny, ROLES)
    expected = {n: g for role in ROLES for n, g in separate_gradients(tiny, roles, role).items()}
    roles.train()
    if checkpointing:
        roles.base.activation_checkpointing_enable({"use_reentrant": False})
    backward(roles, joint=joint)
    found = {n: p.grad for n, p in roles.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys() and len(found) == 2 * 14 * 2 + 1
    for name, gradient in expected.items():
        near(found[name], gradient)


@pytest.mark.parametrize("family", ["stablelm", "bloom", "gptj"])
def test_layers_that_drop_arguments_are_recomputed_under_their_role(family: str, near: Near) -> None:
    """Joint backward with checkpointing: the first role's layers are computed again while the second is selected."""
    found = []
    for checkpointing in (False, True):
        roles = randomise(AdapterRoles(make(family), ROLES, rank=RANK, alpha=ALPHA))
        if checkpointing:
            recompute_layers(roles)
        backward(roles, joint=True)
        found.append({n: p.grad for n, p in roles.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys() and any(".policy." in n for n in found[0])
    for name, gradient in found[0].items():
        near(found[1][name], gradient)


def test_four_roles_hold_one_base_in_memory(tiny: Tiny) -> None:
    def storages(module: torch.nn.Module) -> dict[int, int]:
        return {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in module.parameters()}

    base = storages(tiny("llama"))
    roles = AdapterRoles(tiny("llama"), ["policy", "ref", "critic", "reward"], rank=2)
    whole = storages(roles)
    adapters = sum(p.numel() for n, p in roles.named_parameters() if "lora_" in n)
    # Three adapters and two heads of one number beside one base; the reference is the base itself.
    assert sum(whole.values()) == sum(base.values()) + 4 * (adapters + 2 * 32)
    assert 3 * 2 * sum(m.weight.shape[0] + m.weight.shape[1] for m in linears(tiny("llama"))) == adapters


def linears(model: Any) -> list[torch.nn.Linear]:
    head = model.get_output_embeddings()
    return [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]


def test_a_reference_in_8_bits_is_frozen_small_and_near(tiny: Tiny, tmp_path: Path, near: Near) -> None:
    save_model(tiny("llama"), None, tmp_path / "model")
    index = TREE.action_index()
    found = []
    for bits in (32, 8):
        ref = reference_model(str(tmp_path / "model"), bits)
        roles = SeparateModels({"policy": tiny("llama"), "ref": ref}, ["policy"])
        assert not any(p.requires_grad for p in roles.models["ref"].parameters())
        held = [*ref.model.layers.parameters(), *ref.model.layers.buffers()]
        found.append(
            (sum(x.numel() * x.element_size() for x in held), RootModel(roles)(TREE, "ref", policy_rows(index)))
        )
    (whole, exact), (small, rough) = found
    assert small < 0.4 * whole
    assert not torch.equal(rough, exact)
    near(rough, exact, 0.02)


def policy_rows(index: Tensor) -> Callable[[TrunkOutput], Tensor]:
    return lambda out: logprobs(out, index)[0].detach()


def test_ref_is_the_base_without_adapters(tiny: Tiny, near: Near) -> None:
    root = RootModel(make_roles(tiny, ROLES))
    everything = torch.arange(TREE.tokens)
    with torch.no_grad():
        root(TREE, "policy", policy_loss)
        ref = root(TREE, "ref", lambda out: out.logits(everything))
        policy = root(TREE, "policy", lambda out: out.logits(everything))
        plain = tiny("llama")(input_ids=torch.tensor([PROMPT + ANSWER])).logits[0]
    near(ref, plain)
    assert (policy - ref).abs().max() > 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "bloom"])
def test_merged_weights_equal_the_adapter(family: str, tiny: Tiny, near: Near) -> None:
    roles = make_roles(tiny, ROLES, family=family)
    everything = torch.arange(TREE.tokens)
    with torch.no_grad():
        adapter = RootModel(roles)(TREE, "policy", lambda out: out.logits(everything))
        plain = tiny(family)
        merged = roles.merged("policy")
        assert merged.keys() == dict(plain.named_parameters()).keys()
        plain.load_state_dict(merged, strict=False)
        near(adapter, plain(input_ids=torch.tensor([PROMPT + ANSWER])).logits[0])


def test_a_critic_starts_at_zero_and_adapters_start_as_the_base(tiny: Tiny) -> None:
    root = RootModel(AdapterRoles(tiny("llama"), ["policy", "critic"]))
    index = TREE.action_index()
    with torch.no_grad():
        assert root(TREE, "critic", lambda out: out.values(index)).tolist() == [0.0] * 4
        policy, ref = (root(TREE, role, lambda out: out.logits(index)) for role in ("policy", "ref"))
    assert torch.equal(policy, ref)


def test_first_weights_are_a_function_of_the_seed(tiny: Tiny) -> None:
    def state(seed: int) -> list[Tensor]:
        return [p for n, p in AdapterRoles(tiny("llama"), ROLES, seed=seed).named_parameters() if "lora_A" in n]

    torch.manual_seed(5)
    first = state(0)
    torch.manual_seed(6)
    assert all(torch.equal(a, b) for a, b in zip(first, state(0), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, state(1), strict=True))


def test_selecting_roles_leaves_what_learns_alone(tiny: Tiny) -> None:
    roles = make_roles(tiny, ["policy", "critic", "reward"])
    before = {n for n, p in roles.named_parameters() if p.requires_grad}
    assert before == {n for n, _ in roles.named_parameters() if ".policy." in n or ".critic." in n}
    for role in ("ref", "critic", "reward", "policy", "ref"):
        roles.trunk(role)
        assert {n for n, p in roles.named_parameters() if p.requires_grad} == before


def test_values_are_before_and_scores_at_a_token(tiny: Tiny, near: Near) -> None:
    """V(s_t) is read where token t is predicted; a reward is read at the last token."""
    model = tiny("llama", scalar=True)
    root = RootModel(SeparateModels({"critic": model}, ["critic"]))
    with torch.no_grad():
        hidden = tiny("llama", scalar=True).model(input_ids=torch.tensor([PROMPT + ANSWER])).last_hidden_state[0]
        expected = (hidden @ head_of(model).weight[0]).detach()
        near(root(TREE, "critic", lambda out: out.values(torch.tensor([3, 4]))), expected[[2, 3]])
        near(root(TREE, "critic", lambda out: out.scores(torch.tensor([3, 6]))), expected[[3, 6]])


def test_separate_models_learn_only_where_told(tiny: Tiny) -> None:
    policy = tiny("llama")
    roles = SeparateModels({"policy": policy, "ref": copy.deepcopy(policy)}, ["policy"])
    assert all(p.requires_grad for p in roles.models["policy"].parameters())
    assert not any(p.requires_grad for p in roles.models["ref"].parameters())
    with pytest.raises(ModelError, match="role 'critic' has no model here"):
        roles.trunk("critic")


def test_adapters_for_ref_alone_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ModelError, match="at least one role beside ref"):
        AdapterRoles(tiny("llama"), ["ref"])
