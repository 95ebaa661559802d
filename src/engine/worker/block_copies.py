"""Copies blocks of the KV cache, for requests that share a part of a block."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch

from gptoss.kernels.layers import LayerCache


class BlockCopier:
    """Copies blocks in all layers of a rank, on the device's current stream."""

    def __init__(self, cache: Iterable[LayerCache]) -> None:
        """Each tensor of `cache` has a row for each block, in any type and shape; layers may share them."""
        tensors = [getattr(layer, field.name) for layer in cache for field in fields(layer)]
        distinct = {t.data_ptr(): t for t in tensors if isinstance(t, torch.Tensor)}
        self._tensors = [_as_words(tensor) for tensor in distinct.values()]

    def __call__(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copies block `a` to `b` for each (a, b).

        No block is in two of them, other than as the first of several.
        """
        targets = [tensor[target] for tensor in self._tensors for _, target in copies]
        sources = [tensor[source] for tensor in self._tensors for source, _ in copies]
        torch._foreach_copy_(targets, sources)


def _as_words(tensor: torch.Tensor) -> torch.Tensor:
    """A view [num_blocks, words]: types of one byte have no copy kernels of their own on some devices."""
    flat = tensor.view(len(tensor), -1)
    words = flat.shape[1] * flat.element_size() % 8 == 0
    return flat.view(torch.int64 if words else torch.uint8)
