"""Where things are in a rendered conversation: the assistant's turns, and contents that must be read as plain text.

Contents are found by rendering the conversation once more with marks in their place: searching for a content itself finds it too
early when the template writes the same characters before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from danlu.exceptions import TemplateError
from danlu.text.rendering import Renderer
from danlu.text.tool_text import Shown, Tools

Path = tuple[Any, ...]
Risky = Callable[[str, str], bool]  # (role, text) -> does it hold a control token that must not be read as one?
PLAIN_FIELDS = {"role", "content"}
MOST_SHAPES = 1024  # a long conversation has one for each of its answers
PRIVATE = range(0xE000, 0xF900)  # private-use characters: marks are made of two that no text of the conversation has


@dataclass(frozen=True, slots=True)
class Turn:
    """An assistant turn in the text: half-open range with its stop token.

    Attributes:
        number: which of the messages it is, as the template gets them.
        open_end: nothing stops it in the text, and it ends the conversation: the end-of-sequence token is to follow.
    """

    number: int
    start: int
    end: int
    trained: bool
    open_end: bool = False


@dataclass(frozen=True, slots=True)
class Plain:
    """A range of the text that is a content with the text of a control token, and who wrote it."""

    start: int
    end: int
    role: str


@dataclass(frozen=True, slots=True)
class Layout:
    """A rendered conversation. What follows the last answer's stop token is cut off."""

    text: str
    turns: list[Turn]
    plain: list[Plain]


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A piece of text in a message or, with `message` -1, in the tools: where it is, and what it says."""

    message: int
    path: Path
    value: str


@dataclass(frozen=True, slots=True)
class _Found:
    leaf: _Leaf
    start: int
    end: int


def lay_out(renderer: Renderer, shown: Sequence[Shown], tools: Tools, risky: Risky, *, generation: bool) -> Layout:
    """Renders a conversation and finds its turns and its risky contents.

    Args:
        risky: whether a text by somebody (a role, or "tools") must be read as plain text.
        generation: render up to where the assistant begins to speak.

    Raises:
        TemplateError: an answer cannot be told apart from its prompt in this template.
    """
    text = renderer.text([s.fields for s in shown], tools, generation=generation)
    answers = _answers(renderer, shown, generation)
    by_shape = _found_by_shape(renderer, shown, tools, text, generation=generation)
    spelled = [text[f.start : f.end] for f in by_shape] if by_shape is not None else None
    found = by_shape or _found_by_marks(renderer, shown, tools, text, answers, risky, generation=generation)
    turns = _turns(renderer, shown, tools, text, answers, found, spelled, trains=not generation)
    if turns and not generation and turns[-1].number == len(shown) - 1:
        text = text[: turns[-1].end]
    plain = [Plain(f.start, f.end, _role(f.leaf, shown)) for f in found if risky(_role(f.leaf, shown), f.leaf.value)]
    return Layout(text, turns, [p for p in plain if p.start < len(text)])


def _found_by_marks(
    renderer: Renderer,
    shown: Sequence[Shown],
    tools: Tools,
    text: str,
    answers: Sequence[int],
    risky: Risky,
    *,
    generation: bool,
) -> list[_Found]:
    """Where answers and risky contents are: the conversation is rendered again with marks in their places."""
    fields = [s.fields for s in shown]
    leaves = [
        *(leaf for leaf in _leaves(list(tools), -1) if risky("tools", leaf.value)),
        *(
            leaf
            for number, turn in enumerate(shown)
            for leaf in _leaves(turn.fields, number)
            if risky(turn.role, leaf.value) or (number in answers and _is_answer(leaf, turn))
        ),
    ]

    def render(chosen: Sequence[_Leaf], marks: Sequence[str]) -> str:
        marked, marked_tools = _marked(fields, tools, chosen, marks)
        return renderer.text(marked, marked_tools, generation=generation)

    found = _find(text, leaves, render) if leaves else []
    return found if found is not None else _find_one_by_one(text, leaves, render, shown)


# -- shapes -------------------------------------------------------------------------------------------------------------


def _found_by_shape(
    renderer: Renderer, shown: Sequence[Shown], tools: Tools, text: str, *, generation: bool
) -> list[_Found] | None:
    """Where all contents are, if this text is what the template makes of conversations of this shape; else None.

    Most conversations are turns with text alone. What a template writes around these depends on who speaks, so each sequence of
    roles is rendered with marks once; that this text is of that form is seen by comparing all of it.
    """
    pieces = _around(renderer, shown, tools, generation)
    if pieces is None or not text.startswith(pieces[0]):
        return None
    found = []
    cursor = len(pieces[0])
    for number, (turn, after) in enumerate(zip(shown, pieces[1:], strict=True)):
        content: str = turn.fields["content"]
        for spelling in (content, content.strip()):
            end = cursor + len(spelling)
            if text.startswith(spelling, cursor) and text.startswith(after, end):
                break
        else:
            return None
        found.append(_Found(_Leaf(number, ("content",), content), cursor, end))
        cursor = end + len(after)
    return found if cursor == len(text) else None


def _around(renderer: Renderer, shown: Sequence[Shown], tools: Tools, generation: bool) -> list[str] | None:
    """What the template writes before, between and after the contents; None if there is more to this than the roles."""
    if tools or any(turn.fields.keys() != PLAIN_FIELDS for turn in shown):
        return None
    shape = (tuple(turn.role for turn in shown), generation)
    if shape not in renderer.shapes:
        if len(renderer.shapes) >= MOST_SHAPES:
            renderer.shapes.clear()
        renderer.shapes[shape] = _pieces_of(renderer, *shape)
    return renderer.shapes[shape]


def _pieces_of(renderer: Renderer, roles: Sequence[str], generation: bool) -> list[str] | None:
    marks = _marks(len(roles), "")
    marked = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    pieces, order = _split(renderer.attempt(*marked, generation=generation), marks)
    return pieces if order == list(range(len(roles))) else None


def _answers(renderer: Renderer, shown: Sequence[Shown], generation: bool) -> list[int]:
    """Which turns are the assistant's to learn or to continue from; one that nothing precedes answers nothing."""
    answers = [n for n, turn in enumerate(shown) if turn.role == "assistant" and n > 0]
    if renderer.endings.every_answer:
        return answers
    return [n for n in answers if n == len(shown) - 1 and not generation]


