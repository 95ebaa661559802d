"""MCP through chat completions and through Anthropic's Messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from gptoss.generation.tool_types import ToolCall, ToolResult
from tests.support.instant_engine import served
from tests.support.mcp_server import mcp_over_http
from tests.support.message_stream import read_events
from tests.support.script import Line, call, call_builtin, say, think
from tests.support.scripted_engine import ScriptedEngine
from tests.support.tools import BROWSER, PYTHON, FakeRunner

MODEL = "gpt-oss-nano"
ADD = call("calc__add", '{"a": 1, "b": 2}')
NEVER: Any = {"type": "mcp", "server_label": "calc", "require_approval": "never"}
USER: Any = [{"role": "user", "content": "Go"}]
SERVERS: Any = [{"type": "url", "name": "calc"}]


class Server:
    def __init__(self, engine: ScriptedEngine, url: str, mcp_url: str) -> None:
        self.engine, self.url, self.mcp_url = engine, url, mcp_url
        self.chat = openai.OpenAI(base_url=f"{url}/v1", api_key="none").chat.completions

    def says(self, *lines: Line) -> None:
        self.engine.lines.clear()
        self.engine.lines.extend(lines)
        self.engine.requests.clear()

    def prompt(self, number: int = -1) -> str:
        return self.engine.vocabulary.decode(self.engine.requests[number].token_ids)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json={"model": MODEL, "messages": USER} | body)

    def message(self, **body: Any) -> Any:
        answer = self.post("/v1/messages", max_tokens=500, **body)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    engine = ScriptedEngine()
    with mcp_over_http() as mcp_url:
        servers = {"calc": {"url": mcp_url}, "down": {"url": "http://127.0.0.1:9/mcp"}}
        with served(engine=engine, mcp_servers=servers, mcp_timeout_s=5.0) as url:
            yield Server(engine, url, mcp_url)


def test_chat_runs_the_tools_of_a_server(server: Server) -> None:
    server.says(think("Hm.") + ADD, think("So.") + say("3."))
    answer = server.chat.create(model=MODEL, messages=USER, tools=[NEVER])
    message: Any = answer.choices[0].message
    assert (message.content, message.reasoning, message.tool_calls) == ("3.", "Hm.\nSo.", None)
    assert answer.choices[0].finish_reason == "stop"
    called = message.hosted_tool_calls[0]
    assert (called["name"], called["server_label"], called["output"], called["error"]) == ("add", "calc", "3", None)
    first, second = (len(request.token_ids) for request in server.engine.requests)
    assert answer.usage is not None and answer.usage.prompt_tokens == first + second


def test_a_stream_of_chat_adds_up_to_the_same(server: Server) -> None:
    server.says(think("Hm.") + ADD, think("So.") + say("3."))
    mine: Any = {"type": "function", "function": {"name": "mine", "parameters": {"type": "object"}}}
    chunks: Any = list(server.chat.create(model=MODEL, messages=USER, tools=[NEVER, mine], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "3."
    assert "".join(getattr(delta, "reasoning", None) or "" for delta in deltas) == "Hm.\nSo."
    hosted = [one for delta in deltas for one in getattr(delta, "hosted_tool_calls", None) or ()]
    assert [one["output"] for one in hosted] == ["3"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]


def test_a_call_of_the_client_after_one_of_the_server(server: Server) -> None:
    mine: Any = {"type": "function", "function": {"name": "mine", "parameters": {"type": "object"}}}
    server.says(ADD, call("mine", '{"x": 1}'))
    choice = server.chat.create(model=MODEL, messages=USER, tools=[NEVER, mine]).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    own: Any = choice.message.tool_calls
    assert [one.function.name for one in own] == ["mine"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "mcp", "server_label": "calc"}]}, "tools[0].require_approval"),
        ({"tools": [NEVER], "n": 2}, "n"),
        ({"tools": [NEVER | {"server_label": "nope"}]}, "tools[0].server_label"),
        ({"tools": [NEVER | {"server_url": "http://127.0.0.1/"}]}, "tools[0].server_url"),
        ({"tools": [NEVER | {"allowed_tools": 3}]}, "tools[0].allowed_tools"),
        ({"tools": [NEVER, {"type": "function", "function": {"name": "a b"}}]}, "tools[1].function.name"),
        (
            {"tools": [NEVER, {"type": "function", "function": {"name": "f", "parameters": {"type": "nope"}}}]},
            "tools[1].function.parameters",
        ),
    ],
)
def test_what_chat_cannot_do_is_an_error(server: Server, body: Any, param: str) -> None:
    answer = server.post("/v1/chat/completions", **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_messages_run_the_tools_of_a_server(server: Server) -> None:
    server.says(think("Hm.") + ADD, say("3."))
    message = server.message(mcp_servers=SERVERS, tools=[{"type": "mcp_toolset", "mcp_server_name": "calc"}])
    assert [block["type"] for block in message["content"]] == ["thinking", "mcp_tool_use", "mcp_tool_result", "text"]
    _, use, result, text = message["content"]
    assert (use["name"], use["server_name"], use["input"]) == ("add", "calc", {"a": 1, "b": 2})
    assert (result["tool_use_id"], result["is_error"]) == (use["id"], False)
    assert result["content"] == [{"type": "text", "text": "3"}]
    assert text["text"] == "3." and message["stop_reason"] == "end_turn"
    server.says(say("Yes."))
    again: Any = [*USER, {"role": "assistant", "content": message["content"]}, {"role": "user", "content": "Sure?"}]
    assert server.post("/v1/messages", max_tokens=100, messages=again).status_code == 200
    assert "<|start|>functions.calc__add to=assistant<|channel|>commentary<|message|>3<|end|>" in server.prompt()


def test_a_stream_of_messages_has_both_blocks(server: Server) -> None:
    server.says(ADD, call("calc__fail", "{}"), say("Oh."))
    answer = server.post("/v1/messages", max_tokens=500, mcp_servers=SERVERS, stream=True)
    events = read_events(answer.text)
    started = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    assert [block["type"] for block in started] == [*["mcp_tool_use", "mcp_tool_result"] * 2, "text"]
    assert [block["is_error"] for block in started if "is_error" in block] == [False, True]
    assert [event["type"] for event in events][-2:] == ["message_delta", "message_stop"]
    deltas = [e["delta"]["partial_json"] for e in events if e.get("delta", {}).get("type") == "input_json_delta"]
    assert "".join(deltas).startswith('{"a": 1, "b": 2}')
    open_blocks = [e["type"] for e in events if e["type"] in ("content_block_start", "content_block_stop")]
    assert open_blocks == ["content_block_start", "content_block_stop"] * 5


@pytest.mark.parametrize(
    ("toolset", "offered"),
    [
        ({"default_config": {"enabled": False}, "configs": {"add": {"enabled": True}}}, True),
        ({"configs": {"add": {"enabled": False}}}, False),
    ],
)
def test_a_toolset_chooses_tools(server: Server, toolset: Any, offered: bool) -> None:
    server.says(say("Hm."))
    server.message(mcp_servers=SERVERS, tools=[{"type": "mcp_toolset", "mcp_server_name": "calc", **toolset}])
    assert ("calc__add" in server.prompt()) == offered and ("calc__fail" in server.prompt()) != offered


def test_the_older_form_chooses_tools_too(server: Server) -> None:
    server.says(say("Hm."))
    config = {"tool_configuration": {"allowed_tools": ["add"]}}
    server.post("/v1/messages", max_tokens=100, mcp_servers=[SERVERS[0] | config])
    assert "calc__add" in server.prompt() and "calc__fail" not in server.prompt()


def test_a_server_that_is_down_is_left_out(server: Server) -> None:
    server.says(say("Without."))
    answer = server.post("/v1/messages", max_tokens=100, mcp_servers=[{"type": "url", "name": "down"}])
    assert answer.status_code == 200 and answer.json()["content"][0]["text"] == "Without."


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"mcp_servers": [{"type": "url", "name": "x", "url": "http://127.0.0.1:1/"}]}, "mcp_servers.0.url"),
        ({"mcp_servers": [{"type": "url", "name": "nope"}]}, "mcp_servers.0"),
        ({"tools": [{"type": "mcp_toolset", "mcp_server_name": "calc"}]}, "tools.0.mcp_server_name"),
        ({"mcp_servers": [SERVERS[0] | {"authorization_token": "x"}]}, "mcp_servers.0.authorization_token"),
    ],
)
def test_what_messages_cannot_do_is_an_error(server: Server, body: Any, field: str) -> None:
    answer = server.post("/v1/messages", max_tokens=100, **body)
    assert answer.status_code == 400, answer.text


def test_tokens_of_the_tools_are_counted(server: Server) -> None:
    counts = [
        server.post("/v1/messages/count_tokens", **body).json()["input_tokens"]
        for body in ({}, {"mcp_servers": SERVERS})
    ]
    assert counts[1] > counts[0] + 50


class Fake:
    """Settings under which built-in tools are the tests' own."""

    def __init__(self) -> None:
        self.browser, self.python = FakeRunner(BROWSER), FakeRunner(PYTHON)


