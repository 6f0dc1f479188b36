"""The embedded town: facts, files, and what training may and may not see."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from danlu.evals.rubric import is_correct, score
from danlu.synth.town.dialogues import MANNERS, aside_comparison, flawed_answer, good_answer, half_comparison, spoil
from danlu.synth.town.facts import LANGUAGES, RELATIONS, Fact, Language, Pool, town_facts
from danlu.synth.town.phrasings import phrasings
from danlu.synth.town.prose import Prose
from danlu.synth.town.questions import Kind, Questioner
from danlu.synth.town.write import write_town

SEED = 3
UNITS = {"price": {"en": " coins", "zh": "枚"}, "distance": {"en": " metres", "zh": "米"}}
TRAINING = ("pretrain", "pretrain_heldout", "sft", "sft_heldout", "comparisons", "comparisons_heldout", "prompts")
KINDS: tuple[Kind, ...] = ("fact", "two_fact", "follow_up", "refuse", "arithmetic", "calendar", "chat")

Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Rows]:
    paths = write_town(tmp_path_factory.mktemp("town"), SEED)
    return {name: [json.loads(line) for line in path.read_text("utf-8").splitlines()] for name, path in paths.items()}


def user_turns(row: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in row.get("messages", row.get("prompt", [])) if turn["role"] == "user"]


def is_chinese(text: str) -> bool:
    return re.search("[\u4e00-\u9fff]", text) is not None


def stated(fact: Fact, language: Language) -> re.Pattern[str]:
    unit = UNITS.get(fact.relation, {}).get(language, "")
    return re.compile(r"(?<!\d)" + re.escape(fact.value.text(language) + unit), re.IGNORECASE)


def test_facts_follow_the_seed_and_can_be_told_apart() -> None:
    town = town_facts(SEED)
    assert town == town_facts(SEED)
    assert town.facts != town_facts(SEED + 1).facts
    assert len(town.facts) == len(town.places) * len(RELATIONS) == 168
    for language in LANGUAGES:
        for relation in ("owner", "product", "price", "distance"):
            assert len(town.values(relation, language)) == len(town.places)  # unique per place
        numbers = [town.values(relation, language) for relation in ("opens", "closes", "price", "distance")]
        assert len({value for values in numbers for value in values}) == sum(map(len, numbers))


def test_bytes_depend_on_the_seed_alone(tmp_path: Path) -> None:
    first = write_town(tmp_path / "a", SEED, scale=0.03)
    again = write_town(tmp_path / "b", SEED, scale=0.03)
    other = write_town(tmp_path / "c", SEED + 1, scale=0.03)
    for name, path in first.items():
        assert path.read_bytes() == again[name].read_bytes(), name
        assert path.read_bytes() != other[name].read_bytes(), name
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == sorted(f"{name}.jsonl" for name in first)


def test_sizes(files: dict[str, Rows]) -> None:
    assert {name: len(rows) for name, rows in files.items() if not name.startswith("pretrain")} == {
        "sft": 6000,
        "sft_heldout": 300,
        "comparisons": 27680,
        "comparisons_heldout": 559,
        "prompts": 3000,
        "eval": 1000,
    }
    size = {name: sum(len(row["text"].encode()) for row in files[name]) for name in ("pretrain", "pretrain_heldout")}
    assert 1.2e6 < size["pretrain"] < 2.0e6
    assert 55_000 < size["pretrain_heldout"] < 65_000
    assert not {row["text"] for row in files["pretrain"]} & {row["text"] for row in files["pretrain_heldout"]}


def test_wordings_are_many_and_no_pool_shares_one() -> None:
    for language in LANGUAGES:
        for relation, table in phrasings(language)["relations"].items():
            assert len(table["statements"]) >= 8, relation
            assert len(table["train"]) >= 10, relation
            assert len(table["eval"]) >= 3, relation
            asked = [table[pool] for pool in ("train", "dev", "eval")]
            asked += [table[f"follow_{pool}"] for pool in ("train", "dev", "eval")]
            flat = [text for texts in asked for text in texts]
            assert len(set(flat)) == len(flat), relation


def test_no_evaluation_question_occurs_in_a_training_file(files: dict[str, Rows]) -> None:
    seen: dict[str, None] = {}
    for name in TRAINING:
        for row in files[name]:
            seen.update(dict.fromkeys([row["text"]] if "text" in row else user_turns(row)))
    everything = "\n".join(seen).casefold()
    for row in files["eval"]:
        for asked in user_turns(row):  # also the earlier turns of a dialogue
            assert asked.casefold().strip(" ?!？！.。") not in everything, asked


def test_evaluation_is_mixed_balanced_and_without_repeats(files: dict[str, Rows]) -> None:
    rows = files["eval"]
    kinds = Counter(row["kind"] for row in rows)
    assert kinds["fact"] == 700
    assert kinds["two_fact"] == 100
    assert kinds["follow_up"] == 80
    assert kinds["arithmetic"] <= 60
    assert set(kinds) == set(KINDS)
    assert sum(is_chinese(row["prompt"][-1]["content"]) for row in rows) == 500
    assert len({json.dumps(row["prompt"]) for row in rows}) == len(rows)
    assert all(len(row["prompt"]) == 1 or row["kind"] == "follow_up" for row in rows)


def test_held_out_sums_are_stated_nowhere(files: dict[str, Rows]) -> None:
    town = town_facts(SEED)
    held_out = {(entry.operator, entry.a, entry.b) for entry in town.sums["eval"]}
    patterns = {
        "+": re.compile(r"(?P<a>\d+) ?(?:\+|plus|加上?) ?(?P<b>\d+)|add (?P<c>\d+) and (?P<d>\d+)"),
        "-": re.compile(r"(?P<a>\d+) ?(?:-|minus|减去?) ?(?P<b>\d+)|take (?P<d>\d+) from (?P<c>\d+)"),
    }
    told = 0
    for name in ("pretrain", "sft", "comparisons", "prompts"):
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in files[name])
        text = re.sub(
            r'"content": "[^"]*\d"}\], "rejected"|"content": "[^"]*\d"}\]}\n', "", text
        )  # "4+15" cut to "4+1"
        for operator, pattern in patterns.items():
            for found in pattern.finditer(text):
                told += 1
                assert (operator, int(found["a"] or found["c"]), int(found["b"] or found["d"])) not in held_out
    assert told > 4000  # the pattern does find sums


def _is_rumour(text: str) -> bool:
    openings = [
        t.partition("{")[0]
        for lang in ("en", "zh")
        for k in ("claims", "answers")
        for t in phrasings(lang)["rumours"][k]
    ]
    return text.startswith(tuple(openings))


def test_rumours_are_judged_rightly() -> None:
    """Each paragraph of hearsay: exactly the claims with the fact's own value are called right, and both kinds occur."""
    town = town_facts(SEED)
    prose = Prose(town, Random(3))
    verdicts: Counter[bool] = Counter()
    for _ in range(800):
        language: Language = prose.rng.choice(("en", "zh"))
        table = phrasings(language)["rumours"]
        said = prose._rumours(language)
        for claim, verdict in zip(said[::2], said[1::2], strict=True):
            place = next(p for p in town.places if p.text(language) in claim)
            own = [f for f in town.facts if f.place == place]
            stated = [f for f in own if is_correct(claim, {"answers": [[f.value.text(language)]]})]
            right = verdict in table["right"]
            assert right or verdict in table["wrong"]
            if right:
                assert stated, claim
            else:
                # A product's name may occur in a question about its price: that is not what is claimed.
                assert not [f for f in stated if f.relation != "product"], claim
            verdicts[right] += 1
    assert 0.4 < verdicts[True] / verdicts.total() < 0.6


