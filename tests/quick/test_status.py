"""`gptoss status` where there is no server to be ready: loading, other versions, other servers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gptoss.cli.main import main
from gptoss.cli.remote.connection import Connection, base_url
from gptoss.cli.remote.errors import Refused, UsageError
from gptoss.cli.status import duration

LOADING: dict[str, dict[str, Any]] = {
    "/ready": {"ready": False, "engine": "starting", "warm": False, "draining": False},
    "/health": {"status": "degraded", "reasons": ["engine is \x1b[31mstarting"], "version": "1", "uptime_s": 61.0},
    "/stats": {"requests": {}},
}


def test_a_server_that_loads(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    accepted = {}

    def get(_: Connection, path: str, *, accept: tuple[int, ...] = ()) -> dict[str, Any]:
        accepted[path] = accept
        return LOADING[path]

    monkeypatch.setattr(Connection, "get", get)
    assert main(["status"]) == 1
    out = capsys.readouterr().out
    assert "is not ready\nbecause   engine is \\x1b[31mstarting\n" in out, "nothing of a server controls the terminal"
    assert "up 1 min 1 s" in out and "figures   /stats has another form" in out
    assert accepted == {"/ready": (503,), "/health": (503,), "/stats": ()}
    assert main(["status", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["health"]["status"] == "degraded"


def test_errors_and_answers_cannot_break_the_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def get(*_: Any, **__: Any) -> dict[str, Any]:
        raise Refused("\x1b]0;title\x07 \ud83d")

    monkeypatch.setattr(Connection, "get", get)
    assert main(["status"]) == 4
    assert capsys.readouterr().err == "error: \\x1b]0;title\\x07 \\ud83d\n"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("localhost:8000", "http://localhost:8000"),
        (" http://[::1]:8000/v1/ ", "http://[::1]:8000"),
        ("https://host/prefix/v1", "https://host/prefix"),
    ],
)
def test_urls_of_a_server(text: str, url: str) -> None:
    assert base_url(text) == url


@pytest.mark.parametrize(
    "text", ["", "http://", "file:///etc/passwd", "http://a b", "http://h:99999", "http://u:p@h", "h/?q"]
)
def test_what_is_not_the_url_of_a_server(text: str) -> None:
    with pytest.raises(UsageError, match="is not the URL of a server, such as"):
        base_url(text)


def test_durations() -> None:
    assert [duration(s) for s in (0, 61, 7200, 90_061)] == ["0 s", "1 min 1 s", "2 h 0 min", "1 d 1 h"]
