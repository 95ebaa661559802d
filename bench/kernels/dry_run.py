"""Lists the Triton kernels that the engine compiles, and compiles them, without a GPU.

The engine's own warm-up, captures and steps run on meta tensors, and a launch does what triton does up to the compiler:
its own binder turns the arguments into a specialisation. What a start lists is what the first GPU run compiles:

    python -m bench.kernels.dry_run --model 20b --max-num-seqs 32            # the list
    python -m bench.kernels.dry_run --model 20b --compile /tmp/tcache        # and triton's cache filled with it

A cache filled with the same triton and Python as the GPU machine's can be copied there: keys do not depend on paths.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.model.weights import ModelWeights
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker import kernel_check
from gptoss.engine.worker.batch import RequestTable, build_batch
from gptoss.engine.worker.cuda_graphs import GraphRunner
from gptoss.kernels.layers import LayerCache, LayerWeights, PackedExperts, PackedMxfp4
from gptoss.kernels.triton import support
from gptoss.kernels.triton.backend import TritonBackend
from gptoss.kernels.triton.mxfp4_layout import BLOCK_COLUMNS

META = torch.device("meta")
BLOCK_SIZE = 64
NUM_BLOCKS = 64
LAYERS = 2  # one of each kind: the others launch the same
BATCHES = {7: 20, 32: 200, 256: 10}  # max_num_seqs -> random steps of --check
LAUNCH_TOKENS = (1, 4, 9, 33, 65, 300, 8192)
Key = tuple[str, str]  # a kernel's name, and the specialisation as text


@dataclass(frozen=True, slots=True)
class Compilation:
    """Arguments of a launch, as triton's compiler takes them."""

    kernel: Any
    bound: dict[str, Any]
    specialization: list[Any]
    options: dict[str, Any]

    def compile(self, target: GPUTarget) -> Any:
        backend = make_backend(target)
        options, signature, constexprs, attrs = self.kernel._pack_args(
            backend, {"debug": False}, self.bound, self.specialization, dict(self.options)
        )
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        return triton.compile(source, target=target, options=options.__dict__)


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
    """Meanwhile kernels are not launched, but written down."""
    record = Record()
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binders: dict[str, Any] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        name = self.__name__
        if name not in binders:
            binders[name] = create_function_from_signature(self.signature, self.params, backend)
        bound, specialization, options = binders[name](*args, **(kwargs | {"debug": False}))
        key = name, f"{specialization} {sorted(options.items())}"
        record.compilations.setdefault(key, Compilation(self, bound, specialization, options))
        record.launches.append(name)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(support, "_capability", lambda _: divmod(capability, 10)),
        mock.patch.object(support, "samples", lambda _: True),
        mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
    ):
        yield record


