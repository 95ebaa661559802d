"""Measures two engines of one thread against one engine of two: speed, prefix hits, answers, and an engine's deaths.

    python bench/data_parallel.py [--parts speed hits answers routing kills] [--kills 50] [--streams 32] [--repeat 5]

Starts its own servers on 127.0.0.1. `kills`: under load an engine is killed again and again; every answer must equal
the one that nothing disturbed. Prints a line for each figure and exits with 1 if one is not within its bound.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import sys
import threading
import time
import timeit
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.cli.remote.load import WORDS, Target, streams, take_turns
from gptoss.engine.block_hash import block_hash, extend_hashes
from gptoss.engine.client.router import Router
from tests.support.server_process import ServerProcess, running_server

FLAGS = ("--model", "nano", "--cpu-kv-cache-gib", "0.3", "--max-model-len", "16384", "--log-level", "warning")
ONE = ("--num-threads", "2")
TWO = ("--data-parallel-size", "2", "--num-threads", "1")
CHAT = "/v1/chat/completions"
CONVERSATIONS, TURNS = 12, 8
PROMPT_TOKENS, BLOCK = 8000, 64
PARTS = ("routing", "speed", "hits", "answers", "kills")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--kills", type=int, default=50)
    args = parser.parse_args()
    good: list[bool] = []
    if "routing" in args.parts:
        good += measure_routing()
    if {"speed", "hits", "answers"} & set(args.parts):
        with running_server(*FLAGS, *ONE) as one, running_server(*FLAGS, *TWO) as two:
            if "speed" in args.parts:
                good += measure_speed(two, one, args)
            if "hits" in args.parts:
                good += [*measure_hits(two, one, clients=1), *measure_hits(two, one, clients=CONVERSATIONS)]
            if "answers" in args.parts:
                good += compare_answers(two, one)
    if "kills" in args.parts:
        good += measure_kills(args)
    return 0 if all(good) else 1


def line(name: str, value: str, bound: str, good: bool) -> bool:
    print(f"{name:58}{value:>24}   {bound:18}{'' if good else 'NOT WITHIN IT'}", flush=True)
    return good


def measure_routing() -> list[bool]:
    """The hashes of a prompt's blocks, against one call for each block; and the choice of an engine after that."""
    ids, count = random.Random(0).choices(range(200_000), k=PROMPT_TOKENS), PROMPT_TOKENS // BLOCK

    def one_by_one() -> list[bytes]:
        hashes: list[bytes] = []
        for i in range(count):
            hashes.append(block_hash(hashes[-1] if hashes else None, ids[i * BLOCK : (i + 1) * BLOCK], "salt"))
        return hashes

    def at_once() -> list[bytes]:
        hashes: list[bytes] = []
        extend_hashes(hashes, ids, count, BLOCK, "salt")
        return hashes

    router, hashes = Router(2, BLOCK, lambda _: False), at_once()

    def route() -> None:
        engine, _ = router.choose(hashes, {0: 0, 1: 5000})
        router.sent[engine].add(hashes, "request")

    times: dict[str, list[float]] = {}
    for _ in range(15):
        for call in (one_by_one, at_once, route):
            times.setdefault(call.__name__, []).append(timeit.timeit(call, number=50) / 50 * 1e6)
    old, new, routing = (statistics.median(times[name]) for name in ("one_by_one", "at_once", "route"))
    return [
        line("hashes of 8,000 tokens, us (one call a block)", f"{new:.0f} ({old:.0f})", "not slower", new <= old),
        line("routing beyond that, us", f"{routing:.1f}", "< 50", routing < 50),
    ]


def measure_speed(two: ServerProcess, one: ServerProcess, args: argparse.Namespace) -> list[bool]:
    targets = [Target(two.url), Target(one.url)]
    results = take_turns(targets, [lambda t: streams(t, args.streams, args.tokens)], args.repeat)
    good = []
    for name in results[0]:
        first, second = (result[name] for result in results)
        is_rate = name.startswith("tok/s")
        shown = f"{first:.1f} / {second:.1f} = {first / second:.2f}"
        good.append(
            line(f"two engines / one: {name}", shown, ">= 1.0" if is_rate else "", not is_rate or first >= second)
        )
    return good


