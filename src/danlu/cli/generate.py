"""`danlu generate` and `danlu eval`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import people, print_json
from danlu.cli.sampling import chosen, engine_options, sampling_options, with_bad_words
from danlu.exceptions import DataError, UsageError

if TYPE_CHECKING:
    from danlu.assistant import Reply

TOGETHER = 256  # prompts that the engine gets at once


def command(verb: str) -> click.Command:
    """The command behind a verb."""
    return {"generate": generate, "eval": evaluate}[verb]


@click.command("generate")
@click.argument("model")
@click.option(
    "--data", required=True, help="Prompts, comparisons or conversations (their last answer becomes the label)."
)
@click.option("--out", required=True, help="JSON Lines file to write: prompt, label, prediction.")
@sampling_options(searches=True)
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same answers.")
@click.option("--limit", default=None, type=int, help="Only the first so many prompts.")
@click.option("--bits", default=None, type=click.Choice(["16", "8", "4"]), help="8, 4: quantise while loading.")
@click.option("--no-patches", is_flag=True, help="Without the facts that the model was taught.")
@engine_options
@click.option("--force", is_flag=True, help="Overwrite the output file.")
def generate(
    model: str,
    data: str,
    out: str,
    seed: int,
    limit: int | None,
    bits: str | None,
    no_patches: bool,
    slots: int,
    cache_gib: float,
    speculate: str,
    guesses: int,
    force: bool,
    **sampling: Any,
) -> None:
    """Answers for a file of prompts, the likeliest ones unless a temperature is given; n rows in a row where --n asks for n."""
    target = Path(out)
    if target.exists() and not force:
        raise UsageError(f"{out} exists", hint="--force overwrites it")
    import danlu
    from danlu import atomic
    from danlu.config import EngineSettings
    from danlu.data.read import read
    from danlu.generation.protocol import SamplingParams
    from danlu.generation.seeds import mix_seed
    from danlu.training.progress import Bar
    from danlu.types import Conversation, Prompt

    try:
        records = read(data, "conversation").records[:limit]
    except DataError:
        records = read(data, "prompt").records[:limit]
    prompts: list[Prompt] = []
    labels: list[Any] = []
    for record in records:
        if isinstance(record, Conversation):
            last = max(i for i, m in enumerate(record.messages) if m["role"] == "assistant")
            prompts.append(Prompt(record.messages[:last]))
            labels.append(record.messages[last]["content"])
        elif isinstance(record, Prompt):
            prompts.append(record)
            labels.append(record.reference.get("answers"))
    params = chosen(SamplingParams(max_new_tokens=256, temperature=0.0), sampling)
    engine = EngineSettings(slots=slots, cache_gib=cache_gib, speculate=speculate, guesses=guesses)
    assistant = danlu.load(model, bits=int(bits) if bits else None, engine=engine, patches=not no_patches)
    if sampling["bad_words"] and assistant.tokenizer is not None:
        params = with_bad_words(params, sampling["bad_words"], assistant.tokenizer)
    rows: list[dict[str, Any]] = []
    with Bar("generate", len(prompts)) as bar:
        for start in range(0, len(prompts), TOGETHER):
            part = prompts[start : start + TOGETHER]
            own = [replace(params, seed=mix_seed(seed, start + n)) for n in range(len(part))]
            replies = assistant.generate([p.prompt for p in part], own)
            for n, reply in enumerate(replies):
                at = start + n // params.n
                row = {"prompt": prompts[at].prompt, "label": labels[at], "prediction": reply.text}
                row["finish_reason"] = reply.finish_reason
                if sampling["logprobs"] is not None:
                    row["logprobs"] = _told(reply, assistant.tokenizer)
                rows.append(row)
            while bar.done < start + len(part):
                bar.advance(0, "answers")
    atomic.write_jsonl(target, rows)
    people.print(f"{len(rows)} answers written to {out}")


def _told(reply: Reply, tokenizer: Any) -> list[dict[str, Any]]:
    """Each token of an answer with its log-probability, and the likeliest ones in its place where they were asked for."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"id": token, "token": tokenizer.decode([token]), "logprob": logprob}

    tops = reply.top_logprobs or ((),) * len(reply.ids)
    return [
        entry(token, logprob) | ({"top": [entry(*one) for one in top]} if top else {})
        for token, logprob, top in zip(reply.ids, reply.logprobs, tops, strict=True)
    ]


