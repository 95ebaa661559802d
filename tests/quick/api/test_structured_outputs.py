"""Formats of the answer's text, by whichever field they are asked for."""

from __future__ import annotations

import json
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import ValidationError

from gptoss.api.chat.adapter import field_name as chat_field
from gptoss.api.chat.schema import ChatCompletionRequest
from gptoss.api.completions.adapter import field_name as completions_field
from gptoss.api.completions.schema import CompletionRequest
from gptoss.api.http.errors import InvalidRequest, field_names
from gptoss.api.http.output_format import output_format
from gptoss.api.responses.adapter import field_name as responses_field
from gptoss.api.responses.adapter import read_format
from gptoss.api.responses.schema import ResponsesRequest
from gptoss.generation.format_plan import FREE_TEXT, FormatPlan, plan_format
from gptoss.harmony.grammar import choice_rule, grammar_error, pattern_rule, text_grammar
from gptoss.harmony.special_tokens import RETURN
from tests.support.tokenizer import public_tokenizer
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
SCHEMA = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}}, "required": ["city"]}
USER = {"role": "user", "content": "x"}


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return public_tokenizer()


def accepts(tokenizer: LLTokenizer, rule: str, text: str) -> bool:
    assert grammar_error(text_grammar(rule)) is None
    matcher = LLMatcher(tokenizer, LLMatcher.grammar_from_lark(text_grammar(rule)))
    return all(matcher.consume_token(token) for token in [*VOCABULARY.encode(text), RETURN])


@pytest.mark.parametrize(
    ("pattern", "right", "wrong"),
    [
        ("a+b", ["ab", "aaab"], ["b", "abc", "xab"]),
        ("^a+$", ["a", "aa"], ["b", "ab"]),
        ("(yes|no)", ["yes", "no"], ["maybe", "yesno"]),
        (r"https?://\w+/x", ["http://a/x", "https://ab/x"], ["http:a/x"]),
        (r"a\/b", ["a/b"], ["ab", r"a\/b"]),
        ("[/&&[~]+", ["/&[~", "&"], ["a"]),
        (r"[\]a]", ["]", "a"], ["\\", "b"]),
        ("[]a]+", ["]a"], ["b"]),
        ("[^]a]", ["b"], ["]", "a"]),
        ("a\nb", ["a\nb"], ["a b"]),
        ("a\\\nb", ["a\nb"], ["a\\nb"]),
        (r"\d{3}-\d{4}", ["555-1234"], ["5555-123"]),
        ("日本|é", ["日本", "é"], ["日"]),
    ],
)
def test_a_pattern_is_matched_by_the_whole_text(
    tokenizer: LLTokenizer, pattern: str, right: list[str], wrong: list[str]
) -> None:
    rule = pattern_rule(pattern)
    assert [text for text in right if not accepts(tokenizer, rule, text)] == []
    assert [text for text in wrong if accepts(tokenizer, rule, text)] == []


CHOICES = ["yes", "no way", 'q"uote\\', "line\nbreak", "日本🙂", "a/b", "yes indeed"]


def test_a_choice_is_one_of_them(tokenizer: LLTokenizer) -> None:
    rule = choice_rule(CHOICES)
    assert all(accepts(tokenizer, rule, choice) for choice in CHOICES)
    assert not any(accepts(tokenizer, rule, text) for text in ("", "ye", "yes no way", "YES"))


def chat(**more: Any) -> FormatPlan:
    body = {"model": "m", "messages": [USER]} | more
    request = ChatCompletionRequest.model_validate(body)
    own = request.response_format.output_format if request.response_format is not None else None
    with field_names(chat_field):
        return plan_format(output_format(request, own))


def responses(**more: Any) -> FormatPlan:
    request = ResponsesRequest.model_validate({"model": "m", "input": "x"} | more)
    with field_names(responses_field):
        return plan_format(read_format(request))


def completions(**more: Any) -> FormatPlan:
    request = CompletionRequest.model_validate({"model": "m", "prompt": "x"} | more)
    own = request.response_format.output_format if request.response_format is not None else None
    with field_names(completions_field):
        return plan_format(output_format(request, own))


