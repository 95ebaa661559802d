"""Bodies of a million small things are refused at the first problem, not at the last."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.completions.adapter import read_prompts
from gptoss.api.http.errors import InvalidRequest
from gptoss.api.http.fields import VOCAB_SIZE
from gptoss.api.ops.tokenize import DetokenizeRequest
from gptoss.api.responses.input.items import num_rendered
from gptoss.api.responses.schema import ResponsesRequest

HI = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("model", "body"),
    [
        (ChatCompletionRequest, {"messages": [1] * 9}),
        (ChatCompletionRequest, {"messages": [{"role": "assistant", "tool_calls": [1] * 9}]}),
        (ChatCompletionRequest, {"messages": HI, "modalities": [1] * 9}),
        (ResponsesRequest, {"input": "hi", "include": [1] * 9}),
        (DetokenizeRequest, {"tokens": ["a"] * 9}),
    ],
    ids=["messages", "tool calls", "modalities", "include", "tokens"],
)
def test_of_many_problems_the_first_is_reported(model: type[BaseModel], body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as raised:
        model.model_validate({"model": "m", **body})
    assert raised.value.error_count() == 1


@pytest.mark.parametrize("field", ["metadata", "logit_bias"])
def test_too_many_entries_are_refused_before_they_are_read(field: str) -> None:
    limit = {"metadata": 16, "logit_bias": VOCAB_SIZE}[field]
    wrong = {str(i): None for i in range(limit + 1)}
    with pytest.raises(ValidationError) as raised:
        ChatCompletionRequest.model_validate({"model": "m", "messages": HI, field: wrong})
    (error,) = raised.value.errors()
    assert error["type"] == "too_long" and error["loc"] == (field,)


def test_items_that_are_none_count_like_messages() -> None:
    assert num_rendered([[], {}, 1, {"role": "user"}, {"type": "function_call"}]) == 5
    assert num_rendered([{"type": "reasoning"}, {"role": "system"}]) == 0


def test_too_many_prompts_are_refused_before_they_are_encoded() -> None:
    assert len(read_prompts(["a"] * 128)) == 128
    for many in (["a"] * 129, [[1]] * 129):
        with pytest.raises(InvalidRequest, match="More than 128 completions"):
            read_prompts(many)
    assert read_prompts([1] * 129) == [[1] * 129]
