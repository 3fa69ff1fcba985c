"""What a vendor says in each dialect: its answers, whole or as events of a stream, and its errors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, Protocol

from worker.simulator.answers import Saying
from worker.simulator.limits import Level

_DONE = b"data: [DONE]\n\n"


class Spoken(NamedTuple):
    """One answer to be written down: by which model, under which id, at which Unix second."""

    saying: Saying
    model: str
    identity: str
    created: int

    def pieces(self) -> list[str]:
        """Its text, word by word."""
        return re.findall(r"\s*\S+|\s+$", self.saying.content)


class Dialect(Protocol):
    def asked(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """The request in OpenAI's words, as far as an answer depends on it."""
        ...

    def answer(self, spoken: Spoken) -> dict[str, Any]: ...

    def nothing(self, spoken: Spoken) -> dict[str, Any]:
        """An answer with nothing in it."""
        ...

    def events(self, spoken: Spoken) -> list[bytes]:
        """The answer streamed: what comes first has no word of it, the last but one says that it is over."""
        ...

    def no_events(self, spoken: Spoken) -> list[bytes]: ...

    def error(self, status: int, code: str | None, kind: str | None, message: str) -> dict[str, Any]: ...

    def error_event(self, error: dict[str, Any]) -> bytes: ...

    def room(self, levels: Mapping[str, Level], now: float) -> dict[str, str]:
        """Headers that say what is left of each limit, by `requests` and `tokens`. `now` is Unix time."""
        ...


