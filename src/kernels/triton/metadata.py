"""What the Triton kernels need of a step's layout, on the device. Imports no triton.

Shapes: T tokens, B sequences, L columns of a block table, P tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gptoss.kernels.device_copy import to_device
from gptoss.kernels.step_layout import StepLayout

TILE_TOKENS = 16  # of a sequence that a program of the attention kernel takes
LORA_TILE = 16  # tokens of one adapter that a program takes


@dataclass(frozen=True, slots=True)
class TritonAttentionMetadata:
    """The sequences of a step, for the layers of one group. int32 but for the slots."""

    slot_mapping: torch.Tensor  # int64 [T], where the new keys and values go
    query_start: torch.Tensor  # [B + 1], rows of the batch
    length: torch.Tensor  # [B], tokens in the cache, the new ones included; 0: padding
    block_table: torch.Tensor  # [B, L]
    num_decodes: int  # sequences of one new token, which come first
    tile_seq: torch.Tensor  # [P], the sequence of each tile of the others' tokens
    tile_first: torch.Tensor  # [P], the row of its first token


@dataclass(frozen=True, slots=True)
class TritonLora:
    """Which adapter each token of a step has, and the tiles of tokens with the same one."""

    slots: torch.Tensor  # int64 [T]; -1: none
    slots_in_use: list[int]
    tiles: tuple[torch.Tensor, ...]  # int32: slot [P], first [P] and count [P] of each tile, and its rows of the batch


@dataclass(frozen=True, slots=True)
class TritonStep:
    positions: torch.Tensor  # int64 [T]
    num_tokens: torch.Tensor  # int32 [1]: rows after these are padding
    attention: tuple[TritonAttentionMetadata, TritonAttentionMetadata]  # by group
    logits: torch.Tensor | None = None  # float32 [R, V]: where to write them
    lora: TritonLora | None = None


def triton_step(layout: StepLayout, device: torch.device) -> TritonStep:
    full, sliding = (attention_metadata(layout, group, device) for group in range(2))
    return TritonStep(
        to_device(layout.positions, torch.int64, device),
        to_device([len(layout.positions)], torch.int32, device),
        (full, sliding),
        lora=triton_lora(layout.token_adapters, device),
    )


def triton_lora(slots: np.ndarray | None, device: torch.device) -> TritonLora | None:
    """`slots` int64 [T], -1: none; None where no token has an adapter."""
    if slots is None:
        return None
    used = [int(slot) for slot in np.unique(slots) if slot >= 0]
    rows = [np.flatnonzero(slots == slot) for slot in used]
    tiles, first = [], 0
    for slot, mine in zip(used, rows, strict=True):
        tiles += [(slot, first + i, min(LORA_TILE, len(mine) - i)) for i in range(0, len(mine), LORA_TILE)]
        first += len(mine)
    columns = [*np.array(tiles, np.int32).T, np.concatenate(rows).astype(np.int32)]
    on_device = tuple(to_device(np.ascontiguousarray(column), torch.int32, device) for column in columns)
    return TritonLora(to_device(slots, torch.int64, device), used, on_device)


def attention_metadata(layout: StepLayout, group: int, device: torch.device) -> TritonAttentionMetadata:
    first_rows = np.concatenate(([0], layout.ends))
    tables = layout.block_tables[group]
    table = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, blocks in zip(table, tables, strict=True):
        row[: len(blocks)] = blocks
    decodes = layout.num_decodes
    tile_seq, tile_first = tiles_of(first_rows, decodes)

    def ints(values: np.ndarray) -> torch.Tensor:
        return to_device(np.ascontiguousarray(values, np.int32), torch.int32, device)

    return TritonAttentionMetadata(
        slot_mapping=to_device(layout.slot_mapping(group), torch.int64, device),
        query_start=ints(first_rows),
        length=ints(np.add(layout.starts, layout.counts)),
        block_table=ints(table),
        num_decodes=decodes,
        tile_seq=ints(tile_seq),
        tile_first=ints(tile_first),
    )


def tiles_of(first_rows: Sequence[int] | np.ndarray, decodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns sequence and first row of each tile of the sequences after the first `decodes`."""
    tiles = [
        (seq, row)
        for seq in range(decodes, len(first_rows) - 1)
        for row in range(first_rows[seq], first_rows[seq + 1], TILE_TOKENS)
    ]
    tile_seq, tile_first = np.array(tiles, np.int32).reshape(-1, 2).T
    return tile_seq, tile_first
