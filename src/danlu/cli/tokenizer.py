"""`danlu tokenizer train|extend|coverage`: make a tokenizer, teach one new words, and see which fits a text."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from danlu.cli.console import people, print_json, say
from danlu.cli.data_reading import Reader, force_option, json_option, reading_options
from danlu.exceptions import DataError, ModelError, UsageError

if TYPE_CHECKING:
    from danlu.data.read import ReadOptions
    from danlu.text.coverage import Coverage
    from danlu.text.extend import Extension

SHOWN = 12
SEEN = 0.01  # other languages have a column if that share of the text is theirs
MEASURED = 1_000_000  # bytes of text on which the extended tokenizer is compared with its base
WEIGHTS = ("*.safetensors", "*.bin")
VERBS = ("train", "extend", "coverage")


def command(verb: str) -> click.Command:
    """The click command."""
    return tokenizer


class Verbs(click.Group):
    """`danlu tokenizer --data F --out O` is short for `train`, the stage of a recipe."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or (args[0].startswith("-") and args[0] != "--help"):
            args = ["train", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return _train() if name == "train" else super().get_command(ctx, name)


@click.group("tokenizer", cls=Verbs)
def tokenizer() -> None:
    """Train a tokenizer, add words to one, or compare several on a text.

    A MODEL is a folder, a run, a hub id, or a bare tokenizer file: tokenizer.json, GPT-2's encoder.json beside
    vocab.bpe, or a SentencePiece *.model.
    """


# -- train --------------------------------------------------------------------------------------------------------------


def _train() -> click.Command:
    """The stage's command, with its settings as flags; here `--force` writes over an older tokenizer."""
    from danlu.cli import stages

    made = stages.command("tokenizer")
    made.name = "train"
    stage = made.callback
    assert stage is not None, "every stage's command has one"
    for option in made.params:
        if option.name == "force" and isinstance(option, click.Option):
            option.help = "Train again and overwrite what is there."

    def run(force: bool, **arguments: Any) -> None:
        out = Path(arguments["out"]) if arguments.get("out") else None
        if out is not None and _is_filled(out):
            _make_room(out, force=force)
        stage(force=force, **arguments)

    made.callback = run
    return made


def _make_room(out: Path, *, force: bool) -> None:
    manifest = out / "manifest.json"
    try:
        kind = json.loads(manifest.read_text("utf-8")).get("kind")
    except (OSError, ValueError):
        kind = None
    if kind != "tokenizer":
        raise DataError("the folder holds something else", hint="choose another --out", file=out)
    if force:
        manifest.unlink()
        shutil.rmtree(out / "model", ignore_errors=True)


# -- extend -------------------------------------------------------------------------------------------------------------


@tokenizer.command()
@click.argument("model")
@click.option("--text", "--data", "texts", multiple=True, metavar="FILES", help="Where frequent words are looked for.")
@click.option("--new", default=None, type=click.IntRange(min=1), help="How many tokens to add from the text, at most.")
@click.option(
    "--words", type=click.Path(path_type=Path), default=None, help="File with a word in each line; all are added."
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write: model and tokenizer.")
@click.option("--min-count", default=5, show_default=True, type=click.IntRange(min=1), help="Rarer words are left out.")
@click.option(
    "--sample-mb",
    default=32,
    show_default=True,
    type=click.IntRange(min=1),
    help="Megabytes of text that are looked at.",
)
@reading_options
@force_option
@json_option
def extend(
    model: str,
    texts: tuple[str, ...],
    new: int | None,
    words: Path | None,
    out: Path,
    min_count: int,
    sample_mb: int,
    reading: ReadOptions,
    force: bool,
    as_json: bool,
) -> None:
    """Add words to the tokenizer of MODEL, and rows for them to its weights.

    The base's ids stay as they are, and text without the new words is cut as before. A new word's row is the mean of the
    rows of its old pieces.
    """
    if words is None and new is None:
        raise UsageError("nothing to add", hint="--text FILES --new 5000, or --words FILE, or both")
    if (new is None) != (not texts):
        raise UsageError("--text and --new go together", hint="--text FILES --new 5000")
    refuse_existing_folder(out, model, force=force)
    from danlu.text.extend import extend_tokenizer, read_words
    from danlu.text.new_words import find_words
    from danlu.text.sample import MEGABYTE, Sample, sample
    from danlu.text.word_pieces import WordPieces

    given = read_words(words) if words is not None else []
    base, place, _ = open_base(model)
    taken = Sample([], 0, 0)
    if texts:
        reader = Reader(reading, "extend", quiet=as_json)
        taken = sample(_texts(reader, texts), sample_mb * MEGABYTE)
        reader.finish()
    found = find_words(WordPieces(base), taken.texts, new or 0, min_count=min_count)
    counts = {word.text: word.count for word in found}
    loaded = _load(place)
    config = loaded.config if loaded is not None else None
    extension = extend_tokenizer(base, [*given, *counts], config=config)
    if not extension.tokens:
        reasons = sorted(set(extension.skipped.values())) or [f"no word is frequent enough ({min_count} times)"]
        raise DataError(f"there is no word to add: {'; '.join(reasons)}", file=words or (texts[0] if texts else None))
    if loaded is not None:
        from danlu.models.embeddings import grow_embeddings

        grow_embeddings(loaded, {token.id: token.pieces for token in extension.tokens})
    _save(loaded, extension, out)
    document = _told(model, out, base, extension, counts, given, loaded, taken.texts)
    if as_json:
        print_json(document)
    else:
        _say_extension(document)


def refuse_existing_folder(out: Path, model: str, *, force: bool) -> None:
    """Before any work is done.

    Raises:
        DataError: there is something already; with `force`, something that is no model or tokenizer.
    """
    if not _is_filled(out):
        return
    if out.resolve() == Path(model).resolve():
        raise DataError("this is the base itself", hint="choose another --out", file=out)
    if not force:
        raise DataError(
            "the folder exists already", hint="choose another --out, or overwrite it with --force", file=out
        )
    if not (out / "tokenizer_config.json").is_file():
        raise DataError("the folder holds something else than a model", hint="choose another --out", file=out)


def _is_filled(out: Path) -> bool:
    return out.exists() and (not out.is_dir() or any(out.iterdir()))


def open_base(model: str) -> tuple[Any, str, bool]:
    """The tokenizer that MODEL means, where it is, and whether that is on this machine."""
    from danlu.text.tokenizer import load_tokenizer
    from danlu.text.tokenizer_files import has_tokenizer, open_tokenizer

    path = Path(model)
    if path.is_file() or (path.is_dir() and has_tokenizer(path)):
        inner = path / "model"
        here = inner if not has_own_files(path) and inner.is_dir() else path
        return open_tokenizer(path), str(here), True
    from danlu.models.places import resolve
    from danlu.training.runs import resolve_model

    name, local = resolve(resolve_model(model))
    found = load_tokenizer(name, local=local)
    if found is None:
        raise ModelError(
            "this model folder has no tokenizer files", file=name, hint="tokenizer.json is needed beside it"
        )
    return found, name, local


def has_own_files(path: Path) -> bool:
    """Whether a folder's tokenizer is in the folder itself, not in its `model` folder."""
    return path.is_file() or any((path / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))


def _load(place: str) -> Any | None:
    """The model beside a tokenizer; None if there are no weights."""
    path = Path(place)
    if path.is_file() or (path.is_dir() and not any(found for kind in WEIGHTS for found in path.glob(kind))):
        return None
    from danlu.models.embeddings import stored_dtype
    from danlu.models.load import load_model

    return load_model(place, dtype=stored_dtype(place))


def _save(loaded: Any | None, extension: Extension, out: Path) -> None:
    from danlu.models.load import save_model

    if loaded is not None:
        save_model(loaded, extension.tokenizer, out)
        return
    temporary = out.with_name(out.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    extension.tokenizer.save_pretrained(temporary)
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)


def _told(
    model: str,
    out: Path,
    base: Any,
    extension: Extension,
    counts: dict[str, int],
    given: Sequence[str],
    loaded: Any | None,
    texts: Sequence[str],
) -> dict[str, Any]:
    names = base.convert_ids_to_tokens
    document: dict[str, Any] = {
        "model": model,
        "out": str(out),
        "base_vocab_size": len(base),
        "vocab_size": len(extension.tokenizer),
        "embedding_rows": loaded.get_input_embeddings().weight.shape[0] if loaded is not None else None,
        "given_words": len(given),
        "added": [
            {
                "text": t.text,
                "id": t.id,
                "pieces": names(list(t.pieces)),
                "count": counts.get(t.text) or counts.get(t.text.strip()),
            }
            for t in extension.tokens
        ],
        "skipped": extension.skipped,
        "tokens_per_character": None,
    }
    measured = _first(texts, MEASURED)
    characters = sum(map(len, measured))
    if characters:
        before, after = (
            sum(map(len, t(measured, add_special_tokens=False)["input_ids"])) / characters
            for t in (base, extension.tokenizer)
        )
        document["tokens_per_character"] = {"before": before, "after": after}
    return document


def _first(texts: Sequence[str], size: int) -> list[str]:
    """Texts evenly from all of them, together about as many bytes."""
    from danlu.text.sample import sample

    return sample(texts, size).texts


def _say_extension(document: dict[str, Any]) -> None:
    added = document["added"]
    say(f"{len(added):,} tokens added: {document['base_vocab_size']:,} -> {document['vocab_size']:,}")
    for token in added[:SHOWN]:
        count = f"  ({token['count']:,} times)" if token["count"] else ""
        say(f"  {token['id']}  {token['text']!r}  was {' '.join(token['pieces'])}{count}")
    if len(added) > SHOWN:
        say(f"  ... and {len(added) - SHOWN:,} more (--json lists them)")
    for word, reason in itertools.islice(document["skipped"].items(), SHOWN):
        say(f"not added: {word!r} {reason}")
    if len(document["skipped"]) > SHOWN:
        say(f"not added: {len(document['skipped']) - SHOWN:,} more")
    change = document["tokens_per_character"]
    if change is not None:
        say(f"tokens per character of the text: {change['before']:.3f} -> {change['after']:.3f}")
    if document["embedding_rows"] is None:
        say("there are no weights beside this tokenizer, so only the tokenizer was written")
    say(f"written to {document['out']}")


# -- coverage -------------------------------------------------------------------------------------------------------------


@tokenizer.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option(
    "--text", "--data", "texts", multiple=True, required=True, metavar="FILES", help="The text to measure on."
)
@click.option("--limit", default=None, type=click.IntRange(min=1), help="Only the first so many texts.")
@reading_options
@json_option
def coverage(
    models: tuple[str, ...],
    texts: tuple[str, ...],
    limit: int | None,
    reading: ReadOptions,
    as_json: bool,
) -> None:
    """How well the tokenizer of each MODEL fits a text: the table by which a base model is chosen."""
    from danlu.text.coverage import coverage as measure

    opened = [open_base(model)[0] for model in models]
    reader = Reader(reading, "coverage", quiet=as_json)
    found = measure(opened, itertools.islice(_texts(reader, texts), limit))
    reader.finish()
    if not found[0].characters:
        raise DataError("there is no text to measure on", file=texts[0])
    if as_json:
        print_json([{"model": m, **c.to_json()} for m, c in zip(models, found, strict=True)])
        return
    reader.left.say()
    _say_coverage(models, found)


def _texts(reader: Reader, paths: Sequence[str]) -> Iterator[str]:
    from danlu.data.corpus import texts_of

    for _, record in reader.natural(paths):
        yield from texts_of(record)


def _say_coverage(models: Sequence[str], found: Sequence[Coverage]) -> None:
    from rich.table import Table
    from rich.text import Text

    first = found[0]
    languages: list[str] = [name for name in ("zh", "en") if name in first.languages]
    languages += [
        str(n) for n, c in first.languages.items() if str(n) not in languages and c.characters > SEEN * first.characters
    ]
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("model", overflow="fold")
    for head in ("vocab", *languages, "own", "in text", "bytes", "unk", "same", "s/MB"):
        table.add_column(head, justify="right", no_wrap=True)
    for model, result in zip(models, found, strict=True):
        rates = [f"{result.languages[name].tokens_per_character:.3f}" for name in languages]
        shares = [result.own_token, result.own_token_in_text, result.byte_fallback, result.unknown, result.unchanged]
        shown = ["-" if share is None else f"{share:.1%}" for share in shares]
        table.add_row(Text(model), str(result.vocab_size), *rates, *shown, f"{result.seconds_per_mb:.2f}")
    people.print(table)
    counts = ", ".join(f"{name} {count.characters:,}" for name, count in first.languages.items())
    say(f"text: {first.characters:,} characters ({counts}); {first.chinese_characters:,} different Chinese characters")
    say(f"{', '.join(languages)}: tokens per character. own: Chinese characters of the text that are one token each")
    say("(in text: counted as often as they occur). bytes: tokens that are bytes or parts of a character.")
    say("unk: unknown tokens. same: texts that come back from their tokens as they were. s/MB: seconds on one core.")
