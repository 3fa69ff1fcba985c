"""`backstop.toml`: which providers there are and in what order they are asked. Unknown keys are refused."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from worker import tomlfile
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
    """One callable endpoint. `timeout_s` bounds a whole call; `connect_timeout_s` its connection.

    `rpm`, `tpm` and `max_concurrency` are what the vendor grants for this key and model: requests and tokens a minute, and calls
    at once, of all workers together. `stream`: the answer is read as it is written, so that a provider which has not begun
    after `first_token_timeout_s`, or falls silent for `stall_timeout_s`, is left before its `timeout_s`.
    """

    base_url: str
    dialect: Literal["openai", "anthropic"] = "openai"
    api_key: str | None = None  # "env:NAME"
    model: str = Field(min_length=1)
    timeout_s: float = Field(60, gt=0, le=3600)
    connect_timeout_s: float = Field(0.45, gt=0)  # a dead host may cost 500 ms, with all that is around it
    max_retries: int = Field(1, ge=0, le=5)
    context_tokens: int | None = Field(None, gt=0)  # window of the model, to find a larger one
    rpm: int | None = Field(None, gt=0)
    tpm: int | None = Field(None, gt=0)
    max_concurrency: int | None = Field(None, gt=0)
    stream: bool = False
    first_token_timeout_s: float = Field(15, gt=0)
    stall_timeout_s: float = Field(20, gt=0)
    price: PriceConfig | None = None

    @model_validator(mode="after")
    def _agrees(self) -> ProviderConfig:
        if "connect_timeout_s" in self.model_fields_set and self.connect_timeout_s > self.timeout_s:
            raise ValueError("connect_timeout_s is above timeout_s, which bounds the whole call")
        for name in ("first_token_timeout_s", "stall_timeout_s"):
            if name in self.model_fields_set and not self.stream:
                raise ValueError(f"{name} means nothing without stream = true")
            if name in self.model_fields_set and getattr(self, name) > self.timeout_s:
                raise ValueError(f"{name} is above timeout_s, which bounds the whole call")
        return self

    @property
    def host(self) -> str:
        """What several providers may share, and lose together: host and port."""
        return urlsplit(self.base_url).netloc

    @field_validator("base_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        url = urlsplit(value)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("expected an http:// or https:// URL")
        if url.username or url.query or url.fragment:
            azure = "; Azure needs no api-version where base_url ends in /openai/v1" if "api-version" in url.query else ""
            raise ValueError(f"expected a URL without user, query and fragment; keys go into api_key{azure}")
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


class CacheConfig(_Section):
    """Answers kept for exactly the same request of the same tenant, when its temperature is at most 0.3 or it has a seed.

    `fresh_s`: a younger one is given instead of asking anybody. `stale_s`: one not older than that is given, marked as degraded,
    when nobody answers. `any_temperature`: also where the answer would be another each time.
    """

    fresh_s: float = Field(0, ge=0, le=86_400)
    stale_s: float = Field(86_400, ge=0, le=2_592_000)
    any_temperature: bool = False


class ChainConfig(_Section):
    """An ordered list of providers, and what to do with them.

    `strategy`: "ordered" asks one after the other; "hedge" asks the next one as well when one takes longer than 95 % of its
    calls do, within a budget, and never one that costs over 1.5 times as much unless `hedge_dearer`; "race" asks all at once for
    8 s and takes the first answer: it pays for all. `degrade`: what is given when nobody answers, in this order.
    `on_unknown`: what becomes of a job when a call may have been answered and billed although no answer came. "retry" asks
    on and may pay twice; "fail" ends the job as failed, for a person to look at and requeue. `on_truncated`: whether an answer
    that max_tokens cut off is taken or the next provider asked. `overflow`: bulk jobs go on to the next provider when the limits
    of one leave them no room; else they wait for it while it is well and their deadline is far. `warm_share`: of its jobs, so many
    ask one of the later providers first, so that an untried one is no surprise.
    """

    providers: tuple[Name, ...] = Field(min_length=1)
    strategy: Literal["ordered", "hedge", "race"] = "ordered"
    degrade: tuple[Literal["smaller", "cache", "static", "park"], ...] = ()
    smaller: Name | None = None
    static_text: str | None = Field(None, min_length=1)
    cache: CacheConfig = CacheConfig()
    on_unknown: Literal["retry", "fail"] = "retry"
    on_truncated: Literal["accept", "next"] = "accept"
    overflow: bool = False
    warm_share: float = Field(0, ge=0, le=0.1)
    hedge_dearer: bool = False

    @field_validator("providers", "degrade")
    @classmethod
    def _distinct(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if value.count(name) > 1:
                raise ValueError(f"{name!r} stands in it twice")
        return value

    @model_validator(mode="after")
    def _agrees(self) -> ChainConfig:
        several, asks_twice = len(self.providers) > 1, self.strategy != "ordered"
        rules = (
            (asks_twice and not several, f'strategy = "{self.strategy}" needs at least two providers'),
            (asks_twice and self.on_unknown == "fail", f'strategy = "{self.strategy}" pays twice, on_unknown = "fail" forbids it'),
            (self.hedge_dearer and self.strategy != "hedge", 'hedge_dearer means nothing without strategy = "hedge"'),
            (self.warm_share > 0 and not several, "warm_share needs a second provider to keep warm"),
            (self.warm_share > 0 and self.strategy == "race", 'warm_share means nothing with strategy = "race", which asks all'),
            ("smaller" in self.degrade and self.smaller is None, 'degrade has "smaller": name its provider, smaller = "…"'),
            ("smaller" not in self.degrade and self.smaller is not None, 'smaller means nothing without "smaller" in degrade'),
            (self.smaller in self.providers, f"smaller: {self.smaller} is in the chain already"),
            ("static" in self.degrade and self.static_text is None, 'degrade has "static": give its text, static_text = "…"'),
            ("static" not in self.degrade and self.static_text is not None, 'static_text means nothing without "static" in degrade'),
            ("park" in self.degrade[:-1], '"park" waits until the deadline: it comes last in degrade'),
            ("cache" in self.model_fields_set and not self.caches, 'cache means nothing without "cache" in degrade or fresh_s'),
        )
        for broken, rule in rules:
            if broken:
                raise ValueError(rule)
        return self

    @property
    def caches(self) -> bool:
        return "cache" in self.degrade or self.cache.fresh_s > 0


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
            for key, named in (("providers", chain.providers), ("smaller", (chain.smaller,) if chain.smaller else ())):
                for provider in named:
                    if provider not in self.providers:
                        raise ValueError(f"chains.{name}.{key}: no provider {provider!r}{_hint(provider, self.providers)}")
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
        return [*(f"canaries.{n}" for n in self.canaries), *(["alerts.webhook"] if self.alerts.webhook else [])]

    def notes(self) -> list[str]:
        """What is allowed and costs more than one may think, for `config check` to say."""
        notes = []
        for name, chain in self.chains.items():
            hosts = {self.providers[provider].host for provider in chain.providers}
            if len(chain.providers) > 1 and len(hosts) == 1:
                notes.append(f"chains.{name}: all its providers are at {hosts.pop()}, and fail together when that does")
            if chain.strategy == "race":
                notes.append(f"chains.{name}: a race pays all {len(chain.providers)} providers for each job")
        return notes


def load(path: Path) -> Config:
    """The checked configuration. Raises UsageError naming the file, the key and what was expected."""
    absent = f"no {path} here: copy backstop.toml from the project or set BACKSTOP_CONFIG"
    return parse(tomlfile.read(path, absent=absent), str(path))


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
    inner = next((section for name, section in (("price", PriceConfig), ("cache", CacheConfig)) if name in loc[2:-1]), None)
    return list((inner or sections.get(str(loc[0]), Config)).model_fields)


def _hint(word: str, known: Mapping[str, Any] | list[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""
