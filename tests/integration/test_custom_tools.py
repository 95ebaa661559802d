"""Calls of custom tools, patches and shell commands: through the API in this process, read by OpenAI's own client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from gptoss.harmony.special_tokens import CALL
from tests.support.instant_engine import served
from tests.support.script import call, say, think
from tests.support.scripted_engine import ScriptedEngine

MODEL = "gpt-oss-nano"
NOTE: Any = {"type": "custom", "name": "note", "description": "Writes a note."}
DIGITS: Any = {
    "type": "custom",
    "name": "digits",
    "format": {"type": "grammar", "syntax": "regex", "definition": "[0-9]+"},
}
TEXT = 'a "note"\nof {two} lines'
ADD = "*** Add File: src/new.py\n+x = 1\n+\n"
UPDATE = "*** Update File: old.py\n@@ def f():\n-a\n+b\n c\n*** End of File\n"
DELETE = "*** Delete File: a b.txt\n"
ADDED = {"type": "create_file", "path": "src/new.py", "diff": "+x = 1\n+"}
UPDATED = {"type": "update_file", "path": "old.py", "diff": "@@ def f():\n-a\n+b\n c\n*** End of File"}
DELETED = {"type": "delete_file", "path": "a b.txt"}
USER: Any = {"role": "user", "content": "Go"}


def write(name: str, text: str) -> str:
    """A call of a custom tool, as the model writes it."""
    return f"<|channel|>commentary to=functions.{name}<|message|>{text}<|call|>"


def patch(*files: str) -> str:
    return write("apply_patch", f"*** Begin Patch\n{''.join(files)}*** End Patch")


class Server:
    def __init__(self) -> None:
        self.engine = ScriptedEngine([])
        self.client = openai.OpenAI(api_key="none")

    def says(self, *lines: str) -> None:
        self.engine.lines.clear()
        self.engine.lines.extend(lines)
        self.engine.requests.clear()

    def respond(self, *items: Any, **options: Any) -> Any:
        return self.client.responses.create(model=MODEL, input=[USER, *items], **options)

    def events(self, **options: Any) -> list[Any]:
        return list(self.client.responses.create(model=MODEL, input=[USER], stream=True, **options))

    def goes_on_from(self, text: str) -> bool:
        """Whether the second prompt is the first one, and what the model wrote then, and more."""
        first, second = (list(request.token_ids) for request in self.engine.requests)
        before = first + self.engine.vocabulary.encode_with_special(text)
        return second[: len(before)] == before


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    running = Server()
    with served(engine=running.engine) as url:
        running.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True)
        yield running


def test_a_custom_call_is_streamed_as_it_is_written(server: Server) -> None:
    server.says(think("Hm.") + write("note", TEXT))
    events = server.events(tools=[NOTE])
    own = [event for event in events if getattr(event, "output_index", None) == 1]
    kinds = [event.type for event in own]
    delta = "response.custom_tool_call_input.delta"
    assert kinds[0] == "response.output_item.added" and own[0].item.input == ""
    assert kinds[1:-2] == [delta] * (len(own) - 3) and len(own) > 6
    assert "".join(event.delta for event in own if event.type == delta) == TEXT
    assert (own[-2].type, own[-2].input) == ("response.custom_tool_call_input.done", TEXT)
    item = events[-1].response.output[1]
    assert (item.type, item.name, item.input) == ("custom_tool_call", "note", TEXT)
    assert item.id.startswith("ctc_") and item.call_id == own[0].item.call_id
    assert events[-1].response.tools[0].type == "custom"


@pytest.mark.parametrize(
    ("tool", "written", "output"),
    [
        (NOTE, write("note", TEXT), {"type": "custom_tool_call_output", "output": "R"}),
        (NOTE, write("note", ""), {"type": "custom_tool_call_output", "output": "R"}),
        ({"type": "apply_patch"}, patch(ADD), {"type": "apply_patch_call_output", "status": "completed"}),
        ({"type": "apply_patch"}, write("apply_patch", "x"), {"type": "custom_tool_call_output", "output": "R"}),
        ({"type": "shell"}, call("shell", '{"commands":["ls"]}'), {"type": "shell_call_output", "output": []}),
        ({"type": "shell"}, call("shell", '{"command": 1}'), {"type": "function_call_output", "output": "R"}),
        (
            {"type": "local_shell"},
            call("local_shell", '{"command":["ls"],"working_directory":"/"}'),
            {"type": "local_shell_call_output", "output": "R"},
        ),
        (
            {"type": "namespace", "name": "mine", "description": "Mine.", "tools": [NOTE]},
            write("mine__note", TEXT),
            {"type": "custom_tool_call_output", "output": "R"},
        ),
    ],
    ids=lambda value: str(value.get("type")) if isinstance(value, dict) else value[29:60],
)
def test_what_comes_back_is_what_the_model_wrote(server: Server, tool: Any, written: str, output: Any) -> None:
    server.says(think("Hm.") + written)
    items = [item.to_dict() for item in server.respond(tools=[tool]).output]
    result = output | {"call_id": items[-1]["call_id"], "id": items[-1]["call_id"]}
    server.respond(*items, result, tools=[tool])
    assert server.goes_on_from(think("Hm.") + written)


def test_a_patch_is_an_item_for_each_file(server: Server) -> None:
    server.says(think("Hm.") + patch(ADD, UPDATE, DELETE))
    events = server.events(tools=[{"type": "apply_patch"}])
    items = [item.to_dict() for item in events[-1].response.output]
    assert [item.get("operation") for item in items[1:]] == [ADDED, UPDATED, DELETED]
    assert {(item["type"], item["status"]) for item in items[1:]} == {("apply_patch_call", "completed")}
    assert len({item["call_id"] for item in items[1:]}) == 3
    own = [(event.type, event.item.status) for event in events if getattr(event, "output_index", 0) == 2]
    assert own == [("response.output_item.added", "in_progress"), ("response.output_item.done", "completed")]
    outputs = [
        {"type": "apply_patch_call_output", "call_id": item["call_id"], "status": status, **more}
        for item, status, more in [
            (items[3], "completed", {}),
            (items[1], "completed", {"output": "Done!"}),
            (items[2], "failed", {"output": "no such file"}),
        ]
    ]
    server.respond(*items, *outputs, tools=[{"type": "apply_patch"}])
    assert server.goes_on_from(think("Hm.") + patch(ADD, UPDATE, DELETE))
    told = server.engine.vocabulary.decode(server.engine.requests[1].token_ids)
    assert "src/new.py: Done!\nold.py: no such file\na b.txt: The change is made." in told


@pytest.mark.parametrize(
    "text",
    [
        "*** Begin Patch\n*** Update File: a\n*** Move to: b\n+x\n*** End Patch",
        "*** Begin Patch\n*** Add File: a\nx\n*** End Patch",
        "*** Begin Patch\n+x\n*** End Patch",
        "*** Begin Patch\n*** Delete File: a\n+x\n*** End Patch",
        "*** Begin Patch\n*** End Patch",
        "sed -i s/a/b/ c",
    ],
)
def test_what_is_no_patch_is_not_lost(server: Server, text: str) -> None:
    server.says(write("apply_patch", text))
    (item,) = server.respond(tools=[{"type": "apply_patch"}]).output
    assert (item.type, item.name, item.input) == ("custom_tool_call", "apply_patch", text)


def test_a_patch_that_was_cut_off_is_not_lost(server: Server) -> None:
    server.says(patch(ADD))
    answer = server.respond(tools=[{"type": "apply_patch"}], max_output_tokens=16)
    (item,) = answer.output
    assert (answer.status, item.type, item.status) == ("incomplete", "custom_tool_call", "incomplete")
    assert item.input and patch(ADD).partition("<|message|>")[2].startswith(item.input)


def test_a_command_that_was_not_ended_is_not_run(server: Server) -> None:
    written = call("shell", '{"commands":["ls"]}')
    server.says(written)
    tokens = len(server.engine.vocabulary.encode_with_special(written))
    (item,) = server.respond(tools=[{"type": "shell"}], max_output_tokens=tokens - 1).output
    assert (item.type, item.name, item.status) == ("function_call", "shell", "incomplete")
    assert item.arguments == '{"commands":["ls"]}'


def test_commands_are_told_one_by_one(server: Server) -> None:
    server.says(call("shell", '{"commands": ["ls", "cat a"], "timeout_ms": 9}'))
    events = server.events(tools=[{"type": "shell"}])
    own = [event for event in events if getattr(event, "output_index", None) == 0]
    command = "response.shell_call_command"
    kinds = [f"{command}.added", f"{command}.delta", f"{command}.done"]
    added, done = "response.output_item.added", "response.output_item.done"
    assert [event.type for event in own] == [added, *kinds, *kinds, done]
    assert [event.command for event in own if event.type == kinds[2]] == ["ls", "cat a"]
    action = events[-1].response.output[0].action
    assert (own[0].item.action.commands, action.commands, action.timeout_ms) == ([], ["ls", "cat a"], 9)
    item = events[-1].response.output[0].to_dict()
    result = {
        "type": "shell_call_output",
        "call_id": item["call_id"],
        "output": [
            {"stdout": "a\n", "stderr": "", "outcome": {"type": "exit", "exit_code": 0}},
            {"stdout": "", "stderr": "no", "outcome": {"type": "timeout"}},
        ],
    }
    server.respond(item, result, tools=[{"type": "shell"}])
    told = server.engine.vocabulary.decode(server.engine.requests[1].token_ids)
    assert "<|message|>exit code: 0\nstdout:\na\n\ntimed out\nstderr:\nno<|end|>" in told


def test_chat_has_custom_tools_too(server: Server) -> None:
    tools: Any = [{"type": "custom", "custom": {"name": "note"}}, {"type": "function", "function": {"name": "f"}}]
    written = think("Hm.") + write("note", TEXT)
    server.says(written)
    answer = server.client.chat.completions.create(model=MODEL, messages=[USER], tools=tools).choices[0]
    (made,) = answer.message.tool_calls or ()
    assert made.type == "custom" and (made.custom.name, made.custom.input) == ("note", TEXT)
    assert answer.finish_reason == "tool_calls"
    result: Any = {"role": "tool", "tool_call_id": made.id, "content": "R"}
    history: Any = [USER, answer.message.model_dump(exclude_none=True), result]
    server.client.chat.completions.create(model=MODEL, messages=history, tools=tools)
    assert server.goes_on_from(written)
    server.says(written + "<|start|>assistant" + call("f", "{}"))
    # the types of openai-python know no custom calls in chunks
    client = openai.OpenAI(base_url=server.client.base_url, api_key="none")
    stream = client.chat.completions.create(model=MODEL, messages=[USER], tools=tools, stream=True)
    pieces = [call.to_dict() for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    assert pieces[0] == {"index": 0, "id": pieces[0]["id"], "type": "custom", "custom": {"name": "note", "input": ""}}
    of_note: Any = [piece["custom"] for piece in pieces if piece["index"] == 0]
    assert "".join(custom["input"] for custom in of_note) == TEXT


def test_a_choice_of_a_custom_tool_forces_its_call(server: Server) -> None:
    tools = [
        NOTE,
        DIGITS,
        {"type": "apply_patch"},
        {"type": "function", "name": "f", "parameters": None, "strict": None},
    ]
    choices: Any = {
        "digits": {"type": "custom", "name": "digits"},
        "apply_patch": {"type": "apply_patch"},
        "note": {"type": "allowed_tools", "mode": "required", "tools": [{"type": "custom", "name": "note"}]},
    }
    for name, choice in choices.items():
        server.says(say("x"))
        server.respond(tools=tools, tool_choice=choice)
        grammar = server.engine.requests[0].params.grammar or ""
        assert grammar.count(f"<[{CALL}]>") == 1 and f'".{name}"' in grammar and "final" not in grammar


@pytest.mark.parametrize(
    ("tool", "param"),
    [
        (DIGITS | {"format": {"type": "grammar", "syntax": "lark", "definition": "start: <[5]>"}}, "format.definition"),
        (DIGITS | {"format": {"type": "grammar", "syntax": "regex", "definition": "("}}, "format.definition"),
        (DIGITS | {"format": {"type": "grammar", "syntax": "lark"}}, "format.definition"),
        (DIGITS | {"format": {"type": "grammar", "definition": "x"}}, "format.syntax"),
        (DIGITS | {"format": {"type": "grammar", "syntax": "ebnf", "definition": "x"}}, "format.syntax"),
        (DIGITS | {"format": {"type": "xml"}}, "format.type"),
        (DIGITS | {"name": "no name"}, "name"),
    ],
)
def test_a_definition_that_cannot_be_enforced_is_named(server: Server, tool: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.respond(tools=[NOTE, tool])
    assert caught.value.param == f"tools[1].{param}"
    with pytest.raises(openai.BadRequestError) as caught:
        server.respond(tools=[NOTE, {"type": "namespace", "name": "mine", "description": "", "tools": [tool]}])
    assert caught.value.param == f"tools[1].tools[0].{param}"
