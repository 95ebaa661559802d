"""Runs the model for a scheduled step, and samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import ModelRunnerOutput, SchedulerOutput
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import split
from gptoss.engine.worker.batch import RequestState, RequestTable, SlotsOf, StepRows, build_batch
from gptoss.engine.worker.block_copies import BlockCopier
from gptoss.engine.worker.cuda_graphs import GraphRunner
from gptoss.engine.worker.draft_runner import DraftRunner
from gptoss.engine.worker.graphed_steps import GraphedSteps, StartNext, rows_to_compute, split_decoding
from gptoss.engine.worker.sampling.prompt_logprobs import PromptScores, score_prompts
from gptoss.engine.worker.sampling.sampler import sample
from gptoss.engine.worker.sampling.sampling_row import SamplingRow
from gptoss.kernels.backend import KernelBackend, SamplingKernels, choose_sampling
from gptoss.kernels.device_copy import PendingReadback
from gptoss.kernels.layers import LayerCache

logger = logging.getLogger(__name__)


class ModelRunner:
    """Runs the steps of one rank: model, sampler and draft head."""

    def __init__(
        self,
        config: EngineConfig,
        model: GptOss,
        cache: list[LayerCache],
        kernels: KernelBackend[Any],
        comm: Communicator,
        graphs: GraphRunner | None = None,
        slots_of: SlotsOf | None = None,
        draft_runner: DraftRunner | None = None,
    ) -> None:
        """`graphs` replays steps in which requests decode. `slots_of`: the LoRA slots of adapters.

        `draft_runner` guesses tokens after each step; graphs then give the states at its taps.
        """
        self._slots_of = slots_of
        self._draft_runner = draft_runner
        self._graphs = graphs
        self._steps: GraphedSteps | None = None
        if graphs is not None and comm.shard.num_stages == 1:
            self._steps = GraphedSteps(config, graphs, comm, kernels.device, self._forward)
        self._config = config
        self._model = model
        self._cache = cache
        self._copy_blocks = BlockCopier([*cache, *([] if draft_runner is None else [draft_runner.cache])])
        self._kernels = kernels
        self._sampling = choose_sampling(kernels.device)
        self._comm = comm
        self._vocab_sizes = [len(part) for part in split(config.model.vocab_size, comm.shard.tensor_size)]
        self._table = RequestTable()
        self._one_by_one = config.batch_invariant and not kernels.is_batch_invariant

    def execute_model(self, out: SchedulerOutput, sampled: dict[str, list[int]]) -> ModelRunnerOutput | None:
        """Runs one step; returns None on a rank that does not sample.

        A request whose logits are not finite, or that fails alone, is reported in `failed`; if all requests fail, the
        exception propagates. `sampled`: tokens of earlier steps that this rank has not seen (with several ranks, all).
        """
        self._table.extend(sampled)
        rows = self._table.apply(out)
        if not rows.states:
            return ModelRunnerOutput({}, {})
        if out.block_copies:
            self._copy_blocks(out.block_copies)
        try:
            result = self._run_invariant(rows, out) if self._one_by_one else self._run(rows, out)
        except (RuntimeError, MemoryError, IndexError, ValueError) as error:
            if len(rows.states) == 1 or self._comm.world_size > 1:
                raise  # the other ranks wait in a collective operation: only a restart realigns them
            logger.exception("step failed for %d requests together, trying each alone", len(rows.states))
            result = self._run_one_by_one(rows, out, error)
        if self._comm.world_size == 1:
            self._table.finish_step(rows, result.sampled, result.accepted)
        else:
            self._table.finish_step(rows, {})  # every rank learns the tokens with the next step
        return result if self._samples else None

    @property
    def prelaunches_steps(self) -> bool:
        """Whether a request's next token is computed before it is scheduled."""
        return self._steps is not None

    @property
    def _samples(self) -> bool:
        return self._comm.shard.is_last and self._comm.shard.is_tensor_leader

    def _run_invariant(self, rows: StepRows, out: SchedulerOutput) -> ModelRunnerOutput:
        """Runs every token through the model alone.

        torch's matrix products round differently for other shapes.
        """
        merged = ModelRunnerOutput({}, {}, {})
        for state, count in zip(rows.states, rows.counts, strict=True):
            start = state.num_computed_tokens
            for offset in range(count):
                state.num_computed_tokens = start + offset
                result = self._run(StepRows([state], [1]), out)
                merge(merged, result)
            state.num_computed_tokens = start
        return merged

    def _run_one_by_one(self, rows: StepRows, out: SchedulerOutput, cause: Exception) -> ModelRunnerOutput:
        """Runs each request alone, after a step of all of them has failed.

        A step can be repeated: it writes the same keys and values to the same slots.
        """
        merged = ModelRunnerOutput({}, {}, {})
        for index, state in enumerate(rows.states):
            try:
                result = self._run(rows.alone(index), out)
            except (RuntimeError, MemoryError, IndexError, ValueError) as error:
                merged.failed[state.request_id] = f"{type(error).__name__}: {error}"
                continue
            merge(merged, result)
        if len(merged.failed) == len(rows.states):
            raise cause
        return merged

    def _run(self, rows: StepRows, out: SchedulerOutput) -> ModelRunnerOutput:
        rows.sampled.clear()
        rows.scored.clear()
        if self._draft_runner is None:
            return self._run_model(rows, out)
        states: list[torch.Tensor] = []
        output = self._run_model(rows, out, states)
        output.drafts = self._draft_runner.run(rows, states, output, out.draft_limits)
        return output

    def _run_model(
        self, rows: StepRows, out: SchedulerOutput, states: list[torch.Tensor] | None = None
    ) -> ModelRunnerOutput:
        """Runs the model and samples. `states` gets the hidden states [T, H] at each tap."""
        steps = self._steps
        logits = self._through_stages(rows, states) if steps is None else steps.logits(rows, states)
        if logits is None or not (rows.sampled or rows.scored):
            return ModelRunnerOutput({}, {}, {})
        return self._sample(logits, rows, out)

    def _forward(
        self, rows: StepRows, states: list[torch.Tensor] | None = None, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        batch = build_batch(rows, self._kernels, self._config.block_size, self._slots_of)
        taps = {} if states is None else {"states": states}
        return self._model.forward(batch, self._cache, hidden, **taps)

    def _through_stages(self, rows: StepRows, states: list[torch.Tensor] | None) -> torch.Tensor | None:
        """Logits [R, V] of the rows to sample and then of those scored; None on a stage that is not the last."""
        shard, hidden = self._comm.shard, None
        if not shard.is_first:
            size, dtype = self._config.model.hidden_size, self._model.residual_dtype
            hidden = self._comm.receive_hidden(sum(rows.counts), size, dtype)
        if self._graphs is not None and self._graphs.holds(sum(rows.counts)) and not split_decoding(rows)[1].states:
            computed = [row for state in rows.states for row in rows_to_compute(state, {})]
            result = self._graphs.compute(computed, None, hidden)
            rows.sampled.extend(rows.states)
        else:
            result = self._forward(rows, states, hidden)
        if shard.is_last:
            return result
        self._comm.send_hidden(result if self._graphs is None else result.clone())  # a replay writes there again
        return None

    def _sample(self, logits: torch.Tensor, rows: StepRows, out: SchedulerOutput) -> ModelRunnerOutput:
        """`logits` float32 [R, V], or this rank's part of V."""
        start_next = None if self._steps is None else self._steps.next_step(rows)
        if self._comm.shard.tensor_size > 1:
            if _plainly_greedy(rows, out):
                return self._sample_best(logits, rows, start_next)
            whole = self._comm.gather_logits(logits, self._vocab_sizes)
            if whole is None:
                if start_next is not None:
                    start_next(None)
                return ModelRunnerOutput({}, {})
            logits = whole
        logits, of_prompts = split_scored(logits, rows)
        scores = score_prompts(of_prompts, rows.scored)
        if not rows.sampled:
            return with_scores(ModelRunnerOutput({}, {}, {}), scores)
        return with_scores(sample_states(logits, rows.sampled, out, self._sampling, start_next), scores)

    def _sample_best(self, logits: torch.Tensor, rows: StepRows, start_next: StartNext | None) -> ModelRunnerOutput:
        best = self._comm.gather_best(logits, self._comm.shard.vocab.start)
        reading = None if best is None else PendingReadback(best)
        if start_next is not None:
            start_next(None if best is None else best[0])
        output = ModelRunnerOutput({}, {}, {})
        if reading is None:
            return output
        token_ids, values = reading.values()
        finite = [math.isfinite(value) for value in values]
        first = 0
        for state in rows.sampled:
            accept(output, state.request_id, rows.drafts.get(state.request_id, ()), token_ids[first:], finite[first:])
            first += 1 + len(rows.drafts.get(state.request_id, ()))
        return output


def accept(
    output: ModelRunnerOutput, request_id: str, drafts: Sequence[int], token_ids: list[int], finite: list[bool]
) -> None:
    """Adds a request's token to a step's output, and the drafts before it that equal what was sampled.

    `token_ids` and `finite`: of its next token and after each of its drafts; more may follow.
    """
    if not finite[0]:
        output.failed[request_id] = "the model's logits are not finite, or its grammar allows no token"
        return
    right = 0
    for draft in drafts:
        # one that is not finite is left to the next step, which reports it
        if token_ids[right] != draft or not finite[right + 1]:
            break
        right += 1
    output.sampled[request_id] = token_ids[right]
    if right:
        output.accepted[request_id] = list(drafts[:right])


def merge(output: ModelRunnerOutput, part: ModelRunnerOutput) -> None:
    """Adds what a part of a step gave to the step's output."""
    output.sampled |= part.sampled
    output.accepted |= part.accepted
    output.drafts |= part.drafts
    output.logprobs |= part.logprobs
    output.failed |= part.failed
    for request_id, logprobs in part.prompt_logprobs.items():
        output.prompt_logprobs.setdefault(request_id, []).extend(logprobs)


def split_scored(logits: torch.Tensor, rows: StepRows) -> tuple[torch.Tensor, torch.Tensor]:
    """Splits a step's logits [R, V] into those to sample from and those of scored prompt tokens."""
    count = sum(part.count for part in rows.scored)
    return logits[: len(logits) - count], logits[len(logits) - count :]


def with_scores(output: ModelRunnerOutput, scores: PromptScores) -> ModelRunnerOutput:
    output.prompt_logprobs, failed = scores
    output.failed |= failed
    return output


def sample_states(
    logits: torch.Tensor,
    states: list[RequestState],
    out: SchedulerOutput,
    kernels: SamplingKernels,
    sampled: Callable[[torch.Tensor], None] | None = None,
) -> ModelRunnerOutput:
    """Samples a token for each state, and keeps the drafts that equal the tokens drawn.

    logits float32 [R, V], a row for each state and one more for each of its drafts. `sampled` gets the tokens, int64
    [R], before the host waits for them, and again where they were wrong (sampler.py).

    A token depends on the logits, the seed and its position alone, so the token drawn at a draft's position is the one
    that would have been drawn there anyway: drafts that equal it are kept, and drafts never change an answer.
    """
    first_rows: list[int] = []
    sampling_rows: list[SamplingRow] = []
    for s in states:
        first_rows.append(len(sampling_rows))
        tokens, prompt = s.tokens.view, s.num_prompt_tokens
        known = len(tokens) - len(out.draft_tokens.get(s.request_id, ()))
        sampling_rows += [
            SamplingRow(s.params, tokens[:prompt], tokens[prompt:end]) for end in range(known, len(tokens) + 1)
        ]
    mask_rows, bitmask = _masks(states, first_rows, out, logits.shape[1])
    with torch.inference_mode():
        result = sample(logits, sampling_rows, mask_rows, bitmask, kernels, sampled)
    output = ModelRunnerOutput({}, {}, {})
    for state, row in zip(states, first_rows, strict=True):
        drafts = out.draft_tokens.get(state.request_id, ())
        accept(output, state.request_id, drafts, result.token_ids[row:], result.finite[row:])
        logprobs = result.logprobs[row]
        if logprobs is not None and state.request_id in output.sampled:
            output.logprobs[state.request_id] = logprobs
    return output


def _masks(
    states: list[RequestState], first_rows: list[int], out: SchedulerOutput, vocab_size: int
) -> tuple[list[int], np.ndarray]:
    """Returns the sampled rows that have a mask, and the masks.

    A request's masks are for its first rows, in order.
    """
    bitmask = np.frombuffer(out.grammar_bitmask, np.int32).reshape(-1, -(-vocab_size // 32))
    next_row = {s.request_id: row for s, row in zip(states, first_rows, strict=True)}
    rows, kept = [], []
    for index, request_id in enumerate(out.grammar_rows):
        if request_id in next_row:
            rows.append(next_row[request_id])
            kept.append(index)
            next_row[request_id] += 1
    return rows, bitmask if len(kept) == len(bitmask) else bitmask[kept]


def _plainly_greedy(rows: StepRows, out: SchedulerOutput) -> bool:
    """Whether every row takes its largest unmodified logit: ranks then exchange two values per row."""
    masked = set(out.grammar_rows)
    return not rows.scored and all(
        s.params.temperature == 0
        and s.params.logprobs is None
        and not s.params.needs_penalties
        and not s.params.logit_bias
        and not s.params.min_tokens
        and s.request_id not in masked
        for s in rows.sampled
    )
