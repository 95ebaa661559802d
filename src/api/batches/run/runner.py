"""Runs the requests of batches, a bounded number at a time, those of different owners in turn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

from gptoss.api.batches.run.job import BatchJob
from gptoss.api.batches.run.lines import InputLine, LineError
from gptoss.api.dispatch import Answer, Dispatcher

logger = logging.getLogger(__name__)
MAX_ATTEMPTS = 3  # of a request that the engine fails
RETRY_S = 1.0
MAX_RETRY_S = 30.0
POLL_S = 0.02


class EngineGoneError(RuntimeError):
    """The engine does not come back."""


class BatchRunner:
    """Takes requests of its jobs and answers them."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        window: int,
        *,
        is_idle: Callable[[], bool] = lambda: True,
        may_run: Callable[[str], bool] = lambda _: True,
        waits_for_engine: bool = True,
        retry_s: float = RETRY_S,
        on_answer: Callable[[Answer], None] = lambda _: None,
    ) -> None:
        """
        Args:
            window: requests that run or wait in the engine at once.
            is_idle: whether new ones may be planned, which takes time from the event loop.
            may_run: whether an owner's requests may run now.
            waits_for_engine: without it, jobs end when the engine is not available.
            on_answer: called with each answer once it is recorded.
        """
        self._dispatcher, self._window, self._is_idle, self._may_run = dispatcher, window, is_idle, may_run
        self._waits_for_engine, self._retry_s, self._on_answer = waits_for_engine, retry_s, on_answer
        self._jobs: dict[str, deque[BatchJob]] = {}  # by owner, whose turn it is first
        self._changed = asyncio.Event()
        self._taking = asyncio.Lock()
        self._workers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._workers = [asyncio.create_task(self._work()) for _ in range(self._window)]

    async def stop(self) -> None:
        """Ends the workers; requests that are running have no answer then."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    def add(self, job: BatchJob) -> None:
        """Runs the job after its owner's earlier ones; `job.ended` is set at its end."""
        self._jobs.setdefault(job.owner, deque()).append(job)
        self._changed.set()

    def remove(self, job: BatchJob) -> None:
        """Takes no further request of the job. Idempotent."""
        jobs = self._jobs.get(job.owner)
        if jobs is not None and job in jobs:
            jobs.remove(job)
            if not jobs:
                del self._jobs[job.owner]

    async def _work(self) -> None:
        while True:
            job, line = await self._next()
            row = asyncio.create_task(self._run(job, line))
            job.begin(row)
            try:
                await asyncio.wait({row})
            except asyncio.CancelledError:
                row.cancel()
                with contextlib.suppress(asyncio.CancelledError, Exception):
                    await row
                raise

    async def _next(self) -> tuple[BatchJob, InputLine]:
        """Waits for the next request: the oldest job of the owner whose turn it is."""
        async with self._taking:
            while True:
                while not self._jobs:
                    self._changed.clear()
                    await self._changed.wait()
                owner = next(filter(self._may_run, self._jobs), None) if self._is_idle() else None
                if owner is None:
                    await asyncio.sleep(POLL_S)
                    continue
                jobs = self._jobs[owner] = self._jobs.pop(owner)  # after the others
                job = jobs[0]
                line = await self._line_of(job)
                if line is not None:
                    return job, line
                self.remove(job)
                job.exhausted()

    async def _line_of(self, job: BatchJob) -> InputLine | None:
        try:
            return await job.next_line()
        except (LineError, OSError) as error:
            job.fail(error)
        except Exception as error:  # a bug here must not leave other jobs waiting
            logger.exception("batch runner")
            job.fail(error)
        return None

    async def _run(self, job: BatchJob, line: InputLine) -> None:
        answer = await self._answer(job, line)
        await job.write(line, answer)
        self._on_answer(answer)

    async def _answer(self, job: BatchJob, line: InputLine) -> Answer:
        """Repeats the request while the engine is not available, and a few times if the engine fails it."""
        num_failures, wait_s = 0, self._retry_s
        while True:
            answer = await self._dispatcher.answer(line.url, line.body, job.sender_of(line))
            num_failures += answer.failed
            if not answer.unavailable and (not answer.failed or num_failures == MAX_ATTEMPTS):
                return answer
            if answer.gone and not self._waits_for_engine:
                raise EngineGoneError(answer.body.decode())
            await asyncio.sleep(wait_s)
            wait_s = min(MAX_RETRY_S, wait_s * 2)
