"""Chooses the devices for the model: applies the memory plan to the memory that is free now."""

from __future__ import annotations

import dataclasses
import logging

import psutil

from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.parallel.gpus import visible_gpus
from gptoss.engine.parallel.memory_plan import GB, RUNTIME_BYTES, MemoryPlan, choose_plan, make_plan

logger = logging.getLogger(__name__)


def choose_devices(config: EngineConfig) -> EngineConfig:
    """Returns the configuration with both parallel sizes chosen, and logs the plan.

    On a CPU the ranks are processes that share the machine's memory; there is more than one only if a size is set.

    Raises:
        ConfigError: the model does not fit, or cannot be cut as asked.
    """
    sizes = max(config.tensor_parallel_size, config.pipeline_parallel_size)
    if config.backend == "transformers":
        if config.gpu_mode in ("tensor", "pipeline") or sizes > 1:
            raise ConfigError(
                "backend 'transformers' places the model itself (device_map auto): drop gpu_mode, "
                "tensor_parallel_size and pipeline_parallel_size"
            )
        return dataclasses.replace(
            config, tensor_parallel_size=1, pipeline_parallel_size=1, enable_prefix_caching=False
        )
    element = 4 if config.dtype == "float32" else 2
    gpus = visible_gpus() if config.device == "auto" or config.device.startswith("cuda") else []
    if config.device.startswith("cuda:"):
        gpus = gpus[int(config.device.partition(":")[2]) :][:1]
    if gpus:
        free, total = [gpu.free_bytes for gpu in gpus], [gpu.total_bytes for gpu in gpus]
        plan = choose_plan(config, free, total, element=element)
    else:
        plan = _cpu_plan(config, element)
    for line in plan.lines():
        logger.info("memory plan: %s", line)
    return dataclasses.replace(
        config, tensor_parallel_size=plan.tensor_size, pipeline_parallel_size=len(plan.stage_layers)
    )


def _cpu_plan(config: EngineConfig, element: int) -> MemoryPlan:
    for mode, key in (("tensor", "tensor_parallel_size"), ("pipeline", "pipeline_parallel_size")):
        if config.gpu_mode == mode and not getattr(config, key):
            raise ConfigError(f"gpu_mode {mode!r} on a CPU needs {key}: there are no GPUs to count")
    tensor, stages = max(1, config.tensor_parallel_size), max(1, config.pipeline_parallel_size)
    available = psutil.virtual_memory().available
    kv = int(config.cpu_kv_cache_gib * 2**30)
    share = max(0, available - kv) // (tensor * stages)
    shares = [share] * (tensor * stages)
    relaxed = dataclasses.replace(config, gpu_memory_utilization=1.0)
    plan = make_plan(relaxed, shares, shares, tensor_size=tensor, stages=stages, element=element)
    needed = sum(rank.weight_bytes + rank.activation_bytes for rank in plan.ranks)
    if needed + kv > available:
        raise ConfigError(
            f"the model does not fit: {needed / GB:.1f} GB of weights and activations and {kv / GB:.1f} GB of KV cache "
            f"(cpu_kv_cache_gib), {available / GB:.1f} GB of memory are available"
        )
    ranks = [
        dataclasses.replace(
            rank, usable_bytes=RUNTIME_BYTES + rank.weight_bytes + rank.activation_bytes + kv // len(plan.ranks)
        )
        for rank in plan.ranks
    ]
    return dataclasses.replace(plan, ranks=tuple(ranks))
