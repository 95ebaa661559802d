"""One token a row from its logits: the best, or one drawn in proportion, among those allowed.

A grammar's mask says what is allowed. Two kernels, so that one row of 200,000 logits keeps many processors busy: the
first leaves each tile's maximum and its sum of exponentials, the second picks a tile by them and a token in it. A draw
inverts the cumulative distribution at a given uniform number, tile by tile and then token by token, so it depends on
the row alone.

Shapes: R rows, V vocabulary, W = ceil(V / 32) words of a grammar's mask, P tiles of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TILE = 4096


@triton.jit
def allowed_logits(logits_ptr, words_ptr, mask_row, row, token, VOCAB: tl.constexpr, WORDS: tl.constexpr):
    """Logits of `token`, -inf where the mask or the vocabulary has none. mask_row -1: all are allowed."""
    inside = token < VOCAB
    logits = tl.load(logits_ptr + row.to(tl.int64) * VOCAB + token, mask=inside, other=float("-inf"))
    if mask_row >= 0:
        word = tl.load(words_ptr + mask_row * WORDS + token // 32, mask=inside, other=0)
        logits = tl.where(((word >> (token % 32)) & 1) != 0, logits, float("-inf"))
    return logits


@triton.jit
def _tile_kernel(
    logits_ptr, words_ptr, mask_rows_ptr, temperature_ptr, peaks_ptr, places_ptr, sums_ptr,
    VOCAB: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (P, R). Writes each tile's maximum, where that is, and sum exp((l - maximum) / T).

    The maximum is NaN if the tile holds one.
    """
    tile = tl.program_id(0)
    row = tl.program_id(1)
    token = tile * TILE + tl.arange(0, TILE)
    logits = allowed_logits(logits_ptr, words_ptr, tl.load(mask_rows_ptr + row), row, token, VOCAB, WORDS)
    bad = tl.max((logits != logits).to(tl.int32), axis=0)
    peak = tl.max(logits, axis=0)
    place = tl.argmax(logits, axis=0)
    temperature = tl.load(temperature_ptr + row)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    scaled = tl.where(temperature > 0, (logits - base) / tl.where(temperature > 0, temperature, 1.0), float("-inf"))
    total = tl.sum(tl.exp(scaled), axis=0)
    at = row * TILES + tile
    tl.store(peaks_ptr + at, tl.where(bad != 0, float("nan"), peak))
    tl.store(places_ptr + at, tile * TILE + place)
    tl.store(sums_ptr + at, total)


