"""What the engine is told once, at start. Frozen; facts that only the device knows (free memory) are not here."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

SLIDING, FULL = "sliding_attention", "full_attention"
SCORED_ROWS = 64  # prompt tokens of a step whose logits are wanted: each row has 0.8 MB

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
LoadFormat = Literal["auto", "dummy"]
GpuMode = Literal["auto", "single", "pipeline", "tensor"]
Backend = Literal["native", "transformers"]


class ConfigError(ValueError):
    """A configuration that cannot work. The message names the key and the fix."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a gpt-oss model, from its config.json."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    experts_per_token: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int
    layer_types: tuple[str, ...]
    max_position: int
    rope_theta: float
    rope_factor: float
    rope_beta_fast: float
    rope_beta_slow: float
    rope_original_max_position: int
    rms_norm_eps: float
    swiglu_limit: float
    quantized: bool  # experts in MXFP4

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> ModelConfig:
        """Reads the config.json of both layouts: Hugging Face's, and `original/`, which states fewer keys.

        Raises:
            ConfigError: a key is missing, or the model is not a gpt-oss.
        """
        if "experts_per_token" in config and "num_experts" in config and "model_type" not in config:
            config = _from_original(config)
        if config.get("model_type") != "gpt_oss":
            raise ConfigError(f"model_type is {config.get('model_type')!r}, this server runs only 'gpt_oss'")
        try:
            return _from_hf(config)
        except KeyError as error:
            raise ConfigError(f"config.json lacks {error}") from error

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        path = folder / "config.json"
        try:
            return cls.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing") from None
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path} is no JSON: {error}") from error


def _from_hf(c: dict[str, Any]) -> ModelConfig:
    # transformers 5 writes rope_parameters, earlier releases rope_theta and rope_scaling
    rope = c.get("rope_parameters") or {"rope_theta": c["rope_theta"], **(c.get("rope_scaling") or {})}
    if rope.get("rope_type", "default") not in ("yarn", "default"):
        raise ConfigError(f"rope_type {rope['rope_type']!r} is not supported; gpt-oss uses 'yarn'")
    num_layers = c["num_hidden_layers"]
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_experts=c["num_local_experts"],
        experts_per_token=c["num_experts_per_tok"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_key_value_heads"],
        head_dim=c["head_dim"],
        vocab_size=c["vocab_size"],
        sliding_window=c["sliding_window"],
        layer_types=tuple(c.get("layer_types") or ((SLIDING, FULL) * num_layers)[:num_layers]),
        max_position=c["max_position_embeddings"],
        rope_theta=float(rope["rope_theta"]),
        rope_factor=float(rope.get("factor", 1.0)),
        rope_beta_fast=float(rope.get("beta_fast", 32.0)),
        rope_beta_slow=float(rope.get("beta_slow", 1.0)),
        rope_original_max_position=int(rope.get("original_max_position_embeddings", 4096)),
        rms_norm_eps=float(c.get("rms_norm_eps", 1e-5)),
        swiglu_limit=float(c.get("swiglu_limit", 7.0)),
        quantized=bool(c.get("quantization_config")),
    )


def _from_original(c: dict[str, Any]) -> dict[str, Any]:
    return {
        "model_type": "gpt_oss",
        "num_hidden_layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "intermediate_size": c["intermediate_size"],
        "num_local_experts": c["num_experts"],
        "num_experts_per_tok": c["experts_per_token"],
        "num_attention_heads": c["num_attention_heads"],
        "num_key_value_heads": c["num_key_value_heads"],
        "head_dim": c["head_dim"],
        "vocab_size": c["vocab_size"],
        "sliding_window": c["sliding_window"],
        "max_position_embeddings": int(c["initial_context_length"] * c["rope_scaling_factor"]),
        "swiglu_limit": c.get("swiglu_limit", 7.0),
        "rope_theta": c["rope_theta"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": c["rope_scaling_factor"],
            "beta_fast": c["rope_ntk_beta"],
            "beta_slow": c["rope_ntk_alpha"],
            "original_max_position_embeddings": c["initial_context_length"],
        },
        "quantization_config": {"quant_method": "mxfp4"},
    }


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
