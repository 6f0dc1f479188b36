"""Reward model: a scalar head on the trunk, read at the last token of each answer, learns what people prefer.

From pairs or rankings (Bradley-Terry), from scores that answers were given, or from labels of single answers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from danlu import atomic
from danlu.alignment_config import RewardSettings
from danlu.data.collate import (
    Trees,
    encode_comparisons,
    encode_rankings,
    encode_scored,
    encode_unpaired,
    require_items,
)
from danlu.data.formats.registry import by_name
from danlu.exceptions import DataError
from danlu.losses.preference import balanced_weights, kwise, pairwise, pairwise_tokens, pointwise, unpaired
from danlu.models.roles import AdapterRoles
from danlu.models.root import RootModel, TrunkOutput
from danlu.rewards.model import CONFIG_KEY
from danlu.text.chat_template import ChatTemplate
from danlu.trainers.reward_report import Judged, metrics_of, repeats_of, report_of
from danlu.training import distributed
from danlu.training.compute import Compute, choose
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import adapter_folder, is_shared, merged_model, save_result, save_role
from danlu.training.session import Session
from danlu.training.setup import limits_of, placed, plan_of, policy_roles, records_of
from danlu.training.sharding import share_forwards
from danlu.training.step import LossFn, TrainResult, accumulate, apply, shortest_first
from danlu.training.templates import template_facts, template_of
from danlu.training.tokens import trees_of
from danlu.tree import Node, TreeBatch
from danlu.types import Ranking, Record, RecordKind

NORMALISER_PAIRS = 2000  # records: the mean of 4,000 scores is known to 0.02 of their standard deviation
REPORT = "reward_report.json"
SOURCES = 20  # told apart in the report; the rest is one
# loss -> what it reads, what encodes that, and what the manifest calls it
READS: Final[dict[str, tuple[RecordKind, Callable[..., Trees], str]]] = {
    "pairwise": ("comparison", encode_comparisons, "pairs"),
    "kwise": ("ranking", encode_rankings, "rankings"),
    "pointwise": ("ranking", encode_scored, "rankings"),
    "unpaired": ("unpaired", encode_unpaired, "answers"),
}
# what a loss sums up -> the metric that it is a mean of
TOLD: Final = {"right": "accuracy", "margin": "margin", "error": "error"}
Extra = tuple[Tensor | None, float]
"""Margins of the pairs, if they count, and the step's denominator."""


class Answers(NamedTuple):
    """All answers of a batch: scores, targets (rank, given score or label, by the loss), and the prompt's node."""

    scores_A: Tensor
    targets_A: Tensor
    prompts_A: Tensor


