"""A first request of our own: kernels, grammar compiler and caches have run once before a client waits for them."""

from __future__ import annotations

import asyncio
import logging
import time

from gptoss.api.chat.adapter import plan_chat
from gptoss.api.context import ServerContext
from gptoss.engine.client.errors import EngineError

logger = logging.getLogger(__name__)

TOOL = {
    "type": "function",
    "function": {"name": "warm_up", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}},
}


async def warm_up(context: ServerContext) -> None:
    """Waits for the engine, then runs a plain and a guided request. Failing is no reason not to serve: the engine has
    passed its self-test, and the log says what happened."""
    try:
        await context.engine.wait_ready()
        if context.config.warm_up:
            started = time.monotonic()
            for more in ({}, {"tools": [TOOL]}):
                body = {
                    "model": context.model_id,
                    "messages": [{"role": "user", "content": "Hello"}],
                    "max_tokens": 4,
                    **more,
                }
                chat = await plan_chat(body, context, None)
                async for _ in await context.engine.add_request(chat.plan.requests[0]):
                    pass
            logger.info("warmed up in %.2f s", time.monotonic() - started)
    except asyncio.CancelledError:
        raise
    except EngineError as error:
        logger.warning("not warmed up: %s", error)
    except Exception:
        logger.exception("not warmed up")
    context.warm.set()
