"""A chat completion as the stream OpenAI would have sent, all of it at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

COMMENT = ": waiting\n\n"  # nothing to an SSE reader, a sign of life to a proxy


class EventStream(StreamingResponse):
    """Server-sent events from whoever listens for the client's hanging up itself: only one can."""

    media_type = "text/event-stream"

    def __init__(self, content: Any, headers: Mapping[str, str]) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


def event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def events(completion: Mapping[str, Any], *, usage: bool) -> Iterator[str]:
    """What it says in one chunk, its finish reason in another, with `usage` what it used in a third, and the end."""
    for chunk in _chunks(completion, usage=usage):
        yield event(chunk)
    yield "data: [DONE]\n\n"


def _chunks(completion: Mapping[str, Any], *, usage: bool) -> Iterator[dict[str, Any]]:
    head = {name: completion[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    if usage:
        head["usage"] = None
    (choice,) = completion["choices"]
    said = dict(choice["message"])
    if "tool_calls" in said:
        said["tool_calls"] = [{"index": position, **call} for position, call in enumerate(said["tool_calls"])]
    yield head | {"choices": [{"index": 0, "delta": said, "logprobs": None, "finish_reason": None}]}
    end = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}
    yield head | {"choices": [end], "backstop": completion["backstop"]}
    if usage:
        yield head | {"choices": [], "usage": completion["usage"]}
