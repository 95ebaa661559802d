"""What a server unfolds the embedded model from."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from gptoss.embedded.token_rows import HEAD_COLUMNS, LETTERS, TokenTraits
from gptoss.embedded.unfold import ASSET
from gptoss.embedded.word_vectors import FILE as WORD_VECTORS
from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary

MAX_ASSET_BYTES = 6 * 10**6


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary()


def test_words_have_one_meaning_and_words_of_one_kind_similar_ones(vocabulary: Vocabulary) -> None:
    meanings = TokenTraits.of(vocabulary).meanings

    def of(text: str) -> torch.Tensor:
        return meanings[vocabulary.rank_of[text.encode()]]

    for same in ("Paris", "_name", ".get", " Monday"):
        plain = f" {same.lstrip(' _.').lower()}"
        assert of(plain).norm() == pytest.approx(1) and torch.equal(of(same), of(plain))
    for near, other, far in (
        (" cancel", " postpone", " tomato"),
        (" Lyon", " Marseille", " invoice"),
        (" rain", " storm", " lawyer"),
    ):
        assert of(near) @ of(other) > 0.4 > of(near) @ of(far)
    for no_word in (" ", "12", "(", " é", "<|call|>"):
        token = vocabulary.rank_of.get(no_word.encode(), 200_012)
        assert not meanings[token].any()


def test_a_token_is_made_of_its_letters_and_of_how_it_is_written_without_a_space(vocabulary: Vocabulary) -> None:
    features = TokenTraits.of(vocabulary).features
    columns = {
        text: features[vocabulary.rank_of[text.encode()]].tolist()
        for text in (" consultation", " consulting", " connection", "connection", " Copenhagen")
    }
    spelled = {text: of[HEAD_COLUMNS] for text, of in columns.items()}
    assert b"connection" in vocabulary.rank_of
    assert b"consultation" not in vocabulary.rank_of and b"Copenhagen" not in vocabulary.rank_of
    has_twin = spelled.pop(" connection"), spelled.pop("connection")
    assert len(set(has_twin)) == len(set(spelled.values())) == 1 and has_twin[0] != spelled[" consulting"]
    long, short = columns[" consultation"], columns[" consulting"]
    differ = [at for at, (one, other) in enumerate(zip(long, short, strict=True)) if one != other]
    # the eighth to the tenth letter, the length, and the eleventh and twelfth letter
    assert differ == [7, 8, 9, LETTERS, HEAD_COLUMNS + 1, HEAD_COLUMNS + 2]


def test_the_embedded_model_is_small_and_of_the_shape_that_is_named() -> None:
    assert ASSET.stat().st_size + WORD_VECTORS.stat().st_size <= MAX_ASSET_BYTES
    with safe_open(ASSET, framework="pt") as file:
        assert file.get_slice("layers.5.w1.blocks").get_shape() == [8, 320, 6, 16]