@pytest.fixture
def built_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Fake, Server]]:
    fake, engine = Fake(), ScriptedEngine()
    made = {"browser": fake.browser, "python": fake.python}
    monkeypatch.setattr("gptoss.api.hosted.service.make_builtins", lambda *_: made)
    with served(engine=engine) as url:
        yield fake, Server(engine, url, "")
    assert fake.browser.num_open == fake.python.num_open == 0


def test_messages_have_blocks_of_search_and_code(built_in: tuple[Fake, Server]) -> None:
    fake, server = built_in

    async def search(made: ToolCall) -> ToolResult:
        return ToolResult.of_text("[0] results", sources=["https://a.example/"])

    fake.browser.does = search
    lines = call_builtin("browser.search", '{"query": "x"}'), call_builtin("python", "print(1)")
    server.says(*lines, call_builtin("browser.open", "[]"), say("Done."))
    tools = [
        {"type": "web_search_20250305", "name": "web_search", "allowed_domains": ["a.example"], "max_uses": 3},
        {"type": "code_execution_20250825", "name": "code_execution"},
        {"type": "computer_20251124", "name": "computer"},
    ]
    content = server.message(tools=tools)["content"]
    kinds = ["server_tool_use", "web_search_tool_result", "server_tool_use", "code_execution_tool_result"]
    assert [block["type"] for block in content] == [*kinds, "server_tool_use", "web_fetch_tool_result", "text"]
    assert (content[0]["name"], content[0]["input"]) == ("web_search", {"query": "x"})
    assert content[1]["tool_use_id"] == content[0]["id"] and content[1]["content"][0]["url"] == "https://a.example/"
    assert (content[2]["name"], content[2]["input"]) == ("code_execution", {"code": "print(1)"})
    assert content[3]["content"]["stdout"] == "python: print(1)" and content[3]["content"]["return_code"] == 0
    assert fake.browser.calls[0].options["allowed_domains"] == ("a.example",)
    assert "## browser" in server.prompt(0) and "## python" in server.prompt(0) and "computer" not in server.prompt(0)


