"""The script: how each simulated provider answers, how often and when it fails, what it charges."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from worker import tomlfile
from worker.config import Name, PriceConfig
from worker.errors import UsageError

Kind = Literal[
    "status",  # an HTTP error of your choice, with the body the vendor of that dialect would send
    "hang",  # the request is taken and nothing comes back for `seconds`, then a reset
    "stall",  # headers and half the body, or of a stream the first word; silence for `seconds`, then a reset
    "reset",  # the connection is reset before a byte is answered
    "truncate",  # the connection is reset in the middle of the body
    "malformed",  # 200, but the body, or an event of the stream, is not JSON
    "empty",  # 200 without choices, or without content
    "error_in_200",  # 200 with an error object in it, in a stream after the first word
    "slow",  # a good answer, `seconds` late
    "html",  # a gateway's 502 page
    "refuse",  # the provider's own port is closed (outages by time only)
]
_EXTRAS: Mapping[str, frozenset[str]] = {
    "status": frozenset({"status", "code", "type", "retry_after_s"}),
    "html": frozenset({"status"}),
    "error_in_200": frozenset({"code", "type"}),
    "hang": frozenset({"seconds"}),
    "stall": frozenset({"seconds"}),
    "slow": frozenset({"seconds"}),
}


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Latency(_Section):
    """Time from request to answer: the same `ms` for all, or lognormal with this median and 99th percentile."""

    ms: float | None = Field(None, ge=0)
    median_ms: float | None = Field(None, gt=0)
    p99_ms: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if (self.ms is None) == (self.median_ms is None) or (self.median_ms is None) != (self.p99_ms is None):
            raise ValueError("write either { ms = 50 } or { median_ms = 60, p99_ms = 400 }")
        if self.median_ms is not None and self.p99_ms is not None and self.p99_ms < self.median_ms:
            raise ValueError("p99_ms is below median_ms")
        return self


class Fault(_Section):
    """One way to fail, for a share `rate` of all requests. `seconds` is the length of a hang, a stall or a delay."""

    kind: Kind
    rate: float = Field(gt=0, le=1)
    status: int | None = Field(None, ge=400, le=599)  # required by `status`; 502 for `html`
    code: str | None = None  # `error.code`; left out: the one the vendor sends with that status
    type: str | None = None  # `error.type`, likewise
    retry_after_s: float | None = Field(None, ge=0)
    seconds: float = Field(30, ge=0)

    @model_validator(mode="after")
    def _fits_kind(self) -> Self:
        optional = {"status", "code", "type", "retry_after_s", "seconds"}
        for stray in sorted((self.model_fields_set & optional) - _EXTRAS.get(self.kind, frozenset())):
            raise ValueError(f'{stray} means nothing for kind = "{self.kind}"')
        if self.kind == "status" and self.status is None:
            raise ValueError('kind = "status" needs a status, as in status = 503')
        return self


class Outage(Fault):
    """A fault within a window, `from_…` included and `to_…` not: seconds since start, or requests counted from 1.

    Left out, a window begins at once or never ends. `rate` below 1 makes it a brown-out.
    """

    rate: float = Field(1.0, gt=0, le=1)
    from_s: float | None = Field(None, ge=0)
    to_s: float | None = Field(None, ge=0)
    from_request: int | None = Field(None, ge=1)
    to_request: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _is_window(self) -> Self:
        by_time, by_request = (self.from_s, self.to_s), (self.from_request, self.to_request)
        if by_time == by_request == (None, None):
            raise ValueError("an outage needs from_s/to_s or from_request/to_request")
        if (self.to_s is not None and self.to_s <= (self.from_s or 0)) or (
            self.to_request is not None and self.to_request <= (self.from_request or 1)
        ):
            raise ValueError("the window ends before it begins")
        if self.kind == "refuse" and (by_request != (None, None) or self.rate < 1):
            raise ValueError('a closed port sees no requests: kind = "refuse" goes by from_s/to_s; else use "reset"')
        return self

    def covers(self, request: int, elapsed_s: float) -> bool:
        if self.from_s is not None and elapsed_s < self.from_s:
            return False
        if self.to_s is not None and elapsed_s >= self.to_s:
            return False
        if self.from_request is not None and request < self.from_request:
            return False
        return self.to_request is None or request < self.to_request


class ProviderScript(_Section):
    """One simulated provider. Outages come before `faults`, whose rates add up to 1 at most: a request has one fate.

    `rpm`, `tpm` and `concurrency` are the vendor's own limits, in buckets that are full at first and refill evenly: what is
    above them meets a 429 that costs nothing, and no fault.
    """

    model: str = "sim-small"
    latency: Latency = Latency(ms=0)
    price: PriceConfig = PriceConfig.model_validate({"input": "1", "output": "2"})
    faults: tuple[Fault, ...] = ()
    outages: tuple[Outage, ...] = ()
    rpm: int | None = Field(None, gt=0)
    tpm: int | None = Field(None, gt=0)
    concurrency: int | None = Field(None, gt=0)
    port: int | None = Field(None, ge=0, le=65535)  # its own besides the shared one, 0: any free; for `refuse`

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        if sum(fault.rate for fault in self.faults) > 1 + 1e-9:
            raise ValueError("the rates of its faults add up to more than 1")
        if any(fault.kind == "refuse" for fault in self.faults):
            raise ValueError('kind = "refuse" belongs into outages, with from_s/to_s; for single requests use "reset"')
        if self.port is None and any(outage.kind == "refuse" for outage in self.outages):
            raise ValueError('kind = "refuse" needs a port of its own: add port = 0')
        return self


class Script(_Section):
    """All of it. The fault and latency of a provider's n-th request depend on (seed, provider, n) alone."""

    seed: int = 0
    providers: Mapping[Name, ProviderScript] = Field(min_length=1)


def load(path: Path) -> Script:
    """The checked script. Raises UsageError naming the file, the key and what was expected."""
    return parse(tomlfile.read(path, absent=f"no {path} here: copy examples/faults.toml from the project"), str(path))


def parse(body: Mapping[str, Any], source: str) -> Script:
    """Like `load`, from what TOML holds already. `source` names it in messages."""
    try:
        return Script.model_validate(body)
    except ValidationError as error:
        raise UsageError("\n".join(f"{source}: {line}" for line in _explain(error))) from None


def changed(script: ProviderScript, changes: Mapping[str, Any], source: str) -> ProviderScript:
    """The script with these keys replaced, the others kept. Raises UsageError as `load` does, also for a new port."""
    try:
        new = ProviderScript.model_validate({**script.model_dump(exclude_unset=True), **changes})
    except ValidationError as error:
        raise UsageError("; ".join(f"{source}: {line}" for line in _explain(error))) from None
    if new.port != script.port:
        raise UsageError(f"{source}: port cannot change while the simulator runs")
    return new


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield f"unknown key {where}{_hint(str(fault['loc'][-1]))}"
        elif fault["type"] == "literal_error":
            yield f"{where}: no kind {str(fault['input'])!r}; there are: {', '.join(get_args(Kind))}"
        else:
            yield f"{where}: {fault['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def _hint(word: str) -> str:
    sections: tuple[type[BaseModel], ...] = (Script, ProviderScript, Latency, Outage, PriceConfig)
    known = {key for section in sections for key in section.model_fields}
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""
