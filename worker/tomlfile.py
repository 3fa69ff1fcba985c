"""TOML that a person wrote, read with one clear line for what is wrong."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from worker.errors import UsageError


def read(path: Path, *, absent: str) -> dict[str, Any]:
    """What the file holds. Raises UsageError naming the file; `absent` is what to say when there is none."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(absent) from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    except ValueError:  # Python's limit, which names no line
        raise UsageError(f"{path}: a number in it has too many digits") from None
