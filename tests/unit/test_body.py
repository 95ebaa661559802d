"""Reading a request's body."""

from __future__ import annotations

import gc

import pytest

from src.api.body import parse_json_object
from src.api.errors import InvalidRequest


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
