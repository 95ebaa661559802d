"""Steps from graphs, and the next step started before its tokens are known on the host.

The next step starts before the host has read this step's tokens: they are copied to its input on the device, on the
assumption that its requests continue. Reading the tokens does not wait for the next step (kernels/device_copy.py), so
the host works while the device computes. What the scheduler then schedules is taken from the prelaunched step where it
matches (grammar masks apply only to logits), and computed again where it does not. A request that ended in between has
written one extra key into a block of its own.

With several ranks the one that samples sends the tokens to the others, from device to device in the order of the
stream, so that all start the next step alike. Where a token is drawn anew after that, the row is computed again.

A request whose step holds drafts is not continued: how many of them are right, and so where it continues, is known
after the step. A request with drafts whose first row was prelaunched computes the rows of its drafts only.

With a draft head graphs give hidden states too. Those of a step are copied before the next one starts, which writes
to the same buffers; the head runs after that.

Shapes: R rows to sample, B rows of a graph, T tokens of a step, V vocabulary (this rank's part), H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.worker.batch import RequestState, StepRows
from gptoss.engine.worker.cuda_graphs import GraphRunner
from gptoss.engine.worker.graph_inputs import Row
from gptoss.kernels.device_copy import PendingReadback, to_device

StartNext = Callable[[torch.Tensor | None], None]
Eager = Callable[[StepRows, list[torch.Tensor] | None], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Continuing:
    """A request whose next token can be computed before the host knows the one that is sampled now."""

    state: RequestState
    row: int  # of the sampled token among all of the step
    position: int  # of that token


@dataclass(frozen=True, slots=True)
class PrelaunchedStep:
    """A step that was started before the scheduler scheduled it."""

    outputs: list[torch.Tensor]  # logits float32 [B, V], and states [B, H] at each tap
    rows: dict[str, tuple[int, int]]  # request -> (its row, the position of its token)
    token_ids: PendingReadback | None  # its tokens, where another one may have been drawn since

    def ready(self, states: list[RequestState], drafts: dict[str, list[int]]) -> dict[str, int]:
        """The rows of those requests whose next token it has computed."""
        tokens = None if self.token_ids is None else self.token_ids.values()[0]
        found = {}
        for state in states:
            row, position = self.rows.get(state.request_id, (0, -1))
            known = state.tokens.size - len(drafts.get(state.request_id, ()))
            if position != state.num_computed_tokens or position + 1 != known:
                continue
            if tokens is None or tokens[row] == state.tokens.view[position]:
                found[state.request_id] = row
        return found


class GraphedSteps:
    """The steps of one rank of a model without stages. All ranks call the same methods in the same order."""

    def __init__(
        self,
        config: EngineConfig,
        graphs: GraphRunner,
        comm: Communicator,
        device: torch.device,
        eager: Eager,
    ) -> None:
        """`eager` computes rows that no graph holds; it fills `sampled` and `scored` as build_batch does.

        It adds the states [T, H] at each tap to the list that it is given, if any.
        """
        self._block_size, self._max_model_len = config.block_size, config.max_model_len
        self._graphs = graphs
        self._comm = comm
        self._device = device
        self._eager = eager
        self._prelaunched: PrelaunchedStep | None = None
        self._tokens = torch.zeros(graphs.max_rows, dtype=torch.int64, device=device)  # of the ranks' next step

    def logits(self, rows: StepRows, states: list[torch.Tensor] | None = None) -> torch.Tensor:
        """Returns the logits [R, V] of `rows.sampled` and then of `rows.scored`, which it fills.

        They are valid until the next step starts. `states` gets the states [T, H] at each tap, in the order of `rows`;
        they are valid until the next call.
        """
        prelaunched, self._prelaunched = self._prelaunched, None
        decoding, others = split_decoding(rows)
        ready = {} if prelaunched is None else prelaunched.ready(decoding, rows.drafts)
        computed = [row for state in decoding for row in rows_to_compute(state, ready)]
        if computed and not self._graphs.holds(len(computed)):
            kept = [s for s in decoding if s.request_id in ready and s.request_id not in rows.drafts]
            others = others.with_states([s for s in decoding if s not in kept])
            decoding, computed = kept, []
        decoding.sort(key=lambda state: state.request_id not in ready)
        parts: list[list[torch.Tensor]] = []  # of each: logits, and states at each tap
        if decoding:
            parts.append(self._decode(decoding, prelaunched, ready))
        if others.states:
            parts.append(self._other(others, tapped=states is not None))
        if states is not None:
            states.extend(self._in_order([part[1:] for part in parts], decoding, others, rows))
        rows.sampled.extend([*decoding, *others.sampled])
        rows.scored.extend(others.scored)
        return parts[0][0] if len(parts) == 1 else torch.cat([part[0] for part in parts])

    def _decode(
        self, states: list[RequestState], prelaunched: PrelaunchedStep | None, ready: dict[str, int]
    ) -> list[torch.Tensor]:
        """Logits [R, V] of each request's next token and its drafts, in order, and their states at each tap.

        `ready`: the rows of the prelaunched step that are taken; the others are computed now.
        """
        computed: list[Row] = []
        taken: list[int] = []
        order = []  # of the rows: those taken come before those computed
        num_ready = sum(state.request_id in ready for state in states)
        for state in states:
            if state.request_id in ready:
                order.append(len(taken))
                taken.append(ready[state.request_id])
            for row in rows_to_compute(state, ready):
                order.append(num_ready + len(computed))
                computed.append(row)
        if prelaunched is None or not taken:
            return [self._graphs.compute(computed), *self._graphs.tapped(len(computed))]
        first = [self._select(output, taken) for output in prelaunched.outputs]
        if not computed:
            return first
        first = [output.clone() for output in first]  # the others are written to the same buffers
        then = [self._graphs.compute(computed), *self._graphs.tapped(len(computed))]
        return [self._select(torch.cat(pair), order) for pair in zip(first, then, strict=True)]

    def _other(self, rows: StepRows, *, tapped: bool) -> list[torch.Tensor]:
        """As `_decode`, of pieces of prompts, and of what no decode graph holds. `tapped`: states are wanted."""
        prompts = self._graphs.prompts
        if prompts is not None and prompts.holds(rows):
            return [prompts.compute(rows), *prompts.tapped(sum(rows.counts))]
        states: list[torch.Tensor] = []
        logits = self._eager(rows, states if tapped else None)
        return [logits, *states]

    def _in_order(
        self, parts: list[list[torch.Tensor]], decoding: list[RequestState], others: StepRows, rows: StepRows
    ) -> list[torch.Tensor]:
        """The states [T, H] of a step from those of its parts, out of the way of the next step."""
        if not decoding and others.states == rows.states:
            return parts[0]  # the next step starts from other buffers
        order = token_order([*decoding, *others.states], rows)
        ids = None if (order[1:] > order[:-1]).all() else to_device(order, torch.int64, self._device)
        whole = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
        return whole if ids is None else [states[ids] for states in whole]

    def _select(self, rows: torch.Tensor, wanted: list[int]) -> torch.Tensor:
        if wanted == list(range(len(wanted))):
            return rows[: len(wanted)]
        return rows[to_device(wanted, torch.int64, self._device)]

    def next_step(self, rows: StepRows) -> StartNext | None:
        """Returns what starts the next step from the sampled tokens; None: nothing to start.

        It takes them as int64 [R] on the device. All ranks call it once, the tokens known or not (None). The rank that
        samples may call it again where tokens turned out wrong. Requests are left out that reach their limit with this
        token, or whose next token needs a block that they do not have yet.
        """
        continuing = self._continuing(rows)
        if not continuing or not self._graphs.holds(len(continuing)):
            return None
        alone = self._comm.shard.tensor_size == 1
        started = False

        def start(token_ids: torch.Tensor | None) -> None:
            nonlocal started
            if started and not alone:
                return  # what changed is found when the next step is scheduled
            started = True
            tokens = None if token_ids is None else self._select(token_ids, [c.row for c in continuing])
            self._start(continuing, tokens, alone=alone)

        return start

    def _start(self, continuing: list[Continuing], tokens: torch.Tensor | None, *, alone: bool) -> None:
        """`tokens` int64 [B] of the requests; None where another rank has them."""
        reading = None
        if not alone:
            shared = self._tokens[: len(continuing)]
            if tokens is not None:
                shared.copy_(tokens)
            self._comm.broadcast_in_stage(shared)
            tokens, reading = shared, PendingReadback([shared])
        outputs = [self._graphs.compute([(c.state, c.position) for c in continuing], tokens)]
        outputs += self._graphs.tapped(len(continuing))
        by_request = {c.state.request_id: (i, c.position) for i, c in enumerate(continuing)}
        self._prelaunched = PrelaunchedStep(outputs, by_request, reading)

    def _continuing(self, rows: StepRows) -> list[Continuing]:
        found, row = [], 0
        for state in rows.sampled:
            drafts = len(rows.drafts.get(state.request_id, ()))
            if not drafts and self._can_continue(state):
                found.append(Continuing(state, row, state.tokens.size))
            row += 1 + drafts
        return found

    def _can_continue(self, state: RequestState) -> bool:
        if state.adapter:
            return False  # graphs hold no adapters
        position = state.tokens.size  # of the token that is sampled now
        generated = position + 1 - state.num_prompt_tokens
        held = min(len(table.view) for table in state.blocks) * self._block_size
        return generated < state.params.max_tokens and position < min(held, self._max_model_len)


def split_decoding(rows: StepRows) -> tuple[list[RequestState], StepRows]:
    """Returns the requests that compute their last known token, and drafts after it, and the others.

    Requests with an adapter are among the others.
    """
    decoding: list[RequestState] = []
    others = StepRows([], [], drafts=rows.drafts)
    for state, count in zip(rows.states, rows.counts, strict=True):
        drafts = len(rows.drafts.get(state.request_id, ()))
        reaches_end = state.num_computed_tokens + count == state.tokens.size
        if reaches_end and count == 1 + drafts and not state.adapter:
            decoding.append(state)
        else:
            others.states.append(state)
            others.counts.append(count)
    return decoding, others


def rows_to_compute(state: RequestState, ready: dict[str, int]) -> list[Row]:
    """A decoding request's rows: its next token, unless that is ready, and its drafts."""
    first = state.num_computed_tokens + (state.request_id in ready)
    return [(state, position) for position in range(first, state.tokens.size)]


def token_order(computed: list[RequestState], rows: StepRows) -> np.ndarray:
    """Where each token of `rows` is, int64 [T], where its requests were computed in another order."""
    counts = {state.request_id: count for state, count in zip(rows.states, rows.counts, strict=True)}
    first, row = dict[str, int](), 0
    for state in computed:
        first[state.request_id] = row
        row += counts[state.request_id]
    return np.concatenate([np.arange(n) + first[name] for name, n in counts.items()])
