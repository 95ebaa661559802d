"""What the model wrote comes back from clients: the next prompt goes on with the ids that were generated.

Turns as the grammar lets the model write them, any reasoning and preambles before each call, through every form in
which a client may send them back.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from gptoss.api.chat.messages import read_messages
from gptoss.api.chat.output import fold, write_delta
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.messages.conversation import read_conversation
from gptoss.api.messages.output import MessageContent
from gptoss.api.messages.schema.request import CountTokensRequest
from gptoss.api.responses.adapter import read_request
from gptoss.api.responses.input.items import placed_items
from gptoss.api.responses.output import OutputItems
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.api.responses.store import ResponseStore, resolve
from gptoss.api.responses.tools.calls import CallKind
from gptoss.engine.core.grammar_matcher import GuidedDecoding
from gptoss.engine.messages import FinishReason, TokenOutput
from gptoss.generation.chat_output import ChatChoice
from gptoss.harmony.conversation import Conversation
from gptoss.harmony.grammar import ToolSpec, TurnSpec, turn_grammar
from gptoss.harmony.layout import messages_before, new_call_id
from gptoss.harmony.parser import ResponseParser
from gptoss.harmony.render import HarmonyMessage, render_message, tool_result
from gptoss.harmony.special_tokens import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    RETURN,
    START,
)
from gptoss.prompt_builder import PromptBuilder
from tests.support.tokenizer import public_tokenizer
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
SINGLE = {bytes([b]): VOCABULARY.token_bytes.index(bytes([b])) for b in range(256)}
ASSISTANT = [START, *VOCABULARY.encode("assistant")]
USER = {"role": "user", "content": "Hi"}
SPEC = TurnSpec([ToolSpec("f", None, False), ToolSpec("g", None, False, text_rule="TEXT")])


@dataclass(frozen=True)
class Message:
    channel: str
    text: str
    canonical: bool  # else a token for each byte

    def ids(self, *, canonical: bool | None = None, is_last: bool = False) -> list[int]:
        """After `<|start|>assistant`, with its end."""
        encode = VOCABULARY.encode
        if self.channel == "custom":
            header, end = encode("commentary to=functions.g"), CALL
        elif self.channel == "call":
            header = [*encode("commentary to=functions.f "), CONSTRAIN, *encode("json")]
            end = CALL
        else:
            header, end = encode(self.channel), RETURN if is_last else END
        as_usual = self.canonical if canonical is None else canonical
        body = encode(self.text) if as_usual else [SINGLE[bytes([b])] for b in self.text.encode()]
        return [CHANNEL, *header, MESSAGE, *body, end]


def generated(step: Sequence[Message]) -> list[int]:
    out: list[int] = []
    for message in step:
        out += (ASSISTANT if out else []) + message.ids(is_last=message is step[-1])
    return out


def choice_of(ids: list[int], *, joins: bool) -> tuple[ChatChoice, list[Any]]:
    parser = ResponseParser(VOCABULARY, ["f", "g"], ["g"])
    choice = ChatChoice(0, parser, [], None, joins_messages=joins, custom_names=["g"])
    return choice, choice.feed(TokenOutput("r", ids, finish_reason=FinishReason.STOP))


class Chat:
    """Messages of the chat endpoint, sent back whole."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = [USER]

    def answered(self, ids: list[int]) -> None:
        choice, deltas = choice_of(ids, joins=True)
        message: dict[str, Any] = {"role": "assistant"}
        for item in deltas:
            fold(message, write_delta(choice, item.delta, ("reasoning_content",)))
        self.messages.append(message)

    def told(self, text: str) -> None:
        call_id = self.messages[-1]["tool_calls"][0]["id"]
        self.messages.append({"role": "tool", "tool_call_id": call_id, "content": text})

    def asked(self) -> None:
        self.messages.append(USER)

    def conversation(self) -> Conversation:
        return read_messages(ChatCompletionRequest.model_validate({"model": "m", "messages": self.messages}).messages)


def kind_of(name: str) -> CallKind:
    return "custom" if name == "g" else "function"


def result_of(call: dict[str, Any], text: str) -> dict[str, Any]:
    return {"type": f"{call['type']}_output", "call_id": call["call_id"], "output": text}


