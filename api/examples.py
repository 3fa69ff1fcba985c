"""One job, its batch and what they cost, as the OpenAPI document shows them."""

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


def _event(name: str, event_id: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\nid: {event_id}\n\n"


JOB_EVENTS = _event("running", "1.running", {"state": "running", "attempt": 1, "code": None}) + _event("succeeded", "1.succeeded", JOB)
BATCH_EVENTS = _event("progress", "open.100.41.1.0.0", BATCH)
