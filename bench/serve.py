"""Measures a running OpenAI-compatible server, or two alternately.

    python bench/serve.py --url http://127.0.0.1:8000 [--vs http://127.0.0.1:8001] [--json FILE]

Raw completions at temperature 0 with `ignore_eos`, so that every server generates the same number of tokens. With
--vs the measurements alternate between the two servers, and the last column is first / second.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima"]


@dataclass
class Stream:
    ttft_s: float
    gaps_s: list[float]
    tokens: int
    total_s: float


class Target:
    def __init__(self, url: str, model: str | None, *, plain: bool = False) -> None:
        """`plain`: only fields that OpenAI's specification knows; the server may then stop early by chance."""
        self.url = url.rstrip("/")
        self.client = httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=256))
        self.model = model or ""
        self._plain = plain
        self._rng = random.Random(0)

    async def prepare(self) -> None:
        if not self.model:
            listed = (await self.client.get(f"{self.url}/v1/models")).json()
            self.model = listed["data"][0]["id"]
        await self.stream(self.prompt(16), 8)

    def prompt(self, words: int) -> str:
        """Never the same twice: the prefix cache must not help where it is not meant to."""
        return " ".join(self._rng.choices(WORDS, k=words))

    def body(self, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
        extra = {} if self._plain else {"min_tokens": tokens, "ignore_eos": True}
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return {**body, **extra, **more}

    async def stream(self, prompt: str, tokens: int) -> Stream:
        started = time.perf_counter()
        marks: list[float] = []
        used = tokens
        body = self.body(prompt, tokens, stream=True, stream_options={"include_usage": True})
        async with self.client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{response.status_code}: {await response.aread()!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("usage"):
                    used = chunk["usage"]["completion_tokens"]
                if chunk.get("choices"):
                    marks.append(time.perf_counter())
        gaps = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        return Stream(marks[0] - started, gaps, used, time.perf_counter() - started)

    async def answer(self, prompt: str, tokens: int) -> dict[str, Any]:
        response = await self.client.post(f"{self.url}/v1/completions", json=self.body(prompt, tokens))
        response.raise_for_status()
        found: dict[str, Any] = response.json()
        return found


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


async def streams(target: Target, count: int, tokens: int) -> dict[str, float]:
    started = time.perf_counter()
    done = await asyncio.gather(*(target.stream(target.prompt(32), tokens) for _ in range(count)))
    elapsed = time.perf_counter() - started
    gaps = [g for s in done for g in s.gaps_s]
    return {
        f"tok/s at {count}": sum(s.tokens for s in done) / elapsed,
        f"ttft p50 ms at {count}": 1e3 * percentile([s.ttft_s for s in done], 0.5),
        f"ttft p95 ms at {count}": 1e3 * percentile([s.ttft_s for s in done], 0.95),
        f"itl p50 ms at {count}": 1e3 * percentile(gaps, 0.5),
        f"itl p95 ms at {count}": 1e3 * percentile(gaps, 0.95),
    }


async def prefill(target: Target, words: int) -> dict[str, float]:
    started = time.perf_counter()
    usage = (await target.answer(target.prompt(words), 1))["usage"]
    return {"prefill tok/s": usage["prompt_tokens"] / (time.perf_counter() - started)}


async def repeated_prefix(target: Target, words: int) -> dict[str, float]:
    prompt = target.prompt(words)
    await target.stream(prompt, 1)
    again = await target.stream(prompt + " again", 2)
    return {"repeated-prefix ttft ms": 1e3 * again.ttft_s}


async def short_answers(target: Target, count: int) -> dict[str, float]:
    """Eight clients, one token each: what a request costs besides the model."""
    prompts = [target.prompt(8) for _ in range(count)]

    async def client(mine: list[str]) -> None:
        for prompt in mine:
            await target.answer(prompt, 1)

    started = time.perf_counter()
    await asyncio.gather(*(client(prompts[i::8]) for i in range(8)))
    return {"1-token requests/s": count / (time.perf_counter() - started)}


async def measure(targets: list[Target], args: argparse.Namespace) -> list[dict[str, float]]:
    jobs: list[Callable[[Target], Awaitable[dict[str, float]]]] = []
    for count in args.streams:
        jobs.append(lambda t, n=count: streams(t, n, args.tokens))  # type: ignore[misc]
    jobs.append(lambda t: prefill(t, args.prefill))
    jobs.append(lambda t: repeated_prefix(t, args.prefill))
    jobs.append(lambda t: short_answers(t, args.requests))
    for target in targets:
        await target.prepare()
    collected: list[dict[str, list[float]]] = [{} for _ in targets]
    for job in jobs:
        for _ in range(args.repeat):
            for results, target in zip(collected, targets, strict=True):
                for name, value in (await job(target)).items():
                    results.setdefault(name, []).append(value)
    for target in targets:
        await target.client.aclose()
    return [{name: statistics.median(values) for name, values in results.items()} for results in collected]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--vs", help="a second server, measured in turns with the first")
    parser.add_argument("--model")
    parser.add_argument("--vs-model")
    parser.add_argument("--vs-plain", action="store_true", help="send the second server no extensions")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prefill", type=int, default=1024, help="words in the long prompt")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3, help="the median of this many is shown")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    targets = [Target(args.url, args.model)] + (
        [Target(args.vs, args.vs_model, plain=args.vs_plain)] if args.vs else []
    )
    results = asyncio.run(measure(targets, args))
    for name, first in results[0].items():
        line = f"{name:28}{first:12.1f}"
        if len(results) == 2:
            line += f"{results[1][name]:12.1f}{first / results[1][name]:9.2f}x"
        print(line)
    if args.json:
        args.json.write_text(json.dumps({"targets": [t.url for t in targets], "results": results}, indent=2))


if __name__ == "__main__":
    main()
