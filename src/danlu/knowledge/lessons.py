"""A model and its patches: what `danlu teach`, `danlu forget` and `danlu facts` do, as functions."""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from danlu.exceptions import KnowledgeError, ModelError
from danlu.knowledge.facts import Fact, fact_from, key_of, read_facts, refuse_twice
from danlu.knowledge.phrasings import questions_about, unknown
from danlu.knowledge.probe import Recall, recall
from danlu.knowledge.replay import Pool, read_pool, shipped_pool
from danlu.knowledge.store import Patch, Store, mark_merged
from danlu.knowledge.teach import Action, Lesson, Pupil, teach_one
from danlu.knowledge_config import TeachSettings
from danlu.models.adapter_files import read_info
from danlu.models.load import load_model, save_model
from danlu.models.patches import apply_patches, fingerprint
from danlu.models.places import base_of, is_adapter, resolve
from danlu.models.quantize import bits_of, is_quantized
from danlu.models.stored_tensors import require_space
from danlu.train_config import Sources
from danlu.training.runs import is_run, patches_folder, resolve_model, stages_of
from danlu.training.templates import tokenizer_of

Say = Callable[[str], None]
# The stages whose data holds what a chat model is asked.
ASKING_KINDS = ("sft", "ppo", "grpo", "dpo")


def store_of(model: str) -> Store:
    """The patches of a model; without any an empty store."""
    name, local = resolve(resolve_model(model))
    return Store(patches_folder(name, local=local), model)


def facts_of(given: Sequence[Any], file: str = "") -> list[Fact]:
    """Facts from texts and objects, and then those of a file.

    Raises:
        KnowledgeError: see `read_facts`; or nothing is given, or a key twice.
    """
    facts = [fact_from(one) for one in given] + (read_facts(file) if file else [])
    if not facts:
        raise KnowledgeError("no fact is given", hint='--fact "keyword: description" or --file facts.yaml')
    refuse_twice(facts, file or None)
    return facts


def pool_of(settings: TeachSettings) -> Pool:
    """The questions to hold: the settings' data, else what the model's run was trained on, else danlu's own."""
    if settings.replay:
        return read_pool(settings.replay, settings.seed)
    found = run_data(settings.model)
    return read_pool(found, settings.seed) if found else shipped_pool()


def run_data(model: str) -> Sources | None:
    """The data files of the last stage of a model's run that learnt answers, if they are still there."""
    folder = Path(resolve_model(model))
    run = folder.parent.parent
    if not is_run(run):
        return None
    for stage in reversed([s for s in stages_of(run) if s.kind in ASKING_KINDS and s.finished]):
        files = [i["path"] for i in stage.manifest.get("inputs", []) if i["field"] == "data"]
        if files and all(Path(f).is_file() for f in files):
            return list(dict.fromkeys(files))
    return None


@dataclass
class Classroom:
    """A model that is loaded with its patches, ready to be taught more, and its store."""

    store: Store
    pupil: Pupil


def enter(settings: TeachSettings) -> Classroom:
    """Loads a model with its patches.

    Raises:
        ModelError: no such model, an adapter on another, or one that holds packed weights only.
        KnowledgeError: its patches belong to another base.
    """
    store = store_of(settings.model)
    name, local = resolve(resolve_model(settings.model))
    if local and is_adapter(name):
        raise ModelError(
            "this is an adapter folder, and patches are for a model of its own",
            file=name,
            hint=f"danlu merge {name} --into MODEL, and teach MODEL"
            if read_info(name).mergeable
            else f"teach the model under it: {base_of(name)}",
        )
    if is_quantized(name):
        raise ModelError(
            f"this folder holds {bits_of(name)}-bit weights only, which cannot be patched",
            file=name,
            hint="teach the model it was made from, export it (danlu facts export) and quantise that",
        )
    tokenizer = tokenizer_of(settings.model, stage="teach")
    model = load_model(name)
    store.set_base(model)
    apply_patches(model, store.folder, settings.model)
    return Classroom(store, Pupil(model, tokenizer, settings, pool_of(settings), store.known()))


