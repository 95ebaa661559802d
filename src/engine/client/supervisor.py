"""The engine process: its states, its start, when it counts as dead and when it is restarted."""

from __future__ import annotations

import asyncio
import enum
import logging
import time
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

logger = logging.getLogger(__name__)


class EngineState(enum.StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DEAD = "dead"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    max_restarts: int = 5  # consecutive, without a request served in between
    backoff_s: float = 0.5  # doubled each time
    max_backoff_s: float = 30.0
    step_timeout_s: float = 300.0  # an engine with work and no step for this long counts as dead
    # without any message for this long: an error is logged; for the longer of both timeouts: the engine counts as dead
    heartbeat_timeout_s: float = 10.0
    max_resumes: int = 0  # how many engine deaths a request may survive
    ready_wait_s: float = 60.0  # how long a request waits for a restarting engine


class Restarts:
    """Counts the deaths of engine processes in a row, none of which has served a request."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self.num_deaths = 0

    def count_death(self, *, has_served: bool) -> None:
        """`has_served`: whether the process that died had ended a request."""
        self.num_deaths = 1 if has_served else self.num_deaths + 1

    @property
    def are_used_up(self) -> bool:
        return self.num_deaths > self._policy.max_restarts

    @property
    def delay_s(self) -> float:
        """How long to wait before the next process is started."""
        return min(self._policy.max_backoff_s, self._policy.backoff_s * 2.0 ** (self.num_deaths - 1))


class SilenceWatch:
    """Measures how long the engine process has sent nothing."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._last_message = self._last_step = time.monotonic()
        self._has_warned = False

    @property
    def interval_s(self) -> float:
        """How often to check."""
        return min(1.0, max(0.05, self._policy.step_timeout_s / 10))

    @property
    def message_age_s(self) -> float:
        return time.monotonic() - self._last_message

    @property
    def step_age_s(self) -> float:
        """Seconds since the last message that was not a heartbeat, or since work began."""
        return time.monotonic() - self._last_step

    def work_begins(self) -> None:
        self._last_step = time.monotonic()

    def message_arrived(self, *, is_heartbeat: bool) -> None:
        self._last_message = time.monotonic()
        if not is_heartbeat:  # a process with a hanging step still sends heartbeats
            self._last_step = self._last_message

    def problem(self, *, has_work: bool) -> str | None:
        """Why the engine counts as dead although its process exists; None if it does not."""
        policy = self._policy
        if has_work and self.step_age_s >= policy.step_timeout_s:
            return f"no step within {policy.step_timeout_s:g} s while work was waiting"
        limit_s = max(policy.step_timeout_s, policy.heartbeat_timeout_s)
        if self.message_age_s >= limit_s:
            return f"no heartbeat within {limit_s:g} s"
        return None

    def stall(self, *, has_work: bool) -> str | None:
        """Why a request sent now would not be served although the engine is ready; None if it would."""
        policy = self._policy
        if self.message_age_s > policy.heartbeat_timeout_s:
            return f"no heartbeat of the engine for {self.message_age_s:.0f} s"
        if has_work and self.step_age_s > policy.step_timeout_s / 2:
            return f"no step for {self.step_age_s:.0f} s while work is waiting"
        return None

    def warn(self, pid: int | None, *, is_ready: bool) -> None:
        """Logs once per silence that heartbeats do not arrive."""
        is_silent = is_ready and self.message_age_s >= self._policy.heartbeat_timeout_s
        if is_silent and not self._has_warned:
            logger.error("no heartbeat of the engine (pid %s) for %.0f s: is it stopped?", pid, self.message_age_s)
        self._has_warned = is_silent


async def start_process(process: BaseProcess) -> None:
    """Starts the process in a thread; if cancelled meanwhile, kills it."""
    starting = asyncio.create_task(asyncio.to_thread(process.start))
    try:
        await asyncio.shield(starting)
    except asyncio.CancelledError:
        await starting
        process.kill()
        await asyncio.to_thread(process.join, 10)
        raise
