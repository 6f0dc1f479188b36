"""The acceptance set: 22 real data sets, read with no setting but the path, with the counts that their READMEs give.

Where a README shows that a file's meaning is ambiguous, that rows are broken, or that it holds no rows at all, exactly
that is the problem reported.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from danlu.data.files import is_data_file
from danlu.data.kinds import kind_of, serves
from danlu.data.problems import Problem
from danlu.data.read import ReadOptions, read, scan
from danlu.exceptions import DataError
from danlu.types import Comparison, Conversation, Document, Prompt, Ranking, Record, RecordKind, Unpaired


@dataclass(frozen=True)
class Expected:
    """What reading a file or folder finds: records by format, rows left out by reason, problems by code and line."""

    path: str
    records: dict[str, int]
    dropped: dict[str, int] = field(default_factory=dict)
    problems: tuple[tuple[str, int], ...] = ()


def alpaca_eval(model: str, kept: int, ties: int, failed: int = 0) -> Expected:
    dropped = {"tie": ties} | ({"the annotator failed": failed} if failed else {})
    return Expected(f"alpaca-eval-prefs/{model}", {"alpaca-eval": kept}, dropped)


SETS = [
    Expected("advertise-gen/dev.json", {"adgen": 870}),
    Expected("advertise-gen/chatglm_improve_data_sample.jsonl", {"question-answer": 100}),
    Expected("alpaca-en/alpaca_data.json.gz", {"alpaca": 49915}),
    Expected("alpaca-en/seed_tasks.jsonl", {"seed-tasks": 175}),
    alpaca_eval("alpaca-7b", 429, 7),
    alpaca_eval("alpaca-farm-ppo-human", 434, 2),
    alpaca_eval("falcon-7b-instruct", 434, 2),
    alpaca_eval("llama-2-7b-chat-hf", 435, 1),
    alpaca_eval("text_davinci_001", 428, 7, failed=1),
    alpaca_eval("vicuna-13b", 435, 1),
    Expected("alpaca-zh/alpaca_chinese_zh.json.gz", {"alpaca": 49916}),
    Expected("belle-seed-zh", {"seed-tasks": 175}),
    Expected("chatdoctor/chatdoctor5k.json.gz", {"alpaca": 4946}),
    Expected("chatdoctor/format_dataset.csv", {"disease-table": 796}),
    Expected("chatdoctor/disease_database_mini.csv", {"disease-table": 100}),
    Expected("cmmlu", {"multiple-choice": 335}),
    Expected("code-alpaca", {"alpaca": 2017}),
    Expected("gpteacher/roleplay-simple-deduped-roleplay-instruct.json.gz", {"alpaca": 1923}),
    Expected("gpteacher/toolformer-similarity-0.6-dataset.json", {"alpaca": 2396}),
    Expected("gsm8k", {"gsm8k": 7473}),
    Expected("hh-rlhf/harmless-base", {"hh-rlhf": 1986}),
    Expected("hh-rlhf/helpful-base", {"hh-rlhf": 1994}, {"empty turn": 1}),
    Expected("hh-rlhf/helpful-rejection-sampled", {"hh-rlhf": 2322}),
    Expected("huatuo-med-zh/infer.json", {"alpaca": 5}),
    Expected("huatuo-med-zh/liver_cancer.json", {"flattened-dialogue": 1000}),
    Expected("huatuo-med-zh/llama_data.json.gz", {"alpaca": 7814}),
    Expected("huatuo-med-zh/med_chatglm_train_sample.txt", {"context-target": 500}),
    Expected("instruction-wild/data", {"alpaca-prompt": 2 * 429}),
    Expected("instruction-wild/data_v2/user_1.jsonl", {"alpaca-prompt": 429}),
    Expected(
        "instruction-wild/data_v2/user_2.jsonl", {"alpaca-prompt": 246}, {}, (("bad-json", 134), ("bad-json", 168))
    ),
    Expected(
        "instruction-wild/data_v2/user_3.jsonl",
        {"alpaca-prompt": 198},
        {},
        (("bad-json", 10), ("bad-json", 121), ("bad-json", 122)),
    ),
    Expected("llama-factory-demos/alpaca_en_demo.json", {"alpaca": 999}),
    Expected("llama-factory-demos/alpaca_zh_demo.json", {"alpaca": 1000}),
    Expected("llama-factory-demos/dataset_info.json", {}, {}, (("not-data", 1),)),
    Expected("llama-factory-demos/dpo_en_demo.json.gz", {"sharegpt-preference": 300}),
    Expected("llama-factory-demos/dpo_zh_demo.json", {"sharegpt-preference": 300}),
    Expected("llama-factory-demos/glaive_toolcall_en_demo.json", {"sharegpt-tools": 300}),
    Expected("llama-factory-demos/glaive_toolcall_zh_demo.json", {"sharegpt-tools": 300}),
    # Its {{name}} is a blank to fill in: `danlu data check` warns, reading takes the rows as they are.
    Expected("llama-factory-demos/identity.json", {"alpaca": 91}),
    Expected("llama-factory-demos/kto_en_demo.json", {"unpaired-conversation": 300}),
    Expected("mmlu/dev", {"multiple-choice": 285}),
    Expected("mmlu/val", {"multiple-choice": 1531}),
    Expected(
        "moss-sft",
        {"moss": 1006, "moss-prompt": 620},
        {"results of a command that is no call": 1},
    ),
    Expected("oasst/oaast_rm_zh.json", {"ranked-outputs": 661}),
    Expected("oasst/oaast_sft_zh.json", {"alpaca": 588}),
    Expected("oasst/en_100_tree.jsonl", {"oasst-tree": 257}),
    Expected("pretrain-en/c4_demo.jsonl", {"document": 300}),
    Expected("pretrain-zh/poetry/全唐诗", {"poetry": 8007}),
    Expected("pretrain-zh/poetry/宋词", {"poetry": 10_000}),
    Expected("pretrain-zh/poetry/四书五经", {"poetry": 16}),
    Expected("pretrain-zh/poetry/论语", {"poetry": 20}),
    Expected("pretrain-zh/poetry/诗经", {"poetry": 305}),
    Expected("pretrain-zh/poetry/蒙学", {"poetry": 850}),
    Expected(
        "sharegpt-zh-1k",
        {"sharegpt": 992},
        {"does not end with an assistant turn": 7, "empty turn": 1},
    ),
]
TEXTS = ["pretrain-en/*.txt", "pretrain-en/gutenberg", "pretrain-zh/novels"]
NO_ROWS = {
    "tokenizers/gpt2/encoder.json": "a tokenizer's vocabulary, no data",
    "tokenizers/gpt2/vocab.bpe": "found no JSON",
    "tokenizers/llama/tokenizer.model": "found no JSON",
    "tokenizers/chinese-llama/chinese_sp.model": "found no JSON",
    "model-stories260k/stories260K.bin": "found no JSON",
    "model-stories260k/tok512.bin": "found no JSON",
    "model-stories260k": "holds no data file",
}
AMBIGUOUS = "alpaca-zh/alpaca_chinese_part_0.json"


def scanned(path: Path) -> tuple[list[tuple[str, Record]], Counter[str], list[Problem]]:
    dropped: Counter[str] = Counter()
    problems: list[Problem] = []
    found = scan(path, on_problem=problems.append, on_dropped=lambda reason, _: dropped.update([reason]))
    return [(entry.name, record) for entry, record in found], dropped, problems


def raw(path: Path) -> list[Any]:
    """The rows of a JSON array or of JSON Lines, read without danlu."""
    text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode()
    return (
        json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line]
    )


@pytest.mark.parametrize("expected", SETS, ids=lambda expected: expected.path)
def test_a_published_set_is_read_unchanged(shared_data: Path, expected: Expected) -> None:
    records, dropped, problems = scanned(shared_data / expected.path)
    assert Counter(name for name, _ in records) == expected.records
    assert dropped == expected.dropped
    assert tuple((problem.code, problem.line) for problem in problems) == expected.problems
    assert all(record.origin is not None and record.origin.line > 0 for _, record in records)


def test_no_file_of_the_sets_is_forgotten(shared_data: Path) -> None:
    covered = {shared_data / name for name in [*(e.path for e in SETS), *NO_ROWS, AMBIGUOUS]}
    texts = {found for pattern in TEXTS for found in shared_data.glob(pattern)}
    folders = sorted(path for path in shared_data.iterdir() if path.is_dir())
    assert len(folders) == 22
    for folder in folders:
        for file in folder.rglob("*"):
            if file.is_file() and file.name != "README.md":
                assert {file, *file.parents} & (covered | texts), f"nothing tests {file}"


@pytest.mark.parametrize("pattern", TEXTS)
def test_plain_text_loses_nothing_but_white_space(shared_data: Path, pattern: str) -> None:
    files = sorted(
        found for path in shared_data.glob(pattern) for found in ([path] if path.is_file() else path.iterdir())
    )
    assert files
    for file in files:
        records, dropped, problems = scanned(file)
        assert not dropped and not problems and {name for name, _ in records} == {"plain-text"}
        text = (gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()).decode("utf-8-sig")
        found = "".join(record.text for _, record in records if isinstance(record, Document))
        assert "".join(found.split()) == "".join(text.split())


@pytest.mark.parametrize("name", NO_ROWS)
@pytest.mark.parametrize("kind", ["document", "conversation"])
def test_files_without_rows_are_refused(shared_data: Path, name: str, kind: RecordKind) -> None:
    with pytest.raises(DataError) as caught:
        read(shared_data / name, kind)
    assert NO_ROWS[name] in caught.value.message
    assert caught.value.file == str(shared_data / name) and caught.value.hint


def test_a_bilingual_file_asks_which_language_is_meant(shared_data: Path) -> None:
    records, _, problems = scanned(shared_data / AMBIGUOUS)
    assert not records
    assert {problem.code for problem in problems} == {"ambiguous"} and problems[0].line == 2
    assert "--as alpaca-zh" in problems[0].hint and "--as alpaca-en" in problems[0].hint
    for language in ("zh", "en"):
        data = read(shared_data / AMBIGUOUS, "conversation", ReadOptions(format=f"alpaca-{language}"))
        assert len(data.records) == 954 and data.dropped == {"empty answer": 1}
    whole = read(shared_data / "alpaca-zh", "conversation", ReadOptions(format="alpaca-zh"))
    assert len(whole.records) == 49916 + 955 - 47, "the plain file beside it is read in its own shape"


# --- what the records say ---------------------------------------------------------------------------------------------


def conversations(path: Path) -> Iterator[Conversation]:
    for _, record in scanned(path)[0]:
        if isinstance(record, Conversation):
            yield record


def test_moss_turns_hold_no_marks_and_every_result_was_asked_for(shared_data: Path) -> None:
    calls: Counter[str] = Counter()
    results = 0
    for found in conversations(shared_data / "moss-sft"):
        assert found.messages[0]["role"] == "system"
        for before, message in zip(found.messages, found.messages[1:], strict=False):
            spoken = message["content"] + message.get("reasoning_content", "")
            for mark in (
                "<eoh>",
                "<eot>",
                "<eoc>",
                "<eom>",
                "<|Human|>",
                "<|MOSS|>",
                "<|Inner Thoughts|>",
                "<|Commands|>",
            ):
                assert mark not in spoken
            if message["role"] == "tool":
                results += 1
                assert before["role"] == "tool" or before.get("tool_calls")
            calls.update(call["function"]["name"] for call in message.get("tool_calls", ()))
    assert calls == {"Search": 545, "Calculate": 284, "Solve": 98, "Text2Image": 90, "Count": 1}
    assert results == 1007


def test_glaive_calls_are_structured(shared_data: Path) -> None:
    for language, calls in (("en", 211), ("zh", 216)):
        found = list(conversations(shared_data / f"llama-factory-demos/glaive_toolcall_{language}_demo.json"))
        made = [call for c in found for m in c.messages for call in m.get("tool_calls", ())]
        assert len(made) == calls and all(isinstance(call["function"]["arguments"], dict) for call in made)
        assert sum(bool(c.tools) for c in found) == {"en": 191, "zh": 200}[language]


def test_literature_dialogues_alternate(shared_data: Path) -> None:
    turns: Counter[int] = Counter()
    for found in conversations(shared_data / "huatuo-med-zh/liver_cancer.json"):
        roles = [message["role"] for message in found.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert not any(mark in message["content"] for message in found.messages for mark in ("<user>:", "<bot>:"))
        turns[len(roles) // 2] += 1
    assert turns[1] == 292 and turns[2] == 285 and turns[3] == 272


def test_med_chatglm_questions_lose_their_template(shared_data: Path) -> None:
    for found in conversations(shared_data / "huatuo-med-zh/med_chatglm_train_sample.txt"):
        assert not found.messages[0]["content"].startswith("问题") and "回答:" not in found.messages[0]["content"]


def test_gsm8k_references_are_the_numbers_after_the_marks(shared_data: Path) -> None:
    rows = raw(shared_data / "gsm8k/train.jsonl.gz")
    data = read(shared_data / "gsm8k", "prompt")
    assert data.formats == ["gsm8k"] and len(data.records) == len(rows) == 7473
    for row, record in zip(rows, data.records, strict=True):
        assert isinstance(record, Prompt) and record.prompt[0]["content"] == row["question"]
        assert record.reference["verifier"] == "number"
        assert float(record.reference["answer"]) == float(row["answer"].split("#### ")[1].replace(",", ""))
    solved = read(shared_data / "gsm8k", "conversation")
    first = solved.records[0]
    assert solved.formats == ["gsm8k-solution"] and len(solved.records) == 7473
    assert isinstance(first, Conversation) and first.messages[1]["content"] == rows[0]["answer"]


def test_multiple_choice_references_are_letters(shared_data: Path) -> None:
    for name in ("mmlu", "cmmlu"):
        for _, record in scanned(shared_data / name)[0]:
            assert isinstance(record, Prompt)
            assert record.reference["answer"] in list("ABCD") and len(record.reference["choices"]) == 4
            assert record.prompt[0]["content"].rpartition("\nA. ")[0]


def test_alpaca_eval_chooses_what_the_judge_chose(shared_data: Path) -> None:
    for model, first, second in (
        ("alpaca-7b", 317, 112),
        ("llama-2-7b-chat-hf", 111, 324),
        ("text_davinci_001", 368, 60),
    ):
        file = shared_data / "alpaca-eval-prefs" / model / "annotations.json"
        outputs = {(row["instruction"], row["output_1"]) for row in raw(file)}
        chosen: Counter[bool] = Counter()
        for _, record in scanned(file)[0]:
            assert isinstance(record, Comparison)
            chosen[(record.prompt[0]["content"], record.chosen[0]["content"]) in outputs] += 1
        assert chosen == {True: first, False: second}


def test_open_assistant_rankings(shared_data: Path) -> None:
    rows = raw(shared_data / "oasst/oaast_rm_zh.json")
    for row, (_, record) in zip(rows, scanned(shared_data / "oasst/oaast_rm_zh.json")[0], strict=True):
        assert isinstance(record, Ranking) and [r[0]["content"] for r in record.responses] == row["output"]
        assert (
            record.scores == sorted(record.scores, reverse=True) and len(record.prompt) == 2 * len(row["history"]) + 1
        )
    every_pair = read(shared_data / "oasst/oaast_rm_zh.json", "comparison", pairs="all")
    assert len(every_pair.records) == 1564 - 5, "of the README's 1,564 pairs, five are of equal answers"
    trees = read(shared_data / "oasst/en_100_tree.jsonl", "comparison")
    assert len(trees.records) == 212 and trees.dropped == {"only one answer to this prompt": 40, "all scores equal": 2}


def test_labels_and_pairs_of_the_demos(shared_data: Path) -> None:
    labels = Counter(
        record.label
        for _, record in scanned(shared_data / "llama-factory-demos/kto_en_demo.json")[0]
        if isinstance(record, Unpaired)
    )
    assert labels == {True: 150, False: 150}
    rows = raw(shared_data / "llama-factory-demos/dpo_zh_demo.json")
    for row, (_, record) in zip(rows, scanned(shared_data / "llama-factory-demos/dpo_zh_demo.json")[0], strict=True):
        assert isinstance(record, Comparison)
        assert record.chosen[0]["content"] == row["chosen"]["value"] != record.rejected[0]["content"]
        assert [m["content"] for m in record.prompt] == [turn["value"] for turn in row["conversations"]]


@pytest.mark.parametrize(
    ("path", "kind", "records", "dropped"),
    [
        ("alpaca-en/alpaca_data.json.gz", "conversation", 49890, {"empty answer": 25}),
        ("code-alpaca", "conversation", 2015, {"empty answer": 2}),
        ("hh-rlhf/harmless-base", "comparison", 1983, {"empty answer": 3}),
        ("hh-rlhf/helpful-rejection-sampled", "comparison", 2295, {"chosen equals rejected": 27}),
        ("instruction-wild/data", "prompt", 858, {}),
        ("oasst/oaast_sft_zh.json", "conversation", 588, {}),
        ("advertise-gen", "conversation", 970, {}),
        ("huatuo-med-zh", "conversation", 9319, {}),
        ("pretrain-zh/poetry/诗经", "document", 305, {}),
    ],
)
def test_stages_get_the_kind_they_need(
    shared_data: Path, path: str, kind: RecordKind, records: int, dropped: dict[str, int]
) -> None:
    data = read(shared_data / path, kind)
    assert len(data.records) == records and data.dropped == dropped
    assert {kind_of(record) for record in data.records} == {kind} and serves(kind, kind)


def test_data_files_are_found_by_their_suffix(shared_data: Path) -> None:
    assert not any(is_data_file(file.name) for file in (shared_data / "model-stories260k").iterdir())
