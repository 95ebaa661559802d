"""Answers a request of a generating endpoint without HTTP: URL and body in, status and body out."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import msgspec
from pydantic import ValidationError
from starlette.responses import Response

from gptoss.api.chat.adapter import plan_chat
from gptoss.api.chat.output import ChatRenderer
from gptoss.api.completions.adapter import plan_completion
from gptoss.api.completions.output import CompletionRenderer
from gptoss.api.context import Reading, ServerContext, create_context
from gptoss.api.http.error_responses import error_response
from gptoss.api.http.errors import ApiError, InvalidRequest, from_engine, from_generation, from_validation
from gptoss.api.http.sender import Sender
from gptoss.api.messages.adapter import plan_message
from gptoss.api.messages.output import MessageRenderer
from gptoss.api.responses.plan import plan_response
from gptoss.api.responses.store import ResponseStore
from gptoss.api.responses.writer import ResponsesRenderer
from gptoss.api.telemetry.metrics import Metrics
from gptoss.api.telemetry.relaxations import warn_relaxed
from gptoss.config.schema import ServerConfig
from gptoss.engine.client.errors import EngineDeadError, EngineError
from gptoss.engine.client.pool import AnyEngine
from gptoss.engine.messages import AddRequest, TokenOutput
from gptoss.generation.chat_output import start_chat
from gptoss.generation.errors import GenerationFailedError
from gptoss.generation.plan import Plan
from gptoss.generation.session import EndedChoice, Engine, Usage
from gptoss.generation.text_output import start_text
from gptoss.harmony.deltas import Kind
from gptoss.harmony.vocabulary_files import Vocabulary

CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
URLS = (CHAT, COMPLETIONS, RESPONSES, MESSAGES)


@dataclass(frozen=True, slots=True)
class Answer:
    """What an endpoint would have answered."""

    status: int
    body: bytes  # JSON
    request_id: str
    # set if the request is not at fault, so that it may be sent again: the engine was not there, or failed it
    unavailable: bool = False
    gone: bool = False  # and does not come back
    failed: bool = False


class Renderer(Protocol):
    async def collect(self) -> bytes: ...


@dataclass(frozen=True, slots=True)
class _Started:
    renderer: Renderer
    close: Callable[[], None]


class Dispatcher:
    """Runs requests as the endpoints do, but without streams and without stored responses."""

    def __init__(self, context: ServerContext, *, background: bool) -> None:
        """`background`: the requests run only while no other request does."""
        self._context = context
        self._engine = RowEngine(context.engine, background)
        self._accounting = RowAccounting(context.metrics)
        self._store = ResponseStore(0)

    async def answer(self, url: str, body: dict[str, Any], sender: Sender) -> Answer:
        """The answer to a request. It is an error if the request is refused, or the engine fails it."""
        request_id = f"req_{uuid.uuid4().hex}"
        try:
            check_row(url, body)
            started = await self._start(url, body, self._context.reading(sender), request_id)
            try:
                return Answer(200, await started.renderer.collect(), request_id)
            finally:
                started.close()
        except ApiError as error:
            return _refused(url, error, request_id)
        except ValidationError as error:
            return _refused(url, from_validation(error), request_id)
        except EngineError as error:
            gone = isinstance(error, EngineDeadError)
            return replace(_refused(url, from_engine(error), request_id), unavailable=True, gone=gone)
        except GenerationFailedError as error:
            return replace(_refused(url, from_generation(error), request_id), failed=True)

    async def _start(self, url: str, body: dict[str, Any], reading: Reading, request_id: str) -> _Started:
        """Plans a request and sends it to the engine. Raises what plan and engine raise."""
        context, engine, accounting = self._context, self._engine, self._accounting
        vocabulary = context.vocabulary
        if url == CHAT:
            chat = await plan_chat(body, reading)
            generation = await start_chat(chat.plan, vocabulary, engine, accounting, _forget)
            return _Started(ChatRenderer(chat, generation, context), generation.close)
        if url == COMPLETIONS:
            completion = await plan_completion(body, reading)
            text = await start_text(completion.plan, vocabulary, engine, accounting)
            return _Started(CompletionRenderer(completion, text, context.system_fingerprint), text.close)
        if url == RESPONSES:
            planned = await plan_response(body, self._store, reading)
            generation = await start_chat(planned.plan, vocabulary, engine, accounting, _forget, joins_messages=False)
            return _Started(ResponsesRenderer(planned.request, planned.tools, generation, None), generation.close)
        message = await plan_message(body, reading)
        generation = await start_chat(message.plan, vocabulary, engine, accounting, _forget, joins_messages=False)
        return _Started(MessageRenderer(message, generation, request_id), generation.close)


def create_dispatcher(
    engine: AnyEngine,
    config: ServerConfig,
    vocabulary: Vocabulary,
    *,
    model_id: str,
    model_size: str,
    repetition_guard: int,
    aliases: frozenset[str],
) -> Dispatcher:
    """Returns a dispatcher for an engine that no server uses."""
    context = create_context(
        engine,
        config,
        vocabulary,
        ResponseStore(0),
        callers=[],
        model_id=model_id,
        model_size=model_size,
        repetition_guard=repetition_guard,
        aliases=aliases,
    )
    return Dispatcher(context, background=False)


def check_row(url: str, body: Mapping[str, Any]) -> None:
    """Raises InvalidRequest for fields that have no meaning without a client that waits for the answer."""
    if url not in URLS:
        raise InvalidRequest(f"Batches support {', '.join(URLS)}, not {url!r}.", "url", "invalid_value")
    if body.get("stream"):
        raise InvalidRequest("'stream' must be false in a batch.", "stream", "unsupported_value")
    if url != RESPONSES:
        return
    if body.get("previous_response_id") is not None:
        raise InvalidRequest(
            "'previous_response_id' is not supported in a batch, whose requests run in any order and are not stored: "
            "send the earlier items in 'input'.",
            "previous_response_id",
            "unsupported_parameter",
        )
    items = body.get("input")
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, Mapping) and (item.get("type") == "item_reference" or item.keys() == {"id"}):
            raise InvalidRequest(
                "Item references are not supported in a batch: send the item itself.",
                f"input[{index}]",
                "unsupported_value",
            )


def _refused(url: str, error: ApiError, request_id: str) -> Answer:
    response: Response = error_response({"path": url, "state": {"request_id": request_id}}, error)
    return Answer(response.status_code, bytes(response.body), request_id)


def _forget(*_: object) -> None:
    """Keeps no generated ids: the conversations of a batch are not continued."""


@dataclass(frozen=True, slots=True)
class RowEngine:
    """An engine whose requests have no deadline, and may be in the background."""

    engine: Engine
    background: bool

    async def add_requests(self, requests: Sequence[AddRequest]) -> list[AsyncIterator[TokenOutput]]:
        changed = [msgspec.structs.replace(r, timeout_s=None, background=self.background) for r in requests]
        return await self.engine.add_requests(changed)

    def discard(self, request_id: str) -> None:
        self.engine.discard(request_id)


@dataclass(frozen=True, slots=True)
class RowAccounting:
    """Counts repairs of malformed output.

    Limits, latencies and the request log are for requests over HTTP.
    """

    metrics: Metrics

    @property
    def is_cancelled(self) -> bool:
        return False

    def admit(self, plan: Plan) -> None: ...

    def begin(self, plan: Plan) -> None:
        warn_relaxed(plan.relaxed)

    def arrived(self, output: TokenOutput, num_tokens: int) -> None: ...

    def shown(self, kind: Kind) -> None: ...

    def end(self, usage: Usage, choices: Sequence[EndedChoice], prompts: Sequence[list[int]]) -> None:
        for choice in choices:
            self.metrics.recovered(choice.recoveries)
