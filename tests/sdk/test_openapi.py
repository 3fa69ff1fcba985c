"""Every route does what the OpenAPI description says, whatever it is sent: schemathesis, with all of its checks.

What no schema can say is put right on the way out (`fitting.py`, `schemathesis.toml`): a chain has to exist, an
Idempotency-Key to be a new one.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand import LONG_S, Site, open_site, two_keys

from worker.embedded.servers import Endpoints

HERE = Path(__file__).parent
EXAMPLES = "15"  # for each route, besides those the schema's corners give
SEED = "20261123"


@pytest.fixture(scope="module")
def site(servers: Endpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with open_site(servers, tmp_path_factory.mktemp("openapi"), well=True) as opened:
        yield opened


@pytest.mark.timeout(600)
def test_no_request_finds_a_difference_between_the_api_and_its_description(site, tmp_path):
    key, _ = asyncio.run(two_keys(str(site.settings.database_url), "schemathesis"))
    told = [
        "--header",
        f"Authorization: Bearer {key}",
        "--max-examples",
        EXAMPLES,
        "--seed",
        SEED,
        "--no-color",
    ]
    patience = ["--request-timeout", f"{LONG_S:.0f}", "--generation-database", "none", "--suppress-health-check", "all"]
    hooks = {"PYTHONPATH": str(HERE), "SCHEMATHESIS_HOOKS": "fitting"}
    env = os.environ | {"PYTHONWARNINGS": "default"} | hooks
    cli = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(HERE / "schemathesis.toml"), "run"]
    argv = [*cli, f"{site.url.removesuffix('/v1')}/openapi.json", *told, *patience]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    print(done.stdout[done.stdout.find("SUMMARY") :])
    assert done.returncode == 0, done.stdout
