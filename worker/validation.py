"""Whether an answer has the shape its job asked for."""

from __future__ import annotations

import json
from typing import Any

from jsonschema import Draft202012Validator

from worker.job import Answer, ChatRequest


def fits(request: ChatRequest, answer: Answer) -> bool:
    """True when the job asked for no JSON Schema, or the answer is JSON that satisfies it. A tool call is left to its caller."""
    schema = _schema(request.parameters)
    if schema is None or answer.tool_calls:
        return True
    try:
        value = json.loads(answer.content or "")
    except ValueError:
        return False
    return bool(Draft202012Validator(schema).is_valid(value))


def _schema(parameters: dict[str, Any]) -> dict[str, Any] | None:
    response_format = parameters.get("response_format")
    if not isinstance(response_format, dict) or response_format.get("type") != "json_schema":
        return None
    wrapped = response_format.get("json_schema")
    schema = wrapped.get("schema") if isinstance(wrapped, dict) else None
    return schema if isinstance(schema, dict) else None
