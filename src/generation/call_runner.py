"""The calls of server-run tools in one answer: their limits, order, results and events."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence

from gptoss.generation.errors import GenerationCancelledError, GenerationFailedError
from gptoss.generation.hosted import HostedCall, HostedTools, ToolEvent
from gptoss.generation.session import LoopAccounting
from gptoss.generation.tool_run import run_call
from gptoss.generation.tool_types import ToolCall, ToolResult, ToolUnavailableError

logger = logging.getLogger(__name__)


class CallRunner:
    """Runs the calls of all rounds of an answer. Their deadline begins now."""

    def __init__(self, tools: HostedTools, accounting: LoopAccounting) -> None:
        self._tools, self._accounting = tools, accounting
        self._num_run = 0
        self._uses = Counter[str]()  # by name in the plan
        self._deadline = time.monotonic() + tools.limits.deadline_s

    @property
    def are_over(self) -> bool:
        """Whether no further call may run: by number or by time."""
        return self._num_run >= self._tools.limits.max_calls or time.monotonic() >= self._deadline

    async def run(self, calls: Sequence[HostedCall]) -> AsyncGenerator[ToolEvent, None]:
        """Runs calls, all at once or one after the other. Closing it stops them."""
        for group in [calls] if self._tools.parallel else [[call] for call in calls]:
            async with contextlib.aclosing(self._run_together(group)) as events:
                async for event in events:
                    yield event

    async def _run_together(self, calls: Sequence[HostedCall]) -> AsyncGenerator[ToolEvent, None]:
        accounting, queue = self._accounting, asyncio.Queue[ToolEvent | BaseException]()
        if accounting.is_cancelled:
            raise GenerationCancelledError
        accounting.on_cancel(lambda: queue.put_nowait(GenerationCancelledError()))
        loop = asyncio.get_running_loop()
        tasks = [loop.create_task(self._run_one(call, queue.put_nowait)) for call in calls]
        for task in tasks:
            task.add_done_callback(lambda ended: _report_bug(ended, queue))
        try:
            running = len(calls)
            while running:
                event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                running -= event.state == "finished"
                yield event
        finally:
            accounting.on_cancel(None)
            for task in tasks:
                if not task.done():
                    task.cancel()
                self._tools.background.adopt(task)

    async def _run_one(self, call: HostedCall, emit: Callable[[ToolEvent], None]) -> None:
        started, failure = time.monotonic(), "cancelled"
        try:
            call.result = await self._result(call, emit)
            failure = call.result.failure.kind if call.result.failure is not None else ""
        finally:
            seconds = time.monotonic() - started
            tool = call.tool
            self._accounting.tool_ended(tool.runner.name, tool.recipient, seconds, failure or None)
        emit(ToolEvent(call, "finished"))

    async def _result(self, call: HostedCall, emit: Callable[[ToolEvent], None]) -> ToolResult:
        """The result of a call, also of one that may not run."""
        refused = self._refusal(call)
        if refused is not None:
            emit(ToolEvent(call, "running"))
            return ToolResult.failed("limit", refused)
        self._num_run += 1
        self._uses[call.name] += 1
        return await self._run_in_session(call, emit)

    async def _run_in_session(self, call: HostedCall, emit: Callable[[ToolEvent], None]) -> ToolResult:
        """Runs a call as soon as its session is ready; raises nothing but CancelledError."""
        tool, limits = call.tool, self._tools.limits
        deadline = min(time.monotonic() + limits.call_timeout_s, self._deadline)
        is_running = False
        try:
            async with asyncio.timeout(deadline - time.monotonic()) as timeout:
                held = await self._tools.chain.get(tool.runner, tool.options, tool.session_id)
                call.session_id = held.session.id
                emit(ToolEvent(call, "running"))
                is_running = True
                async with held.used():
                    timeout.reschedule(None)  # run_call has its own
                    made = ToolCall(
                        recipient=tool.recipient,
                        text=call.text,
                        call_id=call.call_id,
                        deadline=deadline,
                        max_bytes=limits.max_result_bytes,
                        options=tool.options,
                    )
                    return await run_call(tool.runner, made, held.session, self._tools.background)
        except ToolUnavailableError as error:
            failed = ToolResult.failed(error.kind, error.message)
        except TimeoutError:
            failed = ToolResult.failed("timeout", "The tool was not ready in time.")
        except Exception:
            logger.exception("a session of %s cannot be opened", tool.runner.name)
            failed = ToolResult.failed("internal", "the tool failed")
        if not is_running:
            emit(ToolEvent(call, "running"))
        return failed

    def _refusal(self, call: HostedCall) -> str | None:
        """Why the call may not run."""
        limits, most = self._tools.limits, call.tool.max_uses
        if most is not None and self._uses[call.name] >= most:
            return f"Not run: this answer may call {call.name} {most} times, and has done so."
        if self._num_run >= limits.max_calls:
            return f"Not run: this answer may make {limits.max_calls} tool calls, and has made them."
        if time.monotonic() >= self._deadline:
            return f"Not run: the tools of this answer have had their {limits.deadline_s:g} s."
        return self._accounting.take_tool_call()


def _report_bug(task: asyncio.Task[None], queue: asyncio.Queue[ToolEvent | BaseException]) -> None:
    """Ends the wait for a call that ended without a result."""
    if task.cancelled():
        queue.put_nowait(GenerationFailedError("a tool call was stopped"))
    elif (error := task.exception()) is not None:
        queue.put_nowait(error)
