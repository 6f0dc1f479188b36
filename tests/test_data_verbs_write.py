"""`danlu data mix|split|dedup|decontaminate|stats`: shares, stability, what is left out and why."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from danlu.cli.main import run
from danlu.data.decontaminate import COMMON, Benchmark
from danlu.data.dedup import Seen, _bands
from danlu.data.mix import Source, mixed, parse_weighted, quotas, with_replay
from danlu.data.ngrams import ngrams, units
from danlu.data.phases import PHASES, Part, Splitter, parse_parts, parse_phases
from danlu.data.read import read
from danlu.data.sources import in_phase
from danlu.exceptions import DataError, SettingsError
from danlu.types import Conversation, Document, Message, Origin, Prompt

rensa = pytest.mark.skipif(find_spec("rensa") is None, reason="NEAR DUPLICATES NOT TESTED: pip install rensa")


def u(content: str) -> Message:
    return {"role": "user", "content": content}


def a(content: str) -> Message:
    return {"role": "assistant", "content": content}


def talk(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [u(question), a(answer)]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]


def said(capfd: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> Any:
    assert run(["data", *arguments, "--json"]) == status
    return json.loads(capfd.readouterr().out)


# -- mix ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 500))
def test_quotas_add_up_and_are_near(weights: list[float], total: int) -> None:
    found = quotas(weights, total)
    assert sum(found) == total
    for weight, count in zip(weights, found, strict=True):
        assert abs(count - total * weight / sum(weights)) < 1


def test_quotas_give_the_rest_to_the_largest_remainders() -> None:
    assert quotas([0.6, 0.3, 0.1], 11) == [7, 3, 1]  # 6.6, 3.3, 1.1
    assert quotas([1, 1, 1], 4) == [2, 1, 1]
    assert quotas([1, 2, 4], 5) == [1, 1, 3]  # 0.71, 1.43, 2.86


def test_weights() -> None:
    assert parse_weighted("a=b/c.jsonl=2.5") == Source("a=b/c.jsonl", 2.5)
    assert parse_weighted("c.jsonl") == Source("c.jsonl", 1)
    for wrong in ("a=0", "a=-1", "a=nan", "a=inf", "a=x", "a="):
        with pytest.raises(SettingsError, match="above 0"):
            parse_weighted(wrong)
    found = with_replay([Source("a", 2), Source("b", 1)], [Source("general", 0.1)])
    assert [s.weight for s in found] == pytest.approx([0.6, 0.3, 0.1])
    with pytest.raises(SettingsError, match="less than 1"):
        with_replay([Source("a", 1)], [Source("b", 0.5), Source("c", 0.5)])


def drawn(sizes: dict[str, tuple[int, float]], total: int, seed: int = 0) -> list[str]:
    sources = [
        (Source(name, weight), partial(lambda n, k: [f"{n}{i}" for i in range(k)], name, size))
        for name, (size, weight) in sizes.items()
    ]
    with mixed(sources, total, seed) as (rows, _):
        return list(rows)


def test_no_row_twice_before_all_came_once() -> None:
    rows = drawn({"a": (10, 2), "b": (50, 1)}, 39)
    counts = Counter(rows)
    assert Counter(row[0] for row in rows) == {"a": 26, "b": 13}
    assert {counts[f"a{i}"] for i in range(10)} == {2, 3}
    assert {count for row, count in counts.items() if row[0] == "b"} == {1}
    # The order is mixed, and a function of the seed.
    assert rows == drawn({"a": (10, 2), "b": (50, 1)}, 39)
    assert rows != drawn({"a": (10, 2), "b": (50, 1)}, 39, seed=1)
    assert 2 < sum(row[0] == "b" for row in rows[:20]) < 12


def test_sources_of_one_size_are_not_drawn_alike() -> None:
    rows = drawn({"a": (40, 1), "b": (40, 1)}, 40)
    chosen = {name: {row[1:] for row in rows if row[0] == name} for name in "ab"}
    assert chosen["a"] != chosen["b"]


def test_a_source_s_draw_does_not_depend_on_the_others_rows() -> None:
    one = [row for row in drawn({"a": (30, 1), "b": (10, 1)}, 20) if row[0] == "a"]
    two = [row for row in drawn({"a": (30, 1), "b": (99, 1)}, 20) if row[0] == "a"]
    assert sorted(one) == sorted(two)


def test_mix_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", [talk(f"one {i}", "x") for i in range(10)])
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "a.jsonl", [{"instruction": f"two {i}", "output": "y"} for i in range(5)])
    write(tmp_path / "two" / "b.jsonl", [talk("named", "z") | {"source": "town", "licence": "MIT"}])
    general = write(tmp_path / "general.jsonl", [talk(f"general {i}", "x") for i in range(40)])
    out = tmp_path / "mixed.jsonl"
    arguments = [f"{one}=2", f"{tmp_path / 'two'}=1", "--replay", f"{general}=0.1", "--total", "30", "--out", str(out)]
    document = said(capfd, "mix", *arguments)
    assert [(Path(s["source"]).name, s["rows"], s["taken"], s["epochs"]) for s in document["sources"]] == [
        ("one.jsonl", 10, 18, 1.8),
        ("two", 6, 9, 1.5),
        ("general.jsonl", 40, 3, 0.075),
    ]
    rows = lines(out)
    assert len(rows) == 30
    # Where a row came from stays with it.
    assert Counter(row["source"] for row in rows)["general.jsonl"] == 3
    assert {row["licence"] for row in rows if row["source"] == "town"} == {"MIT"}
    first = out.read_bytes()
    assert run(["data", "mix", *arguments, "--force"]) == 0
    assert out.read_bytes() == first
    assert run(["data", "mix", *arguments, "--force", "--seed", "1"]) == 0
    assert out.read_bytes() != first


def test_a_mixture_holds_one_kind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one.jsonl", [talk("q", "a")])
    two = write(tmp_path / "two.jsonl", [{"prompt": [u("p")], "chosen": [a("x")], "rejected": [a("y")]}])
    out = tmp_path / "mixed.jsonl"
    assert run(["data", "mix", str(one), str(two), "--total", "4", "--out", str(out)]) == 1
    assert "--kind conversation" in capfd.readouterr().err and not out.exists()
    assert run(["data", "mix", str(one), str(two), "--total", "4", "--kind", "conversation", "--out", str(out)]) == 0
    assert sorted(row["messages"][0]["content"] for row in lines(out)) == ["p", "p", "q", "q"]


# -- split ----------------------------------------------------------------------------------------------------------------


def test_phases_are_those_of_stages() -> None:
    """The files that `split --phases` writes hold what a source's `phase` gives a stage of the whole."""
    records = [Conversation([u(f"question {i}"), a("x")]) for i in range(300)]
    splitter = Splitter(parse_phases("2,4,4"), "phase")
    for phase, name in enumerate(PHASES):
        expected = in_phase(records, f"{name} of 2,4,4")
        assert [r for r in records if splitter.part(r) == phase] == expected
        assert 30 < len(expected) < 170


