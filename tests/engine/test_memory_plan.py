"""The plan before loading: true sizes, right choices, errors with numbers."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.model.weights import iterate_tensors
from gptoss.engine.parallel.gpus import chosen_devices
from gptoss.engine.parallel.memory_plan import (
    GB,
    MemoryPlan,
    activation_bytes,
    choose_plan,
    graph_bytes,
    kv_bytes_per_token,
    make_plan,
    stage_layers,
    weight_bytes,
)
from gptoss.engine.parallel.shards import make_shard, split, split_layers, whole
from gptoss.engine.worker.device_choice import listed_dtype
from gptoss.engine.worker.worker import Worker
from gptoss.kernels.backend import DenseDtype
from gptoss.kernels.cpu import native
from tests.support.helpers import checkpoint, load_model


def config(size: str, **options: Any) -> EngineConfig:
    return EngineConfig(ModelConfig.from_json(hf_config(SIZES[size])), None, load_format="dummy", **options)


def plan(size: str, cards: int, gigabytes: int, **options: Any) -> MemoryPlan:
    memory = [gigabytes * GB] * cards
    return choose_plan(config(size, **options), memory, memory, element=2)


@pytest.mark.parametrize(
    ("size", "cards", "gigabytes", "mode", "ranks"),
    [
        ("20b", 1, 24, "single", 1),
        ("20b", 1, 80, "single", 1),
        ("20b", 2, 24, "single", 1),
        ("20b", 2, 12, "pipeline", 2),
        ("20b", 4, 8, "pipeline", 3),
        ("120b", 1, 80, "single", 1),
        ("120b", 4, 24, "tensor", 4),
        ("120b", 2, 48, "tensor", 2),
        ("120b", 4, 80, "single", 1),
        ("120b", 8, 24, "tensor", 4),
        ("120b", 1, 141, "single", 1),
    ],
)
def test_auto_chooses_by_free_memory(size: str, cards: int, gigabytes: int, mode: str, ranks: int) -> None:
    found = plan(size, cards, gigabytes)
    assert (found.gpu_mode, len(found.ranks)) == (mode, ranks)
    assert found.kv_tokens >= 65_536
    for rank in found.ranks:
        assert rank.weight_bytes + rank.activation_bytes + rank.kv_bytes < rank.free_bytes


@pytest.mark.parametrize(
    ("size", "cards", "gigabytes", "hint"),
    [
        ("120b", 1, 24, "4 such devices are enough; --model 20b"),
        ("120b", 2, 24, "4 such devices"),
        ("20b", 1, 12, "2 such devices"),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_numbers(size: str, cards: int, gigabytes: int, hint: str) -> None:
    with pytest.raises(ConfigError, match="does not fit") as error:
        plan(size, cards, gigabytes)
    assert hint in str(error.value)
    assert len(re.findall(r"\d+\.\d GB", str(error.value))) >= 5


def test_a_shorter_context_is_named_when_that_would_fit() -> None:
    with pytest.raises(ConfigError, match="does not fit") as error:
        plan("20b", 1, 18)
    tokens = int(re.search(r"--max-model-len (\d+) fits", str(error.value))[1])  # type: ignore[index]
    assert plan("20b", 1, 18, max_model_len=tokens).gpu_mode == "single"


def test_published_sizes() -> None:
    """The files of openai/gpt-oss-20b and -120b hold 13.76 and 65.25 GB of tensors."""
    for size, gigabytes in (("20b", 13.76), ("120b", 65.25)):
        c = config(size).model
        assert weight_bytes(c, whole(c), 2) / GB == pytest.approx(gigabytes, abs=0.01)


@pytest.mark.parametrize(
    ("experts", "dense_dtype"),
    [
        ("mxfp4", "auto"),
        ("bf16", "auto"),
        pytest.param(
            "mxfp4", "int8", marks=pytest.mark.skipif(native.library() is None, reason="no native CPU kernels")
        ),
    ],
)
def test_planned_bytes_are_loaded_bytes(experts: str, dense_dtype: DenseDtype) -> None:
    import torch

    model = load_model(checkpoint(experts=experts), torch.bfloat16, dequantize=False, dense_dtype=dense_dtype)
    loaded = sum(t.nbytes for t in iterate_tensors(model.weights))
    assert weight_bytes(model.config, whole(model.config), 2, dense_dtype) == loaded


def test_int8_takes_half_of_the_dense_bytes_from_the_plan() -> None:
    c = config("20b").model
    numbers = 24 * (5120 * 2880 + 2880 * 4096) + 201_088 * 2880
    scales = 4 * (24 * (5120 + 2880) + 201_088)
    saved = weight_bytes(c, whole(c), 2) - weight_bytes(c, whole(c), 2, "int8")
    assert saved == numbers - scales
    memory = [24 * GB]
    plans = [
        make_plan(config("20b", dense_dtype=name), memory, memory, tensor_size=1, stages=1, element=2)
        for name in ("auto", "int8")
    ]
    assert plans[0].ranks[0].weight_bytes - plans[1].ranks[0].weight_bytes == saved


@pytest.mark.parametrize(
    ("options", "word"),
    [({"backend": "transformers"}, "backend"), ({"device": "cuda"}, "device"), ({"dtype": "float16"}, "dtype")],
)
def test_int8_with_a_key_that_rules_it_out_is_refused(options: dict[str, str], word: str) -> None:
    with pytest.raises(ConfigError, match=rf"--dense-dtype.* {word} '{options[word]}'"):
        config("20b", dense_dtype="int8", **options)


def test_int8_without_the_compiled_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(ConfigError, match=r"dense_dtype \(--dense-dtype\) 'int8' needs the native CPU kernels"):
        Worker(config("20b", dense_dtype="int8", dtype="bfloat16", device="cpu"))


def test_parts_add_up_to_the_model() -> None:
    c = config("120b").model
    layers = stage_layers(c, 2, 4)
    shards = [make_shard(c, r, tensor_size=4, stage_layers=layers, expert_parallel=False) for r in range(8)]
    assert [len(s.intermediate) for s in shards[:4]] == [736, 736, 704, 704], "whole blocks of 32: 23, 23, 22, 22"
    for stage in (shards[:4], shards[4:]):
        assert sum(len(s.query_heads) for s in stage) == 64 and sum(len(s.vocab) for s in stage) == c.vocab_size
    total = sum(weight_bytes(c, s, 2) for s in shards)
    assert total == pytest.approx(weight_bytes(c, whole(c), 2), rel=0.01)  # norms, routers and biases are doubled
    by_experts = [make_shard(c, r, tensor_size=4, stage_layers=[range(36)], expert_parallel=True) for r in range(4)]
    assert [len(s.experts) for s in by_experts] == [32] * 4 and len(by_experts[0].intermediate) == 2880


def test_full_and_sliding_layers_share_a_pool() -> None:
    c = config("20b").model
    layers, heads, head_dim, key_and_value, bfloat16 = 12, 8, 64, 2, 2
    assert kv_bytes_per_token(c, whole(c), 2) == layers * heads * head_dim * key_and_value * bfloat16
    part = make_shard(c, 1, tensor_size=2, stage_layers=[range(3), range(3, 24)], expert_parallel=False)
    assert kv_bytes_per_token(c, part, 2) == 2 * 4 * head_dim * key_and_value * bfloat16


def test_stages_are_balanced_by_bytes() -> None:
    assert split_layers([10] * 5, 20, 20, 3) == [range(0, 1), range(1, 4), range(4, 5)]
    assert split_layers([1] * 4, 0, 0, 2) == [range(0, 2), range(2, 4)]
    assert split_layers([1, 1, 1, 9], 0, 0, 2) == [range(0, 3), range(3, 4)]
    assert split(90, 4) == [range(0, 23), range(23, 46), range(46, 68), range(68, 90)]
    with pytest.raises(ConfigError, match="pipeline_parallel_size"):
        split_layers([1, 1], 0, 0, 3)


def test_the_plan_says_why_a_card_holds_more_than_wished() -> None:
    assert any("above 15 GB" in line for line in plan("120b", 4, 24).lines())
    assert not any("above" in line for line in plan("120b", 8, 24, tensor_parallel_size=8).lines())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size"),
        ({"tensor_parallel_size": 8}, "needs 8 devices"),
        ({"gpu_mode": "tensor"}, "needs 2 devices"),
    ],
)
def test_a_layout_that_cannot_be(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        plan("20b", 4 if "tensor_parallel_size" in options else 1, 80, **options)


def test_wishes_beat_the_automatic_choice() -> None:
    assert plan("20b", 4, 80, gpu_mode="tensor").gpu_mode == "tensor"
    assert plan("120b", 4, 80, gpu_mode="pipeline").gpu_mode == "pipeline"
    both = plan("120b", 4, 80, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert (both.gpu_mode, len(both.ranks)) == ("tensor+pipeline", 4)


def test_visible_devices_as_cuda_reads_them() -> None:
    uuids = ["GPU-aaaa-1", "GPU-bbbb-2", "GPU-cccc-3"]
    assert chosen_devices("2,0", uuids) == [2, 0]
    assert chosen_devices("GPU-bbbb", uuids) == [1]
    assert chosen_devices("0,7,1", uuids) == [0], "CUDA stops at the first that is none"
    assert chosen_devices("1,1,2", uuids) == [1], "and at one that was named before"
    assert chosen_devices("", uuids) == chosen_devices("-1", uuids) == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Tesla V100-SXM2-32GB", "float16"),
        ("NVIDIA A100-SXM4-80GB", "bfloat16"),
        ("NVIDIA H200", "bfloat16"),
        ("NVIDIA GeForce RTX 3090", "float16"),
        ("NVIDIA GeForce RTX 4090", "bfloat16"),
        ("NVIDIA L4", None),
    ],
)
def test_the_table_of_types(name: str, expected: str | None) -> None:
    from gptoss.config.schema import ServerConfig

    table = ServerConfig().gpu_dtypes
    assert listed_dtype(name, dict(table)) == expected
    assert listed_dtype("NVIDIA H100 PCIe", {"H100": "float16", "H100 PCIe": "bfloat16"}) == "bfloat16"


def test_kept_logits_and_parts_of_attention_are_planned() -> None:
    """A step's temporaries grow with the requests by the logits that graphs keep, the sampler's copies, and the parts
    that programs leave of a sequence's keys."""
    c = config("20b").model
    few, many = (activation_bytes(c, whole(c), 2, 8192, n) for n in (32, 256))
    logits = 5 * (256 - 32) * c.vocab_size * 4
    parts = (64 - 32) * c.num_attention_heads * 92 * (c.head_dim + 2) * 4
    assert many - few == logits + parts


