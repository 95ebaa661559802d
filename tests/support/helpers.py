"""What several tests need: small checkpoints made once, and short ways to drive the parts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gptoss.cli.make_checkpoint import make_checkpoint
from gptoss.engine.config import EngineConfig
from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.checkpoint import Checkpoint
from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import Size
from gptoss.engine.model.weights import ModelWeights, WeightLoader
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import RequestTable, build_batch
from gptoss.engine.worker.sampling.sampling_row import SamplingRow
from gptoss.kernels.backend import DenseDtype, KernelBackend, choose_backend
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.reference.backend import ReferenceBackend
from tests.support.caches import CHECKPOINTS

VERSION = "4"  # raise when make_checkpoint writes other bytes


def checkpoint(size: str = "nano", layout: str = "hf", experts: str = "mxfp4", seed: int = 0) -> Path:
    """A checkpoint of random weights, made at the first call and kept between runs."""
    folder = CHECKPOINTS / f"v{VERSION}-{size}-{layout}-{experts}-{seed}"
    if not (folder / "tokenizer.json").is_file():
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CHECKPOINTS) as temporary:
            made = make_checkpoint(size, Path(temporary) / "made", layout=layout, experts=experts, seed=seed)
            with contextlib.suppress(OSError):  # another process was first
                made.rename(folder)
    return folder


def sized_checkpoint(name: str, size: Size) -> Path:
    """The same for a shape that has no name in the product."""
    folder = CHECKPOINTS / f"v{VERSION}-{name}"
    if not (folder / "config.json").is_file():
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CHECKPOINTS) as temporary:
            made = make_checkpoint(size, Path(temporary) / "made", tokenizer=False)
            with contextlib.suppress(OSError):  # another process was first
                made.rename(folder)
    return folder


@functools.cache
def load_model(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    dequantize: bool = True,
    kernels: str = "auto",
    dense_dtype: DenseDtype = "auto",
) -> GptOss:
    """`kernels`: "torch" for the reference backend."""
    config = ModelConfig.from_folder(folder)
    loader = WeightLoader(Checkpoint(folder, config), config, dtype, dequantize=dequantize)
    return one_rank(config, loader.load(), kernels, dense_dtype)


def one_rank(
    config: ModelConfig, weights: ModelWeights, kernels: str = "auto", dense_dtype: DenseDtype = "auto"
) -> GptOss:
    """The whole model on one rank, of weights as they were loaded."""
    cpu, dtype, shape = torch.device("cpu"), weights.layers[0].router.dtype, layer_shape(config, whole(config), 1 << 17)
    backend: KernelBackend[Any] = choose_backend(cpu, dtype, shape, dense_dtype=dense_dtype)
    if kernels == "torch":
        backend = ReferenceBackend(shape, dtype, cpu)
    weights = dataclasses.replace(weights, layers=[backend.prepare_layer(layer) for layer in weights.layers])
    return GptOss(config, weights, Communicator(whole(config), cpu), backend)


def engine_config(folder: Path, **changes: object) -> EngineConfig:
    defaults: dict[str, object] = {
        "model": ModelConfig.from_folder(folder),
        "model_path": folder,
        "dtype": "float32",
        "device": "cpu",
        "max_model_len": 8192,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 512,
        "cpu_kv_cache_gib": 0.05,
        "block_size": 16,
    }
    return EngineConfig(**(defaults | changes))  # type: ignore[arg-type]


def make_cache(model: GptOss, num_blocks: int, block_size: int, dtype: torch.dtype = torch.float32) -> list[LayerCache]:
    """One cache of its own for each layer, poisoned with NaN: reading what was never written shows."""
    c = model.config
    shape = (num_blocks, block_size, c.num_key_value_heads, c.head_dim)
    return [
        LayerCache(torch.full(shape, torch.nan, dtype=dtype), torch.full(shape, torch.nan, dtype=dtype))
        for _ in c.layer_types
    ]


def model_logits(
    model: GptOss, token_ids: Sequence[int], chunk: int = 1 << 30, block_size: int = 64, every: int = 1, last: int = 0
) -> torch.Tensor:
    """-> float32 [T, V], of each `every`th token of a chunk, or of its `last` ones: the engine's own batch and
    attention code, fed in chunks."""
    dtype = model.weights.embedding.dtype
    num_blocks = -(-len(token_ids) // block_size) + 1
    cache = make_cache(model, num_blocks, block_size, dtype)
    for layer in cache:  # block 0 pads gathered keys, so it must be finite
        layer.key[0] = layer.value[0] = 0
    table, ids, rows = RequestTable(), list(token_ids), []
    blocks = (list(range(1, num_blocks)), list(range(1, num_blocks)))
    new = [NewRequest("r", ids, len(ids), SamplingParams(max_tokens=1, seed=0), blocks, 0)]
    for start in range(0, len(ids), chunk):
        count = min(chunk, len(ids) - start)
        step = table.apply(SchedulerOutput(new, {}, {"r": count}, []))
        new = []
        batch = build_batch(step, model.kernels, block_size)
        wanted = torch.arange(max(0, count - last), count) if last else torch.arange(0, count, every)
        batch = dataclasses.replace(batch, sample_rows=wanted)
        rows.append(model.forward(batch, cache))
        table.finish_step(step, {})
    return torch.cat(rows)


def sampling_row(params: SamplingParams, prompt_ids: np.ndarray, output_ids: np.ndarray) -> SamplingRow:
    return SamplingRow(params, prompt_ids, output_ids)


def relative_rms(reference: torch.Tensor, value: torch.Tensor) -> float:
    """RMS of the difference over RMS of the reference; NaN compares as infinite."""
    if not torch.isfinite(value).all():
        return float("inf")
    difference = value.double() - reference.double()
    return float(difference.square().mean().sqrt() / reference.double().square().mean().sqrt())


def assert_close(name: str, reference: torch.Tensor, value: torch.Tensor, relative: float) -> None:
    assert value.shape == reference.shape, f"{name}: shape {tuple(value.shape)}, expected {tuple(reference.shape)}"
    error = relative_rms(reference, value)
    assert error <= relative, f"{name}: relative RMS error {error:.2e} > {relative:.0e}"
