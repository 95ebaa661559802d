"""Threads for long texts and large bodies, which would block the event loop.

Callers share them equally.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from gptoss.api.http.errors import InvalidRequest, RateLimited
from gptoss.api.http.sender import Sender

T = TypeVar("T")
Stopped = Callable[[], bool]

INLINE_BYTES = 20_000  # larger bodies are read in a thread, so that the event loop keeps answering
NUM_THREADS = 4
SHARE = 2  # threads that one owner may have at once
MAX_WAITING = 64  # jobs of one owner


MANY_BYTES = sys.maxsize


def _never() -> bool:
    return False


class ClientGone(InvalidRequest):
    """The client has disconnected."""

    def __init__(self) -> None:
        super().__init__("The client closed the connection before its request was read.")


@dataclass(slots=True, eq=False)
class _Job:
    owner: str
    work: Callable[[Stopped], Any]
    done: asyncio.Future[Any]
    stopped: bool = False


class WorkPool:
    """Runs jobs in threads, those of different owners in turn. Belongs to one event loop."""

    def __init__(self, num_threads: int = NUM_THREADS, share: int = SHARE) -> None:
        self._threads = ThreadPoolExecutor(num_threads, "work")
        self._free = num_threads
        self._share = share
        self._waiting: dict[str, deque[_Job]] = {}  # by owner; whose turn it is comes first
        self._running: Counter[str] = Counter()

    async def read(self, sender: Sender, work: Callable[[Stopped], T], *, is_slow: bool = False) -> T:
        """Returns the result of `work` on the sender's body without blocking the event loop.

        `is_slow`: also if the body is small. Raises what `run` raises if the body is large.
        """
        if sender.body_bytes >= INLINE_BYTES:
            return await self.run(sender, work)
        return await asyncio.to_thread(work, _never) if is_slow else work(_never)

    async def run(self, sender: Sender, work: Callable[[Stopped], T]) -> T:
        """Returns the result of `work`, whose argument returns true once the result is no longer needed.

        Raises:
            RateLimited: too many jobs of this owner are waiting.
            ClientGone: the client has disconnected.
        """
        if len(self._waiting.get(sender.owner, ())) >= MAX_WAITING:
            raise RateLimited(
                f"{MAX_WAITING} long inputs of this key are waiting to be read already.",
                None,
                "rate_limit_exceeded",
                {"retry-after": "1"},
            )
        job = _Job(sender.owner, work, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(sender.owner, deque()).append(job)
        self._start_jobs()
        gone = asyncio.create_task(sender.gone())
        try:
            await asyncio.wait({job.done, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done.done():
                raise ClientGone
            result: T = job.done.result()
            return result
        finally:
            gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await gone
            self._forget(job)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _forget(self, job: _Job) -> None:
        """Removes a waiting job; makes a running one stop."""
        job.stopped = True
        queue = self._waiting.get(job.owner)
        if queue is not None and job in queue:
            queue.remove(job)
            if not queue:
                del self._waiting[job.owner]

    def _start_jobs(self) -> None:
        while self._free:
            owner = next((o for o in self._waiting if self._running[o] < self._share), None)
            if owner is None:
                return
            queue = self._waiting.pop(owner)
            job = queue.popleft()
            if queue:
                self._waiting[owner] = queue  # after the others
            self._free -= 1
            self._running[owner] += 1
            self._threads.submit(self._run, job, asyncio.get_running_loop())

    def _run(self, job: _Job, loop: asyncio.AbstractEventLoop) -> None:
        """Runs a job, in a thread."""
        result, error = None, None
        try:
            result = job.work(lambda: job.stopped)
        except BaseException as raised:  # raised again in the task that awaits the job
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            loop.call_soon_threadsafe(self._finish, job, result, error)

    def _finish(self, job: _Job, result: Any, error: BaseException | None) -> None:
        self._free += 1
        self._running[job.owner] -= 1
        if not self._running[job.owner]:
            del self._running[job.owner]
        if not job.stopped and error is not None:
            job.done.set_exception(error)
        elif not job.stopped:
            job.done.set_result(result)
        self._start_jobs()
