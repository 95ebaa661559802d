"""A step whose threads each go through all layers: the same bits as one thread's, also when threads are kept off the cores."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.cpu.backend import CpuBackend
from gptoss.kernels.cpu.layer_stack import CpuLayerStack
from gptoss.kernels.layers import ExpertWeights, LayerCache, LayerShape, LayerWeights, RopeScaling
from gptoss.kernels.mxfp4 import quantize_mxfp4
from gptoss.kernels.step_layout import StepLayout
from tests.kernels.test_native import bf16

pytestmark = pytest.mark.skipif(native.library() is None, reason="this CPU or machine cannot build the native kernels")

HIDDEN, INTER, EXPERTS, HEADS, GROUPS, LAYERS, BLOCK, BLOCKS = 160, 96, 6, 4, 2, 5, 16, 4
WIDTH = (HEADS + 2 * GROUPS) * 64
SHAPE = LayerShape(
    num_heads=HEADS,
    num_kv_heads=GROUPS,
    head_dim=64,
    windows=(None, 8),
    rope=RopeScaling(150_000.0, 32.0, 32.0, 1.0, 4096),
    max_positions=64,
    rms_norm_eps=1e-5,
    num_experts=EXPERTS,
    local_experts=None,
    experts_per_token=2,
    swiglu_limit=7.0,
)


@pytest.fixture(autouse=True, params=native.available_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    threads = torch.get_num_threads()
    native.choose_instruction_set(request.param)
    yield
    native.choose_instruction_set("auto")
    torch.set_num_threads(threads)


def layer(n: int) -> LayerWeights:
    def weight(*shape: int, seed: int) -> torch.Tensor:
        return bf16(*shape, seed=10 * n + seed, std=shape[-1] ** -0.5)

    w1, w2 = (
        quantize_mxfp4(weight(EXPERTS, rows, columns, seed=rows).float())
        for rows, columns in ((2 * INTER, HIDDEN), (HIDDEN, INTER))
    )
    experts = ExpertWeights(w1, weight(EXPERTS, 2 * INTER, seed=1), w2, weight(EXPERTS, HIDDEN, seed=2))
    return LayerWeights(
        group=n % 2,
        attention_norm=bf16(HIDDEN, seed=n),
        qkv=weight(WIDTH, HIDDEN, seed=3),
        qkv_bias=weight(WIDTH, seed=4),
        sinks=bf16(HEADS, seed=n),
        out=weight(HIDDEN, HEADS * 64, seed=5),
        out_bias=weight(HIDDEN, seed=6),
        mlp_norm=bf16(HIDDEN, seed=n + 1),
        router=weight(EXPERTS, HIDDEN, seed=7),
        router_bias=weight(EXPERTS, seed=8),
        experts=experts,
    )


def caches() -> list[LayerCache]:
    shape = (BLOCKS, BLOCK, GROUPS, 64)
    return [LayerCache(bf16(*shape, seed=n), bf16(*shape, seed=n + 50)) for n in range(LAYERS)]


def stack() -> CpuLayerStack:
    made = CpuBackend(SHAPE).layer_stack([layer(n) for n in range(LAYERS)])
    assert made is not None
    return made


def run(layers: CpuLayerStack, cache: list[LayerCache], start: int, tokens: int) -> torch.Tensor:
    tables = [np.array([2, 0, 3, 1])]
    step = CpuBackend(SHAPE).prepare_step(StepLayout.of([start], [tokens], (tables, tables), BLOCK))
    return layers(bf16(tokens, HIDDEN, seed=start), cache, step)


@pytest.mark.parametrize("threads", [2, 3, 6])
def test_steps_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    layers = stack()
    sizes = [1, 3, 1, 8, 9, 1, 2] * 2
    torch.set_num_threads(1)
    cache = caches()
    wanted = [run(layers, cache, sum(sizes[:n]), size) for n, size in enumerate(sizes)]
    torch.set_num_threads(threads)  # more than cores: some are late in each step
    for _ in range(15):
        own = caches()
        for n, size in enumerate(sizes):
            assert torch.equal(run(layers, own, sum(sizes[:n]), size), wanted[n])
        native.settle()
        assert all(torch.equal(a.key, b.key) and torch.equal(a.value, b.value) for a, b in zip(cache, own, strict=True))


def test_memory_is_freed_when_late_threads_have_left_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(native, "settle", lambda: calls.append(None))
    layers = stack()
    run(layers, caches(), 0, 1)
    assert len(calls) == 1
    run(layers, caches(), 0, 1)  # other caches: the earlier ones are freed
    assert len(calls) == 2
    del layers
    gc.collect()
    assert len(calls) == 3
