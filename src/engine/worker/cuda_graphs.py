"""Decode steps replayed from CUDA graphs: a step of hundreds of small kernels becomes one launch.

Graphs exist for a few batch sizes; a step takes the next larger one. Everything that changes between steps lies in
buffers whose addresses the graphs hold: token ids, positions, slots, lengths, block tables and the number of rows
that are tokens. The remaining rows are padding: they write to the null block, and no kernel reads experts for them.

The next step starts before the host has read this step's tokens: they are copied to its input on the device, on the
assumption that its requests continue. Reading the tokens does not wait for the next step (kernels/device_copy.py), so
the host works while the device computes. What the scheduler then schedules is taken from the prelaunched step where it
matches (grammar masks apply only to logits), and computed again where it does not. A request that ended in between has
written one extra key into a block of its own.

Shapes: B sequences of one new token each, L columns of a block table.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.worker.batch import RequestState
from gptoss.kernels.device_copy import to_device
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.triton.metadata import TritonAttentionMetadata, TritonStep

logger = logging.getLogger(__name__)

Forward = Callable[[], torch.Tensor]
ALIGNED_ROWS = 16


def graph_sizes(max_num_seqs: int) -> list[int]:
    """1, 2, 4, 8, 16, 24, 32, then steps of 16 to 128 and of 32 to max_num_seqs, which is always one."""
    sizes = [1, 2, 4, 8, 16, 24, 32, *range(48, 129, 16), *range(160, max_num_seqs, 32)]
    return sorted({s for s in sizes if s < max_num_seqs} | {max_num_seqs})


@dataclass(frozen=True, slots=True)
class PrelaunchedStep:
    """A step that was started before the scheduler scheduled it."""

    logits: torch.Tensor  # float32 [B, V]
    rows: dict[str, tuple[int, int]]  # request -> (its row, the position of its token)

    def row_of(self, state: RequestState, count: int) -> int | None:
        """The row of this request's next token, if that token is what is scheduled now."""
        row, position = self.rows.get(state.request_id, (None, -1))
        fits = count == 1 and position == state.num_computed_tokens and position + 1 == state.tokens.size
        return row if fits else None


