"""Figures: how the providers are, and what calls cost."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api.auth import Reads
from api.parts import Opened
from api.problems import KnownParameters, documented
from api.schemas import CallsToday, CostList, CostOut, ProviderList, ProviderOut
from api.spelling import Span
from worker import reads
from worker.views import CostKey

router = APIRouter(prefix="/v1", tags=["figures"], responses=documented(401, 403, 503), dependencies=[KnownParameters])


@router.get("/providers")
async def list_providers(caller: Reads, parts: Opened) -> ProviderList:
    """Each provider of the config: its breaker and limits as all workers share them, and this tenant's calls since midnight UTC."""
    providers = parts.config.providers
    today = {day.provider: day for day in await reads.providers_today(parts.db, tenant=caller.tenant)}
    return ProviderList(
        data=[
            ProviderOut(
                name=status.provider,
                model=providers[status.provider].model,
                state=status.state,
                health=status.health,
                retry_after_s=status.retry_after_s,
                reason=status.reason,
                in_flight=status.in_flight,
                requests_left=status.requests_left,
                tokens_left=status.tokens_left,
                rate_multiplier=status.rate_multiplier,
                today=CallsToday.model_validate(today.get(status.provider, CallsToday())),
            )
            for status in await parts.gates.status(list(providers))
        ]
    )


@router.get("/costs", responses=documented(422))
async def list_costs(
    caller: Reads,
    parts: Opened,
    by: CostKey = CostKey.PROVIDER,
    since: Annotated[Span, Query(description="How far back: a number and m, h, d or w.")] = "7d",
) -> CostList:
    """What this tenant's calls cost, by provider, model, batch or UTC day."""
    start = reads.ago(since)
    rows = await reads.costs(parts.db, by, start, caller.tenant)
    return CostList(by=by, since=start, data=[CostOut.model_validate(row) for row in rows])