class OpenAIDialect:
    _ERRORS: Mapping[int, tuple[str, str]] = {  # status: (error.code, error.type)
        400: ("invalid_value", "invalid_request_error"),
        401: ("invalid_api_key", "invalid_request_error"),
        402: ("insufficient_quota", "insufficient_quota"),
        403: ("permission_denied", "invalid_request_error"),
        404: ("model_not_found", "invalid_request_error"),
        408: ("request_timeout", "timeout"),
        429: ("rate_limit_exceeded", "requests"),
        503: ("overloaded", "server_error"),
        529: ("overloaded", "overloaded_error"),
    }

    def asked(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        return body

    def answer(self, spoken: Spoken) -> dict[str, Any]:
        message = {"role": "assistant", "content": spoken.saying.content, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": spoken.saying.finish_reason}
        return {**self.nothing(spoken), "choices": [choice]}

    def nothing(self, spoken: Spoken) -> dict[str, Any]:
        body = {"id": f"chatcmpl-{spoken.identity}", "object": "chat.completion", "created": spoken.created, "model": spoken.model}
        return {**body, "choices": [], "usage": _openai_usage(spoken.saying)}

    def events(self, spoken: Spoken) -> list[bytes]:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": piece} for piece in spoken.pieces())]
        said = [self._chunk(spoken, [{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
        ended = self._chunk(spoken, [{"index": 0, "delta": {}, "finish_reason": spoken.saying.finish_reason}])
        return [*said, ended, *self.no_events(spoken)]

    def no_events(self, spoken: Spoken) -> list[bytes]:
        return [self._chunk(spoken, [], usage=_openai_usage(spoken.saying)), _DONE]

    def error(self, status: int, code: str | None, kind: str | None, message: str) -> dict[str, Any]:
        usual_code, usual_kind = self._ERRORS.get(status, ("server_error", "server_error"))
        return {"error": {"message": message, "type": kind or usual_kind, "param": None, "code": code or usual_code}}

    def error_event(self, error: dict[str, Any]) -> bytes:
        return _event(error)

    def room(self, levels: Mapping[str, Level], now: float) -> dict[str, str]:
        found = {}
        for name, level in levels.items():
            found[f"x-ratelimit-limit-{name}"] = str(level.limit)
            found[f"x-ratelimit-remaining-{name}"] = str(level.remaining)
            found[f"x-ratelimit-reset-{name}"] = f"{level.full_in_s:.3f}s"
        return found

    def _chunk(self, spoken: Spoken, choices: list[Any], *, usage: Any = None) -> bytes:
        kind = {"object": "chat.completion.chunk", "choices": choices, "usage": usage}
        return _event({**self.nothing(spoken), **kind})


class AnthropicDialect:
    _ERRORS: Mapping[int, str] = {  # status: error.type
        400: "invalid_request_error",
        401: "authentication_error",
        402: "billing_error",
        403: "permission_error",
        404: "not_found_error",
        413: "request_too_large",
        429: "rate_limit_error",
        504: "timeout_error",
        529: "overloaded_error",
    }
    _STOPS: Mapping[str, str] = {"stop": "end_turn", "length": "max_tokens"}

    def asked(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        output = body.get("output_config") or {}
        system = [{"role": "system", "content": body["system"]}] if body.get("system") else []
        asked = {"messages": [*system, *body["messages"]], "max_tokens": body["max_tokens"]}
        return {**asked, "response_format": output["format"]} if output.get("format") else asked

    def answer(self, spoken: Spoken) -> dict[str, Any]:
        return {**self.nothing(spoken), "content": [{"type": "text", "text": spoken.saying.content}]}

    def nothing(self, spoken: Spoken) -> dict[str, Any]:
        saying = spoken.saying
        usage = {"input_tokens": saying.input_tokens, "output_tokens": saying.output_tokens}
        body = {"id": f"msg_{spoken.identity}", "type": "message", "role": "assistant", "model": spoken.model, "content": []}
        return {**body, "stop_reason": self._STOPS[saying.finish_reason], "stop_sequence": None, "usage": usage}

    def events(self, spoken: Spoken) -> list[bytes]:
        start, *ending = self.no_events(spoken)
        block = {"index": 0, "content_block": {"type": "text", "text": ""}}
        said = [_named("content_block_delta", {"index": 0, "delta": {"type": "text_delta", "text": piece}}) for piece in spoken.pieces()]
        opened, closed = _named("content_block_start", block), _named("content_block_stop", {"index": 0})
        return [start + opened + _named("ping", {}), *said, closed, *ending]

    def no_events(self, spoken: Spoken) -> list[bytes]:
        message = self.nothing(spoken)
        begun = {**message, "stop_reason": None, "usage": {**message["usage"], "output_tokens": 1}}
        delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
        ended = {"delta": delta, "usage": {"output_tokens": spoken.saying.output_tokens}}
        return [_named("message_start", {"message": begun}), _named("message_delta", ended), _named("message_stop", {})]

    def error(self, status: int, code: str | None, kind: str | None, message: str) -> dict[str, Any]:
        error = {"type": kind or code or self._ERRORS.get(status, "api_error"), "message": message}
        return {"type": "error", "error": error, "request_id": "req_simulated"}

    def error_event(self, error: dict[str, Any]) -> bytes:
        return _named("error", error)

    def room(self, levels: Mapping[str, Level], now: float) -> dict[str, str]:
        found = {}
        for name, level in levels.items():
            full_at = datetime.fromtimestamp(now + level.full_in_s, UTC).isoformat(timespec="milliseconds")
            found[f"anthropic-ratelimit-{name}-limit"] = str(level.limit)
            found[f"anthropic-ratelimit-{name}-remaining"] = str(level.remaining)
            found[f"anthropic-ratelimit-{name}-reset"] = full_at.replace("+00:00", "Z")
        return found


def _openai_usage(saying: Saying) -> dict[str, int]:
    total = saying.input_tokens + saying.output_tokens
    return {"prompt_tokens": saying.input_tokens, "completion_tokens": saying.output_tokens, "total_tokens": total}


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: %s\n\n" % json.dumps(body).encode()


def _named(name: str, body: Mapping[str, Any]) -> bytes:
    return b"event: %s\n" % name.encode() + _event({"type": name, **body})
