"""One exchange with a vendor over HTTP: a request leaves, and whatever comes back, or does not, is a `Reply`."""

from __future__ import annotations

import asyncio
import errno
import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing

import aiohttp
import httpx

from worker import __version__
from worker.config import ProviderConfig
from worker.errors import UsageError
from worker.providers.provider import Read, Reply
from worker.providers.stream import Stream
from worker.signals import Signal

MOST_BODY_BYTES = 8 * 2**20  # as sent, and again as unpacked
_PIECE_BYTES = 2**16
_PAST_AIOHTTPS_LIMIT_BYTES = 2**20  # aiohttp warns of larger bodies in one piece
# What the kernel says when no host had a say: see `reach`.
_BY_ERRNO = {
    **dict.fromkeys((errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.EADDRNOTAVAIL), "out_of_sockets"),
    **dict.fromkeys((errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN), "no_route"),
}
_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, aiohttp.ClientHttpProxyError)

encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


class Exchange:
    """The way to one endpoint: its URL, the headers every request carries, and how long connecting may take.

    `http` comes from `worker.providers.http.client` and is shared.
    """

    def __init__(self, url: str, config: ProviderConfig, http: httpx.AsyncClient, headers: Mapping[str, str]) -> None:
        self._http = http
        self._url = httpx.URL(url)
        self._headers = [
            (b"Host", self._url.netloc),
            (b"Content-Type", b"application/json"),
            (b"Accept", b"text/event-stream" if config.stream else b"application/json"),
            (b"Accept-Encoding", b"identity" if config.stream else b"gzip, deflate"),
            (b"User-Agent", f"backstop/{__version__}".encode()),
            *((name.encode(), value.encode()) for name, value in headers.items()),
        ]
        limit_s = config.connect_timeout_s
        self._extensions = {"timeout": {"pool": limit_s, "connect": limit_s, "read": None, "write": None}}

    async def ask(self, body: bytes, *, timeout_s: float, call_id: str, read: Read, stream: Stream | None = None) -> Reply:
        """What `read` makes of status, headers and body; of a streamed answer, of the body it would have had unstreamed.

        TIMED_OUT whenever `timeout_s` ran out, even if shorter than the config's, or when the stream kept silent too long.
        The connection is closed at once when the call is cancelled.
        """
        ends_at = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(stream.opens(ends_at - timeout_s, ends_at) if stream else ends_at) as limit:
                response = await self._http.send(self._request(body, call_id), stream=True)
                try:
                    if stream and _is_event_stream(response):
                        async with aclosing(_pieces(response)) as pieces:
                            await stream.listen(response.status_code, response.headers, pieces, limit)
                        return stream.reply(read)
                    limit.reschedule(ends_at)
                    content = await _whole(response)
                finally:
                    await response.aclose()
        except TimeoutError:
            silent = stream is not None and limit.when() != ends_at
            fault = Reply(signal=Signal.TIMED_OUT, error_code=stream.silence() if stream and silent else None)
            return stream.lost(read, fault) if stream else fault
        except (httpx.HTTPError, aiohttp.ClientError, OSError) as error:
            fault = _transport_fault(error)
            return stream.lost(read, fault) if stream else fault
        if content is None and response.status_code < 300:
            return Reply(signal=Signal.MALFORMED, http_status=response.status_code, error_code="body_too_large")
        return read(response.status_code, response.headers, content or b"")

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


def checked(name: str, key: str | None) -> str | None:
    """The key of that provider. Raises UsageError when it cannot stand in a header."""
    if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key):
        raise UsageError(f"providers.{name}.api_key: its value has outer spaces, line breaks or non-ASCII in it")
    return key


class _Pieces(httpx.AsyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = memoryview(body)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._body), _PIECE_BYTES):
            yield bytes(self._body[start : start + _PIECE_BYTES])


async def _whole(response: httpx.Response) -> bytes | None:
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


def _is_event_stream(response: httpx.Response) -> bool:
    kind: str = response.headers.get("content-type", "")
    return response.status_code < 300 and kind.lstrip().lower().startswith("text/event-stream")


async def _pieces(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The body as it comes in; unpacked, should the vendor pack it although it was asked not to."""
    packed = zlib.decompressobj(47) if response.headers.get("content-encoding", "identity") != "identity" else None
    async for piece in response.aiter_raw():
        try:
            yield packed.decompress(piece, MOST_BODY_BYTES) if packed else piece
        except zlib.error:
            return


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
    refused = _BY_ERRNO.get(cause.errno or 0, "refused") if isinstance(cause, OSError) else "refused"
    return next((code for kind, code in codes.items() if isinstance(cause, kind)), refused)
