"""Steps replayed from CUDA graphs: a step of hundreds of small kernels becomes one launch.

Decode graphs exist for a few numbers of rows; a step takes the next larger one. Everything that changes between steps
lies in buffers whose addresses the graphs hold (graph_inputs.py). A row is one token of a request: the next one, or one
of the drafts that follow it. A draft attends like a sequence of its own, some of whose keys the same step writes.

Ranks of a stage meet in collective operations, which graphs hold too. So all ranks have the same graphs and replay them
in the same order: they get the same steps, and agree at the start on the sizes for which all have memory.

Shapes: B rows, V vocabulary (this rank's part), H hidden.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.memory_plan import layer_bytes
from gptoss.engine.parallel.shards import whole
from gptoss.engine.worker.batch import RequestState
from gptoss.engine.worker.graph_inputs import DecodeInputs, Row
from gptoss.engine.worker.prompt_graphs import PromptGraphs
from gptoss.engine.worker.tap_buffers import TapBuffers
from gptoss.kernels.layers import LayerCache

logger = logging.getLogger(__name__)

Forward = Callable[[], torch.Tensor]


class GraphRunner:
    def __init__(
        self,
        config: EngineConfig,
        model: GptOss,
        cache: list[LayerCache],
        device: torch.device,
        capture: Callable[[Forward], Forward] | None = None,
        comm: Communicator | None = None,
        num_taps: int = 0,
    ) -> None:
        """`capture` returns a function that repeats a forward pass; a CUDA graph by default.

        `comm`: where there are several ranks. `num_taps`: the model's, whose states graphs then give too.
        """
        self._config = config
        self._model = model
        self._cache = cache
        self._device = device
        self._comm = comm
        self._shard = whole(config.model) if comm is None else comm.shard
        self.max_rows = config.max_graph_rows
        self._sizes = config.decode_graph_sizes
        width = math.ceil(config.max_model_len / config.block_size)
        # every graph writes here: a replay's logits are read before the next one starts
        vocab = len(self._shard.vocab) if self._shard.is_last else 0
        logits = torch.zeros(self.max_rows, vocab, dtype=torch.float32, device=device)
        self._inputs = DecodeInputs(self.max_rows, width, config.block_size, device, logits)
        self._taps = TapBuffers(num_taps, self.max_rows, model, device)
        self._hidden: torch.Tensor | None = None  # [B, H], from the stage before
        if not self._shard.is_first:
            shape = (self.max_rows, config.model.hidden_size)
            self._hidden = torch.zeros(shape, dtype=model.residual_dtype, device=device)
        self._replays: dict[int, Forward] = {}
        self.prompts: PromptGraphs | None = None  # where there are no stages
        if self._shard.num_stages == 1:
            self.prompts = PromptGraphs(config, model, cache, device, self._shard, num_taps)
        self._capture = capture or CudaGraphs()
        self._num_captured = 0

    def capture_all(self) -> None:
        """Largest first: the smaller ones then fit into its memory. Sizes that do not fit are skipped."""
        started = time.monotonic()
        if self.prompts is not None:
            for tokens in reversed(self.prompts.sizes):
                self._add(self.prompts.replays, tokens, self.prompts.forward(tokens), "prompt graph")
        self.capture_sizes(self._sizes)
        self._sizes = sorted(self._replays)
        prompts = 0 if self.prompts is None else len(self.prompts.replays)
        seconds = time.monotonic() - started
        logger.info("captured %d decode and %d prompt graphs in %.1f s", len(self._sizes), prompts, seconds)

    def capture_sizes(self, sizes: list[int]) -> None:
        """Captures decode graphs."""
        for size in sorted(sizes, reverse=True):
            self._add(self._replays, size, self._forward(size), "decode graph")

    def _add(self, replays: dict[int, Forward], tokens: int, forward: Forward, kind: str) -> None:
        """Captures a pass of that many tokens, unless some rank has no memory for it."""
        replay = self._captured(forward, tokens)
        if replay is None:
            logger.warning("no memory for a %s of %d tokens: left out", kind, tokens)
        else:
            replays[tokens] = replay
            self._num_captured += 1

    def _captured(self, forward: Forward, tokens: int) -> Forward | None:
        if self._comm is not None and self._comm.world_size > 1:
            # a rank that ran out of memory on the way would leave the others waiting in a collective operation
            has_room = self._comm.minimum(int(self._has_room(tokens)))
            return self._capture(forward) if has_room else None
        try:
            return self._capture(forward)
        except torch.OutOfMemoryError:
            return None

    def _has_room(self, tokens: int) -> bool:
        """Whether this rank's device has the memory; smaller graphs use that of the first."""
        if self._device.type != "cuda":
            return True
        torch.cuda.empty_cache()
        element, rows = self._model.kernels.dtype.itemsize, 1 if self._num_captured else tokens
        needed = layer_bytes(self._config.model, self._shard, element, rows, rows)
        return torch.cuda.mem_get_info(self._device)[0] >= needed

    def release(self) -> None:
        """Drops all graphs. NCCL waits for those that hold its operations when ranks part."""
        self._sizes = []
        self._replays.clear()
        if self.prompts is not None:
            self.prompts.replays.clear()

    def holds(self, count: int) -> bool:
        """Whether a step of `count` rows has a graph."""
        return bool(self._sizes) and count <= self._sizes[-1]

    def run(self, states: list[RequestState]) -> torch.Tensor:
        """Computes the next token of each request, as `compute` does."""
        return self.compute([(s, s.num_computed_tokens) for s in states])

    def compute(
        self, rows: Sequence[Row], token_ids: torch.Tensor | None = None, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns the rows' logits float32 [B, V], or hidden states [B, H] on all stages but the last.

        Both are valid until the next call. `token_ids` int64 [B] on the device: the tokens, where the host does not
        know them yet. `hidden` [B, H]: what the stage before returned.
        """
        size = next(s for s in self._sizes if s >= len(rows))
        self._inputs.fill(rows, size, token_ids)
        if hidden is not None:
            assert self._hidden is not None
            self._hidden[: len(rows)].copy_(hidden)
        return self.replay(size)[: len(rows)]

    def tapped(self, count: int) -> list[torch.Tensor]:
        """Returns the states [B, H] at each tap of the first `count` rows; valid as their logits are."""
        return self._taps.first(count)

    def replay(self, size: int) -> torch.Tensor:
        """Replays the graph of that size on the current contents of its buffers."""
        return self._replays[size]()

    def _forward(self, size: int) -> Forward:
        batch = self._inputs.batch(size)
        hidden = None if self._hidden is None else self._hidden[:size]
        return lambda: self._taps.forward(batch, self._cache, hidden)


class CudaGraphs:
    """Captures forward passes into CUDA graphs that share their memory."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, forward: Forward) -> Forward:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            forward()  # compiles kernels, connects ranks, and allocates what must outlive the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # other threads, such as NCCL's watchdog, may call CUDA meanwhile
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = forward()
        self._pool = self._pool or graph.pool()

        def replay() -> torch.Tensor:
            graph.replay()
            return result

        return replay
