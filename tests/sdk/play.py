"""What a user's program does with the official openai package, and what it saw: one JSON object on stdout.

Runs under any interpreter that has some `openai`, and needs nothing else. OPENAI_BASE_URL, OPENAI_API_KEY and READ_KEY
(a key that may only read) come from the environment; arguments name the scenes to play.
"""

import asyncio
import json
import os
import sys
import tempfile
import time
import uuid
from pathlib import Path

import openai
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel

SCENES = {}
HELLO = [{"role": "user", "content": "The VPN is down"}]
TOOL = {
    "type": "function",
    "function": {
        "name": "close",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"ticket": {"type": "integer"}},
            "required": ["ticket"],
            "additionalProperties": False,
        },
    },
}


class Triage(BaseModel):
    category: str
    urgent: bool


def scene(function):
    SCENES[function.__name__] = function
    return function


def raised(do):
    """The exception that the call ends with, as a program would look at it; None when it ends well."""
    try:
        do()
    except openai.APIError as error:
        seen = {"kind": type(error).__name__, "message": error.message, "code": error.code, "param": error.param, "type": error.type}
        if isinstance(error, openai.APIStatusError):
            seen["status"] = error.status_code
            seen["request_id"] = error.request_id
            seen["retries"] = int(error.response.request.headers["x-stainless-retry-count"])
            seen["job"] = error.response.headers.get("x-backstop-job-id")
        return seen
    return None


