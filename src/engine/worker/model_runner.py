"""Runs the model for what the scheduler asks, and samples."""

from __future__ import annotations

import logging

import numpy as np
import torch

from src.engine.config import EngineConfig
from src.engine.messages import ModelRunnerOutput, SchedulerOutput
from src.engine.model.gpt_oss import GptOss, LayerCache
from src.engine.worker.batch import RequestTable, StepRows, build_batch
from src.engine.worker.sampler import SamplingRow, sample
from src.kernels import native

logger = logging.getLogger(__name__)


class ModelRunner:
    def __init__(
        self,
        config: EngineConfig,
        model: GptOss,
        cache: list[LayerCache],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._config = config
        self._model = model
        self._cache = cache
        self._dtype = dtype
        self._device = device
        self._table = RequestTable()
        # the native kernels give each row the same result in any batch; torch does not
        self._one_by_one = config.batch_invariant and not native.supports(
            torch.empty(0, dtype=dtype, device=device)
        )
        self._mask_words = -(-config.model.vocab_size // 32)

    def execute_model(self, out: SchedulerOutput) -> ModelRunnerOutput:
        """One step. A request whose own numbers are bad, or that fails where the rest of the batch does not, is
        reported in `failed`; if nothing can be told apart the exception goes on."""
        rows = self._table.apply(out)
        if not rows.states:
            return ModelRunnerOutput({}, {})
        try:
            result = self._run_invariant(rows, out) if self._one_by_one else self._run(rows, out)
        except (RuntimeError, MemoryError, IndexError, ValueError) as error:
            if len(rows.states) == 1:
                raise
            logger.exception(
                "step failed for %d requests together, trying each alone", len(rows.states)
            )
            result = self._run_one_by_one(rows, out, error)
        self._table.finish_step(rows, result.sampled)
        return result

    def _run_invariant(self, rows: StepRows, out: SchedulerOutput) -> ModelRunnerOutput:
        """Every token through the model by itself: torch's matrix products round differently for other shapes."""
        merged = ModelRunnerOutput({}, {}, {})
        for state, count in zip(rows.states, rows.counts, strict=True):
            start = state.num_computed_tokens
            for offset in range(count):
                state.num_computed_tokens = start + offset
                result = self._run(StepRows([state], [1]), out)
                merged.sampled |= result.sampled
                merged.logprobs |= result.logprobs
                merged.failed |= result.failed
            state.num_computed_tokens = start
        return merged

    def _run_one_by_one(
        self, rows: StepRows, out: SchedulerOutput, cause: Exception
    ) -> ModelRunnerOutput:
        """Safe to repeat: a step writes the same keys and values to the same places each time."""
        merged = ModelRunnerOutput({}, {}, {})
        for state, count in zip(rows.states, rows.counts, strict=True):
            try:
                result = self._run(StepRows([state], [count]), out)
            except (RuntimeError, MemoryError, IndexError, ValueError) as error:
                merged.failed[state.request_id] = f"{type(error).__name__}: {error}"
                continue
            merged.sampled |= result.sampled
            merged.logprobs |= result.logprobs
            merged.failed |= result.failed
        if len(merged.failed) == len(rows.states):
            raise cause
        return merged

    def _run(self, rows: StepRows, out: SchedulerOutput) -> ModelRunnerOutput:
        rows.sampled.clear()
        window = self._config.model.sliding_window
        batch = build_batch(rows, self._config.block_size, window, self._dtype, self._device)
        logits = self._model.forward(batch, self._cache)
        if not rows.sampled:
            return ModelRunnerOutput({}, {})
        mask_rows, bitmask = self._masks(rows, out)
        sampling_rows = [
            SamplingRow(
                s.params, s.tokens.view[: s.num_prompt_tokens], s.tokens.view[s.num_prompt_tokens :]
            )
            for s in rows.sampled
        ]
        with torch.inference_mode():
            result = sample(logits, sampling_rows, mask_rows, bitmask)
        output = ModelRunnerOutput({}, {}, {})
        for state, token, logprobs, finite in zip(
            rows.sampled, result.token_ids, result.logprobs, result.finite, strict=True
        ):
            if not finite:
                output.failed[state.request_id] = (
                    "the model's logits are not finite, or its grammar allows no token"
                )
                continue
            output.sampled[state.request_id] = token
            if logprobs is not None:
                output.logprobs[state.request_id] = logprobs
        return output

    def _masks(self, rows: StepRows, out: SchedulerOutput) -> tuple[list[int], np.ndarray]:
        bitmask = np.frombuffer(out.grammar_bitmask, np.int32).reshape(-1, self._mask_words)
        row_of = {state.request_id: i for i, state in enumerate(rows.sampled)}
        kept = [
            (row_of[request_id], i)
            for i, request_id in enumerate(out.grammar_rows)
            if request_id in row_of
        ]
        return [row for row, _ in kept], bitmask[[i for _, i in kept]]
