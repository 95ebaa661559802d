"""Patches of several files, as the model writes them (V4A), and the operations sent to the client.

A patch of several files is several items. The ids of the calls after the first end in `_o1`, `_o2`, so that the items
become one patch again when they come back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gptoss.harmony.conversation import Message, ToolCall, ToolResult
from gptoss.tools.apply_patch.parser import BEGIN, END, HEADERS, Kind, PatchError, parse

GRAMMAR = r"""start: "*** Begin Patch\n" file+ "*** End Patch"
file: added | updated | deleted
added: "*** Add File: " path "\n" new_line*
updated: "*** Update File: " path "\n" (place | line | file_end)+
deleted: "*** Delete File: " path "\n"
path: /[^\s]([^\n]*[^\s])?/
new_line: "+" text "\n"
place: "@@" (" " text)? "\n"
line: ("+" | "-" | " ") text "\n"
file_end: "*** End of File\n"
text: /[^\n]*/
"""
DESCRIPTION = """Changes files. The text is a patch: for each file its path, relative to the working folder, and the
change. Every line of a new file begins with '+'. A change of a file shows the lines that change with a few others
around them: '-' begins a line that goes, '+' one that comes, ' ' one that stays; '@@', alone or followed by a line of
the file such as the head of a function, begins each place that changes."""
_OPERATION_ID = re.compile(r"(call_[0-9a-f]{24})_o\d+")


@dataclass(frozen=True, slots=True)
class Operation:
    kind: Kind
    path: str
    diff: str = ""  # lines with their marks, without the last line's end


def parse_patch(text: str) -> list[Operation] | None:
    """The operations; None if the text is not a patch, or no operation can express it."""
    try:
        changes = parse(text)
    except PatchError:
        return None
    if any(change.move_to is not None for change in changes):
        return None
    return [Operation(change.kind, change.path, change.diff) for change in changes]


def write_patch(operations: Sequence[Operation]) -> str:
    """The patch as the model writes it."""
    lines = [BEGIN]
    for operation in operations:
        lines.append(HEADERS[operation.kind] + operation.path)
        lines += [operation.diff] if operation.diff else []
    return "\n".join([*lines, END])


def operation_id(call_id: str, index: int) -> str:
    """The call id of an operation of the call with this id."""
    return f"{call_id}_o{index}" if index else call_id


def joined_patches(messages: Sequence[Message]) -> Iterator[Message]:
    """The messages; calls that were one patch are one again, and so are their results."""
    runs = _runs(messages)
    results: dict[str, dict[str, ToolResult]] = {}  # by id of the first call, by id of the call
    for message in messages:
        call_id = _call_id(message)
        if isinstance(message, ToolResult) and call_id in runs:
            results.setdefault(_call_id(runs[call_id][0]), {}).setdefault(call_id, message)
    for message in messages:
        run = runs.get(_call_id(message))
        if run is None:
            yield message
        elif isinstance(message, ToolCall):
            if message is run[0]:
                yield replace(message, arguments=write_patch([one for call in run for one in _operations(call)]))
        else:
            result_of = results.pop(_call_id(run[0]), None)  # with the first of them
            if result_of is not None:
                yield _joined_result(run, result_of)


def _call_id(message: Message) -> str:
    if isinstance(message, ToolCall):
        return message.id or ""
    return message.call_id or "" if isinstance(message, ToolResult) else ""


def _operations(call: ToolCall) -> list[Operation]:
    return parse_patch(call.arguments) or []


def _runs(messages: Sequence[Message]) -> dict[str, list[ToolCall]]:
    """The calls that were one patch, by the id of each of them."""
    runs: dict[str, list[ToolCall]] = {}
    run: list[ToolCall] = []
    for message in messages:
        if isinstance(message, ToolCall) and run and _continues(run[0], message):
            run.append(message)
            runs |= {_call_id(call): run for call in run}
        else:
            run = [message] if isinstance(message, ToolCall) and not message.is_json else []
    return runs


def _continues(first: ToolCall, call: ToolCall) -> bool:
    found = _OPERATION_ID.fullmatch(_call_id(call))
    return found is not None and found[1] == first.id and not call.is_json


def _joined_result(run: Sequence[ToolCall], result_of: dict[str, ToolResult]) -> ToolResult:
    """One result with each operation's file and outcome, in their order."""
    lines = [
        f"{one.path}: {result_of[_call_id(call)].text}"
        for call in run
        for one in _operations(call)
        if _call_id(call) in result_of
    ]
    first = next(iter(result_of.values()))
    return replace(first, text="\n".join(lines), call_id=run[0].id)
