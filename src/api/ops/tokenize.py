"""POST /tokenize and /detokenize, GET /tokenizer_info."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from gptoss.api.chat.adapter import plan_chat
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.context import Context, Incoming
from gptoss.api.http.body import read_json_object
from gptoss.api.http.errors import field_names
from gptoss.api.http.fields import FIRST_PROBLEM, Strict
from gptoss.api.http.openapi import Body, json_body
from gptoss.api.http.work_pool import Stopped
from gptoss.generation.errors import Path
from gptoss.generation.planner import check_token_ids, too_long
from gptoss.harmony.bpe import Limits, TooManyTokensError
from gptoss.harmony.tokenizer_files import tokenizer_config

router = APIRouter()


class TokenizeRequest(Strict):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    parse_special: bool | None = None

    @property
    def reads_special(self) -> bool:
        """Whether special tokens in the text are parsed.

        vLLM's clients, which send `add_special_tokens`, expect that.
        """
        if self.parse_special is None:
            return self.add_special_tokens is not None
        return self.parse_special


class DetokenizeRequest(Strict):
    model: str | None = None
    tokens: Annotated[list[int], FIRST_PROBLEM]


@router.post("/tokenize", openapi_extra=json_body(TokenizeRequest, Body(ChatCompletionRequest, optional=("model",))))
async def tokenize(request: Request, context: Context) -> Response:
    """Converts text to ids or, with `messages`, a chat request to its prompt.

    With `messages` any field of POST /v1/chat/completions is allowed. Special tokens in a text stay text unless
    `parse_special` is true, or vLLM's `add_special_tokens` is present with any value: the model adds none.
    """
    incoming = context.incoming(request)
    raw = await read_json_object(request, incoming.sender, context.config, context.pool)
    more: dict[str, Any] = {}
    if "messages" in raw:
        body = {"model": context.model_id} | raw
        chat = await plan_chat(body, incoming)
        if chat.hosted is not None:
            chat.hosted.chain.finish(None)
        ids, more = chat.plan.prompts[0], {"prompt_version": context.prompt_builder.version}
    else:
        ids = await context.pool.read(incoming.sender, lambda stopped: _encode(raw, incoming, stopped))
    answer = {"tokens": ids, "count": len(ids), "max_model_len": context.max_model_len}
    return Response(msgspec.json.encode(answer | more), media_type="application/json")


def _encode(raw: dict[str, Any], incoming: Incoming, stopped: Stopped) -> list[int]:
    body = TokenizeRequest.model_validate(raw)
    incoming.unknown_fields.check(raw, body, incoming.sender.client)
    vocabulary, max_tokens = incoming.planner.vocabulary, incoming.planner.limits.max_model_len
    encode = vocabulary.encode_with_special if body.reads_special else vocabulary.encode
    try:
        return encode(body.prompt, Limits(max_tokens, stopped))
    except TooManyTokensError:
        with field_names(_field_name):
            raise too_long(max_tokens, None) from None


def _field_name(path: Path) -> str:
    return str(path[-1])


@router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request, context: Context) -> Response:
    incoming = context.incoming(request)
    raw = await read_json_object(request, incoming.sender, context.config, context.pool)
    text = await context.pool.read(incoming.sender, lambda _: _decode(raw, incoming))
    return Response(msgspec.json.encode({"prompt": text}), media_type="application/json")


def _decode(raw: dict[str, Any], incoming: Incoming) -> str:
    tokens, max_tokens = raw.get("tokens"), incoming.planner.limits.max_model_len
    if isinstance(tokens, list) and len(tokens) > max_tokens:
        with field_names(_field_name):
            raise too_long(max_tokens, len(tokens), ("tokens",))
    body = DetokenizeRequest.model_validate(raw)
    incoming.unknown_fields.check(raw, body, incoming.sender.client)
    with field_names(_field_name):
        check_token_ids(body.tokens, ("tokens",))
    return incoming.planner.vocabulary.decode(body.tokens)


@router.get("/tokenizer_info")
async def tokenizer_info(context: Context) -> dict[str, Any]:
    """The tokenizer's configuration in vLLM's format.

    It has the class, the special tokens and the checkpoint's chat template.
    """
    return await asyncio.to_thread(tokenizer_config, context.engine.config.model_path)
