"""The worker's memory of its requests, and one step's input made from it.

Shapes: T tokens of the step, S requests of the step, L block-table columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import torch

from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.model_config import FULL, SLIDING
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.device_copy import to_device
from gptoss.kernels.attention import TILE_TOKENS, AttentionPlan, Ragged
from gptoss.kernels.cpu import native
from gptoss.kernels.reference.attention import DecodePlan, PrefillPlan
from gptoss.kernels.triton import support


class _Growing:
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
    tokens: _Growing
    blocks: tuple[_Growing, _Growing]  # by group: full, sliding


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """Prompt tokens of a step whose logits are wanted, for the tokens that follow them."""

    state: RequestState
    first: int  # position
    count: int

    @classmethod
    def among(cls, state: RequestState, count: int) -> ScoredTokens | None:
        """Of its next `count` tokens."""
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
    # request -> guesses at what comes next, which are the last of its tokens while the step runs
    drafts: dict[str, list[int]] = field(default_factory=dict)

    def alone(self, place: int) -> StepRows:
        """One request's part."""
        return StepRows([self.states[place]], [self.counts[place]], drafts=self.drafts)


class RequestTable:
    """Request states by id, kept in step with the scheduler by its messages alone."""

    def __init__(self) -> None:
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def apply(self, out: SchedulerOutput) -> StepRows:
        for request_id in out.gone_request_ids:
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

    def extend(self, sampled: dict[str, int]) -> None:
        """Tokens of earlier steps, sampled elsewhere. Requests that are gone since are passed over."""
        for request_id, token in sampled.items():
            if request_id in self._states:
                self._states[request_id].tokens.extend([token])

    def finish_step(
        self, rows: StepRows, sampled: dict[str, int], accepted: Mapping[str, list[int]] = MappingProxyType({})
    ) -> None:
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
        _Growing(new.token_ids),
        (_Growing(new.block_ids[0]), _Growing(new.block_ids[1])),
    )


def build_batch(
    rows: StepRows, block_size: int, sliding_window: int, dtype: torch.dtype, device: torch.device
) -> ForwardBatch:
    """Fills `rows.sampled` on the way: the requests whose known tokens are all computed by this step. One with drafts
    is sampled behind its last known token and behind each draft. And `rows.scored`, whose rows come after those."""
    num_decodes = sum(count == 1 for count in rows.counts)
    starts = [state.num_computed_tokens for state in rows.states]
    token_ids = np.concatenate(
        [s.tokens.view[start : start + n] for s, start, n in zip(rows.states, starts, rows.counts, strict=True)]
    )
    positions = np.concatenate([np.arange(start, start + n) for start, n in zip(starts, rows.counts, strict=True)])
    ends = np.cumsum(rows.counts)
    sample_rows: list[int] = []
    scored_rows: list[int] = []
    for state, start, count, end in zip(rows.states, starts, rows.counts, ends, strict=True):
        if start + count == state.tokens.size:
            drafts = len(rows.drafts.get(state.request_id, ()))
            sample_rows.extend(range(int(end) - 1 - drafts, int(end)))
            rows.sampled.append(state)
        scored = ScoredTokens.among(state, count)
        if scored is not None:
            scored_rows.extend(range(int(end) - count, int(end) - count + scored.count))
            rows.scored.append(scored)
    plans = {
        layer_type: _plan(rows, starts, ends, positions, group, window, num_decodes, block_size, dtype, device)
        for group, (layer_type, window) in enumerate(((FULL, None), (SLIDING, sliding_window)))
    }
    return ForwardBatch(
        to_device(token_ids, torch.int64, device),
        to_device(positions, torch.int64, device),
        plans,
        to_device(sample_rows + scored_rows, torch.int64, device),
        to_device([len(token_ids)], torch.int32, device),
    )


