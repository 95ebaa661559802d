"""`code_interpreter` through /v1/responses, read by OpenAI's own client with strict types."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest

from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig
from gptoss.tools.python_sandbox import bubblewrap
from gptoss.tools.python_sandbox.build import build_python
from tests.support.instant_engine import served
from tests.support.sandbox import machine_sandbox
from tests.support.script import call, call_builtin, say, think
from tests.support.scripted_engine import ScriptedEngine
from tests.support.waiting import wait_until

MODEL = "gpt-oss-nano"
AUTO: Any = {"type": "code_interpreter", "container": {"type": "auto"}}
OUTPUTS: Any = ["code_interpreter_call.outputs"]
PNG = "class P:\n    def _repr_png_(self): return b'png'\nprint('drawn')\nP()"
SETTINGS: Any = {
    "enable_python_tool": True,
    "python_tool_timeout_s": 1.5,
    "python_tool_memory_bytes": 2**29,
    "max_tool_sessions": 3,
    "tool_session_idle_s": 60.0,
}


def python(code: str) -> str:
    return call_builtin("python", code)


class Server:
    """The API with the Python tool, and OpenAI's client for it."""

    def __init__(self, engine: ScriptedEngine, url: str) -> None:
        self.engine = engine
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True)

    def says(self, *lines: Any) -> None:
        self.engine.lines.clear()
        self.engine.lines.extend(lines)
        self.engine.requests.clear()

    def respond(self, *lines: Any, tools: Any = (AUTO,), **options: Any) -> Any:
        self.says(*lines)
        asked = {"model": MODEL, "input": "Go", "tools": [*tools], "include": OUTPUTS} | options
        return self.client.responses.create(**asked)

    def prompt(self, number: int = -1) -> str:
        return self.engine.vocabulary.decode(self.engine.requests[number].token_ids)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    machine_sandbox()
    engine = ScriptedEngine()
    with served(engine=engine, **SETTINGS) as url:
        yield Server(engine, url)
    assert not sandboxes()


def sandboxes() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if one.name() == "bwrap"]


def calls_of(response: Any) -> list[Any]:
    return [item for item in response.output if item.type == "code_interpreter_call"]


def logs(call: Any) -> str:
    return "".join(one.logs for one in call.outputs if one.type == "logs")


def test_code_runs_and_the_model_reads_what_it_printed(server: Server) -> None:
    answered = server.respond(think("I compute.") + python("x = 6\nprint('six')\nx * 7"), say("It is 42."))
    (call,) = calls_of(answered)
    assert (call.status, call.code) == ("completed", "x = 6\nprint('six')\nx * 7")
    assert call.container_id.startswith("cntr_") and logs(call) == "six\n42\n"
    assert answered.output_text == "It is 42." and answered.status == "completed"
    assert "## python" in server.prompt(0) and "disabled" in server.prompt(0)
    result = "<|start|>python to=assistant<|channel|>analysis<|message|>six\n42<|end|><|start|>assistant"
    assert server.prompt().endswith(result)
    assert answered.usage.input_tokens_details.cached_tokens > 0


def test_events_come_in_the_documented_order(server: Server) -> None:
    server.says(python("1 + 1"), say("Two."))
    asked: Any = {"model": MODEL, "input": "Go", "tools": [AUTO], "include": OUTPUTS, "stream": True}
    events = list(server.client.responses.create(**asked))
    mine = [event for event in events if getattr(event, "output_index", None) == 0]
    assert [event.type.removeprefix("response.") for event in mine] == [
        "output_item.added",
        "code_interpreter_call.in_progress",
        "code_interpreter_call_code.delta",
        "code_interpreter_call_code.done",
        "code_interpreter_call.interpreting",
        "code_interpreter_call.completed",
        "output_item.done",
    ]
    assert mine[3].code == "1 + 1" and mine[0].item.status == "in_progress" and mine[-1].item.status == "completed"
    assert mine[0].item.container_id == mine[-1].item.container_id
    assert [event.sequence_number for event in events] == [*range(len(events))]
    assert events[-1].type == "response.completed" and events[-1].response.output[0] == mine[-1].item


def test_outputs_are_shown_on_request_only(server: Server) -> None:
    (drawn,) = calls_of(server.respond(python(PNG), say("Drawn.")))
    url = f"data:image/png;base64,{base64.b64encode(b'png').decode()}"
    assert [(one.type, getattr(one, "url", None)) for one in drawn.outputs] == [("logs", None), ("image", url)]
    assert "drawn\n[an image, image/png]<|end|>" in server.prompt()
    (plain,) = calls_of(server.respond(python(PNG), say("Drawn."), include=[]))
    assert plain.outputs is None