@settings(max_examples=25)
@given(st.lists(st.integers(0, 60), min_size=1, max_size=60), st.lists(st.integers(0, 60), max_size=30))
def test_added_rows_move_no_other(numbers: list[int], more: list[int]) -> None:
    splitter = Splitter([Part("train", 0.8), Part("test", 0.2)], "parts")
    parts = {n: splitter.part(Prompt([u(str(n))])) for n in numbers}
    again = Splitter([Part("train", 0.8), Part("test", 0.2)], "parts")
    assert all(again.part(Conversation([u(str(n)), a("any answer")])) == part for n, part in parts.items())
    assert all(again.part(Prompt([u(str(n))])) == parts[n] for n in more if n in parts)


def test_parts_and_phases_do_not_share_their_hash() -> None:
    """With one hash for both, the test part would lie in one phase whole."""
    records = [Prompt([u(f"question {i}")]) for i in range(400)]
    test, phase = Splitter([Part("test", 0.2), Part("train", 0.8)], "parts"), Splitter(parse_phases("2,4,4"), "phase")
    found = Counter(phase.part(record) for record in records if test.part(record) == 0)
    assert all(found[i] > 5 for i in range(3))


@pytest.mark.parametrize("text", ["train", "train=0,test=1", "train=x,test=1", "a=1,a=2", "a=1", "a/b=1,c=1", "=1,b=1"])
def test_wrong_parts_are_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        Splitter(parse_parts(text), "parts")


