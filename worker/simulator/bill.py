"""The vendors' side of the books: one line for each request received, whatever became of it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args

from worker.config import PriceConfig
from worker.errors import UsageError
from worker.simulator.script import Kind

OUTCOMES = ("unfinished", "answered", "invalid", "incomplete", "limited", *get_args(Kind))
_CODES = {outcome: code for code, outcome in enumerate(OUTCOMES)}
_GOOD = frozenset({"answered", "slow"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One request. `received_at` is Unix seconds, `cost` USD.

    `outcome`: `answered`, the kind of the fault, `invalid` (our 400), `limited` (our 429), `incomplete` (the client left before
    its body was here) or `unfinished` (still under way). `status` is None for what sends no headers. `written`: the whole response
    went out to a connection that was still open. Answers are charged whether or not anybody waited for them.
    `prompt` is all zeros when the request was no chat request.
    """

    seq: int
    provider: str
    call_id: str | None
    prompt: str
    received_at: float
    outcome: str
    status: int | None
    input_tokens: int
    output_tokens: int
    cost: Decimal
    written: bool

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "cost": f"{self.cost:f}"}


@dataclass(slots=True)
class Totals:
    """`requests` = `answered` + `failed` + `unfinished`; `unread` counts finished ones whose response nobody got."""

    requests: int = 0
    answered: int = 0
    failed: int = 0
    unread: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: Decimal = Decimal(0)

    @property
    def unfinished(self) -> int:
        return self.requests - self.answered - self.failed

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "unfinished": self.unfinished, "usd": f"{self.usd:f}"}


def fingerprint(messages: Any) -> str:
    """16 hex digits that name a prompt without showing it: SHA-256 of its canonical JSON (sorted keys, ASCII)."""
    canonical = json.dumps(messages, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class Bill:
    """Opened when a request is here, closed when its response is out.

    With a file, each opening and each closing is one JSON line written at once (`event` is `received` or `completed`,
    joined by `seq`, which starts at 1 with each simulator); `fsync` makes it survive a power cut too.
    Lines are held in columns: 1M of them weigh about 130 MB.
    """

    def __init__(self, file: Path | None = None, *, fsync: bool = False) -> None:
        self._file = _append(file) if file else None
        self._fsync = fsync
        self._totals: dict[str, Totals] = {}
        self._accounts: list[tuple[str, PriceConfig]] = []  # a provider at a price
        self._latest: dict[str, int] = {}
        self._account = array("H")
        self._call_id: list[str | None] = []
        self._prompt = array("Q")
        self._received_at = array("d")
        self._outcome = array("B")
        self._status = array("H")
        self._input = array("I")
        self._output = array("I")
        self._written = array("B")

    def __len__(self) -> int:
        return len(self._call_id)

    def open(self, provider: str, price: PriceConfig, call_id: str | None, prompt: str) -> int:
        """One more line, on the file before it returns. The number it is closed by, from 1."""
        received_at = time.time()
        self._account.append(self._account_of(provider, price))
        self._call_id.append(call_id)
        self._prompt.append(int(prompt or "0", 16))
        self._received_at.append(received_at)
        for column in (self._outcome, self._status, self._input, self._output, self._written):
            column.append(0)
        self._totals.setdefault(provider, Totals()).requests += 1
        if self._file is not None:
            line = {"seq": len(self), "provider": provider, "call_id": call_id, "prompt": prompt}
            self._write({"event": "received", **line, "received_at": received_at})
        return len(self)

    def close(self, seq: int, outcome: str, status: int | None, tokens: tuple[int, int], *, written: bool) -> None:
        """What became of it; `tokens` are (input, output) as charged."""
        row = seq - 1
        self._outcome[row], self._status[row], self._written[row] = _CODES[outcome], status or 0, written
        self._input[row], self._output[row] = tokens
        line = self.line(seq)
        self._add(self._totals[line.provider], line)
        if self._file is not None:
            body = line.to_json()
            kept = ("seq", "outcome", "status", "input_tokens", "output_tokens", "cost", "written")
            self._write({"event": "completed", **{key: body[key] for key in kept}})

    def line(self, seq: int) -> Line:
        row = seq - 1
        provider, price = self._accounts[self._account[row]]
        tokens = self._input[row], self._output[row]
        return Line(
            seq=seq,
            provider=provider,
            call_id=self._call_id[row],
            prompt=f"{self._prompt[row]:016x}",
            received_at=self._received_at[row],
            outcome=OUTCOMES[self._outcome[row]],
            status=self._status[row] or None,
            input_tokens=tokens[0],
            output_tokens=tokens[1],
            cost=(tokens[0] * price.input + tokens[1] * price.output).scaleb(-6),
            written=bool(self._written[row]),
        )

    def lines(self) -> Iterator[Line]:
        """All of them, in the order of arrival."""
        return (self.line(seq) for seq in range(1, len(self) + 1))

    def totals(self) -> dict[str, Totals]:
        """By provider, for those that were asked at all."""
        return self._totals

    def to_json(self, *, full: bool = False) -> dict[str, Any]:
        body: dict[str, Any] = {"providers": {name: totals.to_json() for name, totals in self._totals.items()}}
        return {**body, "lines": [line.to_json() for line in self.lines()]} if full else body

    def end(self) -> None:
        """Closes the file; the figures stay."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _account_of(self, provider: str, price: PriceConfig) -> int:
        latest = self._latest.get(provider)
        if latest is None or self._accounts[latest][1] is not price:
            latest = self._latest[provider] = len(self._accounts)
            self._accounts.append((provider, price))
        return latest

    def _add(self, totals: Totals, line: Line) -> None:
        if line.outcome in _GOOD:
            totals.answered += 1
        else:
            totals.failed += 1
        totals.unread += not line.written
        totals.input_tokens += line.input_tokens
        totals.output_tokens += line.output_tokens
        totals.usd += line.cost

    def _write(self, line: dict[str, Any]) -> None:
        if self._file is not None:
            os.write(self._file, json.dumps(line).encode() + b"\n")
            if self._fsync:
                os.fsync(self._file)


def _append(file: Path) -> int:
    try:
        return os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise UsageError(f"the bill cannot be written to {file}: {error.strerror}") from None