@triton.jit
def _pick_kernel(
    logits_ptr, words_ptr, mask_rows_ptr, temperature_ptr, uniform_ptr, peaks_ptr, places_ptr, sums_ptr, tokens_ptr,
    best_ptr,
    VOCAB: tl.constexpr, WORDS: tl.constexpr, TILES: tl.constexpr, PADDED_TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (R,). Writes the token int64 [R] and the row's largest logit [R].

    The logit is NaN or infinite if nothing can be sampled.
    """
    row = tl.program_id(0)
    p = tl.arange(0, PADDED_TILES)
    at = row * TILES + p
    peaks = tl.load(peaks_ptr + at, mask=p < TILES, other=float("-inf"))
    bad = tl.max((peaks != peaks).to(tl.int32), axis=0)
    peak = tl.max(tl.where(peaks == peaks, peaks, float("-inf")), axis=0)
    tl.store(best_ptr + row, tl.where(bad != 0, float("nan"), peak))
    temperature = tl.load(temperature_ptr + row)
    if temperature <= 0:
        best_tile = tl.argmax(peaks, axis=0)
        tl.store(tokens_ptr + row, tl.load(places_ptr + row * TILES + best_tile).to(tl.int64))
        return
    base = tl.where(peak == float("-inf"), 0.0, peak)
    sums = tl.load(sums_ptr + at, mask=p < TILES, other=0.0)
    weights = tl.where(p < TILES, sums * tl.exp((peaks - base) / temperature), 0.0)
    reached = tl.cumsum(weights, axis=0)
    target = tl.load(uniform_ptr + row) * tl.sum(weights, axis=0)
    # the first tile whose running sum passes the target; rounding may leave none: then the last that weighs anything
    last = tl.max(tl.where(weights > 0, p, 0), axis=0)
    tile = tl.minimum(tl.sum((reached <= target).to(tl.int32), axis=0), last)
    before = tl.sum(tl.where(p < tile, weights, 0.0), axis=0)
    i = tl.arange(0, TILE)
    token = tile * TILE + i
    logits = allowed_logits(logits_ptr, words_ptr, tl.load(mask_rows_ptr + row), row, token, VOCAB, WORDS)
    inner = tl.exp((logits - base) / temperature)
    last = tl.max(tl.where(inner > 0, i, 0), axis=0)
    chosen = tl.minimum(tl.sum((tl.cumsum(inner, axis=0) <= target - before).to(tl.int32), axis=0), last)
    # a token of weight 0 is never drawn: take the next one that has some
    chosen = tl.min(tl.where((i >= chosen) & (inner > 0), i, TILE - 1), axis=0)
    tl.store(tokens_ptr + row, (tile * TILE + chosen).to(tl.int64))


@dataclass(frozen=True, slots=True)
class Picked:
    """Tokens, and what the tiles of the rows hold."""

    tokens: torch.Tensor  # int64 [R]
    best: torch.Tensor  # float32 [R], the largest allowed logit; NaN if the row holds a NaN, -inf if nothing is allowed
    peaks: torch.Tensor  # float32 [R, P]
    sums: torch.Tensor  # float32 [R, P], of exp((logit - peak) / temperature)


def pick(
    logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor, mask_rows: torch.Tensor, words: torch.Tensor
) -> Picked:
    """Picks a token for each row of logits float32 [R, V].

    temperature float32 [R] (0: the best, the lowest id of equals), uniform float32 [R] in [0, 1), mask_rows int32 [R]
    (a row of `words`, or -1), words int32 [.., W] with a bit set for each allowed token.
    """
    rows, vocab = logits.shape
    tiles = triton.cdiv(vocab, TILE)
    # each by itself, as parts of one would be aligned or not with the number of rows, which takes two compilations
    peaks, sums = (torch.empty(rows, tiles, dtype=torch.float32, device=logits.device) for _ in range(2))
    places = torch.empty(rows, tiles, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    best = torch.empty(rows, dtype=torch.float32, device=logits.device)
    where = (logits, words, mask_rows, temperature)
    words_of_row = triton.cdiv(vocab, 32)
    _tile_kernel[(tiles, rows)](*where, peaks, places, sums, vocab, words_of_row, tiles, TILE, num_warps=8)
    _pick_kernel[(rows,)](
        *where, uniform, peaks, places, sums, tokens, best, vocab, words_of_row, tiles,
        triton.next_power_of_2(tiles), TILE, num_warps=8,
    )  # fmt: skip
    return Picked(tokens, best, peaks, sums)


def pick_ref(
    logits: torch.Tensor, temperature: torch.Tensor, uniform: torch.Tensor, mask_rows: torch.Tensor, words: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Does what pick does, by torch in float64."""
    token = torch.arange(logits.shape[1], device=logits.device)
    bits = (words[:, token // 32] >> (token % 32)) & 1
    allowed = torch.where(mask_rows.unsqueeze(1) >= 0, bits[mask_rows.clamp(min=0).long()] != 0, True)
    masked = torch.where(allowed, logits.double(), float("-inf"))
    best = masked.amax(dim=1)
    scaled = (masked - best.unsqueeze(1)) / temperature.clamp(min=1e-30).double().unsqueeze(1)
    reached = scaled.exp().cumsum(dim=1)
    drawn = torch.searchsorted(reached, (uniform.double() * reached[:, -1]).unsqueeze(1), right=True)
    return torch.where(temperature > 0, drawn.squeeze(1), masked.argmax(dim=1)), best.float()
