"""A question, a stream, a structured answer and a tool call with openai's client."""

from __future__ import annotations

import json
import os
from typing import Any

from openai import OpenAI
from pydantic import BaseModel

MODEL = os.environ.get("GPTOSS_MODEL", "gpt-oss-nano")
client = OpenAI(
    base_url=os.environ.get("GPTOSS_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("GPTOSS_API_KEY", "none"),
)


class Sum(BaseModel):
    result: int


def main() -> None:
    question: Any = {"role": "user", "content": "What is 12 + 30?"}
    answer = client.chat.completions.create(model=MODEL, messages=[question], max_tokens=200)
    print("answer:", answer.choices[0].message.content)

    print("stream:", end=" ")
    for chunk in client.chat.completions.create(model=MODEL, messages=[question], max_tokens=200, stream=True):
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()

    parsed = client.chat.completions.parse(model=MODEL, messages=[question], response_format=Sum, max_tokens=300)
    print("parsed:", parsed.choices[0].message.parsed)

    tool: Any = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the current weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]
    wanted = (
        client.chat.completions.create(
            model=MODEL, messages=messages, tools=[tool], tool_choice="required", max_tokens=300
        )
        .choices[0]
        .message
    )
    call: Any = (wanted.tool_calls or [])[0]
    print("call:", call.function.name, json.loads(call.function.arguments))
    messages += [
        wanted.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": call.id, "content": "7 C, rain"},
    ]
    told = client.chat.completions.create(model=MODEL, messages=messages, tools=[tool], max_tokens=300)
    print("told:", told.choices[0].message.content)


if __name__ == "__main__":
    main()
