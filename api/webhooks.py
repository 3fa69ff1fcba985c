"""Who is told when jobs and batches end."""

from __future__ import annotations

from typing import Annotated, Literal
from uuid import UUID

from fastapi import APIRouter, HTTPException, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from api import examples
from api.auth import Operates
from api.paging import cut_page
from api.parts import Opened
from api.paths import outer
from api.problems import KnownParameters, documented
from api.schemas import Moment
from worker import reads, webhooks
from worker.errors import NotFound, TooMany
from worker.webhooks import EVENTS, LONGEST_URL, Event, Webhook

router = APIRouter(prefix="/v1", tags=["webhooks"], responses=documented(401, 403, 422, 503), dependencies=[KnownParameters])


class WebhookIn(BaseModel):
    """Where to, and which ends are to be told there; all of them unless `events` names some."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"example": {"url": "https://example.com/backstop"}})

    url: str = Field(max_length=LONGEST_URL, json_schema_extra={"pattern": r"^https://([a-z0-9-]+\.)+[a-z]{2,}(/[!$-;=A-Z_a-z~-]*)?$"})
    events: list[Event] = Field(list(EVENTS), min_length=1, max_length=len(EVENTS))


class WebhookOut(BaseModel):
    """`failing_since`: nothing has arrived there since then. `disabled_at`: nothing is sent, it said 410 or failed for five days."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"example": examples.WEBHOOK})

    id: UUID
    url: str
    events: list[str]
    created_at: Moment
    failing_since: Moment | None
    disabled_at: Moment | None


class NewWebhookOut(WebhookOut):
    model_config = ConfigDict(json_schema_extra={"example": examples.NEW_WEBHOOK})

    secret: str = Field(description="Signs what is sent, as standardwebhooks.com says. Shown only this once.")


class WebhookList(BaseModel):
    model_config = ConfigDict(json_schema_extra={"example": {"data": [examples.WEBHOOK]}})

    data: list[WebhookOut]


class DeliveryOut(BaseModel):
    """One event on its way. `subject_id` is of the job or the batch; `run_at` is when it is sent next, if it is pending."""

    model_config = ConfigDict(from_attributes=True, json_schema_extra={"example": examples.DELIVERY})

    id: UUID
    event: str
    subject_id: UUID
    state: Literal["pending", "delivered", "failed"]
    attempts: int
    created_at: Moment
    run_at: Moment
    ended_at: Moment | None
    http_status: int | None
    error_code: str | None


class DeliveryPage(BaseModel):
    """Newest first. `next_cursor` asks for the page behind this one."""

    model_config = ConfigDict(json_schema_extra={"example": {"data": [examples.DELIVERY], "has_more": False, "next_cursor": None}})

    data: list[DeliveryOut]
    has_more: bool
    next_cursor: str | None


@router.post("/webhooks", status_code=201, responses=documented(400, 409, 413))
async def create_webhook(body: WebhookIn, request: Request, response: Response, caller: Operates, parts: Opened) -> NewWebhookOut:
    """Ends of jobs are told from now on, signed, until the endpoint says 2xx. Jobs of a batch are told as one, at its end."""
    try:
        new = await webhooks.create(parts.db, tenant=caller.tenant, url=body.url, events=body.events, private=parts.webhooks_private)
    except TooMany as error:
        raise HTTPException(409, str(error)) from None
    response.headers["Location"] = outer(request, f"/v1/webhooks/{new.webhook.id}")
    return NewWebhookOut(secret=new.secret, **WebhookOut.model_validate(new.webhook).model_dump())


@router.get("/webhooks")
async def list_webhooks(caller: Operates, parts: Opened) -> WebhookList:
    """All of them, newest first."""
    return WebhookList(data=[WebhookOut.model_validate(webhook) for webhook in await webhooks.listed(parts.db, caller.tenant)])


@router.get("/webhooks/{webhook_id}", responses=documented(404))
async def get_webhook(webhook_id: str, caller: Operates, parts: Opened) -> WebhookOut:
    return WebhookOut.model_validate(await _known(webhook_id, caller.tenant, parts))


@router.delete("/webhooks/{webhook_id}", status_code=204, responses=documented(404))
async def delete_webhook(webhook_id: str, caller: Operates, parts: Opened) -> None:
    """Nothing more is sent there, what was on its way included."""
    await webhooks.delete(parts.db, (await _known(webhook_id, caller.tenant, parts)).id, caller.tenant)


@router.get("/webhooks/{webhook_id}/deliveries", responses=documented(404))
async def list_deliveries(
    webhook_id: str,
    request: Request,
    response: Response,
    caller: Operates,
    parts: Opened,
    cursor: UUID | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 50,
) -> DeliveryPage:
    """What was and is to be sent there, newest first, for 30 days. `cursor` is the `next_cursor` of the page before."""
    webhook = await _known(webhook_id, caller.tenant, parts)
    found = await webhooks.deliveries(parts.db, webhook.id, before=cursor, limit=limit + 1)
    page, next_cursor = cut_page(request, response, found, limit)
    return DeliveryPage(data=[DeliveryOut.model_validate(one) for one in page], has_more=next_cursor is not None, next_cursor=next_cursor)


@router.post("/webhooks/{webhook_id}/deliveries/{delivery_id}/redeliver", status_code=202, responses=documented(404))
async def redeliver(webhook_id: str, delivery_id: str, caller: Operates, parts: Opened) -> DeliveryOut:
    """Sent once more under the same id, delivered or failed."""
    webhook, known = await _known(webhook_id, caller.tenant, parts), reads.uuid_or_none(delivery_id)
    if known is None:
        raise NotFound("there is no delivery of that id")
    return DeliveryOut.model_validate(await webhooks.redeliver(parts.db, webhook, known))


async def _known(webhook_id: str, tenant: str, parts: Opened) -> Webhook:
    """The tenant's webhook of that id. Raises NotFound."""
    known = reads.uuid_or_none(webhook_id)
    if known is None:
        raise NotFound("there is no webhook of that id")
    return await webhooks.one(parts.db, known, tenant)
