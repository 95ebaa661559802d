"""Latency and throughput of any OpenAI-compatible server, over /v1/completions.

Temperature 0 with `ignore_eos`, so that every server generates the same number of tokens. Each stream is a thread with
a kept connection; what arrives is timed at once and parsed after the stream has ended. Connections are direct: the
proxies of the environment are not used.
"""

from __future__ import annotations

import http.client
import json
import queue
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gptoss.cli.remote.answer import COMPLETIONS, WITH_USAGE
from gptoss.cli.remote.connection import authorization, base_url, reason, refusal
from gptoss.cli.remote.errors import Refused, Unreachable

WORDS = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet", "kilo", "lima"]
PROMPT_WORDS = 32
MAX_THREADS = 512
SHORT_CLIENTS = 8


@dataclass(slots=True)
class Stream:
    """One streamed answer. `gaps_s`: between the chunks that carry tokens."""

    ttft_s: float
    gaps_s: list[float]
    tokens: int
    total_s: float


@dataclass(frozen=True, slots=True)
class ServiceLevel:
    """What an answer must keep to count as good: the first token, and the mean time between tokens."""

    ttft_s: float | None = None
    inter_token_s: float | None = None

    def __bool__(self) -> bool:
        return self.ttft_s is not None or self.inter_token_s is not None

    def is_kept(self, stream: Stream) -> bool:
        mean = (stream.total_s - stream.ttft_s) / max(1, stream.tokens - 1)
        return (self.ttft_s is None or stream.ttft_s <= self.ttft_s) and (
            self.inter_token_s is None or mean <= self.inter_token_s
        )


