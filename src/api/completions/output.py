"""Text as server-sent events, or as one JSON body."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from gptoss.api.completions.answer import TextAnswer
from gptoss.api.http.errors import Cancelled, EngineFailure
from gptoss.api.http.sse import DONE, encode_event
from gptoss.generation.text_output import joined, no_numbers


async def stream_events(answer: TextAnswer) -> AsyncGenerator[bytes, None]:
    include_usage = bool(answer.request.stream_options and answer.request.stream_options.include_usage)
    extra: dict[str, Any] = {"usage": None} if include_usage else {}

    def chunk(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return b"data: " + encode_event(answer.head | {"choices": choices} | extra | more) + b"\n\n"

    request = answer.request
    running = len(answer.choices)
    unscored = set(answer.choices if request.scores_prompt else ())  # to be echoed when they are
    try:
        async with contextlib.aclosing(answer.events()) as events:
            if request.echo and not request.scores_prompt:
                for choice in answer.choices:
                    yield chunk([answer.choice_body(choice, choice.echo, no_numbers(), None)])
            async for choice, text, numbers in events:
                if choice in unscored and choice.is_scored:
                    unscored.remove(choice)
                    echoed = choice.echo_numbers()
                    yield chunk([answer.choice_body(choice, choice.echo, echoed, None)])
                if text or numbers["tokens"] or choice.finish_reason is not None:
                    body = answer.choice_body(choice, text, numbers, choice.finish_reason)
                    running -= choice.finish_reason is not None
                    yield chunk([body], **(answer.end if not running else {}))
        if include_usage:
            yield chunk([], usage=answer.usage)
    except (EngineFailure, Cancelled) as error:
        yield b"data: " + encode_event(error.body) + b"\n\n"
    yield DONE


async def collect(answer: TextAnswer) -> bytes:
    async with contextlib.aclosing(answer.events()) as events:
        async for _ in events:
            pass
    choices = []
    for choice in answer.choices:
        numbers = choice.numbers
        if answer.request.scores_prompt:
            numbers = joined(choice.echo_numbers(), numbers)
        choices.append(answer.choice_body(choice, choice.echo + choice.text, numbers, choice.finish_reason))
    return encode_event(answer.head | {"choices": choices, "usage": answer.usage} | answer.end)
