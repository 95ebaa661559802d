"""The vocabulary as the files of a Hugging Face checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from src.harmony.vocabulary import (
    CALL,
    FIRST_SPECIAL,
    SPECIAL_TOKENS,
    SPLIT_PATTERN,
    byte_to_char,
    load_vocabulary,
)


def write_tokenizer(out: Path) -> None:
    """tokenizer.json (byte-level BPE) and tokenizer_config.json from the bundled ranks."""
    ranks = {token: rank for rank, token in enumerate(load_vocabulary().token_bytes)}
    char = byte_to_char()
    text = {token: "".join(map(char.__getitem__, token)) for token in ranks}
    merges: list[list[str]] = []
    for (
        token
    ) in ranks:  # rank order: every way to split a token into two known ones, best pair first
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in splits if a in ranks and b in ranks]
        merges += [[text[a], text[b]] for _, _, a, b in sorted(known)]
    special = [
        {"id": token_id, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for name, token_id in SPECIAL_TOKENS.items()
        if token_id <= CALL
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ]},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": {text[token]: rank for token, rank in ranks.items()}, "merges": merges},
    }  # fmt: skip
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    _write_json(
        out / "tokenizer_config.json",
        {
            "bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False, "model_max_length": 131_072,
            "model_input_names": ["input_ids", "attention_mask"],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )  # fmt: skip
    _write_json(
        out / "special_tokens_map.json",
        {"bos_token": "<|startoftext|>", "eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
    )
    assert len(ranks) == FIRST_SPECIAL


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
