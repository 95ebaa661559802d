"""One request inside the engine."""

from __future__ import annotations

import enum
import time
from dataclasses import dataclass, field

from gptoss.engine.messages import FinishReason
from gptoss.engine.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    WAITING = enum.auto()
    RUNNING = enum.auto()
    PREEMPTED = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Request:
    """One request.

    `token_ids` are its prompt and all sampled tokens; `num_computed_tokens` of them are in the cache.
    """

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0  # lower runs sooner
    arrival: float = field(default_factory=time.monotonic)
    deadline: float | None = None  # monotonic seconds; past it the request ends with an error
    cache_salt: str = ""
    tenant: str = ""  # whose share of the engine it takes
    adapter: int = 0  # id of its LoRA adapter; 0: none
    adapter_key: str = ""  # of the adapter, in the hashes of its blocks
    background: bool = False  # runs only while no other request runs or waits
    num_prompt_tokens: int = field(init=False)
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt, found in the prefix cache at first admission
    num_scored_tokens: int = 0  # prompt tokens whose successor's logprobs were sent
    num_preemptions: int = 0
    status: RequestStatus = RequestStatus.WAITING
    first_scheduled: float | None = None  # monotonic seconds
    block_hashes: list[bytes] = field(default_factory=list)  # of the full blocks of token_ids

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    def finish_reason_at(self, token_id: int, max_model_len: int) -> FinishReason | None:
        """Why the request ends with `token_id`, its last token; None if it continues."""
        params = self.params
        if (
            token_id in params.stop_token_ids
            and not params.ignore_eos
            # the sampler allows an earlier stop token if the grammar allows nothing else
            and (self.num_output_tokens >= params.min_tokens or params.grammar is not None)
        ):
            return FinishReason.STOP
        if self.num_output_tokens >= params.max_tokens or self.num_tokens >= max_model_len:
            return FinishReason.LENGTH
        return None

    @property
    def num_unscored_tokens(self) -> int:
        """Uncomputed prompt tokens whose successor's logprobs were requested."""
        if self.params.prompt_logprobs is None:
            return 0
        return max(0, self.num_prompt_tokens - 1 - self.num_computed_tokens)

    @property
    def num_new_tokens(self) -> int:
        """Known tokens that are not computed yet: one when decoding, more in prefill."""
        return len(self.token_ids) - self.num_computed_tokens
