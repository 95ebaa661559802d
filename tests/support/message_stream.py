"""A stream of /v1/messages as Anthropic's SDK folds it, with the order of its events checked."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from pydantic_core import from_json

Event = dict[str, Any]


def read_events(text: str) -> list[Event]:
    """The events of a response's body. Each has its own type as its name."""
    events = []
    for part in text.removesuffix("\n\n").split("\n\n"):
        name, data = part.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        events.append(event)
    return events


def folded_blocks(events: Iterable[Event]) -> list[Event]:
    """The content. Each block is closed before the next one begins, and has deltas of its own type only."""
    blocks: list[Event] = []
    arguments, is_open = "", False
    for event in events:
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            blocks.append(dict(event["content_block"]))
            arguments, is_open = "", True
            continue
        assert is_open and event["index"] == len(blocks) - 1
        if event["type"] == "content_block_stop":
            is_open = False
            continue
        block, delta = blocks[-1], event["delta"]
        kind = delta["type"].removesuffix("_delta")
        if kind == "input_json":
            assert block["type"] in ("tool_use", "server_tool_use")
            arguments += delta["partial_json"]
            block["input"] = from_json(arguments, allow_partial=True)
        elif kind == "signature":
            block["signature"] = delta["signature"]
        elif kind == "citations":
            assert block["type"] == "text"
            block.setdefault("citations", []).append(delta["citation"])
        else:
            assert kind == block["type"]
            block[kind] += delta[kind]
    assert not is_open
    return blocks


def folded_message(events: list[Event]) -> Event:
    """The message of a stream that ends well."""
    assert events[0]["type"] == "message_start" and events[1] == {"type": "ping"}
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message: Event = events[0]["message"]
    assert message["content"] == [] and message["stop_reason"] is None
    message["content"] = folded_blocks(event for event in events[2:-2] if event["type"] != "ping")
    message |= events[-2]["delta"]
    message["usage"] |= events[-2]["usage"]
    return message
