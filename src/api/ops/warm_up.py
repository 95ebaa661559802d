"""Sends the first requests, so that kernels, grammar compiler and caches have run once."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time

import msgspec

from gptoss.api.access.api_keys import tenant_of
from gptoss.api.context import ServerContext
from gptoss.engine.client.client import EngineClient
from gptoss.engine.client.errors import EngineError
from gptoss.generation.request import FunctionTool, GenerationRequest, ToolPolicy
from gptoss.harmony.conversation import Conversation, UserMessage

logger = logging.getLogger(__name__)

TOOL = FunctionTool("warm_up", parameters={"type": "object", "properties": {"text": {"type": "string"}}})
LIMIT_S = 2.0
QUICK_S = 0.25  # for one step of few tokens; a slower model gets no longer prompt
FEW_TOKENS = 4


async def warm_up(context: ServerContext) -> None:
    """Waits for the engines, then runs plain and guided requests on each, for at most LIMIT_S.

    A failure is logged and does not keep the server from serving: the engine has passed its self-test.
    """
    try:
        await context.engine.wait_started()
        if context.config.warm_up:
            started = time.monotonic()
            engines = [engine for engine in context.engine.engines if engine.is_ready]
            async with asyncio.timeout(LIMIT_S):
                await asyncio.gather(*(_warm_up(context, engine) for engine in engines))
            logger.info("warmed up in %.2f s", time.monotonic() - started)
    except TimeoutError:
        logger.info("warmed up in part: %g s are over", LIMIT_S)
    except asyncio.CancelledError:
        raise
    except EngineError as error:
        logger.warning("not warmed up: %s", error)
    except Exception:
        logger.exception("not warmed up")
    context.warm.set()


async def _warm_up(context: ServerContext, engine: EngineClient) -> None:
    """Runs a few tokens of a prompt, which shows how fast the model is, then as much as that allows.

    A step cannot be interrupted, so a slow model must not begin a long one.
    """
    plain, guided = ToolPolicy(), ToolPolicy([TOOL])
    started = time.monotonic()
    await _run(context, engine, plain, FEW_TOKENS, max_tokens=1)
    if time.monotonic() - started > QUICK_S:
        await _run(context, engine, guided, FEW_TOKENS, max_tokens=1)
        return
    for tools in (plain, guided):
        await _run(context, engine, tools)


async def _run(
    context: ServerContext, engine: EngineClient, tools: ToolPolicy, num_tokens: int = 0, max_tokens: int = 4
) -> None:
    """Runs the prompt `Hello`, or the last tokens of it."""
    request = GenerationRequest(
        request_id=f"warm-up-{len(tools.tools)}-{num_tokens}",
        prompt=Conversation((UserMessage("Hello"),)),
        profile=context.profile,
        tools=tools,
        max_tokens=max_tokens,
        tenant=tenant_of(None),
    )
    plan = await asyncio.to_thread(context.planner().plan, request)
    planned = plan.requests[0]
    shortened = msgspec.structs.replace(planned, token_ids=planned.token_ids[-num_tokens:])
    outputs = await engine.add_request(shortened)
    async with contextlib.aclosing(outputs):  # type: ignore[type-var]
        async for _ in outputs:
            pass
