"""The lock files pin everything by hash, name no address, and hold what pyproject.toml asks for."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {  # and how many pins each has at least
    "requirements.lock": 50,
    "requirements-dev.lock": 50,
    "bench/requirements-rivals.lock": 50,
    "tests/sdk/openai-1.lock": 15,
    "tests/sdk/openai-2.lock": 15,
}
PIN = re.compile(r"^([a-z0-9][a-z0-9._-]*)(?:\[[^]]*\])?==([^ ;\\]+)", re.MULTILINE)
ADDRESS = re.compile(r"://|--(?:extra-)?index-url|--find-links|--trusted-host|@ file:", re.IGNORECASE)


def pins(lock: str) -> dict[str, str]:
    return dict(PIN.findall((ROOT / lock).read_text("utf-8")))


def wanted(requirements: list[str]) -> set[str]:
    return {re.split(r"[\[<>=!~; ]", line)[0].lower().replace("_", "-") for line in requirements}


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_file_holds_no_address(lock):
    assert ADDRESS.findall((ROOT / lock).read_text("utf-8")) == []


def test_an_address_is_found():
    assert ADDRESS.findall("--index-url x\na @ file:///b\nhttps://c") == ["--index-url", "@ file:", "://"]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_a_hash(lock):
    entries = re.split(r"\n(?=[a-z0-9])", (ROOT / lock).read_text("utf-8"))
    bare = [entry.splitlines()[0] for entry in entries if PIN.match(entry) and "--hash=sha256:" not in entry]
    assert bare == []
    assert len(pins(lock)) > LOCKS[lock]


def test_the_lock_files_hold_every_requirement_and_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    run, dev = pins("requirements.lock"), pins("requirements-dev.lock")
    local = wanted(project["project"]["optional-dependencies"]["local"])
    assert wanted(project["project"]["dependencies"]) <= run.keys()
    assert wanted(project["dependency-groups"]["dev"]) | local <= dev.keys()
    assert not local & run.keys(), "the image brings no embedded servers"
    assert run.items() <= dev.items()
