"""Pre-training: next-token prediction on documents, from nothing (a starter) or from a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from danlu.config import PRESETS, PretrainSettings
from danlu.data.collate import encode_documents, require_items
from danlu.exceptions import SettingsError
from danlu.models.load import load_model
from danlu.models.starters import opt, starter
from danlu.text.chat_template import ChatTemplate
from danlu.text.tokenizer import document_end
from danlu.training import distributed
from danlu.training.compute import choose
from danlu.training.memory import within_limits
from danlu.training.optim import optimizer_of, set_rate
from danlu.training.result import save_result
from danlu.training.runs import refuse_patches, resolve_model
from danlu.training.session import Session
from danlu.training.setup import load_policy, placed, plan_of, policy_roles, records_of
from danlu.training.step import TrainResult, accumulate, apply, heldout_loss, language_loss
from danlu.training.templates import tokenizer_of
from danlu.training.tokens import trees_of
from danlu.training.vocabulary import learn_words
from danlu.tree import TreeBatch
from danlu.types import Document


@within_limits
def train(settings: PretrainSettings) -> TrainResult:
    """Trains and writes `out/model`; resumes from the last checkpoint in `out`.

    Raises:
        SettingsError: neither a model nor a tokenizer for a starter is given; or a starter is to learn new words.
    """
    distributed.start()
    if not settings.model and not settings.tokenizer:
        raise SettingsError(
            "neither a model nor a tokenizer for a starter is given", field="model", hint="--model or --tokenizer"
        )
    if settings.new_words and not settings.model:
        raise SettingsError(
            "a starter has a tokenizer of its own text already", field="new_words", hint="new_words: 0, or give a model"
        )
    refuse_patches(settings.model, "pretrain")
    tokenizer = tokenizer_of(settings.model or settings.tokenizer, stage="pretrain")
    if settings.model:
        model = load_model(resolve_model(settings.model)) if settings.new_words else load_policy(settings)
    else:
        ids = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": document_end(tokenizer),  # what its texts end with, which is not what answers will end with
            "pad_token_id": tokenizer.pad_token_id,
        }
        model = (
            opt(len(tokenizer), PRESETS[settings.preset], ids, settings.seed)
            if settings.preset
            else starter(len(tokenizer), **settings.starter.model_dump(), seed=settings.seed, ids=ids)
        )
    compute = choose(Path(settings.out), settings.dtype, model.config.hidden_size)
    train_records, heldout_records, dataset = records_of(settings, "document")
    words: dict[str, Any] = {}
    if settings.new_words:
        texts = (r.text for r in train_records if isinstance(r, Document))
        tokenizer, words = learn_words(model, tokenizer, texts, settings.new_words)
    trees = trees_of(encode_documents, train_records, tokenizer, stage="pretrain", max_length=settings.max_length)
    heldout = trees_of(encode_documents, heldout_records, tokenizer, stage="pretrain", max_length=settings.max_length)
    require_items(trees, "document", settings.max_length)
    lengths, weights = trees.lengths, trees.weights
    steps = plan_of(lengths, settings)

    roles, _ = policy_roles(settings, updates=len(steps), model=model)
    root = placed(roles, settings, compute).train()
    optimizer = optimizer_of(root, settings.learning_rate, settings)
    with Session(settings, "pretrain", total=len(steps), module=root, optimizers={"optimizer": optimizer}) as session:
        if heldout.items and "first_eval_loss" not in session.extra:
            root.eval()
            session.extra["first_eval_loss"] = heldout_loss(root, heldout, settings.micro_tokens, compute)
            root.train()
        for step in session.steps():
            micro = steps[step]
            items = [i for m in micro for i in m]
            weight = float(weights[items].sum())
            batches = [(trees.batch(m), weight) for m in distributed.mine(micro)]
            set_rate(optimizer, settings.learning_rate * session.rate_factor(step))
            sums = accumulate(root, "policy", batches, language_loss, compute, reads=TreeBatch.before_loss)
            norm = apply(optimizer, list(root.parameters()), settings.max_grad_norm, session.judge(sums["loss"]))
            metrics = {"loss": sums["loss"], "grad_norm": norm, "learning_rate": optimizer.param_groups[0]["lr"]}
            session.log(step, metrics, tokens=int(lengths[items].sum()), note=f"loss {sums['loss']:.3f}")
            if heldout.items and session.eval_due(step):
                root.eval()
                session.extra["eval_loss"] = heldout_loss(root, heldout, settings.micro_tokens, compute)
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
        "records": len(train_records),
        "heldout": len(heldout_records),
        "windows": len(trees.items),
        "dropped": dataset.left_out,
        "origins": dataset.origins,
        **words,
        **session.facts,
    }
    return TrainResult(folder, metrics, facts)
