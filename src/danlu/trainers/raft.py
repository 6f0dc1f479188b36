"""RAFT: the policy answers each prompt several times, and learns by SFT from its own best answers; best-of-n, distilled.

Dong et al. 2023. No reference is needed. What is kept also stands in `out/selected.jsonl`, as conversations that `danlu sft` reads;
with `raft.train: false` that file is all that comes of it (rejection sampling), and the model stays as it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from danlu import atomic
from danlu.alignment_config import GrpoSettings
from danlu.data.collate import EncodedPrompt
from danlu.data.formats.turns import is_blank
from danlu.text.chat_template import ChatTemplate
from danlu.trainers.players import iterations_of, players_of, scorer_of, watch_of
from danlu.training import distributed
from danlu.training.groups import Drawn, draw, group_batches, tree_of
from danlu.training.memory import within_limits
from danlu.training.methods import method_of
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import save_result
from danlu.training.rollouts import prompts_of, push_weights
from danlu.training.session import Session
from danlu.training.step import TrainResult, accumulate, apply, language_loss
from danlu.training.templates import template_facts, template_of
from danlu.training.tracking import read_metrics
from danlu.tree import TreeBatch
from danlu.types import Message

FILE = "selected.jsonl"
# What an iteration reports in which no answer was good enough: nothing was learnt.
NO_ANSWER = {"loss": 0.0, "grad_norm": 0.0}


@within_limits
def train(settings: GrpoSettings) -> TrainResult:
    """Trains and writes `out/model` and `out/selected.jsonl`; resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: there is nothing that scores answers.
        DataError: no prompt is left, or one cannot be verified.
        GateError: a reward model did not pass G-RM, and `follow_failed` is not set.
        TrainingError: the loss is no number.
    """
    distributed.start()
    template = template_of(settings.model, settings, stage="raft")
    prompts, heldout, facts = prompts_of(settings, template)
    players = players_of(settings, template, prompts, reference=False)
    root, engine, compute, options = players.root, players.engine, players.compute, settings.grpo
    scorer, method = scorer_of(players, settings), method_of(settings)
    total = iterations_of(settings, len(prompts))
    trained = [p for p in root.parameters() if p.requires_grad]
    optimizer = optimizer_of(root, settings.learning_rate, settings)

    with Session(settings, "raft", total=total, module=root, optimizers={"optimizer": optimizer}) as session:
        selected = Selected(Path(settings.out), session.start)
        watch = watch_of(players, heldout, scorer, settings, session)
        for step in session.steps():
            if session.cannot_draw(step):
                continue
            rate = settings.learning_rate * session.rate_factor(step) * watch.corrections["learning_rate"]
            set_rate(optimizer, rate)
            push_weights(engine, root, step)

            drawn = draw(engine, prompts, scorer, settings, template, step, method)
            kept = best_of(drawn, template, settings)
            selected.write(step, [row_of(drawn, i, template, step) for i in kept])
            stats = {**drawn.stats, "kept": float(len(kept))}
            if kept:
                stats["kept_score"] = fmean(drawn.scores[i] for i in kept)

            updates: list[dict[str, float]] = []
            for epoch in range(options.epochs if kept and settings.raft.train else 0):
                order = np.random.default_rng([settings.seed, step, epoch]).permutation(kept)
                for answers in np.array_split(order, min(options.minibatches, len(kept))):
                    actions = float(sum(len(drawn.trajectories[i].actions) for i in answers))
                    cut = group_batches(drawn.trajectories, [[i] for i in answers], settings.micro_tokens)
                    batches = distributed.mine([(tree_of(drawn.trajectories, part), actions) for part in cut])
                    sums = accumulate(root, "policy", batches, language_loss, compute, reads=TreeBatch.before_loss)
                    norm = apply(optimizer, trained, settings.max_grad_norm, session.judge(sums["loss"]))
                    updates.append({"loss": sums["loss"], "grad_norm": norm})

            metrics = dict(stats)
            if settings.raft.train:
                metrics |= {k: fmean(u[k] for u in updates) for k in NO_ANSWER} if updates else NO_ANSWER
            metrics = watch.step(step, metrics | players.reward.metrics, drawn.trajectories, drawn.scores)
            note = f"score {stats['score']:.2f} kept {len(kept)} len {stats['length']:.0f}"
            session.log(step, metrics, tokens=int(stats["tokens"]), note=note)
            watch.evaluate(step)
        metrics, told = watch.outcome()
        facts |= {"method": settings.method, "selected": distributed.same(selected.rows)}
        facts |= {**players.reward.facts, **template_facts(template), **told}

    folder = Path(settings.out) / "model"
    players.leave()
    players.policy.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(players.policy, template.tokenizer, folder, root.trunks, "policy")
    return TrainResult(folder, metrics, facts)


# -- what is kept -------------------------------------------------------------------------------------------------------


def best_of(drawn: Drawn, template: ChatTemplate, settings: GrpoSettings) -> list[int]:
    """The places of the best answers of each group, in order; of equal scores the first.

    Never one that says nothing; none without stop token unless `unfinished`, and none at or below `min_score`.
    """
    options = settings.raft

    def good(place: int) -> bool:
        found = drawn.trajectories[place]
        high = options.min_score is None or drawn.scores[place] > options.min_score
        whole = options.unfinished or found.finished
        return high and whole and not is_blank(template.decode_message(found.actions))

    kept: list[int] = []
    for places in drawn.groups:
        order = sorted((i for i in places if good(i)), key=lambda i: -drawn.scores[i])
        kept += sorted(order[: options.keep])
    return kept


def row_of(drawn: Drawn, place: int, template: ChatTemplate, step: int) -> dict[str, Any]:
    """An answer as a row of danlu's own conversations."""
    asked: EncodedPrompt = drawn.prompts[place]
    answer: Message = template.decode_message(drawn.trajectories[place].actions)
    return {
        "messages": [*asked.messages, answer],
        "score": drawn.scores[place],
        "source": "raft",
        "step": step + 1,
    }


class Selected:
    """`selected.jsonl`, which grows with every iteration. What comes after a checkpoint is dropped when a stage goes on from it."""

    def __init__(self, folder: Path, done: int) -> None:
        self.path = folder / FILE
        self.rows = self._done = 0
        if distributed.is_main():
            self._rewind(done)

    def write(self, step: int, rows: Sequence[dict[str, Any]]) -> None:
        """Adds the rows of a 0-based step; after a return to a checkpoint, those of later steps are dropped first."""
        if not distributed.is_main():
            return
        if self._done > step:
            self._rewind(step)
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.rows, self._done = self.rows + len(rows), step + 1

    def _rewind(self, done: int) -> None:
        kept = [row for row in read_metrics(self.path) if row["step"] <= done] if done else []
        atomic.write_jsonl(self.path, kept)
        self.rows, self._done = len(kept), done
