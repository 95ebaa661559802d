"""Measures what a batch costs live requests: their latencies without and with a batch, in turns.

    python bench/batch.py http://127.0.0.1:8000 [--requests 500] [--gap-s 2] [--parts 10] [--tokens 64] [--lines 50000]

The server needs --batch-dir. A part without a batch and a part with one take turns; each has the same number of live
requests, which arrive at random moments around --gap-s seconds apart. Prints the median and p95 of both and their ratios,
and how many lines of the batch were answered meanwhile.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import httpx

MODEL = "gpt-oss-nano"


def chat(text: str, tokens: int, seed: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": MODEL, "messages": messages, "max_tokens": tokens, "seed": seed, "ignore_eos": True}


def start_batch(client: httpx.Client, num_lines: int, tokens: int) -> str:
    """-> the id of a batch of prompts of 5 to 400 words."""
    rng = random.Random(1)

    def line(number: int) -> str:
        text = f"{number}: " + " ".join(rng.choices(("one", "two", "three", "four"), k=rng.randint(5, 400)))
        body = chat(text, rng.randint(tokens // 2, tokens * 2), number)
        return json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body})

    content = "\n".join(map(line, range(num_lines)))
    file = client.post("/v1/files", files={"file": content.encode()}, data={"purpose": "batch"}).raise_for_status()
    request = {"input_file_id": file.json()["id"], "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    batch_id: str = client.post("/v1/batches", json=request).raise_for_status().json()["id"]
    while num_answered(client, batch_id) == 0:
        time.sleep(0.1)
    return batch_id


def num_answered(client: httpx.Client, batch_id: str) -> int:
    counts = client.get(f"/v1/batches/{batch_id}").json()["request_counts"]
    return int(counts["completed"] + counts["failed"])


def end_batch(client: httpx.Client, batch_id: str) -> None:
    client.post(f"/v1/batches/{batch_id}/cancel")
    while client.get(f"/v1/batches/{batch_id}").json()["status"] in ("cancelling", "finalizing"):
        time.sleep(0.1)


def live(client: httpx.Client, count: int, gap_s: float, tokens: int, rng: random.Random) -> list[float]:
    """-> seconds of each request; the gap between two is `gap_s`, a tenth more or less."""
    seconds = []
    for number in range(count):
        time.sleep(gap_s * rng.uniform(0.9, 1.1))
        begun = time.perf_counter()
        client.post("/v1/chat/completions", json=chat("What is 12 + 30?", tokens, number)).raise_for_status()
        seconds.append(time.perf_counter() - begun)
    return seconds


def p95(values: list[float]) -> float:
    return sorted(values)[int(0.95 * len(values))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--requests", type=int, default=500, help="with a batch, and as many without")
    parser.add_argument("--gap-s", type=float, default=2.0)
    parser.add_argument("--parts", type=int, default=10, help="turns")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--lines", type=int, default=50_000, help="of the batch")
    args = parser.parse_args()
    rng, alone, beside, answered = random.Random(0), list[float](), list[float](), 0
    with httpx.Client(base_url=args.url, timeout=600) as client:
        live(client, 10, 0.05, args.tokens, rng)
        for _ in range(args.parts):
            count = args.requests // args.parts
            alone += live(client, count, args.gap_s, args.tokens, rng)
            batch_id = start_batch(client, args.lines, args.tokens)
            before = num_answered(client, batch_id)
            beside += live(client, count, args.gap_s, args.tokens, rng)
            answered += num_answered(client, batch_id) - before
            end_batch(client, batch_id)
    for name, measure in (("median", statistics.median), ("p95", p95)):
        a, b = measure(alone), measure(beside)
        print(f"{name:7} without {a * 1000:7.1f} ms   with a batch {b * 1000:7.1f} ms   ratio {b / a:.3f}")
    print(f"{len(alone)} live requests each, {answered} lines answered meanwhile")


if __name__ == "__main__":
    main()
