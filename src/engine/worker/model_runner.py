"""Runs the model for a scheduled step, and samples."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import ModelRunnerOutput, SchedulerOutput
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import split
from gptoss.engine.worker.batch import RequestState, RequestTable, SlotsOf, StepRows, build_batch
from gptoss.engine.worker.cuda_graphs import GraphRunner, PrelaunchedStep, all_decode
from gptoss.engine.worker.draft_runner import DraftRunner
from gptoss.engine.worker.sampling.prompt_logprobs import PromptScores, score_prompts
from gptoss.engine.worker.sampling.sampler import sample
from gptoss.engine.worker.sampling.sampling_row import SamplingRow
from gptoss.kernels.backend import KernelBackend, SamplingKernels, choose_sampling
from gptoss.kernels.device_copy import to_device
from gptoss.kernels.layers import LayerCache

logger = logging.getLogger(__name__)


class ModelRunner:
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
        """`graphs` replays steps in which each request decodes one token.

        `slots_of`: the LoRA slots of adapters. `draft_runner` guesses tokens after each step; not with `graphs`.
        """
        self._slots_of = slots_of
        self._draft_runner = draft_runner
        self._states: list[torch.Tensor] | None = None  # of the step, for the draft head
        self._graphs = graphs
        self._prelaunched: PrelaunchedStep | None = None
        self._config = config
        self._model = model
        self._cache = cache
        self._kernels = kernels
        self._sampling = choose_sampling(kernels.device)
        self._comm = comm
        self._vocab_sizes = [len(part) for part in split(config.model.vocab_size, comm.shard.tensor_size)]
        self._table = RequestTable()
        self._one_by_one = config.batch_invariant and not kernels.is_batch_invariant

    def execute_model(self, out: SchedulerOutput, sampled: dict[str, int]) -> ModelRunnerOutput | None:
        """Runs one step; returns None on a rank that does not sample.

        A request whose logits are not finite, or that fails alone, is reported in `failed`; if all requests fail, the
        exception propagates. `sampled`: tokens of earlier steps that this rank has not seen (with several ranks, all).
        """
        self._table.extend(sampled)
        rows = self._table.apply(out)
        if not rows.states:
            return ModelRunnerOutput({}, {})
        try:
            result = self._run_invariant(rows, out) if self._one_by_one else self._run(rows, out)
        except (RuntimeError, MemoryError, IndexError, ValueError) as error:
            if len(rows.states) == 1 or self._comm.world_size > 1:
                raise  # the other ranks wait in a collective operation: only a restart realigns them
            logger.exception("step failed for %d requests together, trying each alone", len(rows.states))
            result = self._run_one_by_one(rows, out, error)
        alone = self._comm.world_size == 1
        self._table.finish_step(rows, result.sampled if alone else {}, result.accepted)
        return result if self._samples else None

    @property
    def prelaunches_steps(self) -> bool:
        """Whether a request's next token is computed before it is scheduled."""
        return self._graphs is not None

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
                merged.sampled |= result.sampled
                merged.logprobs |= result.logprobs
                merged.failed |= result.failed
                for request_id, scores in result.prompt_logprobs.items():
                    merged.prompt_logprobs.setdefault(request_id, []).extend(scores)
            state.num_computed_tokens = start
        return merged

    def _run_one_by_one(self, rows: StepRows, out: SchedulerOutput, cause: Exception) -> ModelRunnerOutput:
        """Runs each request alone, after a step of all failed.

        A step can be repeated: it writes the same keys and values to the same slots.
        """
        merged = ModelRunnerOutput({}, {}, {})
        for index, state in enumerate(rows.states):
            try:
                result = self._run(rows.alone(index), out)
            except (RuntimeError, MemoryError, IndexError, ValueError) as error:
                merged.failed[state.request_id] = f"{type(error).__name__}: {error}"
                continue
            merged.sampled |= result.sampled
            merged.accepted |= result.accepted
            merged.drafts |= result.drafts
            merged.logprobs |= result.logprobs
            merged.failed |= result.failed
            merged.prompt_logprobs |= result.prompt_logprobs
        if len(merged.failed) == len(rows.states):
            raise cause
        return merged

    def _run(self, rows: StepRows, out: SchedulerOutput) -> ModelRunnerOutput:
        rows.sampled.clear()
        rows.scored.clear()
        if self._graphs is not None:
            return self._run_graphed(self._graphs, rows, out)
        if self._draft_runner is None:
            return self._run_batch(rows, out)
        self._states = []
        output = self._run_batch(rows, out)
        output.drafts = self._draft_runner.run(rows, self._states, output, out.draft_limits)
        return output

    def _run_graphed(self, graphs: GraphRunner, rows: StepRows, out: SchedulerOutput) -> ModelRunnerOutput:
        """Takes the rows that were computed ahead, computes the others, samples all and starts the next step."""
        prelaunched, self._prelaunched = self._prelaunched, None
        ready: list[tuple[RequestState, int]] = []  # and the row of its logits
        rest = StepRows([], [])
        for state, count in zip(rows.states, rows.counts, strict=True):
            row = None if prelaunched is None else prelaunched.row_of(state, count)
            if row is not None:
                ready.append((state, row))
            else:
                rest.states.append(state)
                rest.counts.append(count)
        parts: list[torch.Tensor] = []
        scores: PromptScores = {}, {}
        if prelaunched is not None and ready:
            logits = self._rows_of(prelaunched.logits, [row for _, row in ready])
            parts.append(logits.clone() if rest.states else logits)  # computing the rest may overwrite them
        if graphs.holds(len(rest.states)) and rest.states and all_decode(rest.states, rest.counts):
            parts.append(graphs.run(rest.states))
            rest.sampled.extend(rest.states)
        elif rest.states:
            logits, of_prompts = split_scored(self._forward(rest), rest)
            scores = score_prompts(of_prompts, rest.scored)
            parts.extend([logits] if rest.sampled else [])
        rows.sampled.extend([*(s for s, _ in ready), *rest.sampled])
        if not parts:
            return with_scores(ModelRunnerOutput({}, {}, {}), scores)
        states = rows.sampled

        def start_next(token_ids: torch.Tensor) -> None:
            self._prelaunched = graphs.prelaunch(states, token_ids)

        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        return with_scores(sample_states(logits, states, out, self._sampling, start_next), scores)

    def _rows_of(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        if rows == list(range(len(rows))):
            return logits[: len(rows)]
        return logits[to_device(rows, torch.int64, self._kernels.device)]

    def _forward(self, rows: StepRows) -> torch.Tensor:
        batch = build_batch(rows, self._kernels, self._config.block_size, self._slots_of)
        return self._model.forward(batch, self._cache)

    def _run_batch(self, rows: StepRows, out: SchedulerOutput) -> ModelRunnerOutput:
        batch = build_batch(rows, self._kernels, self._config.block_size, self._slots_of)
        shard, hidden = self._comm.shard, None
        if not shard.is_first:
            size, dtype = self._config.model.hidden_size, self._model.residual_dtype
            hidden = self._comm.receive_hidden(len(batch.token_ids), size, dtype)
        taps = {} if self._states is None else {"states": self._states}
        result_or_hidden = self._model.forward(batch, self._cache, hidden, **taps)
        if not shard.is_last:
            self._comm.send_hidden(result_or_hidden)
        if not shard.is_last or not (rows.sampled or rows.scored):
            return ModelRunnerOutput({}, {})
        return self._sample(result_or_hidden, rows, out)

    def _sample(self, logits: torch.Tensor, rows: StepRows, out: SchedulerOutput) -> ModelRunnerOutput:
        """`logits` float32 [R, V], or this rank's part of V."""
        if self._comm.shard.tensor_size > 1:
            if _plainly_greedy(rows, out):
                return self._sample_best(logits, rows)
            whole = self._comm.gather_logits(logits, self._vocab_sizes)
            if whole is None:
                return ModelRunnerOutput({}, {})
            logits = whole
        logits, of_prompts = split_scored(logits, rows)
        scores = score_prompts(of_prompts, rows.scored)
        if not rows.sampled:
            return with_scores(ModelRunnerOutput({}, {}, {}), scores)
        return with_scores(sample_states(logits, rows.sampled, out, self._sampling), scores)

    def _sample_best(self, logits: torch.Tensor, rows: StepRows) -> ModelRunnerOutput:
        best = self._comm.gather_best(logits, self._comm.shard.vocab.start)
        output = ModelRunnerOutput({}, {}, {})
        if best is None:
            return output
        for state, token, finite in zip(rows.sampled, best[0].tolist(), torch.isfinite(best[1]).tolist(), strict=True):
            if finite:
                output.sampled[state.request_id] = token
            else:
                output.failed[state.request_id] = "the model's logits are not finite"
        return output


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
        if not result.finite[row]:
            output.failed[state.request_id] = "the model's logits are not finite, or its grammar allows no token"
            continue
        right = 0
        drafts = out.draft_tokens.get(state.request_id, ())
        for draft in drafts:
            # one that is not finite is left to the next step, which reports it
            if result.token_ids[row + right] != draft or not result.finite[row + right + 1]:
                break
            right += 1
        output.sampled[state.request_id] = result.token_ids[row + right]
        if right:
            output.accepted[state.request_id] = list(drafts[:right])
        logprobs = result.logprobs[row]
        if logprobs is not None:
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
