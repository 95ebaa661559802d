"""What crosses a boundary: API process <-> engine process, scheduler <-> workers. msgspec-encoded, no behaviour."""

from __future__ import annotations

import enum

import msgspec

from gptoss.engine.sampling_params import LogitBias, SamplingParams


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


# --- API process -> engine process ---


class AddRequest(msgspec.Struct, tag="add"):
    request_id: str
    token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    timeout_s: float | None = None  # from arrival; past it the request ends with an error
    cache_salt: str = ""
    tenant: str = ""  # requests of different tenants are scheduled in equal shares
    output_ids: list[int] = []  # what an engine that died had written already
    num_scored_tokens: int = 0  # of the prompt: what it had told already


class AddRequests(msgspec.Struct, tag="add_all"):
    """Requests with the same logit_bias, which stands here instead of in each of them."""

    requests: list[AddRequest]
    logit_bias: LogitBias


class AbortRequests(msgspec.Struct, tag="abort"):
    request_ids: list[str]


class Shutdown(msgspec.Struct, tag="shutdown"):
    pass


ToEngine = AddRequest | AddRequests | AbortRequests | Shutdown

# --- engine process -> API process ---


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Of the model's raw distribution, before temperature and penalties."""

    logprob: float
    alternatives: list[tuple[int, float]]  # (token id, logprob), most likely first


class TokenOutput(msgspec.Struct, array_like=True):
    """What one step added to one request. Exactly one output of a request has a finish_reason, its last."""

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids, if asked for
    num_cached_tokens: int = 0
    error: str | None = None  # with FinishReason.ERROR
    queue_s: float | None = None  # with the first token: from arrival to first scheduled
    prefill_s: float | None = None  # with the first token: from first scheduled to now
    # of the prompt's next tokens, if asked for: its first has none, its last come with the answer's first token
    prompt_logprobs: list[TokenLogprobs] | None = None


class EngineStats(msgspec.Struct):
    """The engine at one moment. `num_*_total` count from the start of this engine process."""

    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    kv_usage: float = 0.0  # 0..1
    num_free_blocks: int = 0
    num_blocks: int = 0
    num_preemptions_total: int = 0
    num_steps_total: int = 0
    num_prefix_queried_total: int = 0  # tokens
    num_prefix_hit_total: int = 0  # tokens
    num_draft_total: int = 0  # tokens guessed
    num_accepted_total: int = 0  # of these, tokens that were right
    step_s_total: float = 0.0
    last_step_s: float = 0.0
    last_step_tokens: int = 0
    last_step_seqs: int = 0


class Outputs(msgspec.Struct, tag="outputs"):
    outputs: list[TokenOutput]
    stats: EngineStats


class RankReport(msgspec.Struct):
    """One rank's part. Layers are first and last; bytes are of this rank."""

    rank: int
    device: str
    layers: tuple[int, int]
    num_heads: int
    num_experts: int
    weight_bytes: int
    kv_cache_bytes: int
    pid: int


class Ready(msgspec.Struct, tag="ready"):
    """The engine has passed its self-test. What really runs, not what was asked for."""

    dtype: str
    device: str
    num_blocks: int
    kv_cache_bytes: int
    weight_bytes: int
    max_model_len: int
    kernel_path: str
    load_s: float
    pid: int
    gpu_mode: str = "cpu"  # single, pipeline, tensor, tensor+pipeline; "cpu" alone on a CPU
    ranks: list[RankReport] = []


class Failed(msgspec.Struct, tag="failed"):
    """The engine cannot start, or has just died of an exception."""

    message: str
    fatal: bool  # a restart would fail the same way


class Heartbeat(msgspec.Struct, tag="heartbeat"):
    """The engine process runs, whether or not it has work."""


FromEngine = Outputs | Ready | Failed | Heartbeat

# --- scheduler -> workers, each step ---

PROBE_ID = "self-test"  # the request id of the self-test


class NewRequest(msgspec.Struct):
    """A request that the workers do not know, or no longer know after a preemption."""

    request_id: str
    token_ids: list[int]  # all known tokens
    num_prompt_tokens: int
    params: SamplingParams
    block_ids: tuple[list[int], list[int]]  # by group: full, sliding
    num_computed_tokens: int


class SchedulerOutput(msgspec.Struct):
    new_requests: list[NewRequest]
    new_block_ids: dict[str, tuple[list[int], list[int]]]  # known request -> blocks added, by group
    num_scheduled_tokens: dict[str, int]  # request -> tokens to compute now; sampled when that catches up
    finished_or_preempted_ids: list[str]  # finished, aborted or preempted since the last step
    # request -> guesses at its next tokens, computed and sampled with the step; counted in num_scheduled_tokens
    draft_tokens: dict[str, list[int]] = {}
    # the requests of the rows of `grammar_bitmask`; one with drafts has a row for each place, in order
    grammar_rows: list[str] = []
    # int32 [rows, ceil(V / 32)]: bit set, token allowed
    grammar_bitmask: memoryview = memoryview(b"")

    @property
    def total_tokens(self) -> int:
        return sum(self.num_scheduled_tokens.values())


class Step(msgspec.Struct, tag="step"):
    """To every rank. `sampled`: tokens that came out since the last step: the rank that sampled is not the others."""

    out: SchedulerOutput
    sampled: dict[str, int]


# --- workers -> scheduler, each step ---


class ModelRunnerOutput(msgspec.Struct):
    # request -> token id, for the requests that caught up; of one with right drafts the token behind these
    sampled: dict[str, int]
    logprobs: dict[str, TokenLogprobs]
    failed: dict[str, str] = {}  # request -> why it alone cannot go on (its logits are not finite, say)
    accepted: dict[str, list[int]] = {}  # request -> its drafts that are what was sampled there
    # request -> of the prompt tokens that follow those computed in this step, if asked for
    prompt_logprobs: dict[str, list[TokenLogprobs]] = {}
