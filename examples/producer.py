"""Hands in a few support tickets and prints each answer as it comes, then a batch of them in its order.

Run it beside `backstop up`, from the same directory, or with DATABASE_URL and REDIS_URL set.
"""

from worker.producer import Backstop

TICKETS = ["My invoice is wrong.", "I cannot log in.", "Where is my parcel?"]

with Backstop() as backstop:
    jobs = [backstop.enqueue(f"Answer in one sentence: {ticket}", max_tokens=100) for ticket in TICKETS]
    for job in backstop.as_completed(jobs, timeout_s=60):
        print(job.id, job.state, job.answer.content if job.answer else job.error, job.cost_usd)

    rows = ({"messages": ticket, "custom_id": f"ticket-{n}"} for n, ticket in enumerate(TICKETS, 1))  # as many as you like
    batch = backstop.enqueue_many(rows, max_tokens=100)
    for row in backstop.results(batch, timeout_s=60):
        print(row.custom_id, row.state, row.answer.content if row.answer else row.error, row.cost_usd)
