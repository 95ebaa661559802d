"""The compiled CPU kernels against float64, on odd shapes; and bit for bit against themselves in other batches."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from gptoss.kernels.cpu import native
from gptoss.kernels.cpu.metadata import CpuAttentionMetadata
from gptoss.kernels.layers import ExpertWeights, LayerCache
from gptoss.kernels.mxfp4 import AlternatingMxfp4, GgufGateUp, GgufMxfp4, Mxfp4Tensor, dequantize_mxfp4, quantize_mxfp4
from gptoss.kernels.reference.attention import PrefillPlan, prefill_attention_ref
from gptoss.kernels.reference.moe import clamped_swiglu_ref, moe_forward_ref, route_ref
from gptoss.kernels.reference.rms_norm import rms_norm_ref
from gptoss.kernels.reference.rope import apply_rope_ref, rope_tables
from tests.support.gguf_files import mxfp4_blocks
from tests.support.helpers import assert_close

pytestmark = pytest.mark.skipif(native.library() is None, reason="this CPU or machine cannot build the native kernels")


@pytest.fixture(autouse=True, params=native.available_instruction_sets())
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    native.choose_instruction_set(request.param)
    yield request.param
    native.choose_instruction_set("auto")


def bf16(*shape: int, seed: int = 0, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std).bfloat16()


@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 7, 8, 9, 63, 64, 65, 130])
@pytest.mark.parametrize(("n", "k"), [(1, 32), (5, 33), (17, 64), (100, 576), (33, 2880)])
def test_linear(m: int, n: int, k: int) -> None:
    x, w, b, r = bf16(m, k), bf16(n, k, seed=1), bf16(n, seed=2), bf16(m, n, seed=3)
    wanted = x.double() @ w.double().T
    assert_close("plain", wanted, native.linear(x, w, out_dtype=torch.float32), 1e-5)
    assert_close("bias", wanted + b.double(), native.linear(x, w, b, out_dtype=torch.float32), 1e-5)
    assert_close("residual", wanted + b.double() + r.double(), native.linear(x, w, b, r), 3e-3)


def test_a_row_of_linear_does_not_depend_on_the_others() -> None:
    x, w = bf16(130, 576), bf16(50, 576, seed=1)
    whole = native.linear(x, w, out_dtype=torch.float32)
    for rows in (*(slice(3, 3 + n) for n in range(1, 11)), slice(60, 129), slice(129, 130)):
        assert torch.equal(native.linear(x[rows].contiguous(), w, out_dtype=torch.float32), whole[rows])


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x, w = bf16(110, 320), bf16(700, 320, seed=1)
    experts, exact = experts_of(8, 320, 96)
    chosen, weights = native.route(torch.randn(110, 8), 4)
    results = []
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        moe = native.moe(x, chosen, weights, experts.w1, experts.b1, experts.w2, experts.b2, x, 7.0)
        results.append((native.linear(x, w), native.rms_norm(x, x[0], 1e-5), moe))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.usefixtures("threads")
def test_many_small_calls_from_several_threads_are_right() -> None:
    torch.set_num_threads(4)
    x, w = bf16(3, 64), bf16(300, 64, seed=1)
    wanted = native.linear(x, w)

    def repeat(_: int) -> bool:
        return all(torch.equal(native.linear(x, w), wanted) for _ in range(2000))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(repeat, range(3)))


def test_an_instruction_set_that_this_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_cpu_flags", lambda: frozenset({"avx2", "fma"}))
    with pytest.raises(ValueError, match="this CPU has no avx512f"):
        native.choose_instruction_set("avx512")


@pytest.mark.parametrize("h", [32, 33, 128, 2880])
def test_rms_norm(h: int) -> None:
    x, scale = bf16(9, h, std=3), bf16(h, seed=1)
    wanted = rms_norm_ref(x.double(), scale.double(), 1e-5)
    assert_close("rms_norm", wanted, native.rms_norm(x, scale, 1e-5), 3e-3)


def test_rope_and_store() -> None:
    heads, groups, tokens = 6, 2, 5
    qkv = bf16(tokens, heads + 2 * groups, 64)
    cos, sin = rope_tables(torch.tensor([0, 1, 77, 4000, 90_000]), torch.rand(32), 1.3)
    key_cache, value_cache = (torch.full((3, 4, groups, 64), torch.nan, dtype=torch.bfloat16) for _ in range(2))
    slots = torch.tensor([1, 4, 5, 11, 0])
    out = qkv.clone()
    native.rope_and_store(out, cos, sin, slots, key_cache, value_cache, heads)
    assert_close("rotated", apply_rope_ref(qkv[:, : heads + groups].float(), cos, sin), out[:, : heads + groups], 3e-3)
    assert torch.equal(out[:, heads + groups :], qkv[:, heads + groups :])
    assert torch.equal(key_cache.flatten(0, 1)[slots], out[:, heads : heads + groups])
    assert torch.equal(value_cache.flatten(0, 1)[slots], qkv[:, heads + groups :])
    assert key_cache.flatten(0, 1)[2].isnan().all()


@pytest.mark.parametrize("window", [None, 5, 128])
@pytest.mark.parametrize("length", [1, 7, 16, 17, 150])
def test_attention(window: int | None, length: int) -> None:
    heads, groups, num_slots = 12, 2, 200
    order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(5))[:length]
    key_cache, value_cache = (bf16(num_slots, 1, groups, 64, seed=1), bf16(num_slots, 1, groups, 64, seed=2))
    qkv, sinks = bf16(length, heads + 2 * groups, 64, seed=3), bf16(heads, seed=4)
    last = torch.arange(length)
    first = torch.zeros_like(last) if window is None else (last - window + 1).clamp(min=0)
    metadata = CpuAttentionMetadata(last, order, torch.zeros_like(last), first, last)
    out = native.attention(qkv, key_cache, value_cache, sinks, metadata, 0.125)
    plan = PrefillPlan(0, length, 0, 0, order)
    cache = LayerCache(key_cache.float(), value_cache.float())
    wanted = prefill_attention_ref(qkv[:, :heads].float(), cache, sinks.float(), plan, window, 0.125)
    assert_close("attention", wanted.flatten(1), out, 4e-3)
    for t in {0, length // 2, length - 1}:
        at = slice(t, t + 1)
        one = CpuAttentionMetadata(last[at], order, metadata.base[at], first[at], last[at])
        assert torch.equal(native.attention(qkv[at], key_cache, value_cache, sinks, one, 0.125)[0], out[t])


def test_large_scores_do_not_overflow() -> None:
    qkv, cache = bf16(1, 4, 64, std=30), bf16(3, 1, 1, 64, seed=1, std=30)
    zero, two = torch.tensor([0]), torch.tensor([2])
    metadata = CpuAttentionMetadata(two, torch.tensor([0, 1, 2]), zero, zero, two)
    assert torch.isfinite(native.attention(qkv, cache, cache, bf16(2), metadata, 1.0)).all()


@pytest.mark.parametrize("num_experts", [4, 32, 128])
def test_route(num_experts: int) -> None:
    logits = torch.randn(20, num_experts, generator=torch.Generator().manual_seed(0))
    experts, weights = native.route(logits, 4)
    wanted_experts, wanted_weights = route_ref(logits, 4)
    assert torch.equal(experts, wanted_experts)
    assert_close("weights", wanted_weights, weights, 1e-6)
    assert native.route(torch.zeros(1, 8), 4)[0].tolist() == [[0, 1, 2, 3]]


def experts_of(num: int, hidden: int, inter: int) -> tuple[ExpertWeights, ExpertWeights]:
    """The same experts packed, and in float64."""
    w1, w2 = (
        quantize_mxfp4(bf16(num, 2 * inter, hidden, seed=1) / 8),
        quantize_mxfp4(bf16(num, hidden, inter, seed=2) / 8),
    )
    b1, b2 = bf16(num, 2 * inter, seed=3), bf16(num, hidden, seed=4)
    exact = ExpertWeights(
        dequantize_mxfp4(w1, torch.float64), b1.double(), dequantize_mxfp4(w2, torch.float64), b2.double()
    )
    return ExpertWeights(w1, b1, w2, b2), exact


@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
@pytest.mark.parametrize(("num", "hidden", "inter"), [(4, 32, 64), (32, 64, 32), (8, 160, 96)])
@pytest.mark.parametrize("packed", [True, False])
def test_moe(tokens: int, num: int, hidden: int, inter: int, packed: bool) -> None:
    w, exact = experts_of(num, hidden, inter)
    x, residual = bf16(tokens, hidden, seed=5), bf16(tokens, hidden, seed=6)
    experts, weights = native.route(torch.randn(tokens, num, generator=torch.Generator().manual_seed(7)), 4)
    w1, w2 = (w.w1, w.w2) if packed else (exact.w1.bfloat16(), exact.w2.bfloat16())  # type: ignore[union-attr]
    out = native.moe(x, experts, weights, w1, w.b1, w2, w.b2, residual, 7.0)
    wanted = residual.double()
    for t in range(tokens):
        for j in range(4):
            e = experts[t, j]
            h = clamped_swiglu_ref((exact.w1[e] @ x[t].double() + exact.b1[e])[None], 7.0)  # type: ignore[index]
            wanted[t] += weights[t, j].double() * (exact.w2[e] @ h[0] + exact.b2[e])  # type: ignore[index]
    assert_close("moe", wanted, out, 5e-3)
    plain = moe_forward_ref(
        x.float(), experts, weights, ExpertWeights(*(v.float() for v in (exact.w1, exact.b1, exact.w2, exact.b2))), 7.0
    )  # type: ignore[union-attr]
    assert_close("moe_forward_ref", wanted - residual.double(), plain, 1e-5)
    alone = native.moe(x[-1:], experts[-1:], weights[-1:], w1, w.b1, w2, w.b2, residual[-1:], 7.0)
    assert torch.equal(alone[0], out[-1]), "a token's result depends on the others"


def gguf_blocks(w: Mxfp4Tensor) -> torch.Tensor:
    return torch.from_numpy(mxfp4_blocks(w.blocks, w.scales)).unflatten(-1, (-1, 17))


def as_stored(w1: Mxfp4Tensor, w2: Mxfp4Tensor, form: str) -> tuple[native.FirstMatrix, native.SecondMatrix]:
    """The same matrices in the order of a file."""
    half = w1.blocks.shape[1] // 2
    match form:
        case "alternating":
            parts = (
                t.unflatten(1, (2, half)).transpose(1, 2).flatten(1, 2).contiguous() for t in (w1.blocks, w1.scales)
            )
            return AlternatingMxfp4(*parts), w2
        case "gguf":
            blocks = gguf_blocks(w1)
            return GgufGateUp(blocks[:, :half].contiguous(), blocks[:, half:].contiguous()), GgufMxfp4(gguf_blocks(w2))
    return w1, w2


@pytest.mark.parametrize("form", ["alternating", "gguf"])
@pytest.mark.parametrize(("num", "hidden", "inter"), [(4, 32, 64), (32, 64, 32), (8, 288, 96)])
def test_experts_in_the_order_of_a_file(instruction_set: str, form: str, num: int, hidden: int, inter: int) -> None:
    w, _ = experts_of(num, hidden, inter)
    assert isinstance(w.w1, Mxfp4Tensor) and isinstance(w.w2, Mxfp4Tensor)
    w1, w2 = as_stored(w.w1, w.w2, form)
    x, residual = bf16(100, hidden, seed=5), bf16(100, hidden, seed=6)
    experts, weights = native.route(torch.randn(100, num, generator=torch.Generator().manual_seed(7)), 4)
    found = native.moe(x, experts, weights, w1, w.b1, w2, w.b2, residual, 7.0)
    expected = native.moe(x, experts, weights, w.w1, w.b1, w.w2, w.b2, residual, 7.0)
    if form == "gguf" and instruction_set == "avx2":
        assert_close("moe", expected.double(), found, 3e-3)  # a lane adds other columns
    else:
        assert torch.equal(found, expected)
    for count in (*range(1, 10), 30):
        some = slice(60, 60 + count)
        part = native.moe(x[some], experts[some], weights[some], w1, w.b1, w2, w.b2, residual[some], 7.0)
        assert torch.equal(part, found[some]), f"{count} rows differ from the same among others"


def moe_of(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What 4 experts of 96 columns, without biases, add to 0; and the same by plain torch in float32."""
    w, exact = experts_of(4, 96, 64)
    for bias in (w.b1, w.b2, exact.b1, exact.b2):
        bias.zero_()
    experts, weights = torch.arange(4).expand(len(x), 4).contiguous(), torch.full((len(x), 4), 0.25)
    nothing = torch.zeros_like(x)
    out = native.moe(x, experts, weights, w.w1, w.b1, w.w2, w.b2, nothing, 7.0)
    floats = ExpertWeights(*(v.float() for v in (exact.w1, exact.b1, exact.w2, exact.b2)))  # type: ignore[union-attr]
    return out, moe_forward_ref(x.float(), experts, weights, floats, 7.0)


