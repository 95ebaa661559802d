"""Logging of the server's and the engine's process: lines of text or JSON, with the same fields."""

from __future__ import annotations

import logging
import sys
from typing import Literal

import structlog

LogFormat = Literal["text", "json"]


def configure(level: str, log_format: LogFormat, engine: int | None = None) -> None:
    """Sends all logging, including libraries', to stderr through one formatter. May be called again.

    `engine`: the number of this process's engine, for every line, if there are several.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.ExtraAdder(),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        _without_colors,
        *([_numbered(engine)] if engine is not None else []),
    ]
    last = structlog.processors.JSONRenderer(default=str) if log_format == "json" else _line
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
            last,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logging.getLogger("httpx2").setLevel(logging.WARNING)  # the Hub's client logs addresses with their signatures
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("sse_starlette").setLevel(logging.WARNING)  # at debug level it logs the content of events


def _without_colors(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """Drops the coloured copy of the message that uvicorn adds for terminals."""
    event.pop("color_message", None)
    return event


def _numbered(engine: int) -> structlog.typing.Processor:
    """Returns a processor that adds the engine's number."""

    def add(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**event, "engine": engine}

    return add


def _line(_: object, __: str, event: structlog.typing.EventDict) -> str:
    """Formats an event as `time LEVEL logger: message key=value ...`."""
    time, level, name, text = (event.pop(key, "") for key in ("time", "level", "logger", "event"))
    trace = event.pop("exception", None)
    fields = "".join(f" {key}={_shown(value)}" for key, value in event.items())
    line = f"{time} {str(level).upper():7} {name}: {text}{fields}"
    return f"{line}\n{trace}" if trace else line


def _shown(value: object) -> str:
    text = str(value)
    return repr(text) if not text or any(c in text for c in ' "=\n') else text
