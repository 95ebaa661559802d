"""Steps of random sizes, as an engine's scheduler would make them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import RequestTable, StepRows


def random_sizes(
    count: int, *, max_num_seqs: int, max_tokens: int, max_len: int, seed: int = 0
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields `count` times cached and new tokens of sequences: some decode beside pieces of prompts."""
    rng = random.Random(seed)
    for _ in range(count):
        contexts: list[int] = []
        counts: list[int] = []
        left = max_tokens
        for _ in range(rng.randint(1, max_num_seqs)):
            decodes = rng.random() < 0.7
            new = 1 if decodes else min(left, int(2 ** rng.uniform(0, 13)))
            if new > left or not left:
                break
            left -= new
            contexts.append(min(max_len - new - 1, int(2 ** rng.uniform(0, 14))))
            counts.append(new)
        yield contexts, counts


def step_rows(contexts: list[int], counts: list[int], num_blocks: int, block_size: int) -> StepRows:
    """A step of sequences with so many cached and so many new tokens; blocks are used more than once."""
    new = [
        _request(i, context + count, context, num_blocks, block_size)
        for i, (context, count) in enumerate(zip(contexts, counts, strict=True))
    ]
    scheduled = {r.request_id: n for r, n in zip(new, counts, strict=True)}
    return RequestTable().apply(SchedulerOutput(new, {}, scheduled, []))


def _request(index: int, length: int, computed: int, num_blocks: int, block_size: int) -> NewRequest:
    blocks = [1 + i % (num_blocks - 1) for i in range(-(-(length + 1) // block_size))]
    params = SamplingParams(max_tokens=9, seed=0)
    return NewRequest(str(index), [5] * length, length, params, (blocks, blocks), computed)