def measure_hits(two: ServerProcess, one: ServerProcess, clients: int) -> list[bool]:
    """The share of prompt tokens found in the cache over conversations; `clients` of them go on at the same time."""
    rates = [hit_rate(server, clients) for server in (two, one)]
    shown = f"{rates[0]:.1%} / {rates[1]:.1%}"
    name = f"prefix hits, {CONVERSATIONS} conversations x {TURNS} turns, {clients} at once"
    return [line(name, shown, "within 2 points", rates[0] >= rates[1] - 0.02)]


def hit_rate(server: ServerProcess, clients: int) -> float:
    before = server.stats()["prefix_cache"]
    rng = random.Random(f"{server.url} {clients}")
    conversations: list[list[dict[str, str]]] = [
        [{"role": "system", "content": " ".join(rng.choices(WORDS, k=80))}] for _ in range(CONVERSATIONS)
    ]
    with httpx.Client(base_url=server.url, timeout=600) as client, ThreadPoolExecutor(clients) as pool:
        if clients == 1:
            for turn in range(TURNS):
                for number, messages in enumerate(conversations):
                    take_turn(client, messages, number, turn)
        else:
            list(pool.map(lambda item: converse(client, *item), enumerate(conversations)))
    after = server.stats()["prefix_cache"]
    return float((after["hit_tokens"] - before["hit_tokens"]) / (after["queried_tokens"] - before["queried_tokens"]))


def converse(client: httpx.Client, number: int, messages: list[dict[str, str]]) -> None:
    for turn in range(TURNS):
        take_turn(client, messages, number, turn)


def take_turn(client: httpx.Client, messages: list[dict[str, str]], number: int, turn: int) -> None:
    messages.append({"role": "user", "content": f"Question {turn} of guest {number}: what is {turn} + {number}?"})
    body = {"model": "gpt-oss-nano", "messages": messages, "max_tokens": 48, "seed": turn, "reasoning_effort": "low"}
    answer = client.post(CHAT, json=body).raise_for_status().json()
    messages.append({"role": "assistant", "content": answer["choices"][0]["message"]["content"] or ""})


def long_body(seed: int, max_tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"Tell me about {WORDS[seed % len(WORDS)]} {seed}."}]
    return {
        "model": "gpt-oss-nano",
        "messages": messages,
        "max_tokens": max_tokens,
        "seed": seed,
        "temperature": 1.0,
        "ignore_eos": True,
    }


def answer_of(client: httpx.Client, seed: int, max_tokens: int) -> tuple[str, int]:
    """-> the text, and the completion tokens that the server counted."""
    found = client.post(CHAT, json=long_body(seed, max_tokens)).raise_for_status().json()
    message = found["choices"][0]["message"]
    return f"{message.get('reasoning_content')}|{message['content']}", found["usage"]["completion_tokens"]


def answers(server: ServerProcess, count: int, max_tokens: int) -> list[tuple[str, int]]:
    limits = httpx.Limits(max_connections=count)
    with httpx.Client(base_url=server.url, timeout=600, limits=limits) as client, ThreadPoolExecutor(count) as pool:
        return list(pool.map(lambda seed: answer_of(client, seed, max_tokens), range(count)))


def compare_answers(two: ServerProcess, one: ServerProcess) -> list[bool]:
    first, second = answers(two, 32, 100), answers(one, 32, 100)
    equal = sum(a == b for a, b in zip(first, second, strict=True))
    return [line("answers of the same seeds that are equal", f"{equal} of {len(first)}", "all", equal == len(first))]


