"""`danlu data check`: what is found, where, how loud it is, and that good data stays quiet."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.cli.main import run
from danlu.data.check import Checker, Findings, Summary, problem_json
from danlu.data.contents import fingerprint, hash_of
from danlu.data.language import language_of
from danlu.data.measure import TokenLengths
from danlu.data.problems import Problem
from danlu.data.read import ReadOptions, read, scan
from danlu.data.show import stand_in_tokenizer, views
from danlu.data.signs import found_nothing, has_stop, is_prose, mojibake, placeholder
from danlu.text.chat_template import ChatTemplate
from danlu.text.template_registry import TEMPLATES
from danlu.types import Comparison, Conversation, Document, Message, Origin, Prompt, Ranking, Record, Unpaired

ORIGIN = Origin("rows.jsonl", 1)
ENOUGH = 1001


def u(content: str) -> Message:
    return {"role": "user", "content": content}


def a(content: str) -> Message:
    return {"role": "assistant", "content": content}


def t(content: str) -> Message:
    return {"role": "tool", "content": content}


def talk(*messages: Message) -> dict[str, Any]:
    return {"messages": list(messages)}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def checked(path: Path, **options: Any) -> tuple[Summary, list[Problem]]:
    findings = Findings(None)
    checker = Checker(str(path), findings, **options)
    for entry, record in scan(path, on_problem=checker.problem, on_dropped=checker.dropped):
        checker.add(entry, record)
    return checker.finish(), findings.kept


def found(tmp_path: Path, rows: list[Any], **options: Any) -> list[tuple[str, int, str]]:
    """Code, line and field of every problem but the size."""
    _, problems = checked(write(tmp_path / "rows.jsonl", rows), **options)
    return [(p.code, p.line, p.field) for p in problems if p.code != "too-few"]


# -- signs in texts -------------------------------------------------------------------------------------------------------


def broken(text: str, read: str = "cp1252") -> str:
    return text.encode("utf-8").decode(read)


@pytest.mark.parametrize(
    "text",
    [
        broken("a café in the sun"),
        broken("it’s 20°C – quite warm"),
        broken("Ünïcode naïve"),
        broken("你好，世界", read="latin-1"),
        broken("价格：£5"),
        broken("今天很好，我们去公园，他说好", read="gb18030"),
        "half a charac\ufffdter",
        "手持两把锟斤拷，口中疾呼烫烫烫",
        "it\x92s a Windows quote",
        "ï»¿begins with a mark",
    ],
)
def test_broken_encodings_are_seen(text: str) -> None:
    shown = mojibake(f"Before it. {text} After it.")
    assert shown and len(shown) <= 80


@pytest.mark.parametrize(
    "text",
    [
        "plain ascii, with <tags> & {braces}",
        "a café, naïve, Ünïcode, 20°C, £5, «guillemets», São Paulo, SÃO PAULO, ÃO",
        "“quotes” – dashes — and… ellipsis’s",
        "你好，世界。今天天气很好！他说：“好”，于是走了。",
        "繁體中文、日本語のテキスト、한국어 문장",
        "Привет, мир. свинья",
        "emoji 😀👍🏽 and family 👨‍👩‍👧",
        "涓涓细流，銅鑼灣",
        "next line\x85is white space",
        "مرحبا بالعالم שלום",
    ],
)
def test_whole_texts_are_not(text: str) -> None:
    assert mojibake(text) is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("hello world", "en"),
        ("你好，世界", "zh"),
        ("Transformer 模型是什么？和 GPT 有什么区别", "zh"),
        ("Translate to Chinese: 'I love you very much indeed' 我爱你", "en"),
        ("a café by the sea", "en"),
        ("Wie läuft der Bär über die Straße für Mädchen", "other"),
        ("свинья и свинец", "other"),
        ("日本語のテキストです", "other"),
        ("한국어 문장", "other"),
        ("12 + 30 = 42", "other"),
        ("", "other"),
    ],
)
def test_languages_by_script(text: str, language: str) -> None:
    assert language_of([text]) == language


def test_languages_look_at_the_beginning_of_all_texts() -> None:
    assert language_of(["word " * 500, "你好" * 5000]) == "en"
    assert language_of(["hi", "你好，世界，今天天气很好"]) == "zh"


PROSE = "The lake lies high in the hills. Few people walk up there in winter. The path is steep and often icy, "
PROSE += "and the hut at the shore is closed from October on. In summer it is another place altogether, "


def test_ends_of_answers() -> None:
    assert has_stop("Yes.") and has_stop("好。") and has_stop("`code`") and has_stop("fine 😀")
    assert not has_stop("and then the") and not has_stop("他说") and not has_stop("first,")
    assert is_prose(PROSE + "with many boats on the water and children at the")
    assert not is_prose("Paris")
    assert not is_prose(PROSE + "with a list:\n- one of the things that one can do there in summer is to swim")
    assert not is_prose(PROSE + "\n```python\nprint(1)\n```\nand then some more of this text at the end of it")
    assert not is_prose(PROSE + "\nYours, Ada Brook")


def test_results_that_say_nothing() -> None:
    assert found_nothing("No results found.") and found_nothing("未找到相关信息") and found_nothing("=> 'No result.'")
    assert not found_nothing("The result is 5.") and not found_nothing("There is no doubt.")
    assert not found_nothing("Not found in the first index, but in the second: " + "many things " * 30)
    assert placeholder("I am {{name}}.") == "{{name}}" and placeholder("a {b} {{ {c} }}") is None


# -- what is found in rows ------------------------------------------------------------------------------------------------


def test_good_rows_are_quiet(tmp_path: Path) -> None:
    rows = [talk(u(f"What is {n} plus {n}?"), a(f"It is {2 * n}.")) for n in range(ENOUGH)]
    summary, problems = checked(write(tmp_path / "rows.jsonl", rows))
    assert problems == []
    assert (summary.records, summary.languages["en"], summary.duplicates) == (ENOUGH, ENOUGH, 0)


def test_every_problem_has_its_place(tmp_path: Path) -> None:
    rows = [
        talk(u("First?"), a("One.")),
        talk(u("CafÃ©?"), a("Two.")),
        {"instruction": "Third?", "input": "", "output": ""},
        talk(u("First?"), a("One.")),
        {"messages": [u("Fifth?"), {"role": "assistant", "content": 5}]},
        {"instruction": "Third?", "input": "", "output": "Three � three"},
        talk(u("Weather?"), a("I look."), t("No results."), a("It is 17 degrees.")),
        {"prompt": [u("Which?")], "chosen": [a("x")], "rejected": [a("x")]},
        talk(u("First?"), a("One.")),
    ]
    assert sorted(found(tmp_path, rows), key=lambda p: p[1]) == [
        ("mojibake", 2, "messages[0].content"),
        ("empty-answer", 3, ""),
        ("duplicate", 4, ""),
        ("wrong-type", 5, "messages[1].content"),
        ("mojibake", 6, "messages[1].content"),
        ("unsupported-number", 7, "messages[3].content"),
        ("equal-answers", 8, ""),
        ("duplicate", 9, ""),
    ]


def test_duplicates_name_the_first(tmp_path: Path) -> None:
    one, two = talk(u("a"), a("b")), talk(u("c"), a("d"))
    summary, problems = checked(write(tmp_path / "rows.jsonl", [one, two, one, two, one]))
    duplicates = [(p.line, p.message) for p in problems if p.code == "duplicate"]
    path = tmp_path / "rows.jsonl"
    assert duplicates == [
        (3, f"the same as {path}:1"),
        (4, f"the same as {path}:2"),
        (5, f"the same as {path}:1"),
    ]
    assert (summary.duplicates, summary.distinct_prompts) == (3, 2)


def test_what_makes_a_record_another(tmp_path: Path) -> None:
    pair = Comparison([u("q")], [a("x")], [a("y")])
    calls: Message = {
        "role": "assistant",
        "content": "b",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    different: list[Record] = [
        Conversation([u("a"), a("b")]),
        Conversation([u("ab"), a("")]),
        Conversation([u("a"), calls]),
        Conversation([u("a"), {**a("b"), "train": False}]),
        Conversation([u("a"), a("b")], tools=({"name": "f"},)),
        Prompt([u("a"), a("b")]),
        Prompt([u("a"), a("b")], {"answers": ["c"]}),
        pair,
        Comparison(pair.prompt, pair.rejected, pair.chosen),
        Comparison(pair.prompt, pair.chosen, pair.rejected, 1.0),
        Ranking([u("q")], [[a("x")], [a("y")]], [1, 2]),
        Ranking([u("q")], [[a("x")], [a("y")]], [2, 1]),
        Unpaired([u("q")], [a("x")], True),
        Unpaired([u("q")], [a("x")], False),
        Document("a"),
    ]
    assert len({fingerprint(record) for record in different}) == len(different)
    assert hash_of(["ab", "c"]) != hash_of(["a", "bc"]) != hash_of(["abc"])
    assert fingerprint(Document("a", Origin("x", 1))) == fingerprint(Document("a", Origin("y", 2)))


def test_numbers_that_the_question_or_another_tool_has_are_fine(tmp_path: Path) -> None:
    rows = [
        talk(u("Is 17 prime?"), a("I look."), t("No results."), a("I think 17 is.")),
        talk(u("Weather?"), a("I look."), t("No results."), a("I try again."), t("17 degrees"), a("It is 17 degrees.")),
        talk(u("Weather?"), a("I look."), t("No results."), a("I cannot tell.")),
        talk(u("Sum?"), a("I look."), t("No results."), t("2,500"), a("It is 2500.")),
    ]
    assert found(tmp_path, rows) == []


def test_training_can_leave_invented_numbers_out(tmp_path: Path) -> None:
    rows = [
        talk(u("Weather?"), a("I look."), t("No results."), a("It is 17 degrees.")),
        talk(u("Weather?"), a("I look."), t("No results."), a("I cannot tell.")),
    ]
    file = write(tmp_path / "rows.jsonl", rows)
    assert len(read(file, "conversation").records) == 2
    left = read(file, "conversation", ReadOptions(skip_bad=True))
    assert len(left.records) == 1 and left.left_out == {"faulty row: unsupported-number": 1}


def test_answers_that_are_cut_off_show_among_whole_ones(tmp_path: Path) -> None:
    whole = [talk(u(f"{i}?"), a(PROSE + f"as number {i} knows well.")) for i in range(40)]
    cut = talk(u("Cut?"), a(PROSE + "with many boats on the water and children at the"))
    assert found(tmp_path, [*whole, cut]) == [("cut-off", 41, "messages[1].content")]
    # Where many end like that, it is how the data is written.
    assert found(tmp_path, [*whole[:3], cut, cut | talk(u("Again?"), cut["messages"][1])]) == []
    # A rejected answer may have been rejected for it.
    pair = {"prompt": [u("q")], "chosen": [a(PROSE + "as we know.")], "rejected": [cut["messages"][1]]}
    assert found(tmp_path, [*whole, pair]) == []


def test_placeholders_show_where_they_are_many(tmp_path: Path) -> None:
    filled = [talk(u(f"{i}?"), a("I am Ada.")) for i in range(8)]
    blank = [talk(u(f"Who {i}?"), a("I am {{name}}.")) for i in range(2)]
    assert found(tmp_path, filled + blank) == [
        ("placeholder", 9, "messages[1].content"),
        ("placeholder", 10, "messages[1].content"),
    ]
    assert found(tmp_path, filled + filled[:0] + [talk(u("Jinja?"), a("Write {{name}}."))]) == []


@pytest.mark.parametrize(
    ("row", "enough"),
    [
        (lambda i: talk(u(f"{i}?"), a("x.")), 1001),
        (lambda i: {"prompt": [u(f"{i}?")], "chosen": [a("x")], "rejected": [a("y")]}, 100),
        (lambda i: {"prompt": f"{i}?", "responses": ["x", "y"], "scores": [1, 2]}, 100),
        (lambda i: {"prompt": [u(f"{i}?")]}, 1001),
        (lambda i: {"text": f"{i}"}, 1),
    ],
)
def test_sizes(tmp_path: Path, row: Any, enough: int) -> None:
    rows = [row(i) for i in range(enough)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert not [p for p in checked(path)[1] if p.code == "too-few"]
    if enough > 1:
        [problem] = [p for p in checked(write(path, rows[:-1]))[1] if p.code == "too-few"]
        assert (problem.file, problem.line) == (str(path), 0) and f"{enough - 1:,}" in problem.message


def test_kind_checks_for_what_the_data_is_wanted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "responses": ["x", "y"], "scores": [1, 1]},
        {"prompt": "b", "responses": ["x", "y"], "scores": [1, 2]},
    ]
    assert found(tmp_path, rows) == []
    assert found(tmp_path, rows, kind="comparison") == [("tie", 1, "")]
    assert found(tmp_path, rows, kind="document") == [("wrong-kind", 1, ""), ("wrong-kind", 2, "")]


def test_limit_in_characters_counts_the_longest_answer(tmp_path: Path) -> None:
    pair = {"prompt": [u("12345")], "chosen": [a("123")], "rejected": [a("12345")]}
    assert found(tmp_path, [pair], max_length=10) == []
    assert found(tmp_path, [pair], max_length=9) == [("too-long", 1, "")]


def test_limit_in_tokens_is_what_training_counts(tmp_path: Path) -> None:
    template = ChatTemplate(stand_in_tokenizer("chatml"), "chatml")
    records: list[Record] = [
        Conversation([u("你好"), a("hello <|im_end|> there")], ORIGIN),
        Comparison([u("q")], [a("short")], [a("a much longer answer")], origin=ORIGIN),
        Ranking([u("q")], [[a("x")], [a("yy")], [a("z")]], [1, 2, 3], ORIGIN),
        Prompt([u("a question")], origin=ORIGIN),
        Document("words and words", ORIGIN),
    ]
    encoded = [
        len(template.render(records[0].messages)) - len("<|im_start|>") * 2 - len("<|im_end|>") * 3 + 5 + 2 * 4,
        len(template.encode([u("q"), a("a much longer answer")]).ids) + 1,
        len(template.encode([u("q"), a("yy")]).ids) + 1,
        len(template.encode_prompt([u("a question")])),
        len("words and words") + 2,
    ]
    lengths = TokenLengths(template)(records)
    # The text after the last stop token (a line break) is counted here and not trained: one token at most.
    assert lengths[1:] == encoded[1:]
    assert abs(lengths[0] - len(template.encode(records[0].messages).ids)) <= 12
    summary, problems = checked(
        write(tmp_path / "rows.jsonl", [talk(u("q"), a("long " * 9)), talk(u("q"), a("x"))] * 200),
        measure=TokenLengths(template),
        max_length=40,
    )
    assert summary.unit == "tokens" and len(summary.lengths) == 400
    assert Counter(p.code for p in problems)["too-long"] == 200


def test_rows_that_the_template_refuses_are_told(tmp_path: Path) -> None:
    tokenizer = stand_in_tokenizer("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = [talk(u("good"), a("x")), talk(u("bad"), a("x")), talk(u("better"), a("x"))]
    path = write(tmp_path / "rows.jsonl", rows)
    summary, problems = checked(path, measure=TokenLengths(ChatTemplate(tokenizer)))
    assert [(p.code, p.line) for p in problems if p.code != "too-few"] == [("template-refuses", 2)]
    assert len(summary.lengths) == 2


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), max_size=40))
def test_duplicates_are_those_of_a_slow_count(numbers: list[int]) -> None:
    findings = Findings(None)
    checker = Checker("x", findings)
    for line, number in enumerate(numbers, 1):
        checker._remember(Document(str(number), Origin("f", line)))
    checker._finish_duplicates()
    first: dict[int, int] = {}
    expected = []
    for line, number in enumerate(numbers, 1):
        if number in first:
            expected.append((line, f"the same as f:{first[number]}"))
        first.setdefault(number, line)
    assert [(p.line, p.message) for p in findings.kept] == expected


# -- the command ----------------------------------------------------------------------------------------------------------


def check_json(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, Any]:
    status = run(["data", "check", *arguments, "--json"])
    return status, json.loads(capfd.readouterr().out)


def test_json_of_one_path_and_of_several(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", [talk(u("你好"), a("你好！"))])
    two = write(tmp_path / "two.jsonl", [{"text": "words"}])
    status, document = check_json(capfd, str(one))
    assert status == 0
    assert (document["format"], document["records"], document["languages"]) == ("messages", 1, {"zh": 1})
    assert [set(p) for p in document["problems"]] == [{"code", "severity", "file", "line", "field", "message", "hint"}]
    assert document["problems"][0]["severity"] == "warning" and document["counts"] == {"too-few": 1}
    status, documents = check_json(capfd, str(one), str(two))
    assert status == 0 and [d["format"] for d in documents] == ["messages", "document"]
    # A glob that danlu opens itself is one path.
    status, document = check_json(capfd, str(tmp_path / "*.jsonl"))
    assert document["formats"] == {"messages": 1, "document": 1}


def test_errors_make_the_status_and_all_are_in_the_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "bad.jsonl", [{"text": 5} for _ in range(30)] + [{"text": "good"}])
    status, document = check_json(capfd, str(path))
    assert status == 1 and len(document["problems"]) == 30 and document["errors"] == 30
    assert {p["severity"] for p in document["problems"]} == {"error"}
    assert run(["data", "check", str(path)]) == 1
    said = capfd.readouterr().err
    assert said.count("error wrong-type") == 20 and "and 10 more" in said and "wrong-type 30" in said
    assert f"{path}:1: field 'text'" in said
    status, document = check_json(capfd, str(path), "--skip-bad")
    assert status == 0 and document["records"] == 1
    # Twenty of all, not of each code.
    write(path, [{"text": 5}] * 15 + [{"prompt": [u("a")], "chosen": [a("b")]}] * 15)
    assert run(["data", "check", str(path)]) == 1
    assert capfd.readouterr().err.count("  error ") == 20


def test_many_of_one_kind_hide_no_other(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [talk(u("same"), a("same"))] * 60 + [talk(u("CafÃ©"), a("x"))]
    path = write(tmp_path / "rows.jsonl", rows)
    assert run(["data", "check", str(path)]) == 0
    said = capfd.readouterr().err
    assert "warning mojibake" in said and "warning too-few" in said and said.count("warning duplicate") == 18
    assert "duplicate 59" in said


def test_what_lies_beside_data_is_left_aside(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# About the data\n", "utf-8")
    registry = tmp_path / "dataset_info.json"
    registry.write_text(json.dumps({"a": {"file_name": "a.json"}}), "utf-8")
    data = write(tmp_path / "a.jsonl", [{"text": "words"}])
    status, documents = check_json(capfd, str(readme), str(registry), str(data))
    assert status == 0
    assert [bool(d.get("left_aside")) for d in documents] == [True, True, False]
    assert "danlu data import" in documents[1]["left_aside"]


@pytest.mark.parametrize("rows", [[], [{"instruction": "a", "output": ""}]])
def test_nothing_to_use_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str], rows: list[Any]) -> None:
    path = write(tmp_path / "rows.jsonl", rows)
    status, document = check_json(capfd, str(path))
    assert status == 1 and document["records"] == 0 and document["errors"] == 1


def test_missing_path_is_a_problem_of_that_path(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = write(tmp_path / "good.jsonl", [{"text": "words"}])
    status, documents = check_json(capfd, str(tmp_path / "god.jsonl"), str(good))
    assert status == 1 and [d["records"] for d in documents] == [0, 1]
    [problem] = documents[0]["problems"]
    assert "does not exist" in problem["message"] and "good.jsonl" in problem["hint"]


def test_map_as_and_licences(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "t.jsonl", [{"frage": "a", "antwort": "b"}])
    status, document = check_json(capfd, str(path), "--map", "prompt=frage,response=antwort", "--licence", "MIT")
    assert status == 0 and document["kinds"] == {"conversation": 1}
    assert document["licences"] == [{"licence": "MIT", "rows": 1, "left_out": 0, "commercial": True}]
    status, document = check_json(capfd, str(path), "--as", "alpaca")
    assert status == 1 and document["problems"][0]["code"] == "missing-field"
    assert run(["data", "check", str(path), "--map", "prompt"]) == 2
    status, document = check_json(capfd, str(path), "--map", "prompt=frage,response=antwort", "--commercial-only")
    assert status == 1 and document["licences"][0]["left_out"] == 1


def test_model_and_limit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [talk(u("q"), a("word " * 50)), talk(u("q"), a("x"))])
    status, document = check_json(capfd, str(path), "--model", str(tiny.tokenizer_folder()), "--max-length", "30")
    assert status == 0 and document["lengths"]["unit"] == "tokens"
    [problem] = [p for p in document["problems"] if p["code"] == "too-long"]
    assert problem["line"] == 1 and "the limit is 30" in problem["message"]


# -- the model's view -----------------------------------------------------------------------------------------------------


def pieces(record: Record, template: str = "chatml") -> list[list[tuple[str, str]]]:
    seam = ChatTemplate(stand_in_tokenizer(template), template)
    return [[(p.kind, p.text) for p in view.pieces] for view in views(record, seam)]


def test_views_show_what_is_trained() -> None:
    masked: Message = {**a("No loss."), "train": False}
    [found] = pieces(Conversation([u("你好"), masked, u("More?"), a("Sure. 好")]))
    assert found == [
        (
            "masked",
            "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\nNo loss.<|im_end|>\n"
            "<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n",
        ),
        ("trained", "Sure. 好"),
        ("stop", "<|im_end|>"),
    ]
    [asked] = pieces(Prompt([u("q")]))
    assert [kind for kind, _ in asked] == ["masked"] and asked[0][1].endswith("assistant\n")
    better, worse = pieces(Comparison([u("q")], [a("x")], [a("y")]))
    assert better[1:] == [("trained", "x"), ("stop", "<|im_end|>")] and worse[1][1] == "y"
    # A template that shows only the last answer as it was generated: each answer is trained on its own.
    first, second = pieces(Conversation([u("q"), a("first"), u("r"), a("second")]), "chatglm")
    assert "first" in first[1][1] and "first" in second[0][1] and "second" in second[1][1]
    assert pieces(Document("all of it")) == [[("trained", "all of it")]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_shipped_template_can_be_looked_at(name: str) -> None:
    [found] = pieces(Conversation([u("Hi"), a("Hello there.")]), name)
    kinds = [kind for kind, _ in found]
    assert kinds == ["masked", "trained", "stop"]
    assert "Hello there." in found[1][1] and "Hi" in found[0][1]


def test_show_on_the_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.jsonl", [talk(u(f"q{i}"), a(f"a{i}")) for i in range(5)])
    assert run(["data", "check", str(path), "--show", "2"]) == 0
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "[[a0]]<|im_end|>⏹" in captured.err and "[[a1]]" in captured.err and "[[a2]]" not in captured.err
    assert run(["data", "check", str(path), "--show", "1", "--template", "vicuna"]) == 0
    assert "USER: q0 ASSISTANT:[[ a0]]</s>⏹" in capfd.readouterr().err
    assert run(["data", "check", str(path), "--show", "1", "--model", str(tiny.tokenizer_folder())]) == 0
    assert "[[a0]]" in capfd.readouterr().err
    assert run(["data", "check", str(path), "--show", "1", "--json"]) == 2
    assert run(["data", "check", str(path), "--show", "1", "--template", "nonsense"]) == 1


# -- memory, and real files -----------------------------------------------------------------------------------------------

MEMORY = """
import json, resource, sys
from danlu.cli.main import run
status = run(["data", "check", sys.argv[1], "--json"])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)
sys.exit(status)
"""


def peak(path: Path) -> int:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", MEMORY, str(path)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return int(done.stderr.splitlines()[-1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Forty megabytes more of a file, compressed or not, cost a few megabytes of hashes."""

    def rows(count: int) -> bytes:
        return b"".join(
            json.dumps(talk(u(f"Question {i}?"), a(f"{i} words. " * 100))).encode() + b"\n" for i in range(count)
        )

    small, large = tmp_path / "small.jsonl", tmp_path / "large.jsonl.gz"
    small.write_bytes(rows(ENOUGH))
    content = rows(36_000)
    assert len(content) > 40_000_000
    large.write_bytes(gzip.compress(content, 1))
    assert peak(large) - peak(small) < 12


