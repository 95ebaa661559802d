"""Reads the two file formats for the ranks of a byte-pair encoding."""

from __future__ import annotations

import base64
import json
from pathlib import Path

from gptoss.harmony.special_tokens import FIRST_SPECIAL


def ranks_from_tokenizer_json(path: Path) -> bytes:
    """Converts a Hugging Face byte-level BPE file to tiktoken's format (base64 token, space, rank)."""
    vocab: dict[str, int] = json.loads(path.read_bytes())["model"]["vocab"]
    byte_of = {char: byte for byte, char in byte_to_char().items()}
    translate = str.maketrans({char: chr(byte) for char, byte in byte_of.items()})
    by_id = sorted((rank, token) for token, rank in vocab.items() if rank < FIRST_SPECIAL)
    lines = [
        b"%s %d\n" % (base64.b64encode(token.translate(translate).encode("latin-1")), rank) for rank, token in by_id
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