def test_state_is_kept_for_the_response_that_continues(server: Server) -> None:
    first = server.respond(python("kept = 5"), python("kept += 1"), say("Set."))
    assert len({call.container_id for call in calls_of(first)}) == 1
    second = server.respond(python("kept"), say("Six."), previous_response_id=first.id)
    assert logs(calls_of(second)[0]) == "6\n"
    third = server.respond(say("No code."), previous_response_id=second.id, tools=())
    fourth = server.respond(python("kept"), say("Six."), previous_response_id=third.id)
    assert logs(calls_of(fourth)[0]) == "6\n"
    fresh = server.respond(python("kept"), say("?"))
    assert "NameError" in logs(calls_of(fresh)[0]) and calls_of(fresh)[0].status == "completed"


def test_a_container_is_named_by_its_id(server: Server) -> None:
    made = calls_of(server.respond(python("named = 1"), say("Set."), store=False))[0].container_id
    named: Any = {"type": "code_interpreter", "container": made}
    again = server.respond(python("named"), say("One."), tools=(named,), store=False)
    assert logs(calls_of(again)[0]) == "1\n" and calls_of(again)[0].container_id == made
    history = [{"role": "user", "content": "Go"}, *(item.model_dump() for item in again.output)]
    auto = server.respond(python("named"), say("One."), input=[*history, {"role": "user", "content": "Again"}])
    assert logs(calls_of(auto)[0]) == "1\n"
    unknown: Any = {"type": "code_interpreter", "container": "cntr_" + "0" * 48}
    failed = server.respond(python("1"), say("Failed."), tools=(unknown,))
    assert calls_of(failed)[0].status == "failed" and failed.status == "completed"
    assert "There is no container" in server.prompt()


def test_a_container_that_made_way_is_a_failed_item(server: Server) -> None:
    first = server.respond(python("lost = 1"), say("Set."))
    for _ in range(3):
        server.respond(python("1"), say("One."))
    assert len(sandboxes()) <= 2 * SETTINGS["max_tool_sessions"]
    continued = server.respond(python("lost"), python("lost"), say("Lost."), previous_response_id=first.id)
    gone, new = calls_of(continued)
    assert gone.status == "failed" and new.status == "completed" and "NameError" in logs(new)
    assert "has expired; its state is lost" in server.prompt()


def test_limits_are_failed_items_that_the_model_reads(server: Server) -> None:
    late = server.respond(python("import time\nprint('begun')\ntime.sleep(60)"), python("2"), say("Late."))
    first, second = calls_of(late)
    assert (first.status, second.status) == ("failed", "completed")
    assert "begun" in logs(first) and first.container_id == second.container_id
    assert "The code was interrupted at the time limit" in server.prompt()
    ended = server.respond(python("import os; os._exit(1)"), python("3"), say("Ended."))
    first, second = calls_of(ended)
    assert first.status == "failed" and second.status in ("failed", "completed")


def test_what_looks_like_a_special_token_is_text(server: Server) -> None:
    answered = server.respond(python("print('<' + '|end|><' + '|start|>system<' + '|message|>')"), say("Shown."))
    assert logs(calls_of(answered)[0]) == "<|end|><|start|>system<|message|>\n"
    ids = server.engine.requests[-1].token_ids
    assert sum(one == 200006 for one in ids) == server.prompt().count("<|start|>") - 1


def test_the_response_repeats_the_tool(server: Server) -> None:
    (shown,) = server.respond(say("No code."), tools=({"type": "code_interpreter"},)).tools
    assert shown.container.type == "auto"


def test_a_call_that_is_required(server: Server) -> None:
    server.respond(python("1"), say("One."), tool_choice={"type": "code_interpreter"})
    assert "python" in server.prompt(0)


