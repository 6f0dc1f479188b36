"""Kahneman-Tversky optimisation: a policy learns from single answers that were liked or not; no pairs, no reward model.

Ethayarajh et al. 2024. An answer is one token tree, prompt -> {answer}. How far the policy has moved in all is estimated on
answers that belong to other prompts: each prompt of a step is read once more, with the answer of another row, and the mean of
these log-ratios over the step is the baseline that the step's answers are held against. Dropout is off.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from danlu.alignment_config import DpoSettings
from danlu.data.collate import Trees, encode_unpaired, require_items
from danlu.data.packing import MicroBatches, micro_batches
from danlu.losses.kto import kl_baseline, kto
from danlu.models.root import RoleName, RootModel, TrunkOutput
from danlu.training import distributed
from danlu.training.answers import answer_facts
from danlu.training.compute import Compute, choose
from danlu.training.interval import wilson
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.pairs import answer_logprobs, policy_and_reference, read_answers
from danlu.training.progress import Bar
from danlu.training.result import save_result
from danlu.training.session import Session
from danlu.training.setup import limits_of, placed, plan_of, records_of
from danlu.training.step import TrainResult, accumulate, apply
from danlu.training.templates import template_of
from danlu.training.tokens import trees_of
from danlu.tree import Node, TreeBatch, branches, forest


@within_limits
def train(settings: DpoSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`."""
    distributed.start()
    template = template_of(settings.model, settings, stage="kto")
    train_records, heldout_records, dataset = records_of(settings, "unpaired")
    trees = trees_of(encode_unpaired, train_records, template, stage="kto", max_length=limits_of(settings))
    heldout = trees_of(encode_unpaired, heldout_records, template, stage="kto", max_length=limits_of(settings))
    require_items(trees, "labelled answer", settings.max_length)
    lengths = trees.lengths
    steps = plan_of(lengths, settings)

    roles, model = policy_and_reference(settings, updates=len(steps), stop_ids=template.stop_ids)
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    root = placed(roles, settings, compute).eval()
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    given, held = Answers(trees, settings), Answers(heldout, settings)
    online = settings.reference == "online"
    # Before a checkpoint is read, the policy still is the reference.
    frozen: RoleName = "ref" if online or settings.adapted else "policy"
    first = [m for step in steps[: min([*steps.firsts[1:2], len(steps)])] for m in step]
    table = torch.zeros(len(trees.items), 2)
    if not online:
        table = given.table(root, frozen, first, compute, quiet=not distributed.is_main())
    held_batches = micro_batches(range(len(heldout.items)), heldout.lengths.tolist(), settings.micro_tokens)
    held_ref = held.table(root, frozen, held_batches, compute)

    def loss_fn(out: TrunkOutput, extra: tuple[Tensor, Tensor, float, float]) -> tuple[Tensor, dict[str, float]]:
        ref, liked, baseline, denominator = extra
        device = out.hidden_TD.device
        return _loss(answer_logprobs(out), ref.to(device), liked.to(device), baseline, denominator, settings)

    with Session(settings, "kto", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            count = float(len(items))
            if online:
                table[items] = given.table(root, "ref", micro, compute)[items]
            baseline = kl_baseline(given.strangers(root, "policy", items, compute) - table[items, 1])
            batches = [
                (trees.batch(m), (table[m, 0], given.liked[m], baseline, count)) for m in distributed.mine(micro)
            ]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "policy", batches, loss_fn, compute, reads=TreeBatch.before_actions)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {
                "loss": sums["loss"],
                **_means(sums, count),
                "kl": baseline,
                "grad_norm": norm,
                "learning_rate": optimizer.param_groups[0]["lr"],
            }
            note = f"loss {sums['loss']:.3f} acc {metrics['accuracy']:.2f}"
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=note)
            if heldout.items and session.eval_due(step):
                found = _evaluate(root, held, held_batches, held_ref, settings, compute)
                session.extra["held"] = found
                session.evaluated(step, found)
        best = session.restore_best()
        metrics = dict(session.extra.get("last", {}))
        metrics |= session.extra.get("held", {})
        metrics |= best

    head = model.get_output_embeddings().weight
    answers = answer_facts(root, head, trees, template, settings.micro_tokens, compute)
    folder = Path(settings.out) / "model"
    model.generation_config.eos_token_id = sorted(template.stop_ids)
    save_result(model, template.tokenizer, folder, roles, "policy")
    facts = {
        "labelled_answers": len(trees.items),
        "liked_answers": int(given.liked.sum()),
        "heldout_answers": len(heldout.items),
        **answers,
        "dropped": {**dataset.left_out, **trees.dropped},
        "origins": dataset.origins,
        **session.facts,
    }
    return TrainResult(folder, metrics, facts)


# -- answers and strangers ----------------------------------------------------------------------------------------------


