"""Conversations and prompts that are too long: what goes, in which order, and what is never cut.

The system text stays. The oldest exchanges go first. If the newest exchange alone is still too long, `overlength` decides: it is
dropped, or its question loses its left end and then its answer its right end, or that is an error. Questions are shortened as
text, before the template, so a shortened prompt is still one that serving could render.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from danlu.exceptions import DataError
from danlu.text.chat_template import Answer, ChatTemplate, Encoded
from danlu.text.tool_text import Tools
from danlu.types import Message, Origin

Overlength = Literal["drop", "split", "truncate", "error"]
Size = Callable[[list[Message]], int]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long things may be, in tokens.

    Attributes:
        total: of a conversation, or of a prompt with an answer.
        prompt: of what stands before the last answer.
        answer: of one answer with its stop token.
        overlength: what happens to what is longer when the oldest exchanges are gone: "drop" it, "truncate" it (never asked for
            silently), or make it an "error"; then not even old exchanges go. "split" is "drop", but the oldest exchanges of a
            conversation become one of their own.
    """

    total: int
    prompt: int | None = None
    answer: int | None = None
    overlength: Overlength = "drop"

    @classmethod
    def of(cls, limits: int | Limits) -> Limits:
        """Limits; a number is one of the total."""
        return limits if isinstance(limits, Limits) else cls(limits)

    @property
    def longest_prompt(self) -> int:
        """Tokens that a prompt without an answer may have."""
        return self.total if self.prompt is None else min(self.total, self.prompt)

    @property
    def too_long(self) -> str:
        """Why something was dropped, for a count."""
        return "longer than max_length" + ("" if self.prompt is None else " or max_prompt_tokens")

    def shares(self, prompt: int, answer: int) -> tuple[int, int]:
        """Tokens for a prompt and an answer that are too long together: the shorter one stays whole if half is enough for it."""
        prompt = prompt if self.prompt is None else min(prompt, self.prompt)
        answer = answer if self.answer is None else min(answer, self.answer)
        if prompt + answer <= self.total:
            return prompt, answer
        half = self.total // 2
        if answer <= half:
            return self.total - answer, answer
        if prompt <= half:
            return prompt, self.total - prompt
        return half, self.total - half


@dataclass(frozen=True, slots=True)
class Fitted:
    """A conversation within limits.

    Attributes:
        encoded: None when nothing of it is left to train on.
        messages: what was encoded, or was too long to be.
        lost: answers that were to be trained and are gone or not whole.
        reason: why nothing is left, for a count.
    """

    encoded: Encoded | None
    messages: list[Message]
    lost: int = 0
    reason: str = ""


def trained_answers(messages: Sequence[Message]) -> int:
    """How many answers of a conversation are to be trained. One that nothing precedes answers nothing."""
    return sum(m["role"] == "assistant" and m.get("train", True) for m in messages[1:])


def newest_exchanges(messages: list[Message], fits: Callable[[list[Message]], bool]) -> list[Message] | None:
    """The conversation with as few of its oldest exchanges dropped as will do; None if not even the newest one alone fits."""
    if fits(messages):
        return messages
    shorter = _shorter(messages)
    if not shorter or not fits(shorter[-1]):
        return None
    low, high = 0, len(shorter) - 1  # shorter[high] fits; what fits stays fitting when more is dropped
    while low < high:
        middle = (low + high) // 2
        if fits(shorter[middle]):
            high = middle
        else:
            low = middle + 1
    return shorter[high]


def newest_exchange(messages: list[Message]) -> list[Message]:
    """The system text and the newest exchange."""
    return (_shorter(messages) or [messages])[-1]


