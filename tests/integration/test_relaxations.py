"""What is not enforced is reported by every endpoint, under the name of the field that it came in."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.support.instant_engine import served

SCHEMA = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as url:
        yield url


def completion(url: str, **more: Any) -> httpx.Response:
    body = {"model": "gpt-oss-nano", "prompt": "x", "include_relaxations": True} | more
    return httpx.post(f"{url}/v1/completions", json=body)


FIELDS = [
    ({"structured_outputs": {"json": SCHEMA}}, "structured_outputs", "structured_outputs.json"),
    ({"guided_json": SCHEMA}, "guided_json", "guided_json"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}},
        "response_format",
        "n",
    ),
]


@pytest.mark.parametrize(("more", "kind", "name"), FIELDS)
def test_completions_report_what_is_relaxed(
    url: str, more: dict[str, Any], kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        (found,) = completion(url, **more).json()["relaxations"]
    assert (found["kind"], found["name"]) == (kind, name)
    assert found["path"] == "schema.properties.a.uniqueItems"
    assert completion(url, **more, include_relaxations=False).json().keys().isdisjoint(found | {"relaxations": 1})
    said = name if kind != "response_format" else "response_format n"
    assert f"'{said}: schema.properties.a.uniqueItems" in caplog.text


def test_a_stream_of_completions_reports_it_in_its_last_chunk(url: str) -> None:
    answer = completion(url, guided_json=SCHEMA, stream=True, n=2, temperature=1)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    assert [len(chunk.get("relaxations", [])) for chunk in chunks] == [0] * (len(chunks) - 1) + [1]


def test_an_empty_list_says_that_everything_is_enforced(url: str) -> None:
    assert completion(url).json()["relaxations"] == []


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(foo", "unclosed group"),
        ("(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        ("x{,3}", "repetition quantifier expects a valid decimal"),
        (r"\cA", "unrecognized escape sequence"),
        (r"(a)\1", "backreferences are not supported"),
        ("a)/", "unopened group"),
        ("[a", "unclosed character class"),
        (r"a\bc", r"lookarounds not supported yet; WordUnicode in regex /a\bc/"),
        ("a\\", "the pattern ends within an escape"),
    ],
)
def test_a_pattern_is_refused_with_its_own_fault(url: str, pattern: str, reason: str) -> None:
    for field, value in (("guided_regex", pattern), ("structured_outputs", {"regex": pattern})):
        answer = completion(url, **{field: value})
        named = field if field == "guided_regex" else "structured_outputs.regex"
        assert answer.status_code == 400
        assert answer.json()["error"]["message"] == f"'{named}' cannot be enforced: {reason}."
