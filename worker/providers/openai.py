"""The OpenAI-compatible dialect: POST {base_url}/chat/completions, and what comes back as a `Reply`."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import AsyncIterator, Mapping

import aiohttp
import httpx

from worker import __version__
from worker.config import ProviderConfig
from worker.errors import UsageError
from worker.job import ChatRequest
from worker.providers.openai_answers import read_reply
from worker.providers.provider import Reply
from worker.signals import Signal

MOST_BODY_BYTES = 8 * 2**20  # as sent, and again as unpacked
_PIECE_BYTES = 2**16
_PAST_AIOHTTPS_LIMIT_BYTES = 2**20  # aiohttp warns of larger bodies in one piece

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError)
_OURS = frozenset({"stream", "stream_options"})  # answers are read whole


class OpenAICompatible:
    """One endpoint of that dialect. Implements `worker.providers.provider.Provider`.

    `http` comes from `worker.providers.http.client` and is shared. `key` goes into `Authorization` only.
    Raises UsageError when the key cannot stand in a header.
    """

    def __init__(self, name: str, config: ProviderConfig, http: httpx.AsyncClient, *, key: str | None) -> None:
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
            raise UsageError(f"providers.{name}.api_key: its value has outer spaces, line breaks or non-ASCII in it")
        self.name = name
        self.model = config.model
        self._http = http
        self._url = httpx.URL(f"{config.base_url}/chat/completions")
        self._headers = [
            (b"Host", self._url.netloc),
            (b"Content-Type", b"application/json"),
            (b"Accept", b"application/json"),
            (b"Accept-Encoding", b"gzip, deflate"),
            (b"User-Agent", f"backstop/{__version__}".encode()),
            *([(b"Authorization", f"Bearer {key}".encode())] if key else []),
        ]
        limit_s = config.connect_timeout_s
        self._extensions = {"timeout": {"pool": limit_s, "connect": limit_s, "read": None, "write": None}}

    async def complete(self, request: ChatRequest, *, timeout_s: float, call_id: str) -> Reply:
        """See `Provider.complete`. TIMED_OUT whenever `timeout_s` ran out, even if shorter than the config's."""
        try:
            body = self._body(request)
        except (ValueError, TypeError, RecursionError):  # lone surrogates, NaN, sets, circles
            return Reply(signal=Signal.INVALID_REQUEST, error_code="not_encodable")
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.send(self._request(body, call_id), stream=True)
                try:
                    content = await _read(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            return Reply(signal=Signal.TIMED_OUT)
        except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
            return _transport_fault(error)
        return self._reply(response, content)

    def _body(self, request: ChatRequest) -> bytes:
        parameters = {name: value for name, value in request.parameters.items() if name not in _OURS}
        return _encode({**parameters, "model": self.model, "messages": request.messages}).encode()

    def _request(self, body: bytes, call_id: str) -> httpx.Request:
        headers = [
            *self._headers,
            (b"X-Client-Request-Id", call_id.encode()),
            (b"Content-Length", b"%d" % len(body)),
        ]
        if len(body) > _PAST_AIOHTTPS_LIMIT_BYTES:
            pieces = _Pieces(body)
            return httpx.Request("POST", self._url, headers=headers, stream=pieces, extensions=self._extensions)
        request = httpx.Request("POST", self._url, headers=headers, content=body, extensions=self._extensions)
        request.headers.encoding = "ascii"  # as they are: httpx would guess it anew for each header it is asked for
        return request

    def _reply(self, response: httpx.Response, content: bytes | None) -> Reply:
        if content is None and response.status_code < 300:
            return Reply(signal=Signal.MALFORMED, http_status=response.status_code, error_code="body_too_large")
        return read_reply(
            response.status_code,
            response.headers,
            content or b"",
            provider=self.name,
            model=self.model,
            now=time.time(),
        )


class _Pieces(httpx.AsyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = memoryview(body)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._body), _PIECE_BYTES):
            yield bytes(self._body[start : start + _PIECE_BYTES])


async def _read(response: httpx.Response) -> bytes | None:
    """The whole body, unpacked; None when it is larger than MOST_BODY_BYTES. What cannot be unpacked stays as it is."""
    pieces: list[bytes] = []
    size = 0
    async for piece in response.aiter_raw():
        size += len(piece)
        if size > MOST_BODY_BYTES:
            return None
        pieces.append(piece)
    content = b"".join(pieces)
    return _unpacked(content) if "content-encoding" in response.headers else content


def _unpacked(content: bytes) -> bytes | None:
    try:
        # 32 + 15: gzip or zlib, whichever it is. Bounded, or 8 MiB would unpack to 8 GiB.
        unpacked = zlib.decompressobj(47).decompress(content, MOST_BODY_BYTES + 1)
    except zlib.error:
        return content
    return unpacked if len(unpacked) <= MOST_BODY_BYTES else None


def _transport_fault(error: Exception) -> Reply:
    """Never sent, or lost underway? aiohttp's error tells; httpx-aiohttp calls a lost connection a ConnectTimeout."""
    cause = error if isinstance(error, aiohttp.ClientError) else error.__cause__
    if isinstance(cause, _NEVER_SENT):
        return Reply(signal=Signal.UNREACHABLE, error_code=_connect_code(cause))
    if isinstance(cause, aiohttp.ClientPayloadError):
        return Reply(signal=Signal.DROPPED, error_code="truncated")
    if isinstance(cause, aiohttp.ClientResponseError):
        return Reply(signal=Signal.DROPPED, error_code="not_http")
    return Reply(signal=Signal.DROPPED, error_code="disconnected")


def _connect_code(cause: BaseException | None) -> str:
    codes: Mapping[type[BaseException], str] = {
        aiohttp.ConnectionTimeoutError: "connect_timeout",
        aiohttp.ClientConnectorDNSError: "dns",
        aiohttp.ClientSSLError: "tls",
        aiohttp.ClientProxyConnectionError: "proxy",
        aiohttp.ClientHttpProxyError: "proxy",
    }
    return next((code for kind, code in codes.items() if isinstance(cause, kind)), "refused")
