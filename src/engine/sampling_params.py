"""How one request wants its tokens sampled."""

from __future__ import annotations

from array import array
from collections.abc import Mapping

import msgspec


class LogitBias(msgspec.Struct, frozen=True, gc=False):
    """What is added to the logits of some tokens. One object for all choices of a request, as it may be a megabyte."""

    token_ids: bytes  # int32 [n], each once
    values: bytes  # float32 [n]

    @classmethod
    def of(cls, bias: Mapping[int, float]) -> LogitBias | None:
        """None: nothing is biased."""
        if not bias:
            return None
        return cls(array("i", bias.keys()).tobytes(), array("f", bias.values()).tobytes())


class LoopGuard(msgspec.Struct, frozen=True):
    """Ends what repeats itself: after `repeats` equal runs of tokens, the first of `break_token_ids` that the grammar
    allows is the only token allowed, if it allows one of them."""

    repeats: int
    break_token_ids: tuple[int, ...]
    max_period: int = 64  # tokens in a run


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Crosses the process line. The order of application is vLLM's: penalties, bias, mask, temperature, top-k, top-p,
    min-p."""

    max_tokens: int
    seed: int  # int64; token number i of the answer depends on (seed, i) and the distribution alone
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: LogitBias | None = None
    logprobs: int | None = None  # alternatives wanted with each token; None: no logprobs at all
    # the same for each token of the prompt but the first, which then takes nothing from the prefix cache
    prompt_logprobs: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    grammar: str | None = None  # Lark, over all generated tokens
    loop_guard: LoopGuard | None = None  # needs a grammar

    @property
    def needs_penalties(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty) or self.repetition_penalty != 1.0
