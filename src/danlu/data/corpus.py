"""The bare text of data of any kind, for what learns from text alone: one text after the other, memory flat."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from danlu.data import contents
from danlu.data.problems import Problem
from danlu.data.read import ReadOptions, scan
from danlu.data.sources import options_of
from danlu.train_config import Source, Sources, as_list
from danlu.types import Origin, Record


def stream_texts(
    sources: Sources,
    *,
    skip_bad: bool = False,
    on_problem: Callable[[Problem], None] | None = None,
    on_dropped: Callable[[str, Origin], None] | None = None,
) -> Iterator[str]:
    """The texts of documents, and the contents of messages of all other kinds.

    Args:
        sources: see `config.Sources`; a source with a weight gives each record so often, spread evenly.
        skip_bad: leave faulty rows out.
        on_problem, on_dropped: see `read.scan`.

    Raises:
        DataError: see `read.scan`.
    """
    given = as_list(sources)
    bare = all(source == Source(path=source.path) for source in given)
    together = [(Source(path="-"), [source.path for source in given])]
    for source, paths in together if bare else [(source, [source.path]) for source in given]:
        options = ReadOptions(skip_bad=skip_bad) if bare else options_of(source, skip_bad=skip_bad)
        found = scan(paths, options, on_problem=on_problem, on_dropped=on_dropped)
        for number, (_, record) in enumerate(found):
            for _ in range(int((number + 1) * source.weight) - int(number * source.weight)):
                yield from texts_of(record)


def texts_of(record: Record) -> Iterator[str]:
    """What a record says, in its order; empty texts are left out."""
    yield from (text for _, text in contents.texts(record) if text)
