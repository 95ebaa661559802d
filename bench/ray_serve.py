"""Measures what Ray Serve costs a request, beside the plain server, and what killed replicas cost their clients.

    PYTHONPATH=. .venv-ray/bin/python bench/ray_serve.py [--requests 2000] [--kill-every 20]

.venv-ray is made by `compat/run.sh ray`. First one replica and a plain server answer short requests in turns; then two
replicas answer --requests streams, and one of them is killed every --kill-every seconds.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import random
import signal
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from ray import serve

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.ray_serve import build
from tests.support.server_process import free_port, running_server

FLAGS = ["--model", "nano", "--num-threads", "1"]
CLIENTS = 8


def stream(client: httpx.Client, number: int, tokens: int) -> tuple[float, float, str]:
    """-> milliseconds to the first token and to the end, and how it ended: done, refused, begun or not begun."""
    body: dict[str, Any] = {"model": "gpt-oss-nano", "prompt": f"alpha bravo {number}", "max_tokens": tokens}
    body |= {"ignore_eos": True, "stream": True, "temperature": 0}
    started = time.perf_counter()
    first, last = 0.0, ""
    try:
        with client.stream("POST", "/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {") and not first:
                    first = time.perf_counter() - started
                last = line or last
            outcome = "done" if last == "data: [DONE]" else "refused" if answer.status_code != 200 else "begun"
    except httpx.HTTPError:
        outcome = "begun" if first else "not begun"
    return 1e3 * first, 1e3 * (time.perf_counter() - started), outcome


def added_latency(url: str, requests: int) -> None:
    with running_server(*FLAGS) as plain:
        sides = {"plain": httpx.Client(base_url=plain.url, timeout=60), "ray": httpx.Client(base_url=url, timeout=60)}
        found: dict[str, list[tuple[float, float, str]]] = {name: [] for name in sides}
        for number in range(requests):
            for name, client in sides.items():
                found[name].append(stream(client, number, 16))
    for label, column in (("first token ms", 0), ("16 tokens ms", 1)):
        medians = {name: statistics.median(float(row[column]) for row in rows) for name, rows in found.items()}
        added = medians["ray"] - medians["plain"]
        print(f"{label:16}plain {medians['plain']:7.1f}  ray {medians['ray']:7.1f}  added {added:5.1f}")


def killed_replicas(url: str, requests: int, kill_every_s: float) -> None:
    outcomes: dict[str, int] = {}
    numbers, lock, ended = iter(range(requests)), threading.Lock(), threading.Event()
    kills = 0

    def ask() -> None:
        with httpx.Client(base_url=url, timeout=120) as client:
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                outcome = stream(client, number, 64)[2]
                with lock:
                    outcomes[outcome] = outcomes.get(outcome, 0) + 1

    def kill() -> None:
        nonlocal kills
        while not ended.wait(kill_every_s):
            found = [p for p in psutil.process_iter(["cmdline"]) if is_replica(p)]
            if len(found) > 1:
                os.kill(random.Random(kills).choice(found).pid, signal.SIGKILL)
                kills += 1

    killer = threading.Thread(target=kill)
    killer.start()
    with concurrent.futures.ThreadPoolExecutor(CLIENTS) as pool:
        for asking in [pool.submit(ask) for _ in range(CLIENTS)]:
            asking.result()
    ended.set()
    killer.join()
    print(f"{requests} streams of 64 tokens, {CLIENTS} at once, {kills} replicas killed: {outcomes}")


def is_replica(process: psutil.Process) -> bool:
    return "ray::ServeReplica:gptoss:engine" in " ".join(process.info["cmdline"] or ())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--kill-every", type=float, default=20.0, metavar="S")
    parser.add_argument("--turns", type=int, default=60, help="short requests to each side")
    args = parser.parse_args()
    ray.init(num_cpus=8, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    url = f"http://127.0.0.1:{port}"
    for replicas in (1, 2):
        options = {"flags": FLAGS, "min_replicas": replicas, "max_replicas": replicas, "drain_s": 5.0}
        serve.run(build(options), name="gptoss", route_prefix="/")
        if replicas == 1:
            added_latency(url, args.turns)
        else:
            killed_replicas(url, args.requests, args.kill_every)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
