"""The tokenizer that grammars are compiled for, made once for all tests of a process."""

from __future__ import annotations

import functools

from llguidance import LLTokenizer

from gptoss.engine.core.grammar_matcher import load_tokenizer
from gptoss.harmony.special_tokens import SPECIAL_TOKENS, SPLIT_PATTERN, STOP_TOKEN_IDS, VOCAB_SIZE
from tests.support.vocabulary import public_vocabulary


@functools.cache
def public_tokenizer() -> LLTokenizer:
    ranks = public_vocabulary().ranks_path
    return load_tokenizer(ranks, SPECIAL_TOKENS, SPLIT_PATTERN, VOCAB_SIZE, list(STOP_TOKEN_IDS))
