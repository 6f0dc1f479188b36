"""What each kind of stage does in a run: calls its trainer or evaluator, and decides its gates."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

import danlu
from danlu import atomic
from danlu.alignment_config import DpoSettings, GrpoSettings, PpoSettings, RewardSettings
from danlu.config import EvalSettings, PretrainSettings, QuantizeSettings, SftSettings, TokenizerSettings
from danlu.data.corpus import stream_texts
from danlu.data.labelled_text import read_cloze
from danlu.data.problems import Collected
from danlu.data.sources import read_sources
from danlu.evals import overlap, perplexity
from danlu.evals.cloze import cloze
from danlu.evals.generation import Evaluation, evaluate
from danlu.exceptions import DataError, ModelError, SettingsError
from danlu.knowledge import lessons
from danlu.knowledge_config import TeachSettings
from danlu.models.gptq import quantize_gptq, transformer_layers
from danlu.models.load import load_model, raw_config
from danlu.models.places import resolve
from danlu.models.quantize import (
    is_quantized,
    load_in_bits,
    packed_layers,
    quantize_model,
    refuse_encoder_decoder,
    save_quantized,
)
from danlu.models.stored_tensors import parse_size, require_space
from danlu.models.unilm import is_unilm
from danlu.pipeline import gates, quantizing
from danlu.pipeline.gates import Gate
from danlu.rewards.model import store_verdict
from danlu.synth.compare import collect
from danlu.text.sample import MEGABYTE, sample
from danlu.text.template_registry import named_template
from danlu.text.tokenizer import train_tokenizer
from danlu.train_config import Source, Sources, StageSettings, TrainSettings, as_list
from danlu.trainers import (
    classify,
    denoise,
    dpo,
    grpo,
    kto,
    mask_sft,
    online_dpo,
    ppo,
    pretrain,
    raft,
    reward_model,
    sft,
)
from danlu.training import distributed
from danlu.training.progress import Bar
from danlu.training.runs import refuse_patches, resolve_model
from danlu.training.setup import records_of
from danlu.training.step import TrainResult
from danlu.training.templates import served_template, template_of, tokenizer_of
from danlu.types import Comparison, Conversation, Prompt, Unpaired

S = TypeVar("S", bound=StageSettings)
RENDER_SAMPLE = 50
PERPLEXITY_TOKENS = 65_536


@dataclass
class Outcome:
    """What a stage reports to its manifest."""

    metrics: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    gates: list[Gate] = field(default_factory=list)
    table: list[dict[str, Any]] = field(default_factory=list)
    peak_memory_mb: float = 0.0


@dataclass(frozen=True)
class Kind:
    """How a kind of stage runs.

    version: raised whenever the same settings and inputs would give another result; part of the stage's key.
    inputs: fields that name data files; models: fields that name models.
    require: refuses settings that could not be met at their turn, before any stage of a run begins.
    """

    run: Callable[[Any], Outcome]
    version: int
    inputs: tuple[str, ...] = ("data", "eval_data")
    models: tuple[str, ...] = ("model",)
    require: Callable[[Any], None] | None = None


def _require_template(settings: TokenizerSettings) -> None:
    named_template(settings.template)


def run_tokenizer(settings: TokenizerSettings) -> Outcome:
    """Trains a tokenizer on the text of data of any kind."""
    problems = Collected()
    dropped: Counter[str] = Counter()
    stream = stream_texts(
        settings.data,
        skip_bad=settings.skip_bad,
        on_problem=problems.add,
        on_dropped=lambda reason, origin: dropped.update([reason]),
    )
    found = sample(stream, settings.sample_mb * MEGABYTE)
    if problems.counts and not settings.skip_bad:
        raise problems.error()
    if not found.texts:
        raise DataError("there is no text to train a tokenizer on", field="data")
    tokenizer = train_tokenizer(
        found.texts, settings.vocab_size, model_type=settings.model_type, template=settings.template
    )
    tokenizer.save_pretrained(Path(settings.out) / "model")
    measured = found.texts[:: max(1, len(found.texts) // 2000)]
    tokens = sum(len(tokenizer(t, add_special_tokens=False)["input_ids"]) for t in measured)
    dropped.update({f"faulty row: {code}": count for code, count in problems.counts.items()})
    return Outcome(
        metrics={
            "vocab_size": float(len(tokenizer)),
            "tokens_per_character": tokens / sum(len(t) for t in measured),
        },
        facts={
            "texts": found.seen,
            "characters": found.characters,
            "texts_learned_from": len(found.texts),
            "dropped": dict(dropped),
        },
    )


def run_pretrain(settings: PretrainSettings) -> Outcome:
    """See `trainers/pretrain.py`, for objectives that corrupt texts `trainers/denoise.py`."""
    result = (pretrain if settings.objective == "causal" else denoise).train(settings)
    return Outcome(result.metrics, result.facts)


def run_sft(settings: SftSettings) -> Outcome:
    """See `trainers/sft.py`; decides G-STOP, G-TRUNC and G-RENDER. Classifiers (`trainers/classify.py`) have no answers."""
    if settings.task != "chat":
        labelled = classify.train(settings)
        return Outcome(labelled.metrics, labelled.facts)
    result = (mask_sft if _is_unilm(settings.model) else sft).train(settings)
    records, _, _ = records_of(settings, "conversation")
    return _answers_learnt(result, settings, [r for r in records if isinstance(r, Conversation)], stage="sft")


def _is_unilm(model: str) -> bool:
    config = Path(resolve_model(model)) / "config.json"
    return config.is_file() and is_unilm(json.loads(config.read_text("utf-8")))


def run_dpo(settings: DpoSettings) -> Outcome:
    """See `trainers/dpo.py`, for single answers `trainers/kto.py`; decides G-STOP, G-TRUNC and G-RENDER."""
    single = settings.loss == "kto"
    result = (kto if single else dpo).train(settings)
    records, _, _ = records_of(settings, "unpaired" if single else "comparison")
    pairs = [Conversation([*r.prompt, *r.chosen], r.origin) for r in records if isinstance(r, Comparison)]
    liked = [Conversation([*r.prompt, *r.completion], r.origin) for r in records if isinstance(r, Unpaired)]
    return _answers_learnt(result, settings, pairs or liked, stage="dpo")


def _answers_learnt(
    result: TrainResult, settings: TrainSettings, records: list[Conversation], *, stage: str
) -> Outcome:
    """The outcome of a stage that learns given answers, with the gates on their text."""
    sample = random.Random(f"{settings.seed}/render").sample(records, min(RENDER_SAMPLE, len(records)))
    training = template_of(settings.model, settings, stage=stage)
    serving = served_template(result.model)
    verdicts = [gates.stop(result.facts), gates.truncated(result.facts), gates.render(training, serving, sample)]
    example = serving.render(sample[0].messages) if sample else ""
    return Outcome(result.metrics, {**result.facts, "rendered_example": example}, verdicts)


def run_reward(settings: RewardSettings) -> Outcome:
    """See `trainers/reward_model.py`; gathers comparisons first if asked to, decides G-RM and writes it into the model."""
    facts: dict[str, Any] = {}
    if settings.collect is not None:
        collected = Path(settings.out) / "collected.jsonl"
        if not distributed.same(collected.is_file()):
            facts["collected"] = _collect(settings, collected)
        settings = settings.model_copy(update={"data": [*as_list(settings.data), Source(path=str(collected))]})
    result = reward_model.train(settings)
    verdicts = gates.reward_model(result.metrics, settings)
    if distributed.is_main():
        store_verdict(result.model, verdicts[0].as_dict())
    distributed.wait_for_all()
    return Outcome(result.metrics, {**result.facts, **facts}, verdicts)


def _collect(settings: RewardSettings, path: Path) -> int:
    options = settings.collect
    assert options is not None, "asked for by the caller"
    prompts = _questions(options.prompts, settings)
    count = min(options.count, len(prompts)) * options.samples
    with Bar("reward: collecting answers", count, quiet=not distributed.is_main()) as bar:
        rows = collect(
            danlu.load(settings.model, patches=False),
            prompts,
            options,
            seed=settings.seed,
            on_done=lambda done: _to(bar, done),
        )
    if not rows:
        raise DataError(
            "no two answers of the policy differ by the rubric, so there is nothing to compare", field="collect"
        )
    if distributed.is_main():
        atomic.write_jsonl(path, rows)
    distributed.wait_for_all()
    return len(rows)


def _to(bar: Bar, done: int, what: str = "answers") -> None:
    while bar.done < done:
        bar.advance(0, what)


def run_ppo(settings: PpoSettings) -> Outcome:
    """See `trainers/ppo.py`; decides G-RATIO and G-PPO."""
    result = ppo.train(settings)
    verdicts = [gates.ratio(result.facts, settings), gates.policy(result.metrics, result.facts, settings)]
    return Outcome(result.metrics, result.facts, verdicts)


def run_grpo(settings: GrpoSettings) -> Outcome:
    """See `trainers/grpo.py`, `trainers/online_dpo.py`, `trainers/raft.py`; decides G-PPO, and G-RATIO if there is a reference."""
    trainer = {"raft": raft, "online-dpo": online_dpo}.get(settings.method, grpo)
    result = trainer.train(settings)
    verdicts = [] if settings.method == "raft" else [gates.ratio(result.facts, settings)]
    return Outcome(result.metrics, result.facts, [*verdicts, gates.policy(result.metrics, result.facts, settings)])


def run_eval(settings: EvalSettings) -> Outcome:
    """Scores one or several models on the same questions with the same draws."""
    _require_metrics(settings)
    if not settings.models:
        raise SettingsError("no model is given", field="models")
    folder = Path(settings.out)
    if settings.task == "perplexity":
        metrics = {}
        characters = perplexity.characters(settings.data, settings.limit)
        for model in settings.models:
            tokenizer = tokenizer_of(model, stage="eval")
            loaded = danlu.load(model, patches=False).model
            mean, tokens = perplexity.measure(loaded, settings.data, tokenizer, settings.max_length, settings.limit)
            metrics[f"{label(model)}_perplexity"] = mean
            if characters:
                metrics[f"{label(model)}_perplexity_per_character"] = mean ** (tokens / characters)
        return Outcome(metrics)
    if settings.task == "cloze":
        rows = read_cloze(settings.data)[: settings.limit]
        chosen = {
            label(m): cloze(load_model(resolve_model(m)), tokenizer_of(m, stage="eval"), rows, settings.seed)
            for m in settings.models
        }
        for name, result in chosen.items():
            atomic.write_jsonl(folder / f"answers-{name}.jsonl", result.rows)
        return Outcome(
            {f"{n}_correct": e.summary["correct"]["mean"] for n, e in chosen.items()},
            table=[{"model": n, **e.summary} for n, e in chosen.items()],
        )
    prompts, labels = _asked(settings)
    found: dict[str, Evaluation] = {}
    for model in settings.models:
        name = label(model)
        with Bar(f"eval {name}", len(prompts)) as bar:
            options: dict[str, Any] = {
                "temperature": settings.temperature,
                "max_new_tokens": settings.max_new_tokens,
                "seed": settings.seed,
                "on_done": lambda done, b=bar: _to(b, done),
            }
            assistant = danlu.load(model, patches=False)
            if settings.task == "overlap":
                found[name] = overlap.evaluate(assistant, prompts, labels, **options)
            else:
                found[name] = evaluate(assistant, prompts, task=settings.task, **options)
        atomic.write_jsonl(folder / f"answers-{name}.jsonl", found[name].rows)
    table = [{"model": n, **e.summary} for n, e in found.items()]
    scored = ("correct", "rubric", *overlap.METRICS)
    metrics = {f"{n}_{k}": e.summary[k]["mean"] for k in scored for n, e in found.items() if k in e.summary}
    atomic.write_jsonl(folder / "samples.jsonl", _samples(found, prompts, settings))
    return Outcome(metrics, table=table)


def _require_metrics(settings: EvalSettings) -> None:
    if settings.task == "overlap":
        overlap.require()


def _asked(settings: EvalSettings) -> tuple[list[Prompt], list[str]]:
    """Questions, and for task overlap the answers that were written to them."""
    if settings.task == "overlap":
        return overlap.labelled(settings.data, settings.limit)
    return _questions(settings.data, settings)[: settings.limit], []


def _questions(sources: Sources, settings: StageSettings) -> list[Prompt]:
    return [r for r in read_sources(sources, "prompt", seed=settings.seed).records if isinstance(r, Prompt)]


def label(model: str) -> str:
    """A model's name in the table: "base" for the pretrain stage of a run, else the stage or folder name."""
    path = Path(model)
    if path.name == "model" and path.parent.name[:2].isdigit():
        name = path.parent.name.partition("-")[2]
        return "base" if name == "pretrain" else name
    return path.name or model


