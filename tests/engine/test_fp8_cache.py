"""A KV cache and an output head in FP8 through the whole engine, on plain torch: memory, scales, the same answer in any batch, ranks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss.config.errors import ConfigError
from gptoss.engine.core.core import EngineCore
from gptoss.engine.messages import AddRequest
from gptoss.engine.model.checkpoint import Checkpoint
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.tensor_source import CheckpointError
from gptoss.engine.parallel.device_placement import choose_devices
from gptoss.engine.parallel.memory_plan import GB, make_plan, weight_bytes
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.worker import Worker
from gptoss.kernels.cpu import native
from gptoss.kernels.fp8 import FP8
from tests.engine.test_memory_plan import config as dummy_config
from tests.support.gguf_files import make_small
from tests.support.helpers import assert_close, engine_config

PROMPT = random.Random(1).choices(range(288), k=60)
Answer = list[tuple[int, float]]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small(tmp_path_factory.mktemp("small") / "model")


def core(folder: Path, **changes: Any) -> EngineCore:
    options: dict[str, Any] = {"batch_invariant": True, "kv_cache_dtype": "fp8", "max_num_batched_tokens": 512}
    return EngineCore(engine_config(folder, **(options | changes)))


def run(engine: EngineCore, prompts: dict[str, list[int]], tokens: int = 4) -> dict[str, Answer]:
    for name, prompt in prompts.items():
        params = SamplingParams(max_tokens=tokens, seed=3, temperature=0.8, logprobs=0, ignore_eos=True)
        assert engine.add_request(AddRequest(name, prompt, params)) is None
    answers: dict[str, Answer] = {name: [] for name in prompts}
    while engine.has_work:
        for output in engine.step():
            pairs = zip(output.token_ids, output.logprobs or [], strict=True)
            answers[output.request_id] += [(token, numbers.logprob) for token, numbers in pairs]
    engine.kv.check_integrity()
    return answers


@pytest.fixture(scope="module")
def alone(small: Path) -> Answer:
    return run(core(small, enable_prefix_caching=False), {"r": PROMPT})["r"]


def test_an_answer_is_the_same_alone_in_a_batch_in_chunks_and_from_the_prefix_cache(small: Path, alone: Answer) -> None:
    assert len(alone) == 4
    engine = core(small, max_num_batched_tokens=23)
    others = {f"o{i}": PROMPT[i : 7 * i + 2] for i in range(1, 4)}
    assert run(engine, {**others, "r": PROMPT})["r"] == alone
    assert run(engine, {"again": PROMPT})["again"] == alone
    assert engine.kv.num_hit_tokens >= 48
    assert run(core(small, kv_cache_dtype="auto"), {"r": PROMPT})["r"] != alone


@pytest.mark.nightly
@pytest.mark.parametrize("layout", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_ranks_agree_with_one(small: Path, alone: Answer, layout: str) -> None:
    """But for what falls on the other side of a tie, as sums have another order."""
    options = {layout: 2, "num_threads": 1, "kv_cache_dtype": "fp8", "batch_invariant": True}
    engine = EngineCore(choose_devices(engine_config(small, **options)))
    try:
        assert len(engine.executor.ranks) == 2
        found = run(engine, {"r": PROMPT}, tokens=1)["r"]
    finally:
        engine.executor.shutdown()
    assert [token for token, _ in found] == [alone[0][0]]
    assert found[0][1] == pytest.approx(alone[0][1], abs=0.05)


def test_the_cache_holds_as_many_more_tokens_as_its_numbers_are_smaller(small: Path) -> None:
    blocks = {}
    for name in ("auto", "fp8", "fp8_e4m3"):
        config = engine_config(small, kv_cache_dtype=name, cpu_kv_cache_gib=0.001, max_num_seqs=64)
        worker = Worker(config)
        worker.load()
        blocks[name] = worker.init_cache()
        assert worker.runner._cache[0].key.dtype == (torch.float32 if name == "auto" else FP8)
        assert worker.kv_cache_bytes <= 0.001 * 2**30
    assert blocks["fp8"] == blocks["fp8_e4m3"] == pytest.approx(4 * blocks["auto"], abs=4)


def test_the_plan_has_twice_the_tokens_of_bfloat16() -> None:
    plain, fp8 = (
        make_plan(
            dummy_config("20b", kv_cache_dtype=name), [24 * GB], [24 * GB], tensor_size=1, stages=1, element=2
        ).ranks[0]
        for name in ("auto", "fp8")
    )
    assert plain.kv_bytes_per_token == 2 * fp8.kv_bytes_per_token == 24 * 1024
    assert plain.kv_bytes == fp8.kv_bytes


def test_a_head_in_fp8_takes_the_planned_bytes_and_computes(small: Path) -> None:
    plain, fp8 = (Worker(engine_config(small, lm_head_dtype=name)) for name in ("auto", "fp8"))
    for worker in (plain, fp8):
        worker.load()
    c = plain.config.model
    saved = weight_bytes(c, whole(c), 4) - weight_bytes(c, whole(c), 4, lm_head_dtype="fp8")
    assert plain.weight_bytes - fp8.weight_bytes == saved == c.vocab_size * (3 * c.hidden_size - 4)
    memory = [24 * GB]
    plans = [
        make_plan(dummy_config("20b", lm_head_dtype=name), memory, memory, tensor_size=1, stages=1, element=2).ranks[0]
        for name in ("auto", "fp8")
    ]
    assert plans[0].weight_bytes - plans[1].weight_bytes == 201_088 * (2880 - 4)
    x = torch.randn(3, c.hidden_size, generator=torch.Generator().manual_seed(0))
    wanted, found = (
        w.kernels.norm_head(x, torch.arange(3), w.model.weights.final_norm, w.model.weights.lm_head, None)
        for w in (plain, fp8)
    )
    assert_close("logits", wanted, found, 0.04)
    assert not torch.equal(wanted, found)


def test_what_cannot_have_it_is_a_start_up_error_that_names_the_flag() -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype 'fp8' \(--kv-cache-dtype\) needs backend 'native'"):
        dummy_config("20b", kv_cache_dtype="fp8", backend="transformers")
    with pytest.raises(ConfigError, match=r"lm_head_dtype 'fp8' \(--lm-head-dtype\) needs backend 'native'"):
        dummy_config("20b", lm_head_dtype="fp8", backend="transformers")
    if native.library() is not None:
        with pytest.raises(ConfigError, match=r"\(--lm-head-dtype\) 'fp8' is not supported by the native CPU kernels"):
            Worker(dummy_config("20b", lm_head_dtype="fp8", dtype="bfloat16", device="cpu"))
        with pytest.raises(ConfigError, match=r"\(--kv-cache-dtype\) 'fp8' is not supported by the native CPU kernels"):
            Worker(dummy_config("20b", kv_cache_dtype="fp8", dtype="bfloat16", device="cpu"))


NAMES = {
    "ModelOpt": ("k_proj.k_scale", "v_proj.v_scale"),
    "compressed-tensors": ("k_scale", "v_scale"),
    "AMD Quark": ("k_proj.output_scale", "v_proj.output_scale"),
}


def with_scales(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A small checkpoint with further tensors of layer 1's attention."""
    folder = make_small(tmp_path / "model")
    path = next(folder.glob("*.safetensors"))
    added = {f"model.layers.1.self_attn.{name}": value for name, value in tensors.items()}
    save_file(load_file(path) | added, path)
    return folder


