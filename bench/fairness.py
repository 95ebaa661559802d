"""Measures how long one key's request waits while another key's many choices run: time to first and last token.

    python bench/fairness.py http://127.0.0.1:8000 KEY_OF_ONE KEY_OF_OTHER [--choices 128] [--tokens 200] [--rounds 5]

The server needs a keys file with both keys. For comparison, pass the same key twice: its requests have no shares.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time

import httpx


def body(prompt: str, tokens: int, choices: int) -> dict[str, object]:
    messages = [{"role": "user", "content": prompt}]
    return {
        "model": "gpt-oss-nano",
        "messages": messages,
        "max_tokens": tokens,
        "n": choices,
        "ignore_eos": True,
        "stream": True,
    }


def timed(url: str, key: str, request: dict[str, object]) -> tuple[float, float]:
    """-> seconds to the first token and to the last."""
    begun, first = time.perf_counter(), 0.0
    headers = {"authorization": f"Bearer {key}"}
    path = f"{url}/v1/chat/completions"
    with httpx.stream("POST", path, json=request, headers=headers, timeout=600) as answer:
        answer.raise_for_status()
        for line in answer.iter_lines():
            if not first and line.startswith("data: {") and _has_token(json.loads(line[6:])):
                first = time.perf_counter() - begun
    return first, time.perf_counter() - begun


def _has_token(chunk: dict[str, list[dict[str, dict[str, object]]]]) -> bool:
    return any(c["delta"].get("content") or c["delta"].get("reasoning") for c in chunk["choices"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("greedy")
    parser.add_argument("modest")
    parser.add_argument("--choices", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    alone = [timed(args.url, args.modest, body(f"alone {i}", 20, 1)) for i in range(args.rounds)]
    crowd = body("many", args.tokens, args.choices)
    many = threading.Thread(target=timed, args=(args.url, args.greedy, crowd))
    many.start()
    time.sleep(1.0)
    beside = []
    for i in range(args.rounds):
        if not many.is_alive():
            break
        beside.append(timed(args.url, args.modest, body(f"beside {i}", 20, 1)))
    many.join()
    for name, times in (("alone", alone), (f"beside n={args.choices}", beside)):
        first, last = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"{name:16} first token {first * 1000:7.0f} ms   20 tokens {last * 1000:7.0f} ms")


if __name__ == "__main__":
    main()
