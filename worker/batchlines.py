"""Chat requests as OpenAI writes them: the body of a chat completion, and the line of a batch file that carries one."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from worker.job import ChatRequest
from worker.textfile import UNSTORABLE, cut
from worker.validation import validator

URL = "/v1/chat/completions"
DEEPEST = 64  # levels of lists and objects in a body
LONGEST_MODEL = 200  # characters
LARGEST_SCHEMA = 64 * 1024  # characters of JSON
LARGEST_METADATA = 16 * 1024  # characters of JSON
MOST_DIGITS = 100_000  # of all numbers with a fraction or an exponent
ROLES = ("system", "developer", "user", "assistant", "tool", "function")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One line of a batch file: either `request` or `problem` is set. `model` None is the default chain."""

    custom_id: str | None
    model: str | None = None
    request: ChatRequest | None = None
    problem: str | None = None


def parse(line: Mapping[str, Any]) -> BatchLine:
    """The line `{"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {"model", "messages", ...}}`.

    `metadata` of the body is taken and not kept. Never raises: what is wrong stands in `problem`, without anything of the prompt.
    """
    custom_id = line.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        return BatchLine(None, problem="custom_id: expected a text that is not empty")
    custom_id = UNSTORABLE.sub("\ufffd", custom_id)
    try:
        body = dict(_envelope(line))
        model, _ = body.pop("model", None), body.pop("metadata", None)  # a file's lines have their custom_id
        if model is not None and (not isinstance(model, str) or not 1 <= len(model) <= LONGEST_MODEL):
            raise ValueError("body.model: expected the name of a chain, a provider or a model")
        return BatchLine(custom_id, model and cut(model), chat_request(body))
    except ValueError as error:
        return BatchLine(custom_id, problem=str(error))


def _envelope(line: Mapping[str, Any]) -> Mapping[str, Any]:
    if unknown := line.keys() - {"custom_id", "method", "url", "body"}:
        raise ValueError(f"unknown key {cut(min(unknown))!r} beside custom_id, method, url and body")
    if line.get("method", "POST") != "POST":
        raise ValueError("method: only POST can be used")
    if line.get("url", URL) != URL:
        raise ValueError(f"url: only {URL} can be used")
    if not isinstance(line.get("body"), Mapping):
        raise ValueError("body: expected an object")
    return line["body"]  # type: ignore[no-any-return]


def chat_request(body: Mapping[str, Any]) -> ChatRequest:
    """The request in the body of a chat completion, without its `model`, which is the caller's to read.

    Parameters that are null are dropped, known or not, and `store`, for every job is stored. NUL and lone surrogates become
    U+FFFD. Raises ValueError, "FIELD: what was expected", for what no provider can be sent or a queue cannot do: no messages,
    an unknown parameter, `n` above 1, `stream`, a number that is none, numbers of too many digits, more than 64 levels.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list with at least one message")
    for position, message in enumerate(messages):
        _check_message(message, f"messages[{position}]")
    if body.get("model") is not None:
        raise ValueError("model: expected the name of a chain, a provider or a model as `chain`")
    rest = {name: value for name, value in body.items() if name not in ("model", "messages")}
    request = ChatRequest(messages=_storable(messages, "messages"), parameters=parameters(rest))
    _check_numbers(request)
    return request


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected an object")
    if message.get("role") not in ROLES:
        raise ValueError(f"{where}.role: expected one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        if not content or not all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content):
            raise ValueError(f"{where}.content: expected parts, objects that have a type")
    elif content is None:
        if message["role"] != "assistant" or not (message.get("tool_calls") or message.get("function_call")):
            raise ValueError(f"{where}.content: missing")
    elif not isinstance(content, str):
        raise ValueError(f"{where}.content: expected a text or a list of parts")
    if message.get("tool_calls") is not None and not _is_list_of(dict, message["tool_calls"]):
        raise ValueError(f"{where}.tool_calls: expected a list of objects")


def parameters(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a chat request, checked as `chat_request` says. Raises ValueError naming the one."""
    checked = {}
    for name, value in given.items():
        if value is None:
            continue
        if name not in _PARAMETERS:
            near = difflib.get_close_matches(cut(name), _PARAMETERS, n=1)
            raise ValueError(f"{cut(name)}: unknown parameter{f', did you mean {near[0]!r}?' if near else ''}")
        fits, expected = _PARAMETERS[name]
        if not fits(value):
            raise ValueError(f"{name}: expected {expected}")
        if name not in ("n", "stream", "store"):
            checked[name] = _storable(value, name)
    if "response_format" in checked:
        _check_response_format(checked["response_format"])
    return checked