@pytest.mark.parametrize("maker", NAMES)
def test_scales_of_the_checkpoint_are_used(tmp_path: Path, maker: str) -> None:
    key, value = NAMES[maker]
    folder = with_scales(tmp_path, {key: torch.tensor([0.5]), value: torch.tensor(0.25, dtype=torch.bfloat16)})
    worker = Worker(engine_config(folder, kv_cache_dtype="fp8"))
    worker.load()
    worker.init_cache()
    assert [(c.key_scale, c.value_scale) for c in worker.runner._cache] == [(1.0, 1.0), (0.5, 0.25)]
    plain = Worker(engine_config(folder))
    plain.load()
    plain.init_cache()
    assert {(c.key_scale, c.value_scale) for c in plain.runner._cache} == {(1.0, 1.0)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"k_scale": torch.tensor([1.0])}, "layer 1 has the scale of its keys or of its values, not both"),
        (
            {"k_scale": torch.ones(2), "v_scale": torch.ones(1)},
            r"self_attn.k_scale' is F32 of shape \(2,\), expected one",
        ),
        ({"k_scale": torch.ones(1), "v_scale": torch.zeros(1)}, "self_attn.v_scale' is 0.0, expected a positive"),
        (
            {"k_scale": torch.ones(1), "v_scale": torch.ones(1, dtype=torch.int32)},
            "v_scale' is I32 of shape",
        ),
    ],
)
def test_scales_that_cannot_be_used_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    folder = with_scales(tmp_path, tensors)
    source = Checkpoint(folder, ModelConfig.from_folder(folder))
    assert source.kv_scales(0) is None
    with pytest.raises(CheckpointError, match=message):
        source.kv_scales(1)
