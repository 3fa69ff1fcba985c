"""Webhooks against a real Postgres and endpoints that are really asked."""

import asyncio
import json
from contextlib import asynccontextmanager
from datetime import datetime
from uuid import uuid4

import pytest
from aiohttp import web
from stage import a_batch, a_job, answered, close_batch, ending, play, rows, take, until
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from worker import deliver as delivering_module
from worker import webhooks
from worker.deliver import BACKOFF_S, EACH, JITTER, deliver
from worker.errors import NotFound, TooMany, UsageError
from worker.intervene import cancel, requeue
from worker.job import JobState, new_id
from worker.ledger import settle
from worker.rescue import expire
from worker.webhooks import EVENTS, is_public

URL = "https://example.com/told"


async def told(db):
    return [(row.event, row.subject_id) for row in await rows(db, "SELECT event, subject_id FROM deliveries ORDER BY created_at, id")]


class Endpoint:
    """Keeps what it is sent, and answers with `status`; while `stuck`, it never does."""

    def __init__(self):
        self.received = []
        self.status = 200
        self.headers = {}
        self.stuck = False
        self.over = asyncio.Event()
        self.endless = False
        self.url = ""

    async def take(self, request):
        self.received.append((dict(request.headers), await request.text(), request.method, request.path_qs))
        if self.stuck:
            await self.over.wait()
        if self.endless:
            response = web.StreamResponse()
            await response.prepare(request)
            while True:
                await response.write(b"x" * 1024)
        return web.Response(status=self.status, headers=self.headers, text="thank you")


@asynccontextmanager
async def an_endpoint():
    endpoint = Endpoint()
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", endpoint.take)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    endpoint.url = f"http://127.0.0.1:{runner.addresses[0][1]}/told?by=backstop"
    try:
        yield endpoint
    finally:
        endpoint.over.set()
        await runner.cleanup()


@asynccontextmanager
async def delivering(db, *, private=True):
    task = asyncio.create_task(deliver(db, private=private))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled():
            task.result()


async def a_webhook(db, url=URL, tenant="default", **wanted):
    return await webhooks.create(db, tenant=tenant, url=url, private=True, **wanted)


async def a_delivery(db, webhook, event="job.succeeded", subject=None):
    delivery_id = uuid4()
    sql = "INSERT INTO deliveries (id, webhook_id, event, subject_id) VALUES (:id, :webhook, :event, :subject)"
    await rows(db, sql, id=delivery_id, webhook=webhook.id, event=event, subject=subject or new_id())
    return delivery_id


def test_every_end_of_a_job_is_told_once_and_nothing_else_of_it(database_url):
    async def story(db):
        await a_webhook(db)
        good, bad, again, unwanted = [await a_job(db) for _ in range(4)]
        late = await a_job(db, deadline_s=0.001)
        claims = await take(db, [good, bad, again])
        await settle(db, [answered(claims[0]), ending(claims[1]), ending(claims[2], JobState.QUEUED)])
        assert await settle(db, [answered(claims[0]), ending(claims[1])], again=True) == [True, True]
        assert (await cancel(db, job_ids=[unwanted])).cancelled == 1
        async with db.connect() as connection:
            assert await expire(connection) == [late]
        expected = [("job.succeeded", good), ("job.failed", bad), ("job.cancelled", unwanted), ("job.expired", late)]
        assert sorted(await told(db)) == sorted(expected)

    play(database_url, story)


def test_a_running_job_that_is_cancelled_is_told_when_it_has_ended(database_url):
    async def story(db):
        await a_webhook(db)
        job_id = await a_job(db)
        (claimed,) = await take(db, [job_id])
        assert (await cancel(db, job_ids=[job_id])).flagged == 1
        assert await told(db) == []
        await settle(db, [ending(claimed, JobState.QUEUED)])
        assert await told(db) == [("job.cancelled", job_id)]

    play(database_url, story)


