"""Direct preference optimisation: a policy learns from comparisons, held back by what it was before; no reward model.

Rafailov et al. 2023. A pair is one token tree, prompt -> {chosen, rejected}. Dropout is off: the loss compares two models on
the same text, and would see its noise.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from danlu.alignment_config import DpoSettings
from danlu.data.collate import Trees, encode_comparisons, require_items
from danlu.data.packing import Plan
from danlu.losses.dpo import sigmoid
from danlu.losses.reduce import sum_by_node
from danlu.models.load import load_model
from danlu.models.roles import SeparateModels, reference_model
from danlu.models.root import RoleName, RootModel, TrunkOutput
from danlu.training import distributed
from danlu.training.answers import answer_facts
from danlu.training.compute import Compute, choose
from danlu.training.interval import wilson
from danlu.training.logprobs import logprobs
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.progress import Bar
from danlu.training.result import save_result
from danlu.training.runs import resolve_model
from danlu.training.session import Session
from danlu.training.setup import limits_of, lora_roles, plan_of, records_of
from danlu.training.sharding import shard, share_forwards
from danlu.training.step import TrainResult, accumulate, apply, batches_of
from danlu.training.templates import template_of
from danlu.training.tokens import trees_of
from danlu.tree import TreeBatch

Item = TypeVar("Item")


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

    roles, model = _roles(settings)
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    root = shard(RootModel(roles).to(compute.device).eval(), settings, compute)
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    online = settings.reference == "online"
    # Before a checkpoint is read, the policy still is the reference.
    frozen: RoleName = "ref" if online or settings.adapter == "lora" else "policy"
    precomputed = None if online else reference_logprobs(root, frozen, trees, steps, compute)
    heldout_ref = read_heldout(root, frozen, heldout, settings, compute)

    def loss_fn(out: TrunkOutput, extra: tuple[Tensor, float]) -> tuple[Tensor, dict[str, float]]:
        ref, denominator = extra
        return pair_loss(pair_logprobs(out), ref.to(out.hidden_TD.device), denominator, settings)

    with Session(settings, "dpo", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            pairs = float(len(items))
            if precomputed is None:
                refs = read_pairs(root, "ref", micro, trees.batch, compute)
            else:
                refs = [precomputed[m] for m in micro]
            mine = distributed.mine(list(zip(micro, refs, strict=True)))
            batches = [(trees.batch(m), (ref, pairs)) for m, ref in mine]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "policy", batches, loss_fn, compute)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {
                "loss": sums["loss"],
                **_means(sums, pairs),
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


def _roles(settings: DpoSettings) -> tuple[nn.Module, Any]:
    """The policy, beside it the reference where it is asked for at every step, and the transformers model of the policy."""
    path = resolve_model(settings.model)
    model = load_model(path)
    if settings.adapter == "lora":
        return lora_roles(model, ["policy"], settings), model
    models: dict[RoleName, Any] = {"policy": model}
    if settings.reference == "online":
        models["ref"] = reference_model(path, settings.ref_bits)
    return SeparateModels(models, ["policy"]), model


# -- log-probabilities of pairs ---------------------------------------------------------------------------------------


def pair_logprobs(out: TrunkOutput) -> Tensor:
    """Log-probabilities `[B, 2]` of chosen and rejected answers of a batch of prompt -> {chosen, rejected} trees."""
    index = out.tree.action_index()
    logp, _ = logprobs(out, index)
    return sum_by_node(logp, index, out.tree).view(-1, 3)[:, 1:]


def read_pairs(
    root: RootModel, role: RoleName, items: Sequence[Item], batch: Callable[[Item], TreeBatch], compute: Compute
) -> list[Tensor]:
    """`pair_logprobs` of a role on the batch of each item, without gradients and on the CPU; a rank reads its share."""

    def read(item: Item) -> Tensor:
        with compute.autocast():
            found: Tensor = root(batch(item).to(compute.device), role, pair_logprobs)
        return found.cpu()

    return share_forwards(root, [role], items, read, compute)


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

        found = read_pairs(root, role, micro, batch, compute)
    table = torch.zeros(len(trees.items), 2)
    table[[i for m in micro for i in m]] = torch.cat(found)
    return table


# -- loss and evaluation ----------------------------------------------------------------------------------------------


def pair_loss(
    policy_B2: Tensor, ref_B2: Tensor, denominator: float, settings: DpoSettings
) -> tuple[Tensor, dict[str, float]]:
    """The loss that the settings name, on log-probabilities of chosen and rejected answers."""
    (chosen, rejected), (ref_chosen, ref_rejected) = policy_B2.unbind(1), ref_B2.unbind(1)
    return sigmoid(
        chosen,
        rejected,
        ref_chosen,
        ref_rejected,
        denominator,
        beta=settings.beta,
        label_smoothing=settings.label_smoothing,
    )


def _means(sums: dict[str, float], pairs: float) -> dict[str, float]:
    means = {k: v / pairs for k, v in sums.items() if k != "loss"}
    return {"accuracy": means.pop("right"), **means}


def read_heldout(root: RootModel, role: RoleName, trees: Trees, settings: DpoSettings, compute: Compute) -> Tensor:
    """`pair_logprobs` of all held-out pairs, in the order of `batches_of`."""
    batches = batches_of(trees, settings.micro_tokens)
    found = read_pairs(root, role, batches, lambda tree: tree, compute)
    return torch.cat(found) if found else torch.zeros(0, 2)


def evaluate(
    root: RootModel, trees: Trees, ref_B2: Tensor, settings: DpoSettings, compute: Compute
) -> dict[str, float]:
    """Held-out loss, accuracy of the implicit rewards with its 95% interval (Wilson), and means as in training.

    Args:
        ref_B2: `read_heldout` of the reference.
    """
    count = len(trees.items)
    loss, sums = pair_loss(read_heldout(root, "policy", trees, settings, compute), ref_B2, float(count), settings)
    means = _means(sums, float(count))
    low, high = wilson(means["accuracy"], count)
    found = {"loss": float(loss), "accuracy_low": low, "accuracy_high": high, **means}
    return {f"eval_{name}": value for name, value in found.items()}
