"""What the engine is told once, at start. Frozen; facts that only the device knows (free memory) are not here."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gptoss.config.errors import ConfigError
from gptoss.engine.model.model_config import ModelConfig

SCORED_ROWS = 64  # prompt tokens of a step whose logits are wanted: each row has 0.8 MB
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "dummy"]
GpuMode = Literal["auto", "single", "pipeline", "tensor"]
Backend = Literal["native", "transformers"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Limits are named as in vLLM. Counts are tokens unless the name says otherwise."""

    model: ModelConfig
    model_path: Path | None  # None only with load_format "dummy"
    load_format: LoadFormat = "auto"
    dtype: Dtype = "auto"
    device: str = "auto"
    # part of a GPU's name -> the type that dtype "auto" takes there, before the rule by capability
    gpu_dtypes: dict[str, str] = field(default_factory=dict)
    backend: Backend = "native"
    gpu_mode: GpuMode = "auto"
    tensor_parallel_size: int = 0  # ranks; 0: as gpu_mode needs
    pipeline_parallel_size: int = 0  # stages; 0: as gpu_mode needs
    enable_expert_parallel: bool = False
    max_model_len: int = 131_072
    max_num_seqs: int = 32
    max_num_batched_tokens: int = 2_048
    max_num_waiting: int = 256  # requests
    max_num_waiting_tokens: int = 1_000_000
    block_size: int = 64
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9
    cpu_kv_cache_gib: float = 1.0
    num_threads: int = 0  # 0: one for each physical core but never more than the process may use
    cpu_isa: str = "auto"  # instruction set of the CPU kernels: auto, avx2 or avx512
    num_speculative_tokens: int = -1  # guesses in a step; -1: 3 where the CPU kernels run, else none
    batch_invariant: bool = False
    enforce_eager: bool = False  # no CUDA graphs
    priority_ageing_s: float = 5.0  # a request waiting this long has caught up with one a priority step ahead
    seed: int = 0
    ranks_path: Path | None = None  # vocabulary in tiktoken form; needed for grammars only
    special_tokens: dict[str, int] = field(default_factory=dict)
    split_pattern: str = ""
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens ({self.max_num_batched_tokens}) is below max_num_seqs ({self.max_num_seqs}): "
                "a step could not hold one token of each running request; raise it, or lower max_num_seqs"
            )
        if self.max_model_len > self.model.max_position:
            raise ConfigError(
                f"max_model_len ({self.max_model_len}) is beyond the model's {self.model.max_position} positions"
            )
        if self.gpu_mode == "single" and max(self.tensor_parallel_size, self.pipeline_parallel_size) > 1:
            raise ConfigError(
                f"gpu_mode 'single' contradicts tensor_parallel_size ({self.tensor_parallel_size}) and "
                f"pipeline_parallel_size ({self.pipeline_parallel_size}); drop one of them"
            )
        if self.gpu_mode == "tensor" and self.tensor_parallel_size == 1:
            raise ConfigError("gpu_mode 'tensor' contradicts tensor_parallel_size (1); drop one of them")
        if self.gpu_mode == "pipeline" and self.pipeline_parallel_size == 1:
            raise ConfigError("gpu_mode 'pipeline' contradicts pipeline_parallel_size (1); drop one of them")
        if self.num_speculative_tokens < -1:
            raise ConfigError(
                f"num_speculative_tokens ({self.num_speculative_tokens}) must be a count, 0 for none, or -1 for "
                "what suits the machine"
            )
        if self.block_size < 1 or self.block_size & (self.block_size - 1):
            raise ConfigError(f"block_size ({self.block_size}) must be a power of two")
