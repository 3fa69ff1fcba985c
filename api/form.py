"""A multipart form with one file in it, read as it comes in: the file's bytes are handed on, never kept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.openai_errors import OpenAIError
from worker.textfile import UNSTORABLE

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MOST_FIELDS = 20
_LONGEST_FIELD = 1024  # bytes
_LONGEST_NAME = 255  # characters


class FileForm:
    """Fed with the body as it arrives. `fields` may stand before or behind the file; of two of a name the last counts.

    Raises OpenAIError for a body that is no such form.
    """

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise _unusable("send the file as multipart/form-data, with a field `purpose`")
        callbacks: MultipartCallbacks = {
            "on_part_begin": self._part_begins,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_ends,
            "on_headers_finished": self._headers_end,
            "on_part_data": self._part_goes_on,
            "on_part_end": self._part_ends,
            "on_end": self._ends,
        }
        try:
            self._parser = MultipartParser(options[b"boundary"], callbacks)
        except FormParserError:
            raise _unusable("the boundary of the form is too long") from None
        self._complete = False
        self._parts = 0
        self._of_file = bytearray()  # of what was fed last
        self._name = self._filename = ""
        self._is_file = False
        self.fields: dict[str, str] = {}
        self.filename: str | None = None

    def feed(self, data: bytes) -> bytes:
        """So much of the file as stands in this part of the body."""
        try:
            self._parser.write(data)
        except FormParserError:
            raise _unusable("the body is no multipart form") from None
        content, self._of_file = bytes(self._of_file), bytearray()
        return content

    def end(self) -> str:
        """The file's name, once the body is over."""
        if not self._complete:
            raise _unusable("the form breaks off before its end: send it again")
        if self.filename is None:
            raise _unusable("file: missing", "file")
        return self.filename

    def _part_begins(self) -> None:
        self._parts += 1
        if self._parts > _MOST_FIELDS:
            raise _unusable(f"the form has more than {_MOST_FIELDS} parts")
        self._headers: dict[bytes, bytes] = {}
        self._header, self._value, self._field = bytearray(), bytearray(), bytearray()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_ends(self) -> None:
        self._headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_end(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = _plain(options.get(b"name", b""))
        self._is_file = b"filename" in options
        if self._is_file != (self._name == "file") or (self._is_file and self.filename is not None):
            raise _unusable("expected one file, in the field `file`, with a filename", "file")
        if self._is_file:
            self.filename = _plain(options[b"filename"]) or "upload"

    def _part_goes_on(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._of_file += data[start:end]
            return
        self._field += data[start:end]
        if len(self._field) > _LONGEST_FIELD:
            raise _unusable(f"{self._name}: longer than {_LONGEST_FIELD} bytes", self._name)

    def _part_ends(self) -> None:
        if not self._is_file:
            self.fields[self._name] = self._field.decode("utf-8", "replace")

    def _ends(self) -> None:
        self._complete = True


def _plain(given: bytes) -> str:
    return UNSTORABLE.sub("\ufffd", given.decode("utf-8", "replace"))[:_LONGEST_NAME]


def _unusable(message: str, param: str | None = None) -> OpenAIError:
    return OpenAIError(400, message, param=param)