REAL_ERRORS = {  # files whose READMEs tell of broken or ambiguous rows
    "instruction-wild": {"bad-json"},
    "alpaca-zh": {"ambiguous"},
}
SETS = [
    "advertise-gen", "alpaca-en", "alpaca-eval-prefs", "alpaca-zh", "belle-seed-zh", "chatdoctor", "cmmlu",
    "code-alpaca", "gpteacher", "gsm8k", "hh-rlhf", "huatuo-med-zh", "instruction-wild", "llama-factory-demos",
    "mmlu", "moss-sft", "oasst", "pretrain-en", "pretrain-zh", "sharegpt-zh-1k",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", SETS)
def test_real_sets(shared_data: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Every set is read as it lies there, with few warnings but for what its README tells."""
    paths = [str(path) for path in sorted((shared_data / name).iterdir())]
    status, documents = check_json(capfd, *paths)
    problems = [p for d in documents for p in d["problems"]]
    errors = {p["code"] for p in problems if p["severity"] == "error"}
    assert errors == REAL_ERRORS.get(name, set())
    assert status == bool(errors)
    read = sum(d["records"] for d in documents)
    assert read > 0
    counts = Counter(p["code"] for p in problems)
    assert counts["cut-off"] < 0.02 * read + 5
    assert counts["unsupported-number"] == 0 or name == "moss-sft"


def test_real_quirks_are_seen(shared_data: Path) -> None:
    """What the READMEs of the sets tell, and what was found by hand in them."""
    _, problems = checked(shared_data / "llama-factory-demos" / "identity.json")
    assert Counter(p.code for p in problems)["placeholder"] > 50
    summary, problems = checked(shared_data / "llama-factory-demos" / "dpo_zh_demo.json")
    assert Counter(p.code for p in problems)["mojibake"] == 6 and summary.duplicates == 11
    _, problems = checked(shared_data / "oasst" / "oaast_sft_zh.json")
    assert Counter(p.code for p in problems)["duplicate"] == 4


def test_problem_in_json_names_its_severity() -> None:
    assert problem_json(Problem("duplicate", "f", 1, "", "m", "h"))["severity"] == "warning"
    assert problem_json(Problem("bad-json", "f", 1, "", "m", "h"))["severity"] == "error"
