"""Measures what `idle_keep_warm_s` saves: the time to a short answer after a pause, with it and without, in turns.

    python bench/keep_warm.py [--model nano] [--pause 5] [--requests 8] [--turns 3]

One server runs at a time, so that no other one keeps the processor warm.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.server_process import running_server

FLAGS = {"off": (), "on": ("--idle-keep-warm-s", "0.5")}


def answers_ms(url: str, pause_s: float, requests: int) -> list[float]:
    """-> milliseconds of each request of one token, `pause_s` after the one before."""
    body = {"model": "any", "prompt": "alpha bravo charlie", "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    found = []
    with httpx.Client(base_url=url, timeout=300) as client:
        body["model"] = client.get("/v1/models").json()["data"][0]["id"]
        client.post("/v1/completions", json=body).raise_for_status()
        for _ in range(requests):
            time.sleep(pause_s)
            started = time.perf_counter()
            client.post("/v1/completions", json=body).raise_for_status()
            found.append(1e3 * (time.perf_counter() - started))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds before each request")
    parser.add_argument("--requests", type=int, default=8, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in FLAGS}
    for _ in range(args.turns):
        for name, flags in FLAGS.items():
            with running_server("--model", args.model, *flags, ready_timeout_s=600) as server:
                found[name] += answers_ms(server.url, args.pause, args.requests)
    medians = {name: statistics.median(times) for name, times in found.items()}
    for name, value in medians.items():
        print(f"idle_keep_warm_s {name:4}{value:8.2f} ms")
    print(f"on / off {medians['on'] / medians['off']:.2f}")


if __name__ == "__main__":
    main()
