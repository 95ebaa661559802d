from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
from openai_harmony import HarmonyEncoding

from src.harmony import vocabulary as v
from tests.helpers import checkpoint

ROOT = Path(__file__).resolve().parents[2]
BLOCKED = """
import socket, sys
def refuse(*a, **k): raise AssertionError("network used")
socket.socket.connect = refuse; socket.create_connection = refuse; socket.getaddrinfo = refuse
from pathlib import Path
from src.harmony.vocabulary import load_vocabulary
checkpoint = Path(sys.argv[2]) if len(sys.argv) > 2 else None
loaded = load_vocabulary(checkpoint, Path(sys.argv[1]))
print(loaded.source); print(loaded.encode("hello world"))
"""


def run_blocked(*args: Path) -> list[str]:
    command = [sys.executable, "-c", BLOCKED, *map(str, args)]
    env = {"PATH": "/usr/bin:/bin", "HTTPS_PROXY": "http://127.0.0.1:1", "HOME": str(args[0])}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_bundled_ranks_load_without_a_network(tmp_path: Path) -> None:
    source, ids = run_blocked(tmp_path)
    assert "bundled" in source
    assert ids == "[24912, 2375]"


def test_the_checkpoints_tokenizer_comes_first_and_gives_the_same_ids(tmp_path: Path) -> None:
    source, ids = run_blocked(tmp_path, checkpoint())
    assert source.endswith("tokenizer.json")
    assert ids == "[24912, 2375]"
    again, _ = run_blocked(tmp_path, checkpoint())
    assert again.endswith("(cached)")


def test_ranks_rebuilt_from_tokenizer_json_have_the_right_hash() -> None:
    data = v.ranks_from_tokenizer_json(checkpoint() / "tokenizer.json")
    assert hashlib.sha256(data).hexdigest() == v.RANKS_SHA256


def test_a_damaged_tokenizer_falls_back_to_the_bundled_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizer = json.loads((checkpoint() / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    a, b = list(vocab)[1000:1002]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}}))
    assert "bundled" in v.load_vocabulary(folder, tmp_path / "cache").source
    (folder / "tokenizer.json").write_text("{")
    assert "bundled" in v.load_vocabulary(folder, tmp_path / "cache2").source


def test_a_damaged_cache_is_replaced(tmp_path: Path) -> None:
    target = tmp_path / "vocabulary" / v.RANKS_NAME
    target.parent.mkdir()
    target.write_bytes(b"broken")
    v.load_vocabulary(None, tmp_path)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == v.RANKS_SHA256


def test_no_source_is_an_error_that_names_the_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_download(_: object) -> None:
        raise v.HarmonyError("offline")

    monkeypatch.setattr(v, "BUNDLED_RANKS", tmp_path / "missing.gz")
    monkeypatch.setattr(v, "load_harmony_encoding", no_download)
    with pytest.raises(v.VocabularyError, match=r"missing\.gz.*download: offline"):
        v.load_vocabulary(None, tmp_path)


def test_the_bundled_file_is_the_public_vocabulary() -> None:
    data = gzip.decompress(v.BUNDLED_RANKS.read_bytes())
    assert hashlib.sha256(data).hexdigest() == v.RANKS_SHA256


def test_text_never_becomes_a_special_token() -> None:
    loaded = v.load_vocabulary()
    for text in ("<|start|>system<|message|>", "<|end|>", "".join(v.SPECIAL_TOKENS)[:5000]):
        ids = loaded.encode(text)
        assert max(ids) < v.FIRST_SPECIAL
        assert loaded.decode(ids) == text


def test_special_ids_agree_with_openai_harmony() -> None:
    loaded = v.load_vocabulary()
    for name in (
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|constrain|>",
        "<|return|>",
        "<|call|>",
    ):
        assert loaded.encode_with_special(name) == [v.SPECIAL_TOKENS[name]]
    assert set(v.STOP_TOKEN_IDS) >= set(loaded.encoding.stop_tokens_for_assistant_actions())


@pytest.mark.parametrize(
    "alphabet", ["a", "ab", "etaoin shr", "é日本ñ🤖", "0123456789", " ", "\n \t", "aA1_ -.()[]{}"]
)
def test_long_pieces_get_the_same_ids_as_short_ones(alphabet: str) -> None:
    loaded = v.load_vocabulary()
    rng = random.Random(len(alphabet))
    for size in (1, 2, 7, 300, 1500):
        text = "".join(rng.choices(alphabet, k=size))
        wanted = loaded.encoding.encode(text, disallowed_special=())
        assert loaded._encode_by_pieces(text) == wanted
        pieces = [
            v.merge_bytes(m.group().encode(), loaded.rank_of) for m in v._SPLIT.finditer(text)
        ]
        assert [i for piece in pieces for i in piece] == wanted
        assert loaded.encode(f"x {text} y") == loaded.encoding.encode(
            f"x {text} y", disallowed_special=()
        )


def test_text_without_a_break_is_no_trap() -> None:
    """The library alone would need minutes for this."""
    loaded = v.load_vocabulary()
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


def _watched() -> tuple[v.Vocabulary, _Watched]:
    loaded = v.load_vocabulary()
    watched = _Watched(loaded.encoding)
    return dataclasses.replace(loaded, encoding=cast("HarmonyEncoding", watched)), watched


@pytest.mark.parametrize(
    "alphabet", ["etaoin shr", "It's we'LL d'o", "é日本語，。ñ🤖 ", "a1 b22\n\n\r ", "aA1_ -./()[]{}'", "नमस्ते दु", "1234 5", "?! ./\n", "x   \t\n  y"]
)  # fmt: skip
def test_text_in_portions_gets_the_same_ids_as_whole(alphabet: str) -> None:
    vocabulary, watched = _watched()
    text = "".join(random.Random(alphabet).choices(alphabet, k=6 * v.PORTION))
    assert vocabulary.encode(text) == vocabulary.encoding.encode(text, disallowed_special=())
    *portions, whole = watched.lengths
    assert whole == len(text) == sum(portions)
    assert max(portions) < v.PORTION + 200


def test_raw_prompts_have_special_tokens_and_the_librarys_ids() -> None:
    loaded = v.load_vocabulary()
    rng = random.Random(3)
    parts = ["<|start|>", "<|end|>", "<|none|>", "<|", "|>", "<|<|message|>", " a", "b c", "\n", "<|reserved_200100|>", "it's"]  # fmt: skip
    for _ in range(50):
        text = "".join(rng.choices(parts, k=30))
        wanted = loaded.encoding.encode(text, allowed_special="all")
        assert loaded.encode_with_special(text) == wanted, text


def test_raw_prompts_without_a_break_are_no_trap() -> None:
    vocabulary, watched = _watched()
    text = f"<|start|>{'a' * 100_000}<|end|> {' ' * 100_000}<|call|>"
    assert vocabulary.decode(vocabulary.encode_with_special(text)) == text
    assert max(watched.lengths, default=0) < v.LONG_PIECE
