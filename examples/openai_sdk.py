"""The official openai package against Backstop: one chat, then a file of requests as a batch.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=$(cat .backstop/api-key) python examples/openai_sdk.py
"""

import json
import time

from openai import OpenAI

client = OpenAI()
chat = client.chat.completions.create(model="default", messages=[{"role": "user", "content": "Hello"}])
print(chat.choices[0].message.content)

lines = [
    {
        "custom_id": f"t-{n}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": [{"role": "user", "content": f"Ticket {n}"}]},
    }
    for n in range(3)
]
upload = client.files.create(file=("tickets.jsonl", "\n".join(map(json.dumps, lines)).encode()), purpose="batch")
batch = client.batches.create(input_file_id=upload.id, endpoint="/v1/chat/completions", completion_window="24h")
while batch.status not in ("completed", "failed", "expired", "cancelled"):
    time.sleep(0.5)
    batch = client.batches.retrieve(batch.id)
print(batch.status, batch.request_counts)
if batch.output_file_id:
    print(client.files.content(batch.output_file_id).text)