class Items:
    """Items of the Responses endpoint, sent back whole."""

    sealed = False

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = [USER]

    def answered(self, ids: list[int]) -> None:
        self.items += self._output(ids)

    def _output(self, ids: list[int]) -> list[dict[str, Any]]:
        output = OutputItems(lambda name: {"name": name}, kind_of, encodes_reasoning=self.sealed)
        for item in choice_of(ids, joins=False)[1]:
            output.feed(item)
        output.close("completed")
        return output.items

    def told(self, text: str) -> None:
        self.items.append(result_of(self.items[-1], text))

    def asked(self) -> None:
        self.items.append(USER)

    def conversation(self) -> Conversation:
        request = ResponsesRequest.model_validate({"model": "m", "input": self.items})
        return read_request(request, placed_items(request.input)).conversation()


class Sealed(Items):
    """As Codex: the content of reasoning is dropped."""

    sealed = True

    def answered(self, ids: list[int]) -> None:
        for item in self._output(ids):
            self.items.append(item | {"content": None} if item["type"] == "reasoning" else item)


class Stored(Items):
    """Only what is new is sent, with `previous_response_id`."""

    def __init__(self) -> None:
        super().__init__()
        self.store, self.previous = ResponseStore(10**6), None

    def answered(self, ids: list[int]) -> None:
        response: dict[str, Any] = {"id": f"resp_{len(self.store)}", "output": self._output(ids)}
        assert self.store.add("me", response, self.items, previous=self.previous)
        self.previous, self.call, self.items = response["id"], response["output"][-1], []

    def told(self, text: str) -> None:
        self.items = [result_of(self.call, text)]

    def conversation(self) -> Conversation:
        body = {"model": "m", "input": self.items, "previous_response_id": self.previous}
        request = ResponsesRequest.model_validate(body)
        return read_request(request, resolve(request, self.store, "me").items).conversation()


class Blocks:
    """Messages of Anthropic's endpoint, sent back whole; the client has parsed the arguments of calls."""

    hides = False

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = [USER]

    def answered(self, ids: list[int]) -> None:
        content = MessageContent(hides_thinking=self.hides, holds_arguments=False)
        for item in choice_of(ids, joins=False)[1]:
            content.feed(item)
        content.close()
        self.messages.append({"role": "assistant", "content": json.loads(json.dumps(content.blocks))})

    def told(self, text: str) -> None:
        call_id = self.messages[-1]["content"][-1]["id"]
        result = {"type": "tool_result", "tool_use_id": call_id, "content": text, "is_error": False}
        self.messages.append({"role": "user", "content": [result]})

    def asked(self) -> None:
        self.messages.append(USER)

    def conversation(self) -> Conversation:
        request = CountTokensRequest.model_validate({"model": "m", "messages": self.messages})
        return read_conversation(request)[0]


class HiddenThinking(Blocks):
    """With `display: omitted`: thinking comes as its signature."""

    hides = True


TEXTS = st.text(st.sampled_from('ab \né🌦{}"<|'), max_size=8)
BEFORE = st.lists(st.builds(Message, st.sampled_from(["analysis", "commentary"]), TEXTS, st.booleans()), max_size=5)
OBJECTS = ["{}", '{"a":1}', '{"é":"🌦"}']
LOOSE = [*OBJECTS, '{"a": 1}', '{\n  "b": [1.0, 2e3],\n  "a": "\\u00e9\\/"\n}', '{"10":1, "a":{}, "9": 0.10}']
CALLS = st.builds(Message, st.just("call"), st.sampled_from(["{}", '{"a": 1}', " x", '{"é":"🌦"}']), st.booleans())
CUSTOM = st.builds(Message, st.just("custom"), st.sampled_from(["", "{}", " x", '*** "é"\n+🌦\n']), st.booleans())
FINALS = st.builds(Message, st.just("final"), TEXTS, st.booleans())


def _steps(arguments: list[str], *others: st.SearchStrategy[Message]) -> st.SearchStrategy[list[list[Message]]]:
    calls = st.one_of(st.builds(Message, st.just("call"), st.sampled_from(arguments), st.booleans()), *others)
    return st.lists(st.tuples(BEFORE, calls).map(lambda pair: [*pair[0], pair[1]]), min_size=1, max_size=3)


STEPS = _steps(["{}", '{"a": 1}', " x", '{"é":"🌦"}'], CUSTOM)


