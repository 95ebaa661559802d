"""The products of LoRA adapters: the compiled kernels against float64, and bit for bit against themselves in other batches."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.layers import ExpertWeights
from gptoss.kernels.lora import LayerAdapter, LayerLora, LoraMatrices, LoraTable, step_lora
from gptoss.kernels.mxfp4 import dequantize_mxfp4, quantize_mxfp4
from gptoss.kernels.reference.lora import LoraRows
from gptoss.kernels.reference.moe import moe_forward_ref
from tests.support.helpers import assert_close

CPU = torch.device("cpu")
NUM_EXPERTS, PER_TOKEN, LIMIT = 5, 2, 7.0


@pytest.fixture(params=native.available_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    if native.library() is None:
        pytest.skip("this CPU or machine cannot build the native kernels")
    native.choose_instruction_set(request.param)
    yield
    native.choose_instruction_set("auto")


def bf16(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).bfloat16()


def matrices(rank: int, inputs: int, outputs: int, seed: int, *experts: int) -> LoraMatrices:
    a, b = bf16(*experts, rank, inputs, seed=seed, std=0.3), bf16(*experts, rank, outputs, seed=seed + 1, std=0.3)
    return LoraMatrices(a, b)


def table(adapters: list[LayerAdapter]) -> LayerLora:
    made = LoraTable(1, len(adapters) + 1, CPU)
    for slot, adapter in enumerate(adapters):
        made.put(slot, [adapter])
    return made.layers[0]


def exact(lora: LayerLora) -> LayerLora:
    """The same adapters in float64."""

    def double(m: LoraMatrices | None) -> LoraMatrices | None:
        return None if m is None else LoraMatrices(m.a.double(), m.b.double())

    adapters = [None if a is None else LayerAdapter(*map(double, a.matrices())) for a in lora.adapters]
    return LayerLora(adapters, lora.addresses)


def slots_of(tokens: int, count: int) -> torch.Tensor:
    """-1 and the slots in turn, so that neighbours differ."""
    return torch.arange(tokens) % (count + 1) - 1


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
@pytest.mark.parametrize("inputs", [32, 80, 200])
def test_native_linear(tokens: int, inputs: int) -> None:
    widths = [96, 33, 16]
    lora = table(
        [
            LayerAdapter(q=matrices(1, inputs, 96, 1), v=matrices(9, inputs, 16, 3)),
            LayerAdapter(q=matrices(16, inputs, 96, 5), k=matrices(8, inputs, 33, 7), v=matrices(3, inputs, 16, 9)),
            LayerAdapter(out=matrices(4, inputs, 96, 1)),
        ]
    )
    x, before, slots = bf16(tokens, inputs), bf16(tokens, sum(widths), seed=2), slots_of(tokens, 3)
    wanted, found = before.double(), before.clone()
    rows = LoraRows(exact(lora), step_lora(slots.numpy(), CPU))
    for module, part in zip("qkv", wanted.split(widths, dim=1), strict=True):
        rows.add(module, x.double(), part)
    native.lora_linear(lora, slots, x, found, "q", widths)
    assert_close("linear", wanted, found, 3e-3)
    assert torch.equal(found[slots == -1], before[slots == -1])
    for t in range(tokens):
        alone = before[t : t + 1].clone()
        native.lora_linear(lora, slots[t : t + 1], x[t : t + 1], alone, "q", widths)
        assert torch.equal(alone[0], found[t])


def experts_of(hidden: int, inter: int, packed: bool) -> tuple[ExpertWeights, ExpertWeights]:
    w1, w2 = (bf16(NUM_EXPERTS, n, k, seed=n, std=0.2) for n, k in ((2 * inter, hidden), (hidden, inter)))
    b1, b2 = bf16(NUM_EXPERTS, 2 * inter, seed=5), bf16(NUM_EXPERTS, hidden, seed=6)
    if not packed:
        return ExpertWeights(w1, b1, w2, b2), ExpertWeights(*(t.double() for t in (w1, b1, w2, b2)))
    p1, p2 = quantize_mxfp4(w1.float()), quantize_mxfp4(w2.float())
    doubles = [
        torch.stack([dequantize_mxfp4(p[e], torch.float32) for e in range(NUM_EXPERTS)]).double() for p in (p1, p2)
    ]
    return ExpertWeights(p1, b1, p2, b2), ExpertWeights(doubles[0], b1.double(), doubles[1], b2.double())


@pytest.mark.usefixtures("instruction_set")
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("tokens", [1, 3, 30])
def test_native_experts(tokens: int, packed: bool) -> None:
    hidden, inter = 96, 64
    weights, doubles = experts_of(hidden, inter, packed)
    e = NUM_EXPERTS
    lora = table(
        [
            LayerAdapter(w1=matrices(3, hidden, 2 * inter, 1, e)),
            LayerAdapter(w2=matrices(16, inter, hidden, 3, e)),
            LayerAdapter(w1=matrices(8, hidden, 2 * inter, 5, e), w2=matrices(1, inter, hidden, 7, e)),
            LayerAdapter(q=matrices(4, hidden, 64, 1)),
        ]
    )
    x, residual, slots = bf16(tokens, hidden), bf16(tokens, hidden, seed=8), slots_of(tokens, 4)
    chosen, shares = native.route(torch.randn(tokens, e, generator=torch.Generator().manual_seed(3)), PER_TOKEN)
    arguments = (weights.w1, weights.b1, weights.w2, weights.b2)
    found = native.moe(x, chosen, shares, *arguments, residual, LIMIT, (lora, slots))
    rows = LoraRows(exact(lora), step_lora(slots.numpy(), CPU))
    wanted = residual.double() + moe_forward_ref(x.double(), chosen, shares, doubles, LIMIT, rows)
    assert_close("experts", wanted, found, 4e-3)
    plain = native.moe(x, chosen, shares, *arguments, residual, LIMIT)
    unadapted = (slots == -1) | (slots == 3)
    assert torch.equal(found[unadapted], plain[unadapted])
    assert tokens == 1 or not torch.equal(found[1], plain[1])
    for t in range(tokens):
        one = slice(t, t + 1)
        alone = native.moe(x[one], chosen[one], shares[one], *arguments, residual[one], LIMIT, (lora, slots[one]))
        assert torch.equal(alone[0], found[t])


def test_a_cleared_slot_adds_nothing() -> None:
    made = LoraTable(2, 2, CPU)
    adapter = LayerAdapter(out=matrices(2, 8, 8, 1))
    made.put(1, [adapter, LayerAdapter()])
    assert made.layers[0].addresses[1, 3].tolist() == [adapter.out.a.data_ptr(), adapter.out.b.data_ptr(), 2]
    made.clear(1)
    assert not any(layer.addresses.any() or any(layer.adapters) for layer in made.layers)
    assert step_lora(None, CPU) is None
    step = step_lora(np.array([-1, 1, 0, 1]), CPU)
    assert step is not None
    assert [(slot, rows.tolist()) for slot, rows in step.groups] == [(0, [2]), (1, [1, 3])]