def _storable(value: Any, where: str, depth: int = 1) -> Any:
    """A copy of `value` that JSON and Postgres can hold."""
    if isinstance(value, str):
        return UNSTORABLE.sub("\ufffd", value)
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"{where}: {value} is no JSON number")
        return value
    if depth > DEEPEST:
        raise ValueError(f"{where}: nested more than {DEEPEST} levels deep")
    if isinstance(value, list):
        return [_storable(item, where, depth + 1) for item in value]
    if isinstance(value, Mapping):
        return {_storable(str(key), where): _storable(item, where, depth + 1) for key, item in value.items()}
    raise ValueError(f"{where}: {type(value).__name__} is nothing JSON knows")


def _check_numbers(request: ChatRequest) -> None:
    """Postgres writes out every digit of a number in JSON: 1e308 takes 52 times the room it came in."""
    digits = sum(abs(math.log10(abs(number))) for number in _floats([request.messages, request.parameters]) if number)
    if digits > MOST_DIGITS:
        raise ValueError(f"messages: the numbers in it and beside it have more than {MOST_DIGITS} digits, written out")


def _floats(value: Any) -> Iterator[float]:
    if isinstance(value, float):
        yield value
    elif isinstance(value, list | dict):
        for item in value if isinstance(value, list) else value.values():
            yield from _floats(item)


def _check_response_format(given: Mapping[str, Any]) -> None:
    if given.get("type") not in ("text", "json_object", "json_schema"):
        raise ValueError("response_format.type: expected text, json_object or json_schema")
    if given["type"] != "json_schema":
        return
    named = given.get("json_schema")
    if not isinstance(named, Mapping) or not isinstance(named.get("schema"), Mapping):
        raise ValueError("response_format.json_schema.schema: expected a JSON Schema")
    where, schema = "response_format.json_schema.schema", json.dumps(named["schema"])
    if len(schema) > LARGEST_SCHEMA:
        raise ValueError(f"{where}: larger than {LARGEST_SCHEMA} characters")
    try:
        validator(schema)
    except ValueError as error:
        raise ValueError(f"{where}: {cut(str(error))}") from None


def _number(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return fits, f"a number from {low:g} to {high:g}"


def _integer(low: int, high: int) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    return fits, f"a whole number from {low} to {high}"


def _a(kind: type | tuple[type, ...], expected: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: isinstance(value, kind), expected


def _is_list_of(kind: type, value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


_TEXT, _OBJECT, _BOOL = _a(str, "a text"), _a(dict, "an object"), _a(bool, "true or false")

# Ranges are those of https://platform.openai.com/docs/api-reference/chat/create; what vendors add to it stands below.
_PARAMETERS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": _number(0, 2),
    "top_p": _number(0, 1),
    "max_tokens": _integer(1, 10_000_000),
    "max_completion_tokens": _integer(1, 10_000_000),
    "stop": (lambda value: isinstance(value, str) or _is_list_of(str, value), "a text or a list of texts"),
    "seed": _integer(-(2**63), 2**63 - 1),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "logit_bias": _OBJECT,
    "logprobs": _BOOL,
    "top_logprobs": _integer(0, 20),
    "response_format": _OBJECT,
    "tools": (lambda value: _is_list_of(dict, value), "a list of objects"),
    "tool_choice": _a((str, dict), "a text or an object"),
    "parallel_tool_calls": _BOOL,
    "reasoning_effort": _TEXT,
    "verbosity": _TEXT,
    "modalities": (lambda value: _is_list_of(str, value), "a list of texts"),
    "prediction": _OBJECT,
    "service_tier": _TEXT,
    "user": _TEXT,
    "safety_identifier": _TEXT,
    "prompt_cache_key": _TEXT,
    "store": _BOOL,
    "n": (lambda value: value == 1 and not isinstance(value, bool), "1: a job has one answer"),
    "stream": (lambda value: value is False, "false: a queued job cannot be streamed"),
    "top_k": _integer(0, 1_000_000),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0, 10),
    "reasoning": _OBJECT,
    "thinking": _OBJECT,
}
