"""The least a FastAPI route can do: what the API's latency is measured against. `uvicorn bench.bare:app`."""

from fastapi import FastAPI

app = FastAPI()


@app.get("/v1/jobs/{job_id}")
async def job(job_id: str) -> dict[str, str]:
    return {"id": job_id, "state": "succeeded"}


@app.get("/livez")
async def livez() -> dict[str, str]:
    return {"status": "ok"}
