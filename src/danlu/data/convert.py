"""Records as rows of other people's formats. What a format cannot hold is refused or counted, never dropped in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from danlu.data.formats.base import RowDropped
from danlu.data.formats.registry import detect
from danlu.data.kinds import as_kind, kind_of, serves
from danlu.data.problems import Problem, RowError, problem_of
from danlu.data.rows_out import Row, row_of
from danlu.data.written import (
    CannotHold,
    alpaca_prompt_row,
    alpaca_row,
    chatllama_actor_row,
    chatllama_prompt_row,
    chatllama_reward_rows,
    fits_scale,
    openai_row,
    sharegpt_row,
    trl_row,
)
from danlu.train_config import Pairs
from danlu.types import Comparison, Conversation, Message, Ranking, Record, RecordKind, Unpaired


@dataclass(frozen=True, slots=True)
class Target:
    """A format that rows can be written in.

    Attributes:
        about: what it holds, for people.
        writers: the kinds it holds as they are, each with what makes the rows of a record. They raise `CannotHold`.
        read_as: the formats as which danlu reads such rows; text that makes it take a row for another one is refused.
        becomes: what records of other kinds are turned into; it is one of the kinds held.
        holds_origin: whether source and licence of a row have a place.
    """

    about: str
    writers: Mapping[RecordKind, Callable[[Any], list[Row]]]
    read_as: tuple[str, ...]
    becomes: RecordKind | None = None
    holds_origin: bool = False


_ANY: Final[tuple[RecordKind, ...]] = ("conversation", "comparison", "ranking", "unpaired", "prompt", "document")
TARGETS: Final[dict[str, Target]] = {
    "danlu": Target(
        "danlu's own JSON Lines: every kind of record, nothing is lost",
        {kind: lambda record: [row_of(record)] for kind in _ANY},
        ("messages", "comparison", "scored", "unpaired", "prompt", "document"),
        holds_origin=True,
    ),
    "alpaca": Target(
        "instruction, input, output, with system and history; prompts without output",
        {"conversation": lambda record: [alpaca_row(record)], "prompt": lambda record: [alpaca_prompt_row(record)]},
        ("alpaca", "alpaca-prompt"),
        "conversation",
    ),
    "sharegpt": Target(
        "conversations of human and gpt, with LLaMA-Factory's function_call, observation and tools",
        {"conversation": lambda record: [sharegpt_row(record)]},
        ("sharegpt", "sharegpt-tools"),
        "conversation",
    ),
    "openai": Target(
        "messages as OpenAI's fine-tuning takes them, with tools; an answer that is not trained has weight 0",
        {"conversation": lambda record: [openai_row(record)]},
        ("messages",),
        "conversation",
    ),
    "trl-preference": Target(
        "prompt, chosen, rejected as message lists, with margin",
        {"comparison": lambda record: [trl_row(record)]},
        ("comparison",),
        "comparison",
    ),
    "chatllama-actor": Target(
        "user_input and completion; earlier turns as a dialogue in user_input",
        {"conversation": lambda record: [chatllama_actor_row(record)]},
        ("chatllama-actor",),
        "conversation",
    ),
    "chatllama-reward": Target(
        "user_input, completion and score from 0 to 5, one answer a row; of a pair the better one has 5, the other 0",
        {"ranking": chatllama_reward_rows},
        ("chatllama-reward",),
        "ranking",
    ),
    "chatllama-rlhf": Target(
        "user_input alone",
        {"prompt": lambda record: [chatllama_prompt_row(record)]},
        ("chatllama-rlhf",),
        "prompt",
    ),
}


@dataclass
class Converted:
    """What became of the records.

    Attributes:
        read: records that came in.
        rows: rows that came out.
        kinds: records by kind, as they came in.
        dropped: records that are no good for the target (an answer that was not liked, equal answers), by reason.
        changed: rows by what was changed or left out in them.
        licences: records by licence.
    """

    read: int = 0
    rows: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)
    licences: Counter[str] = field(default_factory=Counter)


def convert(
    records: Iterable[Record],
    to: str,
    told: Converted,
    *,
    pairs: Pairs = "best-worst",
    margin: bool = False,
    on_problem: Callable[[Problem], None] | None = None,
) -> Iterator[Row]:
    """The rows of records in another format.

    Args:
        records: of any kind.
        to: a name in `TARGETS`.
        told: gets the counts.
        pairs: which comparisons a ranking gives, where the target needs comparisons.
        margin: whether these carry the difference of the scores.
        on_problem: gets every record that the target cannot hold; it is left out. None: the first one is raised.

    Raises:
        RowError: the target cannot hold a record, or has no place for its kind.
    """
    target = TARGETS[to]
    for record in records:
        told.read += 1
        told.kinds[kind_of(record)] += 1
        told.licences[record.origin.licence if record.origin else ""] += 1
        try:
            wanted = _kind_for(record, target, to)
            made = as_kind(record, wanted, pairs=pairs, margin=margin)
            rows = [row for one in made for row in target.writers[wanted](one)]
            _check_recognised(rows, target)
        except RowDropped as reason:
            told.dropped[str(reason)] += 1
        except CannotHold as thing:
            error = _cannot_hold(record, to, str(thing))
            if on_problem is None:
                raise error from None
            on_problem(problem_of(error))
        else:
            told.changed.update(_changes(record, made, target, to))
            told.rows += len(rows)
            yield from rows


def _kind_for(record: Record, target: Target, to: str) -> RecordKind:
    own = kind_of(record)
    if own in target.writers:
        return own
    if target.becomes is None or not serves(own, target.becomes):
        origin = record.origin
        raise RowError(
            f"found a {own}, but '{to}' holds {' and '.join(f'{kind}s' for kind in target.writers)}",
            code="wrong-kind",
            hint="It can be written as: " + ", ".join(name for name, t in TARGETS.items() if own in t.writers) + ".",
            file=origin.file if origin else None,
            line=origin.line if origin else None,
        )
    return target.becomes


def _check_recognised(rows: list[Row], target: Target) -> None:
    """Some sets hide their shape in a text (HuaTuo's dialogues in Alpaca's keys), and a text of ours may look like it."""
    for row in rows:
        entry = detect(row)
        if entry is None or entry.name not in target.read_as:
            raise CannotHold(f"a text that reads as another format ({entry.name if entry else 'none'})")


def _cannot_hold(record: Record, to: str, thing: str) -> RowError:
    origin = record.origin
    return RowError(
        f"'{to}' cannot hold {thing}",
        code="cannot-hold",
        hint="Choose another --to (danlu holds everything), or leave such rows out with --skip-bad; they are counted.",
        file=origin.file if origin else None,
        line=origin.line if origin else None,
    )


def _changes(record: Record, made: list[Record], target: Target, to: str) -> list[str]:
    """What of a record is not in the rows as it was."""
    found: list[str] = []
    kind = kind_of(made[0])
    match record:
        case Comparison() if kind == "conversation":
            found.append("rejected answers left out")
        case Comparison() if kind == "ranking":
            found += ["pairs given the scores 5 and 0", *(["margins left out"] if record.margin else [])]
        case Ranking() if kind == "conversation":
            found.append("scores, and all answers but the best, left out")
        case Ranking() if kind == "comparison":
            pairs = [one for one in made if isinstance(one, Comparison)]
            used = [answer for pair in pairs for answer in (pair.chosen, pair.rejected)]
            found += ["scores left out"] if not all(pair.margin for pair in pairs) else []
            found += ["answers that are in no pair left out"] if any(r not in used for r in record.responses) else []
        case Ranking() if to == "chatllama-reward" and not fits_scale(record.scores):
            found.append("scores put on the scale from 0 to 5 within their row")
        case Unpaired() if kind == "conversation":
            found.append("labels left out")
        case Conversation() | Comparison() | Ranking() | Unpaired() if kind == "prompt":
            found.append("answers left out")
        case _:
            pass
    first = made[0]
    if isinstance(first, Conversation) and to == "openai":
        found += _openai_changes(first.messages)
    origin = record.origin
    if origin is not None and not target.holds_origin:
        found += [f"{name}s left out" for name in ("source", "licence") if getattr(origin, name)]
    return found


def _openai_changes(messages: list[Message]) -> list[str]:
    found = []
    if any("id" not in call for message in messages for call in message.get("tool_calls", ())):
        found.append("ids of tool calls made up")
    if any("name" in message for message in messages):
        found.append("names of tools beside their results left out")
    return found
