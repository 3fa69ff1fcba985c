"""A connection to Redis that breaks with a message in hand ends quietly, and not with it the worker."""

import asyncio
import logging

import kombu.transport
import pytest
from celery import Celery
from kombu import Connection, Exchange, Queue

from worker.app import DELIVERY
from worker.dispatch import queue_name
from worker.job import Lane
from worker.transport import TIDY, install


@pytest.fixture(autouse=True)
def ours(monkeypatch):
    """As in a worker, also where this process has opened a Redis by kombu's own transport before."""
    monkeypatch.setattr(kombu.transport, "_transport_cache", {})
    install()


def test_a_broken_connection_with_a_message_in_hand_is_closed_without_a_trace(laboratory):
    """As Celery does it: collected, then closed, while errors of the connection, and no others, are let pass."""

    async def story(lab):
        connection = Connection(lab.environment["REDIS_URL"], transport_options=DELIVERY["broker_transport_options"])

        def use():
            channel = connection.default_channel
            Queue(queue_name(Lane.BULK))(channel).consume("tag", callback=lambda message: None, no_ack=False)
            channel.client.connection = channel.client.connection_pool.get_connection()
            channel._brpop_start(timeout=5)
            channel.qos._delivered["tag"] = None  # fetched, and its ack did not get through
            box = Queue("box", Exchange("box.pidbox", type="fanout"), auto_delete=True)(connection.channel())
            box.declare()
            box.consume("box", callback=lambda message: None)

        def close():
            connection.collect(socket_timeout=1)
            try:
                connection.close()
            except connection.connection_errors + connection.channel_errors:
                pass

        await asyncio.to_thread(use)  # the proxy lives on this loop
        lab.valkey.proxy.refuse()
        await asyncio.to_thread(close)

    laboratory(story)


def test_a_message_of_a_connection_that_was_replaced_since_is_acknowledged_without_a_trace(redis_url):
    """Celery's threads hand acks to its loop, which may have another connection by then; only errors of connections are let pass."""
    taken = []
    with Celery("courier", broker=redis_url, set_as_current=False) as courier, Connection(redis_url) as connection:
        courier.send_task(TIDY, queue=queue_name(Lane.BULK))
        Queue(queue_name(Lane.BULK))(connection.default_channel).consume("tag", callback=taken.append, no_ack=False)
        connection.drain_events(timeout=10)
        connection.collect()
        taken[0].ack_log_error(logging.getLogger(), connection.connection_errors)
