"""Pydantic AI against a running server of `nano`, over chat and Responses.

TEST_SERVER_URL=http://127.0.0.1:8000 pytest compat/test_pydantic_ai.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models import Model
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

NAME = os.environ.get("TEST_SERVER_MODEL", "gpt-oss-nano")
URL = os.environ.get("TEST_SERVER_URL", "http://127.0.0.1:8000") + "/v1"


class City(BaseModel):
    name: str
    population: int


@pytest.fixture(params=[OpenAIChatModel, OpenAIResponsesModel])
def model(request: pytest.FixtureRequest) -> Model:
    made: Model = request.param(NAME, provider=OpenAIProvider(base_url=URL, api_key="none"))
    return made


async def test_a_tools_result_is_answered_from(model: Model) -> None:
    agent = Agent(model)
    asked: list[str] = []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """Get the weather in a city."""
        asked.append(city)
        return "18 degrees and sun"

    answer = await agent.run("What is the weather in Paris?")
    assert "18 degrees" in answer.output
    assert asked == ["Paris"]


@pytest.mark.parametrize("way", [NativeOutput, ToolOutput, PromptedOutput])
async def test_structured_output(model: Model, way: Any) -> None:
    asked = "Give me JSON with name Paris and population 200"
    answer = await Agent(model, output_type=way(City)).run(asked)
    assert answer.output == City(name="Paris", population=200)


async def test_history_and_a_stream(model: Model) -> None:
    agent = Agent(model)
    first = await agent.run("My name is Carol.")
    history = first.all_messages()
    async with agent.run_stream("What is my name?", message_history=history) as streamed:
        text = "".join([delta async for delta in streamed.stream_text(delta=True)])
    assert "Carol" in text
    assert streamed.usage.output_tokens
