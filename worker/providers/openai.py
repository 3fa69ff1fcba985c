"""The OpenAI-compatible dialect: POST {base_url}/chat/completions, and what comes back as a `Reply`."""

from __future__ import annotations

import time
from collections.abc import Mapping

import httpx

from worker.config import ProviderConfig
from worker.job import ChatRequest
from worker.providers.counted import counted
from worker.providers.exchange import Exchange, checked, encode
from worker.providers.openai_answers import read_reply
from worker.providers.openai_stream import CompletionAssembly
from worker.providers.provider import Reply
from worker.providers.stream import Stream
from worker.signals import Signal

_OURS = frozenset({"stream", "stream_options"})  # the config says whether an answer is streamed


class OpenAICompatible:
    """One endpoint of that dialect. Implements `worker.providers.provider.Provider`.

    `http` comes from `worker.providers.http.client` and is shared. `key` goes into `Authorization` only. At Azure that is taken at
    https://NAME.openai.azure.com/openai/v1 with the deployment as the model; the older URLs, with `api-version`, are not spoken.
    Raises UsageError when the key cannot stand in a header.
    """

    def __init__(self, name: str, config: ProviderConfig, http: httpx.AsyncClient, *, key: str | None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if checked(name, key) else {}
        self.name = name
        self.model = config.model
        self._config = config
        self._exchange = Exchange(f"{config.base_url}/chat/completions", config, http, headers)
        self._wants_usage = config.stream  # a stream names it only when it is asked to

    async def complete(self, request: ChatRequest, *, timeout_s: float, call_id: str) -> Reply:
        """See `Provider.complete`. TIMED_OUT whenever `timeout_s` ran out, even if shorter than the config's."""
        try:
            body = self._body(request)
        except (ValueError, TypeError, RecursionError):  # lone surrogates, NaN, sets, circles
            return Reply(signal=Signal.INVALID_REQUEST, error_code="not_encodable")
        stream = Stream(CompletionAssembly(), self._config) if self._config.stream else None
        reply = await self._exchange.ask(body, timeout_s=timeout_s, call_id=call_id, read=self._read, stream=stream)
        return counted(reply, request)

    def _body(self, request: ChatRequest) -> bytes:
        parameters = {name: value for name, value in request.parameters.items() if name not in _OURS}
        if self._config.stream:
            parameters["stream"] = True
        if self._wants_usage:
            parameters["stream_options"] = {"include_usage": True}
        return encode({**parameters, "model": self.model, "messages": request.messages}).encode()

    def _read(self, status: int, headers: Mapping[str, str], content: bytes) -> Reply:
        if self._wants_usage and status in (400, 422) and b"stream_options" in content:
            self._wants_usage = False  # a vendor that does not know it is asked without, from the retry on
            return Reply(signal=Signal.CONFLICT, http_status=status, error_code="stream_options")
        return read_reply(status, headers, content, provider=self.name, model=self.model, now=time.time())
