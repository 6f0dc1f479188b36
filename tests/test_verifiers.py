"""Verifiers: which answers are right, by hand and by generated numbers."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from danlu.rewards.choice import letter_in
from danlu.rewards.json_schema import fits, parsed, schema_fault
from danlu.rewards.protocol import Episode, Score
from danlu.rewards.verifiers import Verifier, choice, exact, fits_schema, number, number_in, regex


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She sold 48/2 = 24 clips, so 48 + 24 = 72 in all.", "72"),
        ("#### 72", "72"),
        ("72 is it, since 8 * 9 = 72 and not 71.\n#### 72\nThat took 3 steps.", "72"),
        ("first #### 1, then #### 2", "2"),
        ("It costs $1,234.50.", "1234.50"),
        ("-5", "-5"),
        ("5-3", "3"),
        ("10 - -4", "-4"),
        ("−7 degrees", "-7"),
        ("$-3", "-3"),
        ("-$3", "-3"),
        (".5", ".5"),
        ("a share of 25%", "25"),
        ("12,34", "34"),  # no thousands
        ("１２", "12"),
        ("#### none", None),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_ends_up_with(text: str, found: str | None) -> None:
    assert number_in(text) == (Decimal(found) if found is not None else None)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("so 72", {"answer": "72"}, True),
        ("so 72.0", {"answer": "72"}, True),
        ("so 1,000 in all.", {"answer": 1000}, True),
        ("so 72, or 73", {"answer": "72"}, False),
        ("seventy-two", {"answer": "72"}, False),
        ("half past 7", {"answers": [["7", "7:30"], ["x"]]}, True),
        ("nothing", {"answer": "nothing"}, False),
    ],
)
def test_number(answer: str, reference: dict[str, Any], right: bool) -> None:
    assert number(answer, reference) is right


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        (" The  cat\n", {"answer": "The cat"}, True),
        ("the cat", {"answer": "The cat"}, False),
        ("Ｂ", {"answer": "B"}, True),
        ("二", {"answers": [["2", "二"]]}, True),
        ("2 or 3", {"answers": [["2"], ["3"]]}, False),
    ],
)
def test_exact(answer: str, reference: dict[str, Any], right: bool) -> None:
    assert exact(answer, reference) is right


@given(st.integers(-(10**9), 10**9), st.integers(0, 99))
def test_every_way_of_writing_a_number_is_the_number(whole: int, cents: int) -> None:
    value = f"{whole}.{cents:02d}"
    for written in (
        value,
        f"{whole:,}.{cents:02d}",
        f"x = {value}",
        f"3 and 4 make {value}.",
        f"#### {value}\nin 2 steps",
    ):
        assert number_in(written) == Decimal(value)


def episode(response: str, **reference: Any) -> Episode:
    return Episode((1,), (2,), True, (), response, reference)


def test_each_reference_says_how_it_is_verified() -> None:
    asked = [
        episode("so 72", verifier="number", answer="72"),
        episode("72", verifier="exact", answer="72."),
        episode("anything"),
        episode("anything", answers=[["anything"]]),  # a rubric's reference names no verifier
        episode("x", verifier="poetry", answer="x"),
        episode("so (B)", verifier="choice", answer="B"),
        episode("B", verifier="choice"),
    ]
    found = Verifier().score(asked)
    assert [s.value for s in found] == [1.0, 0.0, 0.0, 0.0, None, 1.0, None]
    assert found[4] == Score(None, "there is no verifier 'poetry'", "R-VERIFIER")
    assert found[6].error == "the verifier 'choice' needs answer or answers in the reference"


def test_one_verifier_for_all() -> None:
    asked = [episode("anything", answers=[["anything"]]), episode("B", verifier="choice", answer="B"), episode("x")]
    assert [s.value for s in Verifier("exact").score(asked)] == [1.0, 1.0, 0.0]


def test_cancelled() -> None:
    assert Verifier().score([episode("x")], cancelled=lambda: True) == [Score(None, "cancelled")]


# -- letters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("**D**", "D"),
        ("B. Paris", "B"),
        ("B) Paris, because it is the capital.", "B"),
        ("The answer is (B).", "B"),
        ("The answer is B", "B"),
        ("the correct answer is: **C**", "C"),
        ("Answer: D", "D"),
        ("Final answer:\nA", "A"),
        ("The answer is option C, I think", "C"),
        ("The answer should be $\\boxed{B}$", "B"),
        ("\\boxed{\\text{C}}", "C"),
        ("so \\(\\boxed{(D)}\\)", "D"),
        ("I would choose B.", "B"),
        ("Option A is wrong. Option D is correct.", "D"),
        ("It cannot be A. or B. So the answer is C", "C"),
        ("The answer is A. No: the answer is B.", "B"),
        ("The answer is A because cats are animals", "A"),
        ("The answer is B, A is wrong", "B"),
        ("答案是B", "B"),
        ("答案：B", "B"),
        ("正确答案为（C）。", "C"),
        ("答案选D", "D"),
        ("所以选B。", "B"),
        ("故选：C", "C"),
        ("应该选择A", "A"),
        ("不选A，选C", "C"),
        ("A选项是错误的，B是正确的。", "B"),
        ("选项D正确", "D"),
        ("Ｂ", "B"),
        ("【答案】C", "C"),
        ("答案是【C】", "C"),
        ("A. 4\nB. 7", None),
        ("A or B", None),
        ("The answer is A or B", None),
        ("答案是A和B", None),
        ("The answer is not B", None),
        ("A不正确", None),
        ("The answer is A dog", None),
        ("A dog is an animal", None),
        ("I think that it is seven.", None),
        ("E.", None),  # of four options
        ("The answer is E", None),
        ("DNA", None),
        ("it is b", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_settles_on(text: str, letter: str | None) -> None:
    assert letter_in(text) == letter


@given(st.sampled_from("ABCD"), st.sampled_from("ABCD"))
def test_the_last_conclusion_counts_and_two_letters_without_one_are_none(one: str, two: str) -> None:
    for form in ("The answer is ({}).", "答案是{}。", "\\boxed{{{}}}", "选{}", "Answer: {}"):
        assert letter_in(f"{form.format(one)} Wait. {form.format(two)}") == two
    assert letter_in(f"({one})\n({two})") == (one if one == two else None)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("the answer is (B)", {"answer": "B", "choices": ["4", "7"]}, True),
        ("the answer is (C)", {"answer": "C", "choices": ["4", "7"]}, False),  # there is no C
        ("F.", {"answer": "f"}, True),
        ("选B", {"answers": [["A", "B"]]}, True),
        ("选C", {"answers": [["A", "B"]]}, False),
    ],
)
def test_choice(answer: str, reference: dict[str, Any], right: bool) -> None:
    assert choice(answer, reference) is right


# -- patterns and JSON -----------------------------------------------------------------------------------------------------


def test_regex_matches_somewhere() -> None:
    assert regex("it is 12:30 now", {"pattern": r"\d+:\d\d"}) and not regex("noon", {"pattern": r"\d"})


SCHEMA = {
    "type": "object",
    "title": "says nothing",
    "required": ["name", "age"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string", "minLength": 2, "maxLength": 5, "pattern": "^[A-Z]"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", 1, None]}},
        "more": {"type": ["null", "boolean"]},
    },
}


@pytest.mark.parametrize(
    ("value", "right"),
    [
        ({"name": "Ada", "age": 36}, True),
        ({"name": "Ada", "age": 36.0, "tags": ["a", 1, None], "more": False}, True),
        ([], False),
        ({"name": "Ada"}, False),
        ({"name": "Ada", "age": True}, False),
        ({"name": "Ada", "age": 1.5}, False),
        ({"name": "Ada", "age": -1}, False),
        ({"name": "Ada", "age": 151}, False),
        ({"name": "A", "age": 1}, False),
        ({"name": "Adaaaa", "age": 1}, False),
        ({"name": "ada", "age": 1}, False),
        ({"name": 3, "age": 1}, False),
        ({"name": "Ada", "age": 1, "tags": ["a", True]}, False),
        ({"name": "Ada", "age": 1, "tags": "a"}, False),
        ({"name": "Ada", "age": 1, "more": 0}, False),
        ({"name": "Ada", "age": 1, "other": 0}, False),
    ],
)
def test_what_fits_a_schema(value: Any, right: bool) -> None:
    assert fits(value, SCHEMA) is right


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"reqired": ["a"]}, "no keyword 'reqired'"),
        ({"properties": {"a": {"items": {"patternPropertys": {}}}}}, "no keyword 'patternPropertys'"),
        ({"definitions": {"a": {"min": 1}}}, "no keyword 'min'"),
        ({"anyOf": []}, "$.anyOf"),
        ({"oneOf": [{"type": "x"}]}, "$.oneOf[0].type"),
        ({"items": {"$ref": "#/$defs/b"}, "$defs": {"a": {}}}, "$ref leads nowhere in this schema ('#/$defs/b')"),
        ({"$ref": "other.json"}, "$ref leads nowhere in this schema ('other.json')"),
        ({"$ref": "http://127.0.0.1:9/schema.json"}, "$ref leads nowhere"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "leads back to itself"),
        ({"$defs": {"a": {"minItems": "1"}}}, "'1' is not of type 'integer'"),
        ({"multipleOf": 0}, "$.multipleOf"),
        ({"type": "text"}, "'text' is not valid"),
        ({"pattern": "("}, "'(' is not a 'regex'"),
        ({"minimum": "3"}, "$.minimum"),
        ({"properties": {"a": 3}}, "$.properties.a"),
        ([], "[] is not of type 'object', 'boolean'"),
    ],
)
def test_schemas_that_are_refused(schema: Any, said: str) -> None:
    assert said in str(schema_fault(schema))
    assert schema_fault(SCHEMA) is None


# What pydantic makes of `class Node: name: str; weight: float | None = None; kind: Literal["leaf"]; parts: list[Node] = []`.
NODE = {
    "$defs": {
        "Node": {
            "properties": {
                "name": {"title": "Name", "type": "string"},
                "weight": {"anyOf": [{"exclusiveMinimum": 0, "type": "number"}, {"type": "null"}], "default": None},
                "kind": {"const": "leaf", "type": "string"},
                "parts": {"items": {"$ref": "#/$defs/Node"}, "maxItems": 2, "uniqueItems": True, "type": "array"},
            },
            "required": ["name"],
            "type": "object",
        }
    },
    "$ref": "#/$defs/Node",
}


@pytest.mark.parametrize(
    ("schema", "value", "right"),
    [
        (NODE, {"name": "a", "weight": None, "kind": "leaf", "parts": [{"name": "b", "weight": 0.5}]}, True),
        (NODE, {"name": "a", "weight": 0}, False),
        (NODE, {"name": "a", "kind": "root"}, False),
        (NODE, {"name": "a", "parts": [{"name": "b", "parts": [{}]}]}, False),
        (NODE, {"name": "a", "parts": [{"name": n} for n in "abc"]}, False),
        (NODE, {"name": "a", "parts": [{"name": "b"}, {"name": "b"}]}, False),
        ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, 4, True),
        ({"oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, 6, False),
        ({"multipleOf": 0.1}, 0.3, True),
        ({"multipleOf": 0.5}, 1e300, True),
        ({"multipleOf": 0.5}, json.loads("1e999"), False),
        ({"multipleOf": 0.1}, 0.35, False),
        ({"allOf": [{"minLength": 2}, {"pattern": "^a"}]}, "ba", False),
        ({"not": {"type": "string"}}, "x", False),
        ({"exclusiveMaximum": 3}, 3, False),
        ({"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, [1, "a"], True),
        ({"prefixItems": [{"type": "integer"}], "items": {"type": "string"}}, [1, 2], False),
        ({"minProperties": 1}, {}, False),
        (
            {"definitions": {"a/b": {"type": "null"}}, "items": {"$ref": "#/definitions/a~1b"}},
            [None, 0],
            False,
        ),
        ({"const": True}, 1, False),
        ({"if": {"minimum": 5}, "then": {"multipleOf": 5}}, 7, False),
    ],
)
def test_schemas_of_schemas(schema: Any, value: Any, right: bool) -> None:
    assert schema_fault(schema) is None
    assert fits(value, schema) is right


def test_a_value_nested_beyond_all_bounds_fits_no_schema_that_goes_with_it() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert not fits(deep, {"items": {"$ref": "#"}})


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"a": 1}', True),
        ('Here:\n```json\n{"a": 1}\n```\nDone.', True),
        ('```json\n{"a": "x"}\n```\n```\n{"a": 2}\n```', True),
        ('{"a": "x"}', False),
        ('It is {"a": 1}', False),
        ('{"a": NaN}', False),
        ("[" * 100_000, False),
        ("", False),
    ],
)
def test_json_answers(answer: str, right: bool) -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "number"}}}
    assert fits_schema(answer, {"schema": schema}) is right


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def exact_schema(value: Any) -> dict[str, Any]:
    """A schema that this value fits and few others do."""
    if isinstance(value, dict):
        parts = {k: exact_schema(v) for k, v in value.items()}
        return {"type": "object", "required": list(value), "properties": parts, "additionalProperties": False}
    return {"enum": [value]}


@given(JSON, JSON)
def test_a_value_fits_its_own_schema_and_no_other_does(value: Any, other: Any) -> None:
    schema = exact_schema(value)
    assert schema_fault(schema) is None and fits(value, schema)
    if isinstance(value, dict) and isinstance(other, dict) and value.keys() != other.keys():
        assert not fits(other, schema)
    assert parsed(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ({"verifier": "regex", "pattern": "("}, "no regular expression"),
        ({"verifier": "json", "schema": {"iff": {}}}, "no keyword 'iff'"),
        ({"verifier": "choice", "answer": "Paris"}, "'Paris' as its answer, expected a letter"),
        ({"verifier": "tests", "tests": []}, "needs tests in the reference"),
        ({"verifier": "tests", "tests": "assert f()"}, "no list of programs"),
        ({"verifier": "tests", "tests": [3]}, "the test 3"),
        ({"verifier": "tests", "tests": {"inputs": ["1"], "outputs": []}}, "1 inputs and 0 outputs"),
        ({"verifier": "number"}, "needs answer or answers"),
    ],
)
def test_references_that_cannot_be_used(reference: dict[str, Any], said: str) -> None:
    assert said in str(Verifier().fault(reference))
    (found,) = Verifier().score([episode("x", **reference)])
    assert found.code == "R-VERIFIER" and said in str(found.error)
