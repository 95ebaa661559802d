"""One rank: chooses device, type and kernels, loads weights, allocates the cache, runs steps."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path

import psutil
import torch

from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import ModelRunnerOutput, SchedulerOutput
from gptoss.engine.model.eagle3 import Eagle3Head
from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.model_config import FULL, SLIDING
from gptoss.engine.model.sources import open_source
from gptoss.engine.model.tensor_source import TensorSource, populate
from gptoss.engine.model.weights import ModelWeights, WeightLoader, dummy_weights, iterate_tensors
from gptoss.engine.model.weights_cache import LEAST_BYTES, WeightsCache
from gptoss.engine.parallel.communicator import Communicator, Rendezvous
from gptoss.engine.parallel.memory_plan import lora_bytes, stage_layers, step_bytes
from gptoss.engine.parallel.shards import make_shard
from gptoss.engine.worker import precompile
from gptoss.engine.worker.adapters import RankAdapters
from gptoss.engine.worker.cuda_graphs import GraphRunner
from gptoss.engine.worker.device_choice import choose_cpu_isa, choose_device, choose_dtype, set_threads
from gptoss.engine.worker.draft_runner import DraftRunner
from gptoss.engine.worker.model_runner import ModelRunner
from gptoss.kernels.backend import check_fp8, choose_backend
from gptoss.kernels.cpu import native
from gptoss.kernels.fp8 import FP8
from gptoss.kernels.layers import LayerCache

logger = logging.getLogger(__name__)

GIB = 2**30


class KernelError(ConfigError):
    """The kernels compute wrong results on this device; a restart would not help, so it must not serve."""


class Worker:
    """Runs the steps of one rank.

    All ranks call the same methods in the same order: they meet in collective operations.
    """

    def __init__(self, config: EngineConfig, rank: int = 0, rendezvous: Rendezvous | None = None) -> None:
        """`rendezvous`: where the ranks meet; None with one rank."""
        self.config = config
        tensor_size, stages = (max(1, config.tensor_parallel_size), max(1, config.pipeline_parallel_size))
        local_ranks = config.ranks_per_node
        self.device = choose_device(config.device, rank % local_ranks, local_ranks)
        choose_cpu_isa(config.cpu_isa)
        self.dtype = choose_dtype(config.dtype, self.device, config.gpu_dtypes)
        if self.device.type == "cpu":
            set_threads(config.num_threads, local_ranks)
        elif self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.shard = make_shard(
            config.model,
            rank,
            tensor_size=tensor_size,
            stage_layers=stage_layers(config.model, stages, tensor_size),
            expert_parallel=config.enable_expert_parallel,
        )
        self.adapters: RankAdapters | None = None
        self._graphs: GraphRunner | None = None
        self._kv_scales: list[tuple[float, float]] | None = None  # of keys and values, by layer; None: 1
        self.comm = Communicator(self.shard, self.device, rendezvous, ordered=config.batch_invariant)
        try:
            self.kernels = choose_backend(
                self.device,
                self.dtype,
                layer_shape(config.model, self.shard, config.max_model_len),
                batch_invariant=config.batch_invariant,
                dense_dtype=config.dense_dtype,
                lm_head_dtype=config.lm_head_dtype,
            )
        except ValueError as error:
            raise ConfigError(f"dense_dtype (--dense-dtype) {error}") from None
        self.cache_dtype = self.dtype
        if config.has_fp8_cache:
            self._check_fp8("kv_cache_dtype (--kv-cache-dtype)", config.kv_cache_dtype)
            self.cache_dtype = FP8
        if config.lm_head_dtype != "auto":
            self._check_fp8("lm_head_dtype (--lm-head-dtype)", config.lm_head_dtype)

    def _check_fp8(self, key: str, value: str) -> None:
        try:
            check_fp8(self.kernels)
        except ValueError as error:
            raise ConfigError(f"{key} '{value}' {error}; drop it") from None

    def load(self) -> None:
        """Loads the weights, and the draft head if there is one. Raises ConfigError."""
        started = time.monotonic()
        config = self.config
        self._precompilation = self._precompile()
        if config.block_size < self.kernels.min_block_size:
            raise ConfigError(
                f"block_size ({config.block_size}) is below {self.kernels.min_block_size}, "
                "the least that the GPU kernels take"
            )
        self._check_draft_head()
        if config.load_format == "dummy":
            weights = dummy_weights(
                config.model, self.dtype, self.device, config.seed, self.shard, self.kernels.prepare_layer
            )
        else:
            if config.model_path is None:
                raise ConfigError("model_path is needed unless load_format is 'dummy'")
            weights = self._read_weights(config.model_path)
        head, lora = config.draft_head, None
        if config.has_lora:
            self.adapters = RankAdapters(config, self.shard, self.dtype, self.device)
            lora = self.adapters.table
        taps = () if head is None else head.boundaries(config.model.num_layers)
        self.model = GptOss(config.model, weights, self.comm, self.kernels, lora, taps)
        self.draft_head = None if head is None else Eagle3Head(head, self.model, config.max_model_len)
        if self.device.type == "cpu":
            populate(iterate_tensors(self.model.weights))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # the weights before they were laid out; the KV cache takes the memory
        self.weight_bytes = sum(t.nbytes for t in iterate_tensors(self.model.weights))
        self.weight_bytes += 0 if self.draft_head is None else self.draft_head.weight_bytes
        self.load_s = time.monotonic() - started
        logger.info("loaded %.2f GiB of weights in %.1f s", self.weight_bytes / GIB, self.load_s)

    def _check_draft_head(self) -> None:
        """Raises ConfigError if the kernels or ranks cannot verify a draft head's guesses."""
        is_supported = self.kernels.name in ("triton", "native") and self.comm.world_size == 1
        if self.config.speculative_model is not None and not is_supported:
            raise ConfigError(
                "speculative_model (--speculative-model) works on one rank, with the compiled CPU kernels or the GPU "
                f"kernels; this engine runs {self.kernels.name} kernels on {self.comm.world_size}: drop it"
            )

    def _precompile(self) -> precompile.Precompilation | None:
        if self.kernels.name != "triton":
            return None
        return precompile.start(self.config, self.shard, torch.cuda.get_device_capability(self.device))

    def _read_weights(self, path: Path) -> ModelWeights:
        config, source = self.config, open_source(path, self.config.model)
        if config.has_fp8_cache:
            self._kv_scales = read_kv_scales(source, self.shard.layers)
        loader = WeightLoader(
            source,
            config.model,
            self.dtype,
            dequantize=self._dequantize(),
            device=self.device,
            shard=self.shard,
            prepare_layer=self.kernels.prepare_layer,
            prepare_head=self.kernels.prepare_head,
            stored_experts=self.kernels.reads_stored_experts,
        )
        max_bytes = int(config.weights_cache_gib * GIB)
        size = sum(file.state.num_bytes for file in source.files)
        if self.kernels.name != "native" or config.weights_cache_dir is None or not max_bytes or size < LEAST_BYTES:
            return loader.load()
        cache = WeightsCache(config.weights_cache_dir, max_bytes)
        return cache.load(
            loader, source, config.model, self.shard, self.dtype, config.dense_dtype, native.instruction_flags()
        )

    def init_cache(self) -> int:
        """Allocates the cache; returns its number of blocks, including the null block: the same on every rank."""
        num_blocks = self._num_blocks()
        layers = self._allocate_cache(num_blocks)
        self.kv_cache_bytes = num_blocks * self._block_bytes
        self.runner = ModelRunner(
            self.config,
            self.model,
            layers,
            self.kernels,
            self.comm,
            self._prepare_kernels(layers),
            self.adapters.slots_of if self.adapters is not None else None,
            self._draft_runner(num_blocks),
        )
        if self.kernels.name == "triton":
            precompile.warn_when_compiling()
        return num_blocks

    @property
    def _cache_kinds(self) -> list[str]:
        """The kind of each of this rank's layers."""
        return [self.config.model.cache_kinds[n] for n in self.shard.layers]

    @property
    def _num_cache_tensors(self) -> int:
        """Pairs of keys and values: the i-th full and the i-th sliding layer share one."""
        return max(self._cache_kinds.count(FULL), self._cache_kinds.count(SLIDING))

    @property
    def _block_bytes(self) -> int:
        """Bytes of a block in all layers of this rank, the draft head's included."""
        config, head = self.config, self.config.draft_head
        per_token = 2 * len(self.shard.kv_heads) * config.model.head_dim * self.cache_dtype.itemsize
        per_token *= self._num_cache_tensors
        if head is not None:
            per_token += head.kv_bytes_per_token(self.dtype.itemsize)
        return config.block_size * per_token

    def _num_blocks(self) -> int:
        """The blocks that every rank has memory for."""
        config = self.config
        affordable = self._cache_bytes() // self._block_bytes
        # never more than all sequences at full length can use
        useful = 2 * config.max_num_seqs * math.ceil(config.max_model_len / config.block_size) + 1
        num_blocks = self.comm.minimum(int(min(affordable, useful)))
        if num_blocks < 4:
            raise ConfigError(
                f"the KV cache holds {num_blocks} blocks of {self._block_bytes} bytes; "
                "raise cpu_kv_cache_gib (CPU) or gpu_memory_utilization (GPU)"
            )
        return num_blocks

    def _allocate_cache(self, num_blocks: int) -> list[LayerCache]:
        """The cache of each layer: tensors [num_blocks, block_size, KV heads, head_dim]."""
        shape = (num_blocks, self.config.block_size, len(self.shard.kv_heads), self.config.model.head_dim)
        pairs = [
            [torch.zeros(shape, dtype=self.cache_dtype, device=self.device) for _ in ("keys", "values")]
            for _ in range(self._num_cache_tensors)
        ]
        num_of_kind = {FULL: 0, SLIDING: 0}
        layers = []
        scales = self._kv_scales or [(1.0, 1.0)] * len(self._cache_kinds)
        for kind, (key, value) in zip(self._cache_kinds, scales, strict=True):
            layers.append(LayerCache(*pairs[num_of_kind[kind]], key_scale=key, value_scale=value))
            num_of_kind[kind] += 1
        return layers

    def _draft_runner(self, num_blocks: int) -> DraftRunner | None:
        """Returns the draft head with its cache, which has the blocks of the model's."""
        if self.draft_head is None:
            return None
        head, block_size = self.draft_head.description, self.config.block_size
        shape = (num_blocks, block_size, head.num_kv_heads, head.head_dim)
        cache = LayerCache(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))
        runner = DraftRunner(self.draft_head, cache, block_size, self.config.max_model_len)
        if self.kernels.name == "triton":
            from gptoss.engine.worker import kernel_check  # imports triton

            kernel_check.warm_up_head(runner, self.config, self.device)
        return runner

    def _prepare_kernels(self, cache: list[LayerCache]) -> GraphRunner | None:
        """Compiles the Triton kernels and captures the decode steps; on one GPU also checks the kernels."""
        if self.kernels.name != "triton":
            return None
        from gptoss.engine.worker import kernel_check  # imports triton

        if self._precompilation is not None:
            self._precompilation.wait()
        if self.comm.world_size == 1:
            error = kernel_check.check_layers(self.model, cache, self.comm, self.config.block_size)
            if not error < kernel_check.TOLERANCE:
                raise KernelError(f"the Triton kernels differ from plain torch by {error:.1%} on {self.device}")
            logger.info("kernels checked against plain torch: relative error %.2g", error)
        kernel_check.warm_up(self.model, cache, self.config, self.comm)
        if self.config.enforce_eager:
            return None
        self._graphs = GraphRunner(
            self.config, self.model, cache, self.device, comm=self.comm, num_taps=self.model.num_taps
        )
        self._graphs.capture_all()
        return self._graphs

    def execute_model(
        self, out: SchedulerOutput, sampled: dict[str, list[int]] | None = None
    ) -> ModelRunnerOutput | None:
        """Runs one step. Returns None where another rank samples.

        `sampled`: what was sampled since the last step, on any rank (messages.Step).
        """
        return self.runner.execute_model(out, sampled or {})

    def close(self) -> None:
        if self._graphs is not None:
            self._graphs.release()
        self.comm.close()

    @property
    def kernel_path(self) -> str:
        return self.kernels.name

    @property
    def prelaunches_steps(self) -> bool:
        return self.runner.prelaunches_steps

    def _dequantize(self) -> bool:
        """Whether MXFP4 experts are unpacked at load.

        With plain torch they are, if that takes at most half the free memory.
        """
        if self.kernels.reads_mxfp4:
            return False
        c = self.config.model
        element = torch.empty((), dtype=self.dtype).element_size()
        s = self.shard
        weights = 3 * c.hidden_size * len(s.intermediate) * len(s.experts) * len(s.layers)
        experts = weights * element * (self.config.ranks_per_node if self.device.type == "cpu" else 1)
        free = (
            psutil.virtual_memory().available if self.device.type == "cpu" else torch.cuda.mem_get_info(self.device)[0]
        )
        return experts < free // 2

    def _cache_bytes(self) -> int:
        if self.device.type == "cpu":
            return int(self.config.cpu_kv_cache_gib * GIB) // self.comm.world_size
        free, total = torch.cuda.mem_get_info(self.device)
        c = self.config
        element = torch.empty((), dtype=self.dtype).element_size()
        # a step needs this much besides the cache, however high the utilization is set
        step = step_bytes(c, self.shard, element)
        unused = max(step, (1 - c.gpu_memory_utilization) * total) + lora_bytes(c, self.shard)
        return max(0, int(free - unused))


def read_kv_scales(source: TensorSource, layers: range) -> list[tuple[float, float]] | None:
    """The scales of keys and values of each layer, 1 for a layer without; None if no layer has any."""
    found = [source.kv_scales(n) for n in layers]
    count = sum(scales is not None for scales in found)
    logger.info("FP8 KV cache: scales of %d of %d layers are the checkpoint's, the others 1", count, len(found))
    return [scales or (1.0, 1.0) for scales in found] if count else None
