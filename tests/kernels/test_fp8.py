"""FP8 in plain torch: rounding, range, and the cache."""

from __future__ import annotations

import pytest
import torch

from gptoss.kernels.backend import check_fp8, choose_backend
from gptoss.kernels.cpu import native
from gptoss.kernels.fp8 import FP8, LARGEST, dequantize_fp8, linear_fp8_ref, quantize_fp8, quantize_rows
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.reference.attention import DecodePlan, PrefillPlan, decode_attention_ref, prefill_attention_ref
from gptoss.kernels.reference.backend import ReferenceBackend
from gptoss.kernels.reference.kv_cache import load_kv_ref, store_kv_ref
from gptoss.kernels.triton import support
from tests.kernels.test_backend import CPU, SHAPE
from tests.support.helpers import assert_close

# by the specification: 16 exponents of 8 steps, of which the last code is no number
POSITIVE = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
POSITIVE = POSITIVE[:-1]


def test_the_codes_are_those_of_the_specification() -> None:
    codes = torch.arange(len(POSITIVE), dtype=torch.uint8)
    values = torch.tensor(POSITIVE)
    assert POSITIVE[-1] == LARGEST
    assert torch.equal(dequantize_fp8(codes.view(FP8), 1.0, torch.float32), values)
    assert torch.equal(quantize_fp8(values, 1.0).view(torch.uint8), codes)
    assert torch.equal(quantize_fp8(-values[1:], 1.0).view(torch.uint8), codes[1:] | 0x80)


def test_numbers_are_rounded_to_the_nearest_code_and_ties_to_the_even_one() -> None:
    values = torch.tensor(POSITIVE, dtype=torch.float64)
    middles = (values[:-1] + values[1:]) / 2
    even = torch.arange(len(middles)) + torch.arange(len(middles)) % 2
    assert torch.equal(quantize_fp8(middles.float(), 1.0).view(torch.uint8).long(), even)
    above, below = ((middles * (1 + step)).float() for step in (1e-6, -1e-6))
    assert torch.equal(quantize_fp8(above, 1.0).view(torch.uint8).long(), torch.arange(1, len(values)))
    assert torch.equal(quantize_fp8(below, 1.0).view(torch.uint8).long(), torch.arange(len(values) - 1))


def test_what_is_too_large_is_cut_instead_of_becoming_no_number() -> None:
    found = quantize_fp8(torch.tensor([449.0, 1e30, -470.0, float("inf")]), 1.0).float()
    assert found.tolist() == [448.0, 448.0, -448.0, 448.0]
    assert quantize_fp8(torch.tensor([900.0]), 4.0).float().item() == 224.0


def filled(slots: int, scales: tuple[float, float], std: float = 1.0) -> tuple[LayerCache, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(slots)
    key, value = (torch.randn(slots, 2, 16, generator=g) * std for _ in "kv")
    tensors = [torch.zeros(3, 16, 2, 16, dtype=FP8) for _ in "kv"]
    cache = LayerCache(*tensors, key_scale=scales[0], value_scale=scales[1])
    store_kv_ref(key, value, cache, torch.arange(16, 16 + slots))
    return cache, key, value


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 0.01)])
def test_keys_and_values_are_read_as_they_were_rounded(scales: tuple[float, float]) -> None:
    cache, key, value = filled(20, scales)
    found = load_kv_ref(cache, torch.arange(16, 36), torch.float32)
    for stored, new, scale in zip(found, (key, value), scales, strict=True):
        assert torch.equal(stored, quantize_fp8(new, scale).float() * scale)
        assert (stored - new).abs().max() <= (new.abs() / 16 + scale * 2**-10).max()
    assert not load_kv_ref(cache, torch.arange(16), torch.float32)[0].any()


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.25, 0.01)])
def test_attention_reads_what_the_cache_holds(scales: tuple[float, float]) -> None:
    cache, _, _ = filled(20, scales)
    slots = torch.arange(16, 36)
    wide = LayerCache(*(torch.zeros(3, 16, 2, 16) for _ in "kv"))
    key, value = load_kv_ref(cache, slots, torch.float32)
    store_kv_ref(key, value, wide, slots)
    g = torch.Generator().manual_seed(1)
    query, sinks = torch.randn(5, 4, 16, generator=g), torch.randn(4, generator=g)
    prefill, decode = PrefillPlan(0, 5, 15, 0, slots), DecodePlan(slots, torch.zeros(1, 1, 1, 20))
    found, expected = (prefill_attention_ref(query, one, sinks, prefill, None, 0.25) for one in (cache, wide))
    assert torch.equal(found, expected)
    found, expected = (decode_attention_ref(query[4:], one, sinks, decode, 0.25) for one in (cache, wide))
    assert torch.equal(found, expected)


def test_rounding_moves_attention_by_a_few_percent() -> None:
    cache, key, value = filled(20, (1.0, 1.0))
    wide = LayerCache(*(torch.zeros(3, 16, 2, 16) for _ in "kv"))
    store_kv_ref(key, value, wide, torch.arange(16, 36))
    plan = PrefillPlan(0, 20, 0, 0, torch.arange(16, 36))
    query = torch.randn(20, 4, 16, generator=torch.Generator().manual_seed(2))
    found, expected = (prefill_attention_ref(query, one, torch.zeros(4), plan, None, 0.25) for one in (cache, wide))
    assert not torch.equal(found, expected)
    assert_close("attention", expected, found, 0.06)


def test_a_row_s_scale_maps_its_largest_number_to_the_largest_code() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(40, 48, generator=g) * torch.logspace(-6, 6, 40).unsqueeze(1)
    weight[7] = 0
    made = quantize_rows(weight)
    assert made.shape == (40, 48) and made.codes.dtype == FP8 and made.scales[7] == 1
    codes = made.codes.float()
    assert codes[7].eq(0).all() and (codes.abs().amax(dim=1)[made.scales != 1] == LARGEST).all()
    assert_close("rows", weight, codes * made.scales.unsqueeze(1), 0.04)
    assert ((codes * made.scales.unsqueeze(1) - weight).abs() <= weight.abs().amax(dim=1, keepdim=True) / 16).all()
    x = torch.randn(5, 48, generator=g)
    assert_close("product", x @ (codes * made.scales.unsqueeze(1)).t(), linear_fp8_ref(x, made), 1e-5)


def test_fp8_is_refused_where_it_is_not_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    check_fp8(ReferenceBackend(SHAPE, torch.float32, CPU))
    if native.library() is not None:
        with pytest.raises(ValueError, match="native CPU kernels"):
            check_fp8(choose_backend(CPU, torch.bfloat16, SHAPE))
    kernels = ReferenceBackend(SHAPE, torch.float32, CPU)
    kernels.device = torch.device("cuda", 0)
    monkeypatch.setattr(support, "interpreted", lambda: False)
    for capability, is_refused in (((7, 0), True), ((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(support, "_capability", lambda _, found=capability: found)
        if is_refused:
            with pytest.raises(ValueError, match=rf"sm_89 or later, and cuda:0 is sm_{capability[0]}{capability[1]}"):
                check_fp8(kernels)
        else:
            check_fp8(kernels)
