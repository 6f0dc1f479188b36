"""One function per foreign format: a record as its row, or `CannotHold` with what has no place there."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

from danlu.types import Comparison, Conversation, Message, Prompt, Ranking

Row = dict[str, Any]
SCALE: Final = 5.0  # ChatLLaMA's scores go from 0 to 5
_LOOKS_LIKE_DIALOGUE: Final = re.compile(r"\s*(?:Human|Assistant):")
_SPEAKER_LINE: Final = re.compile(r"\n\n(?:Human|Assistant):")


class CannotHold(Exception):  # no error: the caller decides whether it is one
    """A record has something that the format has no place for; the message says what."""


def alpaca_row(record: Conversation) -> Row:
    """Stanford Alpaca's keys, with LLaMA-Factory's `system` and `history`."""
    system, turns = _text_turns(record)
    *earlier, last = _rounds(turns)
    return {"instruction": last[0], "input": "", "output": last[1], **_beside(system, earlier)}


def alpaca_prompt_row(record: Prompt) -> Row:
    """The same without an answer."""
    system, turns = _text_prompt(record)
    earlier = _rounds(turns[:-1]) if turns[1:] else []
    return {"instruction": turns[-1]["content"], "input": "", **_beside(system, earlier)}


def _beside(system: str, earlier: list[list[str]]) -> Row:
    return ({"system": system} if system else {}) | ({"history": earlier} if earlier else {})


def sharegpt_row(record: Conversation) -> Row:
    """ShareGPT's turns; tools as LLaMA-Factory has them: the list as JSON text, calls and results as turns."""
    _refuse(record.messages, "train", "reasoning_content", "tool_call_id")
    turns: list[Row] = []
    called: list[str] = []
    for index, message in enumerate(record.messages):
        role, content, calls = message["role"], message["content"], message.get("tool_calls")
        if message.get("name", called[0] if len(called) == 1 else None) != (called[0] if len(called) == 1 else None):
            raise CannotHold("names of tools beside their results, other than of the call before")
        if role == "system" and index:
            raise CannotHold("a system text that does not come first")
        speaker = {"system": "system", "user": "human", "assistant": "gpt", "tool": "observation"}[role]
        if calls:
            if content.strip():
                raise CannotHold("a turn with both text and tool calls")
            if any("id" in call for call in calls):
                raise CannotHold("ids of tool calls")
            named = [{"name": c["function"]["name"], "arguments": c["function"]["arguments"]} for c in calls]
            called = [c["function"]["name"] for c in calls]
            speaker, content = "function_call", json.dumps(named if len(named) > 1 else named[0], ensure_ascii=False)
        turns.append({"from": speaker, "value": content})
    _check_order(record.messages)
    row: Row = {"conversations": turns}
    if record.tools:
        row["tools"] = json.dumps([dict(tool) for tool in record.tools], ensure_ascii=False)
    return row


def openai_row(record: Conversation) -> Row:
    """OpenAI's messages: arguments as JSON text, every call with an id, `weight: 0` for an answer that is not trained."""
    _refuse(record.messages, "reasoning_content")
    found: list[Row] = []
    open_calls: list[str] = []
    for index, message in enumerate(record.messages):
        row: Row = {"role": message["role"], "content": message["content"]}
        if not message.get("train", True):
            row["weight"] = 0
        if calls := message.get("tool_calls"):
            row["content"] = message["content"] or None
            row["tool_calls"] = []
            for number, call in enumerate(calls):
                arguments = call["function"]["arguments"]
                text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                known = call.get("id", f"call_{index}_{number}")
                function = {"name": call["function"]["name"], "arguments": text}
                row["tool_calls"].append({"id": known, "type": "function", "function": function})
            open_calls = [call["id"] for call in row["tool_calls"]]
        if message["role"] == "tool":
            known = message.get("tool_call_id") or (open_calls[0] if open_calls else "")
            if not known:
                raise CannotHold("a tool's result without a call")
            open_calls = [call for call in open_calls if call != known]
            row["tool_call_id"] = known
        found.append(row)
    return {"messages": found} | ({"tools": [dict(tool) for tool in record.tools]} if record.tools else {})


def trl_row(record: Comparison) -> Row:
    """TRL's conversational preferences."""
    for turns in (record.prompt, record.chosen, record.rejected):
        _refuse(turns, "train")
    row: Row = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
    return row | ({"margin": record.margin} if record.margin else {})


def chatllama_actor_row(record: Conversation) -> Row:
    """ChatLLaMA's demonstrations."""
    system, turns = _text_turns(record)
    _rounds(turns)
    return {"user_input": _user_input(system, turns[:-1]), "completion": turns[-1]["content"]}


