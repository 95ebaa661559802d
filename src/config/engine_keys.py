"""The groups of keys that the engine takes as they are: EngineConfig inherits them, ServerConfig too.

One line a key, as in schema.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptoss.config.key import key


@dataclass(frozen=True, kw_only=True)
class DeviceKeys:
    """weights and devices"""

    load_format: Literal["auto", "dummy"] = key("auto", "dummy: random weights, no files")
    weights_cache_dir: Path | None = key(
        None, "folder of weights that were laid out for the CPU kernels; unset: `weights` in the cache folder"
    )
    weights_cache_gib: float = key(
        64.0, "largest total size of weights_cache_dir; 0: weights are laid out in memory, at each start", ge=0
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = key("auto", "type of the weights and the KV cache")
    dense_dtype: Literal["auto", "int8"] = key(
        "auto",
        "type of the attention's and the output head's matrices; auto: as dtype; int8: half the bytes, a small error, "
        "for the native CPU kernels only",
    )
    kv_cache_dtype: Literal["auto", "fp8", "fp8_e4m3"] = key(
        "auto",
        "type of the KV cache; auto: as dtype; fp8 or fp8_e4m3: half the bytes, a small error, on GPUs from sm_89 on",
    )
    lm_head_dtype: Literal["auto", "fp8"] = key(
        "auto",
        "type of the output head's matrix; auto: as dtype; fp8: half the bytes, a small error, on GPUs from sm_89 on",
    )
    gpu_dtypes: dict[str, Literal["bfloat16", "float16", "float32"]] = key(
        {
            "V100": "float16",
            "RTX 3090": "float16",
            "RTX 4090": "bfloat16",
            "A100": "bfloat16",
            "H100": "bfloat16",
            "H200": "bfloat16",
        },
        "what dtype 'auto' means on a GPU whose name contains the key; on other GPUs the compute capability decides",
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N")
    backend: Literal["native", "transformers"] = key(
        "native", "transformers: the slower reference, for hardware that native does not support"
    )
    gpu_mode: Literal["auto", "single", "pipeline", "tensor"] = key(
        "auto", "how the model is split over GPUs; auto: by free memory"
    )
    tensor_parallel_size: int = key(0, "ranks that share each layer; 0: what gpu_mode needs", ge=0, le=64)
    pipeline_parallel_size: int = key(0, "stages of consecutive layers; 0: what gpu_mode needs", ge=0, le=64)
    data_parallel_size: int = key(
        1, "engines, each with the whole model; 0 or auto: as many as fit on the GPUs, one on a CPU", ge=0, le=64
    )
    nnodes: int = key(1, "hosts that share the model; each runs this server with its own node_rank", ge=1, le=64)
    node_rank: int = key(0, "number of this host; host 0 serves requests, the others compute only", ge=0)
    master_addr: str | None = key(None, "address of host 0 for the other hosts, in a private network")
    master_port: int = key(29500, "port of host 0 for the other hosts", ge=1, le=65535)
    node_addr: str | None = key(
        None, "address of this host for the other hosts; unset: the one from which it reaches master_addr"
    )
    enable_expert_parallel: bool = key(False, "tensor-parallel ranks hold whole experts instead of a slice of each")


@dataclass(frozen=True, kw_only=True)
class LoraKeys:
    """LoRA adapters"""

    lora: dict[str, Path] = key({}, "adapters to serve, {name: folder}; as a flag NAME=FOLDER, which may be repeated")
    lora_dir: Path | None = key(
        None, "folder below which POST /v1/load_lora_adapter may load adapters; unset: it is refused"
    )
    max_loras: int = key(8, "adapters loaded at once", ge=1, le=256)
    max_lora_rank: int = key(64, "largest rank of an adapter", ge=1, le=1024)
    max_lora_bytes: int | None = key(
        None,
        "memory for adapters; unset: what lora takes and, with lora_dir, adapters of the attention up to max_loras",
        ge=1,
    )


@dataclass(frozen=True, kw_only=True)
class EngineKeys:
    """engine"""

    max_model_len: int | None = key(None, "prompt and output of one request; unset: the model's maximum", ge=64)
    max_num_seqs: int | None = key(None, "requests in one step", ge=1, le=1024, from_profile=True)
    max_num_batched_tokens: int | None = key(None, "tokens in one step", ge=1, from_profile=True)
    max_num_waiting: int | None = key(None, "requests that may wait", ge=0, from_profile=True)
    max_num_waiting_tokens: int = key(1_000_000, "prompt tokens that may wait", ge=1)
    batch_invariant: bool | None = key(None, "produce the same tokens alone and under load", from_profile=True)
    num_speculative_tokens: int = key(
        -1, "draft tokens checked in one step; 0: none; -1: 3, none in a pipeline", ge=-1, le=16
    )
    speculative_model: Path | None = key(
        None, "folder of an EAGLE-3 draft head for this model, which guesses tokens; unset: none"
    )
    enforce_eager: bool = key(False, "GPU: run all steps without CUDA graphs")
    block_size: int = key(64, "tokens in a KV block, a power of two", ge=1)
    enable_prefix_caching: bool = key(True, "reuse the KV cache of equal prompt prefixes")
    gpu_memory_utilization: float = key(0.9, "fraction of each GPU's memory to use", gt=0, le=1)
    cpu_kv_cache_gib: float = key(1.0, "size of the KV cache on a CPU, of each engine", gt=0)
    num_threads: int = key(0, "compute threads of each rank on a CPU; 0: its share of the physical cores", ge=0)
    cpu_isa: Literal["auto", "avx2", "avx512"] = key("auto", "instruction set of the CPU kernels; auto: the best")
    priority_ageing_s: float = key(5.0, "waiting time worth one priority step", gt=0)
    engine_step_timeout_s: float = key(300.0, "restart the engine after this long without a step or a heartbeat", gt=0)
    engine_heartbeat_timeout_s: float = key(10.0, "answer /ready with 503 after this long without a heartbeat", gt=1)
    idle_keep_warm_s: float = key(
        0.0, "run a step of one token this often while idle, so that caches and clocks stay warm; 0: never", ge=0
    )
    max_engine_restarts: int = key(5, "consecutive restarts of an engine before the server gives it up", ge=0)
    max_request_resumes: int = key(
        0, "times that a request continues in another or a restarted engine; 0: it ends with an error", ge=0
    )
    seed: int = key(0, "seed of random weights")
