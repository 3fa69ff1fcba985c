"""What a simulated model says: short, plausible, the same for the same seed and request."""

from __future__ import annotations

import json
from collections.abc import Mapping
from hashlib import blake2b
from itertools import islice
from typing import Any, NamedTuple

from worker.simulator.fitting import fit, words

_OPENINGS = (
    "Thank you for the report about {}.",
    "We have looked into {}.",
    "This is about {}.",
    "Your ticket on {} is with us.",
)
_ADVICE = (
    "Please sign out, restart the device and try once more",
    "The access has to be approved by the owner of the service first",
    "A technician will set this up during the next working day",
    "The known fix is to clear the stored password and enter it again",
    "We need the asset number and a screenshot to go on",
)
_CLOSINGS = (
    "Let us know if it comes back.",
    "No further step is needed on your side.",
    "We keep this open until you confirm.",
)


class Saying(NamedTuple):
    """Tokens are counted as 4 characters each, rounded up; a message weighs 4 more. `finish_reason`: stop or length."""

    content: str
    finish_reason: str
    input_tokens: int
    output_tokens: int


def say(seed: int, ask: Mapping[str, Any]) -> Saying:
    """The answer to a chat request, JSON that fits when it has a `response_format`; `max_tokens` cuts either short."""
    texts = [_text(message) for message in ask["messages"]]
    asked = [text for text, message in zip(texts, ask["messages"], strict=True) if message.get("role") == "user"]
    ticket = asked[-1] if asked else ""
    sentence = _sentence(seed, ticket)
    response_format = ask.get("response_format")
    if isinstance(response_format, Mapping) and response_format.get("type") in ("json_schema", "json_object"):
        value = fit(_schema(response_format), ticket=ticket, sentence=sentence, seed=seed)
        sentence = json.dumps(value, ensure_ascii=False)
    limit = ask.get("max_completion_tokens", ask.get("max_tokens"))
    content, finish_reason = sentence, "stop"
    if isinstance(limit, int) and count_tokens(sentence) > limit:
        content, finish_reason = sentence[: 4 * limit], "length"
    return Saying(content, finish_reason, sum(4 + count_tokens(text) for text in texts), count_tokens(content))


def count_tokens(text: str) -> int:
    return (len(text) + 3) // 4


def _text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(content or "")


def _schema(response_format: Mapping[str, Any]) -> Any:
    """As OpenAI nests it, or beside `type` as others do; plain `json_object` becomes one field."""
    nested = response_format.get("json_schema", response_format)
    schema = nested.get("schema") if isinstance(nested, Mapping) else None
    return schema if schema is not None else {"type": "object", "properties": {"answer": {"type": "string"}}}


def _sentence(seed: int, ticket: str) -> str:
    digest = blake2b(f"{seed}/{ticket}".encode(errors="replace"), digest_size=3).digest()
    topic = " ".join(islice(words(ticket[:300]), 6)).lower() or "your request"
    opening, advice, closing = (options[byte % len(options)] for options, byte in zip((_OPENINGS, _ADVICE, _CLOSINGS), digest, strict=True))
    return f"{opening.format(topic)} {advice}. {closing}"
