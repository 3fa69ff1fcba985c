"""A chat request in OpenAI's words as Anthropic's Messages API wants it. What it has no words for is `Unsupported`.

Hints that only nudge the answer are dropped (`_HINTS`); what would make it another answer than was asked for is not. Known
losses: all system messages stand before the first turn, `strict` and `name` are dropped, `temperature` above 1 is 1, and
beside a temperature `top_p` is dropped (models from 4.5 on refuse both at once).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from worker.job import ChatRequest
from worker.providers.anthropic_schema import closed

DEFAULT_MAX_TOKENS = 4096  # the API wants a number; every Claude model writes as many
_HINTS = frozenset({
    "seed", "frequency_penalty", "presence_penalty", "reasoning_effort", "verbosity", "prediction", "store", "metadata",
    "service_tier", "prompt_cache_key", "prompt_cache_retention", "stream", "stream_options", "model", "messages",
})  # fmt: skip
_NATIVE = frozenset({"top_k", "thinking"})  # Anthropic's own words, passed as they are
# Parameters that ask for nothing at these values: what OpenAI does without them.
_NOTHING: Mapping[str, tuple[Any, ...]] = {
    "n": (1,), "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},), "modalities": (["text"],),
}  # fmt: skip
_TRANSLATED = frozenset({
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "stop", "user", "safety_identifier", "response_format",
    "tools", "tool_choice", "parallel_tool_calls",
})  # fmt: skip
_CHOICES: Mapping[str, str] = {"auto": "auto", "required": "any", "none": "none"}
_DATA_URL = re.compile(r"data:([a-zA-Z0-9.+-]+/[a-zA-Z0-9.+-]+);base64,(.+)", re.DOTALL)
_JSON_ONLY = "Answer with one JSON object and nothing else."


class Unsupported(Exception):
    """This API has no words for it. `what`: the parameter or the part of a message, as `[a-z0-9_.-]`."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what


def translated(request: ChatRequest, model: str) -> dict[str, Any]:
    """The body of POST /v1/messages. Raises Unsupported."""
    wanted = {name: value for name, value in request.parameters.items() if value is not None}
    for name, value in wanted.items():
        if name not in _HINTS | _NATIVE | _TRANSLATED and value not in _NOTHING.get(name, ()):
            raise Unsupported(name if re.fullmatch("[a-z0-9_.-]{1,40}", name) else "parameter")
    system, messages = _turns(request.messages)
    if wants_json(request):
        system.append(_JSON_ONLY)
    if not messages:
        raise Unsupported("no_messages")
    body: dict[str, Any] = {"model": model, "max_tokens": _max_tokens(wanted), "messages": messages}
    if system:
        body["system"] = "\n\n".join(system)
    return {**body, **_sampling(wanted), **_tools(wanted), **_output(wanted), **{k: v for k, v in wanted.items() if k in _NATIVE}}


def wants_json(request: ChatRequest) -> bool:
    """Whether any JSON object is asked for. The API has no mode for that: the system prompt says so instead."""
    stated = request.parameters.get("response_format")
    return isinstance(stated, dict) and stated.get("type") == "json_object"


def _max_tokens(wanted: Mapping[str, Any]) -> Any:
    return wanted.get("max_completion_tokens", wanted.get("max_tokens", DEFAULT_MAX_TOKENS))


