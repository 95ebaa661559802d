"""The inputs of graphs: buffers whose addresses they hold, filled anew for each step.

Host buffers are pinned, and there are two sets, as a step is prepared while the copies of the previous one may still be
running. What goes to the device is contiguous: a strided copy would gather it in pageable memory and block.

Shapes: B rows of one token each, T tokens of pieces of prompts, S pieces, P tiles of their tokens, R rows to sample,
L columns of a block table, V vocabulary (this rank's part).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.worker.batch import RequestState, StepRows
from gptoss.kernels import device_copy
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton.metadata import TILE_TOKENS, TritonAttentionMetadata, TritonStep, tiles_of

ALIGNED = 16  # parts of buffers begin at such multiples, as tensors do; otherwise kernels would be compiled again

Row = tuple[RequestState, int]  # a request, and the position of one of its tokens


def aligned(count: int) -> int:
    return -(-count // ALIGNED) * ALIGNED


class Staging:
    """Host buffers, pinned for a GPU, from which a step's device buffers are filled."""

    def __init__(self, long: tuple[int, int], ints: int, tables: int, device: torch.device) -> None:
        """Numbers of elements; `long` has rows."""
        pinned = device.type == "cuda"
        self.long = torch.zeros(long, dtype=torch.int64, pin_memory=pinned)
        self.ints = torch.zeros(ints, dtype=torch.int32, pin_memory=pinned)
        self.tables = torch.zeros(tables, dtype=torch.int32, pin_memory=pinned)
        self._copied = device_copy.new_mark(device)

    def mark_copied(self) -> None:
        """Records that all copies from these buffers are queued on the device."""
        if self._copied is not None:
            self._copied.record()

    def wait(self) -> None:
        """Waits until the device has made the copies."""
        if self._copied is not None:
            self._copied.synchronize()


