"""Question and answer in two columns, under the names that well-known sets gave them.

Only rows that hold nothing else of meaning are taken: a third column (a passage, options, a label) would be lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from danlu.data.formats import question_answer
from danlu.data.formats.base import Format, Row
from danlu.data.formats.fields import text
from danlu.data.formats.renamed import parse_renamed
from danlu.data.formats.turns import assistant, published_conversation, user
from danlu.types import Origin, Record

# Columns that say what a row is about, and nothing that its answer depends on.
_ABOUT: Final = (
    {"", "0", "Unnamed: 0", "id", "_id", "idx", "index", "source", "url", "licence", "license", "lang", "language"}
    | {"kind", "category", "type", "level", "subject", "topic", "domain", "original_question"}
)  # fmt: skip
# A question that was already put into a template, in Chinese (Med-ChatGLM) or in English (ChatGLM-Tuning).
_TEMPLATES: Final = (
    re.compile(r"\s*问题[:：]\s*(.*?)\s*回答[:：]\s*", re.DOTALL),
    re.compile(r"\s*Instruction: (.*?)\s*(?:\nInput: (.*?)\s*)?\nAnswer:\s*", re.DOTALL),
)


def _pair(name: str, columns: Mapping[str, str], about: str, example: Row) -> Format:
    needed = {columns["prompt"], columns["response"]}
    known = {*columns.values(), *_ABOUT}
    return Format(
        name,
        f'{{"{columns["prompt"]}", "{columns["response"]}"}}',
        "conversation",
        lambda row: needed <= row.keys() <= known and not any(isinstance(row[key], (list, dict)) for key in needed),
        parse_renamed(question_answer.FORMAT, columns),
        about,
        example,
    )


def _without_template(context: str) -> str:
    for template in _TEMPLATES:
        if found := template.fullmatch(context):
            return "\n".join(part for part in found.groups() if part)
    return context


def _parse_context(row: Row, origin: Origin) -> list[Record]:
    question = _without_template(text(row, "context", origin))
    return [published_conversation([user(question), assistant(text(row, "target", origin))], origin)]


ADGEN = _pair(
    "adgen",
    {"prompt": "content", "response": "summary"},
    "AdvertiseGen, the set of ChatGLM's tutorials: attributes of a garment, and an advertisement for it.",
    {"content": "类型#裙*颜色#蓝色*图案#条纹", "summary": "蓝色条纹的裙子，清爽又显瘦。"},
)
FIREFLY = _pair(
    "firefly",
    {"prompt": "input", "response": "target"},
    "Firefly's Chinese instructions, with the `kind` of task.",
    {"kind": "Translation", "input": "翻译成英文：你好", "target": "Hello"},
)
QUERY = _pair(
    "query-response",
    {"prompt": "query", "response": "response"},
    "Questions and answers as MetaMathQA names them.",
    {"query": "What is half of 18?", "response": "Half of 18 is 9."},
)
OPENORCA = _pair(
    "openorca",
    {"prompt": "question", "response": "response", "system": "system_prompt"},
    "OpenOrca's questions and answers, each with its own system text.",
    {"id": "q.1", "system_prompt": "Be brief.", "question": "What melts at 0 °C?", "response": "Ice."},
)
QUESTIONS = _pair(
    "questions",
    {"prompt": "question", "response": "answer"},
    "Plain questions and answers. Rows that also have a passage or options are other formats.",
    {"question": "What melts at 0 °C?", "answer": "Ice."},
)
CONTEXT = Format(
    "context-target",
    '{"context", "target"}',
    "conversation",
    lambda row: {"context", "target"} <= row.keys() <= {"context", "target", *_ABOUT},
    _parse_context,
    "Med-ChatGLM and ChatGLM-Tuning: a question in a template (`问题：...\\n回答: `, or `Instruction: ...\\nAnswer: `), "
    "which comes off, and its answer.",
    {"context": "问题：感冒了怎么办？\n回答: ", "target": "多休息，多喝水。"},
)
