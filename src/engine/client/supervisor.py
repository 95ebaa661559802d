"""The engine process: its states, its start, and when it is started again."""

from __future__ import annotations

import asyncio
import enum
from dataclasses import dataclass
from multiprocessing.process import BaseProcess


class EngineState(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    max_restarts: int = 5  # in a row, without a request served in between
    backoff_s: float = 0.5  # doubled each time
    max_backoff_s: float = 30.0
    step_timeout_s: float = 300.0  # no sign of life for this long while work is waiting: the engine counts as dead
    # no message at all for this long: logged; for the longer of both timeouts: the engine counts as dead
    heartbeat_timeout_s: float = 10.0
    max_resumes: int = 0  # how often a request may go on in the next engine when its engine dies
    ready_wait_s: float = 60.0  # how long a request waits for an engine that is restarting


async def start_process(process: BaseProcess) -> None:
    """Starts it in a thread. Who is cancelled meanwhile leaves no process behind that nobody knows."""
    starting = asyncio.create_task(asyncio.to_thread(process.start))
    try:
        await asyncio.shield(starting)
    except asyncio.CancelledError:
        await starting
        process.kill()
        await asyncio.to_thread(process.join, 10)
        raise
