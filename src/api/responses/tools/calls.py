"""Calls as items of a response.

Most are streamed as the model writes them; calls that a client runs by itself are sent whole.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Any, Literal, Protocol

from gptoss.api.responses.tools.client_tools import ClientKind, items_of
from gptoss.api.responses.tools.patch import operation_id
from gptoss.harmony.layout import new_call_id

Event = dict[str, Any]
ItemStatus = Literal["completed", "incomplete"]
CallKind = Literal["function", "custom", "apply_patch", "shell", "local_shell"]
_CLIENT_PREFIX: dict[ClientKind, str] = {"apply_patch": "apc_", "shell": "sh_", "local_shell": "lsh_"}


class ItemList:
    """The items of a response, and events of the last of them."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    @property
    def last(self) -> dict[str, Any]:
        return self.items[-1]

    def add(self, prefix: str, fields: dict[str, Any]) -> Event:
        """Begins an item."""
        self.items.append({"id": prefix + secrets.token_hex(24), "status": "in_progress"} | fields)
        return self._of_item("response.output_item.added")

    def done(self, status: ItemStatus) -> Event:
        self.last["status"] = status
        return self._of_item("response.output_item.done")

    def event(self, event: str, /, **fields: Any) -> Event:
        position = {"item_id": self.last["id"], "output_index": len(self.items) - 1}
        return {"type": event} | position | fields

    def _of_item(self, name: str) -> Event:
        item = dict(self.last)
        if "content" in item:
            item["content"] = list(item["content"])
        return {"type": name, "output_index": len(self.items) - 1, "item": item}


class Call(Protocol):
    """A call that the model is writing."""

    def begin(self) -> list[Event]: ...

    def feed(self, text: str) -> list[Event]: ...

    def close(self, status: ItemStatus) -> list[Event]: ...


class FunctionCall:
    prefix, type, field = "fc_", "function_call", "arguments"
    event = "response.function_call_arguments"

    def __init__(self, items: ItemList, named: dict[str, str]) -> None:
        self._items, self._named = items, named

    def begin(self) -> list[Event]:
        fields = {"type": self.type, "call_id": new_call_id(), self.field: ""} | self._named
        return [self._items.add(self.prefix, fields)]

    def feed(self, text: str) -> list[Event]:
        if not text:
            return []
        self._items.last[self.field] += text
        return [self._items.event(f"{self.event}.delta", delta=text)]

    def close(self, status: ItemStatus) -> list[Event]:
        whole = {self.field: self._items.last[self.field]} | self._also_done()
        return [self._items.event(f"{self.event}.done", **whole), self._items.done(status)]

    def _also_done(self) -> dict[str, str]:
        return {"name": self._named["name"]}


class CustomCall(FunctionCall):
    prefix, type, field = "ctc_", "custom_tool_call", "input"
    event = "response.custom_tool_call_input"

    def _also_done(self) -> dict[str, str]:
        return {}


class ClientCall:
    """A call of a tool that the client runs: read when it is whole."""

    def __init__(self, items: ItemList, kind: ClientKind, named: dict[str, str]) -> None:
        self._items, self._kind, self._named = items, kind, named
        self._text = ""

    def begin(self) -> list[Event]:
        return []

    def feed(self, text: str) -> list[Event]:
        self._text += text
        return []

    def close(self, status: ItemStatus) -> list[Event]:
        read = items_of(self._kind, self._text) if status == "completed" else []
        return list(self._as_text(status) if not read else self._as_items(read))

    def _as_text(self, status: ItemStatus) -> Iterator[Event]:
        """An invalid or cut-off call, as a call of any tool."""
        plain = CustomCall if self._kind == "apply_patch" else FunctionCall
        call = plain(self._items, self._named)
        yield from call.begin()
        yield from call.feed(self._text)
        yield from call.close(status)

    def _as_items(self, read: list[dict[str, Any]]) -> Iterator[Event]:
        call_id = new_call_id()
        for index, fields in enumerate(read):
            own = {"call_id": operation_id(call_id, index)}
            begun = {"action": {**fields["action"], "commands": []}} if self._kind == "shell" else {}
            added = self._items.add(_CLIENT_PREFIX[self._kind], fields | own)
            yield added | {"item": added["item"] | begun}
            if self._kind == "shell":
                yield from self._commands(fields["action"]["commands"])
            yield self._items.done("completed")

    def _commands(self, commands: list[str]) -> Iterator[Event]:
        for index, command in enumerate(commands):
            position = {"output_index": len(self._items.items) - 1, "command_index": index}
            event = "response.shell_call_command"
            yield {"type": f"{event}.added", "command": "", **position}
            yield {"type": f"{event}.delta", "delta": command, **position}
            yield {"type": f"{event}.done", "command": command, **position}


def start_call(items: ItemList, kind: CallKind, named: dict[str, str]) -> Call:
    """Starts the item of a call, and returns the call. `named`: the fields that name the tool."""
    if kind == "function":
        return FunctionCall(items, named)
    return CustomCall(items, named) if kind == "custom" else ClientCall(items, kind, named)
