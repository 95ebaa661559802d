"""Word vectors of 40 numbers: words used in similar contexts have similar vectors.

training/nano/make_word_vectors.py makes the file from GloVe's vectors (Pennington, Socher and Manning 2014, "GloVe:
Global Vectors for Word Representation"; public domain). Without them a model of this size would have to learn from its
training set alone that a scooter is rented and a lawyer is not.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors.numpy import load_file

from gptoss.resources import resource

FILE = resource("assets", "nano", "word-vectors.safetensors")
VECTOR_SIZE = 40


def word_of(text: bytes) -> str | None:
    """The word of a token in lower case, without a leading space or sign; None if it is not a word."""
    word = text if text[:1].isalpha() else text[1:]
    if len(word) < 2 or not word.isalpha():  # bytes.isalpha is ASCII only
        return None
    return word.decode().lower()


def word_vectors(token_bytes: Sequence[bytes]) -> torch.Tensor:
    """Returns float32 [tokens, VECTOR_SIZE] of length 1, or 0 for tokens whose word is not in the file.

    Tokens of one word, in any case and with or without a leading space or sign, have the same vector.
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
