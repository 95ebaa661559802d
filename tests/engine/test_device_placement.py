"""Which GPUs and cores each of several engines gets."""

from __future__ import annotations

import dataclasses
import os
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss.config.errors import ConfigError
from gptoss.engine.client import engine_link
from gptoss.engine.config import EngineConfig
from gptoss.engine.core import process
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.parallel import device_placement
from gptoss.engine.parallel.device_placement import place_engines
from gptoss.engine.parallel.gpus import Gpu

GB = 10**9


def config(size: str = "20b", **keys: Any) -> EngineConfig:
    return EngineConfig(ModelConfig.from_json(hf_config(SIZES[size])), None, load_format="dummy", **keys)


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Any:
    def have(*gigabytes: int) -> None:
        gpus = [
            Gpu(i, "card", 24 * GB if free <= 24 else 80 * GB, free * GB, None, None)
            for i, free in enumerate(gigabytes)
        ]
        monkeypatch.setattr(device_placement, "visible_gpus", lambda: gpus)

    return have


def groups(**keys: Any) -> list[tuple[int, ...] | None]:
    return [placed.gpus for placed in place_engines(config(**keys))]


def test_one_engine_is_left_as_it_is(cards: Any) -> None:
    cards(24, 24)
    assert groups() == [None]
    cards()
    assert groups(data_parallel_size=0) == [None]


def test_auto_takes_every_card_that_holds_the_model(cards: Any) -> None:
    cards(24, 24, 24, 24)
    assert groups(data_parallel_size=0) == [(0,), (1,), (2,), (3,)]
    cards(24, 3, 24)
    assert groups(data_parallel_size=0) == [(0,), (2,)]
    cards(80, 80, 80, 80)
    assert groups(size="120b", data_parallel_size=0, tensor_parallel_size=2) == [(0, 1), (2, 3)]
    cards(*[24] * 9)
    assert groups(size="120b", data_parallel_size=0) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    cards(3, 3)
    assert groups(data_parallel_size=0) == [None], "the engine says what is missing"
    cards(24, 24)
    assert groups(data_parallel_size=0, device="cuda:1") == [None]
    assert groups(data_parallel_size=0, backend="transformers") == [(0, 1)]


def test_a_number_of_engines_shares_the_cards_out(cards: Any) -> None:
    cards(*[80] * 8)
    assert groups(data_parallel_size=2) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert groups(data_parallel_size=3, tensor_parallel_size=2) == [(0, 1), (2, 3), (4, 5)]
    assert groups(data_parallel_size=2, tensor_parallel_size=2, pipeline_parallel_size=2) == [
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    ]
    with pytest.raises(ConfigError, match=r"data_parallel_size \(9\) needs 9 GPUs, there are 8"):
        groups(data_parallel_size=9)
    with pytest.raises(ConfigError, match=r"data_parallel_size \(3\) x tensor_parallel_size \(4\) needs 12 GPUs"):
        groups(data_parallel_size=3, tensor_parallel_size=4)
    with pytest.raises(ConfigError, match="device 'cuda:1' is one device"):
        groups(data_parallel_size=2, device="cuda:1")


def test_cores_are_shared_out_over_engines_and_their_ranks(
    cards: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cards()
    monkeypatch.setattr(device_placement, "usable_cores", lambda: 16)

    def threads(**keys: Any) -> list[int]:
        return [placed.num_threads for placed in place_engines(config("nano", **keys))]

    assert threads(data_parallel_size=2) == [8, 8]
    assert threads(data_parallel_size=2, tensor_parallel_size=2, pipeline_parallel_size=2) == [2, 2]
    assert threads(data_parallel_size=3, num_threads=2) == [2, 2, 2] and not caplog.records
    assert threads(data_parallel_size=3, num_threads=8) == [8, 8, 8]
    assert [record.message for record in caplog.records] == ["3 engines of 8 threads share 16 cores: fewer are faster"]


def test_engines_that_do_not_fit_into_the_memory_together_are_refused(
    cards: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cards()
    monkeypatch.setattr(device_placement.psutil, "virtual_memory", lambda: SimpleNamespace(available=34 * GB))
    assert len(place_engines(config(data_parallel_size=2, max_num_batched_tokens=64))) == 2
    with pytest.raises(ConfigError, match="the model does not fit: each of 3 engines needs 1"):
        place_engines(config(data_parallel_size=3, max_num_batched_tokens=64))


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [(None, (2, 3), "2,3"), ("4, 6,7", (1, 2), "6,7"), ("GPU-ab,GPU-cd", (1,), "GPU-cd")],
)
def test_an_engine_sees_its_own_cards_only(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, gpus: tuple[int, ...], expected: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    seen: list[str | None] = []
    monkeypatch.setattr(process, "run_engine", lambda *_: seen.append(os.environ.get("CUDA_VISIBLE_DEVICES")))
    engine_link._child(dataclasses.replace(config(), gpus=gpus), "", "", os.getpid(), {})
    assert seen == [expected]


FP8_FLAGS = {"kv_cache_dtype": "--kv-cache-dtype", "lm_head_dtype": "--lm-head-dtype"}


@pytest.mark.parametrize("key", FP8_FLAGS)
@pytest.mark.parametrize("engines", [0, 1, 2])
def test_fp8_needs_a_gpu_that_has_it(monkeypatch: pytest.MonkeyPatch, key: str, engines: int) -> None:
    def placed(*capabilities: tuple[int, int] | None, **keys: Any) -> int:
        gpus = [Gpu(i, f"card {i}", 80 * GB, 80 * GB, None, None, pair) for i, pair in enumerate(capabilities)]
        monkeypatch.setattr(device_placement, "visible_gpus", lambda: gpus)
        return len(place_engines(config(data_parallel_size=engines, **{key: "fp8"}, **keys)))

    needs = rf"{key} 'fp8' \({FP8_FLAGS[key]}\) needs a GPU of sm_89 or later, and this "
    for keys in ({}, {"device": "cpu"}, {"dtype": "bfloat16"}):
        with pytest.raises(ConfigError, match=needs + "server would run on the CPU; drop it"):
            placed(**keys)
    with pytest.raises(ConfigError, match=needs + "server would run on the CPU"):
        placed((9, 0), device="cpu")
    with pytest.raises(ConfigError, match=needs + r"machine has 0: card 0 \(sm_80\), 1: card 1 \(sm_86\); drop it"):
        placed((8, 0), (8, 6))
    with pytest.raises(ConfigError, match=needs + r"machine has 1: card 1 \(sm_86\)"):
        placed((9, 0), (8, 6), device="cuda:1")
    assert placed((8, 9), (9, 0)) and placed((8, 0), (8, 9)) and placed(None, (8, 0)), "the engine checks its own"
    if engines < 2:  # several need more than one device
        assert placed((8, 9), (8, 0), device="cuda:0")


def test_both_parts_in_fp8_are_named_at_once_and_plain_torch_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_placement, "visible_gpus", lambda: [])
    both = {"kv_cache_dtype": "fp8_e4m3", "lm_head_dtype": "fp8"}
    named = r"'fp8_e4m3' \(--kv-cache-dtype\) and lm_head_dtype 'fp8' \(--lm-head-dtype\) need a GPU .* drop them"
    with pytest.raises(ConfigError, match=named):
        place_engines(config(**both))
    assert len(place_engines(config(**both, dtype="float32"))) == 1
    assert len(place_engines(config(**both, device="cuda"))) == 1, "the engine says that there is no GPU"