def batch_file(*contents, model="good"):
    """Lines of a batch; a text is taken as it is."""
    lines = []
    for number, content in enumerate(contents, 1):
        body = {"model": model, "messages": [{"role": "user", "content": content}]}
        line = {"custom_id": f"T-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(content if content.startswith("{") else json.dumps(line))
    return "\n".join(lines).encode()


def uploaded(client, content, name="tickets.jsonl"):
    return client.files.create(file=(name, content), purpose="batch")


def started(client, file_id, **fields):
    return client.batches.create(input_file_id=file_id, endpoint="/v1/chat/completions", completion_window="24h", **fields)


def ended(client, batch_id):
    """The batch once it has ended, and the states it was seen in."""
    states, give_up_s = [], time.monotonic() + 60
    while time.monotonic() < give_up_s:
        batch = client.batches.retrieve(batch_id)
        if batch.status not in states:
            states.append(batch.status)
        if batch.status in ("completed", "failed", "expired", "cancelled"):
            return batch, states
        time.sleep(0.05)
    raise TimeoutError(f"batch {batch_id} is still {states[-1]}")


@scene
def models(client):
    return {
        "listed": [model.id for model in client.models.list()],
        "retrieved": client.models.retrieve("vendor/m-good").model_dump(),
        "missing": raised(lambda: client.models.retrieve("nobody")),
    }


@scene
def chat(client):
    raw = client.chat.completions.with_raw_response.create(model="default", messages=HELLO, temperature=0.2, metadata={"ticket": "T-1"})
    completion = raw.parse()
    return {
        "completion": completion.model_dump(),
        "kind": type(completion).__name__,
        "request_id": completion._request_id,
        "header_request_id": raw.headers["x-request-id"],
        "headers": {name: value for name, value in raw.headers.items() if name.startswith("x-backstop")},
    }


@scene
def chat_async(client):
    async def asked():
        async with AsyncOpenAI() as client:
            answers = await asyncio.gather(*(client.chat.completions.create(model="good", messages=HELLO) for _ in range(20)))
            stream = await client.chat.completions.create(model="good", messages=HELLO, stream=True)
            streamed = [chunk async for chunk in stream]
            listed = [model.id async for model in client.models.list()]
        return {
            "ids": [answer.id for answer in answers],
            "contents": sorted({answer.choices[0].message.content for answer in answers}),
            "streamed": streamed[0].choices[0].delta.content,
            "listed": len(listed),
        }

    return asyncio.run(asked())


@scene
def stream(client):
    whole = client.chat.completions.create(model="good", messages=HELLO)
    parts = client.chat.completions.create(model="good", messages=HELLO, stream=True, stream_options={"include_usage": True})
    chunks = list(parts)
    with client.chat.completions.stream(model="good", messages=HELLO) as events:
        kinds = [event.type for event in events]
        final = events.get_final_completion()
    return {
        "whole": whole.choices[0].message.content,
        "role": chunks[0].choices[0].delta.role,
        "content": "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices),
        "finish_reason": [choice.finish_reason for chunk in chunks for choice in chunk.choices],
        "usage": [chunk.usage and chunk.usage.total_tokens for chunk in chunks],
        "total_tokens": whole.usage.total_tokens,
        "ids": sorted({chunk.id for chunk in chunks}),
        "events": sorted(set(kinds)),
        "final": final.choices[0].message.content,
    }


@scene
def tools(client):
    called = client.chat.completions.create(model="tools", messages=HELLO, tools=[TOOL], tool_choice="auto")
    parsed = client.chat.completions.parse(model="tools", messages=HELLO, tools=[TOOL])
    with client.chat.completions.stream(model="tools", messages=HELLO, tools=[TOOL]) as events:
        streamed = events.get_final_completion()
    call = called.choices[0].message.tool_calls[0]
    said = [*HELLO, called.choices[0].message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "closed"}]
    return {
        "finish_reason": called.choices[0].finish_reason,
        "call": call.to_dict(),
        "parsed": parsed.choices[0].message.tool_calls[0].function.parsed_arguments,
        "streamed": streamed.choices[0].message.tool_calls[0].function.to_dict(),
        "after": client.chat.completions.create(model="tools", messages=said, tools=[TOOL]).choices[0].message.content,
    }


@scene
def formats(client):
    plain = client.chat.completions.create(model="good", messages=HELLO, response_format={"type": "json_object"})
    parsed = client.chat.completions.parse(model="good", messages=HELLO, response_format=Triage)
    with client.chat.completions.stream(model="good", messages=HELLO, response_format=Triage) as events:
        streamed = events.get_final_completion()
    return {
        "plain": json.loads(plain.choices[0].message.content),
        "parsed": type(parsed.choices[0].message.parsed).__name__,
        "streamed": type(streamed.choices[0].message.parsed).__name__,
    }


@scene
def errors(client):
    def ask(model="good", who=client, **fields):
        return raised(lambda: who.chat.completions.create(model=model, messages=HELLO, **fields))

    reader = OpenAI(api_key=os.environ["READ_KEY"])
    return {
        "wrong_key": ask(who=OpenAI(api_key="sk-wrong")),
        "may_only_read": ask(who=reader),
        "reader_reads": len(reader.models.list().data) > 0,
        "unknown_model": ask("gpt-99"),
        "n": ask(n=2),
        "unknown_parameter": ask(extra_body={"temperatur": 1}),
        "no_messages": raised(lambda: client.chat.completions.create(model="good", messages=[])),
        "content_filter": ask("policy"),
        "invalid": ask("invalid"),
        "too_long": ask("long"),
        "streamed": ask("policy", stream=True),
        "no_such_path": raised(lambda: client.embeddings.create(model="good", input="x")),
    }


@scene
def timeouts(client):
    def ask(who=client, **fields):
        return raised(lambda: who.chat.completions.create(model="silent", messages=HELLO, **fields))

    once, user = client.with_options(max_retries=0), f"hung up under {openai.__version__}"
    longer = {"x-stainless-read-timeout": "600"}  # so that the client is the first to lose patience
    return {"in_time": ask(timeout=5.0), "hung_up": ask(once, timeout=0.5, extra_headers=longer, user=user)}


def late_stream(client):
    """The server had to begin the stream before it knew its end. Needs a server that is soon tired of silence."""
    late = client.chat.completions.create(model="late", messages=HELLO, stream=True)
    left = client.chat.completions.create(model="silent", messages=HELLO, stream=True)
    left.close()
    return {
        "left": left.response.headers["x-backstop-job-id"],
        "content": "".join(chunk.choices[0].delta.content or "" for chunk in late),
        "error": raised(lambda: list(client.chat.completions.create(model="silent", messages=HELLO, stream=True, timeout=1.0))),
    }


@scene
def retries(client):
    """A client that is impatient asks again: under a key it joins the job of before."""
    patient = client.with_options(timeout=0.5, max_retries=8)
    headers = {"Idempotency-Key": f"order-{uuid.uuid4()}", "x-stainless-read-timeout": "600"}
    raw = patient.chat.completions.with_raw_response.create(model="late", messages=HELLO, extra_headers=headers)
    again = client.chat.completions.create(model="late", messages=HELLO, extra_headers=headers)
    return {
        "retries": raw.retries_taken,
        "ids": [raw.parse().id, again.id],
        "job": raw.headers["x-backstop-job-id"],
        "other_request": raised(lambda: client.chat.completions.create(model="good", messages=HELLO, extra_headers=headers)),
    }


@scene
def files(client):
    content = batch_file("The VPN is down", "Übergrößenträger ✓")
    made = uploaded(client, content)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "more.jsonl"
        path.write_bytes(content)
        from_path = client.files.create(file=path, purpose="batch")
        with path.open("rb") as opened:
            from_handle = client.files.create(file=opened, purpose="batch")
        client.files.content(made.id).write_to_file(Path(folder) / "back.jsonl")
        back = (Path(folder) / "back.jsonl").read_bytes()
    with client.files.with_streaming_response.content(made.id) as response:
        streamed = b"".join(response.iter_bytes(1000))
    listed = [file.id for file in client.files.list(limit=1, order="asc")]
    mine = [made.id, from_path.id, from_handle.id]
    return {
        "file": made.model_dump(),
        "size": len(content),
        "retrieved": client.files.retrieve(made.id) == made,
        "processed": client.files.wait_for_processing(made.id).status,
        "contents": [client.files.content(made.id).read() == content, back == content, streamed == content],
        "names": [from_path.filename, from_handle.filename],
        "in_order": [file_id for file_id in listed if file_id in mine] == mine,
        "once_each": len(listed) == len(set(listed)),
        "first_page": client.files.list(limit=2, order="desc", purpose="batch").has_more,
        "deleted": client.files.delete(made.id).model_dump(),
        "gone": raised(lambda: client.files.retrieve(made.id)),
        "content_gone": raised(lambda: client.files.content(made.id)),
        "never_was": raised(lambda: client.files.retrieve("file-nobody")),
        "purpose": raised(lambda: client.files.create(file=("a.jsonl", content), purpose="fine-tune")),
    }


@scene
def files_async(client):
    async def asked():
        async with AsyncOpenAI() as client:
            made = await client.files.create(file=("async.jsonl", batch_file("a")), purpose="batch")
            content = await client.files.content(made.id)
            found = [file.id async for file in client.files.list(limit=1)]
            deleted = await client.files.delete(made.id)
        return {"same": content.content == batch_file("a"), "found": made.id in found, "deleted": deleted.deleted}

    return asyncio.run(asked())


@scene
def batches(client):
    made = uploaded(client, batch_file("The VPN is down", "The printer is on fire", "No coffee"))
    batch = started(client, made.id, metadata={"week": "47"})
    done, states = ended(client, batch.id)
    lines = [json.loads(line) for line in client.files.content(done.output_file_id).text.splitlines()]
    return {
        "created": batch.model_dump(),
        "input_file_id": made.id,
        "done": done.model_dump(),
        "states": states,
        "output": client.files.retrieve(done.output_file_id).model_dump(),
        "answers": {line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"] for line in lines},
        "status_codes": [line["response"]["status_code"] for line in lines],
        "errors": [line["error"] for line in lines],
        "missing": raised(lambda: client.batches.retrieve("batch_nobody")),
        "no_file": raised(lambda: started(client, "file-nobody")),
        "endpoint": raised(
            lambda: client.batches.create(input_file_id=made.id, endpoint="/v1/embeddings", completion_window="24h"),
        ),
    }


@scene
def batches_with_bad_lines(client):
    content = batch_file("fine", '{"custom_id": "T-2", "body"', "fine", '{"custom_id": "T-1", "body": {}}')
    failed, _ = ended(client, started(client, uploaded(client, content).id).id)
    skipping = started(client, uploaded(client, content).id, metadata={"backstop-bad-lines": "skip"})
    skipped, _ = ended(client, skipping.id)
    return {
        "failed": failed.model_dump(),
        "skipped": skipped.model_dump(),
        "error_lines": len(client.files.content(skipped.error_file_id).text.splitlines()),
        "output_lines": len(client.files.content(skipped.output_file_id).text.splitlines()),
    }


@scene
def batches_cancelled(client):
    batch = started(client, uploaded(client, batch_file("a", "b", model="silent")).id)
    while client.batches.retrieve(batch.id).status == "validating":
        time.sleep(0.05)
    cancelling = client.batches.cancel(batch.id)
    cancelled, _ = ended(client, batch.id)
    return {"cancelling": cancelling.status, "cancelled": cancelled.model_dump(), "again": raised(lambda: client.batches.cancel(batch.id))}


@scene
def batches_listed(client):
    file_id = uploaded(client, batch_file("a")).id
    made = [started(client, file_id, metadata={"part": str(part)}).id for part in range(3)]
    listed = [batch.id for batch in client.batches.list(limit=1)]
    page = client.batches.list(limit=2)
    return {
        "newest_first": listed[:3] == made[::-1],
        "once_each": len(listed) == len(set(listed)),
        "page": [len(page.data), page.has_more],
        "next": page.get_next_page().data[0].id == listed[2],
    }


@scene
def batches_retried(client):
    """What the SDK sends again when the first answer was lost makes no second batch."""
    file_id = uploaded(client, batch_file("a")).id
    first = started(client, file_id, metadata={"day": "1"})
    again = started(client, file_id, metadata={"day": "1"}, extra_headers={"x-stainless-retry-count": "1"})
    wanted = started(client, file_id, metadata={"day": "1"})
    return {"joined": again.id == first.id, "meant": wanted.id != first.id}


def main():
    seen = {"version": openai.__version__}
    chosen = {name: globals()[name] for name in sys.argv[1:]} or SCENES
    for name, play in chosen.items():
        begun_s = time.monotonic()
        try:
            seen[name] = play(OpenAI(max_retries=2))
        except Exception as error:
            seen[name] = {"broke": f"{type(error).__name__}: {error}"}
        print(f"{name}: {time.monotonic() - begun_s:.1f} s", file=sys.stderr)
    json.dump(seen, sys.stdout, default=str)


if __name__ == "__main__":
    main()
