"""Whether an answer has the shape its job asked for."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, NoReturn

from jsonschema_rs import ValidationError, ValidationErrorKind, Validator, validator_for

from worker.job import Answer, ChatRequest


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
    """Of a JSON Schema, as text. What it costs is bounded by its size and the answer's: no pattern can hold up the loop.

    Raises ValueError saying where it is none, or that it points outside of itself: a worker fetches nothing for a job.
    """
    try:
        return validator_for(json.loads(schema), retriever=_refuse)
    except ValidationError as error:
        if isinstance(error.kind, ValidationErrorKind.Referencing):
            raise ValueError("a $ref or $schema in it leads nowhere, or out of it") from None
        raise ValueError(f"not a JSON Schema at $.{'.'.join(map(str, error.instance_path))}") from None
    except (ValueError, RecursionError):
        raise ValueError("nested too deeply") from None


def _refuse(what: str) -> NoReturn:
    raise ValueError(f"{what} is not taken")
