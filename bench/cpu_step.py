"""Measures parts of a step on the CPU, alternating with the torch functions and separate calls that they replace.

    python bench/cpu_step.py

Then the products of one token in the shapes of gpt-oss-20b, whose weights' GB/s stand beside those of a plain read.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cpu_products import DENSE, MoeWeights, Version, dense, experts, roofs
from gptoss.embedded.unfold import ASSET, unfold
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.gpt_oss import GptOss
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import RequestTable, build_batch
from gptoss.engine.worker.device_choice import set_threads
from gptoss.engine.worker.sampling.sampler import _pick, _pick_natively
from gptoss.engine.worker.sampling.sampling_row import SamplingRow
from gptoss.engine.worker.worker import Worker
from gptoss.kernels.cpu import native

VOCAB = 201_088
REPEAT = 60
CONTEXT = 100
SAMPLING = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
}


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(REPEAT + 5):
        for function, taken in zip((ours, theirs), times, strict=True):
            started = time.perf_counter()
            function()
            if turn >= 5:
                taken.append(1e3 * (time.perf_counter() - started))
    one, other = (statistics.median(taken) for taken in times)
    print(f"{name:40} {one:7.3f} ms {other:7.3f} ms  {other / one:5.1f}x")


def sampling() -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0)) * 3
    mask = np.empty((0, VOCAB // 32), np.int32)
    for name, options in SAMPLING.items():
        for count in (1, 4):
            rows = [
                SamplingRow(SamplingParams(max_tokens=9, seed=n, **options), np.arange(9), np.arange(n))
                for n in range(count)
            ]
            compare(
                f"{count} rows, {name}",
                lambda rows=rows: _pick_natively(logits[: len(rows)].clone(), rows, [], mask),
                lambda rows=rows: _pick(logits[: len(rows)].clone(), rows, [], mask),
            )


def layers(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    worker = Worker(EngineConfig(config, folder, dtype="bfloat16", cpu_kv_cache_gib=0.1))
    worker.load()
    worker.init_cache()
    model, cache = worker.model, worker.runner._cache
    assert isinstance(model, GptOss) and None not in model._stacks
    at_once = model._stacks
    table = RequestTable()
    size = 64
    params = SamplingParams(max_tokens=9, seed=0)
    new = NewRequest("r", list(range(CONTEXT + 1)), CONTEXT + 1, params, ([1, 2], [3, 4]), CONTEXT)
    rows = table.apply(SchedulerOutput([new], {}, {"r": 1}, []))
    batch = build_batch(rows, worker.kernels, size)
    batch = dataclasses.replace(batch, sample_rows=batch.sample_rows[:0])

    def run(one_call: bool) -> None:
        model._stacks = at_once if one_call else [None]
        model.forward(batch, cache)

    compare("nano's layers, one token", lambda: run(True), lambda: run(False))


def products() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        read, _ = roofs(Path(temporary))
    print(f"{'plain read':26}{read:9.1f} GB/s")
    ours = [Version(None)]
    for name in DENSE:
        dense(name, 1, ours)
    experts(1, MoeWeights(), ours)


def main() -> None:
    if native.library() is None:
        sys.exit("the CPU kernels do not run here")
    set_threads(0)
    print(f"{'':40} {'ours':>10} {'instead':>10}")
    sampling()
    with tempfile.TemporaryDirectory() as temporary:
        layers(unfold(ASSET, Path(temporary)))
    products()


if __name__ == "__main__":
    main()
