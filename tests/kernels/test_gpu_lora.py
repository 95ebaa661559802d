"""The Triton kernels of LoRA adapters against plain torch: one by one, and in a whole model."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.weights import dummy_weights
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.lora import LayerAdapter, LoraMatrices, LoraTable, step_lora
from gptoss.kernels.reference.backend import ReferenceBackend
from gptoss.kernels.reference.lora import LoraRows
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton import fused_layers
from gptoss.kernels.triton.backend import TritonBackend
from gptoss.kernels.triton.lora import LayerAdapters
from gptoss.kernels.triton.metadata import triton_lora
from tests.kernels.gpu_helpers import DEVICE, TYPE, assert_close, normal, on_device
from tests.kernels.test_gpu_model import BLOCK_SIZE, CONFIG, NUM_BLOCKS
from tests.support.tiers import nightly_except, sized

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]


STEPS = sized([([1, 3, 4], [1, -1, 0])], nightly=[([1, 1, 1], [1, -1, 0]), ([1, 9, 30, 4], [1, -1, 0, 1])])


def matrices(generator: torch.Generator, rank: int, inputs: int, outputs: int, *experts: int) -> LoraMatrices:
    a, b = (normal(generator, *experts, rank, n, std=0.2) for n in (inputs, outputs))
    return LoraMatrices(on_device(a), on_device(b))


def table(adapters: list[LayerAdapter], layers: int = 1) -> LoraTable:
    made = LoraTable(layers, len(adapters) + 1, DEVICE)
    for slot, adapter in enumerate(adapters):
        made.put(slot, [adapter] * layers)
    return made


def test_dense_products_of_many_adapters() -> None:
    g = torch.Generator().manual_seed(1)
    made = table(
        [
            LayerAdapter(q=matrices(g, 3, 72, 200)),
            LayerAdapter(out=matrices(g, 4, 72, 200)),
            LayerAdapter(q=matrices(g, 33, 72, 200)),
        ]
    ).layers[0]
    slots = np.array([2] * 20 + [-1, 0, 1, 2, 0] + [-1] * 3)
    x, before = on_device(normal(g, len(slots), 72)), on_device(normal(g, len(slots), 230))
    r = torch.rand(len(slots), generator=g).to(DEVICE)
    step = triton_lora(slots, DEVICE)
    assert step is not None
    found, wanted = before.clone(), before.float().clone()
    LayerAdapters(made, step).add("q", x, found, first=30, outputs=200, r=r)
    LoraRows(made, step_lora(slots, DEVICE)).add("q", (x.float() * r[:, None]).to(TYPE), wanted[:, 30:])
    assert_close("dense", wanted, found)
    assert torch.equal(found[(slots == -1) | (slots == 1)], before[(slots == -1) | (slots == 1)])
    alone = before[3:4].clone()
    one = triton_lora(slots[3:4], DEVICE)
    assert one is not None
    LayerAdapters(made, one).add("q", x[3:4].clone(), alone, first=30, outputs=200, r=r[3:4].clone())
    assert torch.equal(alone[0], found[3])


def test_modules_that_no_adapter_has_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = table([LayerAdapter(w2=matrices(torch.Generator(), 2, 32, 32, 2))]).layers[0]
    step = triton_lora(np.array([0, -1]), DEVICE)
    assert step is not None
    adapters = LayerAdapters(made, step)
    x = torch.zeros(2, 32, dtype=TYPE, device=DEVICE)
    monkeypatch.setattr("gptoss.kernels.triton.lora._shrink_kernel", None)
    adapters.add("out", x, x)
    assert fused_layers.router_delta(adapters, x, x[0], 1e-5, 4) is None
    assert adapters.experts_delta("w1", x, x, x, 64) is None
    assert adapters.rank("w2") == 16
    assert triton_lora(None, DEVICE) is None


@pytest.mark.parametrize("invariant", nightly_except(False, of=(False, True)))
def test_a_layer_with_adapters_of_all_modules(invariant: bool) -> None:
    g = torch.Generator().manual_seed(2)
    c, shape = CONFIG, layer_shape(CONFIG, whole(CONFIG), 128)
    heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    hidden, inter, experts = c.hidden_size, c.intermediate_size, c.num_experts
    lora = table(
        [
            LayerAdapter(
                q=matrices(g, 4, hidden, heads),
                k=matrices(g, 2, hidden, groups),
                v=matrices(g, 5, hidden, groups),
                out=matrices(g, 4, heads, hidden),
            ),
            LayerAdapter(
                router=matrices(g, 2, hidden, experts),
                w1=matrices(g, 3, hidden, 2 * inter, experts),
                w2=matrices(g, 18, inter, hidden, experts),
            ),
        ],
        c.num_layers,
    )
    kernels = TritonBackend(shape, TYPE, DEVICE, batch_invariant=invariant)
    comm = Communicator(whole(c), DEVICE)
    model = GptOss(c, dummy_weights(c, TYPE, DEVICE, 1, prepare_layer=kernels.prepare_layer), comm, kernels, lora)
    plain = GptOss(c, dummy_weights(c, TYPE, DEVICE, 1), comm, ReferenceBackend(shape, TYPE, DEVICE), lora)
    for counts, slots in STEPS:
        blocks = [np.arange(1 + 3 * i, 4 + 3 * i) for i in range(len(counts))]
        layout = StepLayout.of([0] * len(counts), counts, (blocks, blocks), BLOCK_SIZE, slots)
        x = on_device(normal(g, sum(counts), hidden, std=0.1))
        found, expected = (_layer(m, x, layout) for m in (model, plain))
        without = _layer(model, x, dataclasses.replace(layout, adapters=None))
        assert_close(str(counts), expected - x.float(), found - x.float(), 2e-5 if TYPE is torch.float32 else 0.02)
        changed = (found != without).any(dim=1).cpu()
        assert torch.equal(changed, torch.from_numpy(layout.token_adapters != -1))


def _layer(model: GptOss, x: torch.Tensor, layout: StepLayout) -> torch.Tensor:
    shape = (NUM_BLOCKS, BLOCK_SIZE, CONFIG.num_key_value_heads, CONFIG.head_dim)
    cache = LayerCache(*(torch.zeros(shape, dtype=TYPE, device=DEVICE) for _ in "kv"))
    return model.layer(x, model.weights.layers[0], cache, model.kernels.prepare_step(layout)).float()