def _samples(found: dict[str, Evaluation], prompts: list[Prompt], settings: EvalSettings) -> list[dict[str, Any]]:
    """Questions drawn by seed among those where the models' answers differ: nothing is picked by who looks best."""
    rows = {n: e.rows for n, e in found.items()}
    differ = [i for i in range(len(prompts)) if len({r[i]["prediction"] for r in rows.values()}) == len(rows)]
    pool = differ or list(range(len(prompts)))
    chosen = random.Random(f"{settings.seed}/samples").sample(pool, min(settings.samples, len(pool)))
    return [
        {
            "prompt": prompts[i].prompt,
            "label": rows[next(iter(rows))][i]["label"],
            "answers": {n: r[i]["prediction"] for n, r in rows.items()},
        }
        for i in sorted(chosen)
    ]


def run_quantize(settings: QuantizeSettings) -> Outcome:
    """Writes a copy of a model in 8 or 4 bits; decides G-QUANT and adds a row to the table."""
    source, local = resolve(resolve_model(settings.model))
    if local and is_quantized(source):
        raise ModelError(
            "this model is quantised already, and doing it twice would add both errors",
            file=source,
            hint="quantise the model it was made from",
        )
    refuse_encoder_decoder(raw_config(source, local), settings.model)
    refuse_patches(settings.model, "quantize")
    tokenizer = tokenizer_of(settings.model, stage="quantize")
    max_shard = parse_size(settings.max_shard_size) if settings.max_shard_size else None
    trees = None
    if settings.eval_data is not None:
        trees = perplexity.encode(settings.eval_data, tokenizer, settings.max_length, max_tokens=PERPLEXITY_TOKENS)
    outcome = Outcome()
    model = _rounded(settings, source, tokenizer, trees, outcome)
    outcome.facts["bytes_of_experts"] = 2 * sum(p.numel() for p in model.parameters() if p.dim() > 2)
    facts = {"method": settings.method}
    options: dict[str, Any] = {"max_shard": max_shard, "layout": settings.layout, "facts": facts}
    folder = save_quantized(model, tokenizer, Path(settings.out) / "model", rest=torch.bfloat16, **options)
    del model
    outcome.metrics["bytes"] = float(sum(f.stat().st_size for f in folder.glob("*.safetensors")))
    if trees is not None:
        small = danlu.load(folder, dtype="float32", device="cpu")  # as the model it is compared with
        after = perplexity.perplexity(small.model, trees)
        outcome.metrics["perplexity"] = after
        outcome.gates.append(gates.quantized(outcome.metrics["perplexity_before"], after, settings))
        del small
    for name, model_name in (("tokens_per_second_before", source), ("tokens_per_second", str(folder))):
        outcome.metrics[name] = quantizing.tokens_per_second(danlu.load(model_name, dtype="bfloat16").model)
    if settings.questions is not None:
        outcome.table.append(_questioned(settings, folder))
        outcome.metrics[f"int{settings.bits}_rubric"] = outcome.table[0]["rubric"]["mean"]
    return outcome