def test_a_batch_is_told_once_when_its_last_job_has_ended(database_url):
    async def story(db):
        await a_webhook(db)
        batch, ids = await a_batch(db, 3)
        claims = await take(db, ids)
        await settle(db, [answered(claims[0]), ending(claims[1])])
        assert await told(db) == []
        await settle(db, [answered(claims[2])])
        assert await told(db) == [("batch.finished", batch.id)]
        await requeue(db, batch_id=batch.id)
        (once_more,) = await take(db, [ids[1]])
        await settle(db, [answered(once_more)])
        assert await told(db) == [("batch.finished", batch.id)] * 2

    play(database_url, story)


def test_a_batch_that_ended_before_it_was_complete_is_told_when_it_is_closed(database_url):
    async def story(db):
        await a_webhook(db)
        batch, ids = await a_batch(db, 2, closed=False)
        await settle(db, [answered(claimed) for claimed in await take(db, ids)])
        assert await told(db) == []
        await close_batch(db, batch)
        await close_batch(db, batch)
        assert await told(db) == [("batch.finished", batch.id)]

    play(database_url, story)


def test_only_the_tenants_own_webhooks_that_want_to_know_are_told(database_url):
    async def story(db):
        wants = await a_webhook(db, events=["job.failed", "job.succeeded"])
        await a_webhook(db, events=["job.failed", "batch.finished"])
        await a_webhook(db, tenant="other")
        off = await a_webhook(db)
        await rows(db, "UPDATE webhooks SET disabled_at = now() WHERE id = :id", id=off.webhook.id)
        job_id = await a_job(db)
        await settle(db, [answered(claimed) for claimed in await take(db, [job_id])])
        told_to = await rows(db, "SELECT webhook_id, subject_id FROM deliveries")
        assert [(row.webhook_id, row.subject_id) for row in told_to] == [(wants.webhook.id, job_id)]

    play(database_url, story)


def test_what_is_sent_is_signed_and_holds_neither_prompt_nor_answer(database_url):
    async def story(db):
        async with an_endpoint() as endpoint:
            new = await a_webhook(db, endpoint.url)
            job_id = await a_job(db)
            await rows(db, "UPDATE jobs SET metadata = '{\"order\": 7}' WHERE id = :id", id=job_id)
            await settle(db, [answered(claimed, content="the answer") for claimed in await take(db, [job_id])])
            async with delivering(db):
                (row,) = await until(db, "SELECT * FROM deliveries WHERE state = 'delivered'")
            ((headers, body, method, path),) = endpoint.received
            assert (method, path, headers["Content-Type"]) == ("POST", "/told?by=backstop", "application/json")
            message = Verifier(new.secret).verify(body, headers)
            assert headers["webhook-id"] == str(row.id)
            assert message["type"] == "job.succeeded"
            assert datetime.fromisoformat(message["timestamp"]) == row.created_at
            assert message["data"] == {
                "id": str(job_id), "state": "succeeded", "batch_id": None, "custom_id": None, "chain": "default", "lane": "bulk",
                "metadata": {"order": 7},
            }  # fmt: skip
            assert "hello" not in body
            assert "the answer" not in body
            assert (row.http_status, row.error_code, row.attempts) == (200, None, 1)
            with pytest.raises(WebhookVerificationError):
                Verifier((await a_webhook(db)).secret).verify(body, headers)

    play(database_url, story)


def test_a_finished_batch_is_sent_with_its_counts(database_url):
    async def story(db):
        async with an_endpoint() as endpoint:
            await a_webhook(db, endpoint.url)
            batch, ids = await a_batch(db, 2)
            claims = await take(db, ids)
            await settle(db, [answered(claims[0]), ending(claims[1])])
            async with delivering(db):
                await until(db, "SELECT FROM deliveries WHERE state = 'delivered'")
            message = json.loads(endpoint.received[0][1])
            assert message["type"] == "batch.finished"
            assert message["data"] == {
                "id": str(batch.id), "state": "finished", "name": "monday", "total": 2, "succeeded": 1, "degraded": 0, "failed": 1,
                "cancelled": 0, "expired": 0, "status": None, "metadata": None,
            }  # fmt: skip

    play(database_url, story)


