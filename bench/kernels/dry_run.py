"""Lists the Triton kernels that the engine compiles, and compiles them, without a GPU.

The engine's own warm-up, captures and steps run on meta tensors, and a launch does what triton does up to the compiler:
its own binder turns the arguments into a specialisation. What a start lists is what the first GPU run compiles:

    python -m bench.kernels.dry_run --model 20b --max-num-seqs 32            # the list
    python -m bench.kernels.dry_run --model 20b --compile /tmp/tcache        # and triton's cache filled with it
    python -m bench.kernels.dry_run --gpu-run --compile .tcache              # with all that bench/gpu/run.sh asks for

A cache filled with the same triton and Python as the GPU machine's can be copied there: keys do not depend on paths.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # before anything imports triton

import torch
import triton.compiler
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver

from bench.arguments import whole
from bench.kernels.batches import random_sizes, step_rows
from gptoss.engine.config import EngineConfig
from gptoss.engine.model.forward_batch import ForwardBatch
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.worker import dry_run, kernel_check, precompile
from gptoss.engine.worker.batch import build_batch
from gptoss.engine.worker.dry_run import META, NUM_BLOCKS, Compilation, Key, Record, as_on, recording
from gptoss.kernels.triton import fused_layers
from gptoss.kernels.triton.configs import TileConfig, config_for

BLOCK_SIZE = 64
MIN_CAPABILITY, FP8_CAPABILITY = 80, 89
BATCHES = {7: 20, 32: 200, 256: 10}  # max_num_seqs -> random steps of --check
LAUNCH_TOKENS = (1, 4, 9, 33, 65, 300, 8192)
# the starts of bench/gpu/run.sh: model, max_num_seqs, max_num_batched_tokens; and what its steps compute besides
RUN = (("20b", 256, 4096), ("120b", 32, 8192))
RUN_BATCHES = (1, 8, 32)
RUN_PROMPTS = (1024, 8192)


class DryEngine(dry_run.DryEngine):
    """A model without numbers, and its steps."""

    def __init__(
        self,
        model: str,
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 8192,
        max_model_len: int = 131_072,
        invariant: bool = False,
        fp8: bool = False,
    ) -> None:
        """`fp8`: keys, values and the output head in FP8."""
        super().__init__(
            EngineConfig(
                ModelConfig.from_json(hf_config(SIZES[model])),
                None,
                load_format="dummy",
                max_num_seqs=max_num_seqs,
                max_model_len=max_model_len,
                max_num_batched_tokens=max_num_batched_tokens,
                block_size=BLOCK_SIZE,
                batch_invariant=invariant,
                kv_cache_dtype="fp8" if fp8 else "auto",
                lm_head_dtype="fp8" if fp8 else "auto",
            )
        )

    def step(self, contexts: list[int], counts: list[int]) -> None:
        """An eager step: sequences with so many cached tokens and so many new ones."""
        logits = self.model.forward(self.batch(contexts, counts), self.cache)
        if len(logits):
            kernel_check.launch_sampler(logits)

    def batch(self, contexts: list[int], counts: list[int]) -> ForwardBatch:
        return build_batch(step_rows(contexts, counts, NUM_BLOCKS, BLOCK_SIZE), self.model.kernels, BLOCK_SIZE)

    def random_steps(self, count: int) -> None:
        """Mixed steps of any size that the limits allow."""
        c = self.config
        limits = {"max_tokens": c.max_num_batched_tokens, "max_len": c.max_model_len}
        for contexts, counts in random_sizes(count, max_num_seqs=c.max_num_seqs, **limits):
            self.step(contexts, counts)


def covered(model: str, max_num_seqs: int, tokens: int, batches: int, *, fp8: bool = False) -> dict[str, Any]:
    """-> what a start compiles, and what random mixed steps ask for beyond it."""
    with recording() as record:
        engine = DryEngine(model, max_num_seqs=max_num_seqs, max_num_batched_tokens=tokens, fp8=fp8)
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
    x = torch.empty(sum(counts), engine.config.model.hidden_size, dtype=torch.bfloat16, device=META)
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


def gpu_run() -> dict[str, Any]:
    """-> what the models of a GPU run ask for beyond what is compiled for it (RUN)."""
    missing = {}
    for model, max_num_seqs, tokens in RUN:
        with recording() as record:
            DryEngine(model, max_num_seqs=max_num_seqs, max_num_batched_tokens=tokens).start()
            started = set(record.compilations)
            for batch in RUN_BATCHES:  # bench/gpu/model.py: an engine for each batch
                engine = DryEngine(model, max_num_seqs=batch, max_num_batched_tokens=2048)
                engine.start()
                engine.step([1023] * batch, [1] * batch)
            for prompt in RUN_PROMPTS:
                engine.step([0], [prompt])
            missing[model] = [list(key) for key in sorted(set(record.compilations) - started)]
    return missing


Hashes = set[tuple[str, str]]


def _plain(found: Hashes | int) -> list[tuple[str, str]] | int:
    return found if isinstance(found, int) else sorted(found)


def hashes_of_launches(model: str) -> tuple[Hashes, Hashes, int]:
    """-> what triton names the kernels of a start by in its cache, as they are listed and as triton's own launches ask
    for them; and of how many of these a server would have told."""
    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)

    def hashed(source: ASTSource, options: dict[str, Any]) -> tuple[str, str]:
        return source.hash(), backend.parse_options(options).hash()

    with recording() as record:
        DryEngine(model, max_num_seqs=8).start()
    listed = {hashed(*one.source(target)) for one in record.compilations.values()}
    asked, seen = set(), []

    def compiled(source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> SimpleNamespace:
        asked.add(hashed(source, options))
        return SimpleNamespace(
            run=lambda *_: None, launch_metadata=lambda *_: None, function=0, packed_metadata=(), metadata=None
        )

    driver.set_active(
        SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 0, get_current_target=lambda: target)
    )
    precompile.warn_when_compiling(seen.append)
    with as_on(90), mock.patch.object(triton.compiler, "compile", compiled):
        DryEngine(model, max_num_seqs=8).start()
    return listed, asked, len(seen)


def _config_but(
    kernel: str, config: TileConfig, architecture: str, name: str, *given: Any, **kwargs: Any
) -> TileConfig:
    """The launch table's entry, but `config` for one kernel."""
    return config if name == kernel else config_for(architecture, name, *given, **kwargs)