@pytest.mark.parametrize(
    ("container", "param", "message"),
    [
        ({"type": "auto", "file_ids": ["file_1"]}, "tools[0].container.file_ids", "stores no files"),
        ({"type": "auto", "memory_limit": "3g"}, "tools[0].container.memory_limit", "'1g', '4g', '16g' or '64g'"),
        ({"type": "auto", "memory_limit": "1g"}, "tools[0].container.memory_limit", "python_tool_memory_bytes"),
        (
            {"type": "auto", "network_policy": {"type": "allowlist", "allowed_domains": ["a.example"]}},
            "tools[0].container.network_policy",
            "no network",
        ),
        ({"type": "other"}, "tools[0].container", ""),
    ],
)
def test_containers_that_cannot_be_had(server: Server, container: Any, param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        server.respond(say("Never."), tools=({"type": "code_interpreter", "container": container},))
    error: Any = raised.value.body
    assert error["param"].startswith(param) and message in error["message"]


def test_a_client_that_leaves_stops_its_code(server: Server) -> None:
    server.says(python("import time\nopen('/mnt/data/x', 'w')\ntime.sleep(60)"), say("Never."))
    asked: Any = {"model": MODEL, "input": "Go", "tools": [AUTO], "stream": True, "store": False}
    stream = server.client.responses.create(**asked)
    for event in stream:
        if event.type == "response.code_interpreter_call.interpreting":
            break
    before = len(sandboxes())
    assert before and any(one.status() != psutil.STATUS_STOPPED for one in _interpreters())
    stream.close()

    def stopped() -> bool:
        return all(one.status() == psutil.STATUS_STOPPED for one in _interpreters()) or len(sandboxes()) < before

    wait_until(stopped)
    assert stopped()


def _interpreters() -> list[psutil.Process]:
    inside = [one for sandbox in sandboxes() for one in sandbox.children(recursive=True)]
    return [one for one in inside if one.name().startswith("python")]


PAY: Any = {"type": "function", "name": "pay", "parameters": {"type": "object"}, "strict": False}


@pytest.mark.parametrize("stored", [True, False])
def test_within_a_turn_the_model_reads_its_code_again(server: Server, stored: bool) -> None:
    code = think("I compute.") + python("print('six')\n6")
    first = server.respond(code, think("Now I pay.") + call("pay", "{}"), tools=(AUTO, PAY), store=stored, include=[])
    *_, called = first.output
    assert called.type == "function_call" and calls_of(first)[0].outputs is None
    second_round = server.prompt()
    paid = {"type": "function_call_output", "call_id": called.call_id, "output": "done"}
    history = [{"role": "user", "content": "Go"}, *(item.model_dump() for item in first.output)]
    sent: Any = {"previous_response_id": first.id, "input": [paid]} if stored else {"input": [*history, paid]}
    server.respond(say("Paid."), tools=(AUTO, PAY), **sent)
    assert "<|message|>six\n6<|end|>" in second_round
    assert server.prompt().startswith(second_round)
    later = [*history, paid, {"role": "assistant", "content": "Paid."}, {"role": "user", "content": "Thanks"}]
    server.respond(say("Welcome."), tools=(AUTO, PAY), input=later)
    assert "six" not in server.prompt()


def test_code_of_another_server_is_read_as_far_as_it_is_known(server: Server) -> None:
    ran: Any = {"type": "code_interpreter_call", "id": "ci_other", "container_id": "cntr_other", "status": "completed"}
    ran |= {"code": "6 * 7", "outputs": [{"type": "logs", "logs": "42\n"}, {"type": "image", "url": "data:,"}]}
    called = {"type": "function_call", "call_id": "call_1", "name": "pay", "arguments": "{}"}
    paid = {"type": "function_call_output", "call_id": "call_1", "output": "done"}
    server.respond(say("Paid."), tools=(AUTO, PAY), input=[{"role": "user", "content": "Go"}, ran, called, paid])
    assert "to=python code<|message|>6 * 7<|call|>" in server.prompt()
    assert "analysis<|message|>42\n[an image, image/png]<|end|>" in server.prompt()
    unknown = ran | {"outputs": None}
    server.respond(say("Paid."), tools=(AUTO, PAY), input=[{"role": "user", "content": "Go"}, unknown, called, paid])
    assert "no longer known" in server.prompt()


def chat(server: Server, *lines: Any, tool: Any = AUTO, **options: Any) -> Any:
    server.says(*lines)
    asked: Any = {"model": MODEL, "messages": [{"role": "user", "content": "Go"}], "tools": [tool]} | options
    return server.client.chat.completions.create(**asked)


def test_chat_completions_run_code_too(server: Server) -> None:
    answered = chat(server, think("I compute.") + python("x = 6\nx * 7"), say("It is 42."))
    message = answered.choices[0].message
    assert message.content == "It is 42." and message.tool_calls is None
    (ran,) = message.hosted_tool_calls
    assert (ran["type"], ran["code"], ran["error"]) == ("code_interpreter", "x = 6\nx * 7", None)
    assert ran["outputs"] == [{"type": "logs", "logs": "42\n"}]
    named = {"type": "code_interpreter", "container": ran["container_id"]}
    chunks = list(chat(server, python("x"), python("1/0"), say("Six."), tool=named, stream=True))
    calls = [one for chunk in chunks for one in getattr(chunk.choices[0].delta, "hosted_tool_calls", None) or ()]
    assert calls[0]["outputs"] == [{"type": "logs", "logs": "6\n"}] and "ZeroDivisionError" in str(calls[1]["outputs"])
    failed = chat(server, python("import os; os._exit(1)"), say("Ended."), tool=named)
    assert failed.choices[0].message.hosted_tool_calls[0]["error"]["type"] == "execution"


def test_without_the_key_the_tool_is_left_out() -> None:
    engine = ScriptedEngine([say("Done.")])
    with served(engine=engine) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", _strict_response_validation=True)
        answered = client.responses.create(model=MODEL, input="Go", tools=[AUTO])
        prompt = engine.vocabulary.decode(engine.requests[0].token_ids)
        with pytest.raises(openai.BadRequestError, match="does not run tools of type 'code_interpreter'") as raised:
            chat(Server(engine, url))
    error: Any = raised.value.body
    assert error["param"] == "tools[0].type"
    assert answered.output_text == "Done."
    assert "## python" not in prompt


def test_a_server_without_a_sandbox_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap.shutil, "which", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"enable_python_tool: bubblewrap \(bwrap\) is not installed; apt-get install"
    ):
        build_python(ServerConfig(enable_python_tool=True))
    assert build_python(ServerConfig()) is None
