"""From settings to models, tokenizer and records: the same few lines for every trainer."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from danlu.alignment_config import RewardSettings, RolloutSettings
from danlu.data.packing import Lengths, Plan, plan_steps
from danlu.data.read import Dataset
from danlu.data.sources import read_sources
from danlu.data.split import split_heldout
from danlu.data.truncate import Limits
from danlu.exceptions import ModelError, SettingsError
from danlu.generation.seeds import mix_seed
from danlu.models.adapters import PREFIX_KINDS, adapter_roles, freeze_parts, teaches_a_new_end
from danlu.models.embeddings import holds_bfloat16
from danlu.models.load import load_model, raw_config
from danlu.models.places import is_adapter, resolve
from danlu.models.prefix import attached
from danlu.models.quantize import bits_of, is_quantized, load_in_bits, load_quantized
from danlu.models.registry import family_of
from danlu.models.resting import rest
from danlu.models.roles import SeparateModels
from danlu.models.root import RoleName, RootModel
from danlu.train_config import QUANTISED_BASES, Sources, TrainSettings
from danlu.training import distributed
from danlu.training.compute import DTYPES, Compute
from danlu.training.runs import resolve_model
from danlu.training.sharding import shard, splits
from danlu.types import Record, RecordKind

SOURCE = "danlu_source"  # of a base: the folder or hub id that its weights were read from
ROUNDED = "danlu_rounded"  # of a base: whether resting took digits from its weights


def records_of(settings: TrainSettings, kind: RecordKind) -> tuple[list[Record], list[Record], Dataset]:
    """Training and held-out records, and the data set they were read from (for its counts).

    `max_records` keeps a seeded sample of the training records.
    """
    if not settings.data:
        raise SettingsError("no data is given", field="data", hint="give a file, folder or glob")

    def read_all(sources: Sources) -> Dataset:
        # What becomes of scored answers only stages that compare have a say in.
        compared = {name: getattr(settings, name) for name in ("pairs", "margin") if hasattr(settings, name)}
        return read_sources(sources, kind, seed=settings.seed, skip_bad=settings.skip_bad, **compared)

    dataset = read_all(settings.data)
    if settings.eval_data is not None:
        train, heldout = list(dataset.records), list(read_all(settings.eval_data).records)
    else:
        train, heldout = split_heldout(dataset.records, settings.eval_fraction)
    if settings.max_records is not None:
        train = sample_records(train, settings.max_records, settings.seed)
        heldout = sample_records(heldout, settings.max_records, settings.seed)
    if settings.early_stopping is not None and not heldout:
        raise SettingsError(
            "nothing is held out to watch", field="early_stopping", hint="give eval_data, or raise eval_fraction"
        )
    return train, heldout, dataset


def sample_records(records: list[Record], count: int, seed: int) -> list[Record]:
    """At most `count` records, chosen by seed, in their order."""
    import numpy as np

    if len(records) <= count:
        return records
    chosen = np.random.default_rng([seed, 0xDA]).choice(len(records), size=count, replace=False)
    return [records[i] for i in sorted(chosen.tolist())]


def policy_roles(
    settings: TrainSettings,
    *,
    trained: RoleName = "policy",
    updates: int,
    stop_ids: Collection[int] = (),
    model: Any = None,
) -> tuple[nn.Module, Any]:
    """A module with one trained role, of the weights or the adapter that `settings.adapter` says, and the model under it.

    Args:
        updates, stop_ids: see `shared_roles`.
        model: already loaded or made; None: the settings' model.
    """
    if model is None:
        model = load_policy(settings, scalar=trained == "reward" and not settings.adapted)
    if settings.adapted:
        return shared_roles(model, [trained], settings, [trained], updates=updates, stop_ids=stop_ids), model
    return own_models({trained: model}, [trained], settings), model


def load_policy(settings: TrainSettings, *, scalar: bool = False) -> Any:
    """The settings' model in fp32; under an adapter in bf16 where it is stored so, for frozen weights need not be more exact.

    A base that an adapter wants in few bits is rounded tensor by tensor as it is read: it may not fit in 16.
    """
    path = resolve_model(settings.model)
    name, local = resolve(path)
    own = local and not is_adapter(name)
    if own and is_quantized(name) and family_of(raw_config(name, True)) is None:  # ChatGLM's packs are its own affair
        _check_packed(name, settings)
        model = load_quantized(name)
    elif settings.adapted and settings.frozen_bits != 16 and not scalar and (own or not local):
        model = load_in_bits(path, settings.frozen_bits, layout=settings.base_format)
    else:
        exact = not settings.adapted or settings.frozen_bits != 16 or not holds_bfloat16(path)
        model = load_model(path, scalar=scalar, dtype=torch.float32 if exact else torch.bfloat16)
    refuse_prefix(model, settings)
    setattr(model, SOURCE, path)
    return model


def refuse_prefix(model: Any, settings: TrainSettings) -> None:
    """A model that reads virtual tokens before every text trains on with these only: weights cannot say what they say.

    Raises:
        ModelError: the settings' kind of adapter would leave the prefix behind.
    """
    prefix = attached(model)
    if prefix is not None and settings.adapter not in PREFIX_KINDS:
        raise ModelError(
            f"this model reads {prefix.tokens} virtual tokens before every text ({prefix.kind}), which adapter: "
            f"{settings.adapter} would lose",
            file=settings.model,
            hint=f"adapter: {prefix.kind} with prefix.tokens: {prefix.tokens} goes on; or start from the model under them",
        )


def _check_packed(folder: str, settings: TrainSettings) -> None:
    """Raises ModelError unless an adapter of a kind that stands on packed weights is asked for, with the bits they have."""
    bits = bits_of(folder)
    if settings.adapter not in QUANTISED_BASES or isinstance(settings, RewardSettings):
        what = "a reward model" if isinstance(settings, RewardSettings) else f"adapter: {settings.adapter}"
        raise ModelError(
            f"this folder holds {bits}-bit weights only, on which {what} cannot be trained",
            file=folder,
            hint=f"start from the model it was made from, or adapter: qlora with base_bits: {bits} (not for reward models)",
        )
    if settings.frozen_bits != bits:
        raise ModelError(
            f"this folder holds {bits}-bit weights, and a base of {settings.frozen_bits} bits is asked for",
            file=folder,
            hint=f"base_bits: {bits}",
        )


def placed(roles: nn.Module, settings: TrainSettings, compute: Compute) -> RootModel:
    """The roles where the stage computes: what is frozen rests in the dtype of products, weights are split as the strategy wants.

    Call it before the optimizer is made.
    """
    dtype = torch.float32 if splits(settings) else DTYPES[compute.dtype]
    if isinstance(roles, SeparateModels):
        for model in roles.models.values():
            if not any(p.requires_grad for p in model.parameters()):
                rest(model, dtype)
    else:
        base: Any = roles.base
        # DoRA compares lengths of rows with those of exact weights; what has no folder could not be read again to be merged.
        exact = settings.adapter == "dora" or not hasattr(base, SOURCE)
        # An engine beside packed weights shares them, and the tables around them.
        if not (isinstance(settings, RolloutSettings) and settings.frozen_bits != 16):
            setattr(base, ROUNDED, rest(base, torch.float32 if exact else dtype))
    if settings.compile_head and compute.device == "cpu" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        raise SettingsError(
            "compile_head needs a C++ compiler on a CPU, and there is none", field="compile_head", hint="leave it off"
        )
    return shard(RootModel(roles, compiled=settings.compile_head).to(compute.device), settings, compute)


def own_models(models: Mapping[RoleName, Any], trained: Sequence[RoleName], settings: TrainSettings) -> SeparateModels:
    """A model for each role; of those that learn all weights do, or the last layers (`adapter: freeze`)."""
    made = SeparateModels(models, trained)
    if settings.adapter == "freeze":
        for role in trained:
            freeze_parts(models[role], settings.freeze)
    return made


def shared_roles(
    base: Any,
    roles: Sequence[RoleName],
    settings: TrainSettings,
    trained: Sequence[RoleName],
    *,
    updates: int,
    stop_ids: Collection[int] = (),
) -> nn.Module:
    """All roles on one frozen base, by adapters of the settings' kind.

    Args:
        updates: that the run plans for each role that learns.
        stop_ids: the tokens that answers end with; none: nothing that is trained ends.
    """
    return adapter_roles(
        base,
        roles,
        settings,
        trained=trained,
        seed=mix_seed(settings.seed, 0x10BA),
        updates=updates,
        embeddings=trains_embeddings(base, settings, stop_ids),
    )


def trains_embeddings(base: Any, settings: TrainSettings, stop_ids: Collection[int]) -> bool:
    """Whether embeddings and output head learn beside an adapter (`lora.embeddings`).

    An adapter leaves the row of a stop token as it is. If the model has never ended anything with that token, it could not
    learn to stop (G-STOP).
    """
    wanted = settings.lora.embeddings
    if settings.adapter in PREFIX_KINDS or wanted == "off":
        return False
    return wanted == "on" or (bool(stop_ids) and teaches_a_new_end(base, frozenset(stop_ids)))


def limits_of(settings: TrainSettings, total: int | None = None) -> Limits:
    """The settings' limits; `total` in place of `max_length` where an answer still needs room."""
    return Limits(
        total or settings.max_length, settings.max_prompt_tokens, settings.max_answer_tokens, settings.overlength
    )


def plan_of(lengths: Lengths, settings: TrainSettings) -> Plan:
    """Which items each optimizer step sees, for as many processes as there are."""
    return plan_steps(
        lengths,
        tokens_per_step=settings.tokens_per_step,
        micro_tokens=settings.micro_tokens,
        epochs=settings.epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
        ranks=distributed.world()[1],
    )