class Answers:
    """Labelled answers, and for each prompt the answer of another row: its stranger, cut where both are longer than max_length.

    Attributes:
        liked: bool, one per item.
    """

    def __init__(self, trees: Trees, settings: DpoSettings) -> None:
        self.trees, self.settings = trees, settings
        self.liked = torch.tensor([item[1].loss_weights[0] > 0 for item in trees.items], dtype=torch.bool)
        self.partners = partners_of([hash(tuple(item[0].ids)) for item in trees.items], settings.seed)

    def table(
        self, root: RootModel, role: RoleName, micro: MicroBatches, compute: Compute, *, quiet: bool = True
    ) -> Tensor:
        """`[items, 2]` log-probabilities of answers and of strangers under a role; 0 for items that `micro` does not have.

        Answers are read in these very micro-batches, so that the first step compares equal numbers.
        """
        found = torch.zeros(len(self.trees.items), 2)
        items = [i for m in micro for i in m]
        if not items:
            return found
        with Bar("kto: reference", len(distributed.mine(micro)), quiet=quiet) as bar:

            def batch(m: list[int]) -> TreeBatch:
                tree = self.trees.batch(m)
                bar.advance(tree.tokens, "")
                return tree

            found[items, 0] = torch.cat(read_answers(root, role, micro, batch, compute, answer_logprobs))
        found[items, 1] = self.strangers(root, role, items, compute)
        return found

    def strangers(self, root: RootModel, role: RoleName, items: Sequence[int], compute: Compute) -> Tensor:
        """Log-probabilities under a role of the strangers' answers to the prompts of these items, in their order."""
        places = range(len(items))
        sizes = [sum(len(n.ids) for n in self._stranger(i)) for i in items]
        cut = micro_batches(places, sizes, self.settings.micro_tokens, ranks=distributed.world()[1])

        def batch(part: list[int]) -> TreeBatch:
            return TreeBatch.of(forest(self._stranger(items[place]) for place in part))

        read = torch.cat(read_answers(root, role, cut, batch, compute, answer_logprobs))
        found = torch.zeros(len(items))
        found[[place for part in cut for place in part]] = read
        return found

    def _stranger(self, item: int) -> list[Node]:
        prompt, answer = self.trees.items[item][0].ids, self.trees.items[self.partners[item]][1].ids
        return branches(prompt, [answer[: self.settings.max_length - len(prompt)]])


def partners_of(prompts: Sequence[Hashable], seed: int) -> list[int]:
    """For each row another one with another prompt: the next such in an order drawn by seed, the first following the last.

    Where all prompts are equal, the next row of that order.
    """
    order = np.random.default_rng([seed, 0x70]).permutation(len(prompts)).tolist()
    after = order[1:] + order[:1]
    ends = [place for place, row in enumerate(order) if prompts[row] != prompts[after[place]]]
    found = dict(zip(order, after, strict=True))
    # Backwards from the end of a run of equal prompts: its rows have one partner, the row after the run.
    for place in range(ends[-1], ends[-1] - len(order), -1) if ends else ():
        row, following = order[place], after[place]
        found[row] = following if prompts[row] != prompts[following] else found[following]
    return [found[row] for row in range(len(prompts))]


# -- loss and evaluation ------------------------------------------------------------------------------------------------


def _loss(
    policy_B: Tensor, ref_B: Tensor, liked_B: Tensor, baseline: float, denominator: float, settings: DpoSettings
) -> tuple[Tensor, dict[str, float]]:
    return kto(
        policy_B,
        ref_B,
        liked_B,
        baseline,
        denominator,
        beta=settings.strength,
        desirable_weight=settings.desirable_weight,
        undesirable_weight=settings.undesirable_weight,
    )


def _means(sums: dict[str, float], count: float) -> dict[str, float]:
    """Accuracy, and the mean implicit rewards of liked and other answers; 0 where there are none."""
    liked = sums["liked"]
    chosen = sums["liked_reward"] / liked if liked else 0.0
    rejected = sums["other_reward"] / (count - liked) if count > liked else 0.0
    return {
        "accuracy": sums["right"] / count,
        "margin": chosen - rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "liked": liked / count,
    }


def _evaluate(
    root: RootModel, held: Answers, micro: MicroBatches, ref_I2: Tensor, settings: DpoSettings, compute: Compute
) -> dict[str, float]:
    """Held-out loss, accuracy with its 95% interval (Wilson), and means as in training, with a baseline of their own.

    Args:
        ref_I2: `Answers.table` of the reference.
    """
    policy_I2 = held.table(root, "policy", micro, compute)
    baseline = kl_baseline(policy_I2[:, 1] - ref_I2[:, 1])
    count = float(len(held.liked))
    loss, sums = _loss(policy_I2[:, 0], ref_I2[:, 0], held.liked, baseline, count, settings)
    means = _means(sums, count)
    low, high = wilson(means["accuracy"], int(count))
    found = {"loss": float(loss), "accuracy_low": low, "accuracy_high": high, "kl": baseline, **means}
    return {f"eval_{name}": value for name, value in found.items()}
