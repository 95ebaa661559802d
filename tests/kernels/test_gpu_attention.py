"""Paged attention in Triton against plain torch in float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gptoss.kernels.layers import LayerCache
from gptoss.kernels.triton import attention
from gptoss.kernels.triton.configs import TileConfig
from gptoss.kernels.triton.metadata import TILE_TOKENS, TritonAttentionMetadata
from tests.kernels.gpu_helpers import DEVICE, assert_close, normal, on_device

DIM = 16 if DEVICE.type == "cpu" else 64
BLOCK = 16
CONFIG = TileConfig(16, 16, 1, 1)
WIDE = TileConfig(16, 128, 2, 1)


@pytest.fixture
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 32 keys, from 128 on of 64: a few hundred keys show what thousands do."""
    for name, value in (("SHORT_SPLIT", 32), ("NUM_SHORT", 4), ("LONG_SPLIT", 64), ("LONG_FROM", 128)):
        monkeypatch.setattr(attention, name, value)


class Case:
    """Sequences with `context` tokens in the cache and `new` ones, the decodes first; blocks in a random order."""

    def __init__(self, context: list[int], new: list[int], heads: int, groups: int, spare_blocks: int = 2) -> None:
        g = torch.Generator().manual_seed(len(context) + sum(new))
        self.context, self.new, self.heads, self.groups = context, new, heads, groups
        lengths = [c + n for c, n in zip(context, new, strict=True)]
        widths = [-(-n // BLOCK) for n in lengths]
        order = torch.randperm(sum(widths) + spare_blocks, generator=g).tolist()
        self.tables = [[order.pop() for _ in range(w)] for w in widths]
        num_blocks = sum(widths) + spare_blocks
        self.key = torch.full((num_blocks, BLOCK, groups, DIM), float("nan"))
        self.value = self.key.clone()
        self.keys, self.values = [], []
        for table, length in zip(self.tables, lengths, strict=True):
            k, v = normal(g, length, groups, DIM), normal(g, length, groups, DIM)
            for p in range(length):
                self.key[table[p // BLOCK], p % BLOCK] = k[p]
                self.value[table[p // BLOCK], p % BLOCK] = v[p]
            self.keys.append(k)
            self.values.append(v)
        self.query = normal(g, sum(new), heads, DIM, std=2.0)
        self.sinks = normal(g, heads)
        starts = np.concatenate(([0], np.cumsum(new)))
        decodes = sum(n == 1 for n in new)
        tiles = [
            (s, f) for s in range(decodes, len(new)) for f in range(int(starts[s]), int(starts[s + 1]), TILE_TOKENS)
        ]
        table = torch.zeros(len(new), max(widths) + 1, dtype=torch.int32)
        for row, blocks in zip(table, self.tables, strict=True):
            row[: len(blocks)] = torch.tensor(blocks)

        def ints(values: object) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=DEVICE)

        self.metadata = TritonAttentionMetadata(
            torch.empty(0),  # new keys are in the cache already
            ints(starts.tolist()),
            ints(lengths),
            table.to(DEVICE),
            decodes,
            ints([s for s, _ in tiles]),
            ints([f for _, f in tiles]),
        )

    def run(
        self, window: int | None, decode: TileConfig = CONFIG, prefill: TileConfig = CONFIG, *, fixed: bool = True
    ) -> torch.Tensor:
        query, sinks = on_device(self.query), on_device(self.sinks)
        return attention.paged_attention(
            query, self.cache(), sinks, self.metadata, window, DIM**-0.5, decode, prefill, fixed=fixed
        ).cpu()

    def cache(self) -> LayerCache:
        return LayerCache(on_device(self.key), on_device(self.value))

    def expected(self, window: int | None) -> torch.Tensor:
        out, at = [], 0
        for c, n, k, v in zip(self.context, self.new, self.keys, self.values, strict=True):
            k, v = (t.double().repeat_interleave(self.heads // self.groups, dim=1) for t in (k, v))
            for i in range(n):
                first = 0 if window is None else max(0, c + i - window + 1)
                seen = slice(first, c + i + 1)
                logits = torch.einsum("hd,khd->hk", self.query[at].double(), k[seen]) * DIM**-0.5
                p = torch.softmax(torch.cat((logits, self.sinks.double().unsqueeze(1)), dim=1), dim=1)[:, :-1]
                out.append(torch.einsum("hk,khd->hd", p, v[seen]).flatten())
                at += 1
        return torch.stack(out)


MIXES = [
    ([0], [1], 4, 2),
    ([40, 15, 16], [1, 1, 1], 8, 1),
    ([0, 33], [21, 5], 4, 2),
    ([70, 17, 0, 130], [1, 1, 9, 20], 8, 2),
    ([290], [1], 8, 1),
]


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(("context", "new", "heads", "groups"), MIXES)
@pytest.mark.parametrize(("window", "fixed"), [(None, True), (None, False), (20, True)])
def test_paged_attention(
    context: list[int], new: list[int], heads: int, groups: int, window: int | None, fixed: bool
) -> None:
    case = Case(context, new, heads, groups)
    assert_close("attention", case.expected(window), case.run(window, fixed=fixed))


@pytest.mark.parametrize("pieces", [1, 3, 5])
def test_keys_are_shared_out_between_any_number_of_programs(monkeypatch: pytest.MonkeyPatch, pieces: int) -> None:
    monkeypatch.setattr(attention, "MAX_PIECES", pieces)
    monkeypatch.setattr(attention, "MIN_PIECE", 16)
    case = Case([290, 40], [1, 1], 8, 1)
    first, second = (case.run(None, fixed=False) for _ in range(2))
    assert_close("attention", case.expected(None), first)
    assert torch.equal(first, second), "counters are zero again"


def alone_and_in_a_chunk(case: type[Case]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A token's attention alone in decode with split keys, and last of a chunk in a mixed batch, for two windows.

    It is the first of its tile, because numpy's products, which the interpreter takes, differ from row to row.
    """
    chunk = case([131, 67], [1, 33], 8, 1)
    lone = case([99], [1], 8, 1)
    lone.query[0] = chunk.query[-1]
    lone.sinks = chunk.sinks
    for p in range(100):
        lone.key[lone.tables[0][p // BLOCK], p % BLOCK] = chunk.keys[1][p]
        lone.value[lone.tables[0][p // BLOCK], p % BLOCK] = chunk.values[1][p]
    for window in (None, 20):
        yield lone.run(window, WIDE, WIDE)[0], chunk.run(window, WIDE, WIDE)[-1]


@pytest.mark.usefixtures("short_splits")
def test_a_token_is_the_same_in_prefill_and_decode_and_in_any_batch() -> None:
    for alone, together in alone_and_in_a_chunk(Case):
        assert torch.equal(alone, together), "the bits, not only the value"


@pytest.mark.usefixtures("short_splits")
def test_counters_are_zero_again() -> None:
    case = Case([290, 100], [1, 1], 8, 1)
    first, second = case.run(None), case.run(None)
    assert torch.equal(first, second)


def test_padding_sequences_are_passed_over() -> None:
    case = Case([20, 30], [1, 1], 4, 2)
    case.metadata.length[1] = 0
    assert_close("the other", case.expected(None)[:1], case.run(None)[:1])


def test_splits_follow_the_length() -> None:
    assert [attention.num_splits(n) for n in (1, 256, 257, 8192, 8193, 131_072)] == [1, 1, 2, 32, 33, 92]