@within_limits
def train(settings: RewardSettings) -> TrainResult:
    """Trains and writes `out/model` (AutoModelForSequenceClassification); resumes from the last checkpoint in `out`.

    Raises:
        DataError: nothing is left to train on, or all of it says the same.
    """
    distributed.start()
    template = template_of(settings.model, settings, stage="reward")
    kind, encode, named = READS[settings.loss]
    train_records, heldout_records, dataset = records_of(settings, kind)
    if settings.loss == "pointwise":
        _refuse_pairs(dataset.formats)
        _refuse_equal_scores(train_records)
        train_records, heldout_records = (_on_scale(r, settings) for r in (train_records, heldout_records))
    trees = trees_of(encode, train_records, template, stage="reward", max_length=limits_of(settings))
    require_items(trees, kind, settings.max_length)
    weights = _label_weights(trees, settings)
    heldout, sources = _by_source(encode, heldout_records, template, settings)
    lengths = trees.lengths
    steps = plan_of(lengths, settings)

    roles, model = policy_roles(settings, trained="reward", updates=len(steps))
    model.config.pad_token_id = template.tokenizer.pad_token_id
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    root = placed(roles, settings, compute).train()
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    loss_fn = _loss(settings, weights)
    reads = TreeBatch.action_index if settings.level == "token" else TreeBatch.answer_ends

    def judged() -> Judged:
        root.eval()
        found = _judge(root, heldout, settings.micro_tokens, compute)
        root.train()
        return replace(found, sources=sources, weights=weights)

    with Session(settings, "reward", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        if heldout.items and "first_eval_loss" not in session.extra:
            first = metrics_of(judged(), settings.loss)
            session.extra["first_eval_loss"] = first["eval_loss"]
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            count = _count(trees, items, settings)
            batches = [
                (trees.batch(m), (torch.tensor([trees.margins[i] for i in m]) if settings.margin else None, count))
                for m in distributed.mine(micro)
            ]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "reward", batches, loss_fn, compute, reads=reads)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {
                "loss": sums["loss"],
                **{told: sums[name] / count for name, told in TOLD.items() if name in sums},
                "grad_norm": norm,
                "learning_rate": optimizer.param_groups[0]["lr"],
            }
            note = f"loss {sums['loss']:.3f}" + (f" acc {metrics['accuracy']:.2f}" if "accuracy" in metrics else "")
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=note)
            if heldout.items and session.eval_due(step):
                session.extra["held"] = metrics_of(judged(), settings.loss)
                session.evaluated(step, session.extra["held"])
        best = session.restore_best()
        metrics = dict(session.extra.get("last", {}))
        metrics |= session.extra.get("held", {})
        metrics |= best
        if "first_eval_loss" in session.extra:
            metrics["first_eval_loss"] = session.extra["first_eval_loss"]

    report = {}
    if heldout.items:
        report = report_of(judged(), settings.loss, repeats_of([*train_records, *heldout_records], settings.loss))
    root.eval()
    mean, std = _normaliser(root, trees, settings, compute)
    folder = Path(settings.out) / "model"
    normaliser = {CONFIG_KEY: {"mean": mean, "std": std}}
    merges = isinstance(roles, AdapterRoles) and roles.mergeable
    if is_shared(roles):
        folders = [adapter_folder(folder), *([] if merges else [folder])]
        save_role(
            roles, "reward", template.tokenizer, folders, {**normaliser, "pad_token_id": model.config.pad_token_id}
        )
    if merges or not is_shared(roles):
        result = merged_model(roles, "reward") if isinstance(roles, AdapterRoles) else model
        result.config.pad_token_id = model.config.pad_token_id
        setattr(result.config, CONFIG_KEY, normaliser[CONFIG_KEY])
        save_result(result, template.tokenizer, folder)
    if distributed.is_main():
        atomic.write_json(Path(settings.out) / REPORT, report)
    facts = {
        named: len(trees.items),
        f"heldout_{named}": len(heldout.items),
        "score_mean": mean,
        "score_std": std,
        "reward_report": report,
        **template_facts(template),
        "dropped": {**dataset.left_out, **trees.dropped},
        "origins": dataset.origins,
        **session.facts,
    }
    return TrainResult(folder, metrics, facts)


# -- what is learnt -----------------------------------------------------------------------------------------------------


def _loss(settings: RewardSettings, weights: tuple[float, float]) -> LossFn[Extra]:
    """The loss of a micro-batch by the settings' names.

    Args:
        weights: unpaired: of the two labels.
    """
    options: dict[str, float] = {"centring": settings.centring, "label_smoothing": settings.label_smoothing}

    def loss_fn(out: TrunkOutput, extra: Extra) -> tuple[Tensor, dict[str, float]]:
        margins, count = extra
        margin_B = margins.to(out.hidden_TD.device) if margins is not None else None
        if settings.level == "token":
            tree, index = out.tree, out.tree.action_index()
            lengths_A = (tree.node_end_N - tree.node_start_N)[tree.node_parent_N >= 0]
            scores_M, ids_M = out.scores(index), tree.input_ids_T[index]
            return pairwise_tokens(scores_M, ids_M, lengths_A, count, margin_B=margin_B, **options)
        answers = answers_of(out)
        if settings.loss == "pointwise":
            return pointwise(answers.scores_A, answers.targets_A, count)
        if settings.loss == "unpaired":
            return unpaired(answers.scores_A, answers.targets_A, count, weights=weights)
        if settings.loss == "kwise":
            return kwise(answers.scores_A, answers.targets_A, answers.prompts_A, count, **options)
        chosen_B, rejected_B = answers.scores_A.view(-1, 2).unbind(1)
        return pairwise(chosen_B, rejected_B, count, margin_B=margin_B, **options)

    return loss_fn


def answers_of(out: TrunkOutput) -> Answers:
    """The answers of a batch, in tree order; of a pair the chosen one comes first."""
    answers = out.tree.node_parent_N >= 0
    ends = out.tree.answer_ends()
    return Answers(out.scores(ends), out.tree.loss_weight_T[ends], out.tree.node_parent_N[answers])


def _count(trees: Trees, items: Sequence[int], settings: RewardSettings) -> float:
    """A step's denominator: its records, or its answers where each of them is a target."""
    return float(sum(len(trees.items[i]) - 1 for i in items) if settings.loss == "pointwise" else len(items))


def _refuse_pairs(formats: Sequence[str]) -> None:
    """Raises DataError for comparisons: they say which answer is better, but not what either is worth."""
    found = next((name for name in formats if by_name(name).holds == "comparison"), None)
    if found is not None:
        raise DataError(
            f"found comparisons (format '{found}'), but loss: pointwise learns the scores of answers",
            field="data",
            hint='use loss: pairwise, or give rows like {"prompt": [...], "responses": [...], "scores": [...]}',
        )