def older_exchanges(messages: list[Message], kept: list[Message]) -> list[Message]:
    """The conversation up to where what was kept of it begins: the system text and the exchanges that are gone, or nothing."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    older = messages[: len(messages) - len(kept) + first]
    return older if len(older) > first else []


def without_left_end(messages: list[Message], size: Size, limit: int) -> list[Message] | None:
    """The messages with as little as will do cut from the left of what users and tools say; None if that cannot be enough."""
    places = [n for n, m in enumerate(messages) if m["role"] in ("user", "tool")]
    total = sum(len(messages[n]["content"]) for n in places)

    def cut(count: int) -> list[Message]:
        kept = list(messages)
        for n in places:
            text = kept[n]["content"]
            kept[n] = {**kept[n], "content": text[count:]}
            count = max(0, count - len(text))
        return kept

    if size(messages) <= limit:
        return messages
    if size(cut(total)) > limit:
        return None
    low, high = 1, total
    while low < high:
        middle = (low + high) // 2
        if size(cut(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    return cut(high)


def fit_prompt(
    messages: list[Message],
    template: ChatTemplate,
    limits: Limits,
    *,
    tools: Tools = (),
    origin: Origin | None = None,
    length: int | None = None,
) -> list[Message] | None:
    """A prompt of at most `limits.longest_prompt` tokens, or None when it is to be dropped.

    Args:
        length: its tokens, if they have been counted already.

    Raises:
        DataError: it is longer and `overlength` is "error".
    """
    limit = limits.longest_prompt
    if length is not None and length <= limit:
        return messages

    def size(prompt: list[Message]) -> int:
        return len(template.encode_prompt(prompt, tools=tools))

    if limits.overlength == "error":
        if (length := size(messages)) > limit:
            raise too_long("this prompt", length, limit, origin)
        return messages
    kept = newest_exchanges(messages, lambda m: size(m) <= limit)
    if kept is None and limits.overlength == "truncate":
        kept = without_left_end(newest_exchange(messages), size, limit)
    return kept


def fit_conversation(
    messages: list[Message],
    template: ChatTemplate,
    limits: Limits,
    *,
    tools: Tools = (),
    origin: Origin | None = None,
    whole: Encoded | None = None,
) -> Fitted:
    """A conversation within limits, encoded.

    Args:
        whole: the conversation as it is, if it has been encoded already.

    Raises:
        DataError: something is longer than its limit and `overlength` is "error".
    """
    before = trained_answers(messages)
    # By number of messages, so that nothing is encoded twice.
    seen: dict[int, Encoded] = {} if whole is None else {len(messages): whole}

    def encoded_once(candidate: list[Message]) -> Encoded:
        if len(candidate) not in seen:
            seen[len(candidate)] = template.encode(candidate, tools=tools)
        return seen[len(candidate)]

    def fits(candidate: list[Message]) -> bool:
        found = encoded_once(candidate)
        return len(found.ids) <= limits.total and (limits.prompt is None or _prompt_size(found) <= limits.prompt)

    if limits.overlength == "error":
        _refuse(encoded_once(messages), limits, origin)
    kept = newest_exchanges(messages, fits)
    if kept is None and limits.overlength == "truncate":
        kept = _fit_newest(newest_exchange(messages), template, limits, tools)
        seen.clear()
    if kept is None:
        return Fitted(None, newest_exchange(messages), before, limits.too_long)
    encoded, lost = _fit_answers(encoded_once(kept), limits)
    lost += before - trained_answers(kept)
    if before and not any(encoded.loss_weights):
        return Fitted(None, kept, before, "answers longer than max_answer_tokens")
    return Fitted(encoded, kept, lost)


def split_conversation(
    messages: list[Message],
    template: ChatTemplate,
    limits: Limits,
    *,
    tools: Tools = (),
    origin: Origin | None = None,
    whole: Encoded | None = None,
) -> Iterator[Fitted]:
    """`fit_conversation`, and with `overlength: split` also what it left out, as conversations of their own: newest first."""
    while True:
        fitted = fit_conversation(messages, template, limits, tools=tools, origin=origin, whole=whole)
        older = older_exchanges(messages, fitted.messages) if limits.overlength == "split" else []
        again = trained_answers(older)
        yield replace(fitted, lost=fitted.lost - again)
        if not again:
            return
        messages, whole = older, None


Branches = tuple[list[int], list[list[int]]]
"""Ids of a prompt and of the answers to it."""
FittedAnswers = tuple[list[int], list[list[int]], int]
"""Ids of a prompt and of the answers to it, and how many of these are not whole."""


def fit_answers(
    asked: list[Message],
    given: Sequence[list[Message]],
    template: ChatTemplate,
    limits: Limits,
    *,
    origin: Origin | None = None,
    whole: Branches | None = None,
) -> FittedAnswers | str:
    """A prompt and its answers within limits, or why all of it is dropped.

    Args:
        whole: all of it as it is, if it has been encoded already.

    Raises:
        DataError: something is longer than its limit and `overlength` is "error".
    """

    def encode(prompt: list[Message]) -> Branches:
        if whole is not None and prompt == asked:
            return whole
        return template.encode_branches([(prompt, given)])[0]

    def fits(prompt: list[Message]) -> bool:
        ids, answers = encode(prompt)
        return len(ids) <= limits.longest_prompt and len(ids) + max(map(len, answers)) <= limits.total

    if limits.overlength == "error":
        ids, answers = encode(asked)
        longest = max(map(len, answers))
        for what, length, limit in (
            ("this prompt", len(ids), limits.prompt),
            ("an answer", longest, limits.answer),
            ("this prompt with an answer", len(ids) + longest, limits.total),
        ):
            if limit is not None and length > limit:
                raise too_long(what, length, limit, origin)
        return ids, answers, 0
    kept = newest_exchanges(asked, fits)
    if kept is None and limits.overlength == "truncate":
        newest = newest_exchange(asked)
        ids, answers = encode(newest)
        share, _ = limits.shares(len(ids), max(map(len, answers)))
        kept = without_left_end(newest, lambda m: len(template.encode_prompt(m)), share)
    if kept is None:
        return limits.too_long
    ids, answers = encode(kept)
    most = min(limits.answer or limits.total, limits.total - len(ids))
    cut = sum(len(a) > most for a in answers)
    if cut and limits.overlength == "drop":
        return "answers longer than max_answer_tokens"
    return ids, [a[: max(most, 0)] for a in answers], cut


def too_long(what: str, length: int, limit: int, origin: Origin | None) -> DataError:
    """The error for something over a limit."""
    return DataError(
        f"{what} has {length} tokens, {limit} are allowed",
        file=origin.file if origin else None,
        line=origin.line if origin else None,
        hint="raise the limit, or set overlength to drop or truncate",
    )


# -- inside ---------------------------------------------------------------------------------------------------------------


def _shorter(messages: list[Message]) -> list[list[Message]]:
    """The conversation without its oldest exchange, without the two oldest, and so on; the system text stays."""
    first = 1 if messages and messages[0]["role"] == "system" else 0
    starts = []
    for n in range(first + 1, len(messages)):
        if messages[n]["role"] == "user":
            start = n
            while start > first + 1 and messages[start - 1]["role"] == "system":
                start -= 1  # a system text on the way belongs to the question behind it
            starts.append(start)
    return [[*messages[:first], *messages[start:]] for start in starts]


def _prompt_size(encoded: Encoded) -> int:
    return encoded.answers[-1].start if encoded.answers else len(encoded.ids)


def _refuse(encoded: Encoded, limits: Limits, origin: Origin | None) -> None:
    if len(encoded.ids) > limits.total:
        raise too_long("this conversation", len(encoded.ids), limits.total, origin)
    if limits.prompt is not None and _prompt_size(encoded) > limits.prompt:
        raise too_long("what stands before the last answer", _prompt_size(encoded), limits.prompt, origin)
    longest = max((a.end - a.start for a in encoded.answers), default=0)
    if limits.answer is not None and longest > limits.answer:
        raise too_long("an answer", longest, limits.answer, origin)


def _fit_newest(messages: list[Message], template: ChatTemplate, limits: Limits, tools: Tools) -> list[Message] | None:
    """The newest exchange with its prompt cut to its share; its answer may still be too long."""
    encoded = template.encode(messages, tools=tools)
    prompt, _ = limits.shares(_prompt_size(encoded), len(encoded.ids) - _prompt_size(encoded))
    return without_left_end(messages, lambda m: _prompt_size(template.encode(m, tools=tools)), prompt)


def _fit_answers(encoded: Encoded, limits: Limits) -> tuple[Encoded, int]:
    """Answers over the limit: without loss, or cut at their right end with what follows; and how many are not whole."""
    weights, lost = list(encoded.loss_weights), 0
    for number, answer in enumerate(encoded.answers):
        most = min(limits.answer or limits.total, limits.total - answer.start)
        trained = weights[answer.start] > 0
        if answer.end - answer.start <= most or not trained:
            continue
        if limits.overlength == "truncate":
            end = answer.start + max(most, 0)
            later = sum(encoded.loss_weights[a.start] > 0 for a in encoded.answers[number + 1 :])
            answers = [*encoded.answers[:number], *([Answer(answer.start, end, False)] if end > answer.start else [])]
            return Encoded(encoded.ids[:end], weights[:end], answers), lost + 1 + later
        lost += 1
        weights[answer.start : answer.end] = [0.0] * (answer.end - answer.start)
    ids = encoded.ids if limits.overlength != "truncate" else encoded.ids[: limits.total]
    return replace(encoded, ids=ids, loss_weights=weights[: len(ids)]), lost