def fits_scale(scores: Sequence[float]) -> bool:
    """Whether scores can stand in ChatLLaMA's file as they are."""
    return min(scores) >= 0 and max(scores) <= SCALE


def chatllama_reward_rows(record: Ranking) -> list[Row]:
    """ChatLLaMA's scored answers, one a row."""
    question = _user_input(*_split_system(record.prompt))
    low, high = min(record.scores), max(record.scores)
    # A pair's scores are minus its ranks, SHP's are votes: where they do not fit, the worst is 0 and the best is 5.
    fits = fits_scale(record.scores)
    if not fits and low == high:
        raise CannotHold("scores outside 0 to 5 that cannot be put on that scale, since all are equal")
    rows = []
    for answer, score in zip(record.responses, record.scores, strict=True):
        _refuse(answer, "train", "reasoning_content", "tool_calls")
        if len(answer) != 1:
            raise CannotHold("an answer of several turns")
        shown = score if fits else round(SCALE * (score - low) / (high - low), 4)
        rows.append({"user_input": question, "completion": answer[0]["content"], "score": shown})
    return rows


def chatllama_prompt_row(record: Prompt) -> Row:
    """ChatLLaMA's prompts."""
    system, turns = _text_prompt(record)
    return {"user_input": _user_input(system, turns)}


# -- what the text formats share ------------------------------------------------------------------------------------------


def _refuse(messages: Sequence[Message], *keys: str) -> None:
    named = {
        "train": "an answer that is not trained (train: false)",
        "reasoning_content": "thoughts (reasoning_content)",
        "tool_calls": "tool calls",
        "tool_call_id": "ids of tool calls",
        "name": "names of tools beside their results",
    }
    for message in messages:
        for key in keys:
            if key in message and not (key == "train" and message["train"]):
                raise CannotHold(named[key])


def _check_order(messages: Sequence[Message]) -> None:
    """Turns alternate between those who ask and the assistant, who has the last one."""
    spoken = [message["role"] == "assistant" for message in messages if message["role"] != "system"]
    if spoken and spoken[0]:
        raise CannotHold("a conversation that starts with the assistant")
    if any(one == other for one, other in pairwise(spoken)):
        raise CannotHold("two turns of one side in a row")
    if not spoken or not spoken[-1]:
        raise CannotHold("a conversation that does not end with the assistant")


def _split_system(messages: Sequence[Message]) -> tuple[str, list[Message]]:
    """The system text at the start, and the other turns, which hold text of user and assistant alone."""
    _refuse(messages, "train", "reasoning_content", "tool_calls")
    head = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns = list(messages[len(head) :])
    if any(message["role"] == "system" for message in turns):
        raise CannotHold("a system text that does not come first")
    if any(message["role"] == "tool" for message in turns):
        raise CannotHold("results of tools")
    if any(not message["content"].strip() for message in messages):
        raise CannotHold("an empty turn")
    return (head[0]["content"] if head else ""), turns


def _text_turns(record: Conversation) -> tuple[str, list[Message]]:
    if record.tools:
        raise CannotHold("tools")
    return _split_system(record.messages)


def _text_prompt(record: Prompt) -> tuple[str, list[Message]]:
    if record.reference:
        raise CannotHold("a reference answer")
    system, turns = _split_system(record.prompt)
    if not turns or turns[-1]["role"] != "user":
        raise CannotHold("a prompt that does not end with the user")
    return system, turns


def _rounds(turns: Sequence[Message]) -> list[list[str]]:
    """Questions with their answers."""
    _check_order(turns)
    return [[turns[i]["content"], turns[i + 1]["content"]] for i in range(0, len(turns), 2)]


def _user_input(system: str, turns: Sequence[Message]) -> str:
    """ChatLLaMA's one text: the question alone, or the dialogue before the answer as HH-RLHF writes it."""
    if system:
        raise CannotHold("a system text")
    if not turns or turns[-1]["role"] != "user":
        raise CannotHold("a prompt that does not end with the user")
    if len(turns) == 1:
        if _LOOKS_LIKE_DIALOGUE.match(turns[0]["content"]):
            raise CannotHold("a question that looks like a dialogue of its own")
        return turns[0]["content"]
    _rounds(turns[:-1])
    if any(t["content"] != t["content"].strip() or _SPEAKER_LINE.search(t["content"]) for t in turns):
        raise CannotHold("turns that begin or end with white space, or that hold a speaker's line, in a dialogue")
    names = {"user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{names[t['role']]}: {t['content']}" for t in turns) + "\n\nAssistant:"
