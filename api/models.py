"""The names a request may give as its `model`: chains, providers, and the providers' models."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict

from api.auth import Reads
from api.openai_errors import OpenAIError, documented_openai
from api.parts import Opened
from worker.config import Config

router = APIRouter(prefix="/v1", tags=["openai"], responses=documented_openai(401, 403, 503))

_EXAMPLE: dict[str, Any] = {"id": "default", "object": "model", "created": 0, "owned_by": "backstop"}


class ModelOut(BaseModel):
    """`owned_by` is `backstop` for a chain or a provider, and the provider's name for the model it serves. `created` is not known: 0."""

    model_config = ConfigDict(json_schema_extra={"example": _EXAMPLE})

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str


class ModelList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": {"object": "list", "data": [_EXAMPLE]}})

    object: Literal["list"] = "list"
    data: list[ModelOut]


@router.get("/models")
async def list_models(caller: Reads, parts: Opened) -> ModelList:
    """Each name once: what two of them share means the chain first, then the provider, then the first to serve the model."""
    return ModelList(data=list(_models(parts.config).values()))


@router.get("/models/{model:path}", responses=documented_openai(404))
async def retrieve_model(model: str, caller: Reads, parts: Opened) -> ModelOut:
    """The model of that name. Names may hold slashes."""
    found = _models(parts.config).get(model)
    if found is None:
        raise OpenAIError(
            404, f"the model {model[:100]!r} does not exist: GET /v1/models lists those that do", code="model_not_found", param="model"
        )
    return found


def _models(config: Config) -> dict[str, ModelOut]:
    owners = dict.fromkeys([*config.chains, *config.providers], "backstop")
    for name, provider in config.providers.items():
        owners.setdefault(provider.model, name)
    return {name: ModelOut(id=name, owned_by=owner) for name, owner in owners.items()}