def _plan(
    rows: StepRows,
    starts: list[int],
    ends: np.ndarray,
    positions: np.ndarray,
    group: int,
    window: int | None,
    num_decodes: int,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    tables = [state.blocks[group].view for state in rows.states]

    def slots(table: np.ndarray, span: np.ndarray) -> np.ndarray:
        return table[span // block_size] * block_size + span % block_size

    def first_key(start: int) -> int:
        return 0 if window is None else max(0, start - window + 1)

    offsets = [0, *ends]
    slot_mapping = np.concatenate(
        [slots(table, positions[offsets[i] : offsets[i + 1]]) for i, table in enumerate(tables)]
    )
    mapping = to_device(slot_mapping, torch.int64, device)
    if native.supports(torch.empty(0, dtype=dtype, device=device)):
        return AttentionPlan(mapping, num_decodes, spans=_spans(rows, starts, positions, tables, window, block_size))
    if support.runs_triton(torch.empty(0, dtype=dtype, device=device)):
        ragged = ragged_batch(starts, rows.counts, tables, num_decodes, device)
        return AttentionPlan(mapping, num_decodes, ragged=ragged)
    decode = None
    if num_decodes:
        spans = [np.arange(first_key(start), start + 1) for start in starts[:num_decodes]]
        width = max(map(len, spans))
        gathered = np.zeros((num_decodes, width), np.int64)
        hidden = np.ones((num_decodes, width), bool)
        for i, span in enumerate(spans):
            gathered[i, : len(span)] = slots(tables[i], span)
            hidden[i, : len(span)] = False
        bias = torch.zeros(hidden.shape, dtype=dtype)
        bias.masked_fill_(torch.from_numpy(hidden), float("-inf"))
        decode = DecodePlan(torch.from_numpy(gathered.ravel()).to(device), bias[:, None, None].to(device))
    prefills = []
    for i in range(num_decodes, len(rows.states)):
        first, end = first_key(starts[i]), starts[i] + rows.counts[i]
        span_slots = torch.from_numpy(slots(tables[i], np.arange(first, end))).to(device)
        prefills.append(PrefillPlan(int(offsets[i]), rows.counts[i], starts[i], first, span_slots))
    return AttentionPlan(mapping, num_decodes, decode, tuple(prefills))


def ragged_batch(
    starts: list[int], counts: list[int], tables: list[np.ndarray], num_decodes: int, device: torch.device
) -> Ragged:
    """`starts`: cached tokens of each sequence, `counts`: new ones."""
    first_rows = np.concatenate(([0], np.cumsum(counts)))
    table = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, blocks in zip(table, tables, strict=True):
        row[: len(blocks)] = blocks
    tiles = [
        (seq, row)
        for seq in range(num_decodes, len(counts))
        for row in range(first_rows[seq], first_rows[seq + 1], TILE_TOKENS)
    ]
    tile_seq, tile_first = np.array(tiles, np.int32).reshape(-1, 2).T

    def ints(values: np.ndarray) -> torch.Tensor:
        return to_device(np.ascontiguousarray(values, np.int32), torch.int32, device)

    lengths = np.add(starts, counts)
    return Ragged(ints(first_rows), ints(lengths), ints(table), num_decodes, ints(tile_seq), ints(tile_first))


def _spans(
    rows: StepRows,
    starts: list[int],
    positions: np.ndarray,
    tables: list[np.ndarray],
    window: int | None,
    block_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (slots of all sequences' visible tokens, and for each new token base, first and last), as native.attention
    wants them: position p of the token's sequence lies in slots[base + p]."""
    parts, bases, total = [], [], 0
    for start, count, table in zip(starts, rows.counts, tables, strict=True):
        first = 0 if window is None else max(0, start - window + 1)
        span = np.arange(first, start + count)
        parts.append(table[span // block_size] * block_size + span % block_size)
        bases.append(total - first)
        total += len(span)
    base = np.repeat(np.array(bases, np.int64), rows.counts)
    first_seen = np.zeros_like(positions) if window is None else np.maximum(0, positions - window + 1)
    arrays = (np.concatenate(parts), base, first_seen, positions)
    slots, base_of, first_of, last_of = (torch.from_numpy(np.ascontiguousarray(a, np.int64)) for a in arrays)
    return slots, base_of, first_of, last_of