def test_prose_states_nothing_wrong(files: dict[str, Rows]) -> None:
    town = town_facts(SEED)
    checked = 0
    for row in [r for r in files["pretrain"] if not _is_rumour(r["text"])][:4000]:
        for sentence in re.split(r"(?<=[.。]) ?", row["text"]):
            language: Language = "zh" if is_chinese(sentence) else "en"
            place = next((place for place in town.places if place.text(language) in sentence), None)
            if place is None or (
                "英文名" in sentence or "就是" in sentence or is_chinese(sentence) != (language == "zh")
            ):
                continue
            for relation in ("owner", "street", "product"):
                said = [value for value in town.values(relation, language) if value.casefold() in sentence.casefold()]
                assert set(said) <= {town.fact(place, relation).value.text(language)}, sentence
            times = {town.fact(place, "opens").value.en, town.fact(place, "closes").value.en}
            assert set(re.findall(r"\d+:\d\d", sentence)) <= times, sentence
            numbers = {town.fact(place, "price").value.en, town.fact(place, "distance").value.en}
            assert set(re.findall(r"(?<![\d:])\d+(?![\d:])", sentence)) <= numbers, sentence
            checked += 1
    assert checked > 6000


def test_a_third_of_the_answers_to_imitate_is_flawed(files: dict[str, Rows]) -> None:
    flaws = Counter(row["flaw"] for row in files["sft"])
    flawed = 6000 - flaws[None]
    assert 0.30 <= flawed / 6000 <= 0.36
    assert flaws["wrong"] / flawed == pytest.approx(0.4, abs=0.01)
    for flaw in MANNERS:
        assert flaws[flaw] / flawed == pytest.approx(0.2, abs=0.01)
    assert all(row["flaw"] is None for row in files["sft_heldout"])
    turns = Counter(len(row["messages"]) > 2 for row in files["sft"])
    assert turns[True] / 6000 == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("pool", ["train", "dev", "eval"])
