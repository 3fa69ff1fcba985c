"""Results out: a CSV that a spreadsheet may open, OpenAI batch output lines, and files that are whole or not there."""

from __future__ import annotations

import csv
import errno
import json
import os
import re
import secrets
import stat
from collections.abc import AsyncIterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, TextIO
from uuid import UUID

from worker.cost import Usage
from worker.errors import BackstopError, UsageError
from worker.job import Answer, JobState

COLUMNS = ("answer", "state", "provider", "model", "degraded", "cost_usd", "error")

# What spreadsheets run when a cell begins with it: https://owasp.org/www-community/attacks/CSV_Injection
_FORMULA = re.compile("[=+\\-@\t\r\n＝＋－＠]")
_NUMBER = re.compile(r"[+-]?\d+([.,]\d+)*(e[+-]?\d+)?%?", re.IGNORECASE | re.ASCII)
# Line ends to str.splitlines, not to JSON.
_LINE_ENDS = str.maketrans({"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"})
_DISK_TROUBLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportRow:
    """One job as it goes out. `row`: the ticket as it stood in the file. `error`: {"code", "message", ...}."""

    job_id: UUID
    state: str
    custom_id: str | None = None
    row: dict[str, str] | None = None
    ordinal: int | None = None
    answer: Answer | None = None
    cost_usd: Decimal | None = None
    error: dict[str, Any] | None = None


async def write_csv(rows: AsyncIterable[ExportRow], columns: Sequence[str], fields: Sequence[str], out: TextIO) -> None:
    """A header, then a line for each row (RFC 4180): `columns` of the ticket, `COLUMNS`, `fields` of the answer.

    A name that stands to the left already gets `_answer` behind it, and again until it is its own. Cells that a
    spreadsheet would run as a formula get an apostrophe in front; plain numbers stay. `out` needs newline="".
    """
    writer = csv.writer(out)
    writer.writerow(map(_harmless, _header(columns, fields)))
    async for row in rows:
        ticket = row.row or {}
        cells = [*(ticket.get(name, "") for name in columns), *_outcome(row), *_said(row.answer, fields)]
        writer.writerow(map(_harmless, cells))


def _header(columns: Sequence[str], fields: Sequence[str]) -> list[str]:
    names = list(columns)
    for name in (*COLUMNS, *fields):
        while name in names:
            name += "_answer"
        names.append(name)
    return names


def _outcome(row: ExportRow) -> list[str]:
    answer = row.answer
    return [
        _content(answer) if answer else "",
        row.state,
        answer.provider if answer else "",
        answer.model if answer else "",
        (answer.degraded if answer else None) or "",
        "" if row.cost_usd is None else _money(row.cost_usd),
        _reason(row) if row.error or _ended_unanswered(row) else "",
    ]


def _content(answer: Answer) -> str:
    if answer.content is None and answer.tool_calls:
        return json.dumps(answer.tool_calls, ensure_ascii=False)
    return answer.content or ""


def _said(answer: Answer | None, fields: Sequence[str]) -> list[str]:
    """The answer's fields, blank where it is not the JSON that was asked for."""
    try:
        said = json.loads((answer and answer.content) or "")
    except (ValueError, RecursionError):
        said = None
    return [_cell(said.get(name)) if isinstance(said, dict) else "" for name in fields]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _money(usd: Decimal) -> str:
    return format(usd.normalize() if usd else Decimal(0), "f")


def _harmless(cell: str) -> str:
    return f"'{cell}" if _FORMULA.match(cell) and not _NUMBER.fullmatch(cell) else cell


def _ended_unanswered(row: ExportRow) -> bool:
    return row.state in (JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED)


def _error(row: ExportRow) -> dict[str, str]:
    given = row.error or {}
    if _ended_unanswered(row) or given:
        return {"code": given.get("code", str(row.state)), "message": given.get("message", f"the job is {row.state}")}
    return {"code": "not_finished", "message": f"the job is {row.state}"}


def _reason(row: ExportRow) -> str:
    given = row.error or _error(row)
    return ": ".join(str(given[part]) for part in ("code", "message") if given.get(part))


