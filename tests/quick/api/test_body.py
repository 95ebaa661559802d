"""Reading a request's body."""

from __future__ import annotations

import gc
import json

import pytest

from gptoss.api.http import body, large_json
from gptoss.api.http.body import parse_json_object
from gptoss.api.http.errors import BodyTooLarge, InvalidRequest
from gptoss.harmony.bpe import EncodingStoppedError


def test_many_lists_are_read_without_walking_them_again_and_again() -> None:
    phases: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        phases.append(phase)

    gc.collect()
    gc.callbacks.append(note)
    try:
        made = parse_json_object(b'{"lists": [' + b"[1]," * 50_000 + b"[]]}")
    finally:
        gc.callbacks.remove(note)
    assert len(made["lists"]) == 50_001
    assert phases.count("start") <= 2


@pytest.mark.parametrize("collects", [True, False])
def test_the_collector_is_left_as_it_was(collects: bool) -> None:
    was = gc.isenabled()
    (gc.enable if collects else gc.disable)()
    try:
        parse_json_object(b"{}")
        assert gc.isenabled() is collects
        with pytest.raises(InvalidRequest):
            parse_json_object(b"{")
        assert gc.isenabled() is collects
    finally:
        (gc.enable if was else gc.disable)()


# --- bodies of many small things ---


@pytest.mark.parametrize(
    "text",
    ['{"a": [1, -2.5, true, null, "x\\n", [], {}], "b": {"c": {"d": [[]]}}, "": 1e3}', '{"a": 1, "a": 2}', " {} "],
)
def test_the_slow_reader_reads_the_same(text: str) -> None:
    assert body._read_long(text, lambda: False) == json.loads(text)


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": 1e999}', '{"a": 1', '{"a" 1}', "{} x", "[" * 5000])
def test_the_slow_reader_refuses_the_same(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def problem() -> str:
        with pytest.raises(InvalidRequest) as raised:
            parse_json_object(text.encode())
        return raised.value.message

    quick = problem()
    monkeypatch.setattr(body, "takes_long", lambda _: True)
    assert problem() == quick


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": [' + b"1," * large_json.MAX_VALUES + b"1]}",
        b'{"a": [' + b"[]," * large_json.MAX_PARTS + b"1]}",
        b'{"a": ' + b'{"a":[{}],"b":' * 20 + b"[" + b"{}," * large_json.MAX_PARTS,
        b"{" + b",".join(b'"%d": 1' % i for i in range(large_json.MAX_PARTS)) + b"}",
    ],
    ids=["values", "arrays", "objects", "keys"],
)
def test_bodies_hold_only_so_many_values(data: bytes) -> None:
    with pytest.raises(BodyTooLarge, match="The body contains more than"):
        parse_json_object(data)


def test_many_values_are_read_so_that_other_threads_go_on() -> None:
    keys = ",".join(f'"{i}": {i % 7}' for i in range(201_088))
    data = f'{{"logit_bias": {{{keys}}}, "text": "{": , [" * 1000}"}}'.encode()
    assert large_json.takes_long(data)
    assert len(parse_json_object(data)["logit_bias"]) == 201_088
    calls = 0

    def stopped() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    with pytest.raises(EncodingStoppedError):
        parse_json_object(data, stopped)
    assert not large_json.takes_long(b'{"messages": [' + b'{"role": "user", "content": "hi"},' * 5000)
