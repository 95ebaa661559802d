"""Runs misbehaving clients for a long time and kills the engine meanwhile: nothing may hang, leak or get lost.

    python bench/soak.py --minutes 20 --clients 16 --kills 3

Starts its own server. Every request must end exactly once, the server's counters must agree with the clients',
and memory, file descriptors, threads and KV blocks must be at the end what they were after the first minute.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.server_process import ServerProcess, running_server

HANGS_AFTER_S = 90.0
PROMPTS = ("What is 12 + 30?", "Count to 20.", "Spell the word lamp.", "Hello!", "Tell me " + "a long story " * 60)


class Client(threading.Thread):
    def __init__(self, url: str, seed: int, until: float, counts: Counter[str], lock: threading.Lock) -> None:
        super().__init__(daemon=True)
        self._url, self._until, self._counts, self._lock = url, until, counts, lock
        self._rng = random.Random(seed)
        self.busy_since = time.monotonic()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=HANGS_AFTER_S) as http:
            while time.monotonic() < self._until:
                self.busy_since = time.monotonic()
                action = self._rng.choices(
                    (self.stream, self.json, self.leave, self.cancel, self.bad, self.many), (6, 3, 3, 2, 2, 1)
                )[0]
                try:
                    result = action(http)
                except (httpx.HTTPError, json.JSONDecodeError) as error:
                    result = f"transport: {type(error).__name__}"
                with self._lock:
                    self._counts[result] += 1

    def body(self, **more: Any) -> dict[str, Any]:
        content = self._rng.choice(PROMPTS)
        return {
            "model": "gpt-oss-nano",
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self._rng.randint(1, 150),
            "reasoning_effort": self._rng.choice(("low", "medium", "high")),
            **more,
        }

    def stream(self, http: httpx.Client) -> str:
        with http.stream("POST", "/v1/chat/completions", json=self.body(stream=True)) as response:
            if response.status_code != 200:
                return f"refused {response.status_code}"
            last = ""
            failed = False
            for line in response.iter_lines():
                failed = failed or line.startswith('data: {"error"')
                last = line or last
            return "failed" if failed else "ok" if last == "data: [DONE]" else "cut off"

    def json(self, http: httpx.Client) -> str:
        return self._outcome(http.post("/v1/chat/completions", json=self.body()))

    def many(self, http: httpx.Client) -> str:
        return self._outcome(http.post("/v1/chat/completions", json=self.body(n=3)))

    def _outcome(self, response: httpx.Response) -> str:
        if response.status_code == 200:
            return "ok"
        code = response.json()["error"].get("code")
        if response.status_code == 500 and code is None:
            return "failed"  # the engine died under it
        return f"refused {response.status_code}"

    def leave(self, http: httpx.Client) -> str:
        with http.stream(
            "POST", "/v1/chat/completions", json=self.body(stream=True, max_tokens=2000, min_tokens=2000)
        ) as response:
            if response.status_code != 200:
                return f"refused {response.status_code}"
            lines = response.iter_lines()
            for _ in range(self._rng.randint(1, 30)):
                line = next(lines, "")
                if line.startswith('data: {"error"'):
                    return "failed"
        return "left"

    def cancel(self, http: httpx.Client) -> str:
        with http.stream(
            "POST", "/v1/chat/completions", json=self.body(stream=True, max_tokens=5000, min_tokens=5000)
        ) as response:
            if response.status_code != 200:
                return f"refused {response.status_code}"
            cancelled = httpx.post(f"{self._url}/v1/cancel/{response.headers['x-request-id']}", timeout=HANGS_AFTER_S)
            text = "".join(response.iter_text())
            if "request_cancelled" in text:
                return "cancelled"
            return "failed" if '"error"' in text else f"cancel {cancelled.status_code}"

    def bad(self, http: httpx.Client) -> str:
        content = self._rng.choice((b"{", b"[]", b"\xff", b'{"model": "x"}', b'{"messages": 5}', b""))
        response = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
        return "bad" if response.status_code in (400, 404) else f"bad body: {response.status_code}"


def resources(server: ServerProcess) -> dict[str, float]:
    parent = psutil.Process(server.process.pid)
    family = [parent, *parent.children(recursive=True)]
    return {
        "server_rss_mib": parent.memory_info().rss / 2**20,
        "engine_rss_mib": sum(p.memory_info().rss for p in family[1:]) / 2**20,
        "server_fds": parent.num_fds(),
        "threads": sum(p.num_threads() for p in family),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--flags", nargs="*", default=["--cpu-kv-cache-gib", "0.2", "--max-model-len", "8192"])
    args = parser.parse_args()
    counts: Counter[str] = Counter()
    lock, problems = threading.Lock(), []
    with running_server(*args.flags, "--log-level", "warning") as server:
        started = time.monotonic()
        until = started + 60 * args.minutes
        clients = [Client(server.url, seed, until, counts, lock) for seed in range(args.clients)]
        for client in clients:
            client.start()
        kills = [started + 60 * args.minutes * (i + 1) / (args.kills + 1) for i in range(args.kills)]
        samples: list[tuple[float, dict[str, float]]] = []
        while time.monotonic() < until:
            time.sleep(min(10, 6 * args.minutes))
            if kills and time.monotonic() > kills[0]:
                kills.pop(0)
                os.kill(server.stats()["engine"]["pid"], signal.SIGKILL)
            samples.append((time.monotonic() - started, resources(server)))
            minutes, now = samples[-1][0] / 60, samples[-1][1]
            print(
                f"{minutes:5.1f} min",
                {k: round(v) for k, v in now.items()},
                sum(counts.values()),
                "requests",
                flush=True,
            )
        for client in clients:
            client.join(HANGS_AFTER_S)
            if client.is_alive():
                problems.append(f"a client has waited since {time.monotonic() - client.busy_since:.0f} s")
        try:
            stats = server.wait_idle(30)
        except AssertionError as error:
            problems.append(str(error))
            stats = server.stats()
        end = resources(server)
        requests = stats["requests"]
        seen = {
            "ok": counts["ok"],
            "failed": counts["failed"],
            "cancelled": counts["left"] + counts["cancelled"],
            "rejected": counts["bad"] + sum(v for k, v in counts.items() if k.startswith("refused")),
        }
        for name, number in seen.items():
            # a client that leaves as its answer ends may be counted as answered, or as cut off when the engine dies
            slack = counts["left"] if name in ("ok", "failed", "cancelled") else 0
            if not number - slack <= requests[name] <= number + slack:
                problems.append(f"{name}: the server counted {requests[name]}, the clients {number}")
        total = sum(counts.values())
        if requests["total"] != total:
            problems.append(f"requests: the server counted {requests['total']}, the clients {total}")
        odd = {
            k: v
            for k, v in counts.items()
            if k not in ("ok", "failed", "left", "cancelled", "bad") and not k.startswith("refused 503")
        }
        if odd:
            problems.append(f"unexpected: {odd}")
        if stats["engine"]["restarts"] != args.kills:
            problems.append(f"{stats['engine']['restarts']} restarts, {args.kills} kills")
        if stats["engine"]["num_free_blocks"] != stats["engine"]["num_blocks"] and stats["engine"]["kv_usage"]:
            problems.append("KV blocks are still in use")
        early = next((s for at, s in samples if at > 60), samples[0][1])
        for name, slack in (("server_rss_mib", 60), ("server_fds", 12), ("threads", 8)):
            if end[name] > early[name] + slack:
                problems.append(f"{name} grew from {early[name]:.0f} to {end[name]:.0f}")
        code = server.stop()
        if code:
            problems.append(f"exit code {code}")
    print(
        json.dumps(
            {
                "clients": dict(counts),
                "server": requests,
                "early": early,
                "end": end,
                "restarts": stats["engine"]["restarts"],
            },
            indent=1,
        )
    )
    print("\n".join(problems) or "nothing hung, leaked or got lost")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
