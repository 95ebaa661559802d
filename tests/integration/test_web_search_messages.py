"""Web search through Anthropic's Messages, over a folder of documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.instant_engine import served
from tests.support.message_stream import folded_message, read_events
from tests.support.script import call, call_builtin, say, think
from tests.support.scripted_engine import ScriptedEngine

MODEL = "gpt-oss-nano"
USER: Any = {"role": "user", "content": "Go"}
SEARCH: Any = {"type": "web_search_20250305", "name": "web_search"}
NOTE: Any = {"name": "note", "input_schema": {"type": "object"}}
PUMP = "local:///pump.md"
BEGIN = call_builtin("browser.search", '{"query":"pump pressure"}')
OPEN = call_builtin("browser.open", '{"id":0}')
FIND = call_builtin("browser.find", '{"pattern":"bar"}')
SAID = say("It has 12 bar【1†L4】【1†L6】, I read.")


class Server:
    def __init__(self, engine: ScriptedEngine, url: str) -> None:
        self.engine, self.url = engine, url

    def says(self, *lines: str) -> None:
        self.engine.lines.clear()
        self.engine.lines.extend(lines)
        self.engine.requests.clear()

    def prompt(self, number: int = -1) -> str:
        return self.engine.vocabulary.decode(list(self.engine.requests[number].token_ids))

    def post(self, **body: Any) -> httpx.Response:
        asked = {"model": MODEL, "max_tokens": 900, "messages": [USER], "tools": [SEARCH]}
        return httpx.post(f"{self.url}/v1/messages", json=asked | body, timeout=60)

    def message(self, **body: Any) -> Any:
        answer = self.post(**body)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("documents")
    (folder / "pump.md").write_text(
        "# The pump\n\nThe pump has a pressure of 12 bar.\n\nSee [the valve](valve.html).\n"
    )
    (folder / "valve.html").write_text("<title>Valve</title><p>It opens at 9 bar.</p>")
    engine = ScriptedEngine([])
    with served(engine=engine, browser_backend="folder", browser_folder=folder) as url:
        yield Server(engine, url)


def after(message: Any, *more: Any) -> list[Any]:
    return [USER, {"role": "assistant", "content": message["content"]}, *more]


def test_calls_results_and_citations_are_blocks(server: Server) -> None:
    server.says(think("Hm.") + BEGIN, OPEN, FIND, SAID)
    message = server.message()
    kinds = ["thinking", "server_tool_use", "web_search_tool_result", *["server_tool_use", "web_fetch_tool_result"] * 2]
    assert [block["type"] for block in message["content"]] == [*kinds, "text", "text"]
    _, search, found, fetch, page, find, _, cited, rest = message["content"]
    assert (search["name"], search["input"]) == ("web_search", {"query": "pump pressure"})
    assert (fetch["name"], fetch["input"], find["input"]) == ("web_fetch", {"id": 0}, {"pattern": "bar"})
    assert found["tool_use_id"] == search["id"] and search["id"].startswith("srvtoolu_")
    first, *others = found["content"]
    assert (first["type"], first["url"], first["title"]) == ("web_search_result", PUMP, "The pump")
    assert first["encrypted_content"] and not any(one["encrypted_content"] for one in others)
    assert (page["content"]["url"], page["content"]["content"]["title"]) == (PUMP, "The pump")
    assert "L4: The pump has a pressure of 12 bar." in page["content"]["content"]["source"]["data"]
    assert (cited["text"], rest["text"], "citations" in rest) == ("It has 12 bar", ", I read.", False)
    one, two = cited["citations"]
    assert (one["type"], one["url"], one["title"]) == ("web_search_result_location", PUMP, "The pump")
    assert (one["cited_text"], two["cited_text"]) == ("The pump has a pressure of 12 bar.", "See the valve.")
    assert message["stop_reason"] == "end_turn"
    assert message["usage"]["server_tool_use"] == {"web_search_requests": 1, "web_fetch_requests": 2}


def test_a_stream_adds_up_to_the_message(server: Server) -> None:
    lines = think("Hm.") + BEGIN, OPEN, say("So【1†L4】 and 【7†L1】\n\nso 【1†L6】 【0†L4】it【1†L4】")
    server.says(*lines)
    whole = server.message()
    server.says(*lines)
    events = read_events(server.post(stream=True).text)
    streamed = folded_message(events)
    ids = {block["id"] for one in (whole, streamed) for block in one["content"] if "id" in block}
    assert len(ids) == 4
    for one in (whole, streamed):
        for block in one["content"]:
            block.pop("id", None), block.pop("tool_use_id", None)
    assert streamed["content"] == whole["content"] and streamed["usage"] == whole["usage"]
    texts = [block for block in whole["content"] if block["type"] == "text"]
    assert [block["text"] for block in texts] == ["So ", "and 【7†L1】\n\nso   ", "it"]
    assert [len(block["citations"]) for block in texts] == [1, 2, 1]
    names = [
        (event["type"], (event.get("content_block") or event.get("delta") or {}).get("type"))
        for event in events
        if event.get("index") in (1, 2)
    ]
    assert names == [
        ("content_block_start", "server_tool_use"),
        ("content_block_delta", "input_json_delta"),
        ("content_block_stop", None),
        ("content_block_start", "web_search_tool_result"),
        ("content_block_stop", None),
    ]


def test_a_turn_that_the_client_s_tool_interrupts_goes_on(server: Server) -> None:
    """The prompt is the one before, with what was generated and read, and the open pages can still be cited."""
    server.says(think("Hm.") + BEGIN, OPEN, call("note", '{"text":"12 bar"}'))
    first = server.message(tools=[SEARCH, NOTE])
    assert first["stop_reason"] == "tool_use"
    before, note = server.prompt(), call("note", '{"text":"12 bar"}')
    result = {"type": "tool_result", "tool_use_id": first["content"][-1]["id"], "content": "noted"}
    server.says(SAID)
    messages = after(first, {"role": "user", "content": [result]})
    second = server.message(tools=[SEARCH, NOTE], messages=messages)
    assert server.prompt().startswith(before + note)
    assert [len(block.get("citations", ())) for block in second["content"]] == [2, 0]
    server.says(call_builtin("browser.open", '{"cursor":1,"id":0}'), say("9【2†L2】."))
    third = server.message(tools=[SEARCH, NOTE], messages=messages)
    assert third["content"][1]["content"]["url"] == "local:///valve.html"
    assert third["content"][2]["citations"][0]["title"] == "Valve"


def test_a_later_turn_reads_the_answer_with_its_marks(server: Server) -> None:
    server.says(BEGIN, OPEN, SAID)
    first = server.message()
    server.says(say("Yes."))
    server.message(messages=after(first, {"role": "user", "content": "Sure?"}))
    assert "It has 12 bar【1†L4】【1†L6】, I read.<|end|><|start|>user<|message|>Sure?" in server.prompt()
    assert "browser.search to=assistant" not in server.prompt()


def test_calls_of_other_servers_are_read_where_they_can_be(server: Server) -> None:
    use = {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}}
    found = {"type": "web_search_result", "url": "https://a.example/", "title": "A", "encrypted_content": "Eq8="}
    failed = {"type": "web_search_tool_result_error", "error_code": "unavailable"}
    mine = {"type": "tool_use", "id": "toolu_1", "name": "note", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": "ok"}]}
    for content, text in ([found], "A (https://a.example/)"), (failed, "Error: unavailable"), (None, ""):
        server.says(say("Yes."))
        blocks = [use, {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": content}, mine]
        server.message(tools=[SEARCH, NOTE], messages=after({"content": blocks}, result))
        read = f"browser.search to=assistant<|channel|>analysis<|message|>{text}<|end|>"
        assert read in server.prompt()
    for left_out in ([use, mine], [{**use, "input": "x"}, mine], [{"type": "bash_code_execution_tool_result"}, mine]):
        server.says(say("Yes."))
        server.message(tools=[SEARCH, NOTE], messages=after({"content": left_out}, result))
        assert "to=browser.search" not in server.prompt()


def test_max_uses_are_the_searches_that_run(server: Server) -> None:
    server.says(BEGIN, BEGIN, OPEN, say("Done."))
    message = server.message(tools=[SEARCH | {"max_uses": 1}])
    results = [block["content"] for block in message["content"] if block["type"].endswith("_tool_result")]
    assert results[1] == {"type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"}
    assert results[2]["type"] == "web_fetch_result"
    assert message["usage"]["server_tool_use"]["web_search_requests"] == 1


def test_errors_have_anthropic_s_codes(server: Server) -> None:
    server.says(
        call_builtin("browser.search", "{not json"),
        call_builtin("browser.open", '{"id": "https://a.example/"}'),
        call_builtin("browser.open", '{"cursor": 9}'),
        say("Nothing."),
    )
    content = server.message()["content"]
    assert content[0]["input"] == {"arguments": "{not json"}
    codes = [block["content"]["error_code"] for block in content if "tool_use_id" in block]
    assert codes == ["invalid_tool_input", "url_not_accessible", "invalid_tool_input"]


def test_the_fields_of_the_tool_are_followed(server: Server) -> None:
    location = {"type": "approximate", "city": "Kiel", "country": "DE"}
    for domains, count in (
        ({"allowed_domains": ["example.com"], "user_location": location}, 0),
        ({"blocked_domains": ["example.com"], "max_uses": 5}, 2),
    ):
        server.says(call_builtin("browser.search", '{"query": "bar"}'), say("Done."))
        assert len(server.message(tools=[SEARCH | domains])["content"][1]["content"]) == count


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"max_uses": 0}, "tools.0.max_uses"),
        ({"max_uses": "3"}, "tools.0.max_uses"),
        ({"allowed_domains": ["https://a.example"]}, "tools.0.allowed_domains.0"),
        ({"blocked_domains": "a.example"}, "tools.0.blocked_domains"),
        ({"blocked_domains": ["a b"]}, "tools.0.blocked_domains.0"),
        ({"allowed_domains": ["a.example"], "blocked_domains": ["b.example"]}, "blocked_domains"),
        ({"user_location": {"type": "exact"}}, "tools.0.user_location.type"),
        ({"user_location": {"country": "Germany"}}, "tools.0.user_location.country"),
    ],
)
def test_a_field_that_is_wrong_is_named(server: Server, fields: Any, field: str) -> None:
    answer = server.post(tools=[SEARCH | fields])
    assert answer.status_code == 400 and field in answer.json()["error"]["message"], answer.text


def test_without_a_browser_the_tool_and_its_blocks_are_left_out(server: Server) -> None:
    server.says(BEGIN, OPEN, say("It has 12 bar【1†L4】."))
    message = server.message()
    engine = ScriptedEngine([say("Hi."), say("Hi.")])
    with served(engine=engine) as url:
        other = Server(engine, url)
        answer = other.message(tools=[SEARCH | {"max_uses": 0}])
        assert answer["content"] == [{"type": "text", "text": "Hi."}] and "server_tool_use" not in answer["usage"]
        assert "browser" not in other.prompt()
        assert other.post(messages=after(message, USER)).status_code == 200
        assert "browser" not in other.prompt()
