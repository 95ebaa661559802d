"""Deltas as content blocks and as the events that build them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic_core import from_json

from gptoss.api.http.anthropic_errors import anthropic_error
from gptoss.api.http.encrypted_content import encode_text
from gptoss.api.http.error_responses import error_response
from gptoss.api.http.errors import InvalidRequest, RateLimited, Unauthorized, Unavailable
from gptoss.api.messages.output import MessageContent, read_arguments
from gptoss.engine.messages import FinishReason, TokenOutput
from gptoss.generation.chat_output import ChatChoice
from gptoss.harmony.parser import ResponseParser
from tests.support.message_stream import folded_blocks
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
NEXT = "<|start|>assistant"
TURN = (
    "<|channel|>analysis<|message|>Hm.<|end|>"
    f"{NEXT}<|channel|>commentary<|message|>Looking.<|end|>"
    f'{NEXT}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{"a": [1, "é"]}}<|call|>'
)


def written(text: str, *, hides: bool = False, holds: bool = False, stop: Sequence[str] = ()) -> tuple[Any, Any, Any]:
    """-> (the events, the blocks, the choice)."""
    choice = ChatChoice(0, ResponseParser(VOCABULARY, ["f"]), stop, None, joins_messages=False)
    content, events = MessageContent(hides_thinking=hides, holds_arguments=holds), []
    for token in VOCABULARY.encode_with_special(text):
        for delta in choice.feed(TokenOutput("r", [token])):
            events += content.feed(delta)
        if choice.finish_reason is not None:
            break
    else:
        choice.feed(TokenOutput("r", [], finish_reason=FinishReason.STOP))
    return events + content.close(), content.blocks, choice


def test_a_turn_is_blocks_in_order() -> None:
    events, blocks, choice = written(TURN)
    assert folded_blocks(events) == blocks
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use"]
    assert blocks[0] == {"type": "thinking", "thinking": "Hm.", "signature": "plain.v1."}
    assert blocks[1] == {"type": "text", "text": "Looking."}
    assert blocks[2]["id"].startswith("toolu_") and blocks[2]["input"] == {"a": [1, "é"]}
    assert choice.num_calls == 1


def test_thinking_that_is_omitted_is_in_its_signature() -> None:
    events, blocks, _ = written(TURN, hides=True)
    assert folded_blocks(events) == blocks
    assert blocks[0] == {"type": "thinking", "thinking": "", "signature": encode_text("Hm.")}
    kinds = [event["delta"]["type"] for event in events if event["type"] == "content_block_delta"]
    assert "thinking_delta" not in kinds


@pytest.mark.parametrize("holds", [False, True])
@pytest.mark.parametrize(
    ("arguments", "value"),
    [("", {}), ("  ", {}), (" \n {}", {}), ('{"a": 1}', {"a": 1}), ('{"a": {"b": "é"}}', {"a": {"b": "é"}})],
)
def test_arguments(arguments: str, value: Any, holds: bool) -> None:
    text = f"<|channel|>commentary to=functions.f <|constrain|>json<|message|>{arguments}<|call|>"
    events, blocks, _ = written(text, holds=holds)
    assert blocks[0]["input"] == value == folded_blocks(events)[0]["input"]


def test_arguments_that_are_not_json_are_kept() -> None:
    text = "<|channel|>commentary to=functions.f<|message|>{'a': 1}<|call|>"
    events, blocks, _ = written(text, holds=True)
    assert blocks[0]["input"] == {"arguments": "{'a': 1}"} == folded_blocks(events)[0]["input"]


def test_arguments_that_are_cut() -> None:
    assert read_arguments('{"a": [1, "x", "unfin', is_cut=True) == from_json(
        b'{"a": [1, "x", "unfin', allow_partial=True
    )
    assert read_arguments('{"a"', is_cut=False) == {"arguments": '{"a"'}
    assert read_arguments("[1]", is_cut=False) == {"arguments": [1]}


def test_an_answer_without_words_has_an_empty_block() -> None:
    events, blocks, _ = written("<|channel|>final<|message|><|return|>")
    assert blocks == [{"type": "text", "text": ""}] == folded_blocks(events)


@pytest.mark.parametrize(("stops", "found"), [(["x", "lo", "l"], "l"), (["z"], None), (["wor", "o"], "o")])
def test_the_stop_string_is_known(stops: list[str], found: str | None) -> None:
    _, blocks, choice = written("<|channel|>final<|message|>Hello world<|return|>", stop=stops)
    assert choice.stop_string == found
    assert blocks[0]["text"] == ("Hello world" if found is None else "Hello world".partition(found)[0])


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (InvalidRequest("No.", "tools.0.name"), 400, "invalid_request_error"),
        (Unauthorized("No."), 401, "authentication_error"),
        (RateLimited("No.", headers={"retry-after": "3"}), 429, "rate_limit_error"),
        (Unavailable("No.", code="overloaded"), 529, "overloaded_error"),
        (Unavailable("No.", code="draining"), 503, "overloaded_error"),
    ],
)
def test_errors_are_anthropics_below_v1_messages(error: Any, status: int, kind: str) -> None:
    for path in "/v1/messages", "/v1/messages/count_tokens":
        response = error_response({"path": path, "state": {"request_id": "req_1"}}, error)
        body = json.loads(response.body)
        assert response.status_code == status and body["type"] == "error" and body["request_id"] == "req_1"
        assert body["error"]["type"] == kind and set(body["error"]) == {"type", "message"}
        assert "No." in body["error"]["message"] and (error.param or "") in body["error"]["message"]
        assert all(response.headers[name] == value for name, value in error.headers.items())
    other = json.loads(error_response({"path": "/v1/messagesx"}, error).body)
    assert other == error.body


@pytest.mark.parametrize(("status", "kind"), [(500, "api_error"), (502, "api_error"), (405, "invalid_request_error")])
def test_other_statuses(status: int, kind: str) -> None:
    assert anthropic_error(status, "No.", None, None)["error"]["type"] == kind
