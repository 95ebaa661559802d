"""`gptoss batch run`: every request once, a run that is continued, files that are refused."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss import launcher
from gptoss.cli.main import main
from gptoss.engine.client.errors import EngineDeadError
from gptoss.engine.messages import AddRequest
from tests.support.helpers import checkpoint
from tests.support.scripted_engine import ScriptedEngine
from tests.support.server_process import ROOT

BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi", "max_tokens": 5},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20},
}


def line(custom_id: str, url: str = "/v1/chat/completions", **changes: Any) -> dict[str, Any]:
    body = {"model": "nano", **BODIES[url], **changes}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedEngine]:
    made = ScriptedEngine()
    monkeypatch.setattr(launcher, "create_engine", lambda start: made)
    yield made
    asyncio.run(made.stop())


def run(folder: Path, lines: list[Any], *options: str) -> int:
    source = folder / "in.jsonl"
    source.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    model = ("--model", str(checkpoint()), "--served-model-name", "nano")
    return main(["batch", "run", str(source), str(folder / "out.jsonl"), *model, *options])


def written(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(text) for text in path.read_text().splitlines()]
    found = {entry["custom_id"]: entry for entry in lines}
    assert len(found) == len(lines)
    return found


def test_requests_of_every_endpoint_are_answered_as_over_http(
    tmp_path: Path, engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, [line(url, url) for url in BODIES], "--json") == 0
    out = written(tmp_path / "out.jsonl")
    bodies = {url: entry["response"]["body"] for url, entry in out.items()}
    assert bodies["/v1/chat/completions"]["choices"][0]["message"]["content"] == "Done."
    assert bodies["/v1/completions"]["object"] == "text_completion"
    assert bodies["/v1/responses"]["output"][-1]["content"][0]["text"] == "Done."
    assert bodies["/v1/responses"]["store"] is False
    assert bodies["/v1/messages"]["content"] == [{"type": "text", "text": "Done."}]
    for entry in out.values():
        assert entry.keys() == {"id", "custom_id", "response", "error"} and entry["id"].startswith("batch_req_")
        assert entry["response"]["status_code"] == 200 and entry["response"]["request_id"].startswith("req_")
    summary = json.loads(capsys.readouterr().out)
    assert summary["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
    assert summary["usage"]["output_tokens"] > 4
    assert all(isinstance(r, AddRequest) and r.timeout_s is None and not r.background for r in engine.requests)


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"stream": True}, "/v1/chat/completions", "stream"),
    ({"temperature": 3}, "/v1/chat/completions", "temperature"),
    ({"model": "gpt-9"}, "/v1/completions", "model"),
    ({"previous_response_id": "resp_1"}, "/v1/responses", "previous_response_id"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "/v1/responses", "input[0]"),
]


def test_a_request_that_is_refused_has_the_error_that_names_the_field(tmp_path: Path, engine: ScriptedEngine) -> None:
    lines = [line("good"), *(line(param, url, **changes) for changes, url, param in REFUSED)]
    assert run(tmp_path, lines, "--errors", str(tmp_path / "err.jsonl")) == 1
    assert [*written(tmp_path / "out.jsonl")] == ["good"]
    errors = written(tmp_path / "err.jsonl")
    assert len(errors) == len(REFUSED)
    for name, entry in errors.items():
        assert entry["response"]["status_code"] in (400, 404)
        assert entry["response"]["body"]["error"]["param"] == name


def test_errors_of_messages_have_anthropics_form(tmp_path: Path, engine: ScriptedEngine) -> None:
    assert run(tmp_path, [line("a", "/v1/messages", stream=True)]) == 1
    response = written(tmp_path / "out.jsonl")["a"]["response"]
    assert response["body"]["type"] == "error" and response["body"]["request_id"] == response["request_id"]


def test_an_interrupted_run_is_continued(
    tmp_path: Path, engine: ScriptedEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line(f"r{i}") for i in range(20)]
    engine.lines.extend(
        [*["<|channel|>final<|message|>One.<|return|>"] * 10, *[EngineDeadError("the engine is dead")] * 20]
    )
    assert run(tmp_path, lines, "--max-num-seqs", "4") == 1
    captured = capsys.readouterr()
    assert "error: " in captured.err and "dead" in captured.err
    out = tmp_path / "out.jsonl"
    answered = written(out)
    assert 0 < len(answered) < 20
    with out.open("a") as file:
        file.write('{"id": "batch_req_1", "custom_id": "r')
    engine.lines.clear()
    assert run(tmp_path, lines) == 0
    assert written(out).items() >= answered.items() and len(written(out)) == 20
    num_requests = len(engine.requests)
    assert run(tmp_path, lines) == 0
    assert len(engine.requests) == num_requests, "nothing is left to do"


@pytest.mark.parametrize(
    ("lines", "options", "message"),
    [
        ([line("a"), line("a")], (), "in.jsonl: Line 2: its custom_id 'a' is that of line 1 too"),
        ([line("a"), "{"], (), "Line 2: it is not a JSON object"),
        ([], (), "has no requests"),
        ([line("a")], ("--errors", "in.jsonl"), "is the input file"),
        ([line("a")], ("--errors", "none/err.jsonl"), "folder does not exist"),
        ([line("a")], ("--max-num-seqs", "0"), "max_num_seqs"),
    ],
)
def test_what_cannot_be_run_is_said_before_the_engine_starts(
    tmp_path: Path,
    engine: ScriptedEngine,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    lines: list[Any],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, lines, *options) == 2
    assert message in capsys.readouterr().err
    assert not engine.requests and not (tmp_path / "out.jsonl").exists()


@pytest.mark.nightly
def test_a_killed_run_is_continued(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line(f"r{i}", max_tokens=100)) + "\n" for i in range(200)))
    command = [sys.executable, "-m", "gptoss", "batch", "run", str(source), str(out), "--model", str(checkpoint())]
    command += ["--served-model-name", "nano", "--cpu-kv-cache-gib", "0.2"]
    for num_answers in (20, 80):
        process = subprocess.Popen(command, cwd=ROOT)
        while not out.exists() or out.read_bytes().count(b"\n") < num_answers:
            assert process.poll() is None
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert out.read_bytes().count(b"\n") < 200
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    assert len(written(out)) == 200
