"""Pre-training by corruption: blanks (GLM), masked tokens in four modes (UniLM), cut spans (T5); from nothing or from a model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from danlu.config import PretrainSettings
from danlu.data.collate import encode_documents, require_items
from danlu.data.sources import read_sources
from danlu.exceptions import DataError, ModelError, SettingsError
from danlu.generation.seeds import mix_seed
from danlu.models import starters
from danlu.models.load import load_model
from danlu.models.rows import OneModel, RowsRoot
from danlu.text.chat_template import ChatTemplate
from danlu.training import distributed
from danlu.training.compute import choose
from danlu.training.denoise import (
    BLANK_TOKENS,
    SENTINELS,
    Text,
    Texts,
    heldout_rows_loss,
    piece_ids,
    rows_loss,
    rows_of,
)
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import save_result
from danlu.training.runs import refuse_patches, resolve_model
from danlu.training.session import Session
from danlu.training.setup import plan_of, policy_roles, records_of
from danlu.training.sharding import shard
from danlu.training.step import TrainResult, accumulate, apply
from danlu.training.templates import tokenizer_of
from danlu.training.tokens import trees_of
from danlu.types import Conversation

WANTED = {
    "glm": BLANK_TOKENS,
    "unilm": ("[MASK]",),
    "t5": tuple(f"<extra_id_{n}>" for n in range(SENTINELS)),
}


@within_limits
def train(settings: PretrainSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: neither a model nor a tokenizer for a starter is given, or LoRA is asked for where there is none.
        ModelError: the model is not of the objective's family, or its tokenizer lacks the objective's tokens.
    """
    distributed.start()
    tokenizer, model = start(settings)
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    train_records, heldout_records, dataset = records_of(settings, "document")
    length = settings.max_length - (
        1 if settings.objective == "unilm" else 0
    )  # two parts need one more end between them
    trees = trees_of(encode_documents, train_records, tokenizer, stage="pretrain", max_length=length)
    held = trees_of(encode_documents, heldout_records, tokenizer, stage="pretrain", max_length=length)
    require_items(trees, "document", settings.max_length)
    make = rows_of(settings, model.config, tokenizer)
    windows = [Text(item[0].ids) for item in trees.items]
    rows = instruction_rows(settings, tokenizer, len(windows))
    texts = Texts([*windows, *rows], make, mix_seed(settings.seed, 0x7E57))
    heldout = Texts([Text(item[0].ids) for item in held.items], make, settings.seed)
    lengths = texts.lengths
    steps = plan_of(lengths, settings)

    lora = settings.adapter == "lora"
    if lora and settings.objective != "glm":
        raise SettingsError(f"objective {settings.objective} trains all weights", field="adapter", hint="adapter: full")
    if settings.adapter not in ("full", "lora"):
        raise SettingsError(
            f"adapter {settings.adapter} is not there for objective {settings.objective}",
            field="adapter",
            hint="full or lora",
        )
    roles = policy_roles(settings, updates=len(steps), model=model)[0] if lora else OneModel(model)
    root = shard(RowsRoot(roles).to(compute.device).train(), settings, compute)
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    with Session(settings, "pretrain", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        if heldout.items and "first_eval_loss" not in session.extra:
            root.eval()
            session.extra["first_eval_loss"] = heldout_rows_loss(root, heldout, settings.micro_tokens, compute)
            root.train()
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            # What is learnt depends on how texts are corrupted, so the denominator is known when the rows are made.
            made = [texts.batch(m, step) for m in micro]
            weight = max(sum(float(b.loss_weight_R.sum()) for b in made), 1.0)
            batches = [(batch, weight) for batch in distributed.mine(made)]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "policy", batches, rows_loss, compute)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {"loss": sums["loss"], "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=f"loss {sums['loss']:.3f}")
            if heldout.items and session.eval_due(step):
                root.eval()
                session.extra["eval_loss"] = heldout_rows_loss(root, heldout, settings.micro_tokens, compute)
                session.evaluated(step, {"eval_loss": session.extra["eval_loss"]})
                root.train()
        best = session.restore_best()
        metrics = dict(session.extra.get("last", {}))
        metrics |= {k: session.extra[k] for k in ("eval_loss", "first_eval_loss") if k in session.extra}
        metrics |= best

    ChatTemplate(tokenizer, settings.template)  # the template is saved with the model from the first stage on
    folder = Path(settings.out) / "model"
    save_result(model, tokenizer, folder, roles, "policy")
    facts = {
        "objective": settings.objective,
        "records": len(train_records),
        "heldout": len(heldout_records),
        "windows": len(windows),
        "instructions": len(rows),
        "dropped": dataset.left_out,
        "origins": dataset.origins,
        **session.facts,
    }
    return TrainResult(folder, metrics, facts)


def start(settings: PretrainSettings) -> tuple[Any, Any]:
    """Tokenizer and model: those of a model, or a starter of the objective's family and a tokenizer with its special tokens.

    Raises:
        SettingsError: neither a model nor a tokenizer is given.
        ModelError: a given model's tokenizer lacks the tokens, or the model has no rows for them.
    """
    if not settings.model and not settings.tokenizer:
        raise SettingsError(
            "neither a model nor a tokenizer for a starter is given", field="model", hint="--model or --tokenizer"
        )
    tokenizer = tokenizer_of(settings.model or settings.tokenizer, stage="pretrain")
    if settings.model:
        model = _given(settings)
        if len(tokenizer) > model.config.vocab_size:
            raise ModelError(
                f"the tokenizer has {len(tokenizer)} tokens and the model {model.config.vocab_size}", field="model"
            )
        return tokenizer, model
    missing = [t for t in WANTED[settings.objective] if t not in tokenizer.get_vocab()]
    tokenizer.add_special_tokens({"extra_special_tokens": missing}, replace_extra_special_tokens=False)
    shape = settings.starter.model_dump()
    ids: dict[str, Any] = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    if settings.objective == "glm":
        found = piece_ids(tokenizer)
        ids |= {"sop_token_id": found.sop, "eop_token_id": found.eop, "eos_token_id": found.eop}
        ids["mask_token_ids"] = [found.mask, found.sentence_mask, found.document_mask]
        return tokenizer, starters.blank_glm(len(tokenizer), shape, ids, settings.seed)
    if settings.objective == "unilm":
        ids["mask_token_id"] = tokenizer.convert_tokens_to_ids("[MASK]")
        return tokenizer, starters.unilm(len(tokenizer), shape, ids, settings.seed)
    ids["decoder_start_token_id"] = tokenizer.pad_token_id
    return tokenizer, starters.t5(len(tokenizer), shape, ids, settings.seed)


def _given(settings: PretrainSettings) -> Any:
    """The given model.

    Raises:
        ModelError: its folder is damaged, or its family cannot have the objective.
    """
    refuse_patches(settings.model, "pretrain")
    return load_model(resolve_model(settings.model))


def instruction_rows(settings: PretrainSettings, tokenizer: Any, windows: int) -> Sequence[Text]:
    """So many conversations that they are `instruction_share` of all items, drawn by seed, each as its prompt and last answer.

    Raises:
        DataError: no conversation fits into max_length.
    """
    if not settings.instruction_data:
        return []
    records = read_sources(settings.instruction_data, "conversation", seed=settings.seed).records
    pool = [
        text
        for r in records
        if isinstance(r, Conversation) and (text := instruction(r, tokenizer, settings.max_length))
    ]
    if not pool:
        raise DataError("no conversation fits into max_length", field="instruction_data", hint="raise max_length")
    share = settings.instruction_share
    rng = random.Random(mix_seed(settings.seed, 0x1257))
    return rng.choices(pool, k=max(1, round(share / (1 - share) * windows)))


def instruction(record: Conversation, tokenizer: Any, max_length: int) -> Text | None:
    """Plain text of what stands before the last answer, the answer and the end; None if it is too long (or has no answer)."""
    last = max((i for i, m in enumerate(record.messages) if m["role"] == "assistant"), default=0)
    before = "\n".join(m["content"] for m in record.messages[:last])
    start = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    prompt = [*start, *tokenizer(before, add_special_tokens=False)["input_ids"]]
    answer = tokenizer(record.messages[last]["content"], add_special_tokens=False)["input_ids"]
    ids = [*prompt, *answer, tokenizer.eos_token_id]
    return Text(ids, len(prompt)) if last and answer and len(ids) <= max_length - 2 else None
