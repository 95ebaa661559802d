"""Finds the equal rows of a matrix, so that they are multiplied once."""

from __future__ import annotations

import torch

from gptoss.kernels.layers import SharedRows

KEY_ELEMENTS = 4  # of a row of the head, to sort it by: as many as fill an int64
MIN_SHARED = 0.1


def share_rows(weight: torch.Tensor) -> SharedRows | None:
    """The rows of `weight` bfloat16 [N, K], its largest set of equal rows stored once, as the last.

    None where fewer than a tenth of the rows are equal: it would not pay. A step with one token reads the whole head,
    and the rows of tokens that a small model never writes may all be equal.
    """
    starts = weight[:, :KEY_ELEMENTS].contiguous().view(torch.int64).squeeze(1)
    _, group, sizes = torch.unique(starts, return_inverse=True, return_counts=True)
    largest = int(sizes.argmax())
    equal = group == largest
    if int(sizes[largest]) < len(weight) * MIN_SHARED:
        return None
    one = weight[equal.nonzero()[0]]
    if not torch.equal(weight[equal], one.expand(int(equal.sum()), -1)):
        return None
    row_of = (~equal).cumsum(0) - 1
    row_of[equal] = len(weight) - int(equal.sum())
    return SharedRows(torch.cat((weight[~equal], one)), row_of)
