"""MCP through /v1/responses, read by OpenAI's own client with strict types: the order of items and events."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.instant_engine import served
from tests.support.mcp_server import mcp_over_http
from tests.support.script import Dies, Line, call, say, think
from tests.support.scripted_engine import ScriptedEngine

MODEL = "gpt-oss-nano"
SERVER = str(Path(__file__).parents[1] / "support" / "mcp_server.py")
ADD = call("calc__add", '{"a": 1, "b": 2}')
NEVER: Any = {"type": "mcp", "server_label": "calc", "require_approval": "never"}


class Server:
    """The API with an MCP server, and clients for it."""

    def __init__(self, engine: ScriptedEngine, url: str, mcp_url: str) -> None:
        self.engine, self.url, self.mcp_url = engine, url, mcp_url
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True)

    def says(self, *lines: Line) -> None:
        self.engine.lines.clear()
        self.engine.lines.extend(lines)
        self.engine.requests.clear()

    def events(self, tools: list[Any], **options: Any) -> list[Any]:
        asked = {"model": MODEL, "input": "Go", "tools": tools, "stream": True} | options
        return list(self.client.responses.create(**asked))

    def respond(self, tools: list[Any], **options: Any) -> Any:
        return self.client.responses.create(**({"model": MODEL, "input": "Go", "tools": tools} | options))

    def prompt(self, number: int = -1) -> str:
        return self.engine.vocabulary.decode(self.engine.requests[number].token_ids)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    engine = ScriptedEngine()
    with mcp_over_http() as mcp_url:
        servers = {
            "calc": {"url": mcp_url},
            "some": {"url": mcp_url, "allowed_tools": ["add"]},
            "down": {"url": "http://127.0.0.1:9/mcp"},
        }
        settings: Any = {
            "mcp_servers": servers,
            "allow_request_mcp_urls": True,
            "request_mcp_hosts": ["127.0.0.1", "*.example.invalid"],
            "private_tool_networks": ["127.0.0.0/8"],
            "mcp_timeout_s": 5.0,
            "tool_timeout_s": 0.5,
        }
        with served(engine=engine, **settings) as url:
            yield Server(engine, url, mcp_url)


def kinds(events: list[Any]) -> list[str]:
    """The types of events without prefix; runs of deltas are one."""
    names = [event.type.removeprefix("response.") for event in events]
    return [name for index, name in enumerate(names) if not (name.endswith("delta") and names[index - 1] == name)]


LISTED = ["output_item.added", "mcp_list_tools.in_progress", "mcp_list_tools.completed", "output_item.done"]
CALLED = ["output_item.added", "mcp_call.in_progress", "mcp_call_arguments.delta", "mcp_call_arguments.done"]
REASONED = ["output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.done"]
SAID = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done"]
DONE = ["content_part.done", "output_item.done"]
BEGUN = ["created", "in_progress"]


def test_the_events_come_in_the_documented_order(server: Server) -> None:
    server.says(think("Hm.") + ADD, say("3."))
    events = server.events([NEVER])
    assert kinds(events) == [
        *BEGUN,
        *LISTED,
        *REASONED,
        *DONE,
        *CALLED,
        "mcp_call.completed",
        "output_item.done",
        *SAID,
        *DONE,
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    response = events[-1].response
    assert [item.type for item in response.output] == ["mcp_list_tools", "reasoning", "mcp_call", "message"]
    listed, _, called, _ = response.output
    assert [tool.name for tool in listed.tools][:2] == ["add", "fail"] and listed.server_label == "calc"
    assert listed.tools[0].annotations == {"readOnlyHint": True} and listed.tools[0].input_schema["type"] == "object"
    assert (called.name, called.output, called.status, called.error) == ("add", "3", "completed", None)
    assert called.arguments == '{"a": 1, "b": 2}' and called.approval_request_id is None
    done = [e.item for e in events if e.type == "response.output_item.done"]
    assert [one.id for one in done] == [one.id for one in response.output]
    assert "<|start|>functions.calc__add to=assistant<|channel|>commentary<|message|>3<|end|>" in server.prompt()


def test_usage_is_the_sum_of_the_rounds(server: Server) -> None:
    server.says(ADD, say("3."))
    usage = server.respond([NEVER]).usage
    first, second = (len(request.token_ids) for request in server.engine.requests)
    assert usage.input_tokens == first + second
    assert first - 64 < usage.input_tokens_details.cached_tokens - first < second - first or (
        usage.input_tokens_details.cached_tokens >= first - 16
    )


def test_a_list_that_the_items_have_is_not_fetched_again(server: Server) -> None:
    server.says(ADD, say("3."), ADD, say("Again 3."))
    first = server.respond([NEVER])
    second = server.respond([NEVER], previous_response_id=first.id)
    assert [item.type for item in second.output] == ["mcp_call", "message"]
    replayed = [item.model_dump(exclude_none=True) for item in first.output]
    server.says(say("Fine."))
    third = server.respond(
        [NEVER], input=[{"role": "user", "content": "Go"}, *replayed, {"role": "user", "content": "?"}]
    )
    assert [item.type for item in third.output] == ["message"]
    assert "functions.calc__add to=assistant<|channel|>commentary<|message|>3<|end|>" in server.prompt()


def test_a_tool_that_fails_is_a_failed_item(server: Server) -> None:
    server.says(call("calc__fail", "{}"), say("Sorry."))
    events = server.events([NEVER])
    assert "mcp_call.failed" in kinds(events)
    item = events[-1].response.output[1]
    assert (item.status, item.output, item.error.type) == ("failed", None, "mcp_tool_execution_error")
    assert item.error.content[0]["text"] == "Error executing tool fail" and "secret" not in server.prompt()


@pytest.mark.parametrize("written", ["[1]", "{", "nonsense"])
def test_arguments_that_are_no_object_are_a_failed_item(server: Server, written: str) -> None:
    server.says(call("calc__add", written), say("Sorry."))
    item = server.respond([NEVER]).output[1]
    assert (item.status, item.error.type, item.arguments) == ("failed", "mcp_protocol_error", written)


def test_a_slow_tool_is_a_failed_item(server: Server) -> None:
    server.says(call("calc__sleep", '{"seconds": 30}'), say("Sorry."))
    began = time.monotonic()
    item = server.respond([NEVER]).output[1]
    assert item.status == "failed" and "in time" in item.error.message and time.monotonic() - began < 10


def test_a_server_that_is_down_is_a_failed_list(server: Server) -> None:
    server.says(say("Without."))
    events = server.events([NEVER | {"server_label": "down"}])
    assert kinds(events)[2:6] == [*LISTED[:2], "mcp_list_tools.failed", LISTED[3]]
    listed, message = events[-1].response.output
    assert listed.error == "The MCP server cannot be reached." and listed.tools == []
    assert message.content[0].text == "Without."
    forced: Any = {"type": "mcp", "server_label": "down"}
    assert server.respond([NEVER | {"server_label": "down"}], tool_choice=forced).status == "completed"


def test_a_call_is_approved_and_run(server: Server) -> None:
    tool: Any = {"type": "mcp", "server_label": "calc"}
    server.says(think("Hm.") + ADD, say("3."))
    events = server.events([tool])
    assert kinds(events)[-3:] == ["output_item.added", "output_item.done", "completed"]
    asked = events[-1].response.output[-1]
    assert (asked.type, asked.name, asked.server_label) == ("mcp_approval_request", "add", "calc")
    assert asked.arguments == '{"a": 1, "b": 2}' and asked.id.startswith("mcpr_")
    answer: Any = {"type": "mcp_approval_response", "approval_request_id": asked.id, "approve": True}
    events = server.events([tool], input=[answer], previous_response_id=events[-1].response.id)
    assert kinds(events) == [
        *BEGUN,
        *CALLED,
        "mcp_call.completed",
        "output_item.done",
        *SAID,
        *DONE,
        "completed",
    ]
    called = events[-1].response.output[0]
    assert (called.output, called.approval_request_id) == ("3", asked.id)
    prompt = server.prompt()
    assert prompt.count('to=functions.calc__add <|constrain|>json<|message|>{"a": 1, "b": 2}<|call|>') == 1
    assert prompt.endswith("<|message|>3<|end|><|start|>assistant")
    server.says(say("Bye."))  # the call is history now, and does not run again
    after = server.respond([tool], previous_response_id=events[-1].response.id, input="More")
    assert [item.type for item in after.output] == ["message"] and server.prompt().count("<|message|>3<|end|>") == 1


def test_a_call_is_declined(server: Server) -> None:
    tool: Any = {"type": "mcp", "server_label": "calc"}
    server.says(ADD, say("As you like."))
    first = server.respond([tool])
    answer: Any = {
        "type": "mcp_approval_response",
        "approval_request_id": first.output[-1].id,
        "approve": False,
        "reason": "Not now.",
    }
    second = server.respond([tool], input=[answer], previous_response_id=first.id)
    assert [item.type for item in second.output] == ["message"]
    assert "The user did not allow this call. Not now.<|end|>" in server.prompt()


def test_an_approval_of_nothing_is_an_error(server: Server) -> None:
    answer: Any = {"type": "mcp_approval_response", "approval_request_id": "mcpr_x", "approve": True}
    with pytest.raises(openai.BadRequestError) as error:
        server.respond([NEVER], input=[answer])
    assert error.value.param == "input[0].approval_request_id"


def test_an_approved_call_does_not_run_in_a_later_answer(server: Server) -> None:
    tool: Any = {"type": "mcp", "server_label": "calc"}
    server.says(ADD, say("It is gone."), say("Hello."))
    first = server.respond([tool])
    answer = {"type": "mcp_approval_response", "approval_request_id": first.output[-1].id, "approve": True}
    without = server.respond([], input=[answer], previous_response_id=first.id)
    assert "This tool is not available any more." in server.prompt()
    later = server.respond([tool], input="Hi", previous_response_id=without.id)
    assert [item.type for item in later.output] == ["message"]


@pytest.mark.parametrize("answers", [(True, True), (True, False), (False, True)])
def test_a_second_answer_to_a_question_is_an_error(server: Server, answers: tuple[bool, bool]) -> None:
    tool: Any = {"type": "mcp", "server_label": "calc"}
    server.says(ADD)
    first = server.respond([tool])
    asked = {"type": "mcp_approval_response", "approval_request_id": first.output[-1].id}
    server.says(say("Never."))
    with pytest.raises(openai.BadRequestError, match="answered") as error:
        server.respond([tool], input=[asked | {"approve": one} for one in answers], previous_response_id=first.id)
    assert error.value.param == "input[1].approval_request_id" and not server.engine.requests


@pytest.mark.parametrize(
    ("rule", "asks"),
    [
        (None, True),
        ("always", True),
        ("never", False),
        ({"never": {"tool_names": ["add"]}}, False),
        ({"never": {"tool_names": ["fail"]}}, True),
        ({"never": {"read_only": True}}, False),
        ({"never": {}}, True),
        ({"never": {"tool_names": None}}, True),
        ({"always": {"tool_names": ["add"]}, "never": {"read_only": True}}, True),
        ({"always": {"tool_names": ["fail"]}}, True),
    ],
)
def test_approval_is_required_in_all_forms(server: Server, rule: Any, asks: bool) -> None:
    server.says(ADD, say("3."))
    tool = {"type": "mcp", "server_label": "calc"} | ({} if rule is None else {"require_approval": rule})
    kind = server.respond([tool]).output[1].type
    assert kind == ("mcp_approval_request" if asks else "mcp_call")


@pytest.mark.parametrize("allowed", [["add"], {"tool_names": ["add"]}, {"read_only": True}])
def test_only_allowed_tools_are_offered(server: Server, allowed: Any) -> None:
    server.says(say("Hm."))
    listed = server.respond([NEVER | {"allowed_tools": allowed}]).output[0]
    assert [tool.name for tool in listed.tools] == ["add"] and "calc__fail" not in server.prompt()


def test_the_configuration_allows_tools_too(server: Server) -> None:
    server.says(say("Hm."))
    assert [t.name for t in server.respond([NEVER | {"server_label": "some"}]).output[0].tools] == ["add"]


def test_a_tool_choice_names_a_server_or_a_tool(server: Server) -> None:
    for choice, offered in (({"name": "add"}, {"add"}), ({}, {"add", "fail", "sleep", "die", "grow"})):
        server.says(ADD, say("3."))
        server.respond([NEVER], tool_choice={"type": "mcp", "server_label": "calc", **choice})
        first, second = (request.params.grammar or "" for request in server.engine.requests)
        assert "final:" not in first and "final:" in second
        assert {name for name in ("add", "fail", "sleep", "die", "grow") if f".calc__{name} " in first} == offered
    for wrong in ({"server_label": "other"}, {"server_label": "calc", "name": "nope"}):
        with pytest.raises(openai.BadRequestError, match="tool_choice"):
            server.respond([NEVER], tool_choice={"type": "mcp", **wrong})


def test_a_server_is_named_by_its_url(server: Server) -> None:
    tool = NEVER | {
        "server_label": "mine",
        "server_url": server.mcp_url,
        "authorization": "tok",
        "headers": {"x-a": "b"},
    }
    server.says(call("mine__add", '{"a": 2, "b": 2}'), say("4."))
    response = server.respond([tool])
    assert [item.type for item in response.output] == ["mcp_list_tools", "mcp_call", "message"]
    assert response.output[1].output == "4"
    assert response.tools[0].authorization is None and response.tools[0].headers is None


@pytest.mark.parametrize(
    "url",
    [
        "http://10.0.0.1/mcp",
        "http://other.example/mcp",
        "http://[::1]/mcp",
        "http://169.254.169.254/",
        "ftp://127.0.0.1/",
        "http://127.0.0.1.nip.io/",
        "http://u:p@127.0.0.1/",
    ],
)
def test_other_urls_are_refused(server: Server, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        server.respond([NEVER | {"server_label": "mine", "server_url": url}])
    assert error.value.param == "tools[0].server_url"


@pytest.mark.parametrize(
    ("changed", "param"),
    [
        ({"server_label": "nope"}, "tools[0].server_label"),
        ({"server_label": "a b"}, "tools[0].server_label"),
        ({"connector_id": "connector_gmail"}, "tools[0].connector_id"),
        ({"authorization": "x"}, "tools[0].authorization"),
        ({"require_approval": "sometimes"}, "tools[0].require_approval"),
        ({"require_approval": {"nevr": {}}}, "tools[0].require_approval.nevr"),
        ({"require_approval": {"never": {"tool_name": ["fail"]}}}, "tools[0].require_approval.never.tool_name"),
        ({"allowed_tools": {"tool_name": ["fail"]}}, "tools[0].allowed_tools.tool_name"),
        ({"allowed_tools": {"tool_names": "add"}}, "tools[0].allowed_tools.tool_names"),
    ],
)
def test_an_invalid_entry_is_an_error(server: Server, changed: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        server.respond([NEVER | changed])
    assert str(error.value.param).startswith(param)


def test_two_servers_of_one_label_are_an_error(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="Two MCP servers"):
        server.respond([NEVER, NEVER])


def test_max_tool_calls(server: Server) -> None:
    server.says(ADD, ADD, say("Enough."))
    response = server.respond([NEVER], max_tool_calls=1)
    assert [item.type for item in response.output][:2] == ["mcp_list_tools", "mcp_call"]
    assert response.max_tool_calls == 1 and "calc__add " not in (server.engine.requests[1].params.grammar or "")


def test_calls_of_the_client_and_of_a_server(server: Server) -> None:
    mine: Any = {"type": "function", "name": "mine", "parameters": {"type": "object"}}
    server.says(ADD, call("mine", "{}"), say("Done."))
    first = server.respond([NEVER, mine])
    assert [item.type for item in first.output] == ["mcp_list_tools", "mcp_call", "function_call"]
    output: Any = {"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "ok"}
    before = [*server.engine.requests[-1].token_ids]
    second = server.respond([NEVER, mine], previous_response_id=first.id, input=[output])
    assert second.output[-1].type == "message"
    assert server.engine.requests[-1].token_ids[: len(before)] == before


def test_an_engine_that_dies_ends_the_stream_with_one_event(server: Server) -> None:
    server.says(ADD, Dies(think("Hm.")))
    events = server.events([NEVER])
    assert [name for name in kinds(events) if name in ("completed", "failed", "incomplete")] == ["failed"]


def test_metrics_and_the_log_count_by_tool(server: Server) -> None:
    import httpx

    text = httpx.get(f"{server.url}/metrics").text
    assert "gptoss_tool_calls_total{" in text and 'tool="mcp:calc"' in text and 'outcome="execution"' in text
    assert 'tool="mcp:request"' in text and "mcp:mine" not in text


@pytest.mark.parametrize("choice", [{"name": "add"}, {}])
def test_fields_of_mcp_are_known(server: Server, choice: Any, caplog: pytest.LogCaptureFixture) -> None:
    server.says(ADD, say("3."))
    tool = NEVER | {"server_description": "Adds.", "allowed_tools": ["add"]}
    server.respond([tool], tool_choice={"type": "mcp", "server_label": "calc", **choice})
    assert "unknown request fields" not in caplog.text


def test_nothing_of_a_tools_content_is_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    server.says(call("calc__grow", '{"name": "classified"}'), call("calc__add", "classified"), say("Hm."))
    output = server.respond([NEVER]).output
    assert [one.output for one in output if one.type == "mcp_call"] == ["classified is there", None]
    ours = [
        record.getMessage() for record in caplog.records if not record.name.startswith(("httpx", "httpcore", "openai"))
    ]
    assert not [line for line in ours if "classified" in line]
    assert [record.__dict__["tool"] for record in caplog.records if record.name == "tool"] == ["mcp:calc"] * 2


def test_a_process_is_a_server_and_comes_back(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    command = {"calc": {"command": [sys.executable, SERVER, "stdio"]}}
    with served(engine=engine, mcp_servers=command, mcp_timeout_s=15.0) as url:
        running = Server(engine, url, "")
        running.says(ADD, say("3."))
        assert running.respond([NEVER]).output[1].output == "3"
        running.says(call("calc__die", "{}"), say("Oh."))
        died = running.respond([NEVER]).output[1]
        assert died.status == "failed" and "has ended" in died.error.message
        running.says(ADD, say("3."))
        assert running.respond([NEVER]).output[1].output == "3"
        children = _children()
        assert len(children) == 1
    assert not _children()


def _children() -> list[Any]:
    import psutil

    return [one for one in psutil.Process().children(recursive=True) if SERVER in _command(one)]


def _command(process: Any) -> list[str]:
    import psutil

    with contextlib.suppress(psutil.Error):
        return list(process.cmdline())
    return []
