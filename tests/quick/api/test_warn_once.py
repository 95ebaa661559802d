"""Logs each name once."""

from __future__ import annotations

import logging

import pytest

from gptoss.api.telemetry.warn_once import WarnOnce


def test_names_are_logged_once_up_to_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    warn = WarnOnce(logging.getLogger("test.once"), "ignoring: %s", limit=3)
    for names in (["b", "a\n"], ["a\n"], [], ["c" * 100, "d", "b"], ["e"]):
        warn(names)
    logged = [record.getMessage() for record in caplog.records]
    assert logged == [r"ignoring: 'a\n', 'b'", f"ignoring: '{'c' * 64}'"]