@pytest.mark.parametrize("replays", [True, False])
@pytest.mark.parametrize("client", [Chat, Items, Sealed, Stored, Blocks, HiddenThinking])
def test_a_turn_comes_back_as_it_was_written(client: type[Any], replays: bool) -> None:
    builder = PromptBuilder(VOCABULARY, replay_generated_ids=replays)  # for all turns
    parses = issubclass(client, Blocks)  # so the text of the arguments is lost, but for what is remembered
    steps_of = STEPS if not parses else _steps(LOOSE if replays else OBJECTS)

    @settings(max_examples=60, deadline=None, database=None)
    @given(steps_of, BEFORE, FINALS)
    def check(steps: list[list[Message]], before: list[Message], final: Message) -> None:
        history = client()
        prompt = builder.build(history.conversation())
        wanted, kept = prompt.token_ids, prompt.token_ids[: -len(ASSISTANT)]
        if client is Chat:  # joins preamble and final, and has no empty final
            before = [message for message in before if message.channel == "analysis"]
            final = Message("final", final.text + ".", final.canonical)
        for step in (*steps, [*before, final]):
            ids = generated(step)
            history.answered(ids)
            builder.remember(ids, after=prompt)
            for message in step:
                again = [*ASSISTANT, *message.ids(canonical=None if replays else True)]
                wanted = wanted[: -len(ASSISTANT)] if message is step[0] else wanted
                wanted += again
                kept += again if message.channel != "analysis" else []
            if message is final:
                break
            result = render_message(tool_result("g" if step[-1].channel == "custom" else "f", "R"), VOCABULARY)
            history.told("R")
            prompt = builder.build(history.conversation())
            wanted += [*result, *ASSISTANT]
            kept += result
            assert prompt.token_ids == wanted
        history.asked()
        kept += [*render_message(HarmonyMessage("user", "Hi"), VOCABULARY), *ASSISTANT]
        assert builder.build(history.conversation()).token_ids == kept

    if client is Stored:
        Stored.asked = lambda self: setattr(self, "items", [USER])  # type: ignore[method-assign]
    check()


def test_no_text_of_a_custom_tool_is_another_than_braces() -> None:
    builder, history = PromptBuilder(VOCABULARY, replay_generated_ids=True), Items()
    prompt = builder.build(history.conversation())
    for text in ("", "{}"):
        builder.remember(generated([Message("custom", text, False)]), after=prompt)
    nothing = Message("custom", "", True)
    history.answered(generated([nothing]))
    history.told("R")
    wanted = [*prompt.token_ids, *nothing.ids(), *render_message(tool_result("g", "R"), VOCABULARY), *ASSISTANT]
    assert builder.build(history.conversation()).token_ids == wanted


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return public_tokenizer()


def test_the_grammar_lets_the_model_write_these_turns(tokenizer: LLTokenizer) -> None:
    guided = GuidedDecoding(tokenizer)

    @settings(max_examples=30, deadline=None, database=None)
    @given(BEFORE, CALLS | CUSTOM | FINALS)
    def check(before: list[Message], last: Message) -> None:
        guided.add("r", turn_grammar(SPEC, VOCABULARY))
        ids = generated([*before, last])
        assert guided.allowed("r", ids)[: len(ids) - 1] == ids[:-1]  # a token that ends the turn is not counted
        for token in ids:
            guided.advance("r", token)  # raises for what is not allowed
        assert guided.error_of("r") is None
        guided.remove("r")

    check()


@pytest.mark.parametrize(
    ("before", "suffix"),
    [
        ([], ""),
        ([("analysis", 5)], ""),
        ([("commentary", 5)], ""),
        ([("analysis", 5), ("commentary", 1)], ""),
        ([("commentary", 1), ("analysis", 5)], "_P1A5"),
        ([("analysis", 0)], "_A0"),
        ([("analysis", 36), ("analysis", 35)], "_A10Az"),
    ],
)
def test_the_id_of_a_call_tells_what_a_chat_message_does_not(before: list[tuple[str, int]], suffix: str) -> None:
    call_id = new_call_id(before)
    assert call_id[29:] == suffix and len({new_call_id(before) for _ in range(9)}) == 9
    rng = random.Random(7)
    texts = [(channel, "".join(rng.choices("a\n", k=size))) for channel, size in before]
    reasoning, words = (
        "\n".join(text for channel, text in texts if channel == wanted and text)
        for wanted in ("analysis", "commentary")
    )
    parted = messages_before(call_id, reasoning, words)
    assert (parted and [(message.channel, message.text) for message in parted]) == (texts if suffix else None)
    if suffix:  # what the client changed is not parted
        assert messages_before(call_id, reasoning + "x", words) is None
        assert messages_before(call_id, reasoning, words + "\n") is None
