"""MXFP4 experts in the order in which the Triton kernels read them.

Four codes that lie 32 columns apart share a 16-bit word, their bits spread so that three masks and shifts turn two
words into four pairs of bfloat16 numbers: slice j of a word has sign, exponent and mantissa at BIT_PLACES[j], and
moved to the places of slice 0 they are the bits of a bfloat16 number 2 ** 126 times too small, a subnormal one
included. One multiplication by 2 ** (scale - 1) makes it exact. The four columns lie 32 apart, one MXFP4 group each,
so a scale is constant along a run of 32.

Shapes: E experts, N rows (a multiple of 16), K columns, KB = ceil(K / 128).
    words   int16 [E, N / 16, KB, 16, 32]  word i of a row holds columns kb * 128 + 32 j + i, j = 0 .. 3
    scales  uint8 [E, N / 16, KB, 16, 4]   E8M0, of the four slices
Sixteen rows of 128 columns lie together (1 KiB), so a tile of any multiple of 16 rows is read in whole cache lines.
"""

from __future__ import annotations

import torch

from gptoss.kernels.layers import PackedMxfp4
from gptoss.kernels.mxfp4 import GROUP_SIZE, Mxfp4Tensor

UNIT_ROWS = 16
HALF_UNIT = UNIT_ROWS // 2
SLICES = 4
BLOCK_COLUMNS = SLICES * GROUP_SIZE
TOGETHER = 8  # experts: a round is some hundred launches, and takes 30 times their bytes
MAX_SCALE = 128  # 2 ** (scale - 1) must be a bfloat16 number
BIT_PLACES = ((15, 8, 7, 6), (12, 5, 4, 3), (9, 2, 1, 0), (14, 13, 11, 10))  # sign, exponent, mantissa
CODE_BITS = (3, 2, 1, 0)


def gate_up_order(intermediate: int, device: torch.device | None = None) -> torch.Tensor:
    """The order int64 [2 I] of the rows [gate rows, up rows] in units of 16.

    A unit is 8 gate rows and the 8 up rows that belong to them: one lane of an m16n8 accumulator then holds both.
    """
    gate = torch.arange(intermediate, device=device).view(-1, HALF_UNIT)
    return torch.cat((gate, gate + intermediate), dim=1).flatten()


def pack_experts(w: Mxfp4Tensor, row_order: torch.Tensor | None = None) -> PackedMxfp4:
    """[E, N, K] -> the same numbers in the kernels' order, a few experts at a time. Lossless.

    Raises:
        ValueError: N is no multiple of 16, or a scale is above 2 ** 1.
    """
    num_experts, rows, groups = w.scales.shape
    if rows % UNIT_ROWS:
        raise ValueError(f"MXFP4 matrices of {rows} rows: the kernels take multiples of {UNIT_ROWS}")
    if w.scales.numel() and int(w.scales.max()) > MAX_SCALE:
        raise ValueError(f"an MXFP4 scale is {int(w.scales.max())}: the kernels take up to {MAX_SCALE} (a factor of 2)")
    blocks = -(-groups // SLICES)
    shape = (num_experts, rows // UNIT_ROWS, blocks, UNIT_ROWS)
    words = torch.empty((*shape, GROUP_SIZE), dtype=torch.int16, device=w.blocks.device)
    scales = torch.empty((*shape, SLICES), dtype=torch.uint8, device=w.blocks.device)
    for first in range(0, num_experts, TOGETHER):
        part = w[first : first + TOGETHER]
        order = slice(None) if row_order is None else row_order
        codes = _pad(_codes(part.blocks).flatten(0, 1), blocks * SLICES)
        scale = _pad(part.scales.flatten(0, 1).unsqueeze(-1), blocks * SLICES).squeeze(-1)
        codes = codes.view(-1, rows, blocks, SLICES, GROUP_SIZE)[:, order]
        scale = scale.view(-1, rows, blocks, SLICES)[:, order]
        packed = _words(codes.flatten(0, 1))
        count = len(codes)
        words[first : first + count] = packed.view(count, -1, UNIT_ROWS, blocks, GROUP_SIZE).transpose(2, 3)
        scales[first : first + count] = scale.view(count, -1, UNIT_ROWS, blocks, SLICES).transpose(2, 3)
    return PackedMxfp4(words, scales, groups * GROUP_SIZE)


def unpack_experts(w: PackedMxfp4, row_order: torch.Tensor | None = None) -> Mxfp4Tensor:
    """The inverse of pack_experts."""
    num_experts, units, blocks = w.words.shape[:3]
    words = w.words.transpose(2, 3).reshape(num_experts, units * UNIT_ROWS, blocks, GROUP_SIZE).int()
    codes = torch.zeros((*words.shape[:3], SLICES, GROUP_SIZE), dtype=torch.int32, device=words.device)
    for j, places in enumerate(BIT_PLACES):
        for place, bit in zip(places, CODE_BITS, strict=True):
            codes[..., j, :] |= ((words >> place) & 1) << bit
    groups = w.num_columns // GROUP_SIZE
    codes = codes.flatten(2, 3)[:, :, :groups]
    scales = w.scales.transpose(2, 3).reshape(num_experts, units * UNIT_ROWS, -1)[:, :, :groups]
    if row_order is not None:
        inverse = torch.argsort(row_order)
        codes, scales = codes[:, inverse], scales[:, inverse]
    packed = codes[..., 0::2] | (codes[..., 1::2] << 4)
    return Mxfp4Tensor(packed.to(torch.uint8), scales.contiguous())


def _codes(blocks: torch.Tensor) -> torch.Tensor:
    """uint8 [N, G, 16] -> uint8 [N, G, 32]."""
    return torch.stack((blocks & 0xF, blocks >> 4), dim=-1).flatten(-2)


def _pad(x: torch.Tensor, groups: int) -> torch.Tensor:
    """[N, G, ...] -> [N, groups, ...], zeros at the end: code 0 is the number 0 under any scale."""
    missing = groups - x.shape[1]
    return x if missing == 0 else torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)


def _words(codes: torch.Tensor) -> torch.Tensor:
    """uint8 [N, KB, 4, 32] -> int16 [N, KB, 32]."""
    words = torch.zeros(*codes.shape[:2], GROUP_SIZE, dtype=torch.int32, device=codes.device)
    for j, places in enumerate(BIT_PLACES):
        code = codes[:, :, j].int()
        for place, bit in zip(places, CODE_BITS, strict=True):
            words |= ((code >> bit) & 1) << place
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)
