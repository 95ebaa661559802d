"""What words mean, as far as a vector of 40 numbers says it: words that stand near one another in text lie close.

The file is made by scripts/make_word_vectors.py of GloVe's vectors (Pennington, Socher and Manning 2014, "GloVe: Global
Vectors for Word Representation"; public domain). Without it a model of this size would have to learn from its lessons alone
that a scooter is rented and a lawyer is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from gptoss.harmony.vocabulary import load_vocabulary

FILE = Path(__file__).resolve().parents[2] / "assets" / "nano" / "word-vectors.safetensors"
VECTOR_SIZE = 40
NEAR = 0.72  # cosine from which on one word may stand for the other
MOST_NEAR = 4
SAME_BEGINNING = 4  # letters that a word's other forms share with it


def word_of(text: bytes) -> str | None:
    """The word in lower case that a token with or without a leading space or sign is, if it is one."""
    word = text if text[:1].isalpha() else text[1:]
    if len(word) < 2 or not word.isalpha():  # bytes.isalpha knows ASCII alone
        return None
    return word.decode().lower()


def word_vectors(token_bytes: Sequence[bytes]) -> torch.Tensor:
    """-> float32 [tokens, VECTOR_SIZE] of length 1, or 0 where a token is no word of the file.

    A word's tokens, in any case and with or without a space or sign in front, have the same vector.
    """
    file = load_file(FILE)
    packed = file["steps"]
    steps = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), VECTOR_SIZE)
    vectors = (steps.astype(np.float32) - 8) * file["scale"]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    known = np.flatnonzero(np.unpackbits(file["tokens"])[: len(token_bytes)]).tolist()
    row_of: dict[str | None, int] = {word_of(token_bytes[i]): row for row, i in enumerate(known)}
    none = len(vectors)
    rows = [row_of.get(word_of(text), none) for text in token_bytes]
    padded = torch.from_numpy(np.vstack((vectors, np.zeros_like(vectors[:1]))))
    return padded.index_select(0, torch.tensor(rows))


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