def test_split_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pairs = [
        {"prompt": [u(f"q{i % 100}")], "chosen": [a(f"good {i}")], "rejected": [a("bad")], "licence": "MIT"}
        for i in range(200)
    ]
    path = write(tmp_path / "pairs.jsonl", pairs)
    document = said(capfd, "split", str(path), "--out", str(tmp_path / "parts"), "--parts", "train=0.9,test=0.1")
    parts = {part["part"]: lines(Path(part["file"])) for part in document["parts"]}
    assert sum(map(len, parts.values())) == 200 and len(parts["train"]) > 150 and len(parts["test"]) > 4
    prompts = {name: {row["prompt"][0]["content"] for row in rows} for name, rows in parts.items()}
    assert not prompts["train"] & prompts["test"] and len(prompts["train"] | prompts["test"]) == 100
    assert {row["licence"] for row in parts["train"]} == {"MIT"}

    assert run(["data", "split", str(path), "--out", str(tmp_path / "phases"), "--phases", "2,4,4"]) == 0
    capfd.readouterr()
    phases = [read(tmp_path / "phases" / f"{name}.jsonl", "prompt").records for name in ("sft", "reward", "rl")]
    asked = [{r.prompt[0]["content"] for r in records if isinstance(r, Prompt)} for records in phases]
    assert not asked[0] & asked[1] and not asked[1] & asked[2] and not asked[0] & asked[2]
    assert sum(map(len, phases)) == 200

    assert run(["data", "split", str(path), "--out", str(tmp_path / "parts"), "--parts", "train=1,test=1"]) == 1
    assert "--force" in capfd.readouterr().err
    assert (
        run(["data", "split", str(path), "--out", str(tmp_path / "x"), "--parts", "a=1,b=1", "--phases", "1,1,1"]) == 2
    )
    assert run(["data", "split", str(path), "--out", str(tmp_path / "x"), "--parts", "a=1"]) == 2
    assert run(["data", "dedup", str(path), "--out", str(tmp_path / "x.jsonl"), "--near", "2"]) == 2
    one = write(tmp_path / "one.jsonl", pairs[:1])
    assert run(["data", "split", str(one), "--out", str(tmp_path / "y"), "--parts", "a=1,b=1"]) == 1
    assert "no prompt falls into the part" in capfd.readouterr().err
    assert not list((tmp_path / "y").iterdir())


# -- units and n-grams ----------------------------------------------------------------------------------------------------


def test_units_are_words_and_chinese_characters() -> None:
    assert units("Hello, World! 你好ＡＢＣ。don't x_1") == ["hello", "world", "你", "好", "abc", "don", "t", "x", "1"]
    assert units("。！ \n") == []
    assert ngrams(["a", "b", "c", "d"], 3) == ["a b c", "b c d"]
    assert ngrams(["a", "b"], 3) == ["a b"] and ngrams([], 3) == []


@given(st.text(max_size=60))
def test_units_hold_no_space_and_are_lower(text: str) -> None:
    for unit in units(text):
        assert unit and not re.search(r"\s", unit) and unit == unit.lower()


# -- dedup ----------------------------------------------------------------------------------------------------------------

STORY = "The old lighthouse keeper climbed the narrow stairs every evening to light the lamp for the ships at sea. "
STORY += "He had done so for forty years, in storms and in calm weather, and he knew every step by heart."


