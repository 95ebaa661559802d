"""Computes the rows of embedding and head from the text of the tokens.

A table of 201,088 free rows would leave words untrained that are not in the training set. A row is a sum of traits
instead, so that such a word can still be read, copied and spelled:

    row(token) = code(token) @ A + meaning(token) @ M + sum of F[f] over its features f + its own row, if it is common

`code` is a fixed random sign vector of the token's text without a leading space or sign, so that " Paris", "Paris" and
".Paris" are nearly equal; `meaning` is its word's vector (word_vectors.py), in the embedding only. The features are the
first letters by position, the length and the leading character; in the embedding also a few more letters, and whether
the word without the space is a token too. Tokens with letters of a script other than Latin are never written: they
share one row of the head.

Shapes: H hidden, V vocabulary.
"""

from __future__ import annotations

import hashlib
import string
import unicodedata
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from gptoss.embedded.word_vectors import word_vectors
from gptoss.harmony.special_tokens import VOCAB_SIZE
from gptoss.harmony.vocabulary_files import Vocabulary

CODE_SIZE = 96
LETTERS = 10
NO_LETTER = 256
LENGTHS = 16
LATER_LETTERS = 4  # after the first LETTERS; lower-case Latin letters only, in the embedding only
_LATER_ROWS = 1 + len(string.ascii_lowercase)
_SPELLED_AT = LETTERS * (NO_LETTER + 1) + LENGTHS + 256
NUM_FEATURES = _SPELLED_AT + 2 + LATER_LETTERS * _LATER_ROWS
HEAD_COLUMNS = LETTERS + 2


@dataclass(frozen=True, slots=True)
class TokenTraits:
    """The traits of each token of the vocabulary."""

    codes: torch.Tensor  # float32 [V, CODE_SIZE], +-1 / sqrt(CODE_SIZE)
    # int64 [V, HEAD_COLUMNS + 1 + LATER_LETTERS], rows of the feature table; the head has HEAD_COLUMNS of them
    features: torch.Tensor
    meanings: torch.Tensor  # float32 [V, VECTOR_SIZE] of length 1, or 0
    written: torch.Tensor  # bool [V]: false for tokens with letters of a script other than Latin

    @classmethod
    def of(cls, vocabulary: Vocabulary) -> TokenTraits:
        texts = [*vocabulary.token_bytes, *map(vocabulary.bytes_of, range(vocabulary.num_ordinary, VOCAB_SIZE))]
        # a word may have one leading byte that is not a letter or digit; 0 if it has none
        leads = [text[0] if text[1:2].isalpha() and text[0] < 128 and not text[:1].isalnum() else 0 for text in texts]
        stripped = [text[1:] if lead else text for text, lead in zip(texts, leads, strict=True)]
        digests = b"".join(hashlib.blake2b(text, digest_size=CODE_SIZE // 8).digest() for text in stripped)
        codes = np.frombuffer(digests, np.uint8).reshape(VOCAB_SIZE, -1)
        lengths = np.fromiter(map(len, stripped), np.int64, VOCAB_SIZE)
        lengths[vocabulary.num_ordinary :] = 0  # special tokens have no letters
        width = LETTERS + LATER_LETTERS
        padded = b"".join(text[:width].ljust(width, b"\0") for text in stripped)
        letters = np.frombuffer(padded, np.uint8).reshape(VOCAB_SIZE, width).astype(np.int64)
        letters[np.arange(width) >= lengths[:, None]] = NO_LETTER
        letters, later = letters[:, :LETTERS], letters[:, LETTERS:] - ord("a") + 1
        later[(later < 1) | (later >= _LATER_ROWS)] = 0
        spelled = [
            lead == ord(" ") and rest.isalpha() and rest not in vocabulary.rank_of
            for lead, rest in zip(leads, stripped, strict=True)
        ]
        lengths_at = LETTERS * (NO_LETTER + 1)
        features = np.column_stack(
            (
                letters + np.arange(LETTERS) * (NO_LETTER + 1),
                lengths_at + np.minimum(lengths, LENGTHS - 1),
                lengths_at + LENGTHS + np.array(leads),
                _SPELLED_AT + np.array(spelled),
                _SPELLED_AT + 2 + later + np.arange(LATER_LETTERS) * _LATER_ROWS,
            )
        )
        bits = torch.from_numpy(np.unpackbits(codes, axis=1))
        return cls(
            bits.float().mul_(2).sub_(1).div_(CODE_SIZE**0.5),
            torch.from_numpy(features),
            word_vectors(texts),
            torch.tensor([_is_latin(text) for text in texts]),
        )

    def features_of(self, table: TokenTable) -> torch.Tensor:
        """int64, ascending: the rows of a table's features that at least one token uses."""
        features = self.features[:, : table.columns]
        if table.unwritten is not None:
            features = features[self.written]
        return torch.bincount(features.flatten(), minlength=NUM_FEATURES).nonzero().squeeze(1)


def _is_latin(text: bytes) -> bool:
    """Whether all letters are Latin. Bytes that are only part of a character are ignored."""
    return text.isascii() or all(
        unicodedata.name(char, "").startswith("LATIN") or not char.isalpha() for char in text.decode(errors="ignore")
    )


class TokenTable(nn.Module):
    """The rows of the embedding or of the head, computed from traits."""

    def __init__(
        self,
        code: torch.Tensor,
        feature: torch.Tensor,
        common: torch.Tensor,
        *,
        meaning: torch.Tensor | None = None,
        shares_unwritten: bool = False,
    ) -> None:
        """code [CODE_SIZE, H], feature [NUM_FEATURES, H], meaning [VECTOR_SIZE, H].

        `shares_unwritten`: tokens that are never written share one row.
        """
        super().__init__()
        hidden = code.shape[1]
        self.code = nn.Parameter(code)
        self.feature = nn.Parameter(feature)
        self.meaning = None if meaning is None else nn.Parameter(meaning)
        self.own = nn.Parameter(torch.zeros(len(common), hidden))
        self.other = nn.Parameter(torch.zeros(hidden))  # added to all tokens that are not common
        self.unwritten = nn.Parameter(torch.zeros(hidden)) if shares_unwritten else None
        self.columns = HEAD_COLUMNS if shares_unwritten else None  # of a token's features
        self.common = common
        row_of = torch.full((VOCAB_SIZE,), -1)
        row_of[common] = torch.arange(len(common))
        self._row_of = row_of

    def rows(self, token_ids: torch.Tensor, traits: TokenTraits) -> torch.Tensor:
        """token_ids int64 [N] -> float32 [N, H]."""
        features = traits.features[token_ids, : self.columns]
        made = traits.codes[token_ids] @ self.code
        made = made + F.embedding_bag(features, self.feature, mode="sum")
        if self.meaning is not None:
            made = made + traits.meanings[token_ids] @ self.meaning
        row = self._row_of[token_ids]
        known = (row >= 0).unsqueeze(-1)
        made = made + torch.where(known, self.own[row.clamp(min=0)], self.other)
        if self.unwritten is None:
            return made
        return torch.where(traits.written[token_ids].unsqueeze(-1), made, self.unwritten)
