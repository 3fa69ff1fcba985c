"""What the project's files must never hold, and how large its modules and functions may grow."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MODULE_LINES, FUNCTION_LINES = 300, 40
HOME = re.compile(r"(?<![\w.:/-])/(?:home|root|Users|work|mnt)/[\w.-]+")
TEXT = {".py", ".toml", ".md", ".yml", ".yaml", ".lua", ".sql", ".txt", ".lock", ".mako", ".html", ".css", ".js", ".csv", ""}


def tracked() -> list[Path]:
    """Every text file git knows or would add; without git (an unpacked archive) nothing is checked."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if names.returncode:
        pytest.skip("not a git checkout")
    files = (ROOT / name for name in names.stdout.splitlines())
    return [file for file in files if file.is_file() and file.suffix in TEXT]


def sources() -> list[Path]:
    return sorted(path for package in ("worker", "api", "bench") for path in (ROOT / package).rglob("*.py"))


def machine_paths(text: str) -> list[str]:
    return HOME.findall(text)


def long_functions(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES:
                yield f"{node.name} has {lines} lines"


def test_no_file_names_a_place_on_somebody_s_machine():
    found = {
        f"{file.relative_to(ROOT)}: {path}"
        for file in tracked()
        if file != Path(__file__)
        for path in machine_paths(file.read_text("utf-8", "replace"))
    }
    assert not found


def test_a_place_on_somebody_s_machine_is_found():
    assert machine_paths("see /home/ann/x, /root/.cache and /Users/bob") == ["/home/ann", "/root/.cache", "/Users/bob"]
    assert machine_paths("http://host/home/page, ./work/x, a/root/b, /v1/work") == []


def test_modules_stay_short():
    long = {str(path.relative_to(ROOT)): lines for path in sources() if (lines := len(path.read_text("utf-8").splitlines())) > MODULE_LINES}
    assert not long


def test_functions_stay_short():
    found = [f"{path.relative_to(ROOT)}: {words}" for path in sources() for words in long_functions(path.read_text("utf-8"))]
    assert not found


def test_a_long_function_is_found():
    body = "    x = 1\n" * FUNCTION_LINES
    assert list(long_functions(f"async def long():\n{body}")) == ["long has 41 lines"]
    assert list(long_functions(f"def short():\n{body[10:]}")) == []