ENDPOINTS = pytest.mark.parametrize("read", [chat, responses, completions])


@ENDPOINTS
@pytest.mark.parametrize("wanted", [SCHEMA, json.dumps(SCHEMA)], ids=["object", "text"])
def test_a_schema_is_enforced_and_shown(read: Any, wanted: Any) -> None:
    for body in (
        {"guided_json": wanted},
        {"structured_outputs": {"json": wanted}},
        {"json_schema": wanted, "grammar": ""},
    ):
        found = read(**body)
        assert found.schema["properties"] == SCHEMA["properties"]
        assert found.shown.schema == SCHEMA


@ENDPOINTS
def test_patterns_choices_and_any_object(read: Any) -> None:
    for body in ({"guided_regex": "a+"}, {"structured_outputs": {"regex": "a+"}}):
        assert read(**body).rule == pattern_rule("a+") and read(**body).shown is None
    for body in ({"guided_choice": ["a", "b"]}, {"structured_outputs": {"choice": ["a", "b"]}}):
        assert read(**body).rule == choice_rule(["a", "b"])
    found = read(structured_outputs={"json_object": True, "regex": None})
    assert found.schema == {"type": "object"}
    assert read() is FREE_TEXT and read(guided_json=None, structured_outputs=None) is FREE_TEXT


@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
def test_a_schema_of_llama_cpps_form_is_enforced(kind: str) -> None:
    for read in (chat, completions):
        found = read(response_format={"type": kind, "schema": SCHEMA})
        assert found.schema is not None
        assert found.schema["properties"] == SCHEMA["properties"]
    found = responses(text={"format": {"type": "json_object", "schema": SCHEMA}})
    assert found.shown is not None and found.shown.schema == SCHEMA


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"guided_grammar": "root ::= 'a'"}, "guided_grammar"),
    ({"grammar": "root ::= 'a'"}, "grammar"),
    ({"json_schema": "{"}, "json_schema"),
    ({"json_schema": {"type": "banana"}}, "json_schema"),
    ({"json_schema": SCHEMA, "guided_regex": "a"}, "json_schema"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern"),
    ({"structural_tag": "{}"}, "structural_tag"),
    ({"structured_outputs": {"grammar": "x"}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        "structured_outputs.disable_any_whitespace",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex"),
    ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": [1]}, "guided_json"),
    ({"guided_json": {"type": "banana"}}, "guided_json"),
    ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json"),
    ({"guided_regex": "a("}, "guided_regex"),
    ({"guided_regex": r"(?=a)b"}, "guided_regex"),
    ({"structured_outputs": {"regex": r"(a)\1"}}, "structured_outputs.regex"),
    ({"guided_choice": ["a"], "ignore_eos": True}, "guided_choice"),
]


@ENDPOINTS
@pytest.mark.parametrize(("body", "param"), WRONG)
def test_what_cannot_be_honoured_names_its_field(read: Any, body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as error:
        read(**body)
    assert error.value.param == param and f"'{param}'" in error.value.message


@ENDPOINTS
@pytest.mark.parametrize(
    "body",
    [{"guided_choice": []}, {"guided_choice": [1]}, {"guided_regex": 1}, {"structured_outputs": {"choice": "a"}}],
)
def test_values_of_the_wrong_type_are_refused(read: Any, body: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        read(**body)


@pytest.mark.parametrize(
    "wanted",
    [
        {"type": "text", "schema": SCHEMA},
        {"type": "json_schema", "schema": SCHEMA, "json_schema": {"name": "n", "schema": SCHEMA}},
        {"type": "json_schema"},
    ],
)
def test_a_schema_in_the_wrong_place_is_refused(wanted: dict[str, Any]) -> None:
    for read in (chat, completions):
        with pytest.raises(ValidationError):
            read(response_format=wanted)


def test_two_formats_at_once_are_refused() -> None:
    for read in (chat, completions):
        with pytest.raises(InvalidRequest) as error:
            read(response_format={"type": "json_object"}, guided_regex="a")
        assert error.value.param == "guided_regex"
    with pytest.raises(InvalidRequest) as error:
        responses(text={"format": {"type": "json_object"}}, guided_choice=["a"])
    assert error.value.param == "guided_choice"
