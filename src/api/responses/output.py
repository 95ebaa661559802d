"""Deltas of an answer as the items of a response, and as the events that report them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from typing import Any

from gptoss.api.hosted.service import Prepared
from gptoss.api.http.encrypted_content import encode_text
from gptoss.api.responses.tools.calls import Call, CallKind, Event, ItemList, ItemStatus, start_call
from gptoss.api.responses.tools.hosted_items import HostedItems
from gptoss.generation.hosted import ToolEvent
from gptoss.generation.round_reader import AnswerDelta
from gptoss.generation.tool_types import Citation
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
        hosted: Prepared | None = None,
        include: Collection[str] = (),
    ) -> None:
        """Starts without items.

        `client_name` maps the name that the model used to the fields of a call that name the tool, `kind_of` to the
        call's kind. `encodes_reasoning`: reasoning that is whole gets `encrypted_content` too. `hosted`: what the
        server runs; `include`: optional fields of items that the request asks for.
        """
        self._client_name, self._kind_of = client_name, kind_of
        self._list = ItemList()
        self._encodes_reasoning = encodes_reasoning
        self._hosted = HostedItems(self._list, hosted, include) if hosted is not None else None
        self._kind: str | None = None  # of the item that is open
        self._call: Call | None = None  # that is open

    @property
    def items(self) -> list[dict[str, Any]]:
        return self._list.items

    def begin(self) -> list[Event]:
        """The events that come before what the model writes."""
        return [] if self._hosted is None else self._hosted.listings()

    def feed(self, item: AnswerDelta) -> list[Event]:
        """The events of a delta."""
        if isinstance(item, ToolEvent):
            assert self._hosted is not None
            return [*self.close("completed"), *self._hosted.feed(item)]
        delta, events = item.delta, list[Event]()
        begins = delta.channel is not None or delta.tool_name is not None
        if begins or delta.kind != self._kind:
            events += self.close("completed")
            events += self._begin(delta)
        if self._call is not None:
            return events + self._call.feed(delta.text)
        if not delta.text and not item.logprobs and not item.citations:
            return events
        part = self._part
        part["text"] += delta.text
        more: dict[str, Any] = {}
        if delta.kind == "content":
            more["logprobs"] = item.logprobs or []
            part["logprobs"] += more["logprobs"]
        name = f"{TEXT_EVENT[delta.kind]}.delta"
        events.append(self._list.event(name, content_index=0, delta=delta.text, **more))
        return [*events, *(self._annotation(one) for one in item.citations)]

    def _annotation(self, one: Citation) -> Event:
        """Adds a citation to the text that is open."""
        annotations = self._part["annotations"]
        found = {"start_index": one.start, "end_index": one.end, "url": one.url, "title": one.title}
        annotations.append({"type": "url_citation"} | found)
        return self._list.event(
            "response.output_text.annotation.added",
            content_index=0,
            annotation_index=len(annotations) - 1,
            annotation=annotations[-1],
        )

    def interrupt(self) -> list[Event]:
        """Ends everything that is open, because the answer has failed."""
        return [*self.close("incomplete"), *(self._hosted.close() if self._hosted is not None else ())]

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