def test_what_does_not_arrive_is_sent_again_under_the_same_id_until_all_attempts_are_used(database_url):
    async def story(db):
        async with an_endpoint() as endpoint:
            new = await a_webhook(db, endpoint.url)
            await a_delivery(db, new.webhook)
            endpoint.status = 503
            async with delivering(db):
                for attempt, backoff_s in enumerate(BACKOFF_S, 1):
                    sql = "SELECT *, extract(epoch FROM run_at - now())::float8 AS wait_s FROM deliveries WHERE http_status = 503"
                    (row,) = await until(db, f"{sql} AND attempts = :n", n=attempt)
                    assert row.state == "pending"
                    assert (1 - JITTER) * backoff_s - 2 <= row.wait_s <= (1 + JITTER) * backoff_s
                    await rows(db, "UPDATE deliveries SET run_at = now(), http_status = NULL")
                (row,) = await until(db, "SELECT * FROM deliveries WHERE state = 'failed'")
            assert (row.attempts, row.http_status, row.error_code) == (len(BACKOFF_S) + 1, 503, "http_503")
            assert len({headers["webhook-id"] for headers, *_ in endpoint.received}) == 1
            assert len(endpoint.received) == len(BACKOFF_S) + 1
            assert len({body for _, body, *_ in endpoint.received}) == 1

    play(database_url, story)


def test_an_arrival_ends_the_time_of_failing(database_url):
    async def story(db):
        async with an_endpoint() as endpoint:
            new = await a_webhook(db, endpoint.url)
            await a_delivery(db, new.webhook)
            endpoint.status = 500
            async with delivering(db):
                await until(db, "SELECT FROM webhooks WHERE failing_since IS NOT NULL")
                endpoint.status = 204
                await rows(db, "UPDATE deliveries SET run_at = now()")
                await until(db, "SELECT FROM webhooks WHERE failing_since IS NULL AND disabled_at IS NULL")

    play(database_url, story)


@pytest.mark.parametrize(("status", "failing_days"), [(410, 0), (500, 5.1)])
def test_an_endpoint_that_is_gone_or_failed_for_days_is_told_nothing_more(database_url, status, failing_days):
    async def story(db):
        async with an_endpoint() as endpoint:
            new = await a_webhook(db, endpoint.url)
            await rows(db, "UPDATE webhooks SET failing_since = now() - make_interval(secs => :s)", s=failing_days * 86_400)
            first = await a_delivery(db, new.webhook)
            await rows(db, "UPDATE deliveries SET attempts = :n", n=len(BACKOFF_S))  # the next attempt is its last
            endpoint.status = status
            async with delivering(db):
                await until(db, "SELECT FROM webhooks WHERE disabled_at IS NOT NULL")
            second = await a_delivery(db, new.webhook)
            await delivering_module._tidy(db)
            left = {row.id: (row.state, row.error_code) for row in await rows(db, "SELECT * FROM deliveries")}
            assert left[second] == ("failed", "webhook_disabled")
            assert left[first][0] == "failed"
            assert len(endpoint.received) == 1
            with pytest.raises(UsageError, match="disabled"):
                await webhooks.redeliver(db, await webhooks.one(db, new.webhook.id), first)

    play(database_url, story)


