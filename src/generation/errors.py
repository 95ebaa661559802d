"""How a generation fails. An adapter translates `path` to its endpoint's name of the field."""

from __future__ import annotations

# Where in a GenerationRequest: ("tools", 2, "parameters"), ("tool_choice",), ("sampling", "min_tokens"), ("prompt",);
# ("prompt", origin, field) of a PromptError, ("output_format", field), where the client's own names are known
Path = tuple[str | int, ...]


class GenerationError(ValueError):
    """A request that cannot be run. Nothing has been sent to the engine."""

    def __init__(self, message: str, path: Path = (), code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.path, self.code = message, path, code


class ContextTooLongError(GenerationError):
    """The prompt leaves no room for an answer. `num_tokens` is its length, None where it was not counted."""

    def __init__(self, message: str, path: Path, num_tokens: int | None = None) -> None:
        super().__init__(message, path, "context_length_exceeded")
        self.num_tokens = num_tokens


class GenerationFailedError(Exception):
    """The engine ended an accepted request with an error."""


class GenerationCancelledError(GenerationFailedError):
    """The request was cancelled on demand."""

    def __init__(self) -> None:
        super().__init__("The request was cancelled.")
