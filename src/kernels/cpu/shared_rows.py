"""Rows of a matrix that are all alike, multiplied once."""

from __future__ import annotations

import torch

KEY_ELEMENTS = 4  # of a row of the head, to sort it by: as many as fill an int64
MIN_SHARED = 0.1


def share_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """weight bfloat16 [N, K] -> (its rows, those that are all alike once and last, [D, K]; each row's place among
    them, int64 [N]). None where not a tenth of the rows are alike: it would not pay.

    A step with one token reads the whole head, and rows for tokens that a small model never writes need not differ.
    """
    starts = weight[:, :KEY_ELEMENTS].contiguous().view(torch.int64).squeeze(1)
    _, group, sizes = torch.unique(starts, return_inverse=True, return_counts=True)
    largest = int(sizes.argmax())
    alike = group == largest
    if int(sizes[largest]) < len(weight) * MIN_SHARED:
        return None
    one = weight[alike.nonzero()[0]]
    if not torch.equal(weight[alike], one.expand(int(alike.sum()), -1)):
        return None
    places = (~alike).cumsum(0) - 1
    places[alike] = len(weight) - int(alike.sum())
    return torch.cat((weight[~alike], one)), places
