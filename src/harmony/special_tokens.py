"""Ids and texts of Harmony's special tokens, and the pattern that splits text into pieces."""

from __future__ import annotations

VOCAB_SIZE = 201_088
STARTOFTEXT, ENDOFTEXT, RETURN, CONSTRAIN, CHANNEL = 199_998, 199_999, 200_002, 200_003, 200_005
START, END, MESSAGE, CALL = 200_006, 200_007, 200_008, 200_012
FIRST_SPECIAL = STARTOFTEXT
# The assistant's turn ends at these whatever generation_config.json says: early downloads of the model list no CALL.
STOP_TOKEN_IDS = (RETURN, CALL, ENDOFTEXT)
# The engine's self-test computes these: special tokens first, which have the largest activations.
PROBE_TOKEN_IDS = (*range(STARTOFTEXT, 200_019), *range(1, 8))
_NAMES = {
    STARTOFTEXT: "startoftext",
    ENDOFTEXT: "endoftext",
    RETURN: "return",
    CONSTRAIN: "constrain",
    CHANNEL: "channel",
    START: "start",
    END: "end",
    MESSAGE: "message",
    CALL: "call",
}
SPECIAL_TOKENS = {
    f"<|{_NAMES.get(token_id, f'reserved_{token_id}')}|>": token_id for token_id in range(FIRST_SPECIAL, VOCAB_SIZE)
}
SPECIAL_TEXT = {token_id: text for text, token_id in SPECIAL_TOKENS.items()}
# tiktoken's o200k pattern (openai/tiktoken, openai_public.py); the model's tokenizer.json has it too.
SPLIT_PATTERN = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