def test_what_graphs_keep_is_planned() -> None:
    graphed = config("20b")
    c, shard = graphed.model, whole(graphed.model)
    eager = dataclasses.replace(graphed, enforce_eager=True)
    assert graph_bytes(eager, shard, 2) == 0
    many = dataclasses.replace(graphed, max_num_seqs=64)
    logits = (64 - 32) * c.vocab_size * 4
    parts = (64 - 32) * c.num_attention_heads * 92 * (c.head_dim + 2) * 4
    more = graph_bytes(many, shard, 2) - graph_bytes(graphed, shard, 2) - logits - parts
    assert 0 < more < 30e6, "two more graphs, and their block tables"
    plans = [choose_plan(one, [80 * GB], [80 * GB], element=2).ranks[0] for one in (graphed, eager)]
    assert plans[1].kv_bytes - plans[0].kv_bytes == graph_bytes(graphed, shard, 2)


@pytest.mark.parametrize(("utilization", "left"), [(0.5, 12e9), (0.999, None)])
def test_the_cache_leaves_room_for_a_step(
    monkeypatch: pytest.MonkeyPatch, utilization: float, left: float | None
) -> None:
    import torch

    from gptoss.engine.worker.worker import Worker

    engine = dataclasses.replace(config("20b"), gpu_memory_utilization=utilization, max_num_seqs=64, device="cpu")
    worker = Worker(engine)
    worker.device, worker.dtype = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10 * 10**9, 24 * 10**9))
    step = activation_bytes(engine.model, worker.shard, 2, engine.max_num_batched_tokens, 64)
    step += graph_bytes(engine, worker.shard, 2)
    expected = 10e9 - (left or step)
    assert worker._cache_bytes() == pytest.approx(max(0.0, expected), abs=2)


