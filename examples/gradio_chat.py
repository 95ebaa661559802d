"""A chat in the browser with Gradio: python examples/gradio_chat.py, then open http://127.0.0.1:7860."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import gradio
from openai import OpenAI

MODEL = os.environ.get("GPTOSS_MODEL", "gpt-oss-nano")
client = OpenAI(
    base_url=os.environ.get("GPTOSS_URL", "http://127.0.0.1:8000") + "/v1",
    api_key=os.environ.get("GPTOSS_API_KEY", "none"),
)


def text_of(content: Any) -> str:
    """The text of a message in Gradio's history: a string, or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") if isinstance(part, dict) else str(part) for part in content)


def answer(message: str, history: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the answer as it grows."""
    earlier: list[Any] = [{"role": turn["role"], "content": text_of(turn["content"])} for turn in history]
    messages = [*earlier, {"role": "user", "content": message}]
    text = ""
    for chunk in client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1000, stream=True):
        if chunk.choices:
            text += chunk.choices[0].delta.content or ""
            yield text


chat = gradio.ChatInterface(answer, title=MODEL, api_name="chat")

if __name__ == "__main__":
    chat.launch()
