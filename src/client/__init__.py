"""A client of this server: openai's, with typed access to what only this server has.

from gptoss.client import GptOss

client = GptOss()
print(client.ask("What is 12 + 30?", profile="latency_first").text)
"""

from gptoss.client.clients import AsyncGptOss, GptOss
from gptoss.client.extras import Extras, extra_body
from gptoss.client.results import Health, Reply, ServedModel, Stats, ToolCall, ToolRun, served_model
from gptoss.client.tool_functions import ToolError, tool_definition
from gptoss.client.tool_loop import ToolLoopError

__all__ = [
    "AsyncGptOss",
    "Extras",
    "GptOss",
    "Health",
    "Reply",
    "ServedModel",
    "Stats",
    "ToolCall",
    "ToolError",
    "ToolLoopError",
    "ToolRun",
    "extra_body",
    "served_model",
    "tool_definition",
]
