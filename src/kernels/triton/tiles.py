"""Tiles of assignments: a tile is up to `block_m` assignments of tokens to one expert.

Shapes: T tokens, k experts per token, A = T k assignments (assignment a = token * k + slot), P tiles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True, slots=True)
class TileList:
    """The tiles that the expert kernels walk."""

    tile_expert: torch.Tensor  # int32 [P], -1: no tile
    tile_first: torch.Tensor  # int32 [P], where its assignments begin in `rows`
    tile_count: torch.Tensor  # int32 [P]
    rows: torch.Tensor  # int32 [A], assignments sorted by expert, in their own order within an expert
    block_m: int


def max_tiles(assignments: int, num_experts: int, block_m: int) -> int:
    """The most tiles that a routing needs: each expert used adds at most one that is not full.

    A multiple of 4, so that arrays of that length that share a buffer are all aligned alike, and take one compilation.
    """
    needed = min(assignments, num_experts) + assignments // block_m
    return -(-needed // 4) * 4


@triton.jit
def sort_by_expert(chosen_ptr, num_real, EXPERTS: tl.constexpr, COUNT: tl.constexpr):
    """Sorts COUNT assignments by expert, and counts each expert's.

    The first `num_real` are real. -> (int32 [COUNT]: expert * COUNT + assignment in rising order, those that are not
    real last; int32 [EXPERTS]: how many each expert has).
    """
    a = tl.arange(0, COUNT)
    expert = tl.load(chosen_ptr + a, mask=a < num_real, other=EXPERTS)
    counts = tl.histogram(expert, EXPERTS, mask=expert < EXPERTS)
    return tl.sort(expert * COUNT + a), counts


@triton.jit
def write_tiles(
    counts, offsets, first, step, tile_expert_ptr, tile_first_ptr, tile_count_ptr, max_tiles, EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Writes every `step`-th of each expert's tiles from `first` on, and as many of the unused ones."""
    expert = tl.arange(0, EXPERTS)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    begin = tl.cumsum(tiles, axis=0) - tiles
    for i in range(first, tl.max(tiles, axis=0), step):
        at = begin + i
        mine = i < tiles
        tl.store(tile_expert_ptr + at, expert, mask=mine)
        tl.store(tile_first_ptr + at, offsets + i * BLOCK_M, mask=mine)
        tl.store(tile_count_ptr + at, tl.minimum(counts - i * BLOCK_M, BLOCK_M), mask=mine)
    for start in range(tl.sum(tiles, axis=0) + first * EXPERTS, max_tiles, step * EXPERTS):
        tl.store(tile_expert_ptr + start + expert, -1, mask=start + expert < max_tiles)
