"""Recorded requests: one JSON object a line, with what was asked, what came back and how long it took."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from gptoss.cli.remote.answer import CHAT, COMPLETIONS, Answer
from gptoss.cli.remote.connection import Connection, reason
from gptoss.cli.remote.errors import Refused, UsageError

FORMAT = 1
COMPARED = ("text", "reasoning", "tool_calls", "finish_reason", "token_ids")


def open_record(path: Path) -> TextIO:
    """Opens the file to append to. Raises UsageError."""
    try:
        return path.open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {reason(error)}") from None


def write_record(file: TextIO, connection: Connection, path: str, request: dict[str, Any], answer: Answer) -> None:
    """Appends one line. Asks the server for the prompt's token ids, which are null if it has no /tokenize."""
    found = answer.as_json()
    timings = found.pop("timings")
    line = {
        "format": FORMAT,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "url": connection.url,
        "path": path,
        "request": request,
        "prompt_token_ids": prompt_token_ids(connection, path, request),
        "answer": found,
        "timings": timings,
    }
    file.write(json.dumps(line) + "\n")
    file.flush()


def prompt_token_ids(connection: Connection, path: str, request: dict[str, Any]) -> list[int] | None:
    """Returns the ids that the server makes of the prompt; None if it does not return them."""
    if path == COMPLETIONS:
        body = {"prompt": request["prompt"], "parse_special": True}
    else:
        body = {name: value for name, value in request.items() if name != "stream_options"}
    try:
        ids = connection.post("/tokenize", body).get("tokens")
    except Refused:
        return None
    return ids if isinstance(ids, list) else None


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line numbers and records. Raises UsageError for a file or a line that is not a recording."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _checked(json.loads(line))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {reason(error)}") from None
    except ValueError as error:
        raise UsageError(f"{path}, line {number}: not a recorded request ({reason(error)})") from None


def _checked(record: Any) -> dict[str, Any]:
    """Returns the record. Raises ValueError."""
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"'format' is not {FORMAT}")
    if record.get("path") not in (CHAT, COMPLETIONS):
        raise ValueError("'path' is not that of chat or completions")
    if not all(isinstance(record.get(name), dict) for name in ("request", "answer", "timings")):
        raise ValueError("'request', 'answer' or 'timings' is not an object")
    return record


def differences(record: dict[str, Any], prompt_ids: list[int] | None, answer: Answer, tolerance: float) -> list[str]:
    """Returns what differs between the recorded and the new answer, one line each.

    Token ids are compared where both have them, logprobs by token and by value within `tolerance`.
    """
    old, new = record["answer"], answer.as_json()
    found = []
    if record.get("prompt_token_ids") and prompt_ids and record["prompt_token_ids"] != prompt_ids:
        found.append("prompt_token_ids: " + _first_difference(record["prompt_token_ids"], prompt_ids))
    for name in COMPARED:
        one, other = old.get(name), new[name]
        if one != other and not (name == "token_ids" and (one is None or other is None)):
            found.append(f"{name}: {_first_difference(one, other)}")
    return found + _logprob_differences(old.get("logprobs") or [], new["logprobs"], tolerance)


def _first_difference(one: Any, other: Any) -> str:
    if not (isinstance(one, (str, list)) and isinstance(other, type(one))):
        return f"{one!r}, now {other!r}"
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    unit = "character" if isinstance(one, str) else "entry"
    return f"from {unit} {at}: {one[at : at + 40]!r}, now {other[at : at + 40]!r}"


def _logprob_differences(old: list[dict[str, Any]], new: list[dict[str, Any]], tolerance: float) -> list[str]:
    tokens = [entry["token"] for entry in old], [entry["token"] for entry in new]
    if tokens[0] != tokens[1]:
        return ["logprobs: tokens " + _first_difference(*tokens)]
    gaps = [
        abs(a["logprob"] - b["logprob"])
        for a, b in zip(old, new, strict=True)
        if a["logprob"] is not None and b["logprob"] is not None
    ]
    most = max(gaps, default=0.0)
    return [f"logprobs: differ by up to {most:.3g}"] if most > tolerance else []
