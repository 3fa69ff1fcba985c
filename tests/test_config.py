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
            "chains.default.providers: 'one' stands in it twice",
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
    more = {"canaries": {"c": {"chain": "default", "candidate": "one"}}, "alerts": {"webhook": "env:HOOK"}}
    assert parse(body() | more, "x").not_yet() == ["canaries.c", "alerts.webhook"]
    assert parse(body(), "x").not_yet() == []


def a_chain(**chain):
    providers = {name: {"base_url": f"http://127.0.0.1:{port}/v1", "model": "m"} for port, name in enumerate(("one", "two", "three"), 1)}
    return {"providers": providers, "chains": {"default": {"providers": ["one", "two"]} | chain}}


@pytest.mark.parametrize(
    ("chain", "rule"),
    [
        ({"strategy": "hedge", "providers": ["one"]}, 'strategy = "hedge" needs at least two providers'),
        ({"strategy": "race", "providers": ["one"]}, 'strategy = "race" needs at least two providers'),
        ({"strategy": "race", "on_unknown": "fail"}, 'strategy = "race" pays twice, on_unknown = "fail" forbids it'),
        ({"hedge_dearer": True}, 'hedge_dearer means nothing without strategy = "hedge"'),
        ({"warm_share": 0.01, "providers": ["one"]}, "warm_share needs a second provider to keep warm"),
        ({"warm_share": 0.01, "strategy": "race"}, 'warm_share means nothing with strategy = "race", which asks all'),
        ({"degrade": ["smaller"]}, 'degrade has "smaller": name its provider, smaller = "…"'),
        ({"smaller": "three"}, 'smaller means nothing without "smaller" in degrade'),
        ({"degrade": ["smaller"], "smaller": "two"}, "smaller: two is in the chain already"),
        ({"degrade": ["static"]}, 'degrade has "static": give its text, static_text = "…"'),
        ({"static_text": "later"}, 'static_text means nothing without "static" in degrade'),
        ({"degrade": ["park", "cache"]}, '"park" waits until the deadline: it comes last in degrade'),
        ({"cache": {"stale_s": 5}}, 'cache means nothing without "cache" in degrade or fresh_s'),
    ],
)
def test_settings_of_a_chain_that_contradict_each_other_are_refused_with_the_rule(chain, rule):
    with pytest.raises(UsageError) as refused:
        parse(a_chain(**chain), "backstop.toml")
    assert str(refused.value) == f"backstop.toml: chains.default: {rule}"


def test_a_smaller_model_that_no_provider_serves_is_refused():
    with pytest.raises(UsageError, match=r"chains\.default\.smaller: no provider 'thre', did you mean 'three'"):
        parse(a_chain(degrade=["smaller"], smaller="thre"), "x")


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"timeout_s": 0.2, "connect_timeout_s": 0.3}, "connect_timeout_s is above timeout_s, which bounds the whole call"),
        ({"stall_timeout_s": 5}, "stall_timeout_s means nothing without stream = true"),
        ({"stream": True, "first_token_timeout_s": 90}, "first_token_timeout_s is above timeout_s, which bounds the whole call"),
    ],
)
def test_settings_of_a_provider_that_contradict_each_other_are_refused_with_the_rule(settings, rule):
    with pytest.raises(UsageError) as refused:
        parse({"providers": {"one": ONE | settings}, "chains": {"default": {"providers": ["one"]}}}, "x")
    assert str(refused.value) == f"x: providers.one: {rule}"


def test_what_costs_more_than_one_may_think_is_noted():
    assert parse(a_chain(), "x").notes() == []
    assert parse(a_chain(strategy="race"), "x").notes() == ["chains.default: a race pays all 2 providers for each job"]
    shared = a_chain()
    shared["providers"]["two"]["base_url"] = "http://127.0.0.1:1/other/v1"
    assert parse(shared, "x").notes() == ["chains.default: all its providers are at 127.0.0.1:1, and fail together when that does"]


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
