"""Lists the Triton kernels that a start compiles, without a GPU, and compiles them.

The engine's own warm-up, captures and steps run on meta tensors, and a launch does what triton does up to the compiler:
its own binder turns the arguments into a specialisation. Triton's cache on disk then has each kernel before it is
launched for the first time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction, create_function_from_signature

from gptoss.engine.config import EngineConfig
from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.model_config import SLIDING, WIDE, ModelConfig
from gptoss.engine.model.weights import ModelWeights
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import Shard, whole
from gptoss.engine.worker import kernel_check
from gptoss.engine.worker.cuda_graphs import GraphRunner
from gptoss.kernels.fp8 import FP8
from gptoss.kernels.layers import (
    FULL_GROUP,
    SLIDING_GROUP,
    WIDE_GROUP,
    LayerCache,
    LayerWeights,
    PackedExperts,
    PackedMxfp4,
)
from gptoss.kernels.triton import support
from gptoss.kernels.triton.backend import TritonBackend
from gptoss.kernels.triton.mxfp4_layout import BLOCK_COLUMNS
from gptoss.parent_process import end_with_parent

META = torch.device("meta")
NUM_BLOCKS = 64
LAUNCH = {"debug": False, "instrumentation_mode": ""}  # what triton's launcher adds to the arguments
GROUPS = {SLIDING: SLIDING_GROUP, WIDE: WIDE_GROUP}
Key = tuple[str, str]  # a kernel's name, and the specialisation as text


@dataclass(frozen=True, slots=True)
class Compilation:
    """Arguments of a launch, as triton's compiler takes them."""

    kernel: Any
    bound: dict[str, Any]
    specialization: list[Any]
    options: dict[str, Any]

    def source(self, target: GPUTarget) -> tuple[ASTSource, dict[str, Any]]:
        """What the compiler is given, and its options."""
        backend = make_backend(target)
        options, signature, constexprs, attrs = self.kernel._pack_args(
            backend, LAUNCH | self.options, self.bound, self.specialization, dict(self.options)
        )
        return ASTSource(self.kernel, signature, constexprs, attrs), options.__dict__

    def compile(self, target: GPUTarget) -> Any:
        source, options = self.source(target)
        return triton_compile(source, target=target, options=options)


@dataclass
class Record:
    """Launches since `clear`, by kernel, and every different compilation since the start."""

    compilations: dict[Key, Compilation] = dataclasses.field(default_factory=dict)
    launches: list[str] = dataclasses.field(default_factory=list)

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = defaultdict(int)
        for name, _ in self.compilations:
            found[name] += 1
        return dict(found)


@contextlib.contextmanager
def recording(capability: int = 90) -> Iterator[Record]:
    """Records launches instead of making them."""
    record = Record()
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binders: dict[str, Any] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = self.__name__
        if name not in binders:
            binders[name] = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binders[name](*args, **(kwargs | LAUNCH))
        key = name, f"{specialization} {sorted(options.items())}"
        record.compilations.setdefault(key, Compilation(self, bound, specialization, options))
        record.launches.append(name)

    with mock.patch.object(JITFunction, "run", run), as_on(capability):
        yield record


@contextlib.contextmanager
def as_on(capability: int) -> Iterator[None]:
    """Gives meta tensors the kernels and options of that GPU."""
    with (
        mock.patch.object(support, "_capability", lambda _: divmod(capability, 10)),
        mock.patch.object(support, "samples", lambda _: True),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
    ):
        yield


class _Alone(Communicator):
    """A rank of several that meets no other: sums are its own part."""

    def __init__(self, shard: Shard) -> None:
        super().__init__(replace(shard, tensor_size=1, num_stages=1), META)
        self.shard = shard

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        return partial


class DryEngine:
    """One rank's model without numbers, and what it launches before it is ready."""

    def __init__(self, config: EngineConfig, shard: Shard | None = None) -> None:
        c = self.c = config.model
        self.config = config
        self.comm = _Alone(shard or whole(c))
        kernels = TritonBackend(
            layer_shape(c, self.comm.shard, config.max_model_len),
            torch.bfloat16,
            META,
            batch_invariant=config.batch_invariant,
            lm_head_dtype=config.lm_head_dtype,
        )
        self.model = GptOss(c, _weights(c, self.comm.shard), self.comm, kernels)
        heads = len(self.comm.shard.kv_heads)
        shape = NUM_BLOCKS, config.block_size, heads, c.head_dim
        cache_dtype = FP8 if config.has_fp8_cache else torch.bfloat16
        pair = LayerCache(*(_empty(*shape, dtype=cache_dtype) for _ in "kv"))
        self.cache = [pair] * len(self.model.weights.layers)

    def start(self) -> None:
        kernel_check.warm_up(self.model, self.cache, self.config, self.comm)
        if not self.config.enforce_eager:
            graphs = GraphRunner(self.config, self.model, self.cache, META, lambda f: (f(), f)[1])
            graphs.capture_all()


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _weights(c: ModelConfig, s: Shard) -> ModelWeights:
    """Tensors of a rank's shapes, in the kernels' order.

    One layer stands for all that launch the same kernels.
    """
    hidden, vocab = c.hidden_size, len(s.vocab)
    first = {(c.layer_types[n], c.experts_of(n)): n for n in reversed(s.layers)}
    return ModelWeights(
        _empty(vocab, hidden) if s.is_first else None,
        [_layer(c, s, n) for n in sorted(first.values())],
        _empty(hidden) if s.is_last else None,
        _empty(vocab, hidden) if s.is_last else None,
    )


def _layer(c: ModelConfig, s: Shard, n: int) -> LayerWeights:
    hidden, inter, routed = c.hidden_size, len(s.intermediate), c.experts_of(n)
    experts = min(len(s.experts), routed)
    q, kv = len(s.query_heads) * c.head_dim, len(s.kv_heads) * c.head_dim

    def packed(rows: int, columns: int) -> PackedMxfp4:
        shape = (experts, rows // 16, -(-columns // BLOCK_COLUMNS), 16)
        words, scales = (_empty(*shape, n, dtype=t) for n, t in ((32, torch.int16), (4, torch.uint8)))
        return PackedMxfp4(words, scales, columns)

    return LayerWeights(
        GROUPS.get(c.layer_types[n], FULL_GROUP),
        _empty(hidden),
        _empty(q + 2 * kv, hidden),
        _empty(q + 2 * kv),
        _empty(len(s.query_heads)),
        _empty(hidden, q),
        _empty(hidden),
        _empty(hidden),
        _empty(routed, hidden),
        _empty(routed),
        PackedExperts(
            packed(2 * inter, hidden), _empty(experts, 2 * inter), packed(hidden, inter), _empty(experts, hidden)
        ),
    )


def compile_all(compilations: list[Compilation], target: GPUTarget, workers: int) -> int:
    """Fills triton's cache: each of `workers` forked processes takes its share.

    Returns how many of them failed.
    """
    children, parent = [], os.getpid()
    for worker in range(workers):
        child = os.fork()
        if child == 0:
            end_with_parent(parent)
            os._exit(_compile_share(compilations[worker::workers], target))
        children.append(child)
    return sum(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0 for child in children)


def _compile_share(jobs: list[Compilation], target: GPUTarget) -> int:
    """Compiles them one after another, and returns the exit code."""
    failed = 0
    for job in jobs:
        try:
            job.compile(target)
        except Exception as error:
            failed = 1
            sys.stderr.write(f"{job.kernel.__name__}: {error}\n"[:500])
    return failed
