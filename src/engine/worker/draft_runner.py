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
class _Seen:
    """What a step computed of one request."""

    state: RequestState
    row: int  # of its first token in the batch
    next_ids: np.ndarray  # int64 [n], the tokens that follow the n computed ones
    limit: int  # guesses that are wanted

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
        seen = [one for one in self._seen(rows, output, limits) if len(one.next_ids)]
        if not seen:
            return {}
        hidden = self._head.fuse(states)
        self._store([one for one in seen if one.num_stored], hidden)
        return self._guess([one for one in seen if one.limit], hidden)

    def warm_up(self, num_tokens: int) -> None:
        """Runs the head over so many tokens in the null block, which no request reads, and guesses two."""
        blocks = [NULL_BLOCK] * (num_tokens // self._block_size + 1)
        tables = GrowableArray(blocks), GrowableArray(blocks)
        params = SamplingParams(max_tokens=2, seed=0)
        state = RequestState("", params, num_tokens, 0, GrowableArray([0] * num_tokens), tables)
        states = self._head.no_states(num_tokens)
        self.run(StepRows([state], [num_tokens]), states, ModelRunnerOutput({"": 0}, {}), {"": 2})

    def _seen(self, rows: StepRows, output: ModelRunnerOutput, limits: Mapping[str, int]) -> list[_Seen]:
        """The requests whose tokens the head sees: those without an adapter, which it was not made for."""
        seen, row = [], 0
        for state, count in zip(rows.states, rows.counts, strict=True):
            if not state.adapter and state.request_id not in output.failed:
                seen.append(self._seen_of(state, row, count, rows, output, limits.get(state.request_id, 0)))
            row += count
        return seen

    def _seen_of(
        self, state: RequestState, row: int, count: int, rows: StepRows, output: ModelRunnerOutput, limit: int
    ) -> _Seen:
        request_id, start, tokens = state.request_id, state.num_computed_tokens, state.tokens.view
        num_wrong = len(rows.drafts.get(request_id, ())) - len(output.accepted.get(request_id, ()))
        end = start + count - num_wrong
        token = output.sampled.get(request_id)
        if token is None:  # a part of the prompt: its next token is known
            return _Seen(state, row, np.array(tokens[start + 1 : end + 1]), 0)
        if token in state.params.stop_token_ids:
            limit = 0
        slots = min(len(state.blocks[0].view) * self._block_size, self._max_model_len)
        return _Seen(state, row, np.append(tokens[start + 1 : end], token), max(0, min(limit, slots - end + 1)))

    def _store(self, seen: list[_Seen], hidden: torch.Tensor) -> None:
        """Writes keys and values of the positions after which nothing is guessed."""
        if not seen:
            return
        seen.sort(key=lambda one: one.num_stored > 1)
        counts = [one.num_stored for one in seen]
        starts = [one.state.num_computed_tokens for one in seen]
        rows = np.concatenate([np.arange(one.row, one.row + one.num_stored) for one in seen])
        next_ids = np.concatenate([one.next_ids[: one.num_stored] for one in seen])
        mine = hidden if len(rows) == len(hidden) and (rows[1:] > rows[:-1]).all() else hidden[self._ids(rows)]
        self._head.store(self._ids(next_ids), mine, self.cache, self._step(seen, starts, counts))

    def _guess(self, seen: list[_Seen], hidden: torch.Tensor) -> dict[str, list[int]]:
        """Guesses token after token for all requests; those that want fewer leave early."""
        if not seen:
            return {}
        seen.sort(key=lambda one: -one.limit)
        last = [one.row + len(one.next_ids) - 1 for one in seen]
        ids = self._ids([int(one.next_ids[-1]) for one in seen])
        hidden = hidden[self._ids(last)]
        guesses: list[torch.Tensor] = []
        for number in range(seen[0].limit):
            going = [one for one in seen if one.limit > number]
            starts = [one.state.num_computed_tokens + len(one.next_ids) - 1 + number for one in going]
            step = self._step(going, starts, [1] * len(going))
            ids, hidden = self._head.guess(ids[: len(going)], hidden[: len(going)], self.cache, step)
            guesses.append(ids)
        columns = [column.tolist() for column in guesses]
        return {
            one.state.request_id: [column[index] for column in columns[: one.limit]] for index, one in enumerate(seen)
        }

    def _step(self, seen: list[_Seen], starts: list[int], counts: list[int]) -> object:
        tables = [one.state.blocks[0].view for one in seen]
        layout = StepLayout.of(starts, counts, (tables, tables), self._block_size)
        return self._head.kernels.prepare_step(layout)

    def _ids(self, values: list[int] | np.ndarray) -> torch.Tensor:
        return to_device(values, torch.int64, self._head.kernels.device)
