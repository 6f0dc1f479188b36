"""ChatGLM's prompts and answers as text: what stands around questions, and what becomes of an answer."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

Pairs = Sequence[tuple[str, str] | Sequence[str]]
Turn = dict[str, Any]  # of ChatGLM3: role, content, and perhaps metadata (a tool's name) or tools
TRAINED_AT: Final = ("[[训练时间]]", "2023年")
_HAN: Final = "\u4e00-\u9fff"
_FULL_WIDTH: Final = str.maketrans(",!:;?", "，！：；？")
_BESIDE_HAN: Final = re.compile(f"(?<=[{_HAN}])[,!:;?]|[,!:;?](?=[{_HAN}])")
_CALL: Final = re.compile(r"```[^\n]*\n(.*?)```", re.DOTALL)


def rounds_from_0(query: str, history: Pairs) -> str:
    """ChatGLM-6B's prompt: a first question stands alone."""
    if not history:
        return query
    done = "".join(f"[Round {n}]\n问：{q}\n答：{a}\n" for n, (q, a) in enumerate(history))
    return f"{done}[Round {len(history)}]\n问：{query}\n答："


def rounds_from_1(query: str, history: Pairs) -> str:
    """ChatGLM2-6B's prompt."""
    done = "".join(f"[Round {n}]\n\n问：{q}\n\n答：{a}\n\n" for n, (q, a) in enumerate(history, 1))
    return f"{done}[Round {len(history) + 1}]\n\n问：{query}\n\n答："


def next_round(query: str, rounds: int) -> str:
    """What ChatGLM2-6B reads after an answer that is in its cache already; `rounds` are finished."""
    return f"\n\n[Round {rounds + 1}]\n\n问：{query}\n\n答："


def dated(answer: str) -> str:
    """An answer of ChatGLM2-6B or ChatGLM3-6B as it is shown: stripped, with the year it was trained in."""
    return answer.strip().replace(*TRAINED_AT)


def punctuated(answer: str) -> str:
    """An answer of ChatGLM-6B as it is shown: `dated`, and ASCII , ! : ; ? beside Chinese characters become full width."""
    return _BESIDE_HAN.sub(lambda hit: hit.group().translate(_FULL_WIDTH), dated(answer))


def settled(answer: str, finish: Any) -> str:
    """As much of an unfinished answer, after `finish`, as what follows cannot change."""
    begun = max(n for n in range(len(TRAINED_AT[0])) if answer.endswith(TRAINED_AT[0][:n]))
    text: str = finish(answer[: len(answer) - begun].rstrip().rstrip(",!:;?"))
    return text


# -- ChatGLM3 -----------------------------------------------------------------------------------------------------------


def content_of(turn: Mapping[str, Any]) -> str:
    """A turn's content with the tools it offers."""
    tools = turn.get("tools")
    if turn["role"] != "system" or not tools:
        return str(turn["content"])
    return f"{turn['content']}\n{json.dumps(tools, indent=4, ensure_ascii=False)}"


def read_answer(output: str, history: Sequence[Turn]) -> tuple[Any, list[Turn]]:
    """What ChatGLM3 said: `(content, history)` with its turns appended.

    The output is one turn, or several that `<|assistant|>` parts. A turn's first line is its metadata: nothing, or the name of
    a tool whose call follows. A call becomes `{"name", "parameters"}` where the system turn offers tools, else
    `{"name", "content"}`. Nothing of it is run: arguments are read as literals.
    """
    turns = list(history)
    content: Any = ""
    for said in output.split("<|assistant|>"):
        first, found, rest = said.partition("\n")
        metadata, text = (first.strip(), rest) if found else ("", said)
        text = text.strip()
        turns.append({"role": "assistant", "metadata": metadata, "content": text})
        if not metadata:
            content = text.replace(*TRAINED_AT)
        elif turns[0]["role"] == "system" and "tools" in turns[0]:
            content = {"name": metadata, "parameters": call_arguments(text)}
        else:
            content = {"name": metadata, "content": text}
    return content, turns


def call_arguments(text: str) -> dict[str, Any]:
    """Keyword arguments of the call in a block of Python that ChatGLM3 wrote; what is no literal stays text."""
    block = _CALL.search(text)
    code = (block.group(1) if block else text).strip()
    try:
        tree = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError):
        return {}
    if not isinstance(tree, ast.Call):
        return {}
    found: dict[str, Any] = {}
    for argument in tree.keywords:
        if argument.arg is None:
            continue
        try:
            found[argument.arg] = ast.literal_eval(argument.value)
        except ValueError:
            found[argument.arg] = ast.unparse(argument.value)
    return found
