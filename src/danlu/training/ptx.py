"""PTX: with every update of a policy also a language-model loss on other data, so that it does not forget.

What is drawn is a function of (seed, step, update), so there is no position to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from danlu.alignment_config import PpoSettings
from danlu.data.collate import Trees, encode_conversations, encode_documents, require_items
from danlu.data.kinds import kind_of
from danlu.data.packing import micro_batches
from danlu.data.read import scan
from danlu.data.sources import options_of, read_sources
from danlu.exceptions import SettingsError
from danlu.losses.ptx import gradient_share, ptx_weights
from danlu.models.root import RootModel, TrunkOutput
from danlu.text.chat_template import ChatTemplate
from danlu.train_config import Sources, as_list
from danlu.training import distributed
from danlu.training.compute import Compute
from danlu.training.setup import limits_of
from danlu.training.sharding import whole
from danlu.training.step import accumulate, language_loss
from danlu.training.tokens import trees_of
from danlu.tree import TreeBatch
from danlu.types import RecordKind


class PtxLoss:
    """The language-model loss of a stage, and how it is mixed with the policy's.

    Attributes:
        policy_weight: what the policy's loss is multiplied by.
        facts: for the manifest.

    Raises:
        SettingsError: no data is given.
        DataError: nothing of it can be imitated.
    """

    def __init__(self, settings: PpoSettings, template: ChatTemplate, compute: Compute, *, stage: str) -> None:
        options = settings.ptx
        assert options is not None, "made only where it is asked for"
        self.settings, self.options, self.compute = settings, options, compute
        self.trees, kind, count = _trees_of(options.data, settings, template, stage)
        self.lengths, self.weights = self.trees.lengths, self.trees.weights
        self.policy_weight, self.weight = ptx_weights(options.form, options.coef)
        self.facts: dict[str, Any] = {"ptx": {"kind": kind, "records": count, "items": len(self.trees.items)}}

    def draw(self, step: int, update: int) -> list[int]:
        """Items of an update: at random, no item twice, until they hold the tokens that are wanted or there are no more."""
        rng = np.random.default_rng([self.settings.seed, 0x97, step, update])
        chosen: dict[int, None] = {}
        tokens = 0
        while tokens < self.options.tokens and len(chosen) < len(self.lengths):
            item = int(rng.integers(len(self.lengths)))
            if item not in chosen:
                chosen[item] = None
                tokens += int(self.lengths[item])
        return list(chosen)

    def add(self, root: RootModel, parameters: Sequence[nn.Parameter], step: int, update: int) -> dict[str, float]:
        """Adds the weighted loss's gradient to what the parameters have.

        Returns:
            `loss` (weighted), `ptx_loss` (mean over tokens, in nats), and `ptx_share` of the norm of both gradients.
        """
        items = self.draw(step, update)
        total = float(self.weights[items].sum())
        sizes = self.lengths[items].tolist()
        cut = micro_batches(items, sizes, self.settings.micro_tokens, ranks=distributed.world()[1])
        batches: list[tuple[TreeBatch, float]] = [(self.trees.batch(part), total) for part in distributed.mine(cut)]
        # The policy's gradients are summed over the ranks already: they stand aside while these are.
        aside = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        sums = accumulate(root, "policy", batches, self._loss, self.compute, reads=TreeBatch.before_loss)
        norms = norm_of([p.grad for p in parameters]), norm_of(aside)
        for parameter, kept in zip(parameters, aside, strict=True):
            if parameter.grad is None:
                parameter.grad = kept
            elif kept is not None:
                parameter.grad.add_(kept)
        return {
            "loss": sums["loss"],
            "ptx_loss": sums["loss_sum"] / total,
            "ptx_share": gradient_share(*norms),
        }

    def _loss(self, out: TrunkOutput, denominator: float) -> tuple[Tensor, dict[str, float]]:
        loss, metrics = language_loss(out, denominator)
        return self.weight * loss, metrics


def norm_of(gradients: Sequence[Tensor | None]) -> float:
    """2-norm of all gradients together; of whole ones where they are split over ranks."""
    found = [g for g in gradients if g is not None]
    return float(whole(torch.nn.utils.get_total_norm(found))) if found else 0.0


def _trees_of(
    data: Sources, settings: PpoSettings, template: ChatTemplate, stage: str
) -> tuple[Trees, RecordKind, int]:
    """Encoded records, the kind that the data was found to be, and how many records there are."""
    if not as_list(data):
        raise SettingsError("no data is given", field="ptx.data", hint="documents or conversations to go on imitating")
    kind = _kind_of(data, settings.skip_bad)
    records = read_sources(data, kind, seed=settings.seed, skip_bad=settings.skip_bad).records
    if kind == "document":
        trees = trees_of(encode_documents, records, template.tokenizer, stage=stage, max_length=settings.max_length)
    else:
        trees = trees_of(encode_conversations, records, template, stage=stage, max_length=limits_of(settings))
    require_items(trees, kind, settings.max_length)
    return trees, kind, len(records)


def _kind_of(data: Sources, skip_bad: bool) -> RecordKind:
    """Documents, or what conversations can be made of, by the first record."""
    first = as_list(data)[0]
    for _, record in scan(first.path, options_of(first, skip_bad=skip_bad)):
        return "document" if kind_of(record) == "document" else "conversation"
    return "conversation"  # there is no record: reading says so