def _role(leaf: _Leaf, shown: Sequence[Shown]) -> str:
    return shown[leaf.message].role if leaf.message >= 0 else "tools"


# -- turns --------------------------------------------------------------------------------------------------------------


def _turns(
    renderer: Renderer,
    shown: Sequence[Shown],
    tools: Tools,
    text: str,
    answers: Sequence[int],
    found: Sequence[_Found],
    spelled: Sequence[str] | None,
    *,
    trains: bool,
) -> list[Turn]:
    """The assistant's turns. One that cannot be told apart is context, unless it is to be trained.

    Args:
        spelled: the contents as they stand in the text, if it is of its shape's form.

    Raises:
        TemplateError: a turn that is to be trained cannot be told apart.
    """
    places: list[tuple[int, int, int]] = []
    for number in answers:
        start = _start(renderer, shown, tools, text, number, spelled)
        end = _content_end(shown[number], found, number, start)
        if start is None and trains and shown[number].train:
            raise TemplateError(
                f"turn {shown[number].index + 1}: the prompt as serving renders it does not begin the conversation as "
                "training renders it",
                hint="choose a template with --template chatml, or fix the tokenizer's chat_template",
            )
        if start is None or end is None:
            if trains and shown[number].train:
                raise TemplateError(
                    f"turn {shown[number].index + 1}: the template does not render the answer's text",
                    hint="choose another template, or mark the turn with train: false",
                )
            continue
        places.append((number, start, end))
    turns = []
    for place, (number, start, end) in enumerate(places):
        rest = text[end : places[place + 1][1] if place + 1 < len(places) else len(text)]
        turn = _turn(renderer, shown[number], number, rest, start, end)
        turns.append(replace(turn, open_end=turn.open_end and number == len(shown) - 1))
    return turns


