"""The text of a file, line by line whatever its size. Compression and encoding are found out from its first 512 KiB."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import sys
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import BinaryIO, NoReturn, cast

from worker.errors import NotFound, UsageError

CHUNK_BYTES = 1 << 19
MOST_CHARS = 1 << 24  # of a field or a line; beyond it a closing quote is missing, or this is no table
UNSTORABLE = re.compile("[\x00\ud800-\udfff]")  # what Postgres refuses in text and JSON

MOST_SHOWN = 200  # characters of a word that is said back

_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_LEGACY = [
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp932", "euc_jp", "gb18030", "big5", "cp949",
]  # fmt: skip


def cut(word: str) -> str:
    """So much of a word that was not expected as can be said back."""
    return UNSTORABLE.sub("\ufffd", word[:MOST_SHOWN])


@dataclass(slots=True)
class Place:
    """The row being read, for messages. Row 0 is the header."""

    name: str
    row: int = 0

    def __str__(self) -> str:
        return f"{self.name}, row {self.row}" if self.row else f"{self.name}, header"


class TextFile:
    """An open file: iterate it once for its lines, which keep their ends (LF, CRLF or CR).

    `path` is `-` for stdin; gzip is known by its first bytes. `sample` is the beginning of the text, for finding out
    what it is. `replaced` grows while reading: characters that cannot be stored (NUL, lone surrogates) become U+FFFD.
    Raises NotFound, or UsageError naming the row, the byte and what to do.
    """

    def __init__(self, path: str, opened: ExitStack) -> None:
        self.place = Place("stdin" if path == "-" else path)
        self.replaced = 0
        self._chunks = _chunks(_stream(path, opened), self.place)
        beginning = next(self._chunks, b"")
        self.encoding, mark_bytes = _encoding(self.place.name, beginning)
        self._offset = mark_bytes
        self._beginning = beginning[mark_bytes:]
        self.sample = self._beginning.decode(self.encoding, "replace")

    def __iter__(self) -> Iterator[str]:
        # Not str.splitlines, which would also break lines at U+2028 and others.
        rest = ""
        for text in self._texts():
            lines = list(io.StringIO(rest + text, newline=""))
            rest = lines.pop() if lines and not lines[-1].endswith("\n") else ""
            yield from lines
            if len(rest) > MOST_CHARS:
                raise UsageError(f"{self.place}: a line of over {MOST_CHARS} characters: is this a file of tickets?")
        if rest:
            yield rest

    def clean(self, text: str) -> str:
        text, replaced = UNSTORABLE.subn("\ufffd", text)
        self.replaced += replaced
        return text

    def _texts(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder(self.encoding)("surrogatepass")
        try:
            for chunk in chain([self._beginning], self._chunks):
                self._offset += len(chunk)
                yield self.clean(decoder.decode(chunk))
            yield self.clean(decoder.decode(b"", True))
        except UnicodeDecodeError as error:
            # What stands before the bad byte is given out first, so that `place` has moved to the row that holds it.
            yield self.clean(error.object[: error.start].decode(self.encoding, "surrogatepass"))
            self._refuse(error)

    def _refuse(self, error: UnicodeDecodeError) -> NoReturn:
        offset = self._offset - len(error.object) + error.start
        guess = _guess(error.object, error.start) or "ENCODING"
        raise UsageError(
            f"{self.place}: byte 0x{error.object[error.start]:02X} at offset {offset} is not {self.encoding}, as the "
            f"file began: mend it, or convert the file (iconv -f {guess} -t UTF-8)"
        )


def _stream(path: str, opened: ExitStack) -> BinaryIO | gzip.GzipFile:
    try:
        raw = sys.stdin.buffer if path == "-" else opened.enter_context(open(path, "rb"))  # noqa: SIM115
    except FileNotFoundError:
        raise NotFound(f"no file {path}: check the name, or give - to read from stdin") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    gzipped = cast(io.BufferedReader, raw).peek(2).startswith(b"\x1f\x8b")
    return opened.enter_context(gzip.GzipFile(fileobj=raw)) if gzipped else raw


def _chunks(stream: BinaryIO | gzip.GzipFile, place: Place) -> Iterator[bytes]:
    try:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UsageError(f"{place}: the gzip file is damaged or cut short here: make it again") from None
    except OSError as error:
        raise UsageError(f"{place}: cannot be read any further: {error.strerror}") from None


def _encoding(name: str, sample: bytes) -> tuple[str, int]:
    """The encoding, and how many bytes its mark takes."""
    for mark, encoding in _BOMS:
        if sample.startswith(mark):
            return encoding, len(mark)
    if sample.startswith(b"PK\x03\x04"):
        raise UsageError(f"{name} is an Excel workbook or a zip archive: save the sheet as CSV (UTF-8)")
    if sample.count(0) > len(sample) // 4:  # UTF-16 without a mark: mostly ASCII, each with a zero byte
        return ("utf-16-le" if sample[1::2].count(0) > sample[::2].count(0) else "utf-16-be"), 0
    try:
        codecs.getincrementaldecoder("utf-8")("surrogatepass").decode(sample, len(sample) < CHUNK_BYTES)
    except UnicodeDecodeError as error:
        return _other_encoding(name, sample, error.start), 0
    return "utf-8", 0


def _other_encoding(name: str, sample: bytes, bad: int) -> str:
    lenient = sample.decode("utf-8", "replace")
    broken = lenient.count("\ufffd")
    good = sum(char > "\x7f" for char in lenient) - broken
    if good and good >= broken:
        return "utf-8"  # no fewer good characters than bad ones: damaged UTF-8, which reading on will name
    guess = None if 0 in sample else _guess(sample, bad)
    if guess is None:
        raise UsageError(f"{name} is not text in an encoding known here: save it as CSV (UTF-8)")
    return guess


def _guess(data: bytes, bad: int) -> str | None:
    from charset_normalizer import from_bytes  # slow to import, seldom needed

    start = data.rfind(b"\n", 0, max(0, bad - 16_384)) + 1
    end = data.rfind(b"\n", bad, bad + 32_768) + 1 or bad + 32_768
    matches = list(from_bytes(data[start:end], cp_isolation=_LEGACY))  # best first
    if not matches:
        return None
    tied = [m for m in matches if (m.chaos, m.coherence) == (matches[0].chaos, matches[0].coherence)]
    likely = {name for match in tied for name in match.could_be_from_charset}
    return "cp1252" if "cp1252" in likely else matches[0].encoding  # Western text is the most usual
