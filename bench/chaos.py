"""Runs hostile clients, dying and stopped engines and a damaged cache at once: nothing may hang, leak or get lost.

    python bench/chaos.py                                        # 20 minutes, 16 clients, 20 kills, 2 stops
    python bench/chaos.py --minutes 2 --kills 3 --stops 1
    python bench/chaos.py --data-parallel-size 2                 # an engine dies while the other serves

Starts its own server on 127.0.0.1, three times in sequence; in between the cache is damaged, and the second server is
killed instead of stopped. Prints a table and exits with 1 if a line of it is not within its bound.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.chaos_client import OUTCOMES, UNCOUNTED, ChaosClient
from bench.soak import HANGS_AFTER_S, resources
from tests.support.server_process import ServerProcess, running_server

ROUNDS = 3
HEARTBEAT_TIMEOUT_S = 3.0
FLAGS = (
    "--model",
    "nano",
    "--cpu-kv-cache-gib",
    "0.2",
    "--max-model-len",
    "8192",
    "--max-request-resumes",
    "1000",
    "--engine-heartbeat-timeout-s",
    str(HEARTBEAT_TIMEOUT_S),
    "--send-timeout-s",
    "5",
    "--log-level",
    "warning",
)
MAX_RSS_MIB, MAX_HEALTH_MS = 500, 250
GROWTH = {"server_rss_mib": 80, "server_fds": 12, "threads": 12}


def probe_health(port: int, stop: Event, results: Any) -> None:
    """In a process of its own, which the clients' threads do not slow down: latencies of /health, ms."""
    latencies: list[float] = []
    while not stop.wait(0.1):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        started = time.monotonic()
        try:
            connection.request("GET", "/health")
            connection.getresponse().read()
        except OSError:
            latencies.append(30_000)
        else:
            latencies.append(1000 * (time.monotonic() - started))
        connection.close()
    results.put(latencies)


@dataclass
class Report:
    """What the rounds found."""

    lines: list[tuple[str, str, str, bool]] = field(default_factory=list)
    health_ms: list[float] = field(default_factory=list)
    clients: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    stops: int = 0

    def add(self, name: str, value: object, bound: str, within: bool) -> None:
        self.lines.append((name, str(value), bound, within))

    def print(self) -> int:
        for name, value, bound, within in self.lines:
            print(f"{'ok  ' if within else 'FAIL'} {name:44} {value:>14}   {bound}")
        return 0 if all(line[3] for line in self.lines) else 1


@dataclass
class Machine:
    """Folders of the server's own, so that what it leaves shows."""

    cache: Path
    temporary: Path
    runtime: Path  # records of ports
    rng: random.Random

    @property
    def env(self) -> dict[str, str]:
        return {"XDG_CACHE_HOME": str(self.cache), "TMPDIR": str(self.temporary), "XDG_RUNTIME_DIR": str(self.runtime)}

    def leftovers(self) -> int:
        """Temporary files, in the cache too."""
        return len(list(self.temporary.iterdir())) + len(list(self.cache.rglob(".making-*")))

    def damage(self) -> list[Path]:
        """-> the files that are not what they were."""
        folder = self.cache / "gpt-oss-server"
        files = [
            *folder.glob("gpt-oss-nano-*/model.safetensors"),
            *folder.glob("native/*.so"),
            *folder.glob("vocabulary/*.tiktoken"),
        ]
        for path in files:
            data = bytearray(path.read_bytes())
            kind = self.rng.choice(("truncate", "flip", "empty"))
            if kind == "flip":
                data[self.rng.randrange(len(data))] ^= 0xFF
            else:
                del data[0 if kind == "empty" else self.rng.randrange(len(data)) :]
            path.unlink()  # a server that still runs has the old one
            path.write_bytes(data)
        return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kills", type=int, default=20, help="of the engine, in all")
    parser.add_argument("--stops", type=int, default=2, help="of the engine by SIGSTOP, in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-parallel-size", type=int, default=1, help="engines of the server")
    args = parser.parse_args()
    report, rng = Report(), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("cache", "temporary", "runtime")]
        for path in folders:
            path.mkdir(mode=0o700)
        machine = Machine(*folders, rng)
        for number in range(ROUNDS):
            damaged = machine.damage() if number else []
            run_round(args, number, machine, damaged, report)
        report.add("temporary files at the end", machine.leftovers(), "0", not machine.leftovers())
    health = statistics.quantiles(report.health_ms, n=100)[98]
    report.add("/health, p99, ms", round(health), f"< {MAX_HEALTH_MS}", health < MAX_HEALTH_MS)
    report.add("/health, p50, ms", round(statistics.median(report.health_ms)), "", True)
    report.add("kills of the engine", report.kills, f"{args.kills}", report.kills == args.kills)
    report.add("stops of the engine", report.stops, f"{args.stops}", report.stops == args.stops)
    print("clients:", dict(report.clients))
    return report.print()


