"""`backstop.toml`: what is accepted, what is refused, and in which words."""

from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from worker.config import load, parse
from worker.errors import UsageError

ONE = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}


def body(**changes: Any) -> dict[str, Any]:
    return {"providers": {"one": ONE}, "chains": {"default": {"providers": ["one"]}}} | changes


def with_provider(**changes: Any) -> dict[str, Any]:
    return body(providers={"one": ONE | changes})


def refusal(config: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as raised:
        parse(config, "backstop.toml")
    return str(raised.value)


@pytest.mark.parametrize(
    ("config", "where", "hint"),
    [
        (body(provider={}), "provider", "providers"),
        (with_provider(base_ulr="x"), "providers.one.base_ulr", "base_url"),
        (with_provider(price={"input": "1", "ouput": "1", "output": "1"}), "providers.one.price.ouput", "output"),
        (body(chains={"default": {"provider": [], "providers": ["one"]}}), "chains.default.provider", "providers"),
        (body(canaries={"c": {"chain": "default", "candidat": "one", "candidate": "one"}}), "canaries.c.candidat", "candidate"),
        (body(alerts={"web_hook": "x"}), "alerts.web_hook", "webhook"),
    ],
)
def test_an_unknown_key_is_refused_at_every_level_with_what_was_meant(config, where, hint):
    assert refusal(config) == f"backstop.toml: unknown key {where}, did you mean {hint!r}?"


def test_a_provider_named_price_has_the_keys_of_a_provider():
    config = body(providers={"one": ONE, "price": ONE | {"modle": "x"}})
    assert refusal(config).endswith("unknown key providers.price.modle, did you mean 'model'?")


def test_every_fault_of_a_file_is_named_on_a_line_of_its_own():
    lines = refusal(body(providers={"one": ONE | {"rpm": 0, "nonsense": 1}})).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("backstop.toml: ") for line in lines)


@pytest.mark.parametrize("name", ["input", "output", "cached"])
def test_money_is_no_float(name):
    price: dict[str, Any] = {"input": "1", "output": "1"} | {name: 0.28}
    assert f'providers.one.price.{name}: write money as a string, as in "0.28"' in refusal(with_provider(price=price))


def test_money_keeps_its_digits():
    price = parse(with_provider(price={"input": "0.28", "output": 3}), "x").providers["one"].price
    assert price is not None
    assert (price.input, price.output, price.cached) == (Decimal("0.28"), Decimal(3), None)


@pytest.mark.parametrize("amount", ["-1", "NaN", "Infinity", "much"])
def test_money_is_a_number_from_zero_on(amount):
    assert "providers.one.price.input: " in refusal(with_provider(price={"input": amount, "output": "1"}))


@pytest.mark.parametrize("url", ["api.example.org/v1", "ftp://api.example.org", "http://", "", "https:///v1"])
def test_a_base_url_is_http_and_has_a_host(url):
    assert refusal(with_provider(base_url=url)) == "backstop.toml: providers.one.base_url: expected an http:// or https:// URL"


def test_a_base_urls_last_slash_does_not_matter():
    assert parse(with_provider(base_url="http://127.0.0.1:1/v1/"), "x").providers["one"].base_url == "http://127.0.0.1:1/v1"


def test_a_key_in_the_file_is_refused_and_not_repeated():
    message = refusal(with_provider(api_key="sk-very-secret"))
    assert 'write "env:NAME"' in message
    assert "secret" not in message


def test_a_key_comes_from_the_environment(monkeypatch):
    provider = parse(with_provider(api_key="env:SOME_KEY"), "x").providers["one"]
    monkeypatch.setenv("SOME_KEY", "sk-1")
    assert provider.key() == "sk-1"


@pytest.mark.parametrize("value", [None, ""])
def test_a_key_that_is_not_set_is_named_with_what_it_is_for(monkeypatch, value):
    provider = parse(with_provider(api_key="env:SOME_KEY"), "x").providers["one"]
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(UsageError, match=r"SOME_KEY is not set: it holds the key for http://127.0.0.1:1/v1"):
        provider.key()


def test_a_provider_without_a_key_has_none():
    assert parse(body(), "x").providers["one"].key() is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (body(chains={"other": {"providers": ["one"]}}), "chains.default is missing: jobs that name no chain take it"),
        (body(chains={"default": {"providers": ["onne"]}}), "chains.default.providers: no provider 'onne', did you mean 'one'?"),
        (
            body(chains={"default": {"providers": ["one", "one"]}}),
            "chains.default.providers: a provider stands in the chain twice",
        ),
        (
            body(canaries={"c": {"chain": "defalt", "candidate": "one"}}),
            "canaries.c.chain: no chain 'defalt', did you mean 'default'?",
        ),
        (body(canaries={"c": {"chain": "default", "candidate": "z"}}), "canaries.c.candidate: no provider or chain 'z'"),
    ],
)
def test_names_that_lead_nowhere_are_refused(config, message):
    assert refusal(config) == f"backstop.toml: {message}"


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-a", "x" * 65])
def test_names_are_short_and_plain(name):
    assert "providers" in refusal(body(providers={"one": ONE, name: ONE}))


def resolving() -> Any:
    return parse(
        {
            "providers": {
                "big": ONE | {"model": "small"},
                "small": ONE | {"model": "tiny"},
                "third": ONE | {"model": "default"},
                "fourth": ONE | {"model": "tiny"},
            },
            "chains": {"default": {"providers": ["big", "small"]}},
        },
        "x",
    )


@pytest.mark.parametrize(
    ("name", "providers"),
    [("default", ("big", "small")), ("small", ("small",)), ("fourth", ("fourth",)), ("tiny", ("small",))],
)
def test_a_name_is_a_chain_before_a_provider_before_a_model(name, providers):
    assert resolving().chain(name).providers == providers


def test_a_name_that_is_nothing_is_refused_with_what_there_is():
    with pytest.raises(UsageError, match="no chain or provider 'defualt', did you mean 'default'\\?; there are: default, big"):
        resolving().chain("defualt")


def test_settings_without_effect_are_listed():
    config = parse(
        {
            "providers": {"one": ONE | {"rpm": 5, "tpm": 6}},
            "chains": {"default": {"providers": ["one"], "strategy": "hedge", "degrade": ["cache"]}},
            "canaries": {"c": {"chain": "default", "candidate": "one"}},
            "alerts": {"webhook": "env:HOOK"},
        },
        "x",
    )
    assert config.not_yet() == [
        "providers.one.rpm",
        "providers.one.tpm",
        'chains.default.strategy = "hedge"',
        "chains.default.degrade",
        "canaries.c",
        "alerts.webhook",
    ]
    assert parse(body(), "x").not_yet() == []


def test_a_missing_file_is_named_with_what_to_do(tmp_path: Path):
    with pytest.raises(UsageError, match=r"no .*nowhere\.toml here: copy backstop\.toml"):
        load(tmp_path / "nowhere.toml")


@pytest.mark.parametrize("content", [b"[providers", b"\xff\xfe", b"a = 1\na = 2"])
def test_a_file_that_is_no_toml_is_named(tmp_path: Path, content):
    file = tmp_path / "backstop.toml"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"backstop\.toml (is not TOML|cannot be read)"):
        load(file)


def test_a_directory_cannot_be_read(tmp_path: Path):
    with pytest.raises(UsageError, match="cannot be read"):
        load(tmp_path)
