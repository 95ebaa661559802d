"""The kinds of input items of a Responses request."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, WithJsonSchema

from gptoss.api.http.fields import Phase, Strict
from gptoss.api.http.openapi import Schema, inlined, object_of, parts_schema
from gptoss.api.responses.tools.client_tools import LocalShellAction, ShellAction, ShellOutput
from gptoss.api.responses.tools.placed import PlacedItem

# What OpenAI's own tools and services leave in a history: https://platform.openai.com/docs/api-reference/responses
FOREIGN = re.compile(
    r"\w+_call|\w+_call_output|mcp_\w+|\w*compaction\w*|tool_search_output|program|program_output"
    r"|additional_tools|configuration_update|ghost_snapshot"
)
INPUT_PARTS = dict.fromkeys(("input_text", "text"), "text")
OUTPUT_PARTS = dict.fromkeys(("output_text", "input_text", "text"), "text")
ASSISTANT_PARTS = OUTPUT_PARTS | {"refusal": "refusal"}
REASONING_PARTS = dict.fromkeys(("reasoning_text", "text"), "text")
SUMMARY_PARTS = dict.fromkeys(("summary_text", "text"), "text")
MessageParts = Annotated[list[Any], WithJsonSchema(parts_schema(ASSISTANT_PARTS))]
OutputParts = Annotated[list[Any], WithJsonSchema(parts_schema(OUTPUT_PARTS))]


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | MessageParts
    name: str | None = None
    phase: Phase | None = None


class FunctionCallItem(Strict):
    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    namespace: str | None = None
    arguments: str


class CustomCallItem(Strict):
    type: Literal["custom_tool_call"]
    call_id: Annotated[str, Field(min_length=1)]
    name: str
    namespace: str | None = None
    input: str


class CallOutputItem(Strict):
    type: Literal["function_call_output", "custom_tool_call_output"]
    call_id: str
    output: str | OutputParts


class PatchOperation(Strict):
    type: Literal["create_file", "update_file", "delete_file"]
    path: Annotated[str, Field(min_length=1)]
    diff: str = ""


class PatchCallItem(Strict):
    type: Literal["apply_patch_call"]
    call_id: Annotated[str, Field(min_length=1)]
    operation: PatchOperation


class ShellCallItem(Strict):
    type: Literal["shell_call"]
    call_id: Annotated[str, Field(min_length=1)]
    action: ShellAction


class LocalShellCallItem(Strict):
    type: Literal["local_shell_call"]
    call_id: Annotated[str, Field(min_length=1)]
    action: LocalShellAction


class PatchOutputItem(Strict):
    type: Literal["apply_patch_call_output"]
    call_id: str
    status: Literal["completed", "failed"]
    output: str | None = None


class ShellOutputItem(Strict):
    type: Literal["shell_call_output"]
    call_id: str
    output: str | list[ShellOutput]


class LocalShellOutputItem(Strict):
    """OpenAI's has the call's id in `id`."""

    type: Literal["local_shell_call_output"]
    id: str | None = None
    call_id_: Annotated[str | None, Field(alias="call_id")] = None
    output: str

    @property
    def call_id(self) -> str:
        return self.call_id_ or self.id or ""


class ReasoningItem(Strict):
    type: Literal["reasoning"]
    content: Annotated[list[Any], WithJsonSchema(parts_schema(REASONING_PARTS))] | None = None
    encrypted_content: str | None = None
    summary: Annotated[list[Any], WithJsonSchema(parts_schema(SUMMARY_PARTS))] | None = None


class CodeInterpreterItem(Strict):
    """Code that a server has run. read_history gives it a call_id, and its result as another item."""

    type: Literal["code_interpreter_call"]
    call_id: str | None = None
    code: str | None = None
    container_id: str | None = None
    outputs: list[Any] | None = None


CallItem = FunctionCallItem | CustomCallItem | PatchCallItem | ShellCallItem | LocalShellCallItem
OutputItem = CallOutputItem | PatchOutputItem | ShellOutputItem | LocalShellOutputItem
Item = InputMessage | CallItem | OutputItem | ReasoningItem | CodeInterpreterItem
ITEMS: dict[str, type[Item]] = {
    "message": InputMessage,
    "function_call": FunctionCallItem,
    "function_call_output": CallOutputItem,
    "custom_tool_call": CustomCallItem,
    "custom_tool_call_output": CallOutputItem,
    "apply_patch_call": PatchCallItem,
    "apply_patch_call_output": PatchOutputItem,
    "shell_call": ShellCallItem,
    "shell_call_output": ShellOutputItem,
    "local_shell_call": LocalShellCallItem,
    "local_shell_call_output": LocalShellOutputItem,
    "reasoning": ReasoningItem,
    "code_interpreter_call": CodeInterpreterItem,
}
ALWAYS_RENDERED = ITEMS.keys() - {"message", "reasoning", "code_interpreter_call"}


def untyped_fields() -> dict[str, Schema]:
    """The JSON schema of `input`: a text, or items, also those that only another server can read."""
    foreign = object_of({"type": {"type": "string", "pattern": f"^({FOREIGN.pattern})$", "not": {"enum": [*ITEMS]}}})
    items = [*inlined(TypeAdapter(Item).json_schema())["anyOf"], foreign]
    return {"input": {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": {"anyOf": items}}]}}


def num_rendered(items: Sequence[Any]) -> int:
    """The least number of Harmony messages that the items become; invalid items are counted too.

    Reasoning may be left out, and system messages are joined.
    """
    return sum(
        not isinstance(item, Mapping)
        or item.get("role") == "user"
        or (isinstance(item.get("type"), str) and item["type"] in ALWAYS_RENDERED)
        or not (item.get("role") or item.get("type"))
        for item in items
    )


def placed_items(sent: str | list[Any]) -> list[PlacedItem]:
    """The items of `input`; a string is a user's message."""
    if isinstance(sent, str):
        return [PlacedItem({"type": "message", "role": "user", "content": sent}, "input")]
    return [PlacedItem(item, f"input[{index}]") for index, item in enumerate(sent)]
