"""Whether an answer has the shape its job asked for."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NoReturn

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from jsonschema.protocols import Validator
from jsonschema.validators import validator_for
from referencing import Registry

from worker.job import Answer, ChatRequest


def usable(request: ChatRequest) -> bool:
    """False when the job asks for a JSON Schema that is none: no answer could be held against it."""
    schema = _schema(request.parameters)
    return schema is None or _validator(schema) is not None


def fits(request: ChatRequest, answer: Answer) -> bool:
    """True when the job asked for no JSON Schema, or the answer is JSON that satisfies it. A tool call is left to its caller."""
    schema = _schema(request.parameters)
    if schema is None or answer.tool_calls:
        return True
    validator = _validator(schema)
    if validator is None:
        return False
    try:
        return bool(validator.is_valid(json.loads(answer.content or "", parse_constant=_refuse)))
    except Exception:  # no JSON, nested too deep, or the schema fails on it: a `$ref` to nowhere, a faulty pattern
        return False


def _schema(parameters: dict[str, Any]) -> str | None:
    response_format = parameters.get("response_format")
    if not isinstance(response_format, dict) or response_format.get("type") != "json_schema":
        return None
    wrapped = response_format.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    return json.dumps(schema) if isinstance(schema, dict) else None


@lru_cache(maxsize=256)  # a batch has one for all its jobs
def _validator(schema: str) -> Validator | None:
    decoded = json.loads(schema)
    kind = validator_for(decoded, default=Draft202012Validator)
    try:
        kind.check_schema(decoded)
    except (SchemaError, RecursionError):
        return None
    return kind(decoded, registry=Registry())  # an empty one: a remote `$ref` is not fetched


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