class DecodeInputs:
    """Rows of one token each. The later rows of a graph are padding: they write to the null block."""

    def __init__(self, most: int, width: int, block_size: int, device: torch.device, logits: torch.Tensor) -> None:
        """`most` rows, of sequences with `width` blocks. `logits` [B, V]: where the graphs write them."""
        self._block_size = block_size
        self._logits = logits
        stride = aligned(most)
        self._staging = [Staging((4, stride), stride + 1, 2 * stride * width, device) for _ in range(2)]
        # rows: token ids, positions, slots of full and of sliding layers
        self._long = torch.zeros(4, stride, dtype=torch.int64, device=device)
        # lengths, and as the last element the number of rows that are tokens
        self._lengths = torch.zeros(stride + 1, dtype=torch.int32, device=device)
        self._query_start = torch.arange(most + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(most, device=device)
        self._none = torch.empty(0, dtype=torch.int32, device=device)
        self._tables = torch.zeros(2, stride, width, dtype=torch.int32, device=device)
        self._used_tables = torch.zeros(2 * stride * width, dtype=torch.int32, device=device)

    def batch(self, size: int) -> ForwardBatch:
        """The model's input for a graph of that many rows."""
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

    def fill(self, rows: Sequence[Row], size: int, token_ids: torch.Tensor | None) -> None:
        """Fills the inputs of a graph of `size` rows.

        `token_ids` int64 [B] on the device: set if the host does not know them yet.
        """
        self._staging.reverse()
        staging = self._staging[0]
        staging.wait()
        long, lengths = staging.long.numpy(), staging.ints.numpy()
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
        self._lengths.copy_(staging.ints, non_blocking=True)
        on_device = self._used_tables[: len(used)].copy_(used, non_blocking=True)
        staging.mark_copied()
        self._tables[:, :count, : shape[2]].copy_(on_device.view(shape))
        if token_ids is not None:
            self._long[0, :count].copy_(token_ids)


class PromptInputs:
    """Pieces of prompts of any lengths. The later tokens, pieces and tiles of a graph are padding."""

    def __init__(
        self, tokens: int, pieces: int, width: int, block_size: int, device: torch.device, logits: torch.Tensor
    ) -> None:
        """Up to `tokens` tokens of `pieces` sequences with `width` blocks.

        `logits` [R, V]: where graphs write them.
        """
        self._block_size, self._pieces = block_size, pieces
        self._logits = logits
        stride = aligned(max(tokens, len(logits)))
        # lengths, the last of which is padding's, first rows, the number of tokens, sequences and first rows of tiles
        sizes = [aligned(n) for n in (pieces + 1, pieces + 2, 1, *2 * [num_tiles(tokens, pieces)])]
        self._staging = [Staging((5, stride), sum(sizes), 2 * pieces * width, device) for _ in range(2)]
        self._host_parts = [staging.ints.split(sizes) for staging in self._staging]
        # rows: token ids, positions, slots of full and of sliding layers, rows to sample
        self._long = torch.zeros(5, stride, dtype=torch.int64, device=device)
        self._ints = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
        self._parts = self._ints.split(sizes)
        self._tables = torch.zeros(2, pieces + 1, width, dtype=torch.int32, device=device)
        self._used_tables = torch.zeros(2 * pieces * width, dtype=torch.int32, device=device)

    def batch(self, size: int) -> ForwardBatch:
        """The model's input for a graph of that many tokens."""
        length, query_start, num_tokens, tile_seq, tile_first = self._parts
        tiles = num_tiles(size, self._pieces)
        full, sliding = (
            TritonAttentionMetadata(
                slot_mapping=self._long[2 + group, :size],
                query_start=query_start[: self._pieces + 2],
                length=length[: self._pieces + 1],
                block_table=self._tables[group],
                num_decodes=0,
                tile_seq=tile_seq[:tiles],
                tile_first=tile_first[:tiles],
            )
            for group in range(2)
        )
        step = TritonStep(self._long[1, :size], num_tokens[:1], (full, sliding), self._logits)
        return ForwardBatch(self._long[0, :size], self._long[4, : len(self._logits)], step)

    def fill(self, rows: StepRows, layout: StepLayout, sample_rows: Sequence[int]) -> None:
        """Fills the inputs of any graph that has as many tokens. `sample_rows`: of the batch."""
        self._staging.reverse()
        self._host_parts.reverse()
        staging = self._staging[0]
        staging.wait()
        long, count, tokens = staging.long.numpy(), len(rows.states), len(layout.positions)
        long[:] = 0
        long[0, :tokens] = np.concatenate(
            [s.tokens.view[a : a + n] for s, a, n in zip(rows.states, layout.starts, rows.counts, strict=True)]
        )
        long[1, :tokens] = layout.positions
        long[2, :tokens], long[3, :tokens] = layout.slot_mapping(0), layout.slot_mapping(1)
        long[4, : len(sample_rows)] = sample_rows
        length, query_start, num_tokens, tile_seq, tile_first = (part.numpy() for part in self._host_parts[0])
        length[:] = 0
        length[:count] = np.add(layout.starts, layout.counts)
        query_start[:] = tokens
        query_start[: count + 1] = [0, *layout.ends]
        num_tokens[0] = tokens
        seqs, firsts = tiles_of(query_start[: count + 1], 0)
        tile_seq[:], tile_first[:] = self._pieces, 0
        tile_seq[: len(seqs)], tile_first[: len(seqs)] = seqs, firsts
        self._copy(staging, layout)

    def _copy(self, staging: Staging, layout: StepLayout) -> None:
        tables = layout.block_tables
        shape = (2, len(layout.counts), max(len(table) for group in tables for table in group))
        used = staging.tables[: math.prod(shape)]
        for group, rows in zip(used.view(shape).numpy(), tables, strict=True):
            for row, blocks in zip(group, rows, strict=True):
                row[: len(blocks)] = blocks
        self._long.copy_(staging.long, non_blocking=True)
        self._ints.copy_(staging.ints, non_blocking=True)
        on_device = self._used_tables[: len(used)].copy_(used, non_blocking=True)
        staging.mark_copied()
        self._tables[:, : shape[1], : shape[2]].copy_(on_device.view(shape))


def num_tiles(tokens: int, pieces: int) -> int:
    """The most tiles of that many tokens: each piece adds at most one that is not full."""
    return tokens // TILE_TOKENS + pieces
