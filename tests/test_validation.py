"""Answers held against the JSON Schema of their job."""

import json
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.cost import Usage
from worker.job import Answer, ChatRequest
from worker.validation import fits, usable

LABEL = {"type": "object", "required": ["label"], "properties": {"label": {"enum": ["a", "b"]}}}


def asking(schema: object, kind: str = "json_schema") -> ChatRequest:
    return ChatRequest([], {"response_format": {"type": kind, "json_schema": {"name": "x", "schema": schema}}})


def answer(content: str | None, tool_calls: list[dict[str, object]] | None = None) -> Answer:
    return Answer(content=content, finish_reason="stop", provider="p", model="m", usage=Usage(), tool_calls=tool_calls)


@pytest.mark.parametrize(
    ("content", "fitting"),
    [
        ('{"label": "a"}', True),
        ('  {"label": "b", "more": 1}\n', True),
        ('{"label": "c"}', False),
        ("{}", False),
        ("label: a", False),
        ('```json\n{"label": "a"}\n```', False),
        ('{"label": "a"', False),
        ("", False),
        (None, False),
        ("[" * 100_000, False),
    ],
    ids=str,
)
def test_an_answer_fits_when_it_is_json_that_satisfies_the_schema(content, fitting):
    assert fits(asking(LABEL), answer(content)) is fitting


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {"response_format": "json"},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": None}}},
    ],
)
def test_without_a_schema_every_answer_fits(parameters):
    request = ChatRequest([], parameters)
    assert usable(request)
    assert fits(request, answer("anything"))


def test_a_tool_call_is_left_to_its_caller():
    assert fits(asking(LABEL), answer(None, [{"id": "1"}]))


@pytest.mark.parametrize("content", ["NaN", "Infinity", "-Infinity"])
def test_what_only_python_takes_for_json_does_not_fit(content):
    assert not fits(asking({"type": "number"}), answer(content))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "nonsense"},
        {"required": "label"},
        {"properties": []},
        {"pattern": "("},
        {"$schema": 7},
        {"$schema": "http://example.com/mine"},
        {"$ref": "#/$defs/missing"},
        {"additionalProperties": {"$ref": "urn:nobody"}},
    ],
)
def test_a_schema_that_is_none_or_leads_nowhere_is_known_before_anybody_is_paid_for_an_answer(schema):
    assert not usable(asking(schema))
    assert not fits(asking(schema), answer("{}"))


@pytest.mark.parametrize(
    ("schema", "content"),
    [
        ({"pattern": "^(a+)+$"}, json.dumps("a" * 5_000 + "!")),
        ({"pattern": "a+$"}, json.dumps("a" * 100_000 + "!")),
        ({"pattern": r"^(a*)*\1b$"}, json.dumps("a" * 5_000)),
        ({"uniqueItems": True, "minItems": 9_999}, json.dumps([{"a": n} for n in range(3_000)])),
    ],
)
def test_no_pattern_and_no_answer_holds_up_the_loop(schema, content):
    """With a backtracking matcher, or one that compares all with all, each takes from seconds to longer than anybody lives."""
    assert not fits(asking(schema), answer(content))


def doubling(levels, points=lambda level: {"$ref": f"#/$defs/d{level}"}, name="$defs", **top):
    """Every level stands twice in the one above it."""
    definitions = {f"d{level}": {"allOf": [points(level + 1)] * 2} for level in range(levels)} | {f"d{levels}": {"type": "object"}}
    return {**points(0), name: definitions, **top}


INNER = {"properties": {"definitions": doubling(40)["$defs"]}}
ANCHORED = {f"d{n}": {"$anchor": f"d{n}", "allOf": [{"$ref": f"#d{n + 1}"}] * 2} for n in range(40)}


@pytest.mark.parametrize(
    "schema",
    [
        doubling(40),
        doubling(40, lambda level: {"$ref": f"#/%64efinitions/d{level}"}, "definitions"),
        doubling(40, lambda level: {"$dynamicRef": f"#/$defs/d{level}"}),
        doubling(40, lambda level: {"$ref": f"urn:top#/$defs/d{level}"}, **{"$id": "urn:top"}),
        doubling(40, lambda level: {"$ref": f"#/a~1~0/d{level}"}, "a/~"),
        doubling(40, lambda level: {"$ref": f"#/properties/definitions/d{level}"}, "$defs") | INNER,
        {"$ref": "#d0", "$defs": {**ANCHORED, "e": {"$anchor": "d40"}}},
        {"$ref": "inner", "$defs": {**{f"d{n}": {} for n in range(41)}, "inner": {"$id": "inner", **doubling(40)}}},
    ],
)
def test_a_schema_whose_references_multiply_is_refused_before_an_answer_is_held_against_it(schema):
    assert not usable(asking(schema))
    assert not fits(asking(schema), answer("{}"))


def test_a_schema_may_name_a_part_often_and_lead_back_into_itself():
    leaf = {"$ref": "#/$defs/leaf"}
    named_often = {"$defs": {"leaf": {"type": "string"}}, "properties": {f"p{n}": leaf for n in range(1_000)}}
    assert fits(asking(named_often), answer('{"p7": "a"}'))
    assert not fits(asking(named_often), answer('{"p7": 1}'))
    hidden = {"$ref": "#/%24defs/a~1b/anyOf/0", "$defs": {"a/b": {"anyOf": [{"type": "string"}]}}}
    assert fits(asking(hidden), answer('"a"'))
    assert not fits(asking(hidden), answer("1"))
    tree = {"type": "object", "properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}, "additionalProperties": False}
    assert fits(asking(tree), answer(json.dumps({"left": {"right": {"left": {}}}, "right": {}})))
    assert not fits(asking(tree), answer(json.dumps({"left": {"right": {"up": {}}}})))


def test_what_leads_back_is_gone_through_once_for_each_part_of_an_answer():
    """As the validator has it. Were it not so, an answer of 60 levels would take longer than anybody lives."""
    back = {"allOf": [{"$ref": "#"}, {"$ref": "#/$defs/again"}]}
    schema = {"type": "object", "properties": {"a": back, "b": back}, "$defs": {"again": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}}}
    deep: dict[str, object] = {"a": 3}
    for level in range(60):
        deep = {"ab"[level % 2]: deep}
    assert usable(asking(schema))
    assert not fits(asking(schema), answer(json.dumps(deep)))


def test_a_remote_reference_is_not_fetched():
    with socket.create_server(("127.0.0.1", 0)) as trap:
        schema = {"$ref": f"http://127.0.0.1:{trap.getsockname()[1]}/schema"}
        assert not fits(asking(schema), answer("{}"))
        trap.setblocking(False)
        with pytest.raises(BlockingIOError):
            trap.accept()


def test_the_schemas_own_dialect_counts():
    exclusive = {"maximum": 5, "exclusiveMaximum": True}  # a flag in draft 4, a number since
    assert not usable(asking(exclusive))
    draft4 = asking({"$schema": "http://json-schema.org/draft-04/schema#", **exclusive})
    assert fits(draft4, answer("4"))
    assert not fits(draft4, answer("5"))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner), max_leaves=10))
def test_whatever_is_json_fits_a_schema_that_allows_all(value):
    assert fits(asking({}), answer(json.dumps(value)))