async def write_jsonl(rows: AsyncIterable[ExportRow], out: TextIO) -> None:
    """OpenAI batch output lines, one for each row."""
    async for row in rows:
        out.write(jsonl_line(row) + "\n")


def jsonl_line(row: ExportRow) -> str:
    """One OpenAI batch output line, without its end: {"id", "custom_id", "response", "error"}.

    Either `response` or `error` is null. `id` and `request_id` are the job's id; `custom_id` is the row's number where
    it had none of its own. The body is a chat `completion`.
    """
    return _encoded(row, row.custom_id or str(row.ordinal or row.job_id), _error(row))


# Codes of OpenAI's: https://platform.openai.com/docs/api-reference/batch/request-output
_UNANSWERED = {
    "expired": {"code": "batch_expired", "message": "the completion window ended before this request was answered"},
    "cancelled": {"code": "batch_cancelled", "message": "this request was cancelled before it was answered"},
}


def file_line(row: ExportRow) -> str:
    """The same for the output or the error file of a batch made of a file, where a row's number is that of its line.

    `custom_id` is null where the line had none of its own, for its number could be another's; `error` has it as `line`.
    """
    return _encoded(row, row.custom_id, _UNANSWERED.get(row.state, _error(row)) | {"line": row.ordinal})


def _encoded(row: ExportRow, custom_id: str | None, error: Mapping[str, Any]) -> str:
    response = None
    if row.answer is not None:
        response = {"status_code": 200, "request_id": str(row.job_id), "body": completion(row.job_id, row.answer, row.cost_usd)}
    line = {"id": str(row.job_id), "custom_id": custom_id, "response": response, "error": None if response else error}
    return json.dumps(line, ensure_ascii=False).translate(_LINE_ENDS)


def completion(job_id: UUID, answer: Answer, cost_usd: Decimal | None) -> dict[str, Any]:
    """The answer as OpenAI's chat completion; what that does not say stands under `backstop`.

    `created`: when the job was submitted, Unix seconds. `usage` is null where the provider counted no tokens.
    """
    message: dict[str, Any] = {"role": "assistant", "content": answer.content, "refusal": None}
    if answer.tool_calls:
        message["tool_calls"] = answer.tool_calls
    cost = None if cost_usd is None else _money(cost_usd)
    return {
        "id": f"chatcmpl-{job_id.hex}",
        "object": "chat.completion",
        "created": (job_id.int >> 80) // 1000,  # a UUIDv7 begins with its milliseconds
        "model": answer.model,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish_reason}],
        "usage": _usage(answer.usage),
        "backstop": {"provider": answer.provider, "degraded": answer.degraded, "cost_usd": cost},
    }


def _usage(usage: Usage) -> dict[str, Any] | None:
    if usage.input_tokens is None or usage.output_tokens is None:
        return None
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` once the block has ended well, on disk and with the mode `path` had.

    Until then, and for good after any error, `path` is as it was. What is no regular file (a pipe, /dev/stdout) is
    written as it goes. Raises UsageError when it cannot be created, BackstopError when the disk is full.
    """
    target = path.resolve()  # through a link, to replace what it points to
    special = target.exists() and not target.is_file()
    part = target if special else target.with_name(f".{target.name[:200]}.{secrets.token_hex(4)}.part")
    try:
        with _create(part, target, path) as out:
            yield out
            out.flush()
            if not special:
                os.fsync(out.fileno())
        if not special:
            os.replace(part, target)
            _sync_directory(target.parent)
    except OSError as error:
        if error.errno not in _DISK_TROUBLE:
            raise
        raise BackstopError(f"{path} cannot be written: {error.strerror}; nothing was replaced") from None
    finally:
        if not special:
            with suppress(OSError):
                part.unlink()


def _create(part: Path, target: Path, shown: Path) -> TextIO:
    try:
        if part == target:
            return part.open("w", encoding="utf-8", newline="")
        out = os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w", encoding="utf-8", newline="")
        if target.exists():
            os.fchmod(out.fileno(), stat.S_IMODE(target.stat().st_mode))
    except OSError as error:
        raise UsageError(f"{shown} cannot be written: {error.strerror}") from None
    return out


def _sync_directory(path: Path) -> None:
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
