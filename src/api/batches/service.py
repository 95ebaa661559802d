"""The batches of one server, from their creation to their end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry, Counter, Gauge

from gptoss.api.access.api_keys import ApiKeys
from gptoss.api.batches.records import (
    Problem,
    RequestCounts,
    Status,
    StoredBatch,
    StoredFile,
    new_batch_id,
    new_file_id,
)
from gptoss.api.batches.run.job import BatchJob
from gptoss.api.batches.run.lines import BatchUsage, LineError, check_file
from gptoss.api.batches.run.runner import BatchRunner
from gptoss.api.batches.schema import BatchRequest
from gptoss.api.batches.store import BatchStore
from gptoss.api.context import ServerContext
from gptoss.api.dispatch import URLS, Answer, Dispatcher
from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.sender import Sender
from gptoss.config.schema import ServerConfig

logger = logging.getLogger(__name__)
SWEEP_S = 60.0
RUNNABLE: tuple[Status, ...] = ("validating", "in_progress")
NOT_RUN = {
    "expired": ("batch_expired", "This request was not run before the batch expired."),
    "cancelled": ("batch_cancelled", "The batch was cancelled before this request was run."),
}
ENDED_AT = {"failed": "failed_at", "completed": "completed_at", "expired": "expired_at", "cancelled": "cancelled_at"}


class BatchMetrics:
    """What /metrics shows of batches."""

    def __init__(self, registry: CollectorRegistry, store: BatchStore) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gptoss_{name}", text, labels, registry=registry)

        self.batches = counter("batch_batches", "Batches by how they ended.", "status")
        self.requests = counter("batch_requests", "Requests of batches by how they ended.", "outcome")
        self.prompt_tokens = counter("batch_prompt_tokens", "Prompt tokens of batches.")
        self.generation_tokens = counter("batch_generation_tokens", "Generated tokens of batches.")
        for status in ENDED_AT:
            self.batches.labels(status)
        for outcome in ("completed", "failed", "expired", "cancelled"):
            self.requests.labels(outcome)
        unfinished = Gauge("gptoss_batch_unfinished", "Batches that have not ended.", registry=registry)
        unfinished.set_function(lambda: sum(not batch.ended for batch in list(store.batches.values())))
        stored = Gauge("gptoss_batch_stored_bytes", "Size of all files of batches.", registry=registry)
        stored.set_function(store.total_bytes)


class BatchService:
    """Creates, runs, cancels and ends batches. Each unfinished one has a task."""

    def __init__(
        self,
        store: BatchStore,
        dispatcher: Dispatcher,
        config: ServerConfig,
        registry: CollectorRegistry,
        *,
        window: int,
        is_idle: Callable[[], bool],
        keys: ApiKeys,
    ) -> None:
        """
        Args:
            window: requests that run or wait in the engine at once.
            is_idle: whether an engine has no live request.
        """
        self.store, self._config, self._keys = store, config, keys
        self.metrics = BatchMetrics(registry, store)
        self._runner = BatchRunner(dispatcher, window, is_idle=is_idle, may_run=self._may_run, on_answer=self._answered)
        self._jobs: dict[str, BatchJob] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: dict[str, asyncio.Event] = {}
        self._sweeper: asyncio.Task[None] | None = None

    # --- start and stop ---

    def start(self) -> None:
        """Continues what an earlier process left, in the order of its creation."""
        self._runner.start()
        self._sweeper = asyncio.create_task(self._sweep())
        unfinished = [batch for batch in self.store.batches.values() if not batch.ended]
        if unfinished:
            logger.info("continuing %d batches", len(unfinished))
        for batch in unfinished:
            self._begin(batch)

    async def stop(self) -> None:
        """Ends the requests that run; the next process repeats those without an answer."""
        tasks = [*self._tasks.values(), *([self._sweeper] if self._sweeper is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._runner.stop()
        self.store.close()

    async def _sweep(self) -> None:
        while True:
            try:
                await self.store.remove_expired()
            except OSError as error:
                logger.error("cannot remove expired files: %s", error)
            await asyncio.sleep(SWEEP_S)

    # --- what routes ask for ---

    async def create(self, owner: str, request: BatchRequest) -> StoredBatch:
        """Creates a batch. Raises NotFound, InvalidRequest, RateLimited or OSError."""
        file = self.store.file(owner, request.input_file_id)
        if file.purpose != "batch":
            raise InvalidRequest(f"{file.id} was not uploaded with purpose 'batch'.", "input_file_id", "invalid_value")
        self.store.check_room(owner)
        now, expiry = int(time.time()), request.output_expires_after
        batch = StoredBatch(
            id=new_batch_id(),
            owner=owner,
            endpoint=request.endpoint,
            input_file_id=file.id,
            created_at=now,
            expires_at=now + max(1, int(self._config.batch_expiry_s)),
            metadata=request.metadata,
            output_expires_after_s=None if expiry is None else expiry.seconds,
            spool_ids=(new_file_id(), new_file_id()),
        )
        self.store.batches[batch.id] = batch  # at once: its input may not be deleted any more
        try:
            await self.store.save_batch(batch)
        except BaseException:
            del self.store.batches[batch.id]
            raise
        self._begin(batch)
        return batch

    async def cancel(self, owner: str, batch_id: str) -> StoredBatch:
        """Begins to cancel a batch. Raises NotFound, or InvalidRequest if it has ended otherwise."""
        batch = self.store.batch(owner, batch_id)
        if batch.status in RUNNABLE:
            batch.status, batch.cancelling_at, batch.ends_as = "cancelling", int(time.time()), "cancelled"
            await self.store.save_batch(batch)
            self._cancelled[batch.id].set()
        elif batch.status not in ("cancelling", "cancelled"):
            raise InvalidRequest(
                f"A batch that is {batch.status} cannot be cancelled.", "batch_id", "batch_not_cancellable"
            )
        return batch

    def shown(self, batch: StoredBatch) -> dict[str, Any]:
        """OpenAI's Batch with what its job has counted so far."""
        job = self._jobs.get(batch.id)
        if job is not None:
            self._take_counts(batch, job)
        return batch.shown()

    # --- the life of a batch ---

    def _begin(self, batch: StoredBatch) -> None:
        self._cancelled[batch.id] = asyncio.Event()
        task = self._tasks[batch.id] = asyncio.create_task(self._live(batch), name=batch.id)
        task.add_done_callback(lambda _: self._forget(batch))

    def _forget(self, batch: StoredBatch) -> None:
        self._tasks.pop(batch.id, None)
        self._cancelled.pop(batch.id, None)
        self._jobs.pop(batch.id, None)

    async def _live(self, batch: StoredBatch) -> None:
        """Takes a batch from its present status to its end."""
        try:
            if batch.status == "validating" or not batch.request_counts.total:
                await self._validate(batch)
            if not batch.ended:
                await self._run(batch)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a disk that is full, a file that is gone, a bug
            logger.exception("batch %s failed", batch.id)
            reason = error.strerror or "a file" if isinstance(error, OSError) else "an internal error"
            problem = Problem(code="storage_error", message=f"The batch ended because of {reason}.")
            await self._fail(batch, [problem])

    async def _validate(self, batch: StoredBatch) -> None:
        path, max_bytes = self.store.content(batch.input_file_id), self._config.max_body_bytes
        checked = await asyncio.to_thread(check_file, path, batch.endpoint, URLS, max_bytes)
        if checked.errors:
            await self._fail(batch, [_problem(error) for error in checked.errors])
            return
        batch.request_counts.total, batch.model = checked.num_lines, checked.model
        if batch.status == "validating":  # not cancelled meanwhile
            batch.status, batch.in_progress_at = "in_progress", int(time.time())
        await self.store.save_batch(batch)

    async def _run(self, batch: StoredBatch) -> None:
        output, errors = map(self.store.content, batch.spool_ids)
        job = BatchJob(
            self.store.content(batch.input_file_id),
            output,
            errors,
            endpoint=batch.endpoint,
            max_line_bytes=self._config.max_body_bytes,
            owner=batch.owner,
            sender_of=self._sender_of,
            on_written=lambda num_bytes: self.store.count_bytes(batch.owner, num_bytes),
        )
        await asyncio.to_thread(job.recover, batch.request_counts.total)
        self._jobs[batch.id] = job
        try:
            if batch.status == "in_progress":
                await self._run_until_end(batch, job)
            if batch.ends_as in NOT_RUN:
                await self._write_rest(batch, job)
            await self._finalize(batch, job)
        finally:
            self._runner.remove(job)
            await job.stop()

    async def _run_until_end(self, batch: StoredBatch, job: BatchJob) -> None:
        """Waits until every request has an answer, the batch is cancelled, or it expires. Raises job.failure."""
        self._runner.add(job)
        cancelled = self._cancelled[batch.id]
        waiting = [asyncio.create_task(job.ended.wait()), asyncio.create_task(cancelled.wait())]
        try:
            left_s = max(0.0, batch.expires_at - time.time())
            await asyncio.wait(waiting, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in waiting:
                task.cancel()
        ended = job.ended.is_set()
        self._runner.remove(job)
        await job.stop()
        if job.failure is not None:
            raise job.failure
        if not ended and not cancelled.is_set():
            batch.ends_as = "expired"

    async def _write_rest(self, batch: StoredBatch, job: BatchJob) -> None:
        num_left = await job.write_unanswered(*NOT_RUN[batch.ends_as])
        self.metrics.requests.labels(batch.ends_as).inc(num_left)
        if batch.ends_as == "expired":
            logger.warning("batch %s expired: %d of %d requests were not run", batch.id, num_left, job.counts.total)

    async def _finalize(self, batch: StoredBatch, job: BatchJob) -> None:
        """Turns what was written into files. Repeated if the process is killed meanwhile."""
        if batch.status != "cancelling":
            batch.status, batch.finalizing_at = "finalizing", int(time.time())
        self._take_counts(batch, job)
        await self.store.save_batch(batch)
        batch.output_file_id, batch.error_file_id = [
            await self._add_output(batch, file_id, name)
            for file_id, name in zip(batch.spool_ids, ("output", "error"), strict=True)
        ]
        await self._end(batch, batch.ends_as)

    async def _add_output(self, batch: StoredBatch, file_id: str, name: str) -> str | None:
        """Records what was written as a file; returns its id, or None if nothing was written."""
        path = self.store.content(file_id)
        size = path.stat().st_size if path.exists() else 0
        if not size:
            path.unlink(missing_ok=True)
            return None
        if file_id in self.store.files:  # an earlier process was killed here, and its file is counted already
            self.store.count_bytes(batch.owner, -size)
        else:
            now = int(time.time())
            keep_s = self.store.retention_s if batch.output_expires_after_s is None else batch.output_expires_after_s
            file = StoredFile(
                id=file_id,
                owner=batch.owner,
                bytes=size,
                created_at=now,
                filename=f"{batch.id}_{name}.jsonl",
                purpose="batch_output",
                expires_at=now + keep_s,
            )
            await self.store.add_file(file)
        return file_id

    def _may_run(self, owner: str) -> bool:
        """Whether an owner has a key, and room for answers."""
        return self._keys.named(owner) is not None and self.store.num_bytes(owner) < self.store.quota_bytes

    def _sender_of(self, owner: str) -> Sender:
        caller = self._keys.named(owner)
        scope = "removed" if caller is None else self._keys.cache_scope(caller)
        return Sender(f"{owner} batch", client=owner, tenant=owner, cache_scope=scope)

    async def _fail(self, batch: StoredBatch, problems: list[Problem]) -> None:
        batch.problems = problems
        with contextlib.suppress(OSError):  # the disk may be full; the next start tries again
            await self._end(batch, "failed")
        for file_id in batch.spool_ids:
            path = self.store.content(file_id)
            if file_id not in self.store.files and path.exists():
                self.store.count_bytes(batch.owner, -path.stat().st_size)
                with contextlib.suppress(OSError):
                    path.unlink()

    async def _end(self, batch: StoredBatch, status: Status) -> None:
        batch.status = status
        setattr(batch, ENDED_AT[status], int(time.time()))
        await self.store.save_batch(batch)
        self.metrics.batches.labels(status).inc()
        logger.info("batch %s: %s", batch.id, status, extra=_counts(batch.request_counts))

    def _take_counts(self, batch: StoredBatch, job: BatchJob) -> None:
        counts = job.counts
        batch.request_counts = RequestCounts(counts.total, counts.completed, counts.failed)
        batch.usage = job.usage.shown()

    def _answered(self, answer: Answer) -> None:
        usage = BatchUsage()
        usage.add(answer.body)
        self.metrics.requests.labels("completed" if answer.status == 200 else "failed").inc()
        self.metrics.prompt_tokens.inc(usage.input_tokens)
        self.metrics.generation_tokens.inc(usage.output_tokens)


def create_batches(context: ServerContext) -> BatchService:
    """Returns the batches of a server whose configuration has a batch_dir. Raises ConfigError."""
    config, metrics, access = context.config, context.metrics, context.access
    assert config.batch_dir is not None
    return BatchService(
        BatchStore(config.batch_dir, config.batch_quota_bytes, config.batch_retention_s),
        Dispatcher(context, background=True),
        config,
        metrics.registry,
        window=2 * context.engine.config.max_num_seqs * len(context.engine.engines),
        is_idle=lambda: not access.draining and any(not engine.streams.num_live for engine in context.engine.engines),
        keys=access.keys,
    )


def _problem(error: LineError) -> Problem:
    return Problem(code=error.code, message=str(error), line=error.line, param=error.param)


def _counts(counts: RequestCounts) -> dict[str, int]:
    found: dict[str, int] = msgspec.to_builtins(counts)
    return found