def _refuse_equal_scores(records: Sequence[Record]) -> None:
    """Raises DataError where there is nothing to learn but one number."""
    scores = [s for r in records if isinstance(r, Ranking) for s in r.scores]
    if len(set(scores)) == 1:
        raise DataError(
            f"all {len(scores)} scores are {scores[0]:g}: there is nothing to tell apart",
            field="scores",
            hint="give answers of different quality with the scores that they deserve",
        )


def _on_scale(records: Sequence[Record], settings: RewardSettings) -> list[Record]:
    """Rankings with their scores mapped from `score_range` to 0 and 1.

    Raises:
        DataError: a score is outside of the range.
    """
    if settings.score_range is None:
        return list(records)
    low, high = settings.score_range
    found: list[Record] = []
    for record in records:
        assert isinstance(record, Ranking), "read as such"
        outside = [s for s in record.scores if not low <= s <= high]
        if outside:
            origin = record.origin
            raise DataError(
                f"found the score {outside[0]:g}, but score_range goes from {low:g} to {high:g}",
                field="scores",
                file=origin.file if origin else None,
                line=origin.line if origin else None,
                hint="widen score_range, or correct the row",
            )
        found.append(replace(record, scores=[(s - low) / (high - low) for s in record.scores]))
    return found


def _label_weights(trees: Trees, settings: RewardSettings) -> tuple[float, float]:
    """Weights of an answer that was not liked and of a liked one.

    Raises:
        DataError: only one of the two labels is there.
    """
    if settings.loss != "unpaired":
        return 1.0, 1.0
    total = len(trees.items)
    liked = int((trees.weights > 0).sum())
    if liked in (0, total):
        raise DataError(
            f"all {total} answers have the label {'true' if liked else 'false'}: there is nothing to tell apart",
            field="label",
            hint="give answers of both labels",
        )
    return balanced_weights(total - liked, liked) if settings.balance else (1.0, 1.0)


# -- what came of it ----------------------------------------------------------------------------------------------------


def _by_source(
    encode: Callable[..., Trees], records: Sequence[Record], template: ChatTemplate, settings: RewardSettings
) -> tuple[Trees, list[str]]:
    """Held-out trees, those of one source together, and the source of each."""
    named = [_source_of(record) for record in records]
    often = {name for name, _ in Counter(named).most_common(SOURCES)}
    groups: dict[str, list[Record]] = {}
    for name, record in zip(named, records, strict=True):
        groups.setdefault(name if name in often else "others", []).append(record)
    whole = Trees()
    items: list[list[Node]] = []
    sources: list[str] = []
    for name, part in groups.items():
        trees = trees_of(encode, part, template, stage="reward", max_length=limits_of(settings))
        whole.count(trees)
        whole.margins += trees.margins
        items += list(trees.items)
        sources += [name] * len(trees.items)
    return replace(whole, items=items), sources


def _source_of(record: Record) -> str:
    """What the row says of its source, or the name of its file."""
    origin = record.origin
    return (origin.source or Path(origin.file).stem) if origin is not None else ""


def _judge(root: RootModel, trees: Trees, micro_tokens: int, compute: Compute) -> Judged:
    """The scores of all answers, their sources left open; all ranks take part."""

    def read(indices: list[int]) -> tuple[NDArray[Any], ...]:
        tree = trees.batch(indices)
        with compute.autocast():
            answers = root(tree.to(compute.device), "reward", answers_of, reads=TreeBatch.answer_ends)
        scores, targets, prompts = (t.cpu() for t in answers)
        items = torch.tensor(indices)[prompts.unique(return_inverse=True)[1]]
        lengths = (tree.node_end_N - tree.node_start_N)[tree.node_parent_N >= 0]
        return scores.double().numpy(), targets.double().numpy(), items.numpy(), lengths.numpy()

    found = share_forwards(root, ["reward"], shortest_first(trees, micro_tokens), read, compute)
    scores_A, targets_A, items_A, lengths_A = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return Judged(scores_A, targets_A, items_A, lengths_A, sources=[])


def _normaliser(root: RootModel, trees: Trees, settings: RewardSettings, compute: Compute) -> tuple[float, float]:
    """Mean and standard deviation of the scores of the training answers, of a seeded sample where there are many."""
    items = trees.items
    if len(items) > NORMALISER_PAIRS:
        draw = np.random.default_rng([settings.seed, 0x5C]).choice(len(items), NORMALISER_PAIRS, replace=False)
        items = [items[i] for i in sorted(draw.tolist())]
    scores = _judge(root, replace(trees, items=items, margins=[]), settings.micro_tokens, compute).scores_A
    return float(scores.mean()), float(scores.std(ddof=1)) or 1.0