class DryEngine:
    """A model without numbers, and its steps."""

    def __init__(
        self,
        model: str,
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 8192,
        max_model_len: int = 131_072,
        invariant: bool = False,
    ) -> None:
        c = ModelConfig.from_json(hf_config(SIZES[model]))
        c = dataclasses.replace(c, num_layers=LAYERS, layer_types=c.layer_types[:LAYERS])
        self.config = EngineConfig(
            c,
            None,
            load_format="dummy",
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=BLOCK_SIZE,
            batch_invariant=invariant,
        )
        self.comm = Communicator(whole(c), META)
        shape = layer_shape(c, whole(c), max_model_len)
        kernels = TritonBackend(shape, torch.bfloat16, META, batch_invariant=invariant)
        self.model = GptOss(c, _weights(c), self.comm, kernels)
        pair = LayerCache(*(_empty(NUM_BLOCKS, BLOCK_SIZE, c.num_key_value_heads, c.head_dim) for _ in "kv"))
        self.cache = [pair] * LAYERS

    def start(self) -> None:
        """What a worker launches before it is ready."""
        kernel_check.warm_up(self.model, self.cache, self.config, self.comm)
        graphs = GraphRunner(self.config, self.model, self.cache, META, lambda f: (f(), f)[1])
        graphs.capture_all()

    def step(self, contexts: list[int], counts: list[int]) -> None:
        """An eager step: sequences with so many cached tokens and so many new ones."""
        logits = self.model.forward(self.batch(contexts, counts), self.cache)
        if len(logits):
            kernel_check.launch_sampler(logits)

    def batch(self, contexts: list[int], counts: list[int]) -> ForwardBatch:
        new = [
            self._request(i, context + count, context)
            for i, (context, count) in enumerate(zip(contexts, counts, strict=True))
        ]
        scheduled = {r.request_id: n for r, n in zip(new, counts, strict=True)}
        rows = RequestTable().apply(SchedulerOutput(new, {}, scheduled, []))
        return build_batch(rows, self.model.kernels, BLOCK_SIZE)

    def _request(self, index: int, length: int, computed: int) -> NewRequest:
        blocks = [1 + i % (NUM_BLOCKS - 1) for i in range(-(-(length + 1) // BLOCK_SIZE))]
        params = SamplingParams(max_tokens=9, seed=0)
        return NewRequest(str(index), [5] * length, length, params, (blocks, blocks), computed)

    def random_steps(self, count: int, seed: int = 0) -> None:
        """Mixed steps: sequences that decode beside pieces of prompts, of any length that the limits allow."""
        rng = random.Random(seed)
        for _ in range(count):
            contexts, counts = [], []
            left = self.config.max_num_batched_tokens
            for _ in range(rng.randint(1, self.config.max_num_seqs)):
                decodes = rng.random() < 0.7
                new = 1 if decodes else min(left, int(2 ** rng.uniform(0, 13)))
                if new > left or not left:
                    break
                left -= new
                limit = self.config.max_model_len - new - 1
                contexts.append(min(limit, int(2 ** rng.uniform(0, 14))))
                counts.append(new)
            self.step(contexts, counts)


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def _weights(c: ModelConfig) -> ModelWeights:
    hidden, inter, experts = c.hidden_size, c.intermediate_size, c.num_experts
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim

    def packed(rows: int, columns: int) -> PackedMxfp4:
        shape = (experts, rows // 16, -(-columns // BLOCK_COLUMNS), 16)
        words, scales = (_empty(*shape, n, dtype=t) for n, t in ((32, torch.int16), (4, torch.uint8)))
        return PackedMxfp4(words, scales, columns)

    layer = LayerWeights(
        0,
        _empty(hidden),
        _empty(q + 2 * kv, hidden),
        _empty(q + 2 * kv),
        _empty(c.num_attention_heads),
        _empty(hidden, q),
        _empty(hidden),
        _empty(hidden),
        _empty(experts, hidden),
        _empty(experts),
        PackedExperts(
            packed(2 * inter, hidden), _empty(experts, 2 * inter), packed(hidden, inter), _empty(experts, hidden)
        ),
    )
    vocab = c.vocab_size
    return ModelWeights(
        _empty(vocab, hidden),
        [replace(layer, group=n % 2) for n in range(c.num_layers)],
        _empty(hidden),
        _empty(vocab, hidden),
    )


def compile_all(record: Record, capability: int, folder: Path, workers: int) -> None:
    """Fills triton's cache in `folder`: each of `workers` processes forks and takes its share."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    target = GPUTarget("cuda", capability, 32)
    jobs = [record.compilations[key] for key in sorted(record.compilations)]
    children = []
    for worker in range(workers):
        child = os.fork()
        if child == 0:
            status = 0
            for job in jobs[worker::workers]:
                try:
                    job.compile(target)
                except Exception as error:
                    status = 1
                    sys.stderr.write(f"{job.kernel.__name__}: {error}\n"[:500])
            os._exit(status)
        children.append(child)
    for child in children:
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit("some kernels were not compiled")


def covered(model: str, max_num_seqs: int, tokens: int, batches: int) -> dict[str, Any]:
    """-> what a start compiles, and what random mixed steps ask for beyond it."""
    with recording() as record:
        engine = DryEngine(model, max_num_seqs=max_num_seqs, max_num_batched_tokens=tokens)
        engine.start()
        started = set(record.compilations)
        counts = record.counts()
        engine.random_steps(batches)
        missing = sorted(set(record.compilations) - started)
    return {"start": counts, "missing": [list(key) for key in missing]}


class _Launches(TorchDispatchMode):
    """Adds torch's own kernels to a record's launches: all calls but those that make or view a tensor."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self._record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not func.is_view and not name.startswith(("empty", "_reshape_alias")):
            self._record.launches.append(f"torch.{name}")
        return func(*args, **(kwargs or {}))


def layer_launches(engine: DryEngine, record: Record, contexts: list[int], counts: list[int]) -> list[str]:
    """The kernels of one layer in an eager step, in their order; of the two kinds of layer the one that has more."""
    batch, found = engine.batch(contexts, counts), []
    x = _empty(sum(counts), engine.config.model.hidden_size)
    for layer, cache in zip(engine.model.weights.layers, engine.cache, strict=True):
        record.launches.clear()
        with _Launches(record):
            engine.model.layer(x, layer, cache, batch.step)
        found.append(list(record.launches))
    return max(found, key=len)


def eager_counts(model: str, upto: int, *, invariant: bool) -> dict[str, Any]:
    """-> different compilations of each kernel over prompts of 1 to `upto` tokens, and the launches of a layer in steps
    of several sizes, with 8 sequences that decode beside the prompt and without."""
    with recording() as record:
        engine = DryEngine(model, max_num_seqs=64, invariant=invariant)
        for tokens in range(1, upto + 1):
            engine.step([0], [tokens])
        launches = {
            f"{tokens} tokens beside {beside}": layer_launches(
                engine, record, [9] * beside + [0], [1] * beside + [tokens]
            )
            for tokens in LAUNCH_TOKENS
            for beside in (0, 8)
        }
        return {"counts": record.counts(), "launches": launches}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="20b", choices=("20b", "120b"))
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--max-num-batched-tokens", type=int, default=8192)
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--compile", type=Path, metavar="FOLDER", help="triton's cache to fill")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--check", action="store_true", help="print what the tests look at, as JSON")
    args = parser.parse_args(argv)
    if args.check:
        found = {
            "start": {n: covered("20b", n, 8192, batches) for n, batches in BATCHES.items()},
            "eager": {str(i): eager_counts("20b", 600, invariant=i) for i in (False, True)},
        }
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    started = time.monotonic()
    with recording(args.capability) as record:
        DryEngine(
            args.model,
            max_num_seqs=args.max_num_seqs,
            invariant=args.invariant,
            max_num_batched_tokens=args.max_num_batched_tokens,
        ).start()
    sys.stdout.write(f"{sum(record.counts().values())} compilations: {record.counts()}\n")
    if args.compile:
        compile_all(record, args.capability, args.compile, args.workers)
        sys.stdout.write(f"compiled in {time.monotonic() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
