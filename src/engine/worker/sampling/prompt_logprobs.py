"""Logprobs of prompt tokens, which evaluations of a model need."""

from __future__ import annotations

import math

import torch

from gptoss.engine.messages import TokenLogprobs
from gptoss.engine.worker.batch import ScoredTokens
from gptoss.engine.worker.sampling.sampler import floored
from gptoss.kernels.device_copy import to_device

# request id -> logprobs of tokens of its prompt, request id -> why it has none
PromptScores = tuple[dict[str, list[TokenLogprobs]], dict[str, str]]


def score_prompts(logits: torch.Tensor, scored: list[ScoredTokens]) -> PromptScores:
    """The logprobs of the tokens that follow these, from logits float32 [N, V] in their order."""
    found: dict[str, list[TokenLogprobs]] = {}
    failed: dict[str, str] = {}
    row = 0
    for part in scored:
        state, tokens = part.state, part.state.tokens.view
        logprobs = torch.log_softmax(logits[row : row + part.count], dim=-1)
        row += part.count
        following = tokens[part.first + 1 : part.first + 1 + part.count]
        index = to_device(following, torch.int64, logits.device).unsqueeze(1)
        best = torch.topk(logprobs, state.params.prompt_logprobs or 0)
        numbers = zip(
            logprobs.gather(1, index)[:, 0].tolist(), best.values.tolist(), best.indices.tolist(), strict=True
        )
        scores = [floored(*entry) for entry in numbers]
        if any(math.isnan(score.logprob) for score in scores):
            failed[state.request_id] = "the model's logits are not finite"
        else:
            found[state.request_id] = scores
    return found, failed