def compile_candidates(jobs: list[Any], capability: int, workers: int) -> int:
    """Jobs are (model, kernel of the launch table, tokens, configurations). -> how many processes failed at one."""
    wanted: dict[Key, Compilation] = {}
    for model, kernel, tokens, configs in jobs:
        with recording(capability) as record:
            engine = DryEngine(model, max_num_seqs=max(32, tokens))
            engine.step([1023] * tokens, [1] * tokens)
            usual = set(record.compilations)
            for config in configs:
                chosen = functools.partial(_config_but, kernel, TileConfig(**config))
                with mock.patch.object(fused_layers, "config_for", chosen), contextlib.suppress(Exception):
                    engine.step([1023] * tokens, [1] * tokens)
            wanted |= {key: one for key, one in record.compilations.items() if key not in usual}
    started = time.monotonic()
    failed = dry_run.compile_all(list(wanted.values()), GPUTarget("cuda", capability, 32), workers)
    sys.stdout.write(f"{len(wanted)} candidates compiled in {time.monotonic() - started:.0f} s\n")
    return failed


def compile_into(folder: Path, record: Record, capability: int, workers: int) -> None:
    """Fills triton's cache in `folder`. Raises SystemExit if a kernel is not compiled."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    jobs = [record.compilations[key] for key in sorted(record.compilations)]
    if dry_run.compile_all(jobs, GPUTarget("cuda", capability, 32), workers):
        raise SystemExit("some kernels were not compiled")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="20b", choices=("20b", "120b"))
    parser.add_argument("--max-num-seqs", type=whole(1, 1024), default=32)
    parser.add_argument("--max-num-batched-tokens", type=whole(1, 131_072), default=8192)
    parser.add_argument("--gpu-run", action="store_true", help="both models, as bench/gpu/run.sh starts them")
    parser.add_argument("--capability", type=int, default=90, help="90 for sm_90; 80 is the least")
    parser.add_argument("--invariant", action="store_true")
    parser.add_argument("--fp8", action="store_true", help="KV cache and output head in FP8")
    parser.add_argument("--compile", type=Path, metavar="FOLDER", help="triton's cache to fill")
    parser.add_argument("--workers", type=whole(1, 1024), default=len(os.sched_getaffinity(0)))
    parser.add_argument("--candidates", type=json.loads, metavar="JSON", help="of bench/gpu/tune.py, to compile")
    parser.add_argument("--check", action="store_true", help="print what the tests look at, as JSON")
    args = parser.parse_args(argv)
    if not MIN_CAPABILITY <= args.capability < 1000:
        parser.error(f"argument --capability: {args.capability}: the kernels need sm_{MIN_CAPABILITY} or later")
    if args.fp8 and args.capability < FP8_CAPABILITY:
        parser.error(f"argument --fp8: needs sm_{FP8_CAPABILITY} or later, and --capability is {args.capability}")
    if args.check:
        found = {
            "start": {n: covered("20b", n, 8192, batches) for n, batches in BATCHES.items()}
            | {"fp8": covered("20b", 7, 8192, BATCHES[7], fp8=True)},
            "eager": {str(i): eager_counts("20b", 600, invariant=i) for i in (False, True)},
            "gpu_run": gpu_run(),
            "hashes": dict(zip(("listed", "asked", "told"), map(_plain, hashes_of_launches("20b")), strict=True)),
        }
        sys.stdout.write(json.dumps(found) + "\n")
        return 0
    if args.candidates:
        return int(compile_candidates(args.candidates, args.capability, args.workers) > 0)
    started = time.monotonic()
    starts = RUN if args.gpu_run else [(args.model, args.max_num_seqs, args.max_num_batched_tokens)]
    with recording(args.capability) as record:
        for model, max_num_seqs, tokens in starts:
            DryEngine(model, max_num_seqs=max_num_seqs, max_num_batched_tokens=tokens, invariant=args.invariant).start()
    sys.stdout.write(f"{sum(record.counts().values())} compilations: {record.counts()}\n")
    if args.compile:
        compile_into(args.compile, record, args.capability, args.workers)
        sys.stdout.write(f"compiled in {time.monotonic() - started:.0f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
