"""Lessons as batches: many conversations in one row behind what they share.

The system message is a third of a short conversation, and the tools are most of one with tools, so each row holds them
once and the conversations branch off: a branch sees the shared part and itself, with positions as if it stood alone.
Short rows stand behind one another in one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from random import Random

import torch

from src.harmony.render import render_message, system_message
from src.harmony.vocabulary import ENDOFTEXT, Vocabulary
from src.nano.examples import EFFORTS, Example, Source, completion_ids
from src.nano.lessons import lesson
from src.nano.network import GROUP
from src.prompt_builder import PromptBuilder

IGNORED = -100
MISSES = 5  # rows that found no room, after which a batch counts as full


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids: torch.Tensor  # int64 [B, S]
    positions: torch.Tensor  # int64 [B, S]
    # int64 [B, S]: n GROUP for what a group shares, n GROUP + 1.. for its conversations, -1 padding
    branches: torch.Tensor
    # int64 [B, S]: the next token where the assistant writes it, else IGNORED
    targets: torch.Tensor


class BatchMaker:
    """`batch(step)` depends on the seed and the step alone, so that training can go on where it stopped."""

    def __init__(self, vocabulary: Vocabulary, seed: int, rows: int, row_size: int) -> None:
        self._vocabulary = vocabulary
        self._builder = PromptBuilder(vocabulary, cache_bytes=1 << 20)
        self._source = Source(vocabulary, Random(), unseen=False)
        self._seed, self._rows, self._row_size = seed, rows, row_size
        self._shared = {
            effort: render_message(
                system_message(effort, has_tools=False, current_date=None), vocabulary
            )
            for effort in EFFORTS
        }

    def batch(self, step: int) -> Batch:
        self._source.rng = Random(f"{self._seed} {step}")
        packed = [_Row([]) for _ in range(self._rows)]
        open_rows: dict[str, _Row] = {}
        misses = 0
        while misses < MISSES:
            made = lesson(self._source)
            encoded = [self.encode(example) for example in made]
            if made[0].tools:
                for row in self._row_of_branches(encoded):
                    misses += not self._pack(row, packed)
                continue
            effort, (prompt, completion) = made[0].effort, encoded[0]
            row = open_rows.setdefault(effort, _Row(self._shared[effort]))
            rest = prompt[len(row.shared) :]
            if len(row.ids) + len(rest) + len(completion) > self._row_size:
                misses += not self._pack(open_rows.pop(effort), packed)
                row = open_rows[effort] = _Row(self._shared[effort])
            if len(row.ids) + len(rest) + len(completion) <= self._row_size:
                row.add(rest, completion)
        for row in open_rows.values():
            self._pack(row, packed)
        size = max(len(row.ids) for row in packed)
        return Batch(
            *(
                torch.tensor(part)
                for part in zip(*(row.padded(size) for row in packed), strict=True)
            )
        )

    def _pack(self, row: _Row, packed: list[_Row]) -> bool:
        """Puts the row behind others where there is room for it; False: there is none."""
        for into in packed:
            if len(into.ids) + len(row.ids) <= self._row_size:
                into.append(row)
                return True
        return False

    def _row_of_branches(self, encoded: list[tuple[list[int], list[int]]]) -> list[_Row]:
        """One row of as many as fit behind what their prompts begin with alike; none if not one fits."""
        shared = os.path.commonprefix([prompt[:-1] for prompt, _ in encoded])
        row = _Row(list(shared))
        for prompt, completion in encoded:
            rest = prompt[len(shared) :]
            if len(row.ids) + len(rest) + len(completion) <= self._row_size:
                row.add(rest, completion)
        return [row] if row.has_branches else []

    def encode(self, made: Example) -> tuple[list[int], list[int]]:
        prompt = self._builder.build(
            made.messages,
            tools=made.tools,
            response_format=made.response_format,
            effort=made.effort,
        )
        return prompt.token_ids, completion_ids(made, self._vocabulary, prompt.token_ids)


class _Row:
    def __init__(self, shared: list[int]) -> None:
        self.shared = shared
        self.ids = list(shared)
        self._start = len(shared)
        self._positions = list(range(len(shared)))
        self._branches = [0] * len(shared)
        self._targets = [IGNORED] * len(shared)
        self._count = 0

    @property
    def has_branches(self) -> bool:
        return self._count > 0

    def add(self, rest: list[int], completion: list[int]) -> None:
        self._count += 1
        ids = rest + completion
        self.ids += ids
        self._positions += range(self._start, self._start + len(ids))
        self._branches += [self._count] * len(ids)
        self._targets += [IGNORED] * (len(rest) - 1) + completion + [IGNORED]

    def append(self, other: _Row) -> None:
        """All of another row, whose branches do not see this one's."""
        base = max(self._branches, default=-GROUP) // GROUP * GROUP + GROUP
        self.ids += other.ids
        self._positions += other._positions
        self._branches += [base + branch for branch in other._branches]
        self._targets += other._targets

    def padded(self, size: int) -> tuple[list[int], list[int], list[int], list[int]]:
        missing = size - len(self.ids)
        return (
            self.ids + [ENDOFTEXT] * missing,
            self._positions + [0] * missing,
            self._branches + [-1] * missing,
            self._targets + [IGNORED] * missing,
        )
