"""Shows whether a server is ready, what it has loaded, and its figures.

    gptoss status [--timing] [--json]

exit codes: 0 ready, 1 not ready (loading, draining, stalled), 2 usage, 3 server not reachable, 4 server refused
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from gptoss.cli.remote.answer import CHAT, WITH_USAGE, Answer, read
from gptoss.cli.remote.connection import Connection
from gptoss.cli.remote.errors import NO, OK, Refused
from gptoss.cli.remote.options import add_server_options, command_parser, connection_of
from gptoss.cli.terminal.style import Style, printable

TIMING_TOKENS = 32


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    connection = connection_of(args)
    found = report(connection, timing=args.timing)
    if args.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        sys.stdout.write("\n".join(lines(found, Style.of(sys.stdout))) + "\n")
    return OK if found["ready"] else NO


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "", epilog="")
    add_server_options(parser, timeout_s=10.0)
    parser.add_argument("--timing", action="store_true", help="also send one request of 32 tokens and time it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def report(connection: Connection, *, timing: bool = False) -> dict[str, Any]:
    """Returns what the server says about itself. Raises CommandError.

    Figures need the server's key, where it has one: without it `figures` is null and `figures_error` says why.
    """
    ready = connection.get("/ready", accept=(503,))
    health = connection.get("/health", accept=(503,))
    found: dict[str, Any] = {
        "url": connection.url,
        "ready": bool(ready.get("ready")),
        "draining": bool(ready.get("draining")),
        "health": health,
        "figures": None,
        "figures_error": None,
        "timing": None,
    }
    try:
        found["figures"] = figures(connection.get("/stats"))
    except Refused as error:
        found["figures_error"] = str(error)
    except (KeyError, TypeError):
        found["figures_error"] = "/stats has another form than this version's"
    if timing:
        found["timing"] = time_one_request(connection, health.get("model_id", ""))
    return found


def figures(stats: dict[str, Any]) -> dict[str, Any]:
    """Returns what `status` shows of /stats."""
    engine, latency = stats["engine"], stats["latency"]
    return {
        "requests": stats["requests"],
        "tokens": stats["tokens"],
        "latency": latency,
        "prefix_cache_hit_rate": stats["prefix_cache"]["hit_rate"],
        "kv_usage": engine["kv_usage"],
        "engine_restarts": engine["restarts"],
        "engines": [one["state"] for one in stats.get("engines", ())],
        "device": engine.get("device"),
        "kernel_path": engine.get("kernel_path"),
        "gpus": stats["gpus"],
    }


def time_one_request(connection: Connection, model: str) -> dict[str, Any]:
    """Returns the timings of a short answer. Raises CommandError."""
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    body = {"model": model, "messages": messages, "max_tokens": TIMING_TOKENS, "temperature": 0, **WITH_USAGE}
    answer = Answer()
    for _ in read(connection.stream(CHAT, body), answer):
        pass
    return {**asdict(answer.timings), "tokens": answer.usage.get("completion_tokens")}


def lines(found: dict[str, Any], style: Style) -> list[str]:
    """Returns the report for people."""
    health = found["health"]
    state = style("ready", "green") if found["ready"] else style("not ready", "red")
    rows = [("server", f"{found['url']} is {state}")]
    rows += [("because", shown(text)) for text in health.get("reasons", ())]
    tags = {name: shown(value) for name, value in health.items()}
    rows.append(("version", f"{tags.get('version')}, up {duration(health.get('uptime_s', 0))}"))
    rows.append(("model", f"{tags.get('model_id')} in {tags.get('dtype')}, {tags.get('gpu_mode')}"))
    rows.append(("profile", f"{tags.get('profile')}, prompt version {tags.get('prompt_version')}"))
    rows += figure_rows(found["figures"]) if found["figures"] else [("figures", shown(found["figures_error"]))]
    if timing := found["timing"]:
        rate = f", {timing['tokens_per_s']:.1f} tok/s" if timing["tokens_per_s"] else ""
        rows.append(("timing", f"first token {milliseconds(timing['ttft_s'])}, {timing['tokens']} tokens{rate}"))
    return [f"{style(f'{name:10}', 'dim')}{value}" for name, value in rows]


def shown(value: Any) -> str:
    """Returns a value that the server sent, for a terminal."""
    return printable(str(value))


def figure_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns name and text of each figure."""
    requests, tokens, latency = found["requests"], found["tokens"], found["latency"]
    ttft = latency["ttft_s"]
    rows = [
        ("running", f"{requests['active']}, waiting {requests['waiting']}, KV cache {found['kv_usage']:.0%} in use"),
        ("requests", f"{requests['ok']} ok, {requests['failed']} failed, {requests['cancelled']} cancelled, "
         f"{requests['rejected']} rejected"),
        ("tokens", f"{tokens['prompt']:,} read ({tokens['cached']:,} from the cache), {tokens['output']:,} written"),
        ("latency", f"first token {milliseconds(ttft['p50'])} (p95 {milliseconds(ttft['p95'])}), between tokens "
         f"{milliseconds(latency['inter_token_s']['p50'])}, {latency['requests']} requests in 5 minutes"),
    ]  # fmt: skip
    if found["device"]:
        rows.append(("device", f"{found['device']} ({found['kernel_path']} kernels)"))
    if len(found["engines"]) > 1:
        rows.append(("engines", f"{found['engines'].count('ready')} of {len(found['engines'])} are ready"))
    if found["engine_restarts"]:
        rows.append(("restarts", f"{found['engine_restarts']} of the engine"))
    return rows


def milliseconds(seconds: float | None) -> str:
    """Returns `12.3 ms`, or `-` for nothing measured."""
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def duration(seconds: float) -> str:
    """Returns `3 d 4 h`, `5 h 6 min`, `7 min 8 s` or `9 s`."""
    minutes, s = divmod(int(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    parts = [(days, "d"), (h, "h"), (m, "min"), (s, "s")]
    first = next((i for i, (value, _) in enumerate(parts) if value), 3)
    return " ".join(f"{value} {unit}" for value, unit in parts[first : first + 2])
