"""openai's clients with the methods of this server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any, TypeVar

try:
    import docstring_parser as _docstring_parser  # noqa: F401
    import openai
except ImportError as error:
    raise ImportError(
        f"gptoss.client needs {error.name}: install the package's extra 'client', or run: pip install openai "
        "docstring-parser"
    ) from None
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from gptoss.client.extras import split_extras
from gptoss.client.results import Health, Rendered, Reply, Stats, ToolRun
from gptoss.client.tool_functions import ToolFunction
from gptoss.client.tool_loop import MAX_ROUNDS, OnCall, ToolLoop

DEFAULT_URL = "http://127.0.0.1:8000"
Messages = str | Sequence[Any]  # one question, or a conversation
M = TypeVar("M", bound=BaseModel)


class GptOss(openai.OpenAI):
    """openai.OpenAI for a server of this project; retries, timeouts and errors are openai's."""

    def __init__(self, url: str | None = None, *, api_key: Any = None, base_url: Any = None, **options: Any) -> None:
        """
        Args:
            url: default: $GPTOSS_URL, or http://127.0.0.1:8000; with or without /v1.
            api_key: default: $GPTOSS_API_KEY, or $OPENAI_API_KEY, or none.
            base_url: openai's name of `url`, with which with_options() and copy() make a client.
            options: those of openai.OpenAI.
        """
        super().__init__(base_url=v1_url(url or base_url), api_key=key_of(api_key), **options)

    def ask(self, messages: Messages, *, model: str | None = None, **options: Any) -> Reply:
        """Answers a question or a conversation.

        `options`: the fields of Extras, and the arguments of openai's chat.completions.create but for `stream` and `n`.
        """
        return Reply(self._complete(as_messages(messages), model, options))

    def run_tools(
        self,
        messages: Messages,
        tools: Sequence[ToolFunction],
        *,
        model: str | None = None,
        max_rounds: int = MAX_ROUNDS,
        on_call: OnCall | None = None,
        **options: Any,
    ) -> ToolRun:
        """Answers with Python functions as tools, and runs those that the model calls.

        A function's name, signature and docstring describe it to the model. An error in it is the result that the model
        reads. `on_call` is called after each call. Raises ToolLoopError if the model calls tools after `max_rounds`
        rounds of calls.
        """
        loop = ToolLoop(as_messages(messages), tools, max_rounds, on_call)
        name = model or self.model_id()
        while True:
            completion = self._complete(loop.messages, name, {"tools": loop.definitions, **options})
            calls = loop.wanted(completion)
            if not calls:
                return loop.run(completion)
            for call in calls:
                result, failed = loop.execute(call)
                loop.ended(call, result, failed=failed)

    def model_id(self) -> str:
        """The model that the server serves."""
        return self.models.list().data[0].id

    def render(self, messages: Messages, *, model: str | None = None, **options: Any) -> Rendered:
        """The prompt that a chat request becomes. The server needs debug_endpoints."""
        body = chat_body(as_messages(messages), model or self.model_id(), options)
        return Rendered.model_validate(self.post("/chat/completions/render", body=body, cast_to=object))

    def cancel(self, request_id: str) -> bool:
        """Cancels a request by the id of its completion or its x-request-id; returns whether it was running."""
        try:
            self.post(f"/cancel/{request_id}", cast_to=object)
        except openai.NotFoundError:
            return False
        return True

    def health(self) -> Health:
        """GET /health, also of a server that is unhealthy."""
        return self._report("health", Health)

    def stats(self) -> Stats:
        """GET /stats."""
        return self._report("stats", Stats)

    def _report(self, path: str, kind: type[M]) -> M:
        try:
            return kind.model_validate(self.get(root(self.base_url) + path, cast_to=object))
        except openai.InternalServerError as error:
            return kind.model_validate(report_of(error))

    def _complete(self, messages: Sequence[Any], model: str | None, options: dict[str, Any]) -> ChatCompletion:
        extras, rest = completion_options(options)
        created: ChatCompletion = self.chat.completions.create(
            model=model or self.model_id(), messages=list(messages), extra_body=extras, **rest
        )
        return created


