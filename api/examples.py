"""One job, its batch, what they cost and who is told, as the OpenAPI document shows them."""

from __future__ import annotations

import json
from typing import Any

_JOB_ID = "0193e5c8-f0a6-7c9a-8d0f-6a1b2c3d4e5f"
_BATCH_ID = "0193e5c8-ee11-7b02-9c41-2f3e4d5c6b7a"

USAGE: dict[str, Any] = {"input_tokens": 12, "output_tokens": 5, "cached_tokens": None, "reasoning_tokens": None}
RESULT: dict[str, Any] = {
    "content": "Hello! How can I help?",
    "finish_reason": "stop",
    "provider": "deepseek",
    "model": "deepseek-v3.2",
    "usage": USAGE,
    "degraded": None,
}
JOB: dict[str, Any] = {
    "id": _JOB_ID,
    "state": "succeeded",
    "created_at": "2026-03-01T09:30:00.120000Z",
    "finished_at": "2026-03-01T09:30:01.034000Z",
    "result": RESULT,
    "cost_usd": "0.00000546",
    "error": None,
    "calls": 1,
    "unknown_calls": 0,
    "attempts": 0,
    "chain": "default",
    "lane": "interactive",
    "deadline_at": "2026-03-01T09:32:00.120000Z",
    "metadata": {"ticket": "T-1"},
    "batch_id": None,
    "custom_id": None,
}
JOB_PAGE: dict[str, Any] = {"data": [JOB], "has_more": True, "next_cursor": _JOB_ID}
CALL: dict[str, Any] = {
    "id": "0193e5c8-f0b1-7d55-b7a3-0c1d2e3f4a5b",
    "provider": "deepseek",
    "model": "deepseek-v3.2",
    "attempt": 1,
    "opened_at": "2026-03-01T09:30:00.131000Z",
    "started_at": "2026-03-01T09:30:00.133000Z",
    "ended_at": "2026-03-01T09:30:01.029000Z",
    "latency_ms": 896,
    "outcome": "answered",
    "http_status": 200,
    "error_code": None,
    "input_tokens": 12,
    "output_tokens": 5,
    "cached_tokens": None,
    "reasoning_tokens": None,
    "estimated": False,
    "billing": "billed",
    "cost_usd": "0.00000546",
    "price_source": "config",
}
LINE: dict[str, Any] = {
    "id": _JOB_ID,
    "custom_id": "T-1",
    "ordinal": 1,
    "state": "succeeded",
    "result": RESULT,
    "cost_usd": "0.00000546",
    "error": None,
    "cursor": "1",
}
RESULT_LINE = json.dumps(LINE) + "\n"
PROGRESS: dict[str, Any] = {"state": "queued", "attempt": 1, "code": "all_providers_failed"}
BATCH: dict[str, Any] = {
    "id": _BATCH_ID,
    "name": "monday",
    "state": "open",
    "total": 100,
    "succeeded": 41,
    "degraded": 0,
    "failed": 1,
    "cancelled": 0,
    "expired": 0,
    "created_at": "2026-03-01T09:29:58.001000Z",
    "finished_at": None,
}
PROVIDER: dict[str, Any] = {
    "name": "deepseek",
    "model": "deepseek-v3.2",
    "state": "closed",
    "health": "healthy",
    "retry_after_s": 0.0,
    "reason": None,
    "in_flight": 2,
    "requests_left": 2950,
    "tokens_left": 991_200,
    "rate_multiplier": 1.0,
    "today": {"calls": 812, "answered": 809, "failed": 3, "p50_ms": 640, "p95_ms": 1900, "unknown": 0, "cost_usd": "0.0117"},
}
COST: dict[str, Any] = {
    "key": "deepseek",
    "calls": 812,
    "billed": 809,
    "unknown": 0,
    "input_tokens": 9_744,
    "output_tokens": 21_300,
    "cost_usd": "0.0117",
    "coverage": 1.0,
    "estimated_calls": 0,
    "estimated_usd": "0",
}

WEBHOOK: dict[str, Any] = {
    "id": "0193e5c8-a0b1-7c2d-8e3f-4a5b6c7d8e9f",
    "url": "https://example.com/backstop",
    "events": ["job.failed", "batch.finished"],
    "created_at": "2026-03-01T09:00:00.000000Z",
    "failing_since": None,
    "disabled_at": None,
}
NEW_WEBHOOK: dict[str, Any] = {**WEBHOOK, "secret": "whsec_" + "A" * 43 + "="}
DELIVERY: dict[str, Any] = {
    "id": "0193e5c8-f4d2-7a1b-9c3d-5e6f7a8b9c0d",
    "event": "batch.finished",
    "subject_id": _BATCH_ID,
    "state": "delivered",
    "attempts": 1,
    "created_at": "2026-03-01T09:41:12.400000Z",
    "run_at": "2026-03-01T09:41:12.900000Z",
    "ended_at": "2026-03-01T09:41:12.900000Z",
    "http_status": 204,
    "error_code": None,
}
FILE: dict[str, Any] = {
    "id": "file-0193e5c8f0a67c9a8d0f6a1b2c3d4e5f",
    "object": "file",
    "bytes": 104_300,
    "created_at": 1_772_357_398,
    "filename": "tickets.jsonl",
    "purpose": "batch",
    "status": "processed",
    "expires_at": 1_774_949_398,
}
REQUEST_LINE: dict[str, Any] = {
    "custom_id": "T-1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"model": "default", "messages": [{"role": "user", "content": "Hello"}]},
}
_PAST = {"created_at": 1_772_357_400, "in_progress_at": 1_772_357_402, "expires_at": 1_772_443_800, "finalizing_at": 1_772_358_071}
_FUTURE = dict.fromkeys(("failed_at", "expired_at", "cancelling_at", "cancelled_at"))
FILE_BATCH: dict[str, Any] = {
    "id": "batch_0193e5c8ee117b029c412f3e4d5c6b7a",
    "object": "batch",
    "endpoint": "/v1/chat/completions",
    "errors": None,
    "input_file_id": FILE["id"],
    "completion_window": "24h",
    "status": "completed",
    "output_file_id": "file-0193e5d11c0a7e55b7a30c1d2e3f4a5b",
    "error_file_id": None,
    **_PAST,
    "completed_at": 1_772_358_072,
    **_FUTURE,
    "request_counts": {"total": 100, "completed": 100, "failed": 0},
    "usage": {"input_tokens": 9_744, "output_tokens": 2_130, "total_tokens": 11_874},
    "metadata": {"night": "monday"},
}


def page_of(item: dict[str, Any]) -> dict[str, Any]:
    """As OpenAI lists things."""
    return {"object": "list", "data": [item], "first_id": item["id"], "last_id": item["id"], "has_more": False}


def _event(name: str, event_id: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\nid: {event_id}\n\n"


JOB_EVENTS = _event("running", "1.running", {"state": "running", "attempt": 1, "code": None}) + _event("succeeded", "1.succeeded", JOB)
BATCH_EVENTS = _event("progress", "open.100.41.1.0.0", BATCH)
