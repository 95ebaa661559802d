"""A question to an agent of openai-agents with the code interpreter, and another one in the same conversation.

    python compat/agents_client.py http://127.0.0.1:8000

Prints one JSON object: the answers, and the calls of the code interpreter.
"""

from __future__ import annotations

import asyncio
import json
import sys

from agents import Agent, CodeInterpreterTool, OpenAIResponsesModel, Runner, set_tracing_disabled
from agents.items import ToolCallItem
from openai import AsyncOpenAI


async def main(url: str) -> None:
    set_tracing_disabled(True)
    model = OpenAIResponsesModel(
        model="gpt-oss-nano", openai_client=AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    )
    tool = CodeInterpreterTool(tool_config={"type": "code_interpreter", "container": {"type": "auto"}})
    agent = Agent(name="calculator", model=model, tools=[tool])
    first = Runner.run_streamed(agent, "What is 41 + 1?")
    events = [event.data.type async for event in first.stream_events() if event.type == "raw_response_event"]
    asked = [*first.to_input_list(), {"role": "user", "content": "And now?"}]
    second = await Runner.run(agent, asked)
    calls = [
        {"code": item.raw_item.code, "container": item.raw_item.container_id, "status": item.raw_item.status}
        for item in (*first.new_items, *second.new_items)
        if isinstance(item, ToolCallItem)
    ]
    answers = [first.final_output, second.final_output]
    sys.stdout.write(json.dumps({"answers": answers, "calls": calls, "events": events}))


asyncio.run(main(sys.argv[1]))
