"""Which chain a job takes, and whose call row its claim opens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.config import ChainConfig, Config
from worker.errors import UsageError
from worker.job import new_id
from worker.route import first_calls, route, warmed

CONFIG = Config.model_validate(
    {
        "providers": {
            "one": {"base_url": "http://127.0.0.1:1/v1", "model": "big"},
            "two": {"base_url": "http://127.0.0.1:1/v1", "model": "small"},
            "three": {"base_url": "http://127.0.0.1:1/v1", "model": "small"},
        },
        "chains": {"default": {"providers": ["one", "two"]}, "cheap": {"providers": ["two", "one"]}},
    }
)


@pytest.mark.parametrize(
    ("name", "providers"),
    [
        ("cheap", ("two", "one")),
        ("three", ("three",)),
        ("small", ("two",)),
        ("left-the-config", ("one", "two")),
    ],
)
def test_a_name_is_a_chain_else_a_provider_else_a_model_else_the_default_chain(name, providers):
    assert route(CONFIG, name).providers == providers


def test_the_first_call_of_each_name_is_of_the_first_provider_of_its_chain():
    assert first_calls(CONFIG, lambda provider: True) == {
        "big": ("one", "big"),
        "small": ("two", "small"),
        "one": ("one", "big"),
        "two": ("two", "small"),
        "three": ("three", "small"),
        "default": ("one", "big"),
        "cheap": ("two", "small"),
    }


def test_providers_that_seem_shut_are_passed_over():
    assert first_calls(CONFIG, lambda provider: provider == "two") == {
        "small": ("two", "small"),
        "two": ("two", "small"),
        "default": ("two", "small"),
        "cheap": ("two", "small"),
    }


@given(st.sets(st.sampled_from(["one", "two", "three"])))
def test_the_guess_is_always_a_provider_of_the_route_that_seems_open(closed):
    for name, (provider, model) in first_calls(CONFIG, lambda provider: provider in closed).items():
        assert provider in closed
        assert provider in route(CONFIG, name).providers
        assert model == CONFIG.providers[provider].model


def test_no_name_of_the_config_is_unknown_to_it():
    for name in first_calls(CONFIG, lambda provider: True):
        try:
            CONFIG.chain(name)
        except UsageError:
            pytest.fail(f"{name} has a first call but no chain")


def test_a_share_of_the_jobs_asks_each_later_provider_first_and_always_the_same_one():
    chain = ChainConfig(providers=("a", "b", "c"), warm_share=0.1)
    ids = [new_id() for _ in range(5_000)]
    first = [warmed(chain, job_id).providers[0] for job_id in ids]
    assert 350 < 5_000 - first.count("a") < 650  # within seven standard deviations of 500
    assert first.count("b") > 100
    assert first.count("c") > 100
    assert first == [warmed(chain, job_id).providers[0] for job_id in ids]


@given(st.uuids())
def test_a_warm_chain_asks_the_same_providers_the_first_of_them_second(job_id):
    chain = ChainConfig(providers=("a", "b", "c"), warm_share=0.1)
    providers = warmed(chain, job_id).providers
    assert sorted(providers) == ["a", "b", "c"]
    assert "a" in providers[:2]
    assert warmed(ChainConfig(providers=("a", "b", "c")), job_id).providers == ("a", "b", "c")