def test_exact_duplicates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [talk("a", "x"), talk("b", "x"), talk("a", "x"), talk("a", "y"), talk("A", "x"), talk("b", "x")]
    path = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out.jsonl"
    document = said(capfd, "dedup", str(path), "--out", str(out))
    assert (document["rows"], document["exact"], document["near"]) == (4, 2, 0)
    assert [(d["row"], d["first"]) for d in document["duplicates"]] == [
        (f"{path}:3", f"{path}:1"),
        (f"{path}:6", f"{path}:2"),
    ]
    assert lines(out) == [rows[0], rows[1], rows[3], rows[4]]
    document = said(capfd, "dedup", str(path), "--out", str(out), "--by", "prompt", "--force")
    assert lines(out) == [rows[0], rows[1], rows[4]]


@rensa
def test_near_duplicates(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chinese = "今天早上我们一起去了城外的公园散步，看见湖边有很多人在放风筝，孩子们跑来跑去，笑得非常开心。"
    rows = [
        {"text": STORY},
        {"text": STORY.replace("forty", "thirty").upper()},
        {"text": chinese},
        {"text": chinese.replace("早上", "下午")},
        {"text": "Something else entirely: how to bake bread with little yeast and much patience."},
        {"text": STORY[:60]},
        {"text": STORY.replace(",", ";")},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out.jsonl"
    document = said(capfd, "dedup", str(path), "--near", "0.7", "--out", str(out))
    assert [(d["row"], d["first"]) for d in document["duplicates"]] == [
        (f"{path}:2", f"{path}:1"),
        (f"{path}:4", f"{path}:3"),
        (f"{path}:7", f"{path}:1"),
    ]
    assert (document["exact"], document["near"]) == (0, 3)
    assert lines(out) == [rows[0], rows[2], rows[4], rows[5]]
    assert run(["data", "dedup", str(path), "--near", "0.7", "--out", str(out), "--force"]) == 0
    assert "like" in capfd.readouterr().err


@rensa
def test_estimated_similarity_is_near_the_true_one() -> None:
    words = [f"word{i}" for i in range(300)]
    for shared in (150, 240, 285):
        seen = Seen(near=0.05)
        assert seen.add(Document(" ".join(words))) is None
        other = words[:shared] + [f"other{i}" for i in range(300 - shared)]
        found = seen.add(Document(" ".join(other)))
        one, two = set(ngrams(words, 3)), set(ngrams(other, 3))
        assert found is not None and abs(found.similarity - len(one & two) / len(one | two)) < 0.1


def words(*ranges: range) -> str:
    return " ".join(f"word{i}" for numbers in ranges for i in numbers)


@rensa
def test_what_is_less_alike_stays() -> None:
    """At 0.7 most pairs share a band made for 0.8, and the estimate must tell them apart."""
    seen = Seen(near=0.8)
    for n in range(12):
        one = range(1000 * n, 1000 * n + 200)
        assert seen.add(Document(words(one))) is None
        assert seen.add(Document(words(one[:165], range(1000 * n + 500, 1000 * n + 535)))) is None


@rensa
def test_the_most_alike_is_named() -> None:
    far, near = Origin("far", 1), Origin("near", 1)
    seen = Seen(near=0.5)
    assert seen.add(Document(words(range(100), range(900, 960)), far)) is None
    assert seen.add(Document(words(range(40, 200)), near)) is None
    found = seen.add(Document(words(range(20, 200))))
    assert found is not None and found.first == near and found.similarity > 0.8


def test_bands_find_what_they_should() -> None:
    for near in (0.5, 0.7, 0.8, 0.9, 0.95):
        bands = _bands(near)
        assert 1 - (1 - near ** (256 // bands)) ** bands >= 0.99
    assert _bands(0.95) < _bands(0.5)
    with pytest.raises(SettingsError, match="more than 0"):
        Seen(near=1.0)


def test_without_the_library_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rensa", None)
    path = write(tmp_path / "rows.jsonl", [{"text": "a"}])
    assert run(["data", "dedup", str(path), "--near", "0.8", "--out", str(tmp_path / "o.jsonl")]) == 1
    assert "pip install" in capfd.readouterr().err
    assert run(["data", "dedup", str(path), "--out", str(tmp_path / "o.jsonl")]) == 0


# -- decontaminate --------------------------------------------------------------------------------------------------------

TEST = "A farmer has seventeen sheep and all but nine of them run away; how many sheep does he have left?"
TEST_ZH = "小明有十七只羊，除了九只以外全都跑掉了，请问他最后还剩下多少只羊？"


def test_decontaminate_leaves_out_and_tells(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    against = write(
        tmp_path / "eval.jsonl", [{"prompt": [u(TEST)]}, {"prompt": [u(TEST_ZH)]}, {"prompt": [u("Who is Ada Brook?")]}]
    )
    rows = [
        talk("What is a sheep?", "An animal."),
        talk("Solve this. " + TEST.upper().replace(";", " -") + " Think.", "Nine."),
        talk("请解答：" + TEST_ZH[3:], "九只。"),
        talk("who is ada brook", "Nobody knows."),
        talk("Please tell me who is Ada Brook, and more.", "She bakes."),
        talk("Quote the riddle.", TEST),
        talk("A farmer has seventeen sheep and all but nine of them", "Go on."),
        talk("Yes?", "Who is Ada Brook?"),
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "clean.jsonl"
    document = said(capfd, "decontaminate", str(path), "--against", str(against), "--out", str(out))
    assert [(m["row"], m["prompt"], m["field"]) for m in document["matches"]] == [
        (f"{path}:2", f"{against}:1", "messages[0].content"),
        (f"{path}:3", f"{against}:2", "messages[0].content"),
        (f"{path}:4", f"{against}:3", "messages[0].content"),
        (f"{path}:6", f"{against}:1", "messages[1].content"),
    ]
    assert all(len(m["text"].split()) in (4, 13) for m in document["matches"])
    assert (document["rows"], document["prompts"], document["prompts_found"]) == (4, 3, 3)
    assert lines(out) == [rows[0], rows[4], rows[6], rows[7]]
    document = said(
        capfd, "decontaminate", str(path), "--against", str(against), "--out", str(out), "--force", "--ngram", "8"
    )
    assert f"{path}:7" in [m["row"] for m in document["matches"]]
    assert run(["data", "decontaminate", str(path), "--against", str(against), "--out", str(out), "--force"]) == 0
    assert f"4 rows hold prompts of {against}" in capfd.readouterr().err


def test_phrases_of_many_prompts_are_no_leak() -> None:
    form = "The following are multiple choice questions about the town and its people, answer with one letter only: "
    many = [
        Prompt([u(f"{form} question {i} asks about thing number {i} of the long list of things")])
        for i in range(COMMON + 1)
    ]
    benchmark = Benchmark(many)
    assert benchmark.common > 0
    assert benchmark.match(Document(form + "and then something else")) is None
    assert benchmark.match(Document(many[3].prompt[0]["content"])) is not None
    assert Benchmark(many[:COMMON]).match(Document(form + "and then something else")) is not None


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from("abcde"), min_size=3, max_size=12),
    st.lists(st.sampled_from("abcde"), min_size=3, max_size=12),
)
def test_matches_are_those_of_a_slow_search(test: list[str], text: list[str]) -> None:
    found = Benchmark([Prompt([u(" ".join(test))])], 3).match(Document(" ".join(text), Origin("f", 1)))
    grams = {tuple(test[i : i + 3]) for i in range(len(test) - 2)}
    assert (found is not None) == any(tuple(text[i : i + 3]) in grams for i in range(len(text) - 2))


def test_an_evaluation_finds_itself_in_real_data(
    shared_data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first problems of GSM8K are found in the whole of it, and in nothing else."""
    gsm8k = shared_data / "gsm8k" / "train.jsonl.gz"
    half = tmp_path / "half.jsonl"
    assert run(["data", "convert", str(gsm8k), "--limit", "700", "--out", str(half)]) == 0
    capfd.readouterr()
    document = said(capfd, "decontaminate", str(gsm8k), "--against", str(half), "--out", str(tmp_path / "clean.jsonl"))
    assert len(document["matches"]) >= 690
    assert len(document["matches"]) < 800
    code = shared_data / "code-alpaca" / "code_alpaca_2k.json"
    document = said(capfd, "decontaminate", str(code), "--against", str(half), "--out", str(tmp_path / "code.jsonl"))
    assert document["matches"] == []


# -- stats ----------------------------------------------------------------------------------------------------------------


def test_stats_count(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [
        talk("12345", "123") | {"source": "town", "licence": "MIT"},
        talk("你好", "你好！"),
        {"messages": [u("a"), a("bb"), u("ccc"), a("dddd")]},
        {"prompt": [u("q")], "chosen": [a("good")], "rejected": [a("no")]},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    page = tmp_path / "page.html"
    document = said(capfd, "stats", str(path), "--html", str(page))
    assert document["records"] == 4
    assert document["kinds"] == {"conversation": 3, "comparison": 1}
    assert document["languages"] == {"en": 2, "zh": 1, "other": 1}
    assert document["turns"] == {"2": 3, "4": 1}
    assert document["sources"] == {"town": 1, "rows.jsonl": 3}
    assert document["licences"] == {"MIT": 1, "": 3}
    assert (document["lengths"]["total"], document["lengths"]["max"], document["lengths"]["min"]) == (
        8 + 5 + 10 + 5,
        10,
        5,
    )
    assert document["questions"]["total"] == 5 + 2 + 1 + 3 + 1
    assert document["answers"]["total"] == 3 + 3 + 4
    assert (document["chosen"]["mean"], document["rejected"]["mean"]) == (4, 2)
    html = page.read_text("utf-8")
    assert html.count("<svg") >= 7 and "http://" not in html.replace("http://www.w3.org", "") and "<script" not in html
    assert "100%" in html and "rows.jsonl" in html
    assert run(["data", "stats", str(path), "--html", str(page)]) == 1
    assert "--force" in capfd.readouterr().err
    assert run(["data", "stats", str(path)]) == 0
    assert "4 records" in capfd.readouterr().err


def test_names_of_a_page_are_no_markup(tmp_path: Path) -> None:
    path = write(tmp_path / "<b>rows.jsonl", [talk("a", "b") | {"source": "<script>alert(1)</script>"}])
    page = tmp_path / "page.html"
    assert run(["data", "stats", str(path), "--html", str(page)]) == 0
    html = page.read_text("utf-8")
    assert "<script" not in html and "<b>rows" not in html and "&lt;b&gt;rows" in html


@pytest.mark.parametrize("verb", ["convert", "stats", "dedup"])
def test_bad_rows_are_errors_everywhere(tmp_path: Path, capfd: pytest.CaptureFixture[str], verb: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": 5}\n', "utf-8")
    out = [] if verb == "stats" else ["--out", str(tmp_path / "out.jsonl")]
    assert run(["data", verb, str(path), *out]) == 1
    assert "rows.jsonl:2: field 'text'" in capfd.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()
    document = said(capfd, verb, str(path), *out, "--skip-bad")
    assert document["skipped"] == {"wrong-type": 1}


def test_globs_and_folders_are_read_and_nothing_else_is_printed(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "a.jsonl", [{"text": "a"}])
    write(tmp_path / "deep" / "b.jsonl", [{"text": "b"}])
    for number, path in enumerate([tmp_path / "deep", tmp_path / "deep" / "*.jsonl"]):
        document = said(capfd, "dedup", str(path), "--out", str(tmp_path / f"o{number}.jsonl"))
        assert document["rows"] == 2
    with pytest.raises(DataError, match="exist"):
        read(tmp_path / "nothing.jsonl", "document")
    assert run(["data", "dedup", str(tmp_path / "nothing"), "--out", str(tmp_path / "x.jsonl")]) == 1
