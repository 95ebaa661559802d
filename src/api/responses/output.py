"""Deltas of an answer as the items of a response, and as the events that tell of them."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from copy import deepcopy
from typing import Any, Literal

from gptoss.api.http.encrypted_content import seal
from gptoss.generation.chat_output import ChatDelta
from gptoss.harmony.deltas import Delta
from gptoss.harmony.layout import new_call_id

Event = dict[str, Any]
ItemStatus = Literal["completed", "incomplete"]
ITEM_PREFIX = {"reasoning": "rs_", "content": "msg_", "tool_call": "fc_"}
TEXT_EVENT = {"reasoning": "response.reasoning_text", "content": "response.output_text"}


class OutputItems:
    """Items in the order in which the model wrote them: reasoning, messages and calls.

    Each begins with `output_item.added` and ends with `output_item.done`; in between come the deltas of its one part,
    or of its arguments.
    """

    def __init__(self, client_name: Callable[[str], dict[str, str]], *, seals_reasoning: bool) -> None:
        """`client_name`: the fields of a call that name the function, of the name that the model used.
        `seals_reasoning`: reasoning that is whole gets `encrypted_content` too."""
        self._client_name = client_name
        self.items: list[dict[str, Any]] = []
        self._seals_reasoning = seals_reasoning
        self._kind: str | None = None  # of the item that is open

    def feed(self, item: ChatDelta) -> list[Event]:
        delta, events = item.delta, []
        begins = delta.channel is not None or delta.tool_name is not None
        if begins or delta.kind != self._kind:
            events += self.close("completed")
            events += self._begin(delta)
        if not delta.text and not item.logprobs:
            return events
        if delta.kind == "tool_call":
            self._current["arguments"] += delta.text
            return [*events, self._event("response.function_call_arguments.delta", delta=delta.text)]
        part = self._part
        part["text"] += delta.text
        more: dict[str, Any] = {}
        if delta.kind == "content":
            more["logprobs"] = item.logprobs or []
            part["logprobs"] += more["logprobs"]
        name = f"{TEXT_EVENT[delta.kind]}.delta"
        return [*events, self._event(name, content_index=0, delta=delta.text, **more)]

    def close(self, status: ItemStatus) -> list[Event]:
        """Ends the item that is open, if one is."""
        if self._kind is None:
            return []
        item = self._current
        if self._kind == "tool_call":
            name = "response.function_call_arguments.done"
            events = [self._event(name, arguments=item["arguments"], name=item["name"])]
        else:
            part = self._part
            numbers = {"logprobs": part["logprobs"]} if self._kind == "content" else {}
            done = f"{TEXT_EVENT[self._kind]}.done"
            events = [
                self._event(done, content_index=0, text=part["text"], **numbers),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
            if self._kind == "reasoning" and self._seals_reasoning:
                item["encrypted_content"] = seal(part["text"])
        item["status"] = status
        self._kind = None
        return [*events, self._of_item("response.output_item.done")]

    @property
    def _current(self) -> dict[str, Any]:
        return self.items[-1]

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self._current["content"][0]
        return part

    def _begin(self, delta: Delta) -> list[Event]:
        kind = self._kind = delta.kind
        item: dict[str, Any] = {"id": ITEM_PREFIX[kind] + secrets.token_hex(24), "status": "in_progress"}
        if kind == "tool_call":
            call = {"call_id": new_call_id(), "arguments": ""}
            named = self._client_name(delta.tool_name or "")
            self.items.append(item | {"type": "function_call"} | call | named)
            return [self._of_item("response.output_item.added")]
        part: dict[str, Any]
        if kind == "reasoning":
            item |= {"type": "reasoning", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            phase = "commentary" if delta.channel == "commentary" else "final_answer"
            item |= {"type": "message", "role": "assistant", "phase": phase, "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self.items.append(item)
        added = self._of_item("response.output_item.added")
        self._current["content"].append(part)
        return [added, self._event("response.content_part.added", content_index=0, part=deepcopy(part))]

    def _event(self, event: str, /, **fields: Any) -> Event:
        position = {"item_id": self._current["id"], "output_index": len(self.items) - 1}
        return {"type": event} | position | fields

    def _of_item(self, name: str) -> Event:
        item = dict(self._current)
        if "content" in item:
            item["content"] = list(item["content"])
        return {"type": name, "output_index": len(self.items) - 1, "item": item}
