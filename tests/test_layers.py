"""The layout is kept: who may import whom (import-linter's contracts in pyproject.toml), and who may read the environment."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINT = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
# Settings are read by pydantic in worker/settings.py; keys of providers in config.key(); commands and the embedded servers
# hand the environment on to processes they start.
READERS = ("worker/config.py", "worker/cli/", "worker/embedded/")


def lint(tree: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LINT, "--no-cache"], cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for name in ("worker", "api"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_import_keeps_to_the_layout():
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("module", "forbidden", "contract"),
    [
        ("worker/ledger.py", "from worker.attempt import Attempts", "a job's way, from top to bottom"),
        ("worker/chain.py", "from worker import submit", "a job's way, from top to bottom"),
        ("worker/newcomer.py", "", "a job's way, from top to bottom"),
        ("worker/reads.py", "from api import schemas", "the worker knows nothing of the API"),
        ("api/jobs.py", "from worker.chain import Chain", "the API asks no provider and settles nothing"),
        ("worker/attempt.py", "import celery", "Celery ends at app and tasks"),
    ],
)
def test_a_forbidden_import_is_found(module, forbidden, contract, copy):
    with (copy / module).open("a") as file:
        file.write(f"\n{forbidden}\n")
    done = lint(copy)
    assert done.returncode == 1
    if module == "worker/newcomer.py":
        assert "newcomer" in done.stdout
    else:
        assert f"{contract} BROKEN" in done.stdout


def environment_readers(source: str) -> list[int]:
    """Lines that reach for the environment."""
    nodes = ast.walk(ast.parse(source))
    return [n.lineno for n in nodes if isinstance(n, ast.Attribute) and n.attr in ("environ", "environb", "getenv")]


def test_only_settings_keys_and_those_who_start_processes_read_the_environment():
    found = {
        f"{path.relative_to(ROOT).as_posix()}:{line}"
        for package in ("worker", "api", "migrations")
        for path in (ROOT / package).rglob("*.py")
        for line in environment_readers(path.read_text("utf-8"))
    }
    assert [place for place in sorted(found) if not place.startswith(READERS)] == []


def test_a_reader_of_the_environment_is_found():
    assert environment_readers("import os\nx = os.environ['A']\ny = os.getenv('B')\n") == [2, 3]
