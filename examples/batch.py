"""Answers a file of requests in the background; the server needs --batch-dir."""

from __future__ import annotations

import json
import os
import time

from openai import OpenAI

MODEL = os.environ.get("GPTOSS_MODEL", "gpt-oss-nano")
URL = "/v1/chat/completions"


def request(number: int) -> dict[str, object]:
    messages = [{"role": "user", "content": f"What is {number} + {number}?"}]
    body = {"model": MODEL, "messages": messages, "max_tokens": 200}
    return {"custom_id": f"sum-{number}", "method": "POST", "url": URL, "body": body}


def main() -> None:
    client = OpenAI(
        base_url=os.environ.get("GPTOSS_URL", "http://127.0.0.1:8000") + "/v1",
        api_key=os.environ.get("GPTOSS_API_KEY", "none"),
    )
    lines = "".join(json.dumps(request(number)) + "\n" for number in range(1, 6))
    file = client.files.create(file=("sums.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
    while batch.status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    print(batch.status, batch.request_counts)
    assert batch.output_file_id is not None, batch.errors
    for line in client.files.content(batch.output_file_id).text.splitlines():
        answer = json.loads(line)
        print(answer["custom_id"], answer["response"]["body"]["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