@pytest.mark.parametrize("exponent", [-90, -40, -8, 0, 8, 40])
def test_experts_of_columns_of_very_different_size(exponent: int) -> None:
    x = bf16(3, 96, seed=5)
    x[:, 1::7] *= 2.0**exponent
    out, wanted = moe_of(x)
    assert_close("moe", wanted, out, 5e-3)
    x[:] = bf16(3, 96, seed=5) * 2.0**exponent
    out, wanted = moe_of(x)
    assert_close("moe", wanted, out, 5e-3)


@pytest.mark.parametrize("form", ["halves", "alternating", "gguf"])
@pytest.mark.parametrize("scale", [0, 1, 127, 200, 240])
def test_moe_decodes_every_code_at_the_scales_edges(scale: int, form: str) -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2)
    blocks = (codes[0::2] | codes[1::2] << 4).view(1, 1, 1, 16)
    w1 = Mxfp4Tensor(blocks.expand(1, 64, 1, 16).contiguous(), torch.full((1, 64, 1), 127, dtype=torch.uint8))
    # rows of w2 read one hidden value each: hidden is known, so the output shows code * scale
    w2 = Mxfp4Tensor(blocks.expand(1, 32, 1, 16).contiguous(), torch.full((1, 32, 1), scale, dtype=torch.uint8))
    x = torch.zeros(1, 32, dtype=torch.bfloat16)
    b1 = torch.zeros(1, 64, dtype=torch.bfloat16)
    b1[0, 32:] = 6.0
    b1[0, :32] = torch.linspace(0, 3, 32).bfloat16()
    zeros = torch.zeros(1, 32, dtype=torch.bfloat16)
    stored = as_stored(w1, w2, form)
    out = native.moe(
        x, torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), stored[0], b1, stored[1], zeros, zeros, 7.0
    )
    h = clamped_swiglu_ref(b1.double(), 7.0).bfloat16().double()
    wanted = h @ dequantize_mxfp4(w2, torch.float64)[0].T
    assert_close("edges", wanted, out, 5e-3)
