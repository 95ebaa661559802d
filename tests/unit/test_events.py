from __future__ import annotations

import json

import pytest

from src.api.streaming import encode_event


@pytest.mark.parametrize(
    "text", ["a\x85b", "a\u2028b\u2029c", "a\x0bb\x0cc\x1cd\r\ne", "é🙂\u2028"]
)
def test_an_event_is_one_line_by_any_reading(text: str) -> None:
    encoded = encode_event({"content": text}).decode()
    assert len(encoded.splitlines()) == 1
    assert json.loads(encoded) == {"content": text}
