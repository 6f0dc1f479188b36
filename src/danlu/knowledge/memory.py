"""What a model answers now, kept to compare with and to train towards: texts, token ids and likeliest tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from danlu.data.collate import Trees
from danlu.losses.distil import kept_logprobs, kl_from_kept, leads
from danlu.models.root import RootModel, TrunkOutput
from danlu.text.chat_template import ChatTemplate
from danlu.training.compute import Compute
from danlu.training.step import shortest_first
from danlu.tree import conversation
from danlu.types import Message

KEPT = 256  # likeliest tokens of a position that are remembered
MICRO_TOKENS = 4096


@dataclass(frozen=True)
class Answers:
    """Encoded dialogues with loss on their last answer, and what a model's distributions were there.

    kept, ids: per dialogue `[m, K]`, see `losses/distil.py`; empty until `remember`.
    """

    trees: Trees
    kept: list[Tensor] = field(default_factory=list)
    ids: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.trees.items)


def encode(dialogues: Sequence[tuple[Sequence[Message], str]], template: ChatTemplate, max_length: int) -> Answers:
    """Dialogues (messages up to the user's, and the answer) as trees, one each, with loss on that answer and its stop token.

    What is longer than `max_length` loses its end.
    """
    items = []
    for messages, answer in dialogues:
        said: Message = {"role": "assistant", "content": answer}
        encoded = template.encode([*messages, said])
        start, end = encoded.answers[-1].start, encoded.answers[-1].end
        weights = [float(start <= i < end) for i in range(len(encoded.ids))]
        items.append(conversation(encoded.ids[:max_length], weights[:max_length]))
    return Answers(Trees(items))


@torch.no_grad()
def remember(root: RootModel, answers: Answers, compute: Compute) -> Answers:
    """The answers with what `root` thinks at each of their tokens."""
    kept: list[Tensor] = [torch.empty(0)] * len(answers)
    ids: list[Tensor] = [torch.empty(0)] * len(answers)
    for batch in shortest_first(answers.trees, MICRO_TOKENS):
        if not batch:
            continue
        tree = answers.trees.batch(batch).to(compute.device)

        def head(out: TrunkOutput) -> tuple[Tensor, Tensor]:
            return kept_logprobs(out.logits(out.tree.predictor_T[out.tree.loss_index()]), KEPT)

        with compute.autocast():
            top, which = root(tree, "policy", head)
        sizes = [int(answers.trees.weights[i]) for i in batch]
        for i, t, w in zip(batch, top.split(sizes), which.split(sizes), strict=True):
            kept[i], ids[i] = t, w
    return Answers(answers.trees, kept, ids)


def divergence(out: TrunkOutput, kept_MK: Tensor, ids_MK: Tensor) -> tuple[Tensor, Tensor]:
    """The KL from remembered distributions at each token that carries loss, and the leads of these tokens; both `[M]`."""
    index = out.tree.loss_index()
    logits = out.logits(out.tree.predictor_T[index])
    return kl_from_kept(logits, kept_MK, ids_MK), leads(logits, out.tree.input_ids_T[index])


@dataclass(frozen=True, slots=True)
class Told:
    """What a model says of given answers: per dialogue the divergence from what was remembered (nats, summed; 0 without it), the
    negative log-likelihood, the smallest lead of a token over the likeliest other one (nats), and the token count."""

    kl: list[float]
    nll: list[float]
    lead: list[float]
    tokens: list[int]

    @property
    def greedy(self) -> list[bool]:
        """Whether every token of a dialogue's answer is the likeliest."""
        return [lead > 0 for lead in self.lead]


@torch.no_grad()
def judge(root: RootModel, answers: Answers, compute: Compute) -> Told:
    """Reads the answers under teacher forcing; no text is generated."""
    count = len(answers)
    told = Told([0.0] * count, [0.0] * count, [float("inf")] * count, [0] * count)
    for batch in shortest_first(answers.trees, MICRO_TOKENS):
        if not batch:
            continue
        tree = answers.trees.batch(batch).to(compute.device)

        def head(out: TrunkOutput, batch: list[int] = batch) -> tuple[Tensor, Tensor, Tensor]:
            index = out.tree.loss_index()
            logits = out.logits(out.tree.predictor_T[index])
            kl = torch.zeros(len(index), device=logits.device)
            if answers.kept:
                kl = kl_from_kept(
                    logits, torch.cat([answers.kept[i] for i in batch]), torch.cat([answers.ids[i] for i in batch])
                )
            targets = out.tree.input_ids_T[index]
            logprobs = torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)
            return kl, logprobs, leads(logits, targets)

        with compute.autocast():
            kl, logprobs, lead = root(tree, "policy", head)
        sizes = [int(answers.trees.weights[i]) for i in batch]
        parts = (kl.split(sizes), logprobs.split(sizes), lead.split(sizes))
        for i, k, lp, first in zip(batch, *parts, strict=True):
            told.kl[i], told.nll[i], told.tokens[i] = float(k.sum()), -float(lp.sum()), len(lp)
            told.lead[i] = float(first.min()) if len(first) else float("inf")
    return told