def run_round(args: argparse.Namespace, number: int, machine: Machine, damaged: list[Path], report: Report) -> None:
    flags = (*FLAGS, "--data-parallel-size", str(args.data_parallel_size))
    with running_server(*flags, env=machine.env, ready_timeout_s=180) as server:
        for path in damaged:
            is_logged = f"damaged cache: {path}" in server.log
            report.add(f"{path.name} is created again", is_logged, "named in the log", is_logged)
        left, engines = machine.leftovers(), args.data_parallel_size
        report.add(f"round {number + 1}: temporary files at the start", left, f"{engines}", left == engines)
        stop, results = multiprocessing.Event(), multiprocessing.Queue()
        probe = multiprocessing.Process(target=probe_health, args=(server.port, stop, results))
        probe.start()
        try:
            counts, samples = load(args, number, server, report)
        finally:
            stop.set()
            report.health_ms += results.get(timeout=60)
            probe.join(10)
        compare(number, server, counts, samples, machine, report)
        report.clients += counts
        if number == 1:
            server.process.kill()
            server.process.wait()
            return
        code = server.stop()
        report.add(f"round {number + 1}: exit code", code, "0", code == 0)


def load(
    args: argparse.Namespace, number: int, server: ServerProcess, report: Report
) -> tuple[Counter[str], list[dict[str, float]]]:
    """Runs the clients, kills and stops of one round. -> (outcomes, resources over time)."""
    counts: Counter[str] = Counter()
    lock, length = threading.Lock(), 60 * args.minutes / ROUNDS
    started = time.monotonic()
    clients = [
        ChaosClient(server.url, 1000 * number + seed, started + length, counts, lock) for seed in range(args.clients)
    ]
    for client in clients:
        client.start()
    kinds = [*["kill"] * share(args.kills, number), *["stop"] * share(args.stops, number)]
    random.Random(number).shuffle(kinds)
    events = [(started + length * (i + 1) / (len(kinds) + 1), k) for i, k in enumerate(kinds)]
    samples = [resources_of(server)]
    while time.monotonic() < started + length:
        time.sleep(0.5)
        if events and time.monotonic() >= events[0][0] and is_ready(server):
            (report_kill if events.pop(0)[1] == "kill" else report_stop)(server, report)
        samples.append(resources_of(server))
    deadline = time.monotonic() + HANGS_AFTER_S
    for client in clients:
        client.join(max(0, deadline - time.monotonic()))
    hanging = sum(client.is_alive() for client in clients)
    report.add(f"round {number + 1}: clients that hang", hanging, "0", hanging == 0)
    return counts, samples


def share(count: int, number: int) -> int:
    """Of so many events those of one round."""
    return count // ROUNDS + (number < count % ROUNDS)


def resources_of(server: ServerProcess) -> dict[str, float]:
    while True:
        with contextlib.suppress(psutil.NoSuchProcess):  # the engine, killed meanwhile
            return resources(server)


def is_ready(server: ServerProcess) -> bool:
    return httpx.get(f"{server.url}/ready", timeout=30).status_code == 200


def is_degraded(server: ServerProcess) -> bool:
    """Whether /health says that an engine is silent."""
    reasons = httpx.get(f"{server.url}/health", timeout=30).json()["reasons"]
    return any("no heartbeat" in reason for reason in reasons)


