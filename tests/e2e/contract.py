"""What the tests of the OpenAI contract share: requests, tools, and biases that lead a random model."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pydantic

from tests.support.server_process import ServerProcess
from tests.support.vocabulary import public_vocabulary

MODEL = "gpt-oss-nano"
USER: Any = {"role": "user", "content": "Hello there"}
VOCABULARY = public_vocabulary()
# A random model always prefers the same channel; these biases make it take another where the grammar lets it choose.
ANALYSIS, COMMENTARY, FINAL = (str(VOCABULARY.encode(c)[0]) for c in ("analysis", "commentary", "final"))
THINK, CALL_TOOL, ANSWER = ({ANALYSIS: 30}, {COMMENTARY: 30}, {FINAL: 30})
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> Any:
    return {"type": "function", "function": {"name": name, "description": "Does it", "parameters": parameters, **more}}


TOOLS = [
    tool("get_weather", CITY),
    tool("get_time"),
    tool("search-web_2", {"type": "object", "properties": {"q": {"enum": ["a", "b"]}}, "required": ["q"]}),
]


class Step(pydantic.BaseModel):
    kind: str = pydantic.Field(max_length=5)
    value: int | None


class Plan(pydantic.BaseModel):
    steps: list[Step] = pydantic.Field(min_length=1, max_length=2)
    done: bool


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": [USER], "max_tokens": 40, "seed": 7} | options)


def fold(chunks: list[Any]) -> dict[int, dict[str, Any]]:
    out: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            known = out.setdefault(choice.index, {"content": "", "reasoning": "", "calls": [], "finish": None})
            assert known["finish"] is None, "nothing comes after the finish chunk"
            known["content"] += choice.delta.content or ""
            known["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            for call in choice.delta.tool_calls or []:
                if call.id is not None:
                    assert call.index == len(known["calls"])
                    known["calls"].append([call.id, call.function.name, ""])
                known["calls"][call.index][2] += call.function.arguments
            known["finish"] = choice.finish_reason
    return out


def error_of(server: ServerProcess, body: Any, **options: Any) -> tuple[int, dict[str, Any]]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"} | options.pop("headers", {})
    response = httpx.post(f"{server.url}/v1/chat/completions", content=content, headers=headers, timeout=60, **options)
    parsed = response.json()
    assert set(parsed) == {"error"} and set(parsed["error"]) == {"message", "type", "param", "code"}, parsed
    return response.status_code, parsed["error"]