class AsyncGptOss(openai.AsyncOpenAI):
    """openai.AsyncOpenAI for a server of this project, with the methods of GptOss."""

    def __init__(self, url: str | None = None, *, api_key: Any = None, base_url: Any = None, **options: Any) -> None:
        """Takes the arguments of GptOss; `options`: those of openai.AsyncOpenAI."""
        super().__init__(base_url=v1_url(url or base_url), api_key=key_of(api_key), **options)

    async def ask(self, messages: Messages, *, model: str | None = None, **options: Any) -> Reply:
        """Answers a question or a conversation: see GptOss.ask."""
        return Reply(await self._complete(as_messages(messages), model, options))

    async def run_tools(
        self,
        messages: Messages,
        tools: Sequence[ToolFunction],
        *,
        model: str | None = None,
        max_rounds: int = MAX_ROUNDS,
        on_call: OnCall | None = None,
        **options: Any,
    ) -> ToolRun:
        """Answers with Python functions as tools: see GptOss.run_tools.

        The calls of one round run side by side; functions that are not asynchronous run in threads.
        """
        loop = ToolLoop(as_messages(messages), tools, max_rounds, on_call)
        name = model or await self.model_id()
        while True:
            completion = await self._complete(loop.messages, name, {"tools": loop.definitions, **options})
            calls = loop.wanted(completion)
            if not calls:
                return loop.run(completion)
            results = await asyncio.gather(*map(loop.execute_async, calls))
            for call, (result, failed) in zip(calls, results, strict=True):
                loop.ended(call, result, failed=failed)

    async def model_id(self) -> str:
        """The model that the server serves."""
        return (await self.models.list()).data[0].id

    async def render(self, messages: Messages, *, model: str | None = None, **options: Any) -> Rendered:
        """The prompt that a chat request becomes. The server needs debug_endpoints."""
        body = chat_body(as_messages(messages), model or await self.model_id(), options)
        return Rendered.model_validate(await self.post("/chat/completions/render", body=body, cast_to=object))

    async def cancel(self, request_id: str) -> bool:
        """Cancels a request by the id of its completion or its x-request-id; returns whether it was running."""
        try:
            await self.post(f"/cancel/{request_id}", cast_to=object)
        except openai.NotFoundError:
            return False
        return True

    async def health(self) -> Health:
        """GET /health, also of a server that is unhealthy."""
        return await self._report("health", Health)

    async def stats(self) -> Stats:
        """GET /stats."""
        return await self._report("stats", Stats)

    async def _report(self, path: str, kind: type[M]) -> M:
        try:
            return kind.model_validate(await self.get(root(self.base_url) + path, cast_to=object))
        except openai.InternalServerError as error:
            return kind.model_validate(report_of(error))

    async def _complete(self, messages: Sequence[Any], model: str | None, options: dict[str, Any]) -> ChatCompletion:
        extras, rest = completion_options(options)
        created: ChatCompletion = await self.chat.completions.create(
            model=model or await self.model_id(), messages=list(messages), extra_body=extras, **rest
        )
        return created


def v1_url(url: Any) -> str:
    """The URL with /v1, from the argument, the environment or the default."""
    found = str(url or os.environ.get("GPTOSS_URL") or DEFAULT_URL).rstrip("/")
    found = found if "://" in found else f"http://{found}"
    return found if found.endswith("/v1") else f"{found}/v1"


def key_of(api_key: Any) -> Any:
    """The key; openai's client demands one even where the server needs none."""
    return api_key or os.environ.get("GPTOSS_API_KEY") or os.environ.get("OPENAI_API_KEY") or "none"


def root(url: Any) -> str:
    """The server's address, with a slash, of a URL with /v1."""
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/") + "/"


def as_messages(messages: Messages) -> Sequence[Any]:
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def completion_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits options as split_extras does. Raises TypeError for `stream`, which has no Reply."""
    if options.get("stream"):
        raise TypeError("stream: use chat.completions.create(stream=True, extra_body=extra_body(...))")
    return split_extras(options)


def chat_body(messages: Sequence[Any], model: str, options: dict[str, Any]) -> dict[str, Any]:
    extras, rest = split_extras(options)
    return {"model": model, "messages": list(messages), **rest, **extras}


def report_of(error: openai.APIStatusError) -> Any:
    """The report in a 503 of /health. Raises the error if it is another."""
    try:
        report = error.response.json()
    except ValueError:
        raise error from None
    if not isinstance(report, dict) or "status" not in report:
        raise error
    return report