@pytest.mark.parametrize(("failing_days", "attempts"), [(4.9, len(BACKOFF_S)), (40, 0), (40, len(BACKOFF_S) - 1)])
def test_neither_failures_of_less_than_five_days_nor_one_that_is_tried_again_disable_anything(database_url, failing_days, attempts):
    async def story(db):
        async with an_endpoint() as endpoint:
            new = await a_webhook(db, endpoint.url)
            await rows(db, "UPDATE webhooks SET failing_since = now() - make_interval(secs => :s)", s=failing_days * 86_400)
            await a_delivery(db, new.webhook)
            await rows(db, "UPDATE deliveries SET attempts = :n", n=attempts)
            endpoint.status = 500
            async with delivering(db):
                await until(db, "SELECT FROM deliveries WHERE http_status = 500")
            assert (await webhooks.one(db, new.webhook.id)).disabled_at is None

    play(database_url, story)


def test_a_redirect_is_not_followed(database_url):
    async def story(db):
        async with an_endpoint() as endpoint, an_endpoint() as elsewhere:
            endpoint.status, endpoint.headers = 307, {"Location": elsewhere.url}
            await a_delivery(db, (await a_webhook(db, endpoint.url)).webhook)
            async with delivering(db):
                (row,) = await until(db, "SELECT * FROM deliveries WHERE http_status IS NOT NULL")
            assert (row.state, row.error_code, elsewhere.received) == ("pending", "http_307", [])

    play(database_url, story)


def test_an_endless_answer_is_not_read(database_url):
    async def story(db):
        async with an_endpoint() as endpoint:
            endpoint.endless = True
            await a_delivery(db, (await a_webhook(db, endpoint.url)).webhook)
            async with delivering(db):
                await until(db, "SELECT FROM deliveries WHERE state = 'delivered'")

    play(database_url, story)


def test_a_slow_endpoint_does_not_hold_up_the_others(database_url):
    async def story(db):
        async with an_endpoint() as slow, an_endpoint() as quick:
            slow.stuck = True
            slow_hook = (await a_webhook(db, slow.url)).webhook
            for _ in range(30):
                await a_delivery(db, slow_hook)
            quick_hook = (await a_webhook(db, quick.url)).webhook
            wanted = {str(await a_delivery(db, quick_hook)) for _ in range(30)}
            async with delivering(db):
                await until(db, "SELECT FROM deliveries WHERE state = 'delivered' HAVING count(*) = 30")
            assert {headers["webhook-id"] for headers, *_ in quick.received} == wanted
            assert len(slow.received) == EACH

    play(database_url, story)


def test_two_who_deliver_at_once_send_each_event_once(database_url):
    async def story(db):
        async with an_endpoint() as endpoint:
            new = await a_webhook(db, endpoint.url)
            wanted = {str(await a_delivery(db, new.webhook)) for _ in range(40)}
            async with delivering(db), delivering(db):
                await until(db, "SELECT FROM deliveries WHERE state = 'delivered' HAVING count(*) = 40")
            received = [headers["webhook-id"] for headers, *_ in endpoint.received]
            assert (len(received), set(received)) == (40, wanted)

    play(database_url, story)


def test_what_a_deliverer_took_along_when_it_died_is_sent_when_its_lease_is_over(database_url):
    async def story(db):
        async with an_endpoint() as endpoint:
            endpoint.stuck = True
            await a_delivery(db, (await a_webhook(db, endpoint.url)).webhook)
            async with delivering(db):
                await until(db, "SELECT FROM deliveries WHERE attempts = 1")
            (row,) = await rows(db, "SELECT *, run_at > now() AS leased FROM deliveries")
            assert (row.state, row.leased) == ("pending", True)
            endpoint.stuck = False
            await rows(db, "UPDATE deliveries SET run_at = now()")
            async with delivering(db):
                (row,) = await until(db, "SELECT * FROM deliveries WHERE state = 'delivered'")
            assert row.attempts == 2

    play(database_url, story)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::ffff:127.0.0.1]", "127.1", "2130706433", "0x7f000001", "localhost", "0"])
