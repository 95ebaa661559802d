"""One call of a tool: bounded in time and size, stopped when it is cancelled, and never an exception."""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from dataclasses import replace

from gptoss.generation.background import Background
from gptoss.generation.tool_types import (
    STOP_S,
    ImagePart,
    ResultPart,
    TextPart,
    ToolCall,
    ToolResult,
    ToolRunner,
    ToolSession,
)

logger = logging.getLogger(__name__)
CUT = "\n[the rest of the result was left out: it has {left} more bytes]"
MAX_IMAGES_BYTES = 8 * 2**20  # of one result


async def run_call(runner: ToolRunner, call: ToolCall, session: ToolSession, background: Background) -> ToolResult:
    """Runs a call until its deadline. A call that does not stop in time ends in the background.

    Raises CancelledError if this task is cancelled.
    """
    task = asyncio.get_running_loop().create_task(runner.call(call, session))
    try:
        done, _ = await asyncio.wait({task}, timeout=max(0.0, call.deadline - time.monotonic()))
        if not done:
            task.cancel()
            await asyncio.wait({task}, timeout=STOP_S)
            return ToolResult.failed("timeout", "The tool did not answer in time and was stopped.")
        return bounded(_result(task, runner), call.max_bytes)
    finally:
        if not task.done():
            task.cancel()
            background.adopt(asyncio.get_running_loop().create_task(_stopped(task, runner)))
        elif not task.cancelled():
            task.exception()  # after a timeout it is not read


async def _stopped(task: asyncio.Task[ToolResult], runner: ToolRunner) -> None:
    """Waits until a cancelled call has ended, and reports one that does not."""
    _, running = await asyncio.wait({task}, timeout=STOP_S)
    if running:
        logger.error("a cancelled call of %s still runs after %g s", runner.name, STOP_S)


def _result(task: asyncio.Task[ToolResult], runner: ToolRunner) -> ToolResult:
    if task.cancelled():
        return ToolResult.failed("internal", "the tool failed")
    error = task.exception()
    if error is not None:
        trace = "".join(traceback.format_tb(error.__traceback__))  # the message may quote the call
        logger.error("a call of %s failed: %s\n%s", runner.name, type(error).__name__, trace)
        return ToolResult.failed("internal", "the tool failed")
    return task.result()


def bounded(result: ToolResult, max_bytes: int) -> ToolResult:
    """The result with its texts cut to `max_bytes` of UTF-8, and without images beyond a limit."""
    left, left_images = max_bytes, MAX_IMAGES_BYTES
    parts: list[ResultPart] = []
    for part in result.content:
        if isinstance(part, ImagePart):
            left_images -= len(part.data)
            parts += [part] if left_images >= 0 else []
            continue
        data = part.text.encode("utf-8", "replace")  # a lone surrogate has no UTF-8
        if len(data) <= left:
            parts.append(TextPart(data.decode()))
            left -= len(data)
        else:
            kept = data[:left].decode("utf-8", "ignore")
            parts.append(TextPart(kept + CUT.format(left=len(data) - left)))
            break
    failure = result.failure
    if failure is not None:
        failure = replace(failure, message=failure.message.encode("utf-8", "replace").decode())
    return replace(result, content=tuple(parts), failure=failure)


def text_for_model(result: ToolResult) -> str:
    """What the model reads of a result."""
    return "\n".join(p.text if isinstance(p, TextPart) else f"[an image, {p.media_type}]" for p in result.content)
