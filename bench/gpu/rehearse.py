"""Runs the GPU benchmarks on a CPU, with a tiny model in triton's interpreter; all times are placeholders.

It shows whether each step completes and writes its rows, which would take minutes to find out on a GPU machine.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from gptoss.engine.model.named_sizes import Size

TINY = Size(layers=2, hidden=64, intermediate=32, experts=6, heads=4, kv_heads=2)
VOCAB = 512
SMALL = {
    "REPLAYS": 1,
    "RANDOM_STEPS": 2,
    "CONTEXT": 20,
    "PREFILLS": (20,),
    "LONG": ((1, 30),),
    "BATCHES": (2,),
    "SMOKE_BATCHES": (2,),
    "STREAMS": (1, 2),
    "TOKENS": 8,
    "REQUESTS": 4,
    "PROMPTS": 5,
    "LOAD_S": 200,
    "READY_S": 200,
}
CEILINGS = {"copy_tb_s": 4.0, "matmul_tflop_s": 700.0}


def once(run: Callable[[], object], repeat_ms: int = 100) -> float:
    run()
    return 1.0


@contextlib.contextmanager
def on_a_cpu() -> Iterator[None]:
    """Needs TRITON_INTERPRET=1 before triton is imported."""
    from bench.gpu import kernels, model, steps
    from gptoss.engine.model.named_sizes import hf_config
    from gptoss.engine.worker import cuda_graphs
    from gptoss.kernels.triton import support

    if not support.interpreted():
        raise RuntimeError("set TRITON_INTERPRET=1")
    device = torch.device("cpu")
    patch = mock.patch.object
    with contextlib.ExitStack() as stack:
        for module in (kernels, model, steps):
            stack.enter_context(patch(module, "DEVICE", device))
        for module in (kernels, model):
            stack.enter_context(patch(module, "SIZES", dict.fromkeys(("20b", "120b"), TINY)))
            stack.enter_context(patch(module, "hf_config", lambda s: hf_config(s) | {"vocab_size": VOCAB}))
        # the interpreter multiplies bfloat16 as raw bits
        stack.enter_context(patch(torch, "bfloat16", torch.float32))
        for name in ("REPEATS", "PREFILL_REPEATS"):
            stack.enter_context(patch(model, name, 1))
        stack.enter_context(patch(kernels, "time_us", once))
        stack.enter_context(patch(model, "graph_us", once))
        stack.enter_context(patch(model, "graph_time", lambda graphs, batch: 1.0))
        stack.enter_context(patch(cuda_graphs, "CudaGraphs", lambda: lambda forward: forward))
        stack.enter_context(patch(torch.cuda, "synchronize", lambda *_: None))
        for name, value in SMALL.items():
            stack.enter_context(patch(steps, name, value))
        stack.enter_context(patch(steps, "profiled", lambda run, repeats: [("rehearsed", 1.0, 1)]))
        yield


def wanted() -> bool:
    return os.environ.get("REHEARSE") == "1" and "--help" not in sys.argv
