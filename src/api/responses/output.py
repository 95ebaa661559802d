"""Deltas of an answer as the items of a response, and as the events that report them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

from gptoss.api.http.encrypted_content import encode_text
from gptoss.api.responses.tools.calls import Call, CallKind, Event, ItemList, ItemStatus, start_call
from gptoss.generation.chat_output import ChatDelta
from gptoss.harmony.deltas import Delta

ITEM_PREFIX = {"reasoning": "rs_", "content": "msg_"}
TEXT_EVENT = {"reasoning": "response.reasoning_text", "content": "response.output_text"}


def _always_function(name: str) -> CallKind:
    return "function"


class OutputItems:
    """Items in the order in which the model wrote them: reasoning, messages and calls.

    Each begins with `output_item.added` and ends with `output_item.done`; in between come the deltas of its one part,
    or of its arguments.
    """

    def __init__(
        self,
        client_name: Callable[[str], dict[str, str]],
        kind_of: Callable[[str], CallKind] = _always_function,
        *,
        encodes_reasoning: bool,
    ) -> None:
        """Starts without items.

        `client_name` maps the name that the model used to the fields of a call that name the tool, `kind_of` to the
        call's kind. `encodes_reasoning`: reasoning that is whole gets `encrypted_content` too.
        """
        self._client_name, self._kind_of = client_name, kind_of
        self._list = ItemList()
        self._encodes_reasoning = encodes_reasoning
        self._kind: str | None = None  # of the item that is open
        self._call: Call | None = None  # that is open

    @property
    def items(self) -> list[dict[str, Any]]:
        return self._list.items

    def feed(self, item: ChatDelta) -> list[Event]:
        delta, events = item.delta, []
        begins = delta.channel is not None or delta.tool_name is not None
        if begins or delta.kind != self._kind:
            events += self.close("completed")
            events += self._begin(delta)
        if self._call is not None:
            return events + self._call.feed(delta.text)
        if not delta.text and not item.logprobs:
            return events
        part = self._part
        part["text"] += delta.text
        more: dict[str, Any] = {}
        if delta.kind == "content":
            more["logprobs"] = item.logprobs or []
            part["logprobs"] += more["logprobs"]
        name = f"{TEXT_EVENT[delta.kind]}.delta"
        return [*events, self._list.event(name, content_index=0, delta=delta.text, **more)]

    def close(self, status: ItemStatus) -> list[Event]:
        """Ends the item that is open, if one is."""
        kind, call = self._kind, self._call
        self._kind = self._call = None
        if call is not None:
            return call.close(status)
        if kind is None:
            return []
        part = self._part
        numbers = {"logprobs": part["logprobs"]} if kind == "content" else {}
        done = f"{TEXT_EVENT[kind]}.done"
        events = [
            self._list.event(done, content_index=0, text=part["text"], **numbers),
            self._list.event("response.content_part.done", content_index=0, part=part),
        ]
        if kind == "reasoning" and self._encodes_reasoning:
            self._list.last["encrypted_content"] = encode_text(part["text"])
        return [*events, self._list.done(status)]

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self._list.last["content"][0]
        return part

    def _begin(self, delta: Delta) -> list[Event]:
        kind = self._kind = delta.kind
        if kind == "tool_call":
            name = delta.tool_name or ""
            self._call = start_call(self._list, self._kind_of(name), self._client_name(name))
            return self._call.begin()
        item: dict[str, Any]
        part: dict[str, Any]
        if kind == "reasoning":
            item = {"type": "reasoning", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        else:
            phase = "commentary" if delta.channel == "commentary" else "final_answer"
            item = {"type": "message", "role": "assistant", "phase": phase, "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        added = self._list.add(ITEM_PREFIX[kind], item)
        self._list.last["content"].append(part)
        return [added, self._list.event("response.content_part.added", content_index=0, part=deepcopy(part))]
