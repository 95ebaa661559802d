"""Int8 matrices of the CPU kernels: how they are stored, against torch; and what is multiplied, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.int8 import Int8Matrix, dequantize_int8
from tests.support.helpers import assert_close

pytestmark = pytest.mark.skipif(native.library() is None, reason="this CPU or machine cannot build the native kernels")
RATIOS = (1.0, 0.99, 0.98, 0.97, 0.95, 0.92, 0.88, 0.8)
SHAPES = [(1, 32), (5, 33), (1, 1), (17, 64), (100, 576), (33, 2880)]


@pytest.fixture(autouse=True, params=native.available_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    native.choose_instruction_set(request.param)
    yield
    native.choose_instruction_set("auto")


def bf16(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).bfloat16()


def quantized_with(w: torch.Tensor, ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The integers and scales when `ratio` of each row's largest number becomes 127."""
    peak = w.float().abs().amax(1, keepdim=True)
    high = torch.tensor(127.0)
    values = (w.float() / peak * (high / ratio)).round().clamp(-127, 127)
    return values, peak * (torch.tensor(ratio) / high)


def squared_errors(w: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (w.double() - values.double() * scales.double()).square().sum(1)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_each_row_has_the_scale_with_the_least_error(n: int, k: int) -> None:
    w = bf16(n, k)
    w[0, 0] = 40.0  # an outlier, which is worth clipping in some rows
    found = native.quantize_int8(w)
    stored = found.values[:, :k]
    assert found.shape == (n, k) and found.values.shape[1] % 32 == 0 and not found.values[:, k:].any()
    tried = [quantized_with(w, ratio) for ratio in RATIOS]
    errors = torch.stack([squared_errors(w, *one) for one in tried])
    ours = squared_errors(w, stored, found.scales.unsqueeze(1))
    assert (ours <= errors.amin(0) * (1 + 1e-4) + 1e-12).all()
    for row in range(n):
        same = [torch.equal(stored[row].float(), v[row]) and found.scales[row] == s[row] for v, s in tried]
        assert any(same), "a row is not what torch makes of it with any of the ratios"


def test_clipping_an_outlier_is_chosen_where_it_pays() -> None:
    w = torch.full((1, 4096), 0.5 / 127).bfloat16()  # halfway between two integers while 1 becomes 127
    w[0, 7] = 1.0
    assert native.quantize_int8(w).scales[0] < 1 / 127


def test_rows_of_zeros_and_of_huge_tiny_and_no_numbers() -> None:
    w = bf16(7, 48)
    w[1] = 0
    w[2] *= 3e38 / w[2].abs().max().float()
    w[3] = (w[3].float() * 1e-36).bfloat16()
    w[4, 3] = torch.inf
    w[5, 3] = torch.nan
    w[6] = torch.tensor(1e-40)  # below the normal numbers
    found = native.quantize_int8(w)
    for row in (1, 6):
        assert found.scales[row] == 0 and not found.values[row].any()
    for row in (0, 2, 3):
        exact, stored = w[row].double(), dequantize_int8(found, torch.float64)[row]
        assert (exact - stored).abs().max() <= exact.abs().max() / 100
    assert found.scales[4].isnan() and found.scales[5].isnan()
    assert native.linear(torch.zeros(1, 48).bfloat16(), found)[0, 4:6].isnan().all(), "not hidden by an int8"


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 65, 130])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_linear(m: int, n: int, k: int) -> None:
    x, w, b, r = bf16(m, k), native.quantize_int8(bf16(n, k, seed=1)), bf16(n, seed=2), bf16(m, n, seed=3)
    wanted = x.double() @ dequantize_int8(w, torch.float64).T
    assert_close("plain", wanted, native.linear(x, w, out_dtype=torch.float32), 1e-5)
    assert_close("bias", wanted + b.double(), native.linear(x, w, b, out_dtype=torch.float32), 1e-5)
    assert_close("residual", wanted + b.double() + r.double(), native.linear(x, w, b, r), 3e-3)


def test_every_integer_is_read_as_itself_and_scaled_after_the_sum() -> None:
    integers = torch.arange(-127, 128, dtype=torch.int8)
    values = torch.zeros(255, 64, dtype=torch.int8)
    values[torch.arange(255), torch.arange(255) % 64] = integers
    scales = torch.linspace(-1, 1, 255).exp() * 1e30
    ones = torch.ones(9, 64, dtype=torch.bfloat16)
    for rows in (1, 4, 9):
        out = native.linear(ones[:rows], Int8Matrix(values, scales, 64), out_dtype=torch.float32)
        assert torch.equal(out, (integers.float() * scales).expand(rows, -1))


def test_no_rows_of_x_and_no_rows_of_weights() -> None:
    w = native.quantize_int8(bf16(8, 64))
    assert native.linear(bf16(0, 64), w).shape == (0, 8)
    empty = native.quantize_int8(torch.empty(0, 64, dtype=torch.bfloat16))
    assert native.linear(bf16(2, 64), empty).shape == (2, 0)


def test_a_row_does_not_depend_on_the_others_nor_on_the_number_of_threads() -> None:
    x, w = bf16(130, 576), native.quantize_int8(bf16(700, 576, seed=1))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        whole = native.linear(x, w, out_dtype=torch.float32)
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(native.linear(x, w, out_dtype=torch.float32), whole)
            again = native.quantize_int8(bf16(700, 576, seed=1))
            assert torch.equal(again.values, w.values) and torch.equal(again.scales, w.scales)
    finally:
        torch.set_num_threads(before)
    for rows in (*(slice(3, 3 + n) for n in range(1, 11)), slice(60, 129), slice(129, 130)):
        assert torch.equal(native.linear(x[rows].contiguous(), w, out_dtype=torch.float32), whole[rows])
