"""The worker's record of its requests, and one step's input made from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.sampling_params import SamplingParams
from gptoss.kernels.backend import KernelBackend
from gptoss.kernels.device_copy import to_device
from gptoss.kernels.step_layout import StepLayout

SlotsOf = Callable[[list[int]], list[int]]  # ids of adapters, 0: none -> their slots, -1: none


class GrowableArray:
    """An int array that grows by doubling: appending a token must not copy a long prompt."""

    __slots__ = ("_data", "size")

    def __init__(self, values: list[int], dtype: type = np.int64) -> None:
        self.size = len(values)
        self._data: np.ndarray = np.empty(max(64, 2 * self.size), dtype)
        self._data[: self.size] = values

    def extend(self, values: list[int]) -> None:
        end = self.size + len(values)
        if end > len(self._data):
            grown = np.empty(2 * end, self._data.dtype)
            grown[: self.size] = self._data[: self.size]
            self._data = grown
        self._data[self.size : end] = values
        self.size = end

    def drop(self, count: int) -> None:
        self.size -= count

    @property
    def view(self) -> np.ndarray:
        return self._data[: self.size]


@dataclass(slots=True)
class RequestState:
    request_id: str
    params: SamplingParams
    num_prompt_tokens: int
    num_computed_tokens: int
    tokens: GrowableArray
    blocks: tuple[GrowableArray, GrowableArray]  # by group: full, sliding
    adapter: int = 0  # id of its LoRA adapter; 0: none


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Prompt tokens of a step whose logits are wanted, for the tokens that follow them."""

    state: RequestState
    first: int  # position
    count: int

    @classmethod
    def among(cls, state: RequestState, count: int) -> ScoredTokens | None:
        """The scored ones of the request's next `count` tokens; None if there are none."""
        start = state.num_computed_tokens
        scored = min(start + count, state.num_prompt_tokens - 1) - start
        wanted = state.params.prompt_logprobs is not None and scored > 0
        return cls(state, start, scored) if wanted else None


@dataclass(slots=True)
class StepRows:
    """The requests of one step, in the order of the batch, and which of them are sampled."""

    states: list[RequestState]
    counts: list[int]  # new tokens of each
    sampled: list[RequestState] = field(default_factory=list)
    scored: list[ScoredTokens] = field(default_factory=list)
    # request -> drafts of its next tokens, which are the last of its tokens while the step runs
    drafts: dict[str, list[int]] = field(default_factory=dict)

    def alone(self, index: int) -> StepRows:
        """One request's part."""
        return StepRows([self.states[index]], [self.counts[index]], drafts=self.drafts)

    def with_states(self, states: list[RequestState]) -> StepRows:
        """These rows and all uncomputed ones of other requests, those with one row first."""
        pairs = [*zip(self.states, self.counts, strict=True)]
        pairs += [(state, state.tokens.size - state.num_computed_tokens) for state in states]
        pairs.sort(key=lambda pair: pair[1] > 1)
        return StepRows([state for state, _ in pairs], [count for _, count in pairs], drafts=self.drafts)


class RequestTable:
    """Request states by id, kept in step with the scheduler by its messages alone."""

    def __init__(self) -> None:
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def apply(self, out: SchedulerOutput) -> StepRows:
        for request_id in out.finished_or_preempted_ids:
            del self._states[request_id]
        for new in out.new_requests:
            self._states[new.request_id] = _state(new)
        for request_id, added in out.new_block_ids.items():
            for table, block_ids in zip(self._states[request_id].blocks, added, strict=True):
                table.extend(block_ids)
        for request_id, drafts in out.draft_tokens.items():
            self._states[request_id].tokens.extend(drafts)
        scheduled = [(self._states[request_id], n) for request_id, n in out.num_scheduled_tokens.items()]
        scheduled.sort(key=lambda pair: pair[1] > 1)
        states, counts = [state for state, _ in scheduled], [n for _, n in scheduled]
        return StepRows(states, counts, drafts=out.draft_tokens)

    def extend(self, sampled: dict[str, list[int]]) -> None:
        """Appends what another rank sampled in earlier steps.

        It is drafts that were right, and the token after them. Requests that have ended since are skipped.
        """
        for request_id, token_ids in sampled.items():
            state = self._states.get(request_id)
            if state is not None:
                state.tokens.extend(token_ids)
                state.num_computed_tokens += len(token_ids) - 1

    def finish_step(
        self, rows: StepRows, sampled: dict[str, int], accepted: Mapping[str, list[int]] = MappingProxyType({})
    ) -> None:
        """Counts what the step computed.

        Where several ranks learn its tokens later, nothing is `accepted` yet.
        """
        for state, count in zip(rows.states, rows.counts, strict=True):
            wrong = len(rows.drafts.get(state.request_id, ())) - len(accepted.get(state.request_id, ()))
            state.tokens.drop(wrong)
            state.num_computed_tokens += count - wrong
            if state.request_id in sampled:
                state.tokens.extend([sampled[state.request_id]])


def _state(new: NewRequest) -> RequestState:
    return RequestState(
        new.request_id,
        new.params,
        new.num_prompt_tokens,
        new.num_computed_tokens,
        GrowableArray(new.token_ids),
        (GrowableArray(new.block_ids[0]), GrowableArray(new.block_ids[1])),
        new.adapter,
    )


def build_batch(
    rows: StepRows, kernels: KernelBackend[Any], block_size: int, slots_of: SlotsOf | None = None
) -> ForwardBatch:
    """The model's input for a step; fills `rows.sampled` and `rows.scored`.

    Sampled are the requests whose known tokens are all computed by this step: after the last of them, and after each
    draft. The rows of scored tokens follow those to sample from. `slots_of`: the LoRA slots of adapters.
    """
    layout = layout_of(rows, block_size, slots_of)
    token_ids = np.concatenate(
        [s.tokens.view[start : start + n] for s, start, n in zip(rows.states, layout.starts, rows.counts, strict=True)]
    )
    return ForwardBatch(
        to_device(token_ids, torch.int64, kernels.device),
        to_device(rows_with_logits(rows, layout.ends), torch.int64, kernels.device),
        kernels.prepare_step(layout),
    )


def layout_of(rows: StepRows, block_size: int, slots_of: SlotsOf | None = None) -> StepLayout:
    starts = [state.num_computed_tokens for state in rows.states]
    full, sliding = ([state.blocks[group].view for state in rows.states] for group in range(2))
    adapters = [state.adapter for state in rows.states]
    slots = slots_of(adapters) if slots_of is not None and any(adapters) else None
    return StepLayout.of(starts, rows.counts, (full, sliding), block_size, slots)


def rows_with_logits(rows: StepRows, ends: np.ndarray) -> list[int]:
    """Fills `rows.sampled` and `rows.scored`, and returns the batch's rows that they need, in order."""
    sampled: list[int] = []
    scored: list[int] = []
    for state, count, end in zip(rows.states, rows.counts, ends.tolist(), strict=True):
        if state.num_computed_tokens + count == state.tokens.size:
            drafts = len(rows.drafts.get(state.request_id, ()))
            sampled.extend(range(end - 1 - drafts, end))
            rows.sampled.append(state)
        tokens = ScoredTokens.among(state, count)
        if tokens is not None:
            scored.extend(range(end - count, end - count + tokens.count))
            rows.scored.append(tokens)
    return sampled + scored
