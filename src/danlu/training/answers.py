"""What G-STOP and G-TRUNC are decided by: whether answers are whole, and whether their end is learnt."""

from __future__ import annotations

from typing import Any

import torch

from danlu.data.collate import Trees
from danlu.models.root import RootModel
from danlu.text.chat_template import ChatTemplate
from danlu.training.compute import Compute
from danlu.training.logprobs import logprobs
from danlu.training.sharding import share_forwards
from danlu.training.step import batches_of
from danlu.training.templates import template_facts
from danlu.tree import TreeBatch

STOP_SAMPLE = 64
# Of a stop token whose row is frozen. An answer could have ended after most of its sentences, so a good model does not give its
# end much more than one part in as many; what a base has never learnt to say gets nothing.
LEAST_STOP = 0.1


def answer_facts(
    root: RootModel, head: torch.Tensor, trees: Trees, template: ChatTemplate, micro_tokens: int, compute: Compute
) -> dict[str, Any]:
    """Counts of the training answers, and whether their stop token can be learnt.

    Args:
        root: in evaluation mode, with the role "policy".
        head: the weight of the policy's head. With adapters it is frozen: then a stop token must be one that the model
            produces all the same.
        trees: what was trained on.
    """
    probability = stop_probability(root, trees, micro_tokens, compute)
    return {
        "answers": trees.answers,
        "answers_with_stop": trees.answers_with_stop,
        "answers_cut": trees.answers_cut,
        "answers_kept": trees.answers - trees.answers_cut,
        "stop_ids": sorted(template.stop_ids),
        "stop_row_learns": bool(head.requires_grad) or probability >= LEAST_STOP,
        "stop_probability": probability,
        **template_facts(template),
    }


def stop_probability(root: RootModel, trees: Trees, micro_tokens: int, compute: Compute) -> float:
    """Mean probability of the stop token where answers end, over the first conversations or comparisons."""
    sample = Trees(items=trees.items[:STOP_SAMPLE])

    def sums(tree: TreeBatch) -> tuple[float, int]:
        tree = tree.to(compute.device)
        last = tree.node_end_N[tree.leaves()] - 1
        with compute.autocast():
            logp, _ = root(tree, "policy", lambda out: logprobs(out, last), reads=lambda t: t.predictor_T[last])
        return float(logp.exp().sum()), last.numel()

    found = share_forwards(root, ["policy"], batches_of(sample, micro_tokens), sums, compute)
    return sum(total for total, _ in found) / sum(ends for _, ends in found)
