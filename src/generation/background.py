"""Work that must end although what asked for it is gone: stopping processes, closing sessions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

logger = logging.getLogger(__name__)


class Background:
    """Tasks of an app that are not awaited; an exception is logged."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Runs the work in a task of its own."""
        self.adopt(asyncio.get_running_loop().create_task(work))

    def adopt(self, task: asyncio.Task[Any]) -> None:
        """Keeps a task until it has ended."""
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def drain(self, timeout_s: float) -> None:
        """Waits for all tasks, and cancels those that take longer."""
        while self._tasks:
            _, running = await asyncio.wait([*self._tasks], timeout=timeout_s)
            if running:
                for task in running:
                    task.cancel()
                await asyncio.wait(running, timeout=timeout_s)
                return

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("work in the background failed", exc_info=task.exception())
