"""`backstop.toml`: which providers there are and in what order they are asked. Unknown keys are refused."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from worker.errors import UsageError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PriceConfig(_Section):
    """USD per 1M tokens, as strings so that no float comes near money. `cached` defaults to `input`."""

    input: Decimal = Field(ge=0, le=10_000)
    output: Decimal = Field(ge=0, le=10_000)
    cached: Decimal | None = Field(None, ge=0, le=10_000)

    @field_validator("*", mode="before")
    @classmethod
    def _no_floats(cls, value: Any) -> Any:
        if isinstance(value, float):
            raise ValueError('write money as a string, as in "0.28"')
        return value


class ProviderConfig(_Section):
    """One callable endpoint. `timeout_s` bounds a whole call; `connect_timeout_s` its connection."""

    base_url: str
    api_key: str | None = None  # "env:NAME"
    model: str = Field(min_length=1)
    timeout_s: float = Field(60, gt=0, le=3600)
    connect_timeout_s: float = Field(0.5, gt=0)
    max_retries: int = Field(1, ge=0, le=5)
    context_tokens: int | None = Field(None, gt=0)  # window of the model, to find a larger one
    rpm: int | None = Field(None, gt=0)
    tpm: int | None = Field(None, gt=0)
    price: PriceConfig | None = None

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("expected an http:// or https:// URL")
        if url.username or url.query or url.fragment:
            raise ValueError("expected a URL without user, query and fragment; keys go into api_key")
        return value.rstrip("/")

    @field_validator("api_key")
    @classmethod
    def _is_reference(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith("env:"):
            raise ValueError('keys do not belong into files: write "env:NAME" and set that variable')
        return value

    def key(self) -> str | None:
        """The key itself, from the environment. Raises UsageError when the variable is not set."""
        if self.api_key is None:
            return None
        variable = self.api_key.removeprefix("env:")
        if not os.environ.get(variable):
            raise UsageError(f"environment variable {variable} is not set: it holds the key for {self.base_url}")
        return os.environ[variable]


class ChainConfig(_Section):
    """`on_unknown`: what becomes of a job when a call may have been answered and billed although no answer came.

    "retry" asks on and may pay twice; "park" ends the job as failed, for a person to look at and requeue.
    """

    providers: tuple[Name, ...] = Field(min_length=1)
    strategy: Literal["ordered", "hedge", "race"] = "ordered"
    degrade: tuple[Literal["smaller", "cache", "static", "park"], ...] = ()
    on_unknown: Literal["retry", "park"] = "retry"

    @field_validator("providers")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a provider stands in the chain twice")
        return value


class CanaryConfig(_Section):
    chain: Name
    candidate: Name


class AlertsConfig(_Section):
    webhook: str | None = None


class Config(_Section):
    """Everything in `backstop.toml`, checked. Raises pydantic's ValidationError; `load` turns that into UsageError."""

    providers: Mapping[Name, ProviderConfig]
    chains: Mapping[Name, ChainConfig]
    canaries: Mapping[Name, CanaryConfig] = {}
    alerts: AlertsConfig = AlertsConfig()

    @model_validator(mode="after")
    def _names_exist(self) -> Config:
        if "default" not in self.chains:
            raise ValueError("chains.default is missing: jobs that name no chain take it")
        for name, chain in self.chains.items():
            for provider in chain.providers:
                if provider not in self.providers:
                    raise ValueError(f"chains.{name}.providers: no provider {provider!r}{_hint(provider, self.providers)}")
        for name, canary in self.canaries.items():
            if canary.chain not in self.chains:
                raise ValueError(f"canaries.{name}.chain: no chain {canary.chain!r}{_hint(canary.chain, self.chains)}")
            if canary.candidate not in self.providers and canary.candidate not in self.chains:
                raise ValueError(f"canaries.{name}.candidate: no provider or chain {canary.candidate!r}")
        return self

    def chain(self, name: str) -> ChainConfig:
        """The chain of that name; else the provider of that name, or the one that serves that model, as a chain of one.

        Raises UsageError when there is none.
        """
        if name in self.chains:
            return self.chains[name]
        if name in self.providers:
            return ChainConfig(providers=(name,))
        for provider, config in self.providers.items():
            if name == config.model:
                return ChainConfig(providers=(provider,))
        known = [*self.chains, *self.providers]
        raise UsageError(f"no chain or provider {name!r}{_hint(name, known)}; there are: {', '.join(known)}")

    def not_yet(self) -> list[str]:
        """Settings that are read but have no effect in this version, for `config check` and the start of a worker to say."""
        return [
            *(f"providers.{n}.{k}" for n, p in self.providers.items() for k in ("rpm", "tpm") if getattr(p, k)),
            *(f'chains.{n}.strategy = "{c.strategy}"' for n, c in self.chains.items() if c.strategy != "ordered"),
            *(f"chains.{n}.degrade" for n, c in self.chains.items() if c.degrade),
            *(f"canaries.{n}" for n in self.canaries),
            *(["alerts.webhook"] if self.alerts.webhook else []),
        ]


def load(path: Path) -> Config:
    """The checked configuration. Raises UsageError naming the file, the key and what was expected."""
    try:
        return parse(tomllib.loads(path.read_text("utf-8")), str(path))
    except FileNotFoundError:
        raise UsageError(f"no {path} here: copy backstop.toml from the project or set BACKSTOP_CONFIG") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None


def parse(body: Mapping[str, Any], source: str) -> Config:
    """Like `load`, from what TOML holds already. `source` names it in messages."""
    try:
        return Config.model_validate(body)
    except ValidationError as error:
        raise UsageError("\n".join(f"{source}: {line}" for line in _explain(error))) from None


def _explain(error: ValidationError) -> Iterator[str]:
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            yield f"unknown key {where}{_hint(str(fault['loc'][-1]), _keys_at(fault['loc']))}"
        else:
            yield f"{where}: {fault['msg'].removeprefix('Value error, ')}".removeprefix(": ")


def _keys_at(loc: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[BaseModel]] = {
        "providers": ProviderConfig, "chains": ChainConfig, "canaries": CanaryConfig, "alerts": AlertsConfig,
    }  # fmt: skip
    if len(loc) == 1:
        return list(Config.model_fields)
    return list((PriceConfig if "price" in loc[2:-1] else sections.get(str(loc[0]), Config)).model_fields)


def _hint(word: str, known: Mapping[str, Any] | list[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""
