"""Finds unknown request fields at any depth.

They are ignored, logged once per client, or refused.
"""

from __future__ import annotations

import functools
import logging
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel

from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.fields import Strict

logger = logging.getLogger(__name__)

Policy = Literal["ignore", "warn", "reject"]
MAX_PAIRS = 1000  # logged pairs of client and field
MAX_REPORTED = 20  # logged fields of one request
MAX_NAME = 64
_INDEX = re.compile(r"\[\d+\]")


class UnknownFields:
    """Applies one app's policy to unknown request fields."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._reported: set[tuple[str, str]] = set()

    def check(self, sent: Mapping[str, Any], read: BaseModel, client: str) -> None:
        """Handles fields of `sent` that its model `read` does not have.

        Raises InvalidRequest if they are refused.
        """
        if self._policy == "ignore":
            return
        found = find_unknown(sent, read)
        if self._policy == "warn":
            self._report(client, found)
            return
        name = next(found, None)
        if name is not None:
            raise InvalidRequest(f"Unknown parameter: {name!r}.", name, "unknown_parameter")

    def _report(self, client: str, names: Iterator[str]) -> None:
        new: list[str] = []
        if len(self._reported) >= MAX_PAIRS:
            return
        for path in names:
            name = _INDEX.sub("[]", path)
            if (client, name) in self._reported:
                continue
            self._reported.add((client, name))
            new.append(name)
            if len(new) == MAX_REPORTED or len(self._reported) == MAX_PAIRS:
                break
        if new:
            # quoted, so that a line break from the client does not start a new log line
            logger.warning("ignoring unknown request fields of %r: %s", client, ", ".join(map(repr, new)))


def find_unknown(sent: Mapping[str, Any], read: BaseModel, where: str = "") -> Iterator[str]:
    """Paths of the fields of `sent`, and of objects within it, that the model `read` does not have."""
    if isinstance(read, Strict) and read.is_open:
        return
    known, nested = _fields(type(read))
    for key, value in sent.items():
        if key not in known and value is not None:
            yield f"{where}{str(key)[:MAX_NAME]}"
    for key, attribute in nested.items():
        part, value = sent.get(key), getattr(read, attribute)
        if isinstance(value, BaseModel) and isinstance(part, Mapping):
            yield from find_unknown(part, value, f"{where}{key}.")
        elif isinstance(value, list) and isinstance(part, list):
            for index, (item, of_item) in enumerate(zip(part, value, strict=False)):
                if isinstance(of_item, BaseModel) and isinstance(item, Mapping):
                    yield from find_unknown(item, of_item, f"{where}{key}[{index}].")
    for key in _free(type(read)):
        yield from _unknown_in(key, sent.get(key), f"{where}{key}")


# Known fields of objects without a model, including all fields of answers, which return as history
_PART = frozenset(
    ("type", "text", "refusal", "annotations", "logprobs", "parsed", "input_text", "output_text", "file_id", "detail")
)
_ITEM = frozenset(
    (
        "type",
        "id",
        "status",
        "role",
        "content",
        "phase",
        "name",
        "namespace",
        "call_id",
        "arguments",
        "input",
        "output",
        "summary",
        "encrypted_content",
        "created_by",
        "parsed_arguments",
        "caller",
        "async",
        "async_",
    )
)
_ITEM_KINDS = frozenset(
    ("message", "function_call", "function_call_output", "custom_tool_call", "custom_tool_call_output", "reasoning")
)
_TOOLS = {
    "function": frozenset(("type", "name", "description", "parameters", "strict")),
    "custom": frozenset(("type", "name", "description", "format")),
    "namespace": frozenset(("type", "name", "description", "tools")),
    "mcp": frozenset(
        (
            "type",
            "server_label",
            "server_url",
            "server_description",
            "connector_id",
            "tunnel_id",
            "headers",
            "authorization",
            "allowed_tools",
            "require_approval",
            "defer_loading",
            "allowed_callers",
        )
    ),
}
_CHOICE = frozenset(
    ("type", "function", "custom", "name", "namespace", "allowed_tools", "mode", "tools", "server_label")
)
_OF_PARTS = frozenset(("content", "output", "summary"))
_WITHIN = {name: name for name in (*_OF_PARTS, "tools")}
_WITHIN_CHOICE = dict.fromkeys(("function", "custom"), "function_call") | dict.fromkeys(
    ("allowed_tools", "tools"), "tool_choice"
)
_FREE = frozenset((*_WITHIN, "input", "tool_choice", "function_call"))


def _known_keys(field: str, value: Mapping[str, Any]) -> frozenset[str] | None:
    """The known fields of an object in `field`; None if objects of its type are not checked."""
    kind = value.get("type")
    if not isinstance(kind, str | None):
        return None
    if field == "tool_choice":
        return _CHOICE
    if field == "function_call":
        return frozenset({"name"})
    if field == "tools":
        return _TOOLS.get(kind or "")
    if field == "input":
        return _ITEM if kind is None or kind in _ITEM_KINDS else None
    return _PART


def _unknown_in(field: str, value: Any, where: str) -> Iterator[str]:
    if isinstance(value, list):
        for index, item in enumerate(value):
            plain = field in _OF_PARTS and isinstance(item, Mapping) and item.keys() <= _PART
            if not plain:
                yield from _unknown_in(field, item, f"{where}[{index}]")
        return
    known = _known_keys(field, value) if isinstance(value, Mapping) else None
    if known is None:
        return
    within = _WITHIN_CHOICE if field == "tool_choice" else _WITHIN
    for key, inner in value.items():
        if key not in known and inner is not None:
            yield f"{where}.{str(key)[:MAX_NAME]}"
        elif key in within and (isinstance(inner, list) or field == "tool_choice"):
            yield from _unknown_in(within[key], inner, f"{where}.{key}")


@functools.cache
def _fields(model: type[BaseModel]) -> tuple[frozenset[str], dict[str, str]]:
    """Returns (names in JSON, name -> attribute of the fields that contain models)."""
    names = {info.alias or name: name for name, info in model.model_fields.items()}
    nested = {
        name: attribute for name, attribute in names.items() if _holds_models(model.model_fields[attribute].annotation)
    }
    more = model.also_known if issubclass(model, Strict) else frozenset()
    return frozenset(names) | more, nested


@functools.cache
def _free(model: type[BaseModel]) -> tuple[str, ...]:
    """Fields whose objects have no model."""
    _, nested = _fields(model)
    opaque = model.opaque if issubclass(model, Strict) else frozenset()
    return tuple(name for name in model.model_fields if name in _FREE - opaque and name not in nested)


def _holds_models(annotation: Any) -> bool:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return True
    return any(map(_holds_models, typing.get_args(annotation)))