class Target:
    """A server under load."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        plain: bool = False,
        api_key: str | None = None,
        prefix_share: float = 0.0,
        timeout_s: float = 600.0,
    ) -> None:
        """`plain`: only fields that OpenAI's specification knows; the server may then stop early by chance.

        `prefix_share`: of each prompt's words that are the same in all prompts.
        """
        self.url = base_url(url)
        self.model = model or ""
        self._plain, self._prefix_share, self._timeout_s = plain, prefix_share, timeout_s
        self._headers = {"Content-Type": "application/json", **authorization(api_key)}
        self._rng = random.Random(0)
        self._idle: queue.LifoQueue[http.client.HTTPConnection] = queue.LifoQueue()

    def prepare(self) -> None:
        """Finds the model's name, if none was given, and sends a first request. Raises CommandError."""
        if not self.model:
            listed = self._json("GET", "/v1/models", None)
            try:
                self.model = str(listed["data"][0]["id"])
            except (KeyError, IndexError, TypeError):
                raise Refused(f"{self.url}/v1/models lists no model: name one") from None
        self.stream(self.prompt(16), 8)

    def prompt(self, words: int) -> str:
        """Returns the shared words, then random ones, for which the prefix cache does not help."""
        shared = round(self._prefix_share * words)
        return " ".join((WORDS * (shared // len(WORDS) + 1))[:shared] + self._rng.choices(WORDS, k=words - shared))

    def stream(self, prompt: str, tokens: int) -> Stream:
        """Returns the timings of one streamed answer. Raises CommandError."""
        started = time.perf_counter()
        connection, response = self._send("POST", COMPLETIONS, self._body(prompt, tokens, stream=True, **WITH_USAGE))
        marks, parts = [], []
        try:
            while part := response.read1(65_536):
                marks.append(time.perf_counter())
                parts.append(part)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unreachable(f"the connection to {self.url} broke: {reason(error)}") from None
        ended = time.perf_counter()
        self._idle.put(connection)
        times, used = self._tokens_of(marks, parts, tokens)
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        return Stream(times[0] - started, gaps, used, ended - started)

    def answer(self, prompt: str, tokens: int) -> dict[str, Any]:
        """Returns an answer that is not streamed. Raises CommandError."""
        return self._json("POST", COMPLETIONS, self._body(prompt, tokens))

    def close(self) -> None:
        while not self._idle.empty():
            self._idle.get_nowait().close()

    def _body(self, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
        extra = {} if self._plain else {"min_tokens": tokens, "ignore_eos": True}
        return {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **extra, **more}

    def _tokens_of(self, marks: list[float], parts: list[bytes], asked: int) -> tuple[list[float], int]:
        """Returns when each chunk with a choice had arrived, and the number of tokens. Raises Refused."""
        times, used, pending = [], asked, b""
        for mark, part in zip(marks, parts, strict=True):
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                if not line.startswith(b"data: {"):
                    continue
                chunk = json.loads(line[6:])
                if chunk.get("error"):
                    raise Refused(f"{self.url} ended an answer: {chunk['error'].get('message')}")
                if chunk.get("usage"):
                    used = chunk["usage"]["completion_tokens"]
                if chunk.get("choices"):
                    times.append(mark)
        if not times:
            raise Refused(f"{self.url} sent a stream without an answer")
        return times, used

    def _json(self, method: str, path: str, body: Any) -> dict[str, Any]:
        connection, response = self._send(method, path, body)
        try:
            found = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"the connection to {self.url} broke: {reason(error)}") from None
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise Refused(f"{self.url} does not answer as an OpenAI-compatible server does")
        self._idle.put(connection)
        return found

    def _send(self, method: str, path: str, body: Any) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Returns the connection and an answer with status 200. Raises CommandError."""
        data = None if body is None else json.dumps(body).encode()
        while True:
            connection, is_new = self._connection()
            try:
                connection.request(method, self._prefix + path, data, self._headers)
                response = connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if is_new:
                    raise Unreachable(f"cannot reach {self.url}: {reason(error)}") from None
                continue  # a kept connection that the server has closed meanwhile
            if response.status != 200:
                content, wait = response.read(), response.getheader("retry-after")
                connection.close()
                raise refusal(self.url + path, response.status, wait, content)
            return connection, response

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        try:
            return self._idle.get_nowait(), False
        except queue.Empty:
            parts = urlsplit(self.url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            return kind(parts.hostname or "", parts.port, timeout=self._timeout_s), True

    @property
    def _prefix(self) -> str:
        return urlsplit(self.url).path


Job = Callable[[Target], dict[str, float]]


def percentile(values: Sequence[float], share: float) -> float:
    """Returns the nearest-rank percentile, NaN of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


def streams(
    target: Target, count: int, tokens: int, words: int = PROMPT_WORDS, level: ServiceLevel | None = None
) -> dict[str, float]:
    """Measures `count` streams that begin together."""
    prompts = [target.prompt(words) for _ in range(count)]
    started = time.perf_counter()
    with ThreadPoolExecutor(count) as pool:
        done = list(pool.map(lambda prompt: target.stream(prompt, tokens), prompts))
    return _summary(done, time.perf_counter() - started, f"at {count}", level)


def arrivals(
    target: Target, rate: float, count: int, tokens: int, words: int = PROMPT_WORDS, level: ServiceLevel | None = None
) -> dict[str, float]:
    """Measures requests that arrive at random, `rate` a second on average.

    They arrive whether or not earlier ones have ended. Refused requests are counted; latencies begin when a request was
    due.
    """
    prompts, rng, started = [target.prompt(words) for _ in range(count)], random.Random(1), time.perf_counter()
    due = started
    with ThreadPoolExecutor(min(count, MAX_THREADS)) as pool:
        futures = []
        for prompt in prompts:
            time.sleep(max(0.0, due - time.perf_counter()))
            futures.append(pool.submit(_timed, target, prompt, tokens, due))
            due += rng.expovariate(rate)
        found = [future.result() for future in futures]
    done = [stream for stream in found if stream is not None]
    name = f"at {rate:g}/s"
    summary = _summary(done, time.perf_counter() - started, name, level)
    return {
        **summary,
        f"requests/s {name}": len(done) / (time.perf_counter() - started),
        f"failed {name}": float(count - len(done)),
    }


def _timed(target: Target, prompt: str, tokens: int, due: float) -> Stream | None:
    """Returns the stream with its wait since it was due, or None if the server refused it."""
    late = time.perf_counter() - due
    try:
        stream = target.stream(prompt, tokens)
    except Refused:
        return None
    stream.ttft_s += late
    stream.total_s += late
    return stream


def _summary(done: Sequence[Stream], elapsed_s: float, name: str, level: ServiceLevel | None) -> dict[str, float]:
    ttft, gaps = [s.ttft_s for s in done], [gap for s in done for gap in s.gaps_s]
    found = {
        f"tok/s {name}": sum(s.tokens for s in done) / elapsed_s,
        f"ttft p50 ms {name}": 1e3 * percentile(ttft, 0.5),
        f"ttft p95 ms {name}": 1e3 * percentile(ttft, 0.95),
        f"itl p50 ms {name}": 1e3 * percentile(gaps, 0.5),
        f"itl p95 ms {name}": 1e3 * percentile(gaps, 0.95),
    }
    if level:
        found[f"goodput/s {name}"] = sum(map(level.is_kept, done)) / elapsed_s
    return found


def prefill(target: Target, words: int) -> dict[str, float]:
    """Measures how fast a long prompt is read."""
    prompt, started = target.prompt(words), time.perf_counter()
    usage = target.answer(prompt, 1).get("usage") or {}
    return {"prefill tok/s": usage.get("prompt_tokens", 0) / (time.perf_counter() - started)}


def repeated_prefix(target: Target, words: int) -> dict[str, float]:
    """Measures the first token of a prompt whose beginning was just read."""
    prompt = target.prompt(words)
    target.stream(prompt, 1)
    return {"repeated-prefix ttft ms": 1e3 * target.stream(prompt + " again", 2).ttft_s}


def short_answers(target: Target, count: int) -> dict[str, float]:
    """Measures eight clients with one token each: what a request costs besides the model."""
    prompts = [target.prompt(8) for _ in range(count)]
    started = time.perf_counter()
    with ThreadPoolExecutor(SHORT_CLIENTS) as pool:
        list(pool.map(lambda prompt: target.answer(prompt, 1), prompts))
    return {"1-token requests/s": count / (time.perf_counter() - started)}


def take_turns(targets: Sequence[Target], jobs: Iterable[Job], repeat: int) -> list[dict[str, float]]:
    """Returns each target's medians of `repeat` runs of each job. Raises CommandError.

    The targets take turns.
    """
    collected: list[dict[str, list[float]]] = [{} for _ in targets]
    try:
        for target in targets:
            target.prepare()
        for job in jobs:
            for _ in range(repeat):
                for results, target in zip(collected, targets, strict=True):
                    for name, value in job(target).items():
                        results.setdefault(name, []).append(value)
    finally:
        for target in targets:
            target.close()
    return [{name: statistics.median(values) for name, values in results.items()} for results in collected]


def table(results: Sequence[dict[str, float]]) -> list[str]:
    """Returns one line a figure; with two targets the last column is first / second."""
    lines = []
    for name, first in results[0].items():
        line = f"{name:28}{first:12.1f}"
        if len(results) == 2:
            second = results[1][name]
            line += f"{second:12.1f}" + (f"{first / second:9.2f}x" if second else f"{'-':>10}")
        lines.append(line)
    return lines
