"""Answers that begin elsewhere than after `<|start|>assistant`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer

from gptoss.api.chat.messages import read_messages, read_prefill
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.http.errors import InvalidRequest
from gptoss.config.profiles import PROFILES
from gptoss.generation.chat_output import start_parser
from gptoss.generation.planner import PlanLimits, Planner
from gptoss.generation.request import GenerationRequest
from gptoss.harmony.deltas import ParsedMessage
from gptoss.harmony.grammar import ToolSpec, TurnSpec, choice_rule, pattern_rule, turn_grammar
from gptoss.harmony.parser import ResponseParser
from gptoss.harmony.special_tokens import (
    CHANNEL,
    END,
    MESSAGE,
    RETURN,
    START,
)
from gptoss.prompt_builder import PromptBuilder
from tests.support.tokenizer import public_tokenizer
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
encode = VOCABULARY.encode
USER = {"role": "user", "content": "Tell me."}
BEGUN: dict[str, Any] = {"role": "assistant", "content": "The answer is"}


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return public_tokenizer()


def request(*messages: dict[str, Any], **more: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": [USER, *messages], **more})


def prompt(*messages: dict[str, Any], **more: Any) -> str:
    sent = request(*messages, **more)
    prefill = read_prefill(sent, constrained=False)
    asked = GenerationRequest(
        request_id="r",
        prompt=read_messages(sent.messages if prefill is None else sent.messages[:-1]),
        profile=PROFILES["balanced"],
        prefill=prefill,
        opens_turn=sent.add_generation_prompt is False,
    )
    plan = Planner(PlanLimits(4096), VOCABULARY, PromptBuilder(VOCABULARY)).plan(asked)
    return VOCABULARY.decode(plan.prompts[0])


def test_a_final_message_is_continued_where_it_ends() -> None:
    asked = "<|start|>user<|message|>Tell me.<|end|><|start|>assistant"
    more = {"continue_final_message": True}
    final = "<|channel|>final<|message|>The answer is"
    assert prompt(BEGUN, **more).endswith(asked + final)
    assert prompt(BEGUN, add_generation_prompt=False, **more).endswith(asked + final)
    parts = BEGUN | {"content": [{"type": "text", "text": "The answer is"}]}
    assert prompt(parts, **more).endswith(asked + final)
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    assert prompt(BEGUN | {"reasoning_content": "Hm."}, **more).endswith(asked + thought + final)
    assert prompt(BEGUN | {"reasoning_content": ["Hm.", "Hm."]}, **more).endswith(asked + 2 * thought + final)
    assert prompt(BEGUN | {"content": "<|end|>"}, **more).endswith("<|message|><|end|>")
    assert prompt(BEGUN).endswith("<|end|><|start|>assistant")


def test_without_a_generation_prompt_it_ends_with_the_last_message() -> None:
    assert prompt(add_generation_prompt=False).endswith("Tell me.<|end|>")
    assert prompt(BEGUN, add_generation_prompt=False).endswith("The answer is<|end|>")
    assert prompt(add_generation_prompt=True).endswith("<|end|><|start|>assistant")


CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("messages", "more", "constrained"),
    [
        ([], {}, False),
        ([BEGUN | {"content": ""}], {}, False),
        ([{"role": "assistant", "tool_calls": [CALL]}], {}, False),
        ([BEGUN | {"tool_calls": [CALL]}], {}, False),
        ([BEGUN], {"add_generation_prompt": True}, False),
        ([BEGUN], {}, True),
    ],
)
def test_what_cannot_be_continued_names_the_field(
    messages: list[dict[str, Any]], more: dict[str, Any], constrained: bool
) -> None:
    with pytest.raises(InvalidRequest) as error:
        read_prefill(request(*messages, continue_final_message=True, **more), constrained=constrained)
    assert error.value.param == "continue_final_message"


def parsed(where: Any, ids: list[int]) -> tuple[ParsedMessage, Counter[str]]:
    parser = start_parser(ResponseParser(VOCABULARY), where)
    message = ParsedMessage.fold(d for i in ids for d in parser.push(i))
    for delta in parser.finish():
        message.add(delta)
    return message, parser.recoveries


def test_answers_are_read_from_where_they_begin() -> None:
    message, recoveries = parsed("final", [*encode(" 42."), RETURN])
    assert (message.content, message.reasoning, recoveries) == (" 42.", None, Counter())
    final = [CHANNEL, *encode("final"), MESSAGE, *encode("42"), RETURN]
    message, recoveries = parsed("turn", [START, *encode("assistant"), *final])
    assert (message.content, recoveries) == ("42", Counter())
    assert parsed("message", final)[0].content == "42"


def allowed(tokenizer: LLTokenizer, spec: TurnSpec, ids: list[int]) -> bool:
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(turn_grammar(spec, VOCABULARY)))
    return all(matcher.consume_token(token) for token in ids)


FINAL = [CHANNEL, *encode("final"), MESSAGE]
PREAMBLE = [CHANNEL, *encode("commentary"), MESSAGE, *encode("x"), END, START, *encode("assistant")]


def test_a_turn_may_have_to_be_opened(tokenizer: LLTokenizer) -> None:
    spec = TurnSpec(is_opened=False)
    opening = [START, *encode("assistant")]
    assert allowed(tokenizer, spec, [*opening, *FINAL, *encode("x"), RETURN])
    assert not allowed(tokenizer, spec, [*FINAL, *encode("x"), RETURN])
    assert not allowed(tokenizer, TurnSpec(), [*opening, *FINAL])


@pytest.mark.parametrize("tools", [[], [ToolSpec("f", None, True)]], ids=["alone", "tools"])
@pytest.mark.parametrize("rule", [choice_rule(["yes", "no"]), pattern_rule("yes|no")])
def test_a_final_of_a_rule_has_no_other_text(tokenizer: LLTokenizer, tools: list[ToolSpec], rule: str) -> None:
    spec = TurnSpec(tools, final_rule=rule)
    analysis = [CHANNEL, *encode("analysis"), MESSAGE, *encode("x"), END, START, *encode("assistant")]
    assert allowed(tokenizer, spec, [*analysis, *FINAL, *encode("yes"), RETURN])
    assert not allowed(tokenizer, spec, [*FINAL, *encode("maybe")])
    assert not allowed(tokenizer, spec, [*FINAL, *encode("yes"), *encode(" no")])
    assert not allowed(tokenizer, spec, [*PREAMBLE, *FINAL])
    assert allowed(tokenizer, TurnSpec(tools), [*PREAMBLE, *FINAL]) == bool(tools)