@click.command("eval")
@click.argument("model")
@click.option(
    "--data",
    required=True,
    help="Questions with references (rubric, exact), conversations (overlap), conversations or documents (perplexity), "
    "blanks (cloze).",
)
@click.option(
    "--task",
    type=click.Choice(["perplexity", "exact", "overlap", "rubric", "cloze"]),
    default="perplexity",
    show_default=True,
)
@click.option("--temperature", default=0.0, show_default=True)
@click.option("--max-new-tokens", default=128, show_default=True)
@click.option("--max-length", default=512, show_default=True, help="Tokens of one text (perplexity).")
@click.option("--seed", default=0, show_default=True)
@click.option("--limit", default=None, type=int, help="Only the first so many records.")
@click.option("--bits", default=None, type=click.Choice(["16", "8", "4"]), help="8, 4: quantise while loading.")
@click.option("--no-patches", is_flag=True, help="Without the facts that the model was taught.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Predictions: a JSON Lines file (overlap).")
@click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
def evaluate(
    model: str,
    data: str,
    task: str,
    temperature: float,
    max_new_tokens: int,
    max_length: int,
    seed: int,
    limit: int | None,
    bits: str | None,
    no_patches: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Perplexity, exact match, overlap, rubric score or cloze accuracy of a model on a file; means with 95% bootstrap intervals.

    Overlap is BLEU-4 over characters and ROUGE-1, -2, -L over jieba's words with the written answers, as ChatGLM measures ADGEN.
    """
    import danlu
    from danlu.data.read import read
    from danlu.types import Prompt

    result: dict[str, Any] = {"model": model, "data": data, "task": task}
    if task == "perplexity":
        import torch

        from danlu.evals import perplexity
        from danlu.training.templates import tokenizer_of

        tokenizer = tokenizer_of(model, stage="eval")
        # Perplexity is taken in float32 where it can be, also of what would answer in bfloat16.
        dtype = None if torch.cuda.is_available() else "float32"
        loaded = danlu.load(model, dtype=dtype, bits=int(bits) if bits else None, patches=not no_patches).model
        result["perplexity"], result["tokens"] = perplexity.measure(loaded, data, tokenizer, max_length, limit)
    elif task == "overlap":
        from danlu import atomic
        from danlu.evals import overlap

        overlap.require()
        asked, labels = overlap.labelled(data, limit)
        options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
        assistant = danlu.load(model, bits=int(bits) if bits else None, patches=not no_patches)
        compared = overlap.evaluate(assistant, asked, labels, **options)
        result |= compared.summary
        if out is not None:
            atomic.write_jsonl(out, compared.rows)
    elif task == "cloze":
        from danlu.data.labelled_text import read_cloze
        from danlu.evals.cloze import cloze
        from danlu.models.load import load_model
        from danlu.models.quantize import load_in_bits
        from danlu.training.runs import resolve_model
        from danlu.training.templates import tokenizer_of

        place = resolve_model(model)
        filler = load_in_bits(place, int(bits)) if bits in ("8", "4") else load_model(place)
        result |= cloze(filler, tokenizer_of(model, stage="eval"), read_cloze(data)[:limit], seed).summary
    else:
        from danlu.evals.generation import evaluate as score

        prompts = [r for r in read(data, "prompt").records if isinstance(r, Prompt)][:limit]
        found = score(
            danlu.load(model, bits=int(bits) if bits else None, patches=not no_patches),
            prompts,
            task=task,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            seed=seed,
        )
        result |= found.summary
    if as_json:
        print_json(result)
        return
    for key, value in result.items():
        if isinstance(value, dict):
            people.print(f"{key:12} {value['mean']:.4f}  ({value['low']:.4f} to {value['high']:.4f})")
        else:
            people.print(f"{key:12} {value:.4f}" if isinstance(value, float) else f"{key:12} {value}")
