"""The format, exactly: all 16 codes, the scale's edges, round trips."""

from __future__ import annotations

import pytest
import torch

from gptoss.kernels.mxfp4 import E2M1_VALUES, Mxfp4Tensor, dequantize_mxfp4, quantize_mxfp4, quantize_mxfp4_closest


def packed(codes: list[int], scale: int) -> Mxfp4Tensor:
    pairs = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    return Mxfp4Tensor(
        torch.tensor(pairs, dtype=torch.uint8).view(1, 1, 16), torch.tensor([[scale]], dtype=torch.uint8)
    )


@pytest.mark.parametrize("scale", [1, 64, 119, 126, 127, 128, 200, 252])
def test_every_code_at_every_scale(scale: int) -> None:
    codes = [*range(16), *reversed(range(16))]
    wanted = [E2M1_VALUES[c] * 2.0 ** (scale - 127) for c in codes]
    out = dequantize_mxfp4(packed(codes, scale), torch.float32)
    assert out.shape == (1, 32)
    assert out[0].tolist() == wanted


def test_the_lower_nibble_is_the_even_column() -> None:
    out = dequantize_mxfp4(packed([7, 2] + [0] * 30, 127), torch.float32)
    assert out[0, :3].tolist() == [6.0, 1.0, 0.0]


def test_bfloat16_holds_every_code_exactly() -> None:
    w = packed([*range(16)] * 2, 120)
    assert torch.equal(dequantize_mxfp4(w, torch.bfloat16).float(), dequantize_mxfp4(w, torch.float32))


def test_what_the_format_holds_comes_back_unchanged() -> None:
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 4, 16), dtype=torch.uint8, generator=generator)
    blocks[..., 0] = 7  # the largest code, so that the shared exponent is the one that quantisation picks
    w = Mxfp4Tensor(blocks, torch.randint(100, 140, (3, 5, 4), dtype=torch.uint8, generator=generator))
    dense = dequantize_mxfp4(w, torch.float32)
    again = quantize_mxfp4(dense)
    assert torch.equal(again.scales, w.scales)
    assert torch.equal(dequantize_mxfp4(again, torch.float32), dense)


def test_rounding_is_to_the_nearest_and_ties_to_even() -> None:
    values = [6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -5.0, 0.26, 4.99] + [0.0] * 20
    wanted = [6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, -0.0, -4.0, 0.5, 4.0] + [0.0] * 20
    assert dequantize_mxfp4(quantize_mxfp4(torch.tensor([values])), torch.float32)[0].tolist() == wanted


def test_quantising_is_within_half_a_step() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    error = (dequantize_mxfp4(quantize_mxfp4(w), torch.float32) - w).abs().unflatten(-1, (-1, 32))
    peak = w.abs().unflatten(-1, (-1, 32)).amax(-1, keepdim=True)
    assert (
        error <= peak / 4 + 1e-6
    ).all()  # the widest gap, 4 to 6 (and 6 to 8, which saturates), over a peak of at least 4


def test_zeros_stay_zeros() -> None:
    assert dequantize_mxfp4(quantize_mxfp4(torch.zeros(2, 64)), torch.float32).abs().sum() == 0


@pytest.mark.parametrize("bad", [torch.zeros(2, 33), torch.full((1, 32), torch.nan), torch.full((1, 32), torch.inf)])
def test_bad_input_is_refused(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError):
        quantize_mxfp4(bad)


def test_the_closest_scale_keeps_what_would_saturate() -> None:
    values = [3.9, 0.5, -2.1] + [0.0] * 29
    assert dequantize_mxfp4(quantize_mxfp4(torch.tensor([values])), torch.float32)[0, :3].tolist() == [3.0, 0.5, -2.0]
    found = quantize_mxfp4_closest(torch.tensor([values]))
    assert dequantize_mxfp4(found, torch.float32)[0, :3].tolist() == [4.0, 0.5, -2.0]


def test_the_closest_scale_is_never_worse_and_exact_where_the_format_is() -> None:
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    errors = [
        (dequantize_mxfp4(quantize(w), torch.float32) - w).unflatten(-1, (-1, 32)).square().sum(-1)
        for quantize in (quantize_mxfp4, quantize_mxfp4_closest)
    ]
    assert (errors[1] <= errors[0]).all() and (errors[1] < errors[0]).any()
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 5, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(100, 140, (3, 5, 4), dtype=torch.uint8, generator=generator)
    dense = dequantize_mxfp4(Mxfp4Tensor(blocks, scales), torch.float32)
    assert torch.equal(dequantize_mxfp4(quantize_mxfp4_closest(dense), torch.float32), dense)
