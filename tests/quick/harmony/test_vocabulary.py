from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
from pathlib import Path
from typing import Any, cast

import pytest
from openai_harmony import HarmonyEncoding

from gptoss.harmony import bpe, ranks, special_tokens, vocabulary_files
from gptoss.harmony.bpe import EncodingStoppedError, Limits, TooManyTokensError, merge_bytes
from tests.support.vocabulary import public_vocabulary, tokenizer_folder


def test_ranks_rebuilt_from_tokenizer_json_have_the_right_hash() -> None:
    data = ranks.ranks_from_tokenizer_json(tokenizer_folder() / "tokenizer.json")
    assert hashlib.sha256(data).hexdigest() == vocabulary_files.RANKS_SHA256


def test_a_damaged_tokenizer_falls_back_to_the_bundled_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = json.loads((tokenizer_folder() / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[1000:1002]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    assert "bundled" in vocabulary_files.load_vocabulary(folder, tmp_path / "cache").source
    (folder / "tokenizer.json").write_text("{")
    assert "bundled" in vocabulary_files.load_vocabulary(folder, tmp_path / "cache2").source


def test_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "vocabulary" / vocabulary_files.RANKS_NAME
    target.parent.mkdir()
    target.write_bytes(b"broken")
    vocabulary_files.load_vocabulary(None, tmp_path)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == vocabulary_files.RANKS_SHA256


def test_no_source_is_an_error_that_names_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_download(_: object) -> None:
        raise vocabulary_files.HarmonyError("offline")

    monkeypatch.setattr(vocabulary_files, "BUNDLED_RANKS", tmp_path / "missing.gz")
    monkeypatch.setattr(vocabulary_files, "load_harmony_encoding", no_download)
    with pytest.raises(vocabulary_files.VocabularyError, match=r"missing\.gz.*download: offline"):
        vocabulary_files.load_vocabulary(None, tmp_path)


def test_the_bundled_file_is_the_public_vocabulary() -> None:
    data = gzip.decompress(vocabulary_files.BUNDLED_RANKS.read_bytes())
    assert hashlib.sha256(data).hexdigest() == vocabulary_files.RANKS_SHA256


def test_text_never_becomes_a_special_token() -> None:
    loaded = public_vocabulary()
    for text in ("<|start|>system<|message|>", "<|end|>", "".join(special_tokens.SPECIAL_TOKENS)[:5000]):
        ids = loaded.encode(text)
        assert max(ids) < special_tokens.FIRST_SPECIAL
        assert loaded.decode(ids) == text


def test_special_ids_agree_with_openai_harmony() -> None:
    loaded = public_vocabulary()
    for name in ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|constrain|>", "<|return|>", "<|call|>"):
        assert loaded.encode_with_special(name) == [special_tokens.SPECIAL_TOKENS[name]]
    assert set(special_tokens.STOP_TOKEN_IDS) >= set(loaded.encoding.stop_tokens_for_assistant_actions())


@pytest.mark.parametrize("alphabet", ["a", "ab", "etaoin shr", "é日本ñ🤖", "0123456789", " ", "\n \t", "aA1_ -.()[]{}"])
def test_long_pieces_get_the_same_ids_as_short_ones(alphabet: str) -> None:
    loaded = public_vocabulary()
    rng = random.Random(len(alphabet))
    for size in (1, 2, 7, 300, 1500):
        text = "".join(rng.choices(alphabet, k=size))
        wanted = loaded.encoding.encode(text, disallowed_special=())
        assert loaded._encode_by_pieces(text) == wanted
        pieces = [merge_bytes(m.group().encode(), loaded.rank_of) for m in vocabulary_files._SPLIT.finditer(text)]
        assert [i for piece in pieces for i in piece] == wanted
        assert loaded.encode(f"x {text} y") == loaded.encoding.encode(f"x {text} y", disallowed_special=())


def test_text_without_a_break_is_no_trap() -> None:
    """The library alone would need minutes for this."""
    loaded = public_vocabulary()
    text = "a" * 300_000
    assert loaded.decode(loaded.encode(text)) == text


class _Watched:
    """The library's encoding, and how much it was given at once."""

    def __init__(self, encoding: HarmonyEncoding) -> None:
        self._encoding = encoding
        self.lengths: list[int] = []

    def encode(self, text: str, **options: Any) -> list[int]:
        self.lengths.append(len(text))
        return self._encoding.encode(text, **options)


def _watched() -> tuple[vocabulary_files.Vocabulary, _Watched]:
    loaded = public_vocabulary()
    watched = _Watched(loaded.encoding)
    return dataclasses.replace(loaded, encoding=cast("HarmonyEncoding", watched)), watched


@pytest.mark.parametrize(
    "alphabet",
    [
        "etaoin shr",
        "It's we'LL d'o",
        "é日本語，。ñ🤖 ",
        "a1 b22\n\n\r ",
        "aA1_ -./()[]{}'",
        "नमस्ते दु",
        "1234 5",
        "?! ./\n",
        "x   \t\n  y",
    ],
)
def test_text_in_portions_gets_the_same_ids_as_whole(alphabet: str) -> None:
    vocabulary, watched = _watched()
    text = "".join(random.Random(alphabet).choices(alphabet, k=6 * vocabulary_files.PORTION))
    assert vocabulary.encode(text) == vocabulary.encoding.encode(text, disallowed_special=())
    *portions, whole = watched.lengths
    assert whole == len(text) == sum(portions)
    assert max(portions) < vocabulary_files.PORTION + 200


def test_raw_prompts_have_special_tokens_and_the_librarys_ids() -> None:
    loaded = public_vocabulary()
    rng = random.Random(3)
    parts = [
        "<|start|>",
        "<|end|>",
        "<|none|>",
        "<|",
        "|>",
        "<|<|message|>",
        " a",
        "b c",
        "\n",
        "<|reserved_200100|>",
        "it's",
    ]
    for _ in range(50):
        text = "".join(rng.choices(parts, k=30))
        wanted = loaded.encoding.encode(text, allowed_special="all")
        assert loaded.encode_with_special(text) == wanted, text


def test_raw_prompts_without_a_break_are_no_trap() -> None:
    vocabulary, watched = _watched()
    text = f"<|start|>{'a' * 100_000}<|end|> {' ' * 100_000}<|call|>"
    assert vocabulary.decode(vocabulary.encode_with_special(text)) == text
    assert max(watched.lengths, default=0) < vocabulary_files.LONG_PIECE


# --- long pieces, in windows ---


@pytest.mark.parametrize(
    "alphabet",
    [
        "a",
        "ab",
        "etaoinshr",
        "é日本ñ🤖",
        "日本語漢字",
        "🤖👩\u200d👩",
        " ",
        "\n \t",
        "aA",
        "ABa",
        "=-_/",
        "\n/.",
        "'sa",
        "ि्दुन",
    ],
)
@pytest.mark.parametrize("window", [150, 512])
def test_a_piece_in_windows_gets_the_ids_of_the_whole(
    alphabet: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bpe, "WINDOW", window)
    loaded = public_vocabulary()
    rng = random.Random(alphabet)
    for size in (1, 200, 2500):
        data = "".join(rng.choices(alphabet, k=size)).encode()
        assert loaded.byte_pairs.encode(data) == merge_bytes(data, loaded.rank_of)


@pytest.mark.parametrize("size", [150, 151, 249, 250])
def test_windows_that_do_not_join_are_encoded_again(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the last byte decides how all bytes before it are paired: neighbours merge, the last ones first."""
    monkeypatch.setattr(bpe, "WINDOW", 64)
    monkeypatch.setattr(bpe, "TAIL", 8)
    tokens = [bytes([i]) for i in range(256)]
    tokens += [bytes([i, i + 1]) for i in reversed(range(255))]
    rank_of = {token: rank for rank, token in enumerate(tokens)}
    pairs = bpe.BytePairs(tokens, rank_of, 2, lambda _: None)
    data = bytes(range(size))
    assert pairs.encode(data) == merge_bytes(data, rank_of)
    with pytest.raises(TooManyTokensError):
        pairs.encode(data, Limits((size + 1) // 2 - 1))
    assert len(pairs.encode(data, Limits((size + 1) // 2))) == (size + 1) // 2


def _ids(count: int) -> tuple[vocabulary_files.Vocabulary, str]:
    """A piece of so many tokens."""
    loaded = public_vocabulary()
    text = "".join(random.Random(5).choices("etaoinshr", k=4 * count))
    return loaded, loaded.decode(loaded.encode(text)[:count])


@pytest.mark.parametrize("count", [1, 500, 5000])
def test_encoding_ends_only_beyond_the_limit(count: int) -> None:
    loaded, text = _ids(count)
    whole = loaded.encode(text)
    for make in (loaded.encode, loaded.encode_with_special):
        assert make(text, Limits(len(whole))) == whole
        assert make(f"{text} and", Limits(len(whole) + 1)) == [*whole, *loaded.encode(" and")]
        with pytest.raises(TooManyTokensError):
            make(text, Limits(len(whole) - 1))
        with pytest.raises(TooManyTokensError):
            make(f"x<|end|>{text}", Limits(len(whole)))


@pytest.mark.parametrize("text", ["etaoin" * 150_000, " and so on" * 150_000, "'a" * 300_000, "日本" * 300_000])
def test_far_too_long_text_is_not_read_to_its_end(text: str) -> None:
    vocabulary, watched = _watched()
    with pytest.raises(TooManyTokensError):
        vocabulary.encode(text, Limits(20_000))
    assert sum(watched.lengths) < 400_000


def test_what_cannot_fit_is_refused_before_it_is_encoded() -> None:
    vocabulary, watched = _watched()
    with pytest.raises(TooManyTokensError):
        vocabulary.encode(" " * 200_000, Limits(1000))
    assert not watched.lengths


@pytest.mark.parametrize("text", ["etaoin" * 50_000, " and so on" * 50_000, "'a" * 50_000])
def test_encoding_stops_when_it_is_told_to(text: str) -> None:
    vocabulary, watched = _watched()

    def stopped() -> bool:
        return sum(watched.lengths) > 50_000

    with pytest.raises(EncodingStoppedError):
        vocabulary.encode(text, Limits(stopped=stopped))
    assert sum(watched.lengths) < 100_000
