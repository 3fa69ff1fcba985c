"""Whether an answer has the shape its job asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache, reduce
from typing import Any, NoReturn
from urllib.parse import unquote

from jsonschema_rs import ValidationError, ValidationErrorKind, Validator, validator_for

from worker.job import Answer, ChatRequest

MOST_NODES = 10_000  # nodes, with what each $ref points to in its place
_REFERENCES = ("$ref", "$dynamicRef", "$recursiveRef")


def usable(request: ChatRequest) -> bool:
    """False when the job asks for a JSON Schema that is none: no answer could be held against it."""
    schema = _schema(request.parameters)
    try:
        return schema is None or bool(validator(schema))
    except ValueError:
        return False


def fits(request: ChatRequest, answer: Answer) -> bool:
    """True when the job asked for no JSON Schema, or the answer is JSON that satisfies it. A tool call is left to its caller."""
    schema = _schema(request.parameters)
    if schema is None or answer.tool_calls:
        return True
    try:
        return validator(schema).is_valid(json.loads(answer.content or "", parse_constant=_refuse))
    except (ValueError, RecursionError):  # no JSON, or nested too deep
        return False


def _schema(parameters: dict[str, Any]) -> str | None:
    response_format = parameters.get("response_format")
    if not isinstance(response_format, dict) or response_format.get("type") != "json_schema":
        return None
    wrapped = response_format.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    return json.dumps(schema) if isinstance(schema, dict) else None


@lru_cache(maxsize=256)  # a batch has one for all its jobs
def validator(schema: str) -> Validator:
    """Of a JSON Schema, as text. What it costs is bounded by its size and the answer's: no pattern and no $ref can hold up the loop.

    Raises ValueError saying where it is none, that it points outside of itself (a worker fetches nothing for a job), or that
    its $refs unfold to more than 10,000 nodes.
    """
    whole = json.loads(schema)
    try:
        made = validator_for(whole, retriever=_refuse)
        size = _unfolded(whole)
    except ValidationError as error:
        if isinstance(error.kind, ValidationErrorKind.Referencing):
            raise ValueError("a $ref or $schema in it leads nowhere, or out of it") from None
        raise ValueError(f"not a JSON Schema at $.{'.'.join(map(str, error.instance_path))}") from None
    except LookupError:
        raise ValueError("a $ref in it cannot be followed: write #/a/pointer or #anchor, and no $id below the top") from None
    except (ValueError, RecursionError):
        raise ValueError("nested too deeply") from None
    if size > MOST_NODES:
        raise ValueError(f"its $refs unfold to more than {MOST_NODES} nodes")
    return made


def _unfolded(schema: Any) -> int:
    """How many nodes there are with what each $ref points to in its place. One that leads back to where it stands is not followed:
    the validator goes once through a cycle for each part of an answer, but through all else once for each way that leads there.

    Raises LookupError for a $ref that cannot be followed, RecursionError where they follow each other too far.
    """
    anchors = _anchors(schema)
    sizes: dict[int, int] = {}

    def size(node: Any) -> int:
        if not isinstance(node, dict | list):
            return 0
        if id(node) not in sizes:
            sizes[id(node)] = 1  # for whoever comes by again on the way down
            sizes[id(node)] += sum(map(size, node if isinstance(node, list) else [*node.values(), *targets(node)]))
        return sizes[id(node)]

    def targets(node: dict[str, Any]) -> Iterator[Any]:
        for name in _REFERENCES:
            if isinstance(node.get(name), str):
                fragment = unquote(node[name].partition("#")[2])
                yield anchors.get(fragment) or reduce(_step, fragment.split("/")[1:], schema)

    return size({name: part for name, part in schema.items() if name not in ("$defs", "definitions")})


def _anchors(schema: Any) -> dict[str, Any]:
    """What `#anchor` points to. Raises LookupError for an $id below the top: a pointer means something else under it."""
    objects = list(_objects(schema))
    base = "id" if "draft-04" in str(schema.get("$schema")) else "$id"
    if any(isinstance(node.get(base), str) for node in objects[1:]) and any(name in node for node in objects for name in _REFERENCES):
        raise LookupError(base)
    return {str(node[name]): node for node in objects for name in ("$anchor", "$dynamicAnchor") if name in node}


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        yield node
    if isinstance(node, dict | list):
        for part in node.values() if isinstance(node, dict) else node:
            yield from _objects(part)


def _step(node: Any, key: str) -> Any:
    """One step of a JSON pointer (RFC 6901)."""
    return node[int(key)] if isinstance(node, list) else node[key.replace("~1", "/").replace("~0", "~")]


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"{what} is not taken")
