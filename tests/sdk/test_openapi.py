"""Every route does what the OpenAPI description says, whatever it is sent: schemathesis, with all of its checks but one.

Left out: that whatever fits the schema is accepted. A chain has to exist, a URL to be public, a cursor to have been given out; no schema
says that, and each of these is answered with a documented 400 or 422.
"""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from stand import LONG_S, Site, open_site, two_keys

from worker.embedded.servers import Endpoints

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
        "--checks",
        "all",
        "--exclude-checks",
        "positive_data_acceptance",
        "--max-examples",
        EXAMPLES,
        "--seed",
        SEED,
        "--no-color",
    ]
    patience = ["--request-timeout", f"{LONG_S:.0f}", "--generation-database", "none", "--suppress-health-check", "all"]
    done = subprocess.run(
        [sys.executable, "-m", "schemathesis.cli", "run", f"{site.url.removesuffix('/v1')}/openapi.json", *told, *patience],
        cwd=tmp_path, env=os.environ | {"PYTHONWARNINGS": "default"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout[done.stdout.find("SUMMARY") :])
    assert done.returncode == 0, done.stdout