def _start(
    renderer: Renderer, shown: Sequence[Shown], tools: Tools, text: str, number: int, spelled: Sequence[str] | None
) -> int | None:
    """Where a turn begins: where the prompt before it ends, as serving renders it. None if that does not begin the text."""
    before = shown[:number]
    around = _around(renderer, before, tools, True) if spelled is not None else None
    if around is None or spelled is None:
        prompt = renderer.text([s.fields for s in before], tools, generation=True)
    else:
        prompt = around[0] + "".join(map("".join, zip(spelled, around[1:], strict=False)))
    return len(prompt) if text.startswith(prompt) else None


def _content_end(turn: Shown, found: Sequence[_Found], number: int, start: int | None) -> int | None:
    """Where what the assistant says ends; with calls only a place that is not behind its end."""
    ends = [f.end for f in found if f.leaf.message == number and f.start >= (start or 0)]
    return max(ends, default=start if turn.fields.get("tool_calls") else None)


def _turn(renderer: Renderer, turn: Shown, number: int, rest: str, start: int, end: int) -> Turn:
    """An assistant turn with its stop token; `rest` is the text from the end of its content to the next answer."""
    endings = renderer.endings
    if turn.fields.get("tool_calls"):
        hits = [(at, stop) for stop in endings.stop_texts if (at := rest.find(stop)) >= 0]
        if not hits:
            raise TemplateError(f"turn {turn.index + 1}: no stop token follows the call of a tool in this template")
        at, stop = min(hits)
        return Turn(number, start, end + at + len(stop), turn.train)
    bare = rest.lstrip()
    for stop in endings.stop_texts:
        if bare.startswith(stop):
            return Turn(number, start, end + len(rest) - len(bare) + len(stop), turn.train)
    return Turn(number, start, end, turn.train, open_end=True)


# -- contents -----------------------------------------------------------------------------------------------------------


