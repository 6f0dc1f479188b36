"""What people think of answers: the database that serving writes and that training reads again.

A vote keeps the exact text of the prompt that the model saw. Two answers to one identical prompt, one liked and one
not, are a comparison. SQLite in WAL mode: the server may write while `danlu feedback` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from sqlalchemy import (
    URL,
    CheckConstraint,
    Engine,
    NullPool,
    String,
    Text,
    create_engine,
    delete,
    event,
    inspect,
    select,
)
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from danlu.data.formats.turns import own_prompt
from danlu.exceptions import DataError
from danlu.types import Message, Origin

FILE_NAME: Final = "feedback.sqlite3"
SCHEMA_VERSION: Final = 1

Opinion = Literal["up", "down"]


@dataclass(frozen=True, slots=True)
class Vote:
    """One person's opinion of one answer.

    Attributes:
        prompt: the rendered prompt, byte for byte what the model saw.
        messages: the messages that were rendered.
        answer: the answer's text.
        vote: "up" or "down".
        model: what was served.
        params: how the answer was sampled (seed, temperature, ...), as far as known.
        time: when the vote was given, ISO 8601 in UTC; filled in when the vote is stored.
    """

    prompt: str
    messages: Sequence[Message]
    answer: str
    vote: Opinion
    model: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    time: str = ""


class _Base(DeclarativeBase):
    pass


class _SchemaVersion(_Base):
    __tablename__ = "schema_version"

    version: Mapped[int] = mapped_column(primary_key=True)


class _VoteRow(_Base):
    """`key` is what makes a second vote replace the first: a hash of model, prompt and answer."""

    __tablename__ = "votes"
    __table_args__ = (CheckConstraint("vote IN ('up', 'down')", name="vote_is_known"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(String(64), unique=True)
    prompt: Mapped[str] = mapped_column(Text)
    messages: Mapped[str] = mapped_column(Text)
    answer: Mapped[str] = mapped_column(Text)
    vote: Mapped[str] = mapped_column(String(8))
    model: Mapped[str] = mapped_column(Text)
    params: Mapped[str] = mapped_column(Text)
    time: Mapped[str] = mapped_column(String(40))


class FeedbackDatabase:
    """Votes in one SQLite file. Methods may be called from several threads and processes.

    Args:
        path: the file.
        create: make the file and its folder if they are missing.

    Raises:
        DataError: the file is missing (without `create`), no feedback database, or of a newer schema.
    """

    def __init__(self, path: str | Path, *, create: bool = False) -> None:
        self.path = Path(path)
        if not create and not self.path.is_file():
            raise DataError(
                "there is no feedback database here",
                hint="votes are stored by `danlu serve`; name its file with --database",
                file=self.path,
            )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._engine = _connect(self.path)
            self._prepare()
        except (DatabaseError, OSError) as error:
            reason = str(getattr(error, "orig", None) or error)
            raise DataError(f"this is no feedback database that can be used: {reason}", file=self.path) from error

    def _prepare(self) -> None:
        tables = set(inspect(self._engine).get_table_names())
        if not tables:
            with Session(self._engine) as session, session.begin():
                _Base.metadata.create_all(session.connection())
                # Two servers may start on a new file at the same moment.
                session.execute(insert(_SchemaVersion).values(version=SCHEMA_VERSION).on_conflict_do_nothing())
            return
        if _SchemaVersion.__tablename__ not in tables:
            raise DataError(f"found a database of something else (tables: {', '.join(sorted(tables))})", file=self.path)
        with Session(self._engine) as session:
            version = max(session.scalars(select(_SchemaVersion.version)), default=0)
        if version != SCHEMA_VERSION:
            raise DataError(
                f"the database has schema version {version}; this danlu knows {SCHEMA_VERSION}",
                hint="use the danlu that wrote it, or a newer one",
                file=self.path,
            )

    def store(self, vote: Vote) -> None:
        """Stores a vote; an earlier one on the same answer of the same model to the same prompt is replaced."""
        values = {
            "key": _key(vote.model, vote.prompt, vote.answer),
            "prompt": vote.prompt,
            "messages": json.dumps(list(vote.messages), ensure_ascii=False),
            "answer": vote.answer,
            "vote": vote.vote,
            "model": vote.model,
            "params": json.dumps(vote.params, ensure_ascii=False),
            "time": vote.time or datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        statement = insert(_VoteRow).values(values)
        changed = {name: statement.excluded[name] for name in ("vote", "messages", "params", "time")}
        with Session(self._engine) as session, session.begin():
            session.execute(statement.on_conflict_do_update(index_elements=["key"], set_=changed))

    def withdraw(self, model: str, prompt: str, answer: str) -> None:
        """Removes the vote on an answer, if there is one."""
        with Session(self._engine) as session, session.begin():
            session.execute(delete(_VoteRow).where(_VoteRow.key == _key(model, prompt, answer)))

    def votes(self) -> list[Vote]:
        """All votes, in the order in which the answers were first voted on."""
        with Session(self._engine) as session:
            return [_vote(row) for row in session.scalars(select(_VoteRow).order_by(_VoteRow.id))]


def _connect(path: Path) -> Engine:
    # No pool: every use opens and closes the file, so the log is folded back and no thread owns a connection.
    engine = create_engine(URL.create("sqlite", database=str(path)), poolclass=NullPool, connect_args={"timeout": 10})

    @event.listens_for(engine, "connect")
    def _wal(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.close()

    return engine


def _key(model: str, prompt: str, answer: str) -> str:
    return hashlib.sha256(json.dumps([model, prompt, answer]).encode()).hexdigest()


def _vote(row: _VoteRow) -> Vote:
    opinion: Opinion = "up" if row.vote == "up" else "down"
    return Vote(row.prompt, json.loads(row.messages), row.answer, opinion, row.model, json.loads(row.params), row.time)


def default_database(model: str) -> Path:
    """Where the votes on a model are kept: in its run's folder, or in the current folder when it is of no run.

    Args:
        model: what `danlu serve` is given: `runs/NAME`, `runs/NAME:STAGE`, a folder inside a run, or anything else.
    """
    given = Path(model)
    start = given if given.exists() else Path(model.partition(":")[0])
    for folder in (start, *start.parents):
        if (folder / "recipe.yaml").is_file():
            return folder / FILE_NAME
    return Path(FILE_NAME)


def preference_rows(database: FeedbackDatabase | str | Path) -> list[dict[str, Any]]:
    """Every (liked, disliked) pair of answers to one identical prompt, as rows that `data.read` reads as comparisons.

    Answers of different models are paired too: what counts is the prompt that they saw. `model` gave the chosen answer,
    `rejected_model` the other. Blank answers, and prompts that a data file may not hold, make no pair.
    """
    by_prompt: dict[str, list[Vote]] = defaultdict(list)
    for vote in _open(database).votes():
        if vote.answer.strip() and _readable(vote):
            by_prompt[vote.prompt].append(vote)
    return [
        {
            "prompt": list(up.messages),
            "chosen": [{"role": "assistant", "content": up.answer}],
            "rejected": [{"role": "assistant", "content": down.answer}],
            "source": "feedback",
            "model": up.model,
            "rejected_model": down.model,
        }
        for votes in by_prompt.values()
        for up in votes
        for down in votes
        if up.vote == "up" and down.vote == "down" and up.answer != down.answer
    ]


def vote_rows(database: FeedbackDatabase | str | Path) -> list[dict[str, Any]]:
    """Every vote as a row. They hold no `messages`: a disliked answer must not be read as one to imitate."""
    return [
        {
            "prompt": list(vote.messages),
            "completion": [{"role": "assistant", "content": vote.answer}],
            "label": vote.vote == "up",
            "prompt_text": vote.prompt,
            "source": "feedback",
            "model": vote.model,
            "params": vote.params,
            "time": vote.time,
        }
        for vote in _open(database).votes()
    ]


def statistics(database: FeedbackDatabase | str | Path) -> dict[str, Any]:
    """Counts of votes, prompts and pairs, and votes by model."""
    opened = _open(database)
    votes = opened.votes()
    models: dict[str, dict[str, int]] = {}
    for vote in votes:
        models.setdefault(vote.model, {"up": 0, "down": 0})[vote.vote] += 1
    times = sorted(vote.time for vote in votes)
    return {
        "database": str(opened.path),
        "votes": len(votes),
        "up": sum(vote.vote == "up" for vote in votes),
        "down": sum(vote.vote == "down" for vote in votes),
        "prompts": len({vote.prompt for vote in votes}),
        "pairs": len(preference_rows(opened)),
        "models": models,
        "first": times[0] if times else None,
        "last": times[-1] if times else None,
    }


def _open(database: FeedbackDatabase | str | Path) -> FeedbackDatabase:
    return database if isinstance(database, FeedbackDatabase) else FeedbackDatabase(database)


def _readable(vote: Vote) -> bool:
    try:
        own_prompt({"prompt": list(vote.messages)}, "prompt", Origin("", 0))
    except DataError:
        return False
    return True
