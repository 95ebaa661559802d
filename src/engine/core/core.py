"""The engine without any transport: requests in, tokens out, step by step."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import zmq

from gptoss.engine.config import EngineConfig
from gptoss.engine.core.adapters import EngineAdapters
from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.core.executor import Executor, OnDeath
from gptoss.engine.core.grammar_matcher import GrammarError, GuidedDecoding, load_tokenizer
from gptoss.engine.core.kv_cache_manager import KVCacheManager
from gptoss.engine.core.request import Request
from gptoss.engine.core.scheduler import BACKGROUND_PROMPT_TOKENS, BACKGROUND_PROMPT_TOKENS_CPU, Scheduler
from gptoss.engine.messages import (
    AdapterChanged,
    AddRequest,
    EngineStats,
    FinishReason,
    Heartbeat,
    SchedulerOutput,
    TokenOutput,
)

HEARTBEAT_S = 1.0
COMPILE_POLL_S = 0.02  # messages wait this long
ADAPTER_POLL_S = 0.005


class EngineCore:
    """Scheduler, KV cache manager, grammars and executor of one engine."""

    def __init__(
        self, config: EngineConfig, on_death: OnDeath | None = None, log: dict[str, Any] | None = None
    ) -> None:
        """`on_death` is called in a thread when another rank's process dies."""
        with ThreadPoolExecutor(1) as pool:  # the tokenizer takes a second to load: in parallel to the weights
            guided = pool.submit(_guided, config)
            self.executor = Executor(config, on_death, log)
            self.guided = guided.result()
        kv = KVCacheManager(
            self.executor.num_blocks,
            config.block_size,
            config.model.sliding_window,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.max_model_len = min(config.max_model_len, kv.max_request_tokens(config.max_num_batched_tokens))
        self.kv = kv
        max_drafts = self.executor.num_speculative_tokens
        on_gpu, has_head = self.executor.report().on_gpu, config.speculative_model is not None
        self.scheduler = Scheduler(
            dataclasses.replace(config, max_model_len=self.max_model_len),
            kv,
            max_in_flight=self.executor.max_in_flight,
            drafter=Drafter(self.guided, max_drafts, has_head=has_head) if max_drafts else None,
            # a draft head keeps keys and values of its guesses in the slots after the accepted drafts
            lookahead=2 * max_drafts - 1 if has_head else int(self.executor.report().prelaunches_steps),
            background_prompt_tokens=BACKGROUND_PROMPT_TOKENS if on_gpu else BACKGROUND_PROMPT_TOKENS_CPU,
        )
        self.stats = EngineStats(num_blocks=kv.num_blocks - 1)
        self.adapters = EngineAdapters(self.executor)
        # requests whose grammar is being compiled or whose adapter is being loaded, and their arrival times
        self._uncompiled: dict[str, tuple[AddRequest, float]] = {}

    def add_request(self, message: AddRequest) -> TokenOutput | None:
        """Accepts a request; returns a terminal output if it is refused.

        A request with a new grammar or adapter is scheduled once that is compiled or loaded, in a thread.
        """
        if message.request_id in self.scheduler or message.request_id in self._uncompiled:
            return _error(message.request_id, "a request with this id is running")
        num_tokens = len(message.token_ids) + len(message.output_ids)
        if num_tokens >= self.max_model_len:
            return _error(message.request_id, f"{num_tokens} tokens do not fit into {self.max_model_len} positions")
        if message.params.grammar is not None and self.guided is None:
            return _error(message.request_id, "this engine was started without a vocabulary: no grammars")
        now = time.monotonic()
        if self._must_wait(message):
            self._uncompiled[message.request_id] = (message, now)
            return None
        return self._admit(message, now)

    def _must_wait(self, message: AddRequest) -> bool:
        """Whether the request's adapter is being loaded, or its grammar compiled."""
        grammar = message.params.grammar
        is_compiling = self.guided is not None and grammar is not None and self.guided.is_compiling(grammar)
        return is_compiling or self.adapters.is_loading(message.adapter)

    def _admit(self, message: AddRequest, arrival: float) -> TokenOutput | None:
        problem = self.adapters.problem(message.adapter)
        if problem is not None:
            return _error(message.request_id, problem)
        if self.guided is not None and message.params.grammar is not None:
            try:
                self.guided.add(message.request_id, message.params.grammar, message.params.loop_guard)
                for token_id in message.output_ids:
                    self.guided.advance(message.request_id, token_id)
            except GrammarError as error:
                self.guided.remove(message.request_id)
                return _error(message.request_id, f"grammar: {error}")
        request = Request(
            message.request_id,
            list(message.token_ids),
            message.params,
            priority=message.priority,
            arrival=arrival,
            deadline=None if message.timeout_s is None else arrival + message.timeout_s,
            cache_salt=message.cache_salt,
            tenant=message.tenant,
            num_scored_tokens=message.num_scored_tokens,
            background=message.background,
            block_hashes=list(message.block_hashes),
            adapter=message.adapter,
            adapter_key=message.adapter_key,
        )
        request.token_ids += message.output_ids
        self.scheduler.add_request(request)
        return None

    def _admit_compiled(self) -> list[TokenOutput]:
        """Schedules requests whose grammar and adapter are there; returns the ends of those that fail."""
        refused = []
        for request_id, (message, arrival) in list(self._uncompiled.items()):
            if not self._must_wait(message):
                del self._uncompiled[request_id]
                refused.append(self._admit(message, arrival))
        return [output for output in refused if output is not None]

    def _stop_compiling(self, request_id: str) -> None:
        """Drops an uncompiled request, and its grammar if no other request needs that."""
        grammar = self._uncompiled.pop(request_id)[0].params.grammar
        wanted = {message.params.grammar for message, _ in self._uncompiled.values()}
        if self.guided is not None and grammar is not None and grammar not in wanted:
            self.guided.forget_compiling(grammar)

    def abort(self, request_ids: list[str]) -> list[TokenOutput]:
        uncompiled = [i for i in request_ids if i in self._uncompiled]
        for request_id in uncompiled:
            self._stop_compiling(request_id)
        ended = self._end(self.scheduler.finish_requests(request_ids), FinishReason.ABORT, None)
        return [*ended, *(TokenOutput(i, [], FinishReason.ABORT) for i in uncompiled)]

    def step(self) -> list[TokenOutput]:
        """Runs one step: schedule, execute, update. Returns the new tokens and the requests that ended."""
        started = time.monotonic()
        ended = self._begin_step(started)
        if not self.scheduler.has_requests() and not self.executor.num_in_flight:
            self._wait_for_grammar()
            return ended
        submitted = self._schedule()
        if submitted and self.executor.num_in_flight < self.executor.max_in_flight and self.scheduler.can_schedule():
            return ended  # another batch fits into the pipeline before this one's tokens are needed
        scheduled, result = self.executor.collect()
        outputs = self.scheduler.update_from_output(scheduled, result)
        self._advance_grammars(outputs)
        self._count_step(scheduled, started)
        return ended + outputs

    def _begin_step(self, now: float) -> list[TokenOutput]:
        """Schedules requests that waited for a grammar or an adapter, and ends those past their deadline.

        Returns the ended ones.
        """
        refused = self._admit_compiled()
        expired = self.scheduler.finish_requests([r.request_id for r in self.scheduler.expired(now)])
        return refused + self._end(expired, FinishReason.ERROR, "the request's deadline has passed")

    def _wait_for_grammar(self) -> None:
        if self.adapters.is_changing:
            time.sleep(ADAPTER_POLL_S)
        elif self.guided is not None and self._uncompiled:
            self.guided.wait_compiled(COMPILE_POLL_S)

    def _count_step(self, scheduled: SchedulerOutput, started: float) -> None:
        self.stats.num_steps_total += 1
        self.stats.last_step_s = time.monotonic() - started
        self.stats.step_s_total += self.stats.last_step_s
        self.stats.last_step_seqs = len(scheduled.num_scheduled_tokens)

    def _schedule(self) -> bool:
        """Submits the next step, unless it is empty and others are in flight; returns whether it did."""
        scheduled = self.scheduler.schedule()
        if not scheduled.num_scheduled_tokens and self.executor.num_in_flight:
            self.scheduler.take_back(scheduled)
            return False
        if self.guided is not None:
            ids = list(scheduled.num_scheduled_tokens)
            scheduled.grammar_rows, scheduled.grammar_bitmask = self.guided.bitmask(ids, scheduled.draft_tokens)
        self.executor.submit(scheduled)
        return True

    @property
    def gpu_mode(self) -> str:
        """The mode in use; "cpu" for a single rank on a CPU."""
        config = self.executor.config
        tensor, stages = config.tensor_parallel_size > 1, config.pipeline_parallel_size > 1
        if not tensor and not stages:
            return "single" if self.executor.report().on_gpu else "cpu"
        return "tensor+pipeline" if tensor and stages else "tensor" if tensor else "pipeline"

    @property
    def has_work(self) -> bool:
        is_waiting = bool(self._uncompiled) or self.adapters.is_changing
        return self.scheduler.has_requests() or self.executor.num_in_flight > 0 or is_waiting

    def adapter_changes(self) -> list[AdapterChanged]:
        """The adapters that have been loaded or unloaded since the last call."""
        return self.adapters.changes(self._uses_adapter) if self.adapters.is_changing else []

    def _uses_adapter(self, adapter_id: int) -> bool:
        waiting = any(message.adapter == adapter_id for message, _ in self._uncompiled.values())
        return waiting or self.scheduler.uses_adapter(adapter_id)

    def current_stats(self) -> EngineStats:
        stats, scheduler, kv = self.stats, self.scheduler, self.kv
        stats.num_running = scheduler.num_running
        num_background = sum(message.background for message, _ in self._uncompiled.values())
        stats.num_waiting = scheduler.num_waiting + len(self._uncompiled) - num_background
        stats.num_background_running = scheduler.num_background_running
        stats.num_background_waiting = scheduler.num_background_waiting + num_background
        stats.num_background_preemptions_total = scheduler.num_background_preemptions
        stats.num_waiting_tokens = scheduler.num_waiting_tokens
        stats.kv_usage, stats.num_free_blocks = kv.usage, kv.num_free_blocks
        stats.num_preemptions_total = scheduler.num_preemptions
        stats.num_draft_total, stats.num_accepted_total = (scheduler.num_drafts, scheduler.num_accepted)
        stats.num_head_draft_total, stats.num_head_accepted_total = scheduler.num_head_drafts
        stats.num_prefix_queried_total, stats.num_prefix_hit_total = (kv.num_queried_tokens, kv.num_hit_tokens)
        return stats

    def _advance_grammars(self, outputs: list[TokenOutput]) -> None:
        if self.guided is None:
            return
        for output in outputs:
            if output.finish_reason is None:
                try:
                    for token_id in output.token_ids:
                        self.guided.advance(output.request_id, token_id)
                except GrammarError as error:
                    self.scheduler.finish_requests([output.request_id])
                    output.finish_reason, output.error = FinishReason.ERROR, f"grammar: {error}"
            elif output.finish_reason is FinishReason.ERROR:
                reason = self.guided.error_of(output.request_id)
                output.error = output.error if reason is None else f"grammar: {reason}"
            if output.finish_reason is not None:
                self.guided.remove(output.request_id)

    def _end(self, requests: list[Request], reason: FinishReason, error: str | None) -> list[TokenOutput]:
        for request in requests:
            if self.guided is not None:
                self.guided.remove(request.request_id)
        return [TokenOutput(r.request_id, [], reason, error=error) for r in requests]


@contextlib.contextmanager
def heartbeats(context: zmq.Context[zmq.Socket[bytes]], address: str) -> Iterator[None]:
    """Sends Heartbeat from a thread while the context is open.

    Long steps do not delay it; a stopped process sends none.
    """
    ended = threading.Event()

    def beat() -> None:
        with context.socket(zmq.PUSH) as send:
            send.linger = 0
            send.connect(address)
            message = msgspec.msgpack.encode(Heartbeat())
            while not ended.wait(HEARTBEAT_S):
                with contextlib.suppress(zmq.Again):  # the API process is not reading
                    send.send(message, zmq.NOBLOCK)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _guided(config: EngineConfig) -> GuidedDecoding | None:
    if config.ranks_path is None:
        return None
    eos_ids = list(config.eos_token_ids)
    return GuidedDecoding(
        load_tokenizer(config.ranks_path, config.special_tokens, config.split_pattern, config.model.vocab_size, eos_ids)
    )


def _error(request_id: str, message: str) -> TokenOutput:
    return TokenOutput(request_id, [], FinishReason.ERROR, error=message)
