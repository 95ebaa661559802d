"""Words that mean nearly the same."""

from __future__ import annotations

from functools import cache

import numpy as np

from gptoss.embedded.word_vectors import word_of, word_vectors
from gptoss.harmony.vocabulary_files import load_vocabulary

NEAR = 0.72  # cosine from which on one word may stand for the other
MOST_NEAR = 4
SAME_BEGINNING = 4  # letters that a word's other forms share with it


@cache
def near_words(word: str) -> tuple[str, ...]:
    """The nearest words that are no forms of this one, at most MOST_NEAR; () where none is near."""
    words, vectors, row_of = _table()
    if word not in row_of:
        return ()
    likeness = vectors @ vectors[row_of[word]]
    nearest = np.argsort(-likeness)[1 : 2 * MOST_NEAR]
    near = [words[row] for row in nearest if likeness[row] > NEAR]
    return tuple(w for w in near if not _begin_alike(w, word))[:MOST_NEAR]


def _begin_alike(one: str, other: str) -> bool:
    return one.startswith(other[:SAME_BEGINNING]) or other.startswith(one[:SAME_BEGINNING])


@cache
def _table() -> tuple[list[str], np.ndarray, dict[str, int]]:
    token_bytes = load_vocabulary().token_bytes
    vectors = word_vectors(token_bytes)
    row_of: dict[str, int] = {}
    token_ids = []
    for token_id in vectors.any(dim=1).nonzero().flatten().tolist():
        word = word_of(token_bytes[token_id])
        if word is not None and word not in row_of:
            row_of[word] = len(row_of)
            token_ids.append(token_id)
    return list(row_of), vectors[token_ids].numpy(), row_of
