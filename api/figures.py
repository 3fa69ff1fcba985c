"""Figures: how the providers are, and what calls cost; and an operator's hand on a breaker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict

from api.auth import Operates, Reads
from api.parts import Opened, Parts
from api.problems import KnownParameters, documented
from api.schemas import CallsToday, CostList, CostOut, ProviderList, ProviderOut
from api.spelling import Span
from worker import reads
from worker.errors import NotFound
from worker.resilience.health import Status
from worker.views import CostKey

router = APIRouter(prefix="/v1", tags=["figures"], responses=documented(401, 403, 503), dependencies=[KnownParameters])


@router.get("/providers")
async def list_providers(caller: Reads, parts: Opened) -> ProviderList:
    """Each provider of the config: its breaker and limits as all workers share them, and this tenant's calls since midnight UTC."""
    return ProviderList(data=await _seen(await parts.gates.status(list(parts.config.providers)), parts, caller.tenant))


class BreakerIn(BaseModel):
    """`open`: nobody asks the provider any more; `close`: all do, whatever happens; `reset`: it is judged by its answers again."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"action": "open"}})

    action: Literal["open", "close", "reset"]


@router.post("/providers/{name}/breaker", responses=documented(400, 404, 413, 422))
async def set_breaker(name: str, body: BreakerIn, caller: Operates, parts: Opened) -> ProviderOut:
    """Every worker heeds it from its next call on, for the jobs of all tenants, until it is reset."""
    if name not in parts.config.providers:
        raise NotFound(f"there is no provider of that name; there are: {', '.join(parts.config.providers)}")
    status = await parts.gates.force(name, "closed" if body.action == "close" else body.action)
    (provider,) = await _seen([status], parts, caller.tenant)
    return provider


async def _seen(statuses: Sequence[Status], parts: Parts, tenant: str) -> list[ProviderOut]:
    today = {day.provider: day for day in await reads.providers_today(parts.reports, tenant=tenant)}
    return [
        ProviderOut(
            name=status.provider,
            model=parts.config.providers[status.provider].model,
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
        for status in statuses
    ]


@router.get("/costs", responses=documented(422))
async def list_costs(
    caller: Reads,
    parts: Opened,
    by: CostKey = CostKey.PROVIDER,
    since: Annotated[Span, Query(description="How far back: a number and m, h, d or w.")] = "7d",
) -> CostList:
    """What this tenant's calls cost, by provider, model, batch or UTC day."""
    start = reads.ago(since)
    rows = await reads.costs(parts.reports, by, start, caller.tenant)
    return CostList(by=by, since=start, data=[CostOut.model_validate(row) for row in rows])
