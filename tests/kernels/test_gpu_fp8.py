"""Keys and values in FP8 in Triton, against the same rounding in plain torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.weights import dummy_weights
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.kernels.fp8 import FP8, Fp8Matrix, dequantize_fp8, quantize_fp8, quantize_rows
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.lora import LayerAdapter
from gptoss.kernels.reference.backend import ReferenceBackend
from gptoss.kernels.step_layout import StepLayout
from gptoss.kernels.triton import dense, support
from gptoss.kernels.triton.backend import TritonBackend
from tests.kernels import test_gpu_attention as exact
from tests.kernels import test_gpu_lora as lora
from tests.kernels import test_gpu_model as whole_model
from tests.kernels.gpu_helpers import DEVICE, TYPE, assert_close, normal, on_device
from tests.kernels.test_gpu_attention import short_splits  # noqa: F401
from tests.kernels.test_gpu_dense import EPS, SMALL, normed

pytestmark = [
    pytest.mark.skipif(not support.has_fp8(DEVICE), reason="needs a GPU of sm_89 or later"),
    *whole_model.pytestmark,
]
SCALES = {"key_scale": 0.125, "value_scale": 0.02}  # one that is a power of two, one that is not


@triton.jit
def _convert_kernel(x_ptr, out_ptr, back_ptr, SIZE: tl.constexpr, ASM: tl.constexpr):
    at = tl.arange(0, SIZE)
    code = dense.to_fp8(tl.load(x_ptr + at), ASM)
    tl.store(out_ptr + at, code)
    tl.store(back_ptr + at, tl.load(out_ptr + at).to(tl.float32))


def test_conversion_is_that_of_torch() -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[codes.isfinite()]
    middles = (codes.sort().values[1:] + codes.sort().values[:-1]) / 2
    sizes = torch.randn(3500, generator=g) * 2.0 ** torch.randint(-14, 12, (3500,), generator=g)
    x = torch.cat((codes, middles, sizes, torch.tensor([1e30, -1e30, 0.0, 464.0, -449.0])))
    x = torch.nn.functional.pad(x, (0, 4096 - len(x))).to(DEVICE)
    out, back = torch.empty(4096, dtype=FP8, device=DEVICE), torch.empty(4096, device=DEVICE)
    _convert_kernel[(1,)](x, out, back, 4096, not support.interpreted())
    expected = quantize_fp8(x, 1.0)
    assert torch.equal(out.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(back, expected.float())


class Case(exact.Case):
    """The keys and values are those that FP8 holds; blocks that no sequence owns are no numbers."""

    def cache(self) -> LayerCache:
        found = []
        for stored, rows, scale in zip((self.key, self.value), (self.keys, self.values), SCALES.values(), strict=True):
            codes = quantize_fp8(stored, scale)
            assert codes.float().isnan().any()
            found.append(codes.to(DEVICE))
            for i, row in enumerate(rows):
                rows[i] = dequantize_fp8(quantize_fp8(row, scale), scale, torch.float32)
        return LayerCache(*found, **SCALES)


@pytest.mark.usefixtures("short_splits")
@pytest.mark.parametrize(("context", "new", "heads", "groups"), exact.MIXES[3:4])
@pytest.mark.parametrize(("window", "fixed"), [(None, True), (None, False), (20, True)])
def test_attention(
    context: list[int], new: list[int], heads: int, groups: int, window: int | None, fixed: bool
) -> None:
    case = Case(context, new, heads, groups)
    found = case.run(window, fixed=fixed)
    assert_close("attention", case.expected(window), found)


@pytest.mark.usefixtures("short_splits")
def test_a_token_is_the_same_in_prefill_and_decode_and_in_any_batch() -> None:
    for alone, together in exact.alone_and_in_a_chunk(Case):
        assert torch.equal(alone, together), "the bits, not only the value"


@pytest.mark.parametrize("way", ["fused", "done"])
@pytest.mark.parametrize(("rows", "outputs"), [(1, 16), (17, 40)])
def test_products_with_rows_in_fp8(rows: int, outputs: int, way: str) -> None:
    g = torch.Generator().manual_seed(4)
    x, scale = normal(g, rows, 96), normal(g, 96)
    made = quantize_rows(normal(g, outputs, 96, std=0.02))
    weight = made.codes.double() * made.scales.double().unsqueeze(1)
    given = {"norm": on_device(scale)} if way == "fused" else {}
    taken = on_device(x)
    if way == "done":
        taken, given["r"] = dense.norm_tokens(taken, on_device(scale), EPS)
    moved = Fp8Matrix(made.codes.to(DEVICE), made.scales.to(DEVICE))
    found = dense.linear(taken, moved, SMALL, eps=EPS, out_dtype=torch.float32, **given)
    assert_close("logits", normed(x, scale) @ weight.t(), found)


def models(*, has_lora: bool = False, invariant: bool = False) -> tuple[GptOss, GptOss]:
    """The Triton kernels' and plain torch's, of the same weights."""
    c = whole_model.CONFIG
    shape, comm = layer_shape(c, whole(c), 64), Communicator(whole(c), DEVICE)
    table = lora.table([adapter()], c.num_layers) if has_lora else None
    plain = ReferenceBackend(shape, TYPE, DEVICE)
    kernels = TritonBackend(shape, TYPE, DEVICE, batch_invariant=invariant)
    weights = dummy_weights(c, TYPE, DEVICE, 1)
    packed = dataclasses.replace(weights, layers=[kernels.prepare_layer(layer) for layer in weights.layers])
    return GptOss(c, packed, comm, kernels, table), GptOss(c, weights, comm, plain, table)


def adapter() -> LayerAdapter:
    g, c = torch.Generator().manual_seed(3), whole_model.CONFIG
    groups = c.num_key_value_heads * c.head_dim
    return LayerAdapter(k=lora.matrices(g, 4, c.hidden_size, groups), v=lora.matrices(g, 4, c.hidden_size, groups))


def fp8_cache() -> LayerCache:
    c = whole_model.CONFIG
    shape = (whole_model.NUM_BLOCKS, whole_model.BLOCK_SIZE, c.num_key_value_heads, c.head_dim)
    return LayerCache(*(torch.zeros(shape, dtype=FP8, device=DEVICE) for _ in "kv"), **SCALES)


@pytest.mark.parametrize("has_lora", [False, True])
@pytest.mark.parametrize("counts", [[1, 1, 9], pytest.param([40], marks=pytest.mark.nightly)])
def test_a_layer_writes_and_reads_what_plain_torch_does(counts: list[int], has_lora: bool) -> None:
    ours, theirs = models(has_lora=has_lora)
    blocks = [np.arange(1 + 6 * i, 7 + 6 * i) for i in range(len(counts))]
    slots = [0] + [-1] * (len(counts) - 1) if has_lora else None
    layout = StepLayout.of([0] * len(counts), counts, (blocks, blocks), whole_model.BLOCK_SIZE, slots)
    g = torch.Generator().manual_seed(7)
    x = on_device(normal(g, sum(counts), whole_model.CONFIG.hidden_size, std=0.1))
    mine, plain = fp8_cache(), fp8_cache()
    found = ours.layer(x, ours.weights.layers[1], mine, ours.kernels.prepare_step(layout))
    expected = theirs.layer(x, theirs.weights.layers[1], plain, theirs.kernels.prepare_step(layout))
    for one, two in ((mine.key, plain.key), (mine.value, plain.value)):
        codes, other = (t.view(torch.uint8).flatten(0, 1).cpu() for t in (one, two))
        differ = (codes != other).float().mean()  # where sums in another order fall on the other side of a tie
        assert other[16:].any() and differ < (1e-4 if DEVICE.type == "cpu" else 0.02)
    if DEVICE.type == "cpu":
        assert_close("layer", expected - x, found - x, 1e-3)


@pytest.mark.nightly
def test_the_whole_model_agrees_with_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_model, "LayerCache", lambda *tensors: fp8_cache())
    ours, theirs = models(invariant=True)
    for step, (one, two) in enumerate(zip(whole_model.run(theirs), whole_model.run(ours), strict=True)):
        error = float(((two - one).norm(dim=1) / one.norm(dim=1)).median())
        assert error < (1e-3 if DEVICE.type == "cpu" else 3e-2), f"round {step}: {error}"
