"""docker-compose.yml and the Dockerfile, as far as they can be checked without an engine."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from worker.cli import cli
from worker.config import load
from worker.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if str(service["image"]).startswith("backstop:")}
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
SCRIPTS = Path(sys.executable).parent


def settings_names() -> set[str]:
    return {f"BACKSTOP_{name.upper()}" for name in Settings.model_fields} | {"DATABASE_URL", "REDIS_URL"}


def parsed(command: list[str]) -> click.Context:
    """The innermost command with its options read, not run. Raises click's UsageError."""
    context = cli.make_context("backstop", list(command))
    while isinstance(context.command, click.Group):
        name, inner, rest = context.command.resolve_command(context, [*context._protected_args, *context.args])
        assert name is not None
        assert inner is not None
        context = inner.make_context(name, rest, parent=context)
    return context


def test_every_role_is_there():
    assert set(SERVICES) == {
        "db", "redis", "migrate", "api", "worker-interactive", "worker-bulk", "beat", "flower", "simulate",
    }  # fmt: skip
    assert SERVICES["simulate"]["profiles"] == ["demo"]
    assert [name for name, service in SERVICES.items() if "profiles" in service] == ["simulate"]


def test_the_file_keeps_to_the_compose_specification():
    check = [SCRIPTS / "check-jsonschema", "--builtin-schema", "vendor.compose-spec", ROOT / "docker-compose.yml"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_dockerfile_is_clean():
    done = subprocess.run([SCRIPTS / "hadolint", ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", OURS)
def test_each_command_is_one_that_backstop_understands(name):
    parsed(OURS[name]["command"])


def test_a_misspelt_command_is_found():
    with pytest.raises(click.UsageError):
        parsed(["worker", "--lanes", "bulk"])


@pytest.mark.parametrize("name", OURS)
def test_each_variable_is_a_setting(name):
    assert set(OURS[name].get("environment", {})) <= settings_names()


def test_variables_and_secrets_of_the_image_are_settings():
    assert set(re.findall(r"BACKSTOP_[A-Z_]+", DOCKERFILE)) <= settings_names()
    assert all(secret in Settings.model_fields for service in OURS.values() for secret in service.get("secrets", []))
    defined = set(COMPOSE["secrets"])
    assert {secret for service in SERVICES.values() for secret in service.get("secrets", [])} == defined


def test_who_waits_for_health_waits_for_a_service_that_tells_it():
    for name, service in SERVICES.items():
        for target, how in service.get("depends_on", {}).items():
            assert target in SERVICES, f"{name} waits for {target}"
            if how["condition"] == "service_healthy":
                assert "healthcheck" in SERVICES[target]
            if how["condition"] == "service_completed_successfully":
                assert SERVICES[target]["restart"] == "no"


def test_nothing_works_before_the_migration():
    for name in ("api", "worker-interactive", "worker-bulk", "beat", "flower"):
        assert SERVICES[name]["depends_on"]["migrate"]["condition"] == "service_completed_successfully"


def test_images_are_pinned():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    for name, service in SERVICES.items():
        tag = str(service["image"]).partition(":")[2]
        assert re.match(r"\d+\.\d+", tag), f"{name}: {service['image']}"
        if name in OURS:
            assert tag == version


def test_ports_are_open_to_this_host_only():
    published = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_servers_are_on_a_network_that_leads_nowhere():
    assert COMPOSE["networks"]["inside"]["internal"] is True
    assert SERVICES["db"]["networks"] == SERVICES["redis"]["networks"] == ["inside"]


@pytest.mark.parametrize("name", OURS)
def test_our_processes_have_no_rights_they_do_not_need(name):
    service = OURS[name]
    assert service["user"] == "10001:10001"
    assert "USER 10001:10001" in DOCKERFILE
    assert service["read_only"] is service["init"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "/tmp" in service["tmpfs"]


def test_a_worker_gets_longer_to_stop_than_it_takes_to_drain():
    for name in ("worker-interactive", "worker-bulk"):
        drain_s = float(SERVICES[name]["environment"]["BACKSTOP_DRAIN_S"])
        assert float(SERVICES[name]["stop_grace_period"].removesuffix("s")) > drain_s


def test_a_worker_is_healthy_while_its_heartbeat_is_fresh(tmp_path):
    file = Path(SERVICES["worker-bulk"]["environment"]["BACKSTOP_HEARTBEAT_FILE"])
    _, _, *arguments, code = SERVICES["worker-bulk"]["healthcheck"]["test"]
    assert str(file) in code
    here = tmp_path / "heartbeat"

    def healthy() -> bool:
        program = code.replace(str(file), str(here))
        return subprocess.run([sys.executable, *arguments, program], capture_output=True, check=False).returncode == 0

    assert not healthy()
    here.touch()
    assert healthy()
    os.utime(here, (0, 0))
    assert not healthy()


def test_both_lanes_have_a_worker():
    lanes = [SERVICES[name]["command"][-1] for name in ("worker-interactive", "worker-bulk")]
    assert lanes == ["interactive", "bulk"]


def test_redis_never_evicts_and_postgres_18_keeps_its_data_in_the_volume():
    command = shlex.split(SERVICES["redis"]["command"])
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"
    assert command[command.index("--appendonly") + 1] == "yes"
    assert SERVICES["db"]["image"].startswith("postgres:18.")
    assert SERVICES["db"]["volumes"] == ["postgres:/var/lib/postgresql"]


def test_no_password_stands_in_the_file():
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    assert not re.search(r"://[^/\s:]*:[^@\s]+@", text)
    assert "POSTGRES_PASSWORD:" not in text
    ignored = (ROOT / ".gitignore").read_text("utf-8").split()
    assert {".env", "secrets/"} <= set(ignored)


def test_the_containers_configuration_is_the_shipped_one_with_another_host():
    shipped, ours = load(ROOT / "backstop.toml"), load(ROOT / "examples" / "backstop.compose.toml")
    assert ours.model_dump_json().replace("simulate:9090", "127.0.0.1:9090") == shipped.model_dump_json()
    assert SERVICES["simulate"]["command"][-1] == "9090"


def test_the_image_gets_every_path_it_copies_and_nothing_else_is_sent():
    sent = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copied = {source for source, _ in re.findall(r"^COPY ([^-\s]\S*) (\S+)$", DOCKERFILE, re.MULTILINE)}
    assert copied == sent
    assert all((ROOT / path).exists() for path in copied)
