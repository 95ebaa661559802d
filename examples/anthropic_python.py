"""A question, a stream and a tool call with Anthropic's client."""

from __future__ import annotations

import os
from typing import Any

import anthropic

MODEL = os.environ.get("GPTOSS_MODEL", "gpt-oss-nano")


def text_of(message: Any) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def main() -> None:
    client = anthropic.Anthropic(
        base_url=os.environ.get("GPTOSS_URL", "http://127.0.0.1:8000"),
        api_key=os.environ.get("GPTOSS_API_KEY", "none"),
    )
    question: Any = {"model": MODEL, "max_tokens": 300, "messages": [{"role": "user", "content": "What is 12 + 30?"}]}
    print("answer:", text_of(client.messages.create(**question)))
    with client.messages.stream(**question) as stream:
        print("stream:", "".join(stream.text_stream))
    tool: Any = {
        "name": "get_weather",
        "description": "Get the current weather of a city.",
        "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    }
    wanted = client.messages.create(
        model=MODEL,
        max_tokens=300,
        messages=[{"role": "user", "content": "What is the weather in Oslo?"}],
        tools=[tool],
        tool_choice={"type": "any"},
    )
    call: Any = next(block for block in wanted.content if block.type == "tool_use")
    print("call:", call.name, call.input)


if __name__ == "__main__":
    main()
