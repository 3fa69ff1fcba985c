"""Tickets in: CSV, TSV, JSONL or OpenAI batch lines, read row by row. What the file is, its beginning says."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal, NoReturn

from worker.errors import UsageError
from worker.textfile import MOST_CHARS, UNSTORABLE, Place, TextFile, cut

_DELIMITERS = ",;\t|"

Kind = Literal["csv", "tsv", "jsonl", "openai"]


@dataclass(frozen=True, slots=True)
class Ticket:
    """One row. `row` counts from 1 after the header, blank rows included, so that it is the place in the file.

    `problem` says why this row cannot be used (it ends as failed for that reason; `values` is what could be read).
    `line` is the whole object of an OpenAI batch line, for `batchlines.parse`; `values` is empty then.
    """

    row: int
    values: dict[str, str]
    problem: str | None = None
    line: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Counts:
    """Tickets given out, blank rows skipped, characters that cannot be stored replaced by U+FFFD.

    `batchlines.chat_request` replaces those inside OpenAI batch lines; they are not counted here.
    """

    rows: int
    empty: int
    replaced: int


class Source:
    """An open file of tickets: iterate it once, inside `with`. It holds one chunk and one row in memory.

    `columns`: the header of a table; the keys in the first 512 KiB of JSONL, in order; None for OpenAI batch lines.
    Reading on raises UsageError naming the row where a byte does not fit the encoding or a quote is never closed.
    """

    def __init__(self, text: TextFile, opened: ExitStack) -> None:
        self._text, self._opened = text, opened
        self._rows = self._empty = 0
        self.name, self.encoding = text.place.name, text.encoding
        self.kind: Kind = _kind(self.name, text.sample)
        self.delimiter: str | None = None
        self.columns: list[str] | None
        if self.kind == "csv":
            self.delimiter = _delimiter(text.sample)
            self.kind = "tsv" if self.delimiter == "\t" else "csv"
            records = _records(text, self.delimiter, text.place)
            self.columns = _header(records, text.place)
            self._read = _table(records, self.columns, text.place)
        else:
            self.columns = _keys(text.sample) if self.kind == "jsonl" else None
            self._read = _json_lines(text, self.kind)

    @property
    def counts(self) -> Counts:
        """Up to the row reached; final after the last one."""
        return Counts(self._rows, self._empty, self._text.replaced)

    def __iter__(self) -> Iterator[Ticket]:
        place = self._text.place
        place.row = 1
        for ticket in self._read:
            if ticket is None:
                self._empty += 1
            else:
                self._rows += 1
                yield ticket
            place.row += 1

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


def open_tickets(path: str) -> Source:
    """The tickets of the file at `path`, `-` for stdin, gzipped or not; use it in `with`.

    Raises NotFound, or UsageError for what cannot be read, is empty, is no text, or has a header that cannot be used.
    """
    opened = ExitStack()
    try:
        return Source(TextFile(path, opened), opened)
    except BaseException:
        opened.close()
        raise


def _kind(name: str, text: str) -> Kind:
    """`csv` stands for any table."""
    start = text.lstrip()
    if not start:
        raise UsageError(f"{name} is empty: expected a header line and one ticket a row, or one JSON object a line")
    if re.search(r"\.(csv|tsv)(\.gz)?$", name, re.IGNORECASE):
        return "csv"
    if re.match(r"\[\s*[\[{]|\{\s*\n", start):
        raise UsageError(f"{name} is one JSON document: write one object a line (jq -c '.[]' does it for an array)")
    if start[0] != "{" and not re.search(r"\.(jsonl|ndjson)(\.gz)?$", name, re.IGNORECASE):
        return "csv"
    first = next(_objects(text), {})
    return "openai" if {"custom_id", "body"} <= first.keys() else "jsonl"


def _delimiter(text: str) -> str:
    """The delimiter that gives most rows as many fields as the header; a comma when none divides the header."""
    beginning = text.lstrip("\r\n")[:65_536]

    def score(delimiter: str) -> tuple[float, int]:
        widths = []
        with suppress(UsageError):  # of a row that is cut off inside quotes
            for record, fault in islice(_records(io.StringIO(beginning, newline=""), delimiter, Place("")), 100):
                if record or fault:
                    widths.append(len(record))
        if not widths or widths[0] < 2:
            return 0.0, 0
        whole = widths[:-1] if len(widths) > 2 else widths  # the last may be cut off
        return whole.count(whole[0]) / len(whole), whole[0]

    return max(_DELIMITERS, key=score)


def _records(lines: Iterable[str], delimiter: str, place: Place) -> Iterator[tuple[list[str], str | None]]:
    """Fields of each record, or what is wrong with it. Strict: else the reader mends quotes by silent guesses."""
    csv.field_size_limit(MOST_CHARS)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        began = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "field larger" in str(error):
                raise UsageError(
                    f'{place}: a field of over {MOST_CHARS} characters begins in line {began} or after: is a quote (") never closed?'
                ) from None
            if "unexpected end" in str(error):
                raise UsageError(
                    f'{place}: a quote (") that opens in line {began} or after is never closed: close it, '
                    'or double it ("") where it is meant as text'
                ) from None
            yield [], f'broken quoting from line {began} on: a quote (") inside a quoted field must be doubled ("")'
        else:
            yield record, None


def _header(records: Iterator[tuple[list[str], str | None]], place: Place) -> list[str]:
    """Names without blanks around them; a column without a name is `column N`."""
    record, fault = next((r for r in records if r[1] or any(map(str.strip, r[0]))), ([], "there are no names"))
    if fault:
        raise UsageError(f"{place}: {fault}")
    columns = [name.strip() or f"column {number}" for number, name in enumerate(record, 1)]
    twice = [repr(name) for name, times in Counter(columns).items() if times > 1]
    if twice:
        raise UsageError(f"{place}: {', '.join(twice)} stands there more than once: rename, so that all columns differ")
    return columns


def _table(records: Iterator[tuple[list[str], str | None]], columns: list[str], place: Place) -> Iterator[Ticket | None]:
    for record, fault in records:
        if not fault and not any(map(str.strip, record)):
            yield None
            continue
        if not fault and len(record) != len(columns):
            fault = f"expected {len(columns)} fields as in the header, found {len(record)}"
        yield Ticket(place.row, dict(zip(columns, record, strict=False)), fault)


def _json_lines(text: TextFile, kind: Kind) -> Iterator[Ticket | None]:
    for line in text:
        try:
            body = json_object(line) if line.strip() else {}
        except ValueError as error:
            yield Ticket(text.place.row, {}, str(error))
            continue
        if kind == "openai":
            yield Ticket(text.place.row, {}, line=body) if body else None
            continue
        values = {text.clean(key): text.clean(_cell(value)) for key, value in body.items()}
        yield Ticket(text.place.row, values) if any(map(str.strip, values.values())) else None


def json_object(line: str) -> dict[str, Any]:
    """Raises ValueError, which shows nothing of the line."""
    try:
        body = _decode(line)
    except json.JSONDecodeError as error:
        why = error.msg.removesuffix(" at")  # some of them have one
        raise ValueError(f"not JSON: {why} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("not usable: nested too deeply") from None
    if not isinstance(body, dict):
        raise ValueError("not a JSON object")
    return body


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"not JSON: {name} is no JSON number")


def _int(digits: str) -> int:
    try:
        return int(digits)
    except ValueError:
        raise ValueError(f"not usable: a number of {len(digits)} digits") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that stands there twice, one value would be lost without a word."""
    body = dict(pairs)
    if len(body) < len(pairs):
        name = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"not usable: {cut(name)!r} stands there more than once")
    return body


_decode = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_int, object_pairs_hook=_once).decode


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _keys(sample: str) -> list[str]:
    return list(dict.fromkeys(UNSTORABLE.sub("\ufffd", key) for body in _objects(sample) for key in body))


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The objects of a sample, whose last line may be cut off."""
    for line in text.split("\n"):
        with suppress(ValueError):
            yield json_object(line)
