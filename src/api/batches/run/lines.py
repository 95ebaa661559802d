"""The lines of an input file, and those of the output and error files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from gptoss.api.http.body import parse_json_object
from gptoss.api.http.errors import ApiError

MAX_LINES = 50_000
MAX_CUSTOM_ID = 512
MAX_REPORTED = 100  # errors of one file
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class InputLine:
    number: int  # from 1
    custom_id: str
    url: str
    body: dict[str, Any]
    num_bytes: int


class LineError(ValueError):
    """A line that is not a request. Its message names the line."""

    def __init__(self, line: int | None, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message if line is None else f"Line {line}: {message}")
        self.line, self.code, self.param = line, code, param


def raw_lines(file: BinaryIO, max_bytes: int) -> Iterator[tuple[int, bytes | LineError]]:
    """Yields number and text of each line that is not blank; an error for a line above `max_bytes`."""
    number = 0
    while line := file.readline(max_bytes + 2):
        number += 1
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while (rest := file.readline(max_bytes + 2)) and not rest.endswith(b"\n"):
                pass
            yield number, LineError(number, f"it has more than {max_bytes} bytes.", "line_too_long")
            continue
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            yield number, line


def parse_line(data: bytes, number: int, endpoint: str | None, urls: Sequence[str]) -> InputLine:
    """Parses a request. `endpoint`: the URL that it must have; None: any of `urls`. Raises LineError."""

    def refuse(message: str, code: str, param: str | None = None) -> LineError:
        return LineError(number, message, code, param)

    try:
        value = parse_json_object(data)
    except ApiError as error:
        raise refuse(f"it is not a JSON object: {error.message}", "invalid_json_line") from None
    for name in ("custom_id", "method", "url"):
        if value.get(name) is None:
            raise refuse(f"'{name}' is missing.", "missing_required_parameter", name)
        if not isinstance(value[name], str):
            raise refuse(f"'{name}' must be a string.", "invalid_type", name)
    custom_id, url, body = value["custom_id"], value["url"], value.get("body")
    if not 0 < len(custom_id) <= MAX_CUSTOM_ID:
        raise refuse(f"'custom_id' must have 1 to {MAX_CUSTOM_ID} characters.", "invalid_custom_id", "custom_id")
    if value["method"] != "POST":
        raise refuse(f"'method' must be 'POST', not {value['method'][:20]!r}.", "invalid_method", "method")
    if endpoint is not None and url != endpoint:
        raise refuse(f"'url' is {url[:100]!r}, but the batch's endpoint is {endpoint!r}.", "mismatched_url", "url")
    if url not in urls:
        raise refuse(f"'url' must be one of {', '.join(urls)}, not {url[:100]!r}.", "invalid_url", "url")
    if not isinstance(body, dict):
        raise refuse(
            "'body' must be an object.", "missing_required_parameter" if body is None else "invalid_type", "body"
        )
    return InputLine(number, custom_id, url, body, len(data))


@dataclass(frozen=True, slots=True)
class Checked:
    """What is known of an input file once all of its lines have been read."""

    num_lines: int
    model: str | None  # that all lines name
    errors: list[LineError]


def check_file(path: Path, endpoint: str | None, urls: Sequence[str], max_bytes: int) -> Checked:
    """Reads every line; takes seconds for a large file."""
    errors: list[LineError] = []
    first_line_of: dict[str, int] = {}
    models: set[str | None] = set()
    with path.open("rb") as file:
        for number, data in raw_lines(file, max_bytes):
            if len(first_line_of) + len(errors) >= MAX_LINES:
                errors.append(LineError(None, f"The file has more than {MAX_LINES} requests.", "too_many_lines"))
                break
            try:
                if isinstance(data, LineError):
                    raise data
                line = parse_line(data, number, endpoint, urls)
                earlier = first_line_of.setdefault(line.custom_id, number)
                if earlier != number:
                    text = f"its custom_id {line.custom_id!r} is that of line {earlier} too."
                    raise LineError(number, text, "duplicate_custom_id", "custom_id")
                model = line.body.get("model")
                models.add(model if isinstance(model, str) else None)
            except LineError as error:
                errors.append(error)
                if len(errors) == MAX_REPORTED:
                    break
    if not first_line_of and not errors:
        errors.append(LineError(None, "The file has no requests.", "empty_file"))
    return Checked(len(first_line_of), models.pop() if len(models) == 1 else None, errors)


def output_line(row_id: str, custom_id: str, status: int, request_id: str, body: bytes) -> bytes:
    """A line of the output file, or of the error file. `body` is JSON."""
    response = {"status_code": status, "request_id": request_id, "body": msgspec.Raw(body)}
    line = {"id": row_id, "custom_id": custom_id, "response": response, "error": None}
    return msgspec.json.encode(line) + b"\n"


def unanswered_line(row_id: str, custom_id: str, code: str, message: str) -> bytes:
    """A line of the error file for a request that was not run."""
    error = {"code": code, "message": message}
    line = {"id": row_id, "custom_id": custom_id, "response": None, "error": error}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


class WrittenResponse(msgspec.Struct):
    status_code: int
    body: msgspec.Raw


class WrittenLine(msgspec.Struct):
    custom_id: str
    response: WrittenResponse | None = None


def recover_lines(path: Path) -> Iterator[WrittenLine]:
    """Yields the whole lines of a file that was being written, and cuts off what follows them.

    A process that is killed may leave half a line; a machine that loses power may leave anything.
    """
    if not path.exists():
        return
    decoder, end = msgspec.json.Decoder(WrittenLine), 0
    with path.open("r+b") as file:
        for data in file:
            try:
                line = decoder.decode(data) if data.endswith(b"\n") else None
            except msgspec.MsgspecError:
                line = None
            if line is None:
                break
            end += len(data)
            yield line
        file.truncate(end)


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0
    reasoning_tokens: int | None = 0
    thinking_tokens: int | None = 0


class _AnyUsage(msgspec.Struct):
    """The usage of any endpoint."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None
    cache_read_input_tokens: int | None = 0  # of /v1/messages, whose input_tokens leave them out
    cache_creation_input_tokens: int | None = 0


class _AnyBody(msgspec.Struct):
    usage: _AnyUsage | None = None


@dataclass(slots=True)
class BatchUsage:
    """Tokens of all answers of a batch."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, body: bytes | msgspec.Raw) -> None:
        """Adds the usage of an answer, whatever its endpoint."""
        usage = msgspec.json.decode(body, type=_AnyBody).usage
        if usage is None:
            return
        inputs = usage.prompt_tokens_details or usage.input_tokens_details or _Details()
        outputs = usage.completion_tokens_details or usage.output_tokens_details or _Details()
        read = usage.cache_read_input_tokens or 0
        self.input_tokens += usage.prompt_tokens + usage.input_tokens + read
        self.input_tokens += usage.cache_creation_input_tokens or 0
        self.cached_tokens += (inputs.cached_tokens or 0) + read
        self.output_tokens += usage.completion_tokens + usage.output_tokens
        self.reasoning_tokens += (outputs.reasoning_tokens or 0) + (outputs.thinking_tokens or 0)

    def shown(self) -> dict[str, Any]:
        """OpenAI's BatchUsage."""
        return {
            "input_tokens": self.input_tokens,
            "input_tokens_details": {"cached_tokens": self.cached_tokens},
            "output_tokens": self.output_tokens,
            "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
            "total_tokens": self.input_tokens + self.output_tokens,
        }