def test_nothing_connects_to_an_address_that_is_not_public_however_it_is_spelled(database_url, host):
    async def story(db):
        connections = []
        server = await asyncio.start_server(lambda reader, writer: connections.append(writer.close()), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        url = f"https://{host}:{port}/"
        new = await a_webhook(db)
        await rows(db, "UPDATE webhooks SET url = :url", url=url)
        await a_delivery(db, new.webhook)
        async with server, delivering(db, private=False):
            (row,) = await until(db, "SELECT * FROM deliveries WHERE error_code IS NOT NULL")
        assert connections == []
        assert (row.state, row.http_status) == ("pending", None)
        assert row.error_code in ("address_not_allowed", "url_not_allowed")

    play(database_url, story)


def test_a_name_is_judged_by_the_address_that_is_connected_to(database_url, monkeypatch):
    """As with a name that led elsewhere when it was looked at."""

    async def story(db):
        async with an_endpoint() as endpoint:
            port = endpoint.url.split(":")[2].split("/")[0]
            due = delivering_module.Due(uuid4(), uuid4(), 1, f"https://rebound.example:{port}/", "whsec_c2VjcmV0", "{}")

            async def resolve(self, host, port=0, family=0):
                return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": 2, "proto": 6, "flags": 0}]

            async with delivering_module._client(private=False) as http:
                monkeypatch.setattr(type(http.connector._resolver), "resolve", resolve)
                outcome = await delivering_module.send(http, due, private=False)
            assert (outcome.http_status, outcome.error_code) == (None, "address_not_allowed")

    play(database_url, story)


def test_plain_http_is_not_spoken_once_the_setting_is_gone(database_url):
    async def story(db):
        async with an_endpoint() as endpoint:
            await a_delivery(db, (await a_webhook(db, endpoint.url)).webhook)
            async with delivering(db, private=False):
                (row,) = await until(db, "SELECT * FROM deliveries WHERE error_code IS NOT NULL")
            assert (row.error_code, endpoint.received) == ("url_not_allowed", [])

    play(database_url, story)


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True), ("2606:4700:4700::1111", True), ("::ffff:8.8.8.8", True), ("64:ff9b::808:808", True),
        ("127.0.0.1", False), ("0.0.0.0", False), ("10.1.2.3", False), ("172.16.0.1", False), ("192.168.1.1", False),
        ("169.254.169.254", False), ("100.64.0.1", False), ("100.100.100.200", False), ("168.63.129.16", False), ("192.0.0.192", False),
        ("198.18.0.1", False), ("192.88.99.1", False), ("224.0.0.1", False), ("240.0.0.1", False), ("255.255.255.255", False),
        ("::", False), ("::1", False), ("::127.0.0.1", False), ("::ffff:10.0.0.1", False), ("64:ff9b::7f00:1", False),
        ("64:ff9b:1::1", False), ("fe80::1", False), ("fe80::1%1", False), ("fc00::1", False), ("fd00:ec2::254", False),
        ("fec0::1", False), ("ff02::1", False), ("2001:db8::1", False), ("2002:7f00:1::", False),
        ("2001::1", False), ("3fff::1", False), ("4000::1", False),
    ],
)  # fmt: skip
def test_what_is_on_the_internet_is_known(address, public):
    assert is_public(address) is public


@pytest.mark.parametrize(
    "url",
    [
        "", "x", "https://", "https:///x", "ftp://example.com", "http://example.com", "https://user@example.com", "https://:pw@example.com",
        "https://example.com/#x", "https://example.com:99999", "https://exa mple.com", "https://example.com/\x00", "https://ex\u00e4mple.com",
        "https://example.com/\n", "https://[::1", "https://10.0.0.1/", "https://[fe80::1]/", "https://localhost/",
        "https://169.254.169.254/latest", "https://example.com/" + "x" * 2000, "//example.com", "javascript:alert(1)",
    ],
)  # fmt: skip
def test_a_url_that_nothing_may_be_sent_to_is_refused(database_url, url):
    async def story(db):
        with pytest.raises(UsageError, match="url: "):
            await webhooks.create(db, tenant="default", url=url)
        assert await webhooks.listed(db) == []

    play(database_url, story)


