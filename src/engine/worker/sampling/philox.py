"""Random numbers by seed and position (Philox)."""

from __future__ import annotations

import numpy as np


def philox_uniform(seeds: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """int64 [R] seeds, int64 [R] positions -> float64 [R] in [0, 1), 53 random bits each."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    seeds, positions = seeds.view(np.uint64), positions.view(np.uint64)
    zero = np.zeros_like(positions)
    c0, c1, c2, c3 = positions & low, positions >> half, zero, zero
    k0, k1 = seeds & low, seeds >> half
    for _ in range(10):
        p0, p1 = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (p1 >> half) ^ c1 ^ k0, p1 & low, (p0 >> half) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    bits = (c0 << np.uint64(21)) | (c1 >> np.uint64(11))
    return bits.astype(np.float64) / (1 << 53)
