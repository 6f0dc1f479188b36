"""ChatGLM's and MOSS's shapes on a card: what they take, as their makers promised it, and how fast they are.

Weights are random: memory and time do not depend on what they say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.card import Place, allocated_gb, free, fresh_peak, peak_gb, wait
from danlu.generation.engine import LocalEngine
from danlu.generation.protocol import Request, SamplingParams, generate
from danlu.models.chatglm import ChatGLMForConditionalGeneration
from danlu.models.chatglm_config import ChatGLMConfig
from danlu.models.prefix import PrefixRoles
from danlu.models.quantize import quantize_model
from danlu.models.resting import rest
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.training.step import language_loss
from danlu.tree import TreeBatch, conversation, forest

GLM_LAYERS, MOSS_LAYERS = 28, 34
# GB by bits, of their makers' tables: ChatGLM-6B (inference; P-Tuning v2 with 64 + 64 tokens a row), MOSS-16B (to load).
PROMISED = {
    "ChatGLM-6B inference": {16: 13.0, 8: 10.0, 4: 6.0},
    "ChatGLM-6B P-Tuning": {16: 14.0, 8: 9.0, 4: 7.0},
    "MOSS-16B load": {16: 31.0, 8: 16.0, 4: 7.8},
}
PREFIX = 128


def rows(place: Place) -> Iterator[dict[str, Any]]:
    """All of it; on tiny models of the same families where the place is tiny."""
    for bits in (16, 8, 4):
        yield from _chatglm(place, bits)
    for bits in (16, 8, 4):
        yield from _moss(place, bits)
    free()
    yield from _speed(place)
    free()


def _made(place: Place, kind: Callable[[Any], Any], config: Any, bits: int) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(place.device):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    model = model.to(torch.bfloat16).eval()
    return model if bits == 16 else quantize_model(model, bits)


def _glm_config(place: Place) -> ChatGLMConfig:
    if place.tiny:
        return ChatGLMConfig(hidden_size=64, num_layers=2, num_attention_heads=4, inner_hidden_size=256)
    return ChatGLMConfig()


def _row(what: str, bits: int, value: float) -> dict[str, Any]:
    promised = PROMISED[what][bits]
    row = {"size": what.split()[0], "what": f"{what}, {bits} bits", "value": value, "unit": "GB"}
    return {**row, "against": "promised", "limit": promised, "share": value / promised}


def _chatglm(place: Place, bits: int) -> Iterator[dict[str, Any]]:
    """Peak of answering 512 tokens with 256, and of a step of P-Tuning v2 on a row of 128 tokens."""
    model = _made(place, ChatGLMForConditionalGeneration, _glm_config(place), bits)
    config = model.config
    fresh_peak(place.device)
    prompt = 32 if place.tiny else 510
    asked = Request(
        [*range(5, 5 + prompt), config.gmask_token_id, config.bos_token_id],
        SamplingParams(max_new_tokens=8 if place.tiny else 256, temperature=0.0, stop_ids=frozenset()),
    )
    generate(LocalEngine(model, max_slots=1), [asked])
    yield _row("ChatGLM-6B inference", bits, peak_gb(place.device))
    roles = PrefixRoles(model, ["policy"], tokens=PREFIX)
    rest(roles.base, torch.bfloat16)
    root = RootModel(roles).to(place.device).train()
    optimizer = torch.optim.AdamW([p for p in root.parameters() if p.requires_grad], lr=2e-2)
    ids = [*range(5, 67), config.gmask_token_id, config.bos_token_id, *range(70, 134)]
    tree = TreeBatch.of(forest([conversation(ids, [0.0] * 64 + [1.0] * 64)])).to(place.device)
    fresh_peak(place.device)
    for _ in range(2):
        with torch.autocast(place.device, dtype=torch.bfloat16):
            loss, _ = root(tree, "policy", lambda out: language_loss(out, 64.0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    yield _row("ChatGLM-6B P-Tuning", bits, peak_gb(place.device))
    del model, roles, root, optimizer, loss
    free()


def _moss(place: Place, bits: int) -> Iterator[dict[str, Any]]:
    from transformers import CodeGenConfig, CodeGenForCausalLM

    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "vocab_size": 512}
    if not place.tiny:
        shape = {"n_embd": 6144, "n_layer": MOSS_LAYERS, "n_head": 24, "rotary_dim": 64, "vocab_size": 107_008}
    model = _made(place, CodeGenForCausalLM, CodeGenConfig(n_positions=2048, n_ctx=2048, **shape), bits)
    fresh_peak(place.device)
    yield _row("MOSS-16B load", bits, allocated_gb(place.device))
    del model
    free()


def _speed(place: Place) -> Iterator[dict[str, Any]]:
    """ChatGLM-6B's forward pass and decoding beside a Llama of the same shape in transformers; rates times parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = _glm_config(place)
    glm = _made(place, ChatGLMForConditionalGeneration, config, 16)
    heads = config.num_attention_heads
    inner = config.inner_hidden_size * 2 // 3 // 64 * 64  # three matrices in place of two
    options = {"intermediate_size": inner, "num_hidden_layers": config.num_layers, "num_attention_heads": heads}
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    llama = _made(
        place,
        LlamaForCausalLM,
        LlamaConfig(vocab_size=config.vocab_size, hidden_size=config.hidden_size, **options, **ids),
        16,
    )
    llama.set_attn_implementation("sdpa")
    batch, length, new = (2, 32, 8) if place.tiny else (8, 512, 64)
    text = [[5 + i, *range(6, 3 + length), config.gmask_token_id, config.bos_token_id] for i in range(batch)]
    tree = TreeBatch.of(forest([conversation(t, [1.0] * len(t)) for t in text])).to(place.device)
    root = RootModel(SeparateModels({"policy": glm}, [])).eval()
    engine = LocalEngine(glm, max_slots=batch)
    asked = [Request(t, SamplingParams(max_new_tokens=new, temperature=0.0)) for t in text]
    padded = torch.tensor(text, device=place.device)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    parameters = {"glm": sum(p.numel() for p in glm.parameters()), "llama": sum(p.numel() for p in llama.parameters())}
    with torch.no_grad():
        pairs: dict[str, tuple[Callable[[], Any], Callable[[], Any], int]] = {
            "forward": (
                lambda: root(tree, "policy", lambda out: out.hidden_TD.sum()),
                lambda: llama.model(input_ids=padded, use_cache=False).last_hidden_state.sum(),
                batch * length,
            ),
            "decode": (
                lambda: generate(engine, asked),
                lambda: llama.generate(padded, attention_mask=torch.ones_like(padded), **options),
                batch * new,
            ),
        }
        for what, (own, other, tokens) in pairs.items():
            rates = {"glm": 0.0, "llama": 0.0}
            for turn in range(4):
                for name, work in (("glm", own), ("llama", other)):
                    wait(place.device)
                    begun = time.perf_counter()
                    work()
                    wait(place.device)
                    if turn:
                        rates[name] = max(rates[name], tokens * parameters[name] / (time.perf_counter() - begun))
            row = {"size": "ChatGLM-6B", "what": f"{what}, batch {batch}, tokens/s x parameters", "value": rates["glm"]}
            row |= {"unit": "1/s", "against": "Llama of the same shape, transformers", "limit": rates["llama"]}
            yield {**row, "share": rates["glm"] / rates["llama"]}
