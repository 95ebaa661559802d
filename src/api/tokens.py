"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Request

from src.api.body import read_json_object
from src.api.chat_plan import plan_chat
from src.api.deps import Context, caller_of
from src.api.errors import InvalidRequest
from src.api.protocol import FIRST_PROBLEM, VOCAB_SIZE, Strict
from src.api.unknown_fields import client_of
from src.harmony.tokenizer_files import tokenizer_config

router = APIRouter()


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    parse_special: bool | None = None

    @property
    def reads_special(self) -> bool:
        """vLLM's clients, who name `add_special_tokens`, expect special tokens in the text to be read as such."""
        if self.parse_special is None:
            return self.add_special_tokens is not None
        return self.parse_special


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[int], FIRST_PROBLEM]


@router.post("/tokenize")
async def tokenize(request: Request, context: Context) -> dict[str, Any]:
    """Text to ids, or, with `messages`, a chat request to the prompt that it would be answered from: any field of
    POST /v1/chat/completions may be given. Special tokens in the text stay text unless `parse_special` is true, or
    vLLM's `add_special_tokens` is there, whatever its value: the model adds none."""
    raw = await read_json_object(request, context.config)
    if "messages" in raw:
        plan = await plan_chat(
            {"model": context.model_id} | raw,
            context,
            caller_of(request),
            client=client_of(request),
        )
        ids = plan.prompt.token_ids
        return {
            "tokens": ids,
            "count": len(ids),
            "max_model_len": context.max_model_len,
            "prompt_version": plan.prompt.version,
        }
    body = TokenizeRequest.model_validate(raw)
    context.unknown_fields.check(raw, body, client_of(request))
    vocabulary = context.vocabulary
    encode = vocabulary.encode_with_special if body.reads_special else vocabulary.encode
    ids = await context.encoded(len(body.prompt), lambda: encode(body.prompt))
    return {"tokens": ids, "count": len(ids), "max_model_len": context.max_model_len}


@router.post("/detokenize")
async def detokenize(request: Request, context: Context) -> dict[str, Any]:
    raw = await read_json_object(request, context.config)
    body = DetokenizeRequest.model_validate(raw)
    context.unknown_fields.check(raw, body, client_of(request))
    if not all(0 <= token < VOCAB_SIZE for token in body.tokens):
        raise InvalidRequest(
            f"Token ids must lie between 0 and {VOCAB_SIZE - 1}.", "tokens", "invalid_value"
        )
    tokens = body.tokens
    text = await context.encoded(len(tokens), lambda: context.vocabulary.decode(tokens))
    return {"prompt": text}


@router.get("/tokenizer_info")
async def tokenizer_info(context: Context) -> dict[str, Any]:
    """The tokenizer's configuration as vLLM reports it: class, special tokens and the checkpoint's chat template."""
    return await asyncio.to_thread(tokenizer_config, context.engine.config.model_path)
