"""Errors of the engine's client."""

from __future__ import annotations


class EngineError(Exception):
    """The engine cannot take the request now."""


class EngineDeadError(EngineError):
    """The engine process has died, or could not be started."""


class AdapterGoneError(EngineError):
    """The request's LoRA adapter has been unloaded."""


class QueueFullError(EngineError):
    """Too many requests are waiting."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
