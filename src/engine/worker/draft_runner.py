"""Runs an EAGLE-3 head after each step: it sees the step's tokens and guesses the next ones.

The head's keys and values lie in a cache tensor of their own, in the blocks of the full-attention layers, so that a
prefix found in the cache is there for the head too. (At the end of a reused prefix one entry may be of another
continuation: position i depends on token i + 1. That can cost a guess, never an answer.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from gptoss.engine.messages import NULL_BLOCK, ModelRunnerOutput
from gptoss.engine.model.eagle3 import Eagle3Head
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import GrowableArray, RequestState, StepRows
from gptoss.kernels.device_copy import to_device
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.step_layout import StepLayout


@dataclass(slots=True)
class _Span:
    """The tokens of one request that a step computed."""

    state: RequestState
    row: int  # of its first token in the batch
    next_ids: np.ndarray  # int64 [n], the tokens that follow the n computed ones
    limit: int  # most guesses after the last token

    @property
    def num_stored(self) -> int:
        """Leading positions after which nothing is guessed."""
        return len(self.next_ids) - (self.limit > 0)


class DraftRunner:
    """The head of a worker, with its cache."""

    def __init__(self, head: Eagle3Head, cache: LayerCache, block_size: int, max_model_len: int) -> None:
        self._head = head
        self.cache = cache
        self._block_size = block_size
        self._max_model_len = max_model_len

    def run(
        self,
        rows: StepRows,
        states: list[torch.Tensor],
        output: ModelRunnerOutput,
        limits: Mapping[str, int],
    ) -> dict[str, list[int]]:
        """Returns guesses of the tokens after the sampled ones, at most `limits` of each request.

        `states` [T, H]: the model's at the head's taps. `output`: what was sampled in the step.
        """
        spans = [span for span in self._spans(rows, output, limits) if len(span.next_ids)]
        if not spans:
            return {}
        hidden = self._head.fuse(states)
        self._store([span for span in spans if span.num_stored], hidden)
        return self._guess([span for span in spans if span.limit], hidden)

    def warm_up(self, num_tokens: int) -> None:
        """Runs the head over `num_tokens` tokens in the null block, which no request reads, and guesses two."""
        blocks = [NULL_BLOCK] * (num_tokens // self._block_size + 1)
        tables = GrowableArray(blocks), GrowableArray(blocks)
        params = SamplingParams(max_tokens=2, seed=0)
        state = RequestState("", params, num_tokens, 0, GrowableArray([0] * num_tokens), tables)
        states = self._head.zero_states(num_tokens)
        self.run(StepRows([state], [num_tokens]), states, ModelRunnerOutput({"": 0}, {}), {"": 2})

    def _spans(self, rows: StepRows, output: ModelRunnerOutput, limits: Mapping[str, int]) -> list[_Span]:
        """The spans that the head reads; it was not trained for requests with an adapter."""
        spans, row = [], 0
        for state, count in zip(rows.states, rows.counts, strict=True):
            if not state.adapter and state.request_id not in output.failed:
                spans.append(self._span_of(state, row, count, rows, output, limits.get(state.request_id, 0)))
            row += count
        return spans

    def _span_of(
        self, state: RequestState, row: int, count: int, rows: StepRows, output: ModelRunnerOutput, limit: int
    ) -> _Span:
        request_id, start, tokens = state.request_id, state.num_computed_tokens, state.tokens.view
        num_wrong = len(rows.drafts.get(request_id, ())) - len(output.accepted.get(request_id, ()))
        end = start + count - num_wrong
        token = output.sampled.get(request_id)
        if token is None:  # a part of the prompt: its next token is known
            return _Span(state, row, np.array(tokens[start + 1 : end + 1]), 0)
        if token in state.params.stop_token_ids:
            limit = 0
        slots = min(len(state.blocks[0].view) * self._block_size, self._max_model_len)
        return _Span(state, row, np.append(tokens[start + 1 : end], token), max(0, min(limit, slots - end + 1)))

    def _store(self, spans: list[_Span], hidden: torch.Tensor) -> None:
        """Writes keys and values of the positions after which nothing is guessed."""
        if not spans:
            return
        spans.sort(key=lambda span: span.num_stored > 1)
        counts = [span.num_stored for span in spans]
        starts = [span.state.num_computed_tokens for span in spans]
        rows = np.concatenate([np.arange(span.row, span.row + span.num_stored) for span in spans])
        next_ids = np.concatenate([span.next_ids[: span.num_stored] for span in spans])
        states = hidden if len(rows) == len(hidden) and (rows[1:] > rows[:-1]).all() else hidden[self._ids(rows)]
        self._head.store(self._ids(next_ids), states, self.cache, self._step(spans, starts, counts))

    def _guess(self, spans: list[_Span], hidden: torch.Tensor) -> dict[str, list[int]]:
        """Guesses token after token for all requests; each drops out at its limit."""
        if not spans:
            return {}
        spans.sort(key=lambda span: -span.limit)
        last = [span.row + len(span.next_ids) - 1 for span in spans]
        ids = self._ids([int(span.next_ids[-1]) for span in spans])
        hidden = hidden[self._ids(last)]
        guesses: list[torch.Tensor] = []
        for number in range(spans[0].limit):
            active = [span for span in spans if span.limit > number]
            starts = [span.state.num_computed_tokens + len(span.next_ids) - 1 + number for span in active]
            step = self._step(active, starts, [1] * len(active))
            ids, hidden = self._head.guess(ids[: len(active)], hidden[: len(active)], self.cache, step)
            guesses.append(ids)
        columns = [column.tolist() for column in guesses]
        return {
            span.state.request_id: [column[index] for column in columns[: span.limit]]
            for index, span in enumerate(spans)
        }

    def _step(self, spans: list[_Span], starts: list[int], counts: list[int]) -> object:
        tables = [span.state.blocks[0].view for span in spans]
        layout = StepLayout.of(starts, counts, (tables, tables), self._block_size)
        return self._head.kernels.prepare_step(layout)

    def _ids(self, values: list[int] | np.ndarray) -> torch.Tensor:
        return to_device(values, torch.int64, self._head.kernels.device)
