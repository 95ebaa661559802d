"""Chooses the devices of the engines and of the model, by the memory that is free now."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence

import psutil

from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.parallel.gpus import Gpu, visible_gpus
from gptoss.engine.parallel.memory_plan import GB, RUNTIME_BYTES, MemoryPlan, choose_plan, make_plan

logger = logging.getLogger(__name__)
FP8_CAPABILITY = (8, 9)  # as in kernels/triton/support.py, which loads torch


def usable_cores() -> int:
    """The number of physical cores that this process may use."""
    return min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1)


def place_engines(config: EngineConfig) -> list[EngineConfig]:
    """Returns the configuration of each engine: its GPUs, or its share of the cores.

    Raises:
        ConfigError: there are too few GPUs, too little memory on a CPU, or FP8 on a device that does not have it.
    """
    count, gpus = config.data_parallel_size, _gpus(config)
    _check_fp8(config, gpus)
    if count == 1 or (count == 0 and not gpus):
        return [config]
    if not gpus:
        return _on_cpu(config, count)
    if config.device.startswith("cuda:"):
        if count == 0:
            return [config]
        raise ConfigError(
            f"device {config.device!r} is one device: data_parallel_size ({count}) needs device 'cuda' or 'auto'"
        )
    groups = _groups_that_fit(config, gpus) if count == 0 else _equal_groups(config, len(gpus))
    logger.info("engines on GPUs: %s", ", ".join(map(_shown, groups)) or "none fits")
    return [dataclasses.replace(config, gpus=tuple(group)) for group in groups] or [config]


def _gpus(config: EngineConfig) -> list[Gpu]:
    gpus = visible_gpus() if config.device == "auto" or config.device.startswith("cuda") else []
    if config.device.startswith("cuda:"):
        return gpus[int(config.device.partition(":")[2]) :][:1]
    return gpus


def _check_fp8(config: EngineConfig, gpus: Sequence[Gpu]) -> None:
    """Raises ConfigError for FP8 without a GPU that has it; the engine checks the one that it takes."""
    flags = {"kv_cache_dtype": "--kv-cache-dtype", "lm_head_dtype": "--lm-head-dtype"}
    chosen = [
        f"{key} '{getattr(config, key)}' ({flag})" for key, flag in flags.items() if getattr(config, key) != "auto"
    ]
    if not chosen:
        return
    needs = f"{' and '.join(chosen)} {'needs' if len(chosen) == 1 else 'need'} a GPU of sm_89 or later"
    if not gpus:
        if config.device.startswith("cuda") or config.dtype in ("float32", "float16"):
            return  # plain torch has FP8, the native kernels do not
        raise ConfigError(
            f"{needs}, and this server would run on the CPU; drop {'it' if len(chosen) == 1 else 'them'}, or try it "
            "slowly in plain torch with dtype 'float32' (--dtype)"
        )
    old = [(gpu, gpu.capability) for gpu in gpus if gpu.capability is not None and gpu.capability < FP8_CAPABILITY]
    if len(old) == len(gpus):
        shown = ", ".join(f"{gpu.index}: {gpu.name} (sm_{major}{minor})" for gpu, (major, minor) in old)
        raise ConfigError(f"{needs}, and this machine has {shown}; drop {'it' if len(chosen) == 1 else 'them'}")


def _on_cpu(config: EngineConfig, count: int) -> list[EngineConfig]:
    ranks = max(1, config.tensor_parallel_size) * max(1, config.pipeline_parallel_size)
    if config.backend != "transformers":
        _cpu_plan(config, _element(config), count)
    threads = config.num_threads or max(1, usable_cores() // (count * ranks))
    if threads * ranks * count > usable_cores():
        logger.warning(
            "%d engines of %d threads share %d cores: fewer are faster", count, threads * ranks, usable_cores()
        )
    return [dataclasses.replace(config, num_threads=threads)] * count


def _equal_groups(config: EngineConfig, num_gpus: int) -> list[range]:
    """The GPUs of each engine; without parallel sizes each has an equal share to choose from."""
    count = config.data_parallel_size
    ranks = max(1, config.tensor_parallel_size) * max(1, config.pipeline_parallel_size)
    size = max(ranks, num_gpus // count)
    if count * ranks > num_gpus:
        sizes = {"tensor_parallel_size": config.tensor_parallel_size}
        sizes["pipeline_parallel_size"] = config.pipeline_parallel_size
        factors = "".join(f" x {name} ({value})" for name, value in sizes.items() if value > 1)
        raise ConfigError(f"data_parallel_size ({count}){factors} needs {count * ranks} GPUs, there are {num_gpus}")
    return [range(i * size, (i + 1) * size) for i in range(count)]


def _groups_that_fit(config: EngineConfig, gpus: Sequence[Gpu]) -> list[range]:
    """The GPUs of as many engines as fit, each on as few as hold the model; empty if none fits."""
    if config.backend == "transformers":
        return [range(len(gpus))]
    ranks = max(1, config.tensor_parallel_size) * max(1, config.pipeline_parallel_size)
    for size in range(ranks, len(gpus) + 1):
        groups = [range(i, i + size) for i in range(0, len(gpus) - size + 1, size)]
        fitting = [group for group in groups if _fits(config, [gpus[i] for i in group])]
        if fitting:
            return fitting
    return []


def _fits(config: EngineConfig, gpus: Sequence[Gpu]) -> bool:
    try:
        _gpu_plan(config, gpus)
    except ConfigError:
        return False
    return True


def _gpu_plan(config: EngineConfig, gpus: Sequence[Gpu]) -> MemoryPlan:
    free, total = [gpu.free_bytes for gpu in gpus], [gpu.total_bytes for gpu in gpus]
    if config.nnodes > 1:
        if len(gpus) < config.ranks_per_node:
            raise ConfigError(
                f"{config.num_ranks} ranks on {config.nnodes} hosts (nnodes) need {config.ranks_per_node} GPUs on "
                f"each, there are {len(gpus)}"
            )
        free, total = (sizes[: config.ranks_per_node] * config.nnodes for sizes in (free, total))
    return choose_plan(config, free, total, element=_element(config))


def _element(config: EngineConfig) -> int:
    """Bytes of an unquantised weight."""
    return 4 if config.dtype == "float32" else 2


def _shown(group: range) -> str:
    return str(group.start) if len(group) == 1 else f"{group.start}-{group.stop - 1}"


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
    gpus = _gpus(config)
    plan = _gpu_plan(config, gpus) if gpus else _cpu_plan(config, _element(config))
    if config.nnodes > 1:
        logger.info(
            "memory plan: %d ranks on each of %d hosts; the others count as this one",
            config.ranks_per_node,
            config.nnodes,
        )
    for line in plan.lines():
        logger.info("memory plan: %s", line)
    return dataclasses.replace(
        config, tensor_parallel_size=plan.tensor_size, pipeline_parallel_size=len(plan.stage_layers)
    )


def _cpu_plan(config: EngineConfig, element: int, num_engines: int = 1) -> MemoryPlan:
    """The plan of one engine. Raises ConfigError unless the engines fit into the available memory."""
    for mode, key in (("tensor", "tensor_parallel_size"), ("pipeline", "pipeline_parallel_size")):
        if config.gpu_mode == mode and not getattr(config, key):
            raise ConfigError(f"gpu_mode {mode!r} on a CPU needs {key}: there are no GPUs to count")
    tensor, stages = max(1, config.tensor_parallel_size), max(1, config.pipeline_parallel_size)
    available = psutil.virtual_memory().available
    local = config.ranks_per_node
    kv = int(config.cpu_kv_cache_gib * 2**30) * local // config.num_ranks
    share = max(0, available - kv) // local
    shares = [share] * (tensor * stages)
    relaxed = dataclasses.replace(config, gpu_memory_utilization=1.0)
    plan = make_plan(relaxed, shares, shares, tensor_size=tensor, stages=stages, element=element)
    mine = plan.ranks[config.node_rank * local : (config.node_rank + 1) * local]
    needed = sum(rank.weight_bytes + rank.activation_bytes + rank.head_bytes for rank in mine)
    if num_engines * (needed + kv) > available:
        each = f"each of {num_engines} engines needs " if num_engines > 1 else ""
        raise ConfigError(
            f"the model does not fit: {each}{needed / GB:.1f} GB of weights and activations and {kv / GB:.1f} GB of KV "
            f"cache (cpu_kv_cache_gib), {available / GB:.1f} GB of memory are available"
        )
    ranks = []
    for rank in plan.ranks:
        used = RUNTIME_BYTES + rank.weight_bytes + rank.activation_bytes + rank.head_bytes
        ranks.append(dataclasses.replace(rank, usable_bytes=used + kv // local))
    return dataclasses.replace(plan, ranks=tuple(ranks))
