"""Direct preference optimisation: a policy learns from comparisons, held back by what it was before; no reward model.

Rafailov et al. 2023, and the losses of its relatives; some know no reference, and then none is loaded or read. A pair is one
token tree, prompt -> {chosen, rejected}. Dropout is off: the loss compares two models on the same text, and would see its noise.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from danlu.alignment_config import REFERENCE_FREE, DpoSettings
from danlu.data.collate import Trees, encode_comparisons, require_items
from danlu.data.packing import Plan
from danlu.models.root import RoleName, RootModel, TrunkOutput
from danlu.training import distributed
from danlu.training.answers import answer_facts
from danlu.training.compute import Compute, choose
from danlu.training.interval import wilson
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.pairs import means, pair_logprobs, pair_loss, pair_tokens, policy_and_reference, read_answers
from danlu.training.progress import Bar
from danlu.training.result import save_result
from danlu.training.session import Session
from danlu.training.setup import limits_of, placed, plan_of, records_of
from danlu.training.step import TrainResult, accumulate, apply, batches_of
from danlu.training.templates import template_of
from danlu.training.tokens import trees_of
from danlu.tree import TreeBatch


@within_limits
def train(settings: DpoSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`."""
    distributed.start()
    template = template_of(settings.model, settings, stage="dpo")
    train_records, heldout_records, dataset = records_of(settings, "comparison")
    trees = trees_of(encode_comparisons, train_records, template, stage="dpo", max_length=limits_of(settings))
    heldout = trees_of(encode_comparisons, heldout_records, template, stage="dpo", max_length=limits_of(settings))
    require_items(trees, "comparison", settings.max_length)
    lengths = trees.lengths
    steps = plan_of(lengths, settings)

    roles, model = policy_and_reference(settings, updates=len(steps), stop_ids=template.stop_ids)
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    root = placed(roles, settings, compute).eval()
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    online = settings.reference == "online"
    # Before a checkpoint is read, the policy still is the reference.
    frozen: RoleName = "ref" if online or settings.adapted else "policy"
    table, heldout_ref = torch.zeros(len(trees.items), 2), torch.zeros(len(heldout.items), 2)
    if settings.loss not in REFERENCE_FREE:
        heldout_ref = read_heldout(root, frozen, heldout, settings, compute)
        if not online:
            table = reference_logprobs(root, frozen, trees, steps, compute)

    def loss_fn(out: TrunkOutput, extra: tuple[Tensor, float]) -> tuple[Tensor, dict[str, float]]:
        ref, denominator = extra
        ref_B2 = ref.to(out.hidden_TD.device)
        return pair_loss(pair_logprobs(out), ref_B2, pair_tokens(out.tree), denominator, settings)

    with Session(settings, "dpo", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            pairs = float(len(items))
            refs = read_answers(root, "ref", micro, trees.batch, compute) if online else [table[m] for m in micro]
            mine = distributed.mine(list(zip(micro, refs, strict=True)))
            batches = [(trees.batch(m), (ref, pairs)) for m, ref in mine]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "policy", batches, loss_fn, compute, reads=TreeBatch.before_actions)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {
                "loss": sums["loss"],
                **means(sums, pairs),
                "grad_norm": norm,
                "learning_rate": optimizer.param_groups[0]["lr"],
            }
            note = f"loss {sums['loss']:.3f} acc {metrics['accuracy']:.2f}"
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=note)
            if heldout.items and session.eval_due(step):
                held = evaluate(root, heldout, heldout_ref, settings, compute)
                session.extra["held"] = held
                session.evaluated(step, held)
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
        "pairs": len(trees.items),
        "heldout_pairs": len(heldout.items),
        **answers,
        "dropped": {**dataset.left_out, **trees.dropped},
        "origins": dataset.origins,
        **session.facts,
    }
    return TrainResult(folder, metrics, facts)


# -- the reference ----------------------------------------------------------------------------------------------------


def reference_logprobs(root: RootModel, role: RoleName, trees: Trees, steps: Plan, compute: Compute) -> Tensor:
    """`[items, 2]` under the frozen reference, 0 for pairs that no step sees.

    Read in the micro-batches of the first epoch, so that the first step compares equal numbers.
    """
    epoch = min([*steps.firsts[1:2], len(steps)])
    micro = [m for step in steps[:epoch] for m in step]
    with Bar("dpo: reference", len(distributed.mine(micro)), quiet=not distributed.is_main()) as bar:

        def batch(m: list[int]) -> TreeBatch:
            tree = trees.batch(m)
            bar.advance(tree.tokens, "")
            return tree

        found = read_answers(root, role, micro, batch, compute)
    table = torch.zeros(len(trees.items), 2)
    table[[i for m in micro for i in m]] = torch.cat(found)
    return table


# -- evaluation -------------------------------------------------------------------------------------------------------


def read_heldout(root: RootModel, role: RoleName, trees: Trees, settings: DpoSettings, compute: Compute) -> Tensor:
    """`pair_logprobs` of all held-out pairs, in the order of `batches_of`."""
    found = read_answers(root, role, batches_of(trees, settings.micro_tokens), lambda tree: tree, compute)
    return torch.cat(found) if found else torch.zeros(0, 2)


def evaluate(
    root: RootModel, trees: Trees, ref_B2: Tensor, settings: DpoSettings, compute: Compute
) -> dict[str, float]:
    """Held-out loss, accuracy of the implicit rewards with its 95% interval (Wilson), and means as in training.

    Args:
        ref_B2: `read_heldout` of the reference.
    """
    count = float(len(trees.items))
    policy_B2 = read_heldout(root, "policy", trees, settings, compute)
    tokens_B2 = torch.cat([pair_tokens(tree) for tree in batches_of(trees, settings.micro_tokens)])
    loss, sums = pair_loss(policy_B2, ref_B2, tokens_B2, count, settings)
    found = means(sums, count)
    low, high = wilson(found["accuracy"], int(count))
    found = {"loss": float(loss), "accuracy_low": low, "accuracy_high": high, **found}
    return {f"eval_{name}": value for name, value in found.items()}
