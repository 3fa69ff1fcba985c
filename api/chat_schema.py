"""What `worker.batchlines` takes as the body of a chat request, as JSON Schema, for the OpenAPI description."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from worker.batchlines import ROLES


def _number(low: float, high: float) -> dict[str, Any]:
    return {"type": ["number", "null"], "minimum": low, "maximum": high}


def _integer(low: int, high: int) -> dict[str, Any]:
    return {"type": ["integer", "null"], "minimum": low, "maximum": high}


def _a(*kinds: str, **more: Any) -> dict[str, Any]:
    return {"type": [*kinds, "null"], **more}


_PART = {"type": "object", "required": ["type"], "properties": {"type": {"type": "string"}}}
_CONTENT = {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": _PART}]}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {"role": {"type": "string", "enum": list(ROLES)}, "content": _CONTENT},
}
_CALL = {
    "type": "object",
    "required": ["role", "tool_calls"],
    "properties": {
        "role": {"const": "assistant"},
        "content": {"anyOf": [_CONTENT, {"type": "null"}]},
        "tool_calls": {"type": "array", "minItems": 1, "items": {"type": "object"}},
    },
}
_JSON_SCHEMA = {
    "type": "object",
    "required": ["type", "json_schema"],
    "properties": {
        "type": {"const": "json_schema"},
        "json_schema": {
            "type": "object",
            "required": ["schema"],
            "properties": {"schema": {"type": "object", "description": "A JSON Schema; the answer has to fit it."}},
        },
    },
}
_PLAIN = {"type": "object", "required": ["type"], "properties": {"type": {"enum": ["text", "json_object"]}}}

MESSAGES: Mapping[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": [_MESSAGE, _CALL]}}

# Ranges are those of batchlines, which says where they come from.
PARAMETERS: Mapping[str, Any] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "max_tokens": _integer(1, 10_000_000),
    "max_completion_tokens": _integer(1, 10_000_000),
    "stop": _a("string", "array", items={"type": "string"}),
    "seed": _a("integer", format="int64"),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "logit_bias": _a("object"),
    "logprobs": _a("boolean"),
    "top_logprobs": _integer(0, 20),
    "response_format": {"anyOf": [_PLAIN, _JSON_SCHEMA, {"type": "null"}]},
    "tools": _a("array", items={"type": "object"}),
    "tool_choice": _a("string", "object"),
    "parallel_tool_calls": _a("boolean"),
    "reasoning_effort": _a("string"),
    "verbosity": _a("string"),
    "modalities": _a("array", items={"type": "string"}),
    "prediction": _a("object"),
    "service_tier": _a("string"),
    "user": _a("string"),
    "safety_identifier": _a("string"),
    "prompt_cache_key": _a("string"),
    "store": _a("boolean"),
    "n": {"enum": [1, None]},
    "top_k": _integer(0, 1_000_000),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0, 10),
    "reasoning": _a("object"),
    "thinking": _a("object"),
}


def described(schema: dict[str, Any], example: Mapping[str, Any]) -> None:
    """The schema of a model that takes these parameters beside its own fields says so, and takes no others."""
    schema["properties"] |= {"messages": MESSAGES, **PARAMETERS}
    schema["additionalProperties"] = False
    schema["example"] = {**example, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 100}
