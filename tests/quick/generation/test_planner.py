"""A neutral request to what the engine is asked to do, without an app."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gptoss.config.profiles import PROFILES
from gptoss.generation.errors import ContextTooLongError, GenerationError
from gptoss.generation.planner import PlanLimits, Planner, check_num_messages, check_token_ids
from gptoss.generation.request import (
    FunctionTool,
    GenerationRequest,
    OutputFormat,
    SamplingOptions,
    TextPrompts,
    ToolPolicy,
)
from gptoss.harmony.bpe import EncodingStoppedError
from gptoss.harmony.conversation import Conversation, ToolResult, UserMessage
from gptoss.prompt_builder import PromptBuilder
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
PROFILE = PROFILES["balanced"]
LIMITS = PlanLimits(max_model_len=2000, repetition_guard=8)
HELLO = Conversation((UserMessage("Hello"),))
FIND = FunctionTool("find", "Finds.", {"type": "object", "properties": {"what": {"type": "string"}}})
CITY = OutputFormat("json", {"type": "object"}, "text.format.schema", ("response_format", "city"), "city")


def planner(**limits: Any) -> Planner:
    return Planner(replace(LIMITS, **limits), VOCABULARY, PromptBuilder(VOCABULARY, current_date="2026-01-01"))


def asked(prompt: Conversation | TextPrompts = HELLO, **more: Any) -> GenerationRequest:
    return GenerationRequest(request_id="r", prompt=prompt, profile=PROFILE, **more)


def path_of(request: GenerationRequest, **limits: Any) -> Any:
    with pytest.raises(GenerationError) as error:
        planner(**limits).plan(request)
    return error.value.path


def test_a_conversation_becomes_one_engine_request_for_each_choice() -> None:
    sampling = SamplingOptions(seed=5, temperature=1e-9, logprobs=2)
    plan = planner().plan(asked(num_choices=2, sampling=sampling, tenant="t", cache_scope="s", cache_salt="x"))
    first, second = plan.requests
    assert (first.request_id, second.request_id) == ("r-0", "r-1")
    assert first.token_ids == second.token_ids == plan.prompts[0]
    assert first.params.seed == 5 != second.params.seed
    assert (first.params.temperature, first.params.logprobs, first.params.grammar is not None) == (0.0, 2, True)
    assert (first.tenant, first.cache_salt, first.priority) == ("t", "sx", PROFILE.priority)
    assert first.params.max_tokens == 2000 - len(first.token_ids) and not plan.has_max_tokens
    assert first.params.loop_guard is not None and first.params.loop_guard.repeats == 8


def test_min_tokens_and_free_text_have_no_guard() -> None:
    for request, limits in (
        (asked(sampling=SamplingOptions(min_tokens=3)), {}),
        (asked(), {"guided_harmony": False}),
        (asked(sampling=SamplingOptions(ignore_eos=True)), {}),
    ):
        assert planner(**limits).plan(request).params.loop_guard is None


def test_tools_and_formats_are_shown_and_enforced() -> None:
    plan = planner().plan(asked(tools=ToolPolicy([FIND], "required", max_calls=1), output_format=CITY))
    text = VOCABULARY.decode(plan.prompts[0])
    assert "type find = " in text and "# Response Formats" in text
    assert (plan.tool_names, plan.max_calls, plan.relaxed) == (["find"], 1, [])
    assert "max_tokens=" in (plan.params.grammar or "")  # the reasoning leaves room for the call
    hidden = planner().plan(asked(tools=ToolPolicy([FIND], "none")))
    assert "find" not in VOCABULARY.decode(hidden.prompts[0]) and not hidden.tool_names


def test_texts_are_continued_each_by_itself() -> None:
    prompts = TextPrompts(["a<|end|>", [1, 2, 3]], echo=True)
    plan = planner().plan(asked(prompts, num_choices=2, max_tokens=0, sampling=SamplingOptions(logprobs=0)))
    assert plan.prompts == [VOCABULARY.encode_with_special("a<|end|>"), [1, 2, 3]]
    assert [request.request_id for request in plan.requests] == ["r-0", "r-1", "r-2", "r-3"]
    assert {request.params.max_tokens for request in plan.requests} == {1}
    assert plan.is_silent and plan.echo and plan.params.prompt_logprobs == 0
    assert plan.params.grammar is None and plan.prompt is None


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"tools": ToolPolicy([FIND, FIND])}, ("tools", 1, "name")),
        ({"tools": ToolPolicy([FIND], allowed=["lose"])}, ("tool_choice",)),
        ({"tools": ToolPolicy(mode="required")}, ("tool_choice",)),
        ({"tools": ToolPolicy([FunctionTool("f", None, {"type": "banana"})])}, ("tools", 0, "parameters")),
        ({"output_format": replace(CITY, value={"type": "banana"})}, ("output_format", "text.format.schema")),
        ({"output_format": OutputFormat("regex", "a(", "regex", ("regex", "regex"))}, ("output_format", "regex")),
        ({"max_tokens": 3, "sampling": SamplingOptions(min_tokens=4)}, ("sampling", "min_tokens")),
        ({"prompt": TextPrompts([[201_088]])}, ("prompt",)),
        ({"prompt": TextPrompts([""])}, ("prompt",)),
        (
            {"prompt": Conversation((ToolResult("x", "c", origin="messages[0]"),))},
            ("prompt", "messages[0]", "call_id"),
        ),
    ],
)
def test_errors_name_the_part_at_fault(more: dict[str, Any], path: Any) -> None:
    assert path_of(asked(**more)) == path


def test_a_prompt_that_is_too_long_is_counted_on_demand() -> None:
    long = asked(Conversation((UserMessage("x " * 3000),)))
    with pytest.raises(ContextTooLongError) as error:
        planner().plan(long)
    assert (error.value.path, error.value.code, error.value.num_tokens) == (
        ("prompt",),
        "context_length_exceeded",
        None,
    )
    with pytest.raises(ContextTooLongError) as error:
        planner().plan(long, counts_all=True)
    assert error.value.num_tokens is not None and error.value.num_tokens > 3000
    with pytest.raises(ContextTooLongError):
        planner().plan(asked(TextPrompts([[1] * 2000])))
    check_num_messages(500, LIMITS)
    with pytest.raises(ContextTooLongError):
        check_num_messages(501, LIMITS)


def test_planning_stops_when_its_client_has_gone() -> None:
    with pytest.raises(EncodingStoppedError):
        planner().plan(asked(Conversation((UserMessage("x " * 100_000),))), lambda: True, counts_all=True)


def test_token_ids_have_bounds() -> None:
    check_token_ids([0, 201_087], ("tokens",))
    for wrong in (-1, 201_088):
        with pytest.raises(GenerationError, match="between 0 and 201087") as error:
            check_token_ids([wrong], ("tokens",))
        assert error.value.path == ("tokens",)
