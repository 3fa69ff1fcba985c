"""Webhooks as a client of the API sees them."""

import json
from uuid import UUID, uuid4

URL = "https://example.com/told"


def created(stage, headers=None, **body):
    response = stage.client.post("/v1/webhooks", json={"url": URL, **body}, headers=headers)
    assert response.status_code == 201, response.text
    return response.json()


def a_delivery(stage, webhook, **fields):
    delivery_id = uuid4()
    sql = "INSERT INTO deliveries (id, webhook_id, event, subject_id, created_at) VALUES (:id, :webhook, 'job.failed', :id, :at)"
    stage.sql(sql, id=delivery_id, webhook=UUID(webhook["id"]), at=fields.get("at", "2026-01-01T00:00:00Z"))
    return str(delivery_id)


def test_a_webhook_is_made_with_a_secret_that_is_shown_once(stage):
    response = stage.client.post("/v1/webhooks", json={"url": URL, "events": ["batch.finished", "job.failed", "job.failed"]})
    new = response.json()
    assert (response.status_code, response.headers["Location"]) == (201, f"/v1/webhooks/{new['id']}")
    secret = new.pop("secret")
    assert secret.startswith("whsec_")
    assert new["events"] == ["job.failed", "batch.finished"]
    assert stage.client.get(f"/v1/webhooks/{new['id']}").json() == new
    assert stage.client.get("/v1/webhooks").json() == {"data": [new]}
    assert secret not in stage.client.get("/v1/webhooks").text


def test_without_events_all_are_told(stage):
    assert created(stage)["events"] == ["job.succeeded", "job.failed", "job.expired", "job.cancelled", "batch.finished"]


def test_what_cannot_be_told_is_refused_in_words(stage):
    for body in (
        {}, {"url": "http://example.com"}, {"url": "https://127.0.0.1/"}, {"url": 7}, {"url": URL, "events": []}, {"url": "\ud800"},
        {"url": URL, "events": ["job.started"]}, {"url": URL, "secret": "mine"}, {"url": URL, "events": ["job.failed"] * 6}, [],
    ):  # fmt: skip
        content = json.dumps(body)
        response = stage.client.post("/v1/webhooks", content=content, headers={"Content-Type": "application/json"})
        assert (response.status_code, response.headers["Content-Type"]) == (422, "application/problem+json"), body
    assert stage.client.get("/v1/webhooks").json()["data"] == []


def test_another_tenants_webhook_does_not_exist(stage):
    webhook, stranger = created(stage), stage.key("other")
    delivery = a_delivery(stage, webhook)
    own = f"/v1/webhooks/{webhook['id']}"
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/deliveries"), ("POST", f"/deliveries/{delivery}/redeliver")):
        assert stage.client.request(method, own + path, headers=stranger).status_code == 404
        for webhook_id in (str(uuid4()), "x", "%00"):
            assert stage.client.request(method, f"/v1/webhooks/{webhook_id}{path}").status_code == 404
    assert stage.client.get("/v1/webhooks", headers=stranger).json() == {"data": []}
    theirs = created(stage, stranger)
    assert stage.client.post(f"/v1/webhooks/{theirs['id']}/deliveries/{delivery}/redeliver", headers=stranger).status_code == 404
    assert len(stage.client.get(own + "/deliveries").json()["data"]) == 1


def test_a_deleted_webhook_is_gone_with_its_log(stage):
    webhook = created(stage)
    a_delivery(stage, webhook)
    response = stage.client.delete(f"/v1/webhooks/{webhook['id']}")
    assert (response.status_code, response.content) == (204, b"")
    assert stage.client.delete(f"/v1/webhooks/{webhook['id']}").status_code == 404
    assert stage.sql("SELECT FROM deliveries") == []


def test_the_log_goes_page_by_page_newest_first_and_shows_each_once(stage):
    webhook = created(stage)
    same = [a_delivery(stage, webhook) for _ in range(3)]
    newer = a_delivery(stage, webhook, at="2026-02-01T00:00:00Z")
    seen, url = [], f"/v1/webhooks/{webhook['id']}/deliveries?limit=2"
    while url:
        response = stage.client.get(url)
        page = response.json()
        seen += [one["id"] for one in page["data"]]
        assert page["has_more"] == (page["next_cursor"] is not None)
        url = response.links.get("next", {}).get("url")
    assert (seen[0], sorted(seen[1:])) == (newer, sorted(same))
    one = page["data"][0]
    assert (one["event"], one["state"], one["attempts"], one["http_status"]) == ("job.failed", "pending", 0, None)


def test_what_failed_or_was_delivered_is_sent_once_more(stage):
    webhook = created(stage)
    delivery = a_delivery(stage, webhook)
    for state in ("failed", "delivered"):
        stage.sql("UPDATE deliveries SET state = :state, attempts = 8, ended_at = now(), run_at = now() + interval '1 day'", state=state)
        response = stage.client.post(f"/v1/webhooks/{webhook['id']}/deliveries/{delivery}/redeliver")
        assert (response.status_code, response.json()["id"], response.json()["state"]) == (202, delivery, "pending")
        (row,) = stage.sql("SELECT attempts, ended_at, run_at <= now() AS due FROM deliveries")
        assert (row.attempts, row.ended_at, row.due) == (0, None, True)
    stage.sql("UPDATE webhooks SET disabled_at = now()")
    assert stage.client.post(f"/v1/webhooks/{webhook['id']}/deliveries/{delivery}/redeliver").status_code == 422