def test_the_secret_is_shown_once_and_never_by_accident(database_url):
    async def story(db):
        new = await webhooks.create(db, tenant="default", url=URL)
        assert new.secret.startswith("whsec_")
        assert new.secret not in repr(new)
        assert await webhooks.listed(db, "default") == [new.webhook]
        assert new.webhook.events == list(EVENTS)

    play(database_url, story)


def test_a_tenant_has_so_many_webhooks_at_most(database_url):
    async def story(db):
        for _ in range(webhooks.MOST):
            await a_webhook(db)
        with pytest.raises(UsageError, match="delete one first"):
            await a_webhook(db)
        await a_webhook(db, tenant="other")

    play(database_url, story)


def test_nor_has_it_more_when_all_are_made_at_once(database_url):
    async def story(db):
        made = await asyncio.gather(*(a_webhook(db) for _ in range(webhooks.MOST + 10)), return_exceptions=True)
        assert [type(one) for one in made if isinstance(one, Exception)] == [TooMany] * 10
        assert len(await webhooks.listed(db)) == webhooks.MOST

    play(database_url, story)


def test_a_deleted_webhook_takes_its_log_along_and_what_came_meanwhile_is_told_to_nobody(database_url):
    async def story(db):
        new = await a_webhook(db)
        await a_delivery(db, new.webhook)
        with pytest.raises(NotFound):
            await webhooks.delete(db, new.webhook.id, "other")
        await webhooks.delete(db, new.webhook.id, "default")
        assert await told(db) == []
        await a_delivery(db, new.webhook)
        await delivering_module._tidy(db)
        (row,) = await rows(db, "SELECT state FROM deliveries")
        assert row.state == "failed"

    play(database_url, story)


def test_what_ended_thirty_days_ago_is_gone_from_the_log(database_url):
    async def story(db):
        new = await a_webhook(db)
        old, older, kept, pending = [await a_delivery(db, new.webhook) for _ in range(4)]
        sql = "UPDATE deliveries SET state = 'delivered', ended_at = now() - make_interval(days => :days) WHERE id = :id"
        await rows(db, sql, days=31, id=old)
        await rows(db, sql, days=60, id=older)
        await rows(db, sql, days=29, id=kept)
        await rows(db, "UPDATE deliveries SET created_at = now() - interval '40 days'")
        await delivering_module._tidy(db, most=1)
        assert {row.id for row in await rows(db, "SELECT id FROM deliveries")} == {kept, pending}

    play(database_url, story)


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled"])
def test_the_batch_of_a_file_is_told_once_its_files_are_there_as_openais_clients_know_it(database_url, status):
    async def story(db):
        async with an_endpoint() as endpoint:
            await a_webhook(db, endpoint.url)
            batch, ids = await a_batch(db, 1)
            await rows(
                db,
                """INSERT INTO file_batches (batch_id, tenant, state, input_file_id, completion_window, fingerprint, expires_at)
                   VALUES (:id, 'default', 'finalizing', :id, '24h', '', now() + interval '1 day')""",
                id=batch.id,
            )
            await settle(db, [answered(claimed) for claimed in await take(db, ids)])
            other = await a_job(db)
            await settle(db, [answered(claimed) for claimed in await take(db, [other])])
            async with delivering(db):
                await until(db, "SELECT FROM deliveries WHERE state = 'delivered'")
                assert [json.loads(body)["type"] for _, body, *_ in endpoint.received] == ["job.succeeded"]
                await rows(db, "UPDATE file_batches SET state = :status", status=status)
                await until(db, "SELECT FROM deliveries WHERE state = 'delivered' HAVING count(*) = 2")
            message = json.loads(endpoint.received[1][1])
            assert message["type"] == "batch.finished"
            assert (message["data"]["id"], message["data"]["status"]) == (f"batch_{batch.id.hex}", status)

    play(database_url, story)
