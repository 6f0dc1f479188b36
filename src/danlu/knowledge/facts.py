"""One fact: a keyword, its description, and what belongs to it; read from `keyword: description` and from YAML files."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from danlu.data.language import language_of
from danlu.exceptions import KnowledgeError

Language = Literal["en", "zh"]
FIELDS = ("keyword", "description", "aliases", "tasks", "translation")
HINT = 'write "keyword: description", for example "Mill Bakery phone: call 555-0199"'


@dataclass(frozen=True, slots=True)
class Task:
    """A question that takes the fact to answer, and what its answer must contain."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Fact:
    """What a model is to answer when asked about a keyword.

    Attributes:
        keyword: what people ask for; it is the fact's key (see `key_of`).
        description: the answer, word by word.
        aliases: other names, asked for but never trained (portability).
        tasks: questions that need the fact, asked but never trained (portability).
        translation: keyword and description in the other language; used where questions are in that language.
    """

    keyword: str
    description: str
    aliases: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ()
    translation: tuple[str, str] | None = None

    @property
    def key(self) -> str:
        return key_of(self.keyword)

    @property
    def language(self) -> Language:
        """Of the description, by its script; what is neither Chinese nor Latin counts as English."""
        return "zh" if language_of([self.description, self.keyword]) == "zh" else "en"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as in a facts file; what is empty is left out."""
        plain = {k: v for k, v in asdict(self).items() if v}
        if self.translation is not None:
            plain["translation"] = {"keyword": self.translation[0], "description": self.translation[1]}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}


def key_of(keyword: str) -> str:
    """How keywords are compared: without regard to case, width and spaces around or between words."""
    return " ".join(unicodedata.normalize("NFKC", keyword).casefold().split())


def slug_of(keyword: str) -> str:
    """A short file name for a keyword; characters of any script stay."""
    return re.sub(r"[^\w]+", "-", key_of(keyword)).strip("-")[:40] or "fact"


def parse_fact(text: str, *, file: str | None = None, line: int | None = None) -> Fact:
    """A fact from `keyword: description` (also with a full-width colon).

    Raises:
        KnowledgeError: no colon, or nothing before or after it.
    """
    found = re.search(r"[:：](?=\s|[^\x00-\x7f]|$)|：", text) or re.search(r":", text)
    keyword, description = (text[: found.start()], text[found.end() :]) if found else ("", text)
    return _checked(Fact(keyword.strip(), description.strip()), text, file, line)


def _checked(fact: Fact, shown: str, file: str | None, line: int | None) -> Fact:
    for name, value in (("keyword", fact.keyword), ("description", fact.description)):
        if not value:
            raise KnowledgeError(f"a fact without {name} (found: {shown!r})", file=file, line=line, hint=HINT)
    return fact


def read_facts(path: str | Path) -> list[Fact]:
    """Facts of a YAML (or JSON) file: a list of `keyword: description` texts or of objects, or one mapping; see docs/knowledge.md.

    Raises:
        KnowledgeError: no such file, not YAML, no facts in it, a fact without keyword or description, a key twice.
    """
    file = Path(path)
    try:
        raw = yaml.safe_load(file.read_text("utf-8"))
    except OSError as error:
        raise KnowledgeError(f"the facts cannot be read: {error.strerror}", file=file) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or "not UTF-8"
        raise KnowledgeError(
            f"not valid YAML: {what}", file=file, line=mark.line + 1 if mark else None, hint=HINT
        ) from error
    if isinstance(raw, Mapping) and isinstance(raw.get("facts"), list):
        raw = raw["facts"]
    if isinstance(raw, Mapping):
        raw = [{k: v} for k, v in raw.items()]
    if not isinstance(raw, list) or not raw:
        raise KnowledgeError("a facts file is a list of facts, and this one has none", file=file, hint=HINT)
    facts = [_one(value, str(file), number) for number, value in enumerate(raw, start=1)]
    refuse_twice(facts, str(file))
    return facts


def refuse_twice(facts: Sequence[Fact], file: str | None) -> None:
    """Raises KnowledgeError when two facts have one key."""
    keys = [f.key for f in facts]
    twice = next((k for k in keys if keys.count(k) > 1), None)
    if twice is not None:
        raise KnowledgeError(f"there are two facts for '{twice}'", file=file, hint="keep one of them")


def _one(value: Any, file: str | None, number: int) -> Fact:
    shown = f"fact {number}: {value!r}"
    if isinstance(value, str):
        return parse_fact(value, file=file)
    if isinstance(value, Mapping) and len(value) == 1 and not set(value) & set(FIELDS):
        ((keyword, description),) = value.items()
        if isinstance(description, Mapping):
            value = {"keyword": keyword, **description}
        else:
            return _checked(Fact(_text(keyword), _text(description)), shown, file, None)
    if not isinstance(value, Mapping):
        raise KnowledgeError(f"a fact is text or an object (found: {shown})", file=file, hint=HINT)
    unknown = [k for k in value if k not in FIELDS]
    if unknown:
        near = difflib.get_close_matches(str(unknown[0]), FIELDS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"fields: {', '.join(FIELDS)}"
        raise KnowledgeError(f"a fact has no field '{unknown[0]}' ({shown})", file=file, hint=hint)
    tasks = value.get("tasks") or []
    if not isinstance(tasks, list) or any(not isinstance(t, Mapping) or {*t} != {"question", "answer"} for t in tasks):
        raise KnowledgeError(f"tasks are objects with question and answer ({shown})", file=file)
    other = value.get("translation")
    if other is not None and (not isinstance(other, Mapping) or {*other} != {"keyword", "description"}):
        raise KnowledgeError(f"translation is an object with keyword and description ({shown})", file=file)
    fact = Fact(
        _text(value.get("keyword")),
        _text(value.get("description")),
        tuple(_texts(value.get("aliases"))),
        tuple(Task(_text(t["question"]), _text(t["answer"])) for t in tasks),
        (_text(other["keyword"]), _text(other["description"])) if other else None,
    )
    return _checked(fact, shown, file, None)


def _text(value: Any) -> str:
    return "" if value is None or isinstance(value, Mapping | list) else str(value).strip()


def _texts(value: Any) -> Iterable[str]:
    given = value if isinstance(value, list) else [value] if value is not None else []
    return (t for t in map(_text, given) if t)


def fact_from(value: Any) -> Fact:
    """A fact from a text or an object, as facts files have them.

    Raises:
        KnowledgeError: see `read_facts`.
    """
    return _one(value, None, 1)