def report_kill(server: ServerProcess, report: Report) -> None:
    os.kill(random.choice(ready_pids(server)), signal.SIGKILL)
    report.kills += 1


def ready_pids(server: ServerProcess) -> list[int]:
    return [engine["pid"] for engine in server.stats()["engines"] if engine["state"] == "ready"]


def report_stop(server: ServerProcess, report: Report) -> None:
    """Stops the engine until /ready is red, then lets it run on until it is green.

    Of several engines one is stopped: /health must say so, and /ready must stay green.
    """
    pids, started = ready_pids(server), time.monotonic()
    pid = random.choice(pids)
    name, sees = (
        ("/ready is red", lambda: not is_ready(server))
        if len(pids) == 1
        else ("/health knows", lambda: is_degraded(server))
    )
    os.kill(pid, signal.SIGSTOP)
    try:
        seen_s = seconds_until(sees)
        if len(pids) > 1:
            report.add("/ready while another engine serves", is_ready(server), "True", is_ready(server))
    finally:
        os.kill(pid, signal.SIGCONT)
    bound = HEARTBEAT_TIMEOUT_S + 2
    report.add(f"{name} after a stop, s", f"{seen_s:.1f}", f"< {bound:g}", seen_s < bound)
    over_s = seconds_until(lambda: not sees())
    report.add("and that it is over, s", f"{over_s:.1f}", "< 10", over_s < 10)
    report.stops += time.monotonic() > started


def seconds_until(condition: Callable[[], bool], most: float = 30.0) -> float:
    started = time.monotonic()
    while not condition() and time.monotonic() - started < most:
        time.sleep(0.1)
    return time.monotonic() - started


def compare(
    number: int,
    server: ServerProcess,
    counts: Counter[str],
    samples: list[dict[str, float]],
    machine: Machine,
    report: Report,
) -> None:
    """The server's counters with the clients', and what it holds at the end with what it held at the beginning."""
    name = f"round {number + 1}: "
    try:
        stats = server.wait_idle(60)
    except AssertionError as error:
        report.add(f"{name}idle after the load", str(error)[:60], "idle", False)
        stats = server.stats()
    seen: Counter[str] = Counter()
    for outcome, count in counts.items():
        seen[OUTCOMES.get(outcome, "" if outcome in UNCOUNTED else "unexpected")] += count
    odd = {k: v for k, v in counts.items() if k not in OUTCOMES and k not in UNCOUNTED}
    report.add(f"{name}unexpected outcomes", odd or 0, "0", not odd)
    total = sum(seen[k] for k in ("ok", "failed", "cancelled", "rejected"))
    server_total = stats["requests"]["total"]
    report.add(f"{name}requests, server/clients", f"{server_total}/{total}", "equal", server_total == total)
    # a client that leaves as its answer ends may be counted as answered
    slack = counts["left"]
    for key in ("ok", "failed", "cancelled", "rejected"):
        near = abs(stats["requests"][key] - seen[key]) <= (slack if key in ("ok", "cancelled") else 0)
        report.add(f"{name}{key}, server/clients", f"{stats['requests'][key]}/{seen[key]}", "equal", near)
    report.add(f"{name}requests lost to a dying engine", seen["failed"], "0", not seen["failed"])
    engine = stats["engine"]
    report.add(f"{name}KV blocks in use", engine["kv_usage"], "0", engine["kv_usage"] == 0)
    peak = max(sample["server_rss_mib"] for sample in samples)
    report.add(f"{name}peak RSS of the API process, MiB", round(peak), f"< {MAX_RSS_MIB}", peak < MAX_RSS_MIB)
    time.sleep(6)  # idle connections are closed after 5 s
    early, end = samples[len(samples) // 4], resources_of(server)
    for key, slack in GROWTH.items():
        flat = end[key] <= early[key] + slack
        report.add(f"{name}{key}", f"{early[key]:.0f} -> {end[key]:.0f}", f"+{slack} at most", flat)
    left, engines = machine.leftovers(), len(stats["engines"])
    report.add(f"{name}temporary files after the load", left, f"{engines}", left == engines)


if __name__ == "__main__":
    sys.exit(main())
