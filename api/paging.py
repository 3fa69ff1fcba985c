"""Lists page by page, newest first: a cursor is the id of the last one seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar
from uuid import UUID

from fastapi import Request, Response


class _Listed(Protocol):
    @property
    def id(self) -> UUID: ...


Item = TypeVar("Item", bound=_Listed)


def cut_page(request: Request, response: Response, found: Sequence[Item], limit: int) -> tuple[Sequence[Item], str | None]:
    """The page out of `limit` + 1 that were looked for, and the cursor of the next one, which `Link: rel="next"` then says as well."""
    if len(found) <= limit:
        return found, None
    cursor = str(found[limit - 1].id)
    response.headers["Link"] = f'<{request.url.include_query_params(cursor=cursor)}>; rel="next"'
    return found[:limit], cursor