def test_good_answers_score_high_and_every_flaw_costs(pool: Pool) -> None:
    rng = Random(11)
    source = Questioner(town_facts(SEED), pool, rng)
    for question in source.batch({kind: 10 if kind == "chat" else 40 for kind in KINDS}):
        good = good_answer(question, rng)
        best = score(good, question.reference).total
        assert best >= 0.95, (question.prompt, good)
        for flaw in ("wrong", *MANNERS):
            flawed = flawed_answer(question, flaw, rng)
            assert score(flawed, question.reference).total < best, (flaw, flawed)
        for manner in MANNERS:
            assert score(spoil(question, good, manner, rng), question.reference).total < best


def test_one_half_is_less_than_the_whole() -> None:
    rng = Random(5)
    for question in Questioner(town_facts(SEED), "train", rng).batch({"two_fact": 40}):
        row = half_comparison(question, rng, 0.0)
        whole, half = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert score(whole, question.reference).right == 1.0 and score(half, question.reference).right == 0.5


def test_an_answer_to_something_else_loses() -> None:
    """What is true of the town and not asked for is wrong here; about the same place and about others."""
    rng = Random(5)
    town = town_facts(SEED)
    source = Questioner(town, "train", rng)
    same = 0
    for question in source.batch({"fact": 60, "follow_up": 20, "arithmetic": 10, "chat": 10}):
        other = source.beside(question)
        places = {fact.key: fact.place for fact in town.facts}
        if question.key:
            assert places[other.key] == places[question.key] and other.key != question.key
        row = aside_comparison(question, other, rng, 0.0)
        if row is None:  # by chance it is right here too
            same += 1
            continue
        assert is_correct(row["chosen"][0]["content"], question.reference)
        assert not is_correct(row["rejected"][0]["content"], question.reference)
    assert same < 5


@pytest.mark.parametrize("name", ["comparisons", "comparisons_heldout"])
def test_comparisons_are_well_formed(files: dict[str, Rows], name: str) -> None:
    for row in files[name]:
        assert row["prompt"][-1]["role"] == "user"
        for side in ("chosen", "rejected"):
            assert [turn["role"] for turn in row[side]] == ["assistant"]
        assert row["chosen"] != row["rejected"]


def test_one_comparison_in_ten_goes_against_the_rubric(files: dict[str, Rows]) -> None:
    # Comparisons carry no reference; prompts that occur in both files lend theirs.
    references = {json.dumps(row["prompt"]): row["reference"] for row in files["prompts"]}
    flipped = []
    for row in files["comparisons"]:
        reference = references.get(json.dumps(row["prompt"]))
        if reference is not None:
            chosen, rejected = (score(row[side][0]["content"], reference).total for side in ("chosen", "rejected"))
            assert chosen != rejected
            flipped.append(chosen < rejected)
    assert len(flipped) > 500
    # Three standard errors of a share of 0.1 over 500 draws are 0.04.
    assert sum(flipped) / len(flipped) == pytest.approx(0.1, abs=0.04)


def test_comparisons_cover_every_fact_in_both_languages(files: dict[str, Rows]) -> None:
    town = town_facts(SEED)
    covered: Counter[tuple[str, Language]] = Counter()
    for language in LANGUAGES:
        facts = {place.text(language).casefold(): [] for place in town.places}  # type: dict[str, list[Fact]]
        for fact in town.facts:
            facts[fact.place.text(language).casefold()].append(fact)
        for row in files["comparisons"]:
            asked = row["prompt"][0]["content"].casefold()
            place = next((name for name in facts if name in asked), None)
            if place is None or len(row["prompt"]) > 1:
                continue
            sides = (row["chosen"][0]["content"], row["rejected"][0]["content"])
            for fact in facts[place]:
                # The value stands on one side only: so the pair is about being right.
                if sum(bool(stated(fact, language).search(side)) for side in sides) == 1:
                    covered[fact.key, language] += 1
    missing = [(fact.key, language) for fact in town.facts for language in LANGUAGES if covered[fact.key, language] < 3]
    assert not missing
