"""Rows of embedding and head before anything is learnt."""

from __future__ import annotations

from itertools import accumulate

import torch

from gptoss.embedded.token_rows import CODE_SIZE, LETTERS, NO_LETTER, NUM_FEATURES
from gptoss.embedded.word_vectors import VECTOR_SIZE


def first_meaning(hidden: int) -> torch.Tensor:
    """-> [VECTOR_SIZE, H]: meanings lie among the dimensions of the code, and have half its energy."""
    meaning = torch.zeros(VECTOR_SIZE, hidden)
    torch.nn.init.orthogonal_(meaning[:, : hidden // 3], gain=(hidden / 2) ** 0.5)
    return meaning


def first_rows(hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> code [CODE_SIZE, H] and feature [NUM_FEATURES, H] of a model that has learnt nothing yet.

    Code, each position's letter, and the rest have dimensions of their own, so that no one drowns another, and a letter
    looks the same at each position: to spell a word is to move one block of it to the first.
    """
    widths = [hidden // 3, *[hidden * 5 // 8 // LETTERS] * LETTERS]
    widths.append(hidden - sum(widths))
    ends = list(accumulate(widths))
    code = torch.zeros(CODE_SIZE, hidden)
    code[:, : ends[0]] = torch.randn(CODE_SIZE, widths[0]) * (hidden / widths[0]) ** 0.5
    feature = torch.zeros(NUM_FEATURES, hidden)
    share = hidden / (LETTERS + 2)
    letters = torch.randn(NO_LETTER + 1, widths[1]) * (share / widths[1]) ** 0.5
    for position in range(LETTERS):
        rows = slice(position * (NO_LETTER + 1), (position + 1) * (NO_LETTER + 1))
        feature[rows, ends[position] : ends[position + 1]] = letters
    rest = feature[LETTERS * (NO_LETTER + 1) :, ends[-2] :]
    rest.copy_(torch.randn(rest.shape) * (share / widths[-1]) ** 0.5)
    return code, feature
