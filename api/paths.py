"""Paths where a proxy serves the API below a prefix: `uvicorn --root-path /backstop`, or mounted in another application."""

from __future__ import annotations

from starlette.requests import Request
from starlette.types import Scope


def path_of(scope: Scope) -> str:
    """The path as the routes know it, without the prefix."""
    path, prefix = str(scope["path"]), scope.get("root_path", "").rstrip("/")
    return path[len(prefix) :] if prefix and path.startswith(f"{prefix}/") else path


def outer(request: Request, path: str) -> str:
    """The path as clients know it, with the prefix."""
    return f"{request.scope.get('root_path', '').rstrip('/')}{path}"
