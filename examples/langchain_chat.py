"""A question, a stream and a tool call with LangChain."""

from __future__ import annotations

import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import SecretStr


@tool
def get_weather(city: str) -> str:
    """Get the current weather of a city."""
    return f"{city}: 7 C, rain"


def main() -> None:
    model = ChatOpenAI(
        model=os.environ.get("GPTOSS_MODEL", "gpt-oss-nano"),
        base_url=os.environ.get("GPTOSS_URL", "http://127.0.0.1:8000") + "/v1",
        api_key=SecretStr(os.environ.get("GPTOSS_API_KEY", "none")),
        max_completion_tokens=300,
    )
    print("answer:", model.invoke("What is 12 + 30?").content)
    print("stream:", "".join(str(chunk.content) for chunk in model.stream("What is 12 + 30?")))
    wanted = model.bind_tools([get_weather], tool_choice="get_weather").invoke("What is the weather in Oslo?")
    call = wanted.tool_calls[0]
    print("call:", call["name"], call["args"])
    print("result:", get_weather.invoke(call["args"]))


if __name__ == "__main__":
    main()
