"""The lines of batches' files: what is a request, what is left of a file that was being written."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest

from gptoss.api.batches.run import line_writer
from gptoss.api.batches.run.line_writer import LineWriter, append_durably, write_durably
from gptoss.api.batches.run.lines import (
    BatchUsage,
    LineError,
    check_file,
    output_line,
    parse_line,
    recover_lines,
    unanswered_line,
)
from gptoss.api.dispatch import URLS

CHAT = "/v1/chat/completions"


def request(**changes: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": CHAT, "body": {"model": "m"}} | changes


def encoded(*lines: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b"{", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b'{"a": NaN}', "invalid_json_line", None),
        (b"\xff\n", "invalid_json_line", None),
        (b"[" * 100_000, "invalid_json_line", None),
        (request(custom_id=None), "missing_required_parameter", "custom_id"),
        (request(custom_id=7), "invalid_type", "custom_id"),
        (request(custom_id=""), "invalid_custom_id", "custom_id"),
        (request(custom_id="x" * 513), "invalid_custom_id", "custom_id"),
        (request(method="GET"), "invalid_method", "method"),
        (request(url="/v1/completions"), "mismatched_url", "url"),
        (request(url=["/v1/completions"]), "invalid_type", "url"),
        (request(body=None), "missing_required_parameter", "body"),
        (request(body="{}"), "invalid_type", "body"),
    ],
)
def test_a_line_that_is_not_a_request_is_named(line: Any, code: str, param: str | None) -> None:
    data = line if isinstance(line, bytes) else encoded(line)
    with pytest.raises(LineError, match="^Line 7: ") as raised:
        parse_line(data, 7, CHAT, URLS)
    assert (raised.value.line, raised.value.code, raised.value.param) == (7, code, param)


def test_without_an_endpoint_every_supported_url_is_allowed() -> None:
    assert [parse_line(encoded(request(url=url)), 1, None, URLS).url for url in URLS] == [*URLS]
    with pytest.raises(LineError, match="must be one of .*not '/v1/embeddings'"):
        parse_line(encoded(request(url="/v1/embeddings")), 1, None, URLS)


def checked(folder: Path, data: bytes, max_bytes: int = 1000) -> Any:
    path = folder / "in.jsonl"
    path.write_bytes(data)
    return check_file(path, CHAT, URLS, max_bytes)


def test_a_file_is_checked_whole(tmp_path: Path) -> None:
    good = checked(
        tmp_path, b"\xef\xbb\xbf" + encoded(request()) + b"\r\n  \n" + encoded(request(custom_id="b")).rstrip()
    )
    assert (good.num_lines, good.model, good.errors) == (2, "m", [])
    two_models = checked(tmp_path, encoded(request(), request(custom_id="b", body={"model": "n"})))
    assert (two_models.num_lines, two_models.model) == (2, None)
    bad = checked(tmp_path, encoded(request()) + b"\n{\n" + encoded(request(), request(custom_id="y" * 1200)))
    assert [(e.line, e.code) for e in bad.errors] == [
        (3, "invalid_json_line"),
        (4, "duplicate_custom_id"),
        (5, "line_too_long"),
    ]
    assert "line 1" in str(bad.errors[1])
    for data in (b"", b"\n \n"):
        assert [e.code for e in checked(tmp_path, data).errors] == ["empty_file"]


def test_the_number_of_lines_and_of_reported_errors_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(checked(tmp_path, b"{\n" * 500).errors) == 100
    monkeypatch.setattr("gptoss.api.batches.run.lines.MAX_LINES", 3)
    lines = [request(custom_id=str(i)) for i in range(4)]
    assert not checked(tmp_path, encoded(*lines[:3])).errors
    assert [e.code for e in checked(tmp_path, encoded(*lines)).errors] == ["too_many_lines"]


@pytest.mark.parametrize(
    "torn", [b'{"custom_id": "c"', b"\x00\x00\x00\n", b'{"custom_id": "c", "respon\nse": null}\n', b"{}\n"]
)
def test_half_a_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "out.jsonl"
    whole = output_line("r1", "a", 200, "req", b'{"usage": null}') + unanswered_line(
        "r2", "b\u2028", "batch_expired", "No."
    )
    path.write_bytes(whole + torn)
    lines = [*recover_lines(path)]
    assert [line.custom_id for line in lines] == ["a", "b\u2028"]
    assert lines[0].response is not None and lines[0].response.status_code == 200
    assert path.read_bytes() == whole
    assert [*recover_lines(tmp_path / "none")] == []


@pytest.mark.parametrize(
    "usage",
    [
        {
            "prompt_tokens": 10,
            "completion_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 3},
        },
        {
            "input_tokens": 10,
            "output_tokens": 5,
            "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 3},
        },
        {
            "input_tokens": 6,
            "cache_read_input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "output_tokens": 5,
            "output_tokens_details": {"thinking_tokens": 3},
        },
    ],
)
def test_usage_is_the_same_for_every_endpoint(usage: dict[str, Any]) -> None:
    total = BatchUsage()
    for _ in range(2):
        total.add(json.dumps({"usage": usage, "choices": []}).encode())
    total.add(b'{"error": {"message": "No."}}')
    assert total.shown() == {
        "input_tokens": 20,
        "input_tokens_details": {"cached_tokens": 8},
        "output_tokens": 10,
        "output_tokens_details": {"reasoning_tokens": 6},
        "total_tokens": 30,
    }


async def test_lines_that_arrive_together_are_flushed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def append(path: Path, data: bytes) -> None:
        calls.append((path.name, data.count(b"\n")))
        append_durably(path, data)

    monkeypatch.setattr(line_writer, "append_durably", append)
    writer, paths = LineWriter(), [tmp_path / "a", tmp_path / "b"]
    await asyncio.gather(*(writer.append(paths[i % 2], b"%d\n" % i) for i in range(100)))
    assert calls == [("a", 50), ("b", 50)]
    assert paths[0].read_bytes().split() == [b"%d" % i for i in range(0, 100, 2)]


async def test_a_disk_that_is_full_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    append_durably(path, b"first\n")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer = LineWriter()
    results = await asyncio.gather(*(writer.append(path, b"lost\n") for _ in range(2)), return_exceptions=True)
    assert [type(result) for result in results] == [OSError, OSError]
    assert path.read_bytes() == b"first\n"
    monkeypatch.undo()
    await writer.append(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_file_is_replaced_whole_and_for_this_user_only(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for text in (b"one", b"two"):
        write_durably(path, text)
        assert path.read_bytes() == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o600
