"""Measures the cost of planning a chat request with 30 tools, on one server or alternately on two.

    python bench/plan.py --url http://127.0.0.1:8000 [--vs http://127.0.0.1:8001]

Planning is everything before the engine: body, validation, prompt ids and grammar. The servers need
--debug-endpoints: `/v1/chat/completions/render` returns the plan without generating. "warm" repeats one list of tools
with a new question each time, as an agent does; "cold" sends a list that the server has not seen.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from typing import Any

import httpx

NUM_TOOLS = 30


def tools(source: random.Random) -> list[dict[str, Any]]:
    """-> 30 function tools of the size that MCP servers offer; no two calls return the same list."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "description": "Path of the file, relative to the root."},
        {"type": "integer", "minimum": 1, "maximum": 1000, "default": 20},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {"type": "string", "enum": ["open", "closed", "all"]},
        {"type": "object", "properties": {"line": {"type": "integer"}, "text": {"type": "string"}}},
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
    ]
    made = []
    for number in range(NUM_TOOLS):
        salt = source.getrandbits(32)
        fields = {f"field_{place}_{salt:x}": kind for place, kind in enumerate(kinds)}
        made.append(
            {
                "type": "function",
                "function": {
                    "name": f"tool_{number}_{salt:x}",
                    "description": f"Performs operation {salt} on the files of a repository and returns its result.",
                    "parameters": {"type": "object", "properties": fields, "required": list(fields)[:2]},
                },
            }
        )
    return made


class Target:
    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=60)
        self._model = self._client.get("/v1/models").raise_for_status().json()["data"][0]["id"]

    def plan_ms(self, offered: list[dict[str, Any]], question: str) -> float:
        body = {"model": self._model, "messages": [{"role": "user", "content": question}], "tools": offered}
        started = time.perf_counter()
        response = self._client.post("/v1/chat/completions/render", json=body)
        elapsed = time.perf_counter() - started
        response.raise_for_status()
        return 1e3 * elapsed


def measure(targets: list[Target], repeat: int) -> dict[str, list[float]]:
    """-> milliseconds, the median of `repeat` requests, by measurement and target."""
    source = random.Random(0)
    kept = tools(source)
    times: dict[str, list[list[float]]] = {name: [[] for _ in targets] for name in ("warm", "cold")}
    for target in targets:
        target.plan_ms(kept, "Begin.")
    for number in range(repeat):
        fresh = tools(source)
        for index, target in enumerate(targets):
            times["warm"][index].append(target.plan_ms(kept, f"Question {number}: which files are open?"))
            times["cold"][index].append(target.plan_ms(fresh, "Which files are open?"))
    return {name: [statistics.median(values) for values in per_target] for name, per_target in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--vs", help="a second server, measured in turns with the first")
    parser.add_argument("--repeat", type=int, default=50)
    args = parser.parse_args()
    urls = [args.url] + ([args.vs] if args.vs else [])
    for name, medians in measure([Target(url) for url in urls], args.repeat).items():
        line = f"plan of {NUM_TOOLS} tools, {name}, ms" + "".join(f"{value:10.2f}" for value in medians)
        if len(medians) == 2:
            line += f"{medians[1] / medians[0]:9.2f}x"
        print(line)


if __name__ == "__main__":
    main()
