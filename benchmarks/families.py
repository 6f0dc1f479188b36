"""ChatGLM-6B's and ChatGLM2-6B's shapes, scaled to about 60M, beside transformers' LLaMA of the same shape; sides take turns.

Random weights: speed does not depend on what they say. What is compared is a rate times the parameters, so that a side with a few
parameters less has no advantage. Rates are by CPU time: other work on the machine then slows both alike.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.ratios import Report, rates, spread
from benchmarks.tables import machine, write_section

TITLE = "Families of danlu's own"
FULL = {"width": 512, "layers": 12, "heads": 4, "vocab": 16_000}
TINY = {"width": 32, "layers": 2, "heads": 2, "vocab": 100}
GOAL = 1.0  # not slower per parameter
CONTEXT = 512


def chatglm(shape: dict[str, int]) -> Any:
    """ChatGLM-6B: four times as wide inside, biases, two-row rotary positions, a head of its own."""
    from danlu.models.chatglm import ChatGLMForConditionalGeneration
    from danlu.models.chatglm_config import ChatGLMConfig

    vocab = shape["vocab"]
    config = ChatGLMConfig(
        vocab_size=vocab,
        hidden_size=shape["width"],
        inner_hidden_size=4 * shape["width"],
        num_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        max_sequence_length=CONTEXT,
        bos_token_id=vocab - 4,
        eos_token_id=vocab - 3,
    )
    return ChatGLMForConditionalGeneration(config)


def chatglm2(shape: dict[str, int]) -> Any:
    """ChatGLM2-6B: SwiGLU of 3.34 times the width, one pair of keys and values for all heads (of 32 heads it has two)."""
    from danlu.models.chatglm2 import ChatGLMForConditionalGeneration
    from danlu.models.chatglm_config import ChatGLM2Config

    config = ChatGLM2Config(
        padded_vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        ffn_hidden_size=_inner(shape),
        kv_channels=shape["width"] // shape["heads"],
        num_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        seq_length=CONTEXT,
        multi_query_attention=True,
        multi_query_group_num=1,
        add_qkv_bias=True,
    )
    return ChatGLMForConditionalGeneration(config)


def _inner(shape: dict[str, int]) -> int:
    return shape["width"] * 13696 // 4096


def llama(shape: dict[str, int], inner: int, kv_heads: int) -> Any:
    """The same width, depth, heads and vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape["vocab"],
        hidden_size=shape["width"],
        intermediate_size=inner,
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def pairs(shape: dict[str, int]) -> dict[str, tuple[Any, Any]]:
    """Name -> (danlu's, transformers')."""
    third = -(-shape["width"] * 8 // 3 // 32) * 32  # three matrices in place of two of four times the width
    return {
        "ChatGLM-6B": (chatglm(shape), llama(shape, third, shape["heads"])),
        "ChatGLM2-6B": (chatglm2(shape), llama(shape, _inner(shape), 1)),
    }


def prompt_of(model: Any, length: int) -> torch.Tensor:
    """`[1, length]` in which ChatGLM-6B finds its mask and the start of its answer at the end."""
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(5, 5 + length) % (vocab - 20) + 5
    if hasattr(model.config, "gmask_token_id"):
        ids[-2], ids[-1] = model.config.gmask_token_id, model.config.bos_token_id
    return ids[None]


@torch.no_grad()
def forward(model: Any, length: int) -> Report:
    """One pass over a prompt, all logits."""
    ids = prompt_of(model, length)
    begun = time.process_time()
    model(ids, use_cache=False)
    return {"tokens": length, "seconds": time.process_time() - begun}


@torch.no_grad()
def decode(model: Any, count: int) -> Report:
    """Greedy tokens after a prompt of 64, by `generate`."""
    ids = prompt_of(model, 64)
    options: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    begun = time.process_time()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, **options)
    assert out.shape[1] == 64 + count, out.shape
    return {"tokens": count, "seconds": time.process_time() - begun}


def measure(*, quick: bool, docs: Path | None) -> list[dict[str, Any]]:
    """One row a family and work; prints the table."""
    shape = TINY if quick else FULL
    turns, length, count = (1, 16, 4) if quick else (7, 256, 48)
    work: dict[str, Callable[[Any], Report]] = {
        "forward": lambda model: forward(model, length),
        "decode": lambda model: decode(model, count),
    }
    rows: list[dict[str, Any]] = []
    torch.manual_seed(0)
    for family, (ours, theirs) in pairs(shape).items():
        ours.eval(), theirs.eval()
        sizes = [sum(p.numel() for p in m.parameters()) for m in (ours, theirs)]
        for name, run in work.items():
            run(ours), run(theirs)
            found: tuple[list[Report], list[Report]] = ([], [])
            for _ in range(turns):
                found[0].append(run(ours))
                found[1].append(run(theirs))
            own, peer = ([r * size for r in rates(side)] for side, size in zip(found, sizes, strict=True))
            row = {"family": family, "work": name, "parameters": sizes[0], "peer_parameters": sizes[1]}
            row |= {"ours": statistics.median(rates(found[0])), "peer": statistics.median(rates(found[1]))}
            row |= dict(zip(("ratio", "low", "high"), spread(own, peer), strict=True))
            rows.append(row)
            print(json.dumps(row), flush=True)
    text = _table(rows, length, count, turns)
    print(text)
    if docs is not None:
        write_section(docs, TITLE, text)
    return rows


def _table(rows: list[dict[str, Any]], length: int, count: int, turns: int) -> str:
    lines = [
        f"`python -m benchmarks families`, {machine()}, float32, random weights, {turns} turns,",
        f"sides one after the other. Tokens a second of CPU time: a pass over {length} tokens with all logits; {count} greedy",
        "tokens by `generate` after 64. The ratio is of tokens a second times parameters, danlu's class over transformers' LLaMA",
        f"of the same width, depth, heads and vocabulary; goal {GOAL:g} or more.",
        "",
        "| shape of | parameters | LLaMA's | work | danlu | LLaMA | ratio per parameter (lowest to highest) | holds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['family']} | {r['parameters'] / 1e6:.1f}M | {r['peer_parameters'] / 1e6:.1f}M | {r['work']} | {r['ours']:,.0f} "
        f"| {r['peer']:,.0f} | {r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f}) | {'yes' if r['ratio'] >= GOAL else 'no'} |"
        for r in rows
    ]
    return "\n".join(lines)
