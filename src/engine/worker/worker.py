"""One rank: picks device and type, loads weights, makes the cache, proves itself, runs steps."""

from __future__ import annotations

import ctypes
import logging
import math
import os
import time

import psutil
import torch

from src.engine.config import FULL, SLIDING, ConfigError, EngineConfig
from src.engine.messages import ModelRunnerOutput, NewRequest, SchedulerOutput
from src.engine.model.gpt_oss import GptOss, LayerCache
from src.engine.model.weights import Checkpoint, WeightLoader, dummy_weights, iterate_tensors
from src.engine.sampling_params import SamplingParams
from src.engine.worker.model_runner import ModelRunner
from src.kernels import native

logger = logging.getLogger(__name__)

GIB = 2**30
PROBE_ID = "self-test"


class SelfTestError(RuntimeError):
    """The model runs but its numbers are wrong: it must not serve."""


class Worker:
    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.device = _device(config.device)
        self.dtype = _dtype(config.dtype, self.device)
        if self.device.type == "cpu":
            torch.set_num_threads(config.num_threads or _default_threads())
            _keep_freed_memory()

    def load(self) -> None:
        started = time.monotonic()
        config = self.config
        if config.load_format == "dummy":
            weights = dummy_weights(config.model, self.dtype, self.device, config.seed)
        else:
            if config.model_path is None:
                raise ConfigError("model_path is needed unless load_format is 'dummy'")
            checkpoint = Checkpoint(config.model_path, config.model)
            weights = WeightLoader(
                checkpoint,
                config.model,
                self.dtype,
                dequantize=self._dequantize(),
                device=self.device,
            ).load()
        self.weight_bytes = sum(t.nbytes for t in iterate_tensors(weights))
        self.model = GptOss(config.model, weights)
        self.load_s = time.monotonic() - started
        logger.info("loaded %.2f GiB of weights in %.1f s", self.weight_bytes / GIB, self.load_s)

    def init_cache(self) -> int:
        """Makes the cache. -> number of blocks, the null block included."""
        c = self.config.model
        num_tensors = max(c.layer_types.count(FULL), c.layer_types.count(SLIDING))
        element = torch.empty((), dtype=self.dtype).element_size()
        block_bytes = (
            num_tensors * 2 * self.config.block_size * c.num_key_value_heads * c.head_dim * element
        )
        wanted = self._cache_bytes() // block_bytes
        # never more than all sequences at full length can use
        useful = (
            2
            * self.config.max_num_seqs
            * math.ceil(self.config.max_model_len / self.config.block_size)
            + 1
        )
        num_blocks = int(min(wanted, useful))
        if num_blocks < 4:
            raise ConfigError(
                f"the KV cache holds {num_blocks} blocks of {block_bytes} bytes; "
                "raise cpu_kv_cache_gib (CPU) or gpu_memory_utilization (GPU)"
            )
        shape = (num_blocks, self.config.block_size, c.num_key_value_heads, c.head_dim)
        pairs = [
            LayerCache(
                torch.zeros(shape, dtype=self.dtype, device=self.device),
                torch.zeros(shape, dtype=self.dtype, device=self.device),
            )
            for _ in range(num_tensors)
        ]
        seen = {FULL: 0, SLIDING: 0}
        layers = []
        for layer_type in c.layer_types:
            layers.append(pairs[seen[layer_type]])
            seen[layer_type] += 1
        self.kv_cache_bytes = num_blocks * block_bytes
        self.runner = ModelRunner(self.config, self.model, layers, self.dtype, self.device)
        return num_blocks

    def self_test(self) -> None:
        """A short prompt through the whole path. Raises SelfTestError if the logits are not finite."""
        tokens = list(range(1, 8))
        params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        blocks = (
            ([1], [2])
            if self.config.block_size >= len(tokens)
            else (list(range(1, 9)), list(range(9, 17)))
        )
        probe = NewRequest(PROBE_ID, tokens, len(tokens), params, blocks, 0)
        result = self.execute_model(SchedulerOutput([probe], {}, {PROBE_ID: len(tokens)}, []))
        self.execute_model(SchedulerOutput([], {}, {}, [PROBE_ID]))
        if result.failed:
            raise SelfTestError(
                f"self-test failed in {self.dtype} on {self.device}: {result.failed[PROBE_ID]}"
            )

    def execute_model(self, out: SchedulerOutput) -> ModelRunnerOutput:
        return self.runner.execute_model(out)

    @property
    def kernel_path(self) -> str:
        return "native" if self._native else "torch"

    @property
    def _native(self) -> bool:
        return native.supports(torch.empty(0, dtype=self.dtype, device=self.device))

    def _dequantize(self) -> bool:
        """MXFP4 experts are unpacked at load where that fits twice over: it is the fastest form for torch. The native
        kernels read them packed."""
        if self._native:
            return False
        c = self.config.model
        element = torch.empty((), dtype=self.dtype).element_size()
        experts = c.num_layers * c.num_experts * 3 * c.hidden_size * c.intermediate_size * element
        free = (
            psutil.virtual_memory().available
            if self.device.type == "cpu"
            else torch.cuda.mem_get_info(self.device)[0]
        )
        return experts < free // 2

    def _cache_bytes(self) -> int:
        if self.device.type == "cpu":
            return int(self.config.cpu_kv_cache_gib * GIB)
        free, total = torch.cuda.mem_get_info(self.device)
        return max(0, int(free - (1 - self.config.gpu_memory_utilization) * total))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device is {name!r}, but torch sees no CUDA device; use device 'cpu'")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the hardware multiplies it, else float16 on a GPU and float32 on a CPU."""
    if name != "auto":
        chosen: torch.dtype = getattr(torch, name)
        return chosen
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _default_threads() -> int:
    return max(1, min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1))


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory: a step's temporaries are megabytes, and getting fresh pages for them each time
    costs more than the arithmetic on them. Elsewhere than on glibc nothing is done."""
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, 512 * 2**20)
        mallopt(m_trim_threshold, 2**31 - 1)
