"""The sampling parameters of one request."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import msgspec


class LogitBias(msgspec.Struct, frozen=True, gc=False):
    """Values added to the logits of tokens.

    All choices of a request share one object, which may take a megabyte.
    """

    token_ids: bytes  # int32 [n], each once
    values: bytes  # float32 [n]

    @classmethod
    def of(cls, bias: Mapping[int, float]) -> LogitBias | None:
        """Packs a mapping of token ids to values; None if it is empty."""
        if not bias:
            return None
        return cls(array("i", bias.keys()).tobytes(), array("f", bias.values()).tobytes())


class LoopGuard(msgspec.Struct, frozen=True):
    """Ends repetition: after `repeats` equal runs of tokens, only one of `break_token_ids` is allowed.

    It is the first one that the grammar allows; if it allows none of them, nothing changes.
    """

    repeats: int
    break_token_ids: tuple[int, ...]
    max_period: int = 64  # tokens in a run


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How to sample. Applied in vLLM's order: penalties, bias, mask, temperature, top-k, top-p, min-p."""

    max_tokens: int
    seed: int  # int64; token i of the answer depends only on (seed, i) and the distribution
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: LogitBias | None = None
    logprobs: int | None = None  # number of alternatives for each token; None: no logprobs
    # the same for each token of the prompt but the first; the prompt then does not use the prefix cache
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    grammar: str | None = None  # Lark, over all generated tokens
    loop_guard: LoopGuard | None = None  # needs a grammar

    @property
    def needs_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0