class GraphRunner:
    def __init__(
        self,
        config: EngineConfig,
        model: GptOss,
        cache: list[LayerCache],
        device: torch.device,
        capture: Callable[[Forward], Forward] | None = None,
    ) -> None:
        """`capture` returns a function that repeats a forward pass; a CUDA graph by default."""
        self._model = model
        self._cache = cache
        self._block_size = config.block_size
        self._max_model_len = config.max_model_len
        self._sizes = graph_sizes(config.max_num_seqs)
        largest, width = self._sizes[-1], math.ceil(config.max_model_len / config.block_size)
        # parts of buffers begin at multiples of 16 bytes, as tensors do; otherwise kernels would be compiled again
        stride = -(-largest // ALIGNED_ROWS) * ALIGNED_ROWS
        # two sets: a step is prepared while the copies of the previous one may still be running
        self._staging = [_Staging(stride, width, pinned=device.type == "cuda") for _ in range(2)]
        # rows: token ids, positions, slots of full and of sliding layers
        self._long = torch.zeros(4, stride, dtype=torch.int64, device=device)
        # lengths, and as the last element the number of rows that are tokens
        self._lengths = torch.zeros(stride + 1, dtype=torch.int32, device=device)
        self._query_start = torch.arange(largest + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(largest, device=device)
        self._none = torch.empty(0, dtype=torch.int32, device=device)
        self._tables = torch.zeros(2, stride, width, dtype=torch.int32, device=device)
        # the part that a step uses, contiguous: a strided copy would gather it in pageable memory and block
        self._used_tables = torch.zeros(2 * stride * width, dtype=torch.int32, device=device)
        # every graph writes here: a replay's logits are read before the next one starts
        vocab = config.model.vocab_size
        self._logits = torch.zeros(largest, vocab, dtype=torch.float32, device=device)
        self._replays: dict[int, Forward] = {}
        self._capture = capture or CudaGraphs()

    def capture_all(self) -> None:
        """Largest first: the smaller ones then fit into its memory. Sizes that do not fit are skipped."""
        started = time.monotonic()
        self.capture_sizes(self._sizes)
        self._sizes = sorted(self._replays)
        logger.info("captured %d decode graphs in %.1f s", len(self._sizes), time.monotonic() - started)

    def capture_sizes(self, sizes: list[int]) -> None:
        for size in sorted(sizes, reverse=True):
            try:
                self._replays[size] = self._capture(self._forward(self._batch(size)))
            except torch.OutOfMemoryError:
                logger.warning("no memory for a decode graph of %d requests: left out", size)

    def holds(self, count: int) -> bool:
        """Whether a step of `count` requests has a graph."""
        return bool(self._sizes) and count <= self._sizes[-1]

    def run(self, states: list[RequestState]) -> torch.Tensor:
        """Computes one token of each request -> logits float32 [B, V], valid until the next call."""
        size = self._size(len(states))
        self._fill([(s, s.num_computed_tokens) for s in states], size, None)
        return self.replay(size)[: len(states)]

    def prelaunch(self, states: list[RequestState], token_ids: torch.Tensor) -> PrelaunchedStep | None:
        """Starts the next step from this step's tokens, before the host has read them.

        `token_ids`: int64 [B] on the device. Requests are skipped that reach their limit with this token, or whose next
        token needs a block that they do not have yet.
        """
        rows = [(row, state, state.tokens.size) for row, state in enumerate(states) if self._can_continue(state)]
        if not rows or not self.holds(len(rows)):
            return None
        if len(rows) < len(states):
            kept = to_device([row for row, _, _ in rows], torch.int64, token_ids.device)
            token_ids = token_ids[kept]
        size = self._size(len(rows))
        self._fill([(state, position) for _, state, position in rows], size, token_ids)
        by_request = {state.request_id: (i, position) for i, (_, state, position) in enumerate(rows)}
        return PrelaunchedStep(self.replay(size), by_request)

    def _can_continue(self, state: RequestState) -> bool:
        if state.adapter:
            return False  # graphs hold no adapters
        position = state.tokens.size  # of the token that is sampled now
        generated = position + 1 - state.num_prompt_tokens
        held = min(len(table.view) for table in state.blocks) * self._block_size
        return generated < state.params.max_tokens and position < min(held, self._max_model_len)

    def _size(self, count: int) -> int:
        return next(s for s in self._sizes if s >= count)

    def replay(self, size: int) -> torch.Tensor:
        """Replays the graph of that size on the current contents of its buffers."""
        return self._replays[size]()

    def _forward(self, batch: ForwardBatch) -> Forward:
        return lambda: self._model.forward(batch, self._cache)

    def _batch(self, size: int) -> ForwardBatch:
        full, sliding = (
            TritonAttentionMetadata(
                slot_mapping=self._long[2 + group, :size],
                query_start=self._query_start[: size + 1],
                length=self._lengths[:size],
                block_table=self._tables[group, :size],
                num_decodes=size,
                tile_seq=self._none,
                tile_first=self._none,
            )
            for group in range(2)
        )
        step = TritonStep(self._long[1, :size], self._lengths[-1:], (full, sliding), self._logits[:size])
        return ForwardBatch(self._long[0, :size], self._rows[:size], step)

    def _fill(self, rows: list[tuple[RequestState, int]], size: int, token_ids: torch.Tensor | None) -> None:
        """Fills the graph's inputs with rows: states and the positions of their tokens.

        `token_ids`: set if the host does not know them yet.
        """
        self._staging.reverse()
        staging = self._staging[0]
        staging.wait()
        long, lengths = staging.long.numpy(), staging.lengths.numpy()
        count = len(rows)
        positions = np.array([position for _, position in rows], np.int64)
        block, offset = np.divmod(positions, self._block_size)
        ends = (block + 1).tolist()
        shape = (2, count, max(ends))
        used = staging.tables[: math.prod(shape)]
        tables = used.view(shape).numpy()
        for row, ((state, _), end) in enumerate(zip(rows, ends, strict=True)):
            for table, blocks in zip(tables, state.blocks, strict=True):
                table[row, :end] = blocks.view[:end]
        long[:, count:size] = 0
        long[0, :count] = [state.tokens.view[position] for state, position in rows] if token_ids is None else 0
        long[1, :count] = positions
        long[2:, :count] = tables[:, np.arange(count), block] * self._block_size + offset
        lengths[:count] = positions + 1
        lengths[count:size] = 0
        lengths[-1] = count
        self._long.copy_(staging.long, non_blocking=True)
        self._lengths.copy_(staging.lengths, non_blocking=True)
        on_device = self._used_tables[: len(used)].copy_(used, non_blocking=True)
        staging.mark_copied()
        self._tables[:, :count, : shape[2]].copy_(on_device.view(shape))
        if token_ids is not None:
            self._long[0, :count].copy_(token_ids)


class _Staging:
    """Host buffers, pinned for a GPU, from which a step's device buffers are filled."""

    def __init__(self, largest: int, width: int, *, pinned: bool) -> None:
        self.long = torch.zeros(4, largest, dtype=torch.int64, pin_memory=pinned)
        self.lengths = torch.zeros(largest + 1, dtype=torch.int32, pin_memory=pinned)
        self.tables = torch.zeros(2 * largest * width, dtype=torch.int32, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None

    def mark_copied(self) -> None:
        """Records that all copies from these buffers are queued on the device."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Waits until the device has made the copies."""
        if self._copied is not None:
            self._copied.synchronize()


class CudaGraphs:
    """Captures forward passes into CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, forward: Forward) -> Forward:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()  # compiles kernels and allocates what must outlive the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = forward()
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return logits

        return replay


def all_decode(states: list[RequestState], counts: list[int]) -> bool:
    """Whether each request has one new token, its last known one, so that all are sampled, and no adapter."""
    return all(
        n == 1 and not s.adapter and s.num_computed_tokens + 1 == s.tokens.size
        for s, n in zip(states, counts, strict=True)
    )
