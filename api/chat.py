"""Chat completions as OpenAI answers them, by way of the interactive lane."""

from __future__ import annotations

from fastapi import APIRouter

router = APIRouter(prefix="/v1", tags=["chat"])