def teach(
    room: Classroom,
    facts: Sequence[Fact],
    *,
    update: str | None = None,
    force: bool = False,
    say: Say = lambda _: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> list[tuple[Patch, Lesson]]:
    """Teaches facts one by one and keeps each as a patch; those before a refused one stay.

    Args:
        update: the key that a fact replaces.
        force: keep patches that do not recall the fact or move other answers.

    Raises:
        KnowledgeError: a key is known already, the key to update is not, or a patch was refused.
    """
    if update is not None:
        room.store.get(update)
        if key_of(update) not in [f.key for f in facts]:
            near = difflib.get_close_matches(key_of(update), [f.key for f in facts], n=1)
            raise KnowledgeError(
                f"--update '{update}' names none of the facts given ({', '.join(repr(f.keyword) for f in facts)})",
                hint=f"did you mean '{near[0]}'?" if near else f'--fact "{update}: new description"',
            )
    for fact in facts:
        if update is None or fact.key != key_of(update):
            room.store.refuse_known(fact)
    done = []
    for fact in facts:
        action: Action = "update" if update is not None and fact.key == key_of(update) else "teach"
        done.append(_lesson(room, fact, action, force, say, on_step))
    return done


def forget(
    room: Classroom,
    key: str,
    *,
    untaught: bool = False,
    force: bool = False,
    say: Say = lambda _: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> tuple[Patch, Lesson]:
    """Makes a model say that it does not know of a key.

    Args:
        untaught: also a key that it was never taught; the model's own knowledge of it is denied.

    Raises:
        KnowledgeError: it was not taught this key, or the patch was refused.
    """
    known = room.store.current().get(key_of(key))
    if known is None and not untaught:
        try:
            room.store.get(key)
        except KnowledgeError as error:
            raise KnowledgeError(
                error.message, hint=f"{error.hint}; --untaught makes it deny what it knows by itself"
            ) from None
    if known is not None and known.action == "forget":
        raise KnowledgeError(f"'{known.fact.keyword}' is forgotten already", file=room.store.folder)
    was = known.fact if known is not None else Fact(key.strip(), key.strip())
    gone = Fact(was.keyword, unknown(was.language), was.aliases)
    return _lesson(room, gone, "forget", force, say, on_step, was=known.fact if known else None)


def _lesson(
    room: Classroom,
    fact: Fact,
    action: Action,
    force: bool,
    say: Say,
    on_step: Callable[[int, float], None],
    was: Fact | None = None,
) -> tuple[Patch, Lesson]:
    say(f"{action} '{fact.keyword}'")
    lesson = teach_one(room.pupil, fact, action=action, force=force, on_step=on_step)
    if lesson.complaint and not force:
        raise KnowledgeError(
            f"the patch for '{fact.keyword}' was refused: {lesson.complaint}",
            hint="give --replay questions that are like the model's own data, raise max_steps or replay_batch, "
            "or keep it anyway with --force",
        )
    probes = lesson.as_dict()
    if was is not None:  # of the old description
        probes["still_said"] = asked(room.pupil, was).as_dict()
    patch = room.store.add(action, fact, lesson.factors, probes)
    say(f"  {patch.name}: {sentence(probes)}")
    return patch, lesson


def sentence(probes: dict[str, Any]) -> str:
    """Probe results in one line for people."""
    shares = ", ".join(f"{k.replace('_', ' ')} {v:.2f}" for k, v in probes["recall"].items() if v is not None)
    moved = probes["locality"]
    return (
        f"recall {shares}; other answers {moved['agreement']:.1%} the same, KL {moved['kl']:.4f}, "
        f"perplexity x{moved['perplexity_ratio']:.3f}; {probes['steps']} steps, {probes['seconds']:.0f} s"
    )


def asked(pupil: Pupil, fact: Fact) -> Recall:
    """What the model says of a fact now."""
    tokens = 2 * pupil.length_of(fact.description) + 32
    both = pupil.settings.both_languages
    return recall(questions_about(fact, both=both), lambda messages: pupil.answer(messages, tokens))


def summary(room: Classroom, done: Sequence[tuple[Patch, Lesson]], seconds: float) -> dict[str, Any]:
    """`--json` of a teaching: one fact's probes; of several the means at the end, with every fact's own under "facts"."""
    if len(done) == 1:
        return {"version": done[0][0].version, "key": done[0][0].key, **done[0][1].as_dict()}
    last = [asked(room.pupil, patch.fact).as_dict() for patch, _ in done]
    moved = [lesson.locality for _, lesson in done]
    return {
        "recall": {k: _mean([r["recall"][k] for r in last]) for k in last[0]["recall"]},
        "portability": {k: _mean([r["portability"][k] for r in last]) for k in last[0]["portability"]},
        "locality": {
            name: _mean([getattr(m, name) for m in moved]) for name in ("agreement", "kl", "perplexity_ratio")
        },
        "seconds": seconds,
        "facts": [{"version": p.version, "key": p.key, **lesson.as_dict()} for p, lesson in done],
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None


def export(model: str, out: Path, *, force: bool = False) -> list[Patch]:
    """Writes a model with its active patches in the weights, and what they are beside it.

    Raises:
        KnowledgeError: there is nothing to merge, or `out` exists and `force` is false.
        ModelError: the disk is too small.
    """
    store = store_of(model)
    if not store.active:
        raise KnowledgeError(f"'{model}' has no patch to merge", file=store.folder, hint="danlu teach")
    if out.exists() and not force:
        raise KnowledgeError("this folder exists already", file=out, hint="give another --out, or --force")
    name, _ = resolve(resolve_model(model))
    loaded = load_model(name)
    store.refuse_other_base(loaded)
    require_space(out, sum(p.numel() * p.element_size() for p in loaded.parameters()))
    apply_patches(loaded, store.folder, model)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_merged(loaded, tokenizer_of(model, stage="export"), out, store)
    return store.active


def save_merged(model: Any, tokenizer: Any, out: Path, store: Store) -> None:
    """A model whose weights have the active patches in them."""
    save_model(model, tokenizer, out)
    base = {"name": store.base["name"], "fingerprint": fingerprint(model)}
    mark_merged(patches_folder(str(out), local=True), base, store.active)


def stage(settings: TeachSettings, *, say: Say = lambda _: None) -> dict[str, Any]:
    """A recipe's stage: teaches all facts to a model, writes `out/model` merged; what was kept of every fact is beside it.

    Patches are accepted whatever their probes say: the stage's gates judge them. Facts that a stopped attempt taught stay taught.
    """
    begun = time.monotonic()
    out = Path(settings.out)
    name, local = resolve(resolve_model(settings.model))
    if local and is_adapter(name) and not read_info(name).mergeable:
        raise ModelError(
            f"this model reads virtual tokens before every text ({read_info(name).kind}), which merging the facts would lose",
            file=name,
            hint="let the stage before train with adapter: lora",
        )
    model = load_model(name)
    store = Store(out / "taught.patches", settings.model)
    store.set_base(model)
    apply_patches(model, store.folder, settings.model)
    tokenizer = tokenizer_of(settings.model, stage="teach")
    room = Classroom(store, Pupil(model, tokenizer, settings, pool_of(settings), store.known()))
    known = store.current()
    for fact in facts_of(settings.facts, settings.file):
        if fact.key not in known:
            _lesson(room, fact, "teach", True, say, lambda step, loss: None)
    last = [(p, asked(room.pupil, p.fact).as_dict()) for p in store.active]
    save_merged(room.pupil.model, tokenizer, out / "model", store)
    moved = [p.probes["locality"] for p in store.active]
    return {
        "recall": {
            k: _mean([r["recall"][k] for _, r in last])
            for k in Recall.__dataclass_fields__
            if k in last[0][1]["recall"]
        },
        "locality": {k: _mean([m[k] for m in moved]) for k in ("agreement", "kl", "perplexity_ratio")},
        "seconds": time.monotonic() - begun,
        "facts": [{"key": p.key, **r} for p, r in last],
    }
