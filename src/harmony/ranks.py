"""Reads the three file formats for the ranks of a byte-pair encoding."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from gptoss.gguf_header import GgufError, StringArray, read_model, read_strings
from gptoss.harmony.special_tokens import FIRST_SPECIAL, SPECIAL_TEXT

RESERVED = "<|reserved_"  # files name these as they like


def ranks_from_tokenizer_json(path: Path) -> bytes:
    """Converts a Hugging Face byte-level BPE file to tiktoken's format (base64 token, space, rank)."""
    vocab: dict[str, int] = json.loads(path.read_bytes())["model"]["vocab"]
    return _tiktoken(sorted((rank, token) for token, rank in vocab.items() if rank < FIRST_SPECIAL))


def ranks_from_gguf(path: Path) -> bytes:
    """Converts the vocabulary of a GGUF file to tiktoken's format.

    Raises:
        KeyError: the file has no vocabulary.
        ValueError: a special token is not where Harmony has it, or the file cannot be read.
    """
    try:
        tokens = read_model(path).keys["tokenizer.ggml.tokens"]
        if not isinstance(tokens, StringArray):
            raise ValueError("tokenizer.ggml.tokens is not a list of strings")
        names = read_strings(tokens)
    except GgufError as error:
        raise ValueError(str(error)) from error
    for token_id, text in SPECIAL_TEXT.items():
        found = names[token_id] if token_id < len(names) else None
        if not text.startswith(RESERVED) and found != text:
            raise ValueError(f"token {token_id} is {found!r}, expected {text!r}")
    return _tiktoken(list(enumerate(names[:FIRST_SPECIAL])))


def _tiktoken(tokens: list[tuple[int, str]]) -> bytes:
    """Ranks and tokens in GPT-2's characters -> tiktoken's format."""
    translate = str.maketrans({char: chr(byte) for byte, char in byte_to_char().items()})
    lines = [
        b"%s %d\n" % (base64.b64encode(token.translate(translate).encode("latin-1")), rank) for rank, token in tokens
    ]
    return b"".join(lines)


def read_ranks(data: bytes) -> dict[bytes, int]:
    """Reads tiktoken's format: token bytes -> rank, in the order of ranks."""
    fields = data.split()
    return {base64.b64decode(token): int(rank) for token, rank in zip(fields[::2], fields[1::2], strict=True)}


def byte_to_char() -> dict[int, str]:
    """GPT-2's printable character for each byte (openai/gpt-2, encoder.py, bytes_to_unicode)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {byte: chr(byte) for byte in printable}
    for offset, byte in enumerate(b for b in range(256) if b not in table):
        table[byte] = chr(256 + offset)
    return table
