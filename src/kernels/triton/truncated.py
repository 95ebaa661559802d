"""One token for each row that top-k, top-p or min-p cuts, without waiting for the device.

It takes two launches. The first leaves the TOP likeliest tokens of each tile of the vocabulary. The second sorts them
all. Down to the largest of the tiles' last ones they are the row's likeliest in their order, and where what is kept
ends before that, the draw is right. Else the row has to be drawn from everything
(engine/worker/sampling/truncation.py), which is rare: the kernel says so.

Shapes: R rows, C rows that are cut, V vocabulary, P tiles of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gptoss.kernels.triton import sampling
from gptoss.kernels.triton.sampling import allowed_logits

TOP = 64
WARPS = 16


@triton.jit
def to_key(logits, token):
    """int64 that sorts as the logits do, equal ones by falling id."""
    bits = logits.to(tl.int32, bitcast=True)
    rising = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (rising.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)


@triton.jit
def _candidates_kernel(
    logits_ptr, words_ptr, mask_rows_ptr, rows_ptr, candidates_ptr,
    VOCAB: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Grid (P, C). rows int64 [C]: where they are among all. candidates int64 [C, P, TOP], falling."""
    tile = tl.program_id(0)
    row = tl.load(rows_ptr + tl.program_id(1))
    token = tile * TILE + tl.arange(0, TILE)
    logits = allowed_logits(logits_ptr, words_ptr, tl.load(mask_rows_ptr + row), row, token, VOCAB, WORDS)
    at = candidates_ptr + (tl.program_id(1) * TILES + tile) * TOP + tl.arange(0, TOP)
    tl.store(at, tl.topk(to_key(logits, token), TOP))


@triton.jit(do_not_specialize=["count"])
def _draw_kernel(
    candidates_ptr, rows_ptr, numbers_ptr, temperature_ptr, peaks_ptr, sums_ptr, best_ptr, tokens_ptr, right_ptr,
    count, VOCAB: tl.constexpr, TILES: tl.constexpr, PADDED_TILES: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Grid (C,). The token goes to tokens int64 [R], whether it is right to right int8 [C].

    numbers float64 [4, C]: uniform, top-p, min-p, top-k. peaks, sums and best: see sampling.py.
    """
    c = tl.program_id(0)
    row = tl.load(rows_ptr + c)
    uniform = tl.load(numbers_ptr + c)
    top_p = tl.load(numbers_ptr + count + c)
    min_p = tl.load(numbers_ptr + 2 * count + c)
    top_k = tl.load(numbers_ptr + 3 * count + c).to(tl.int32)
    all_mass = tl.where(top_p >= 1, 1, 0)
    temperature = tl.load(temperature_ptr + row)
    best = tl.load(best_ptr + row)
    base = tl.where(best == float("-inf"), 0.0, best)
    tile = tl.arange(0, PADDED_TILES)
    at = row * TILES + tile
    peaks = tl.load(peaks_ptr + at, mask=tile < TILES, other=float("-inf"))
    sums = tl.load(sums_ptr + at, mask=tile < TILES, other=0.0)
    everything = tl.sum((sums * tl.exp((peaks - base) / temperature)).to(tl.float64), axis=0)

    NOTHING: tl.constexpr = -(2**63)
    i = tl.arange(0, PADDED_TILES * TOP)
    given = tl.load(candidates_ptr + c * (TILES * TOP) + i, mask=i < TILES * TOP, other=NOTHING)
    # a tile's last may be followed by others of the tile that are larger than a candidate below it
    known_to = tl.max(tl.where((i % TOP == TOP - 1) & (i < TILES * TOP), given, NOTHING), axis=0)
    keys = tl.sort(given, descending=True)
    width = tl.sum((keys >= known_to).to(tl.int32), axis=0)
    high = (keys >> 32).to(tl.int32)
    logits = (high ^ ((high >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    known = i < width
    weights = tl.exp(tl.where(known, (logits - base) / temperature, float("-inf"))).to(tl.float64)
    probs = weights / everything
    ahead = tl.cumsum(probs, axis=0) - probs
    kept_mass = tl.sum(tl.where(i < top_k, probs, 0.0), axis=0)
    limit = top_p * tl.where(top_k <= width, kept_mass, 1.0)
    limit = tl.where(all_mass != 0, float("inf"), limit)
    likeliest = tl.max(probs, axis=0)
    keep = (i < top_k) & (ahead < limit) & (probs >= min_p * likeliest)
    keep = known & (keep | (i == 0))
    last_kept = tl.max(tl.where(keep, i, 0), axis=0)
    right = (last_kept < width - 1) | (width >= top_k)
    # what top-k leaves is not all among the candidates: its mass is not known yet
    right = right & ((top_k <= width) | (top_k >= VOCAB) | (all_mass != 0))
    tl.store(right_ptr + c, right.to(tl.int8))
    mine = tl.where(keep, probs, 0.0)
    reached = tl.cumsum(mine, axis=0)
    target = uniform * tl.sum(mine, axis=0)
    place = tl.minimum(tl.sum((reached <= target).to(tl.int32), axis=0), last_kept)
    # a token that is not kept is never drawn: take the next one that is
    place = tl.min(tl.where((i >= place) & (mine > 0), i, last_kept), axis=0)
    token = 0x7FFFFFFF - tl.sum(tl.where(i == place, keys & 0xFFFFFFFF, 0), axis=0)
    tl.store(tokens_ptr + row, token)


def pick(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    mask_rows: torch.Tensor,
    words: torch.Tensor,
    rows: torch.Tensor,
    numbers: torch.Tensor,
    picked: sampling.Picked,
) -> torch.Tensor:
    """Writes the tokens of `rows` int64 [C] into what sampling.pick found for all of `logits` [R, V].

    `numbers` float64 [4, C]: a uniform number in [0, 1), top-p, min-p, and top-k (V: none). -> bool [C]: whether the
    token stands, or has to be drawn from everything."""
    count, vocab = len(rows), logits.shape[1]
    tiles = triton.cdiv(vocab, sampling.TILE)
    device = logits.device
    candidates = torch.empty(count, tiles, TOP, dtype=torch.int64, device=device)
    right = torch.empty(count, dtype=torch.int8, device=device)
    _candidates_kernel[(tiles, count)](
        logits, words, mask_rows, rows, candidates, vocab, triton.cdiv(vocab, 32), tiles, sampling.TILE, TOP,
        num_warps=WARPS,
    )  # fmt: skip
    _draw_kernel[(count,)](
        candidates, rows, numbers, temperature, picked.peaks, picked.sums, picked.best, picked.tokens, right, count,
        vocab, tiles, triton.next_power_of_2(tiles), TOP, num_warps=WARPS,
    )  # fmt: skip
    return right.bool()