def measure_kills(args: argparse.Namespace) -> list[bool]:
    """Streams against a server whose engines are killed in turns, each while the other serves."""
    flags = (*FLAGS, *TWO, "--max-request-resumes", "1000", "--max-engine-restarts", "1000")
    with running_server(*flags) as server:
        tokens = 300
        expected = answers(server, args.streams, tokens)
        before = server.stats()
        done, wrong, longest, restart = Killed(server, args.kills, args.streams, tokens, expected).run()
        stats = server.wait_idle(60)
        ended = {k: stats["requests"][k] - before["requests"][k] for k in ("ok", "failed", "cancelled", "rejected")}
        restarts = [engine["restarts"] for engine in stats["engines"]]
        resumed = stats["engine"]["resumed_requests"]
    return [
        line("kills of an engine", f"{sum(restarts)} ({restarts})", f"{args.kills}", sum(restarts) == args.kills),
        line("answers, and requests that continued elsewhere", f"{done}, {resumed}", "", resumed > 0),
        line("answers that are not the undisturbed ones", f"{len(wrong)}", "0", not wrong),
        line("requests by outcome at the server", str(list(ended.values())), f"[{done}, 0, 0, 0]", ended["ok"] == done),
        line("longest silence on a stream, s", f"{longest:.2f}", f"< restart {restart:.2f}", longest < restart),
    ]


class Killed:
    """Streams in a closed loop, and kills meanwhile."""

    def __init__(
        self, server: ServerProcess, kills: int, clients: int, tokens: int, expected: list[tuple[str, int]]
    ) -> None:
        self._server, self._kills, self._tokens, self._expected = server, kills, tokens, expected
        self._clients = clients
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._done, self._longest, self._restart = 0, 0.0, 0.0
        self._wrong: list[str] = []

    def run(self) -> tuple[int, list[str], float, float]:
        """-> answers, what was wrong with some, the longest time without a chunk on a stream and of a restart."""
        threads = [threading.Thread(target=self._client, args=(seed,)) for seed in range(self._clients)]
        for thread in threads:
            thread.start()
        for number in range(self._kills):
            time.sleep(0.5 + random.Random(number).random())
            engine = self._server.stats()["engines"][number % 2]
            os.kill(engine["pid"], signal.SIGKILL)
            while self._server.stats()["engines"][number % 2]["restarts"] == engine["restarts"]:
                time.sleep(0.02)
            self._wait_for_both()
        self._over.set()
        for thread in threads:
            thread.join()
        for text in self._wrong[:5]:
            print(text)
        return self._done, self._wrong, self._longest, self._restart

    def _wait_for_both(self) -> None:
        started = time.monotonic()
        while any(engine["state"] != "ready" for engine in self._server.stats()["engines"]):
            if httpx.get(f"{self._server.url}/ready").status_code != 200:
                self._wrong.append("/ready is red although one engine serves")
            time.sleep(0.05)
        self._restart = max(self._restart, time.monotonic() - started)

    def _client(self, seed: int) -> None:
        with httpx.Client(base_url=self._server.url, timeout=120) as client:
            while not self._over.is_set():
                found, silence = self._stream(client, seed)
                with self._lock:
                    self._done += 1
                    self._longest = max(self._longest, silence)
                    if found != self._expected[seed]:
                        self._wrong.append(f"seed {seed}: {found} instead of {self._expected[seed]}")

    def _stream(self, client: httpx.Client, seed: int) -> tuple[tuple[str, int], float]:
        import json

        body = long_body(seed, self._tokens) | {"stream": True, "stream_options": {"include_usage": True}}
        parts: dict[str, str] = {"reasoning_content": "", "content": ""}
        silence, count, last = 0.0, -1, time.monotonic()
        with client.stream("POST", CHAT, json=body) as response:
            for text in response.iter_lines():
                silence, last = max(silence, time.monotonic() - last), time.monotonic()
                if not text.startswith("data: {"):
                    continue
                chunk = json.loads(text[6:])
                if "error" in chunk:
                    return (str(chunk["error"]), -1), silence
                if chunk.get("usage"):
                    count = chunk["usage"]["completion_tokens"]
                for choice in chunk["choices"]:
                    for name in parts:
                        parts[name] += choice["delta"].get(name) or ""
        return (f"{parts['reasoning_content'] or None}|{parts['content'] or None}", count), silence


if __name__ == "__main__":
    sys.exit(main())
