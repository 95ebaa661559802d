"""Measures the cost of planning a chat request with 30 tools and a coding agent's, on one server or alternately on two.

    python bench/plan.py --url http://127.0.0.1:8000 [--vs http://127.0.0.1:8001]

Planning is everything before the engine: body, validation, prompt ids and grammar. The servers need
--debug-endpoints: `/v1/chat/completions/render` returns the plan without generating. "warm" repeats one list of tools
with a new question each time, as an agent does; "cold" sends a list that the server has not seen. The coding agent's requests
(49 kB, 12 tools) go to `/v1/messages/count_tokens`, which plans without generating; "next" continues a conversation.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from typing import Any

import httpx

from tests.support.coding_agent import first_turn, next_turn

NUM_TOOLS = 30
CALLED = [{"type": "tool_use", "id": "toolu_1", "name": "abcc", "input": {"abcdefg": "echo hi"}}]


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
        body = {"messages": [{"role": "user", "content": question}], "tools": offered}
        return self._post_ms("/v1/chat/completions/render", body)

    def agent_ms(self, body: dict[str, Any]) -> float:
        return self._post_ms("/v1/messages/count_tokens?beta=true", body)

    def _post_ms(self, path: str, body: dict[str, Any]) -> float:
        content = json.dumps(body | {"model": self._model})
        started = time.perf_counter()
        response = self._client.post(path, content=content, headers={"content-type": "application/json"})
        elapsed = time.perf_counter() - started
        response.raise_for_status()
        return 1e3 * elapsed


def measure(targets: list[Target], repeat: int) -> dict[str, list[float]]:
    """-> milliseconds, the median of `repeat` requests, by measurement and target."""
    source = random.Random(0)
    kept = tools(source)
    times: dict[str, list[list[float]]] = {
        name: [[] for _ in targets]
        for name in (
            "30 tools, warm",
            "30 tools, cold",
            "coding agent, warm",
            "coding agent, next",
            "coding agent, cold",
        )
    }
    for target in targets:
        target.plan_ms(kept, "Begin.")
        target.agent_ms(first_turn(""))
    salt = source.getrandbits(32)
    for number in range(repeat):
        fresh = tools(source)
        asked, unseen = first_turn("", ask=f"Question {number}"), first_turn("", seed=salt + number)
        continued = next_turn(asked, CALLED, "hi")
        for index, target in enumerate(targets):
            times["30 tools, warm"][index].append(target.plan_ms(kept, f"Question {number}: which files are open?"))
            times["30 tools, cold"][index].append(target.plan_ms(fresh, "Which files are open?"))
            times["coding agent, warm"][index].append(target.agent_ms(asked))
            times["coding agent, next"][index].append(target.agent_ms(continued))
            times["coding agent, cold"][index].append(target.agent_ms(unseen))
    return {name: [statistics.median(values) for values in per_target] for name, per_target in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--vs", help="a second server, measured in turns with the first")
    parser.add_argument("--repeat", type=int, default=50)
    args = parser.parse_args()
    urls = [args.url] + ([args.vs] if args.vs else [])
    for name, medians in measure([Target(url) for url in urls], args.repeat).items():
        line = f"plan: {name}, ms".ljust(32) + "".join(f"{value:10.2f}" for value in medians)
        if len(medians) == 2:
            line += f"{medians[1] / medians[0]:9.2f}x"
        print(line)


if __name__ == "__main__":
    main()