def test_adapters_take_their_bytes_from_the_kv_cache() -> None:
    plain = choose_plan(config("20b"), [80 * GB], [80 * GB], element=2)
    options = {"lora_dir": Path("/"), "max_loras": 4, "max_lora_rank": 16}
    attention = choose_plan(config("20b", **options), [80 * GB], [80 * GB], element=2).ranks[0]
    # rank 16, four adapters, two bytes: the inputs and outputs of Q, K, V, O and the router of 24 layers
    assert attention.lora_bytes == 4 * 16 * 2 * 24 * (5 * 2880 + 2 * (4096 + 512) + 32)
    assert attention.kv_bytes == plain.ranks[0].kv_bytes - attention.lora_bytes
    given = choose_plan(config("20b", **options, max_lora_bytes=GB), [80 * GB], [80 * GB], element=2)
    assert given.ranks[0].lora_bytes == GB
    assert "adapters 1.00 GB, KV" in given.lines()[1]
    two = make_plan(
        config("20b", **options, max_lora_bytes=GB), [80 * GB] * 2, [80 * GB] * 2, tensor_size=1, stages=2, element=2
    )
    assert sum(rank.lora_bytes for rank in two.ranks) == GB
    assert choose_plan(config("20b", max_lora_bytes=GB), [80 * GB], [80 * GB], element=2).ranks[0].lora_bytes == 0
