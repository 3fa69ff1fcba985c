"""What the API says of tokens that were estimated."""

import json
from uuid import UUID


def test_calls_costs_and_results_say_what_is_estimated(stage):
    job = stage.submit()
    stage.succeed(job["id"])
    assert "estimated" not in stage.client.get(f"/v1/jobs/{job['id']}").json()["result"]["usage"]
    stage.sql("UPDATE provider_calls SET estimated = true WHERE job_id = :id", id=UUID(job["id"]))
    usage = {"input_tokens": 3, "output_tokens": 5, "cached_tokens": None, "reasoning_tokens": None, "estimated": True}
    sql = "UPDATE results SET answer = jsonb_set(answer, '{usage}', CAST(:usage AS jsonb)) WHERE job_id = :id"
    stage.sql(sql, id=UUID(job["id"]), usage=json.dumps(usage))
    assert stage.client.get(f"/v1/jobs/{job['id']}").json()["result"]["usage"] == usage
    (call,) = stage.client.get(f"/v1/jobs/{job['id']}/calls").json()["data"]
    assert call["estimated"] is True
    (row,) = stage.client.get("/v1/costs").json()["data"]
    assert (row["estimated_calls"], row["estimated_usd"], row["cost_usd"]) == (1, "0.000123", "0.000123")
