"""A turn with tools, through /v1/responses.

The server runs its own tools, the person approves, patches are applied here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoss.cli.remote.answer import Answer
from gptoss.cli.remote.connection import Connection
from gptoss.cli.remote.conversation import Conversation
from gptoss.cli.remote.errors import Refused, UsageError
from gptoss.tools.apply_patch.apply import apply_patch
from gptoss.tools.apply_patch.parser import PatchError

RESPONSES = "/v1/responses"
MAX_ROUNDS = 50  # of questions to the person, in one turn
MAX_SHOWN_CHARS = 600  # of a call's arguments or result
TOOLS: dict[str, dict[str, Any]] = {
    "browser": {"type": "web_search"},
    "python": {"type": "code_interpreter", "container": {"type": "auto"}},
    "apply_patch": {"type": "apply_patch"},
}
MCP = "mcp:"
HEADERS = {"create_file": "Add", "update_file": "Update", "delete_file": "Delete"}

Ask = Callable[[], bool]  # whether the person agrees to the step that was shown last


def tools_of(text: str) -> list[dict[str, Any]]:
    """Returns the entries of `browser,python,apply_patch,mcp:LABEL`. Raises UsageError."""
    found = []
    for name in text.split(","):
        label = name.removeprefix(MCP)
        if name in TOOLS:
            found.append(TOOLS[name])
        elif name.startswith(MCP) and label:
            found.append({"type": "mcp", "server_label": label, "require_approval": "always"})
        else:
            raise UsageError(f"no tool {name!r}: there are {', '.join(TOOLS)} and mcp:LABEL")
    return found


@dataclass(slots=True)
class ToolTurn:
    """One question and its answer.

    `previous_id`: the response that is continued, which keeps browser pages and Python variables. Without one, or where
    the server no longer has it, the conversation's messages are sent.
    """

    connection: Connection
    conversation: Conversation
    tools: list[dict[str, Any]]
    root: Path  # of the files that patches change
    ask: Ask
    previous_id: str | None = None
    answer: Answer = field(default_factory=Answer)

    def pieces(self) -> Iterator[tuple[str, str]]:
        """Yields ("reasoning", "text" or "step", piece). Raises CommandError."""
        items: list[dict[str, Any]] = [{"role": "user", "content": self.conversation.messages[-1]["content"]}]
        for _ in range(MAX_ROUNDS):
            calls: list[dict[str, Any]] = []
            yield from self._round(items, calls)
            if not calls:
                return
            items = []
            for call in calls:
                yield "step", _question(call)
                items.append(self._reply(call))
                yield "step", _outcome(items[-1])
        raise Refused(f"the model asked for more than {MAX_ROUNDS} approvals in one turn")

    def _round(self, items: list[dict[str, Any]], calls: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        """Sends items and yields what comes; `calls` gets those that need the person. Raises CommandError."""
        try:
            yield from self._send(items, self.previous_id, calls)
        except Refused as error:
            if error.status != 404 or self.previous_id is None:
                raise
            yield "step", "the server no longer has this conversation: it is sent again, without the state of its tools"
            self.previous_id = None
            messages = [
                {"role": m["role"], "content": m["content"]} for m in self.conversation.messages if m["content"]
            ]
            yield from self._send(messages, None, calls)

    def _send(
        self, items: list[dict[str, Any]], previous_id: str | None, calls: list[dict[str, Any]]
    ) -> Iterator[tuple[str, str]]:
        if previous_id is None and len(self.conversation.messages) > 1 and items[0].get("role") == "user":
            items = [{"role": m["role"], "content": m["content"]} for m in self.conversation.messages if m["content"]]
        body = self._body(items, previous_id)
        with closing(self.connection.stream(RESPONSES, body)) as events:
            for event in _until_the_end(events):
                yield from self._fold(event, calls)

    def _body(self, items: list[dict[str, Any]], previous_id: str | None) -> dict[str, Any]:
        settings = self.conversation
        fields = {
            "model": settings.model,
            "input": items,
            "instructions": settings.system,
            "previous_response_id": previous_id,
            "tools": self.tools,
            "reasoning": {"effort": settings.effort} if settings.effort else None,
            "profile": settings.profile,
            "max_output_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "seed": settings.seed,
            "include": ["code_interpreter_call.outputs"],
        }
        return {name: value for name, value in fields.items() if value is not None}

    def _fold(self, event: dict[str, Any], calls: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
        kind = event["type"]
        if kind == "response.output_text.delta":
            self.answer.text += event["delta"]
            yield "text", event["delta"]
        elif kind == "response.reasoning_text.delta":
            self.answer.reasoning += event["delta"]
            yield "reasoning", event["delta"]
        elif kind == "response.output_item.done":
            item = event["item"]
            if item["type"] in ("mcp_approval_request", "apply_patch_call"):
                calls.append(item)
            elif step := step_of(item):
                yield "step", step
        elif kind in ("response.completed", "response.incomplete", "response.failed"):
            self._end(event["response"])

    def _end(self, response: dict[str, Any]) -> None:
        """Notes how the response ended. Raises Refused if it failed."""
        if response["status"] == "failed":
            raise Refused(f"the server ended the answer: {(response.get('error') or {}).get('message')}")
        self.previous_id = response["id"]
        self.answer.usage = response.get("usage") or {}
        reason = (response.get("incomplete_details") or {}).get("reason")
        self.answer.finish_reason = "length" if reason == "max_output_tokens" else "stop"

    def _reply(self, call: dict[str, Any]) -> dict[str, Any]:
        """Returns the item that answers a call, after asking the person."""
        if call["type"] == "mcp_approval_request":
            return {"type": "mcp_approval_response", "approval_request_id": call["id"], "approve": self.ask()}
        operation = call["operation"]
        status, output = "failed", "The user declined this change."
        if self.ask():
            try:
                apply_patch(patch_of(operation), self.root)
                status, output = "completed", ""
            except PatchError as error:
                output = str(error)
        return {"type": "apply_patch_call_output", "call_id": call["call_id"], "status": status, "output": output}


def _until_the_end(events: Generator[dict[str, Any], None, None]) -> Iterator[dict[str, Any]]:
    """Yields events up to the last one, after which the Responses API sends no [DONE]."""
    for event in events:
        if event.get("type") == "error":
            raise Refused(f"the server ended the answer: {event.get('message')}")
        yield event
        if event["type"] in ("response.completed", "response.incomplete", "response.failed"):
            return


def patch_of(operation: dict[str, Any]) -> str:
    """Returns the patch of one operation of an apply_patch_call."""
    header = f"*** {HEADERS[operation['type']]} File: {operation['path']}\n"
    diff = operation.get("diff") or ""
    if diff and not diff.endswith("\n"):
        diff += "\n"
    return f"*** Begin Patch\n{header}{diff}*** End Patch\n"


def _question(call: dict[str, Any]) -> str:
    """Returns what the person is asked to agree to, whole."""
    if call["type"] == "mcp_approval_request":
        return f"{call['server_label']}.{call['name']} {call['arguments']}"
    operation = call["operation"]
    return f"{operation['type']} {operation['path']}\n{operation.get('diff') or ''}".rstrip()


def _outcome(item: dict[str, Any]) -> str:
    if item["type"] == "mcp_approval_response":
        return "approved" if item["approve"] else "declined"
    return "applied" if item["status"] == "completed" else f"not applied: {item['output']}"


def step_of(item: dict[str, Any]) -> str:
    """Returns what is shown of a tool's item; nothing for a message and the like."""
    kind = item["type"]
    if kind == "mcp_call":
        result = item.get("output") if item.get("output") is not None else f"failed: {json.dumps(item.get('error'))}"
        return f"{item['server_label']}.{item['name']} {cut(item['arguments'])}\n{cut(result or '')}".rstrip()
    if kind == "mcp_list_tools" and item.get("error"):
        return f"{item['server_label']}: {json.dumps(item['error'])}"
    if kind == "web_search_call":
        action = item.get("action") or {}
        what = action.get("query") or action.get("pattern") or action.get("url") or ""
        return f"browser {action.get('type', '')} {cut(what)} {_status(item)}".rstrip()
    if kind == "code_interpreter_call":
        logs = "".join(o["logs"] if o["type"] == "logs" else "[image]\n" for o in item.get("outputs") or ())
        return f"python {_status(item)}\n{cut(item.get('code') or '')}\n{cut(logs)}".rstrip()
    return ""


def _status(item: dict[str, Any]) -> str:
    return "" if item.get("status") == "completed" else str(item.get("status"))


def cut(text: str) -> str:
    """Returns the text, or its beginning."""
    return text if len(text) <= MAX_SHOWN_CHARS else text[:MAX_SHOWN_CHARS] + " ..."
