"""Generates and runs the functions that the model calls, until it answers."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

from openai.types.chat import ChatCompletion

from gptoss.client.results import Reply, ToolCall, ToolRun
from gptoss.client.tool_functions import Tool, ToolError, ToolFunction, failure_text, result_text

logger = logging.getLogger(__name__)
MAX_ROUNDS = 10
OnCall = Callable[[ToolCall], None]


class ToolLoopError(Exception):
    """The model still calls tools after the last round. `run` has the conversation so far."""

    def __init__(self, message: str, run: ToolRun) -> None:
        super().__init__(message)
        self.run = run


class ToolLoop:
    """One conversation with tools: what to send, and what to do with each completion."""

    def __init__(
        self, messages: Sequence[Any], functions: Sequence[ToolFunction], max_rounds: int, on_call: OnCall | None
    ) -> None:
        """Raises TypeError for a function that cannot be a tool, ValueError if two have one name."""
        self.tools = {tool.name: tool for tool in map(Tool.of, functions)}
        if len(self.tools) < len(functions):
            raise ValueError("two tools have the same name")
        self.messages, self.calls = list(messages), list[ToolCall]()
        self._left, self._on_call = max_rounds, on_call

    @property
    def definitions(self) -> list[Any]:
        return [tool.definition for tool in self.tools.values()]

    def wanted(self, completion: ChatCompletion) -> list[Any]:
        """Appends the model's message and returns the calls to run; none: it is the answer.

        Raises ToolLoopError once no round is left.
        """
        reply = Reply(completion)
        self.messages.append(reply.as_history)
        calls = [call for call in reply.message.tool_calls or () if call.type == "function"]
        self._left -= 1
        if calls and self._left < 0:
            raise ToolLoopError("the model still calls tools after the last round", self.run(completion))
        return calls

    def run(self, completion: ChatCompletion) -> ToolRun:
        return ToolRun(Reply(completion), self.messages, self.calls)

    def ended(self, call: Any, result: str, *, failed: bool) -> None:
        """Appends the result of a call."""
        self.messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        self.calls.append(ToolCall(call.function.name, call.function.arguments, result, failed))
        if self._on_call is not None:
            self._on_call(self.calls[-1])

    def execute(self, call: Any) -> tuple[str, bool]:
        """The result of a call and whether it failed; the model reads errors as results."""
        try:
            tool = self._tool(call)
            result = tool.function(**tool.read(call.function.arguments))
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise TypeError(f"{tool.name} is asynchronous: use AsyncGptOss")
            return result_text(result), False
        except Exception as error:
            return self._failed(call, error), True

    async def execute_async(self, call: Any) -> tuple[str, bool]:
        """Does what `execute` does; a function that is not asynchronous runs in a thread."""
        try:
            tool = self._tool(call)
            arguments = tool.read(call.function.arguments)
            if inspect.iscoroutinefunction(tool.function):
                result = await tool.function(**arguments)
            else:
                result = await asyncio.to_thread(tool.function, **arguments)
                if inspect.isawaitable(result):
                    result = await result
            return result_text(result), False
        except Exception as error:
            return self._failed(call, error), True

    def _tool(self, call: Any) -> Tool:
        if call.function.name not in self.tools:
            raise ToolError(f"there is no tool {call.function.name!r}; there are {', '.join(self.tools)}")
        return self.tools[call.function.name]

    @staticmethod
    def _failed(call: Any, error: Exception) -> str:
        if not isinstance(error, ToolError):
            logger.warning("the tool %s failed", call.function.name, exc_info=error)
        return failure_text(error)
