"""Who is calling: `Authorization: Bearer KEY`, always."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, HTTPException
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.parts import Opened
from worker import keys

_BEARER = HTTPBearer(auto_error=False, description="An API key, as `backstop keys create` prints it.")


async def authenticated(parts: Opened, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)]) -> keys.Caller:
    """The holder of the key; 401 without one that works."""
    if credentials is None:
        raise HTTPException(401, "send your API key as `Authorization: Bearer KEY`", {"WWW-Authenticate": "Bearer"})
    caller = await keys.verify(parts.db, credentials.credentials)
    if caller is None:
        challenge = {"WWW-Authenticate": 'Bearer error="invalid_token"'}
        raise HTTPException(401, "this API key is not known here, or it was revoked", challenge)
    return caller


def allowed(scope: keys.Scope) -> Callable[[keys.Caller], keys.Caller]:
    """The holder of a key that may do this; 403 for one that may not."""

    def check(caller: Annotated[keys.Caller, Depends(authenticated)]) -> keys.Caller:
        if scope not in caller.scopes:
            raise HTTPException(403, f"this API key may not {scope}: use one with the scope `{scope}`")
        return caller

    return check


Reads = Annotated[keys.Caller, Depends(allowed(keys.Scope.READ))]
Submits = Annotated[keys.Caller, Depends(allowed(keys.Scope.SUBMIT))]
Operates = Annotated[keys.Caller, Depends(allowed(keys.Scope.OPERATE))]
