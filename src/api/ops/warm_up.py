"""Sends the first requests, so that kernels, grammar compiler and caches have run once."""

from __future__ import annotations

import asyncio
import logging
import time

from gptoss.api.access.api_keys import tenant_of
from gptoss.api.context import ServerContext
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.errors import EngineError
from gptoss.generation.request import FunctionTool, GenerationRequest, ToolPolicy
from gptoss.harmony.conversation import Conversation, UserMessage

logger = logging.getLogger(__name__)

TOOL = FunctionTool("warm_up", parameters={"type": "object", "properties": {"text": {"type": "string"}}})


async def warm_up(context: ServerContext) -> None:
    """Waits for the engines, then runs a plain and a guided request on each.

    A failure is logged and does not keep the server from serving: the engine has passed its self-test.
    """
    try:
        await context.engine.wait_started()
        if context.config.warm_up:
            started = time.monotonic()
            engines = [engine for engine in context.engine.engines if engine.is_ready]
            await asyncio.gather(*(_warm_up(context, engine) for engine in engines))
            logger.info("warmed up in %.2f s", time.monotonic() - started)
    except asyncio.CancelledError:
        raise
    except EngineError as error:
        logger.warning("not warmed up: %s", error)
    except Exception:
        logger.exception("not warmed up")
    context.warm.set()


async def _warm_up(context: ServerContext, engine: EngineClient) -> None:
    for tools in (ToolPolicy(), ToolPolicy([TOOL])):
        await _run(context, engine, tools)


async def _run(context: ServerContext, engine: EngineClient, tools: ToolPolicy) -> None:
    request = GenerationRequest(
        request_id=f"warm-up-{len(tools.tools)}",
        prompt=Conversation((UserMessage("Hello"),)),
        profile=context.profile,
        tools=tools,
        max_tokens=4,
        tenant=tenant_of(None),
    )
    plan = await asyncio.to_thread(context.planner().plan, request)
    async for _ in await engine.add_request(plan.requests[0]):
        pass
