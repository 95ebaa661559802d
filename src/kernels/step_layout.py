"""Where the tokens of one step lie: in the batch, in their sequences and in the cache. On the host.

Shapes: T tokens, B sequences. A slot is block * block_size + offset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class StepLayout:
    """The sequences of a step, those with one new token first. Block tables are by group: full, sliding."""

    starts: Sequence[int]  # [B], tokens in the cache before the step
    counts: Sequence[int]  # [B], new tokens
    ends: np.ndarray  # [B], the row after the last new token of each sequence
    positions: np.ndarray  # int64 [T]
    block_tables: tuple[Sequence[np.ndarray], Sequence[np.ndarray]]
    block_size: int
    adapters: Sequence[int] | None = None  # [B], LoRA slots, -1: none; None: no sequence has an adapter

    @classmethod
    def of(
        cls,
        starts: Sequence[int],
        counts: Sequence[int],
        block_tables: tuple[Sequence[np.ndarray], Sequence[np.ndarray]],
        block_size: int,
        adapters: Sequence[int] | None = None,
    ) -> StepLayout:
        positions = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, counts, strict=True)])
        return cls(starts, counts, np.cumsum(counts), positions, block_tables, block_size, adapters)

    @property
    def num_decodes(self) -> int:
        """Sequences with one new token."""
        return sum(count == 1 for count in self.counts)

    @property
    def token_adapters(self) -> np.ndarray | None:
        """int64 [T], the LoRA slot of each token; None: no token has an adapter."""
        return None if self.adapters is None else np.repeat(np.array(self.adapters, np.int64), self.counts)

    def slots(self, table: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """The slots of some positions of a sequence."""
        return table[positions // self.block_size] * self.block_size + positions % self.block_size

    def slot_mapping(self, group: int) -> np.ndarray:
        """int64 [T], where the keys and values of the new tokens go."""
        first_rows = [0, *self.ends]
        return np.concatenate(
            [
                self.slots(table, self.positions[first:end])
                for table, first, end in zip(self.block_tables[group], first_rows, self.ends, strict=False)
            ]
        )


def first_key(start: int, window: int | None) -> int:
    """The first position that a token at position `start` sees."""
    return 0 if window is None else max(0, start - window + 1)
