"""The Anthropic Messages dialect: POST {base_url}/messages, and what comes back as a `Reply`."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import httpx

from worker.config import ProviderConfig
from worker.job import ChatRequest
from worker.providers.anthropic_answers import read_reply
from worker.providers.anthropic_request import Unsupported, translated, wants_json
from worker.providers.anthropic_stream import MessageAssembly
from worker.providers.counted import counted
from worker.providers.exchange import Exchange, checked, encode
from worker.providers.provider import Reply
from worker.providers.stream import Stream
from worker.signals import Signal

VERSION = "2023-06-01"
_SAMPLING = ("temperature", "top_p", "top_k")


class AnthropicMessages:
    """One endpoint of that dialect. Implements `worker.providers.provider.Provider`.

    `http` comes from `worker.providers.http.client` and is shared. `key` goes into `x-api-key` only.
    Raises UsageError when the key cannot stand in a header.
    """

    def __init__(self, name: str, config: ProviderConfig, http: httpx.AsyncClient, *, key: str | None) -> None:
        headers = {"anthropic-version": VERSION, **({"x-api-key": key} if key and checked(name, key) else {})}
        self.name = name
        self.model = config.model
        self._config = config
        self._exchange = Exchange(f"{config.base_url}/messages", config, http, headers)
        self._refused: frozenset[str] = frozenset()  # sampling parameters that this model does not take

    async def complete(self, request: ChatRequest, *, timeout_s: float, call_id: str) -> Reply:
        """See `Provider.complete`. TIMED_OUT whenever `timeout_s` ran out, even if shorter than the config's.

        Nothing is sent of a request that this API has no words for. A sampling parameter that the model refuses (all of them,
        from Opus 4.7 on) ends in CONFLICT once, which is worth a retry: from then on it is left out.
        """
        try:
            asked = translated(request, self.model)
        except Unsupported as lack:
            return Reply(signal=Signal.UNSUPPORTED, error_code=f"unsupported_{lack.what}")
        except (AttributeError, LookupError, TypeError, ValueError, RecursionError):
            return Reply(signal=Signal.UNSUPPORTED, error_code="unsupported_shape")
        sent = {name: value for name, value in asked.items() if name not in self._refused}
        try:
            body = encode({**sent, "stream": True} if self._config.stream else sent).encode()
        except (ValueError, TypeError, RecursionError):  # lone surrogates, NaN, sets, circles
            return Reply(signal=Signal.INVALID_REQUEST, error_code="not_encodable")
        stream = Stream(MessageAssembly(), self._config) if self._config.stream else None
        read = partial(self._read, sent)
        reply = await self._exchange.ask(body, timeout_s=timeout_s, call_id=call_id, read=read, stream=stream)
        reply = counted(reply, request)
        return _held(reply) if wants_json(request) else reply

    def _read(self, sent: Mapping[str, Any], status: int, headers: Mapping[str, str], content: bytes) -> Reply:
        refused = {name for name in _SAMPLING if name in sent and _refuses(status, content, name)}
        if refused:
            self._refused |= refused
            return Reply(signal=Signal.CONFLICT, http_status=status, error_code=f"refused_{min(refused)}")
        return read_reply(status, headers, content, provider=self.name, model=self.model, now=time.time())


def _refuses(status: int, content: bytes, name: str) -> bool:
    """ "`temperature` is deprecated for this model." """
    return status == 400 and b"`%s`" % name.encode() in content and b"for this model" in content


def _held(reply: Reply) -> Reply:
    """The reply to who asked for a JSON object: UNFIT when the answer is none."""
    if reply.answer is None or reply.answer.tool_calls:
        return reply
    try:
        fits = isinstance(json.loads(reply.answer.content or ""), dict)
    except (ValueError, RecursionError):
        fits = False
    if fits:
        return reply
    return Reply(
        signal=Signal.UNFIT, usage=reply.usage, http_status=reply.http_status, error_code="not_json", first_token_s=reply.first_token_s
    )
