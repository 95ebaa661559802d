"""Models whose layers have numbers of experts and windows of their own, beside the formulas written out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.model.checkpoint import Checkpoint
from gptoss.engine.model.model_config import FULL, SLIDING, WIDE, ModelConfig
from gptoss.engine.model.named_sizes import Size, hf_config
from gptoss.engine.model.tensor_source import CheckpointError
from gptoss.engine.model.weights import WeightLoader, iterate_tensors
from gptoss.engine.parallel.memory_plan import kv_bytes_per_token, weight_bytes
from gptoss.engine.parallel.shards import make_shard, whole
from gptoss.engine.worker.worker import Worker
from gptoss.kernels.cpu import native
from tests.support.gguf_files import make_small, read_tensors
from tests.support.helpers import assert_close, engine_config, load_model, model_logits, relative_rms
from tests.support.reference_model import ReferenceModel
from tests.support.tiers import nightly_except

SIZE = Size(layers=4, hidden=64, intermediate=32, experts=8, heads=2, kv_heads=1)
BLOCKS = [
    {"num_local_experts": 8, "sliding_window": 16},
    {"num_local_experts": 4, "sliding_window": 48},
    {"num_local_experts": 8, "sliding_window": None},
    {"num_local_experts": 6, "sliding_window": 48},
]
KEYS: dict[str, Any] = {"model_type": "gpt_oss_puzzle", "block_configs": BLOCKS}
IDS = [(7 * i * i + 3 * i) % 280 for i in range(90)]  # longer than both windows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("differ") / "model", SIZE, **KEYS)


def test_the_shape_has_each_layers_numbers(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    assert config.layer_types == (SLIDING, WIDE, FULL, WIDE)
    assert (config.sliding_window, config.wide_window, config.layer_experts) == (16, 48, (8, 4, 8, 6))
    assert config.cache_kinds == (SLIDING, FULL, FULL, FULL)


@torch.inference_mode()
@pytest.mark.parametrize("chunk", nightly_except(90, 16, of=[90, 16, 1]))
def test_the_logits_are_those_of_the_formulas(folder: Path, chunk: int) -> None:
    reference = ReferenceModel(folder).logits(IDS)
    found = model_logits(load_model(folder, kernels="torch"), IDS, chunk, block_size=16)
    assert_close("logits", reference, found, 1e-4)


@torch.inference_mode()
def test_each_window_and_each_expert_count_matters(folder: Path) -> None:
    """The test above would see a wrong window: the formulas with another one give other logits."""
    reference = ReferenceModel(folder)
    right = reference.logits(IDS)
    for layer in (0, 1):
        other = [dict(block) for block in BLOCKS]
        other[layer]["sliding_window"] = None
        reference.config = reference.config | {"block_configs": other}
        assert relative_rms(right, reference.logits(IDS)) > 1e-3


@torch.inference_mode()
@pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")
def test_the_native_kernels_agree_whatever_the_chunks(folder: Path) -> None:
    model = load_model(folder, torch.bfloat16, dequantize=False)
    assert model.kernels.name == "native" and model._stacks == [None]
    whole_prompt, chunks = (model_logits(model, IDS, chunk, block_size=16) for chunk in (90, 7))
    assert torch.equal(whole_prompt, chunks)
    assert_close("logits", ReferenceModel(folder).logits(IDS), whole_prompt, 3e-2)


def test_the_memory_plan_counts_what_is_loaded(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    loader = WeightLoader(Checkpoint(folder, config), config, torch.bfloat16, dequantize=False)
    assert weight_bytes(config, whole(config), 2) == sum(t.nbytes for t in iterate_tensors(loader.load()))
    assert kv_bytes_per_token(config, whole(config), 2) == 3 * 2 * 64 * 2, "three layers keep the whole history"


def test_a_server_of_such_a_model_has_a_cache_for_it(folder: Path) -> None:
    worker = Worker(engine_config(folder))
    worker.load()
    assert worker.init_cache() > 4
    worker.close()


def test_tensor_parallel_ranks_have_each_layers_experts(folder: Path) -> None:
    config = dataclasses.replace(ModelConfig.from_folder(folder), intermediate_size=64)
    shard = make_shard(config, 1, tensor_size=2, stage_layers=[range(4)], expert_parallel=False)
    assert [min(len(shard.experts), config.experts_of(n)) for n in shard.layers] == [8, 4, 8, 6]
    with pytest.raises(ConfigError, match="enable_expert_parallel: this model's layers differ"):
        make_shard(config, 0, tensor_size=2, stage_layers=[range(4)], expert_parallel=True)


def test_scales_of_a_quantised_cache_are_left_out_and_wrong_experts_named(folder: Path, tmp_path: Path) -> None:
    tensors = read_tensors(folder)
    tensors |= {f"model.layers.{n}.self_attn.attn.{x}_scale": torch.ones(1) for n in range(4) for x in "kv"}
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file(tensors, tmp_path / "model.safetensors")
    config = ModelConfig.from_folder(tmp_path)
    Checkpoint(tmp_path, config)
    tensors["model.layers.1.mlp.router.bias"] = torch.zeros(8, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.router\.bias' has shape \(8,\), expected \(4,\)"):
        Checkpoint(tmp_path, config)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (None, "block_configs must be a list with an entry for each layer"),
        (BLOCKS[:3], "block_configs must be a list with an entry for each layer"),
        ([*BLOCKS[:3], {"sliding_window": 16}], r"block_configs\[3\] lacks num_local_experts"),
        ([*BLOCKS[:3], {"num_local_experts": 0, "sliding_window": 16}], r"block_configs\[3\]\.num_local_experts is 0"),
        ([*BLOCKS[:3], {"num_local_experts": 8, "sliding_window": "x"}], r"block_configs\[3\]\.sliding_window is 'x'"),
        ([*BLOCKS[:3], {"num_local_experts": 8, "sliding_window": 99}], "has 3 sizes of windows, 1 or 2 are supported"),
        ([{"num_local_experts": 8, "sliding_window": None}] * 4, "has 0 sizes of windows"),
    ],
)
def test_blocks_that_cannot_be_served_are_named(blocks: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_json(hf_config(SIZE) | KEYS | {"block_configs": blocks})


def test_adapters_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layers differ in their number of experts"):
        EngineConfig(ModelConfig.from_folder(folder), folder, lora_dir=tmp_path)
    assert json.loads((folder / "config.json").read_text())["block_configs"] == BLOCKS