def _leaves(value: Any, message: int, path: Path = ()) -> Iterator[_Leaf]:
    """Texts in a message, in the order of its fields: values, and keys of objects as (path, None)."""
    if isinstance(value, str):
        if path != ("role",):
            yield _Leaf(message, path, value)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if path and isinstance(key, str):
                yield _Leaf(message, (*path, key, None), key)
            yield from _leaves(item, message, (*path, key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, message, (*path, number))


def _is_answer(leaf: _Leaf, turn: Shown) -> bool:
    return leaf.path == ("content",) and (bool(leaf.value) or not turn.fields.get("tool_calls"))


def _marked(
    fields: Sequence[dict[str, Any]], tools: Tools, leaves: Sequence[_Leaf], marks: Sequence[str]
) -> tuple[list[dict[str, Any]], Tools]:
    wanted = {(leaf.message, *leaf.path): mark for leaf, mark in zip(leaves, marks, strict=True)}
    touched = {leaf.message for leaf in leaves}
    marked = [_replaced(f, (n,), wanted) if n in touched else f for n, f in enumerate(fields)]
    return marked, _replaced(list(tools), (-1,), wanted) if -1 in touched else tools


def _replaced(value: Any, path: Path, wanted: dict[Path, str]) -> Any:
    if isinstance(value, str):
        return wanted.get(path, value)
    if isinstance(value, Mapping):
        return {wanted.get((*path, k, None), k): _replaced(item, (*path, k), wanted) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replaced(item, (*path, n), wanted) for n, item in enumerate(value)]
    return value


def _find(
    text: str, leaves: Sequence[_Leaf], render: Callable[[Sequence[_Leaf], Sequence[str]], str]
) -> list[_Found] | None:
    """Places of contents in the text, or None when the marked text does not become the text by putting the contents back."""
    marks = _marks(len(leaves), text)
    skeleton = render(leaves, marks)
    pieces, order = _split(skeleton, marks)
    places = _fill(text, pieces, [_spellings(leaves[n].value) for n in order])
    if places is None:
        return None
    return [_Found(leaves[n], start, end) for n, (start, end) in zip(order, places, strict=True)]


def _find_one_by_one(
    text: str,
    leaves: Sequence[_Leaf],
    render: Callable[[Sequence[_Leaf], Sequence[str]], str],
    shown: Sequence[Shown],
) -> list[_Found]:
    """As `_find`, for templates that look into contents: a mark changes more than its own place."""
    found: list[_Found] = []
    for leaf in leaves:
        alone = _find(text, [leaf], render)
        if alone is None and leaf.message >= 0 and _is_answer(leaf, shown[leaf.message]):
            alone = _guess(text, leaf, render)
        if alone is None:
            raise TemplateError(
                "a turn holds control tokens and the template changes its text", hint="remove them from the data"
            )
        found += alone
    return found


def _guess(text: str, leaf: _Leaf, render: Callable[[Sequence[_Leaf], Sequence[str]], str]) -> list[_Found]:
    """An answer in a template that looks into it: at the mark's place if it fits there, else where it stands first after that."""
    (mark,) = _marks(1, text)
    at = render([leaf], [mark]).find(mark)
    for spelling in _spellings(leaf.value):
        if at >= 0 and text.startswith(spelling, at):
            return [_Found(leaf, at, at + len(spelling))]
    bare = leaf.value.strip()
    at = text.find(bare, max(at, 0))
    return [_Found(leaf, at, at + len(bare))] if at >= 0 else []


def _marks(count: int, text: str) -> list[str]:
    free = (chr(c) for c in PRIVATE if chr(c) not in text)
    left, right = next(free), next(free)
    return [f"{left}{n}{right}" for n in range(count)]


def _split(skeleton: str, marks: Sequence[str]) -> tuple[list[str], list[int]]:
    """The text between marks, and which mark stands at each gap."""
    if not marks:
        return [skeleton], []
    left, right = marks[0][0], marks[0][-1]
    pieces, order = [], []
    head, *rest = skeleton.split(left)
    pieces.append(head)
    for part in rest:
        number, after = part.split(right, 1)
        order.append(int(number))
        pieces.append(after)
    return pieces, order


def _spellings(value: str) -> list[str]:
    """How a template may write a text: as it is, stripped, or escaped in JSON or in a quoted string."""
    quoted = value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    ways = [value, value.strip(), value.rstrip(), value.lstrip(), json.dumps(value, ensure_ascii=False)[1:-1]]
    return list(dict.fromkeys([*ways, json.dumps(value)[1:-1], quoted]))


def _fill(text: str, pieces: Sequence[str], ways: Sequence[Sequence[str]]) -> list[tuple[int, int]] | None:
    """Ranges of the gaps between `pieces` when each gap holds one of its ways and all together are the text; else None."""
    if not text.startswith(pieces[0]):
        return None
    places: list[tuple[int, int]] = []
    tried: list[int] = [0]  # for each open gap, which way is tried next
    while tried:
        gap = len(tried) - 1
        start = places[-1][1] + len(pieces[gap]) if places else len(pieces[0])
        if gap == len(ways):
            if start == len(text):
                return places
            way = None
        else:
            way = next(
                (
                    n
                    for n in range(tried[-1], len(ways[gap]))
                    if text.startswith(ways[gap][n], start)
                    and text.startswith(pieces[gap + 1], start + len(ways[gap][n]))
                ),
                None,
            )
        if way is None:
            tried.pop()
            if places:
                places.pop()
            continue
        tried[-1] = way + 1
        places.append((start, start + len(ways[gap][way])))
        tried.append(0)
    return None