def _rounded(settings: QuantizeSettings, source: str, tokenizer: Any, trees: Any, outcome: Outcome) -> Any:
    """The model with packed weights; notes its size and, where text for it is given, its perplexity before."""
    options: dict[str, Any] = {
        "group_size": settings.group_size,
        "symmetric": settings.symmetric or settings.layout == "gptq",
    }
    if trees is None and settings.method == "rtn":
        model = load_in_bits(source, settings.bits, dtype=torch.bfloat16, **options)
        layers = packed_layers(model).values()
        rest = sum(p.numel() for p in model.parameters())
        outcome.metrics["bytes_16bit"] = 2.0 * (rest + sum(m.out_features * m.in_features for m in layers))
        return model
    model = load_model(source)
    parameters = sum(p.numel() for p in model.parameters())
    outcome.metrics["bytes_16bit"] = 2.0 * parameters
    require_space(Path(settings.out), parameters * settings.bits // 8)  # before minutes of work, and so is what follows
    calibrated = settings.method == "gptq"
    rows = quantizing.calibration_rows(settings, tokenizer, model.config, source) if calibrated else None
    if trees is not None:
        outcome.metrics["perplexity_before"] = perplexity.perplexity(model, trees)
    if rows is None:
        return quantize_model(model, settings.bits, **options)
    del model  # its attention has been told to expect token trees
    model = load_model(source)
    outcome.facts["calibration_tokens"] = rows.numel()
    with Bar("quantize: layers", len(transformer_layers(model))) as bar:
        return quantize_gptq(model, rows, on_layer=lambda done, _: _to(bar, done, "layers"), **options)


def _questioned(settings: QuantizeSettings, folder: Path) -> dict[str, Any]:
    """The row of the table of a quantised model."""
    assert settings.questions is not None, "asked for by the caller"
    prompts = _questions(settings.questions, settings)
    with Bar(f"eval int{settings.bits}", len(prompts)) as bar:
        result = evaluate(
            danlu.load(folder, dtype="float32", device="cpu"),
            prompts,
            task="rubric",
            temperature=settings.temperature,
            max_new_tokens=settings.max_new_tokens,
            seed=settings.seed,
            on_done=lambda done: _to(bar, done),
        )
    return {"model": f"int{settings.bits}", **result.summary}


def run_teach(settings: TeachSettings) -> Outcome:
    """Teaches facts one by one, see `knowledge/lessons.py`; decides G-FACT and G-LOCAL."""
    found = lessons.stage(settings, say=lambda line: print(line, file=sys.stderr, flush=True))
    recalled = {f"recall_{name}": value for name, value in found["recall"].items() if value is not None}
    moved = {f"locality_{name}": value for name, value in found["locality"].items()}
    verdicts = [
        gates.facts_recalled(found["recall"], len(found["facts"])),
        gates.facts_local(found["locality"], settings),
    ]
    return Outcome({**recalled, **moved}, {"taught": found["facts"]}, verdicts)


JUDGED = ("model", "reward_model", "eval_reward_model")
STAGES: dict[str, Kind] = {
    "tokenizer": Kind(run_tokenizer, 2, ("data",), (), require=_require_template),
    "pretrain": Kind(run_pretrain, 3, ("data", "eval_data", "instruction_data"), ("model", "tokenizer")),
    "sft": Kind(run_sft, 3),
    "reward": Kind(run_reward, 4, ("data", "eval_data", "collect.prompts")),
    "dpo": Kind(run_dpo, 1),
    "ppo": Kind(run_ppo, 6, ("data", "eval_data", "ptx.data"), JUDGED),
    "grpo": Kind(run_grpo, 3, models=JUDGED),
    "eval": Kind(run_eval, 2, ("data",), ("models",), require=_require_metrics),
    "quantize": Kind(run_quantize, 3, ("eval_data", "questions", "calibration")),
    "teach": Kind(run_teach, 2, ("file", "replay")),
}
