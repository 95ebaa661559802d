"""The tokenizer files of a Hugging Face checkpoint."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from gptoss.harmony.ranks import byte_to_char
from gptoss.harmony.special_tokens import CALL, FIRST_SPECIAL, SPECIAL_TOKENS, SPLIT_PATTERN

SPECIAL_ROLES = {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"}
TOKENIZER_CONFIG: dict[str, Any] = {
    **SPECIAL_ROLES,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 131_072,
    "model_input_names": ["input_ids", "attention_mask"],
    "tokenizer_class": "PreTrainedTokenizerFast",
}


def tokenizer_config(checkpoint: Path | None) -> dict[str, Any]:
    """The settings of every gpt-oss, updated from a checkpoint's tokenizer_config.json and chat template."""
    config = dict(TOKENIZER_CONFIG)
    if checkpoint is None:
        return config
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((checkpoint / "tokenizer_config.json").read_text())
        config |= found if isinstance(found, dict) else {}
    with contextlib.suppress(OSError, ValueError):
        template = (checkpoint / "chat_template.jinja").read_text()
        config.setdefault("chat_template", template)
    return config


def write_tokenizer(out: Path, tokens: Sequence[bytes]) -> None:
    """Writes tokenizer.json (byte-level BPE) and the files next to it.

    `tokens`: of ordinary tokens, by rank.
    """
    chars = byte_to_char()
    text = [token.decode("latin-1").translate(chars) for token in tokens]
    special = [
        {
            "id": token_id,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for name, token_id in SPECIAL_TOKENS.items()
        if token_id <= CALL
    ]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: rank for rank, token in enumerate(text)},
            "merges": _merges(tokens, text),
        },
    }
    (out / "tokenizer.json").write_bytes(msgspec.json.encode(tokenizer))
    _write_json(out / "tokenizer_config.json", TOKENIZER_CONFIG)
    _write_json(out / "special_tokens_map.json", SPECIAL_ROLES)
    assert len(tokens) == FIRST_SPECIAL


def _merges(tokens: Sequence[bytes], text: Sequence[str]) -> msgspec.Raw:
    """Every way to split a token into two known ones, in the order of tokens, best pair first.

    As JSON text: half a million small lists would keep the garbage collector busy for longer than everything else.
    """
    rank_of = {token: rank for rank, token in enumerate(tokens)}.get
    quoted = [msgspec.json.encode(one) for one in text]
    merges = []
    for token in tokens:
        pairs = []
        for i in range(1, len(token)):
            left = rank_of(token[:i])
            if left is not None:
                right = rank_of(token[i:])
                if right is not None:
                    pairs.append((left, right))
        pairs.sort()
        merges += [b"[%b,%b]" % (quoted[left], quoted[right]) for left, right in pairs]
    return msgspec.Raw(b"[%b]" % b",".join(merges))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