def test_a_choice_of_a_built_in_tool(built_in: tuple[Fake, Server]) -> None:
    _, server = built_in
    server.says(call_builtin("python", "1"), say("Done."))
    tools = [{"type": "code_execution_20250825", "name": "code_execution"}]
    server.message(tools=tools, tool_choice={"type": "tool", "name": "code_execution"})
    first, second = (request.params.grammar or "" for request in server.engine.requests)
    assert " to=python" in first and "final:" not in first and "final:" in second


def test_code_that_ran_stays_in_a_turn_that_the_client_interrupts(built_in: tuple[Fake, Server]) -> None:
    _, server = built_in
    note = call("note", '{"x":1}')
    server.says(call_builtin("python", "print(1)"), note)
    run: Any = {"type": "code_execution_20250522", "name": "code_execution"}
    tools = [run, {"name": "note", "input_schema": {"type": "object"}}]
    first = server.message(tools=tools)
    assert first["stop_reason"] == "tool_use"
    generated = server.prompt() + note
    result = {"type": "tool_result", "tool_use_id": first["content"][-1]["id"], "content": "noted"}
    server.says(say("Done."))
    history = [*USER, {"role": "assistant", "content": first["content"]}, {"role": "user", "content": [result]}]
    server.message(tools=tools, messages=history)
    assert server.prompt().startswith(generated)