def _sampling(wanted: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if "temperature" in wanted:
        heat = wanted["temperature"]
        found["temperature"] = min(heat, 1) if isinstance(heat, int | float) else heat
    elif "top_p" in wanted:
        found["top_p"] = wanted["top_p"]
    stops = wanted.get("stop")
    if stops:
        found["stop_sequences"] = [stops] if isinstance(stops, str) else stops
        if not all(isinstance(stop, str) and stop.strip() for stop in found["stop_sequences"]):
            raise Unsupported("stop")  # white space alone is refused
    user = wanted.get("safety_identifier", wanted.get("user"))
    return {**found, "metadata": {"user_id": user}} if user else found


def _tools(wanted: Mapping[str, Any]) -> dict[str, Any]:
    tools = wanted.get("tools")
    if not tools:
        return {}
    found: dict[str, Any] = {"tools": [_tool(tool) for tool in tools]}
    choice = wanted.get("tool_choice", "auto")
    if isinstance(choice, str) and choice in _CHOICES:
        found["tool_choice"] = {"type": _CHOICES[choice]}
    elif isinstance(choice, dict) and choice.get("type") == "function":
        found["tool_choice"] = {"type": "tool", "name": _part(choice, "function", "tool_choice")["name"]}
    else:
        raise Unsupported("tool_choice")
    if wanted.get("parallel_tool_calls") is False and found["tool_choice"]["type"] != "none":
        found["tool_choice"]["disable_parallel_tool_use"] = True
    return found


def _tool(tool: Any) -> dict[str, Any]:
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise Unsupported("tools")
    function = _part(tool, "function", "tools")
    described = {"description": function["description"]} if function.get("description") else {}
    schema = function.get("parameters") or {"type": "object", "properties": {}}
    return {"name": function["name"], **described, "input_schema": schema}


def _output(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """`output_config.format`: structured outputs are native from the 4.5 models on."""
    stated = wanted.get("response_format")
    kind = stated.get("type") if isinstance(stated, dict) else None
    if stated is None or kind in ("text", "json_object"):
        return {}
    schema = _part(stated, "json_schema", "response_format").get("schema") if kind == "json_schema" else None
    fitting = closed(schema) if isinstance(schema, dict) else None
    if fitting is None:
        raise Unsupported("response_format")
    return {"output_config": {"format": {"type": "json_schema", "schema": fitting}}}


def _turns(messages: list[dict[str, Any]]) -> tuple[list[str], list[dict[str, Any]]]:
    """The system prompt's parts, and turns of alternating roles: what one side says in a row is one turn."""
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for message in messages:
        role = message.get("role")
        if role in ("system", "developer"):
            system += [block["text"] for block in _blocks(message.get("content"), texts_only=True)]
            continue
        if role not in ("user", "assistant", "tool"):
            raise Unsupported("role")
        blocks = _said(message, role)
        side = "assistant" if role == "assistant" else "user"
        if blocks and turns and turns[-1]["role"] == side:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": side, "content": blocks})
    return system, turns


def _said(message: Mapping[str, Any], role: str) -> list[dict[str, Any]]:
    if role == "tool":
        result = {"type": "tool_result", "tool_use_id": _id(message.get("tool_call_id"))}
        return [{**result, "content": _blocks(message.get("content"))}]
    blocks = _blocks(message.get("content"), texts_only=role == "assistant")
    calls = message.get("tool_calls") if role == "assistant" else None
    return [*blocks, *(_tool_use(call) for call in calls or [])]


def _blocks(content: Any, *, texts_only: bool = False) -> list[dict[str, Any]]:
    """Content as blocks; the API refuses empty ones."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or []
    if not isinstance(parts, list):
        raise Unsupported("content")
    return [block for part in parts if (block := _block(part, texts_only)) is not None]


def _block(part: Any, texts_only: bool) -> dict[str, Any] | None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in ("text", "refusal"):
        text = part.get(kind)
        if not isinstance(text, str):
            raise Unsupported("content")
        return {"type": "text", "text": text} if text.strip() else None
    if kind == "image_url" and not texts_only:
        image = part["image_url"]
        return {"type": "image", "source": _source(image.get("url") if isinstance(image, dict) else image)}
    raise Unsupported(f"content.{kind}" if kind in ("image_url", "input_audio", "file", "video_url") else "content")


def _source(url: Any) -> dict[str, Any]:
    data = _DATA_URL.fullmatch(url) if isinstance(url, str) else None
    if data:
        return {"type": "base64", "media_type": data[1].lower(), "data": data[2]}
    if isinstance(url, str) and url.startswith("https://"):
        return {"type": "url", "url": url}
    raise Unsupported("content.image_url")


def _tool_use(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise Unsupported("tool_calls")
    function = _part(call, "function", "tool_calls")
    try:
        arguments = json.loads(function.get("arguments") or "{}")
    except (TypeError, ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise Unsupported("tool_calls")
    return {"type": "tool_use", "id": _id(call.get("id")), "name": function["name"], "input": arguments}


def _part(whole: Mapping[str, Any], name: str, what: str) -> dict[str, Any]:
    part = whole.get(name)
    if not isinstance(part, dict) or not (isinstance(part.get("name"), str) or name == "json_schema"):
        raise Unsupported(what)
    return part


def _id(value: Any) -> str:
    """As the API allows ids; other vendors' have colons and dots in them."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", str(value))
