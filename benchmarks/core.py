"""Training on token trees beside the padded layout, same model, same rows, same precision, interleaved in one process.

Rows are drawn from the generated town (documents and pairs). Both sides take the same loss over the same tokens; the losses
are compared first, and a row whose losses differ is void. Peers' own trainers are not measured here yet.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from danlu.data.collate import Trees, encode_comparisons, encode_conversations
from danlu.data.read import read
from danlu.losses.preference import pairwise
from danlu.models.load import starter
from danlu.models.roles import SeparateModels
from danlu.models.root import RootModel
from danlu.synth.town.write import write_town
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import train_tokenizer
from danlu.training.compute import Compute
from danlu.training.step import language_loss
from danlu.tree import TreeBatch

ROWS = 48
SHAPE = {"hidden_size": 192, "layers": 4, "heads": 6, "kv_heads": 3, "context": 512}


def measure(*, quick: bool = False) -> list[dict[str, Any]]:
    """Prints and returns one row per kind of work: real tokens per second of both layouts, ratio with its range."""
    repeats = 3 if quick else 9
    with tempfile.TemporaryDirectory() as folder:
        files = write_town(Path(folder), 0, scale=0.1)
        conversations = read(files["sft"], "conversation").records
        comparisons = read(files["comparisons"], "comparison").records
    tokenizer = train_tokenizer([m["content"] for r in conversations for m in r.messages], 1024)  # type: ignore[union-attr]
    template = ChatTemplate(tokenizer)
    ids = {"bos_token_id": 0, "eos_token_id": 3, "pad_token_id": 1}
    model = starter(len(tokenizer), **SHAPE, seed=0, ids=ids)
    compute = Compute("cpu", "bfloat16", torch.get_num_threads())
    sft = encode_conversations(conversations[:ROWS], template, 256)  # type: ignore[arg-type]
    pairs = encode_comparisons(comparisons[:ROWS], template, 256)  # type: ignore[arg-type]
    rows = [
        _compare("sft", sft, model, compute, repeats, _sft_step),
        _compare("reward", pairs, model, compute, repeats, _pair_step),
    ]
    print("| work | tree tok/s | padded tok/s | ratio (lowest to highest) | loss difference |")
    print("|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['work']} | {r['ours']:,.0f} | {r['peer_value']:,.0f} | {r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f}) "
            f"| {r['loss_difference']:.1e} |"
        )
    return rows


def _compare(
    work: str,
    trees: Trees,
    model: Any,
    compute: Compute,
    repeats: int,
    step: Callable[[RootModel, TreeBatch, Compute], float],
) -> dict[str, Any]:
    tree = trees.batch(range(len(trees.items)))
    root = RootModel(SeparateModels({"policy": model}, ["policy"]))
    trunk = model.base_model
    times: dict[bool, list[float]] = {True: [], False: []}
    losses: dict[bool, float] = {}
    for _ in range(repeats + 1):
        for fast in (True, False):
            trunk.danlu_fast_path = fast
            model.set_attn_implementation("danlu" if fast else "sdpa")
            begun = time.perf_counter()
            losses[fast] = step(root, tree, compute)
            times[fast].append(time.perf_counter() - begun)
            model.zero_grad()
    trunk.danlu_fast_path = True
    model.set_attn_implementation("danlu")
    ratios = sorted(b / a for a, b in zip(times[True][1:], times[False][1:], strict=True))  # the first of each warms up
    return {
        "work": work,
        "size": sum(p.numel() for p in model.parameters()),
        "ours": tree.tokens / statistics.median(times[True][1:]),
        "peer": "padded layout of the same loop",
        "peer_value": tree.tokens / statistics.median(times[False][1:]),
        "unit": "distinct tokens per second",
        "ratio": statistics.median(ratios),
        "low": ratios[0],
        "high": ratios[-1],
        "loss_difference": abs(losses[True] - losses[False]),
    }


def _sft_step(root: RootModel, tree: TreeBatch, compute: Compute) -> float:
    with compute.autocast():
        loss, _ = root(tree, "policy", lambda out: language_loss(out, float(tree.loss_weight_T.sum())))
    loss.backward()
    return float(loss.detach())


def _pair_step(root: RootModel, tree: TreeBatch, compute: Compute) -> float:
    def head(out: Any) -> torch.Tensor:
        # A fixed direction as scalar head: the trunk's work is what is measured.
        scores = out.hidden_TD[out.tree.node_end_N - 1].float().mean(-1)
        return pairwise(scores[1::3], scores[2::3], float(tree.nodes // 3))[0]

    with compute.autocast():
        loss = root(tree, "policy", head)
    loss.backward()
    return float(loss.detach())
