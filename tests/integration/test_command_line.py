"""The commands against a server in this process, each also in a pseudo-terminal."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptoss.cli.main import main
from gptoss.cli.remote.connection import Connection
from gptoss.port_manager import recorded
from tests.support.instant_engine import served
from tests.support.terminal import ROOT, terminal

KEY = "a-key-of-the-tests"
LIGHT = ("torch", "pydantic", "fastapi", "httpx", "rich", "transformers")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served() as url:
        yield url


@pytest.fixture(scope="module")
def locked_url() -> Iterator[str]:
    """A server that requires a key, and answers one request a minute."""
    with served(api_key=KEY, requests_per_minute=1) as url:
        yield url


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor records of its servers: `stop` would end them."""
    for name in ("GPTOSS_URL", "GPTOSS_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    (tmp_path / "run").mkdir(mode=0o700)


def gptoss(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Returns exit code, output and errors."""
    code = main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("arguments", [("--help",), ("status", "--url"), ("stop", "--help"), ("stop",)])
def test_what_a_person_runs_often_loads_little(arguments: tuple[str, ...], url: str) -> None:
    more = (url,) if arguments[-1] == "--url" else ()
    code = (
        "import sys; from gptoss.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
        f"sys.stderr.write(' '.join(n for n in {LIGHT} if n in sys.modules)); sys.exit('argparse' not in sys.modules)"
    )
    command = [sys.executable, "-c", code, *arguments, *more]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == (1 if arguments == ("--help",) else 0)
    assert done.stderr.rpartition("\n")[2] == ""


def test_status_in_a_terminal_has_colours(url: str) -> None:
    with terminal("status", "--url", url) as shown:
        assert shown.wait() == 0
    assert f"{url} is ready" in shown.text and "gpt-oss-nano in float32" in shown.text
    assert "\x1b[32mready\x1b[0m" in shown.seen
    with terminal("status", env={"GPTOSS_URL": url, "NO_COLOR": "1"}) as shown:
        assert shown.wait() == 0
    assert "\x1b[3" not in shown.seen and "is ready" in shown.text


def test_status_as_json_with_one_timed_request(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = gptoss(capsys, "status", "--url", f"{url}/v1/", "--json")
    before = json.loads(out)
    assert code == 0 and before["ready"] and before["timing"] is None and before["url"] == url
    code, out, _ = gptoss(capsys, "status", "--url", url, "--json", "--timing")
    found = json.loads(out)
    assert found["timing"]["tokens"] == 14 and found["timing"]["ttft_s"] > 0
    _, out, _ = gptoss(capsys, "status", "--url", url, "--json")
    total = json.loads(out)["figures"]["requests"]["total"]
    assert total == before["figures"]["requests"]["total"] + 1, "--timing sends one request"
    assert "first token" in gptoss(capsys, "status", "--url", url, "--timing")[1]


def test_status_without_a_key_shows_what_needs_none(locked_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = gptoss(capsys, "status", "--url", locked_url)
    assert code == 0 and "is ready" in out and "set --api-key, GPTOSS_API_KEY or OPENAI_API_KEY" in out
    assert "0 failed" in gptoss(capsys, "status", "--url", locked_url, "--api-key", KEY)[1]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_failures_are_one_line_and_an_exit_code(
    url: str, locked_url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    for arguments, code, message in (
        (("--url", nowhere), 3, f"error: cannot reach {nowhere}: Connection refused"),
        (("--url", "ftp://x"), 2, "error: 'ftp://x' is not the URL of a server"),
        (("--url", "http://[::1"), 2, "is not the URL of a server"),
        (("--url", f"{url}/v1/models"), 4, "error: 404 from "),
        (("--url", url, "--api-key", "é"), 2, "characters that an HTTP header cannot hold"),
        (("--url", locked_url, "--timing"), 4, "error: 401 from "),
        (("--url", locked_url, "--timing", "--api-key", KEY), 0, ""),
        (("--url", locked_url, "--timing", "--api-key", KEY), 4, "error: 429 from "),
    ):
        found, _, err = gptoss(capsys, "status", *arguments)
        assert (found, message in err, len(err.splitlines())) == (code, True, int(code != 0)), err
    assert "retry after " in err
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    assert gptoss(capsys, "status", "--url", locked_url)[0] == 0


SERVER = """
import signal, sys
from pathlib import Path
from typing import Any
from gptoss.port_manager import recorded, reserve
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
with reserve("127.0.0.1", 0) as held, recorded(held):
    sys.stdout.write(f"{held.getsockname()[1]}\\n")
    sys.stdout.flush()
    signal.sigwait({signal.SIGTERM})
    if len(sys.argv) > 1:
        signal.pause()
"""


@pytest.mark.parametrize(("hangs", "code", "how"), [((), 0, "stopped"), (("hangs",), 1, "killed")])
def test_stop_waits_for_the_end_of_the_only_server(hangs: tuple[str, ...], code: int, how: str) -> None:
    command = [sys.executable, "-c", SERVER, *hangs]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with terminal("stop", "--timeout", "0.5" if hangs else "20") as shown:
            assert shown.wait() == code
        assert f"{how} the server on port {port} (pid {server.pid})" in shown.text
        assert server.wait(10) == (-9 if hangs else 0)


def test_stop_leaves_alone_what_is_not_ours(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = gptoss(capsys, "stop")
    assert (code, err) == (3, "error: none of our servers is running on this machine\n")
    code, _, err = gptoss(capsys, "stop", "--url", url)
    assert code == 3 and f"(pid {os.getpid()} holds it)" in err
    assert gptoss(capsys, "stop", "--url", "http://192.0.2.1:8000")[0] == 2
    listening = socket.create_server(("127.0.0.1", 0)), socket.create_server(("127.0.0.1", 0))
    with listening[0] as one, listening[1] as two, recorded(one), recorded(two):
        code, _, err = gptoss(capsys, "stop")
    assert code == 2 and err.startswith("error: several servers are running (127.0.0.1:")


def test_generate_streams_to_a_terminal(url: str) -> None:
    with terminal("generate", "Hello", "--url", url, "--show-reasoning") as shown:
        assert shown.wait() == 0
    assert shown.text == "Hm.\nHi.\n" and "\x1b[2mHm\x1b[0m" in shown.seen


def test_generate_reads_standard_input(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert gptoss(capsys, "generate", "--url", url) == (0, "Hi.\n", "")
    code, _, err = gptoss(capsys, "generate", "--url", url)
    assert (code, err) == (2, "error: the prompt is empty\n")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert gptoss(capsys, "generate", "-", "--url", url)[2] == "error: standard input is not UTF-8 text\n"


def test_generate_sends_its_options(
    url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = tmp_path / "my schema.json"
    schema.write_text('{"type": "object"}')
    sent: list[tuple[str, dict[str, Any]]] = []
    stream = Connection.stream

    def kept(self: Connection, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        sent.append((path, body))
        return stream(self, path, body)

    monkeypatch.setattr(Connection, "stream", kept)
    options = "--system S --effort low --profile latency_first --max-tokens 9 --temperature 0.5 --top-p 0.9 --seed 3"
    more = ("--stop", "x", "--stop", "y", "--logprobs", "2", "--schema", str(schema))
    code, out, err = gptoss(capsys, "generate", "Hello", "--url", url, *options.split(), *more)
    assert (code, out) == (0, "\n") and "reached its limit of tokens" in err
    assert sent.pop() == (
        "/v1/chat/completions",
        {
            "model": "gpt-oss-nano",
            "messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}],
            "reasoning_effort": "low",
            "profile": "latency_first",
            "max_tokens": 9,
            "temperature": 0.5,
            "top_p": 0.9,
            "seed": 3,
            "stop": ["x", "y"],
            "logprobs": True,
            "top_logprobs": 2,
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "my_schema", "schema": {"type": "object"}},
            },
            "stream_options": {"include_usage": True},
        },
    )
    code, out, err = gptoss(capsys, "generate", "--raw", "Hello", "--url", url, "--logprobs", "1", "--model", "nano")
    assert (code, out) == (4, "") and "404" in err, "the name is not one of this server's"
    code, out, err = gptoss(capsys, "generate", "--raw", "Hello", "--url", url, "--logprobs", "1")
    assert (code, out) == (0, "analysisHm.assistantfinalHi.\n") and "-0.5000  'Hm'" in err
    body = {"prompt": "Hello", "max_tokens": 256, "logprobs": 1, "model": "gpt-oss-nano"}
    assert sent.pop() == ("/v1/completions", body | {"stream_options": {"include_usage": True}})


def test_what_generate_cannot_use(url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "no.json").write_text("{")
    for arguments, message in (
        (("--schema", str(tmp_path / "none")), f"cannot read {tmp_path / 'none'}: No such file or directory"),
        (("--schema", str(tmp_path / "no.json")), "no.json is not JSON: Expecting property name"),
        (("--record", str(tmp_path)), f"cannot write {tmp_path}: Is a directory"),
    ):
        code, _, err = gptoss(capsys, "generate", "Hello", "--url", url, *arguments)
        assert code == 2 and message in err and len(err.splitlines()) == 1
    with pytest.raises(SystemExit, match="2"):
        main(["generate", "Hello", "--raw", "--effort", "low"])
    code, _, err = gptoss(capsys, "generate", "Hello", "--url", url, "--temperature", "3")
    assert code == 4 and "'temperature'" in err


def test_what_is_recorded_can_be_replayed(url: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    for more in (("--logprobs", "1"), ("--raw", "--json")):
        assert gptoss(capsys, "generate", "Hello", "--url", url, "--record", str(file), *more)[0] == 0
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert [len(record["prompt_token_ids"]) for record in records] == [57, 1]
    assert records[0]["answer"]["text"] == "Hi." and records[0]["answer"]["reasoning"] == "Hm."
    assert records[0]["request"]["seed"] >= 0 and records[0]["timings"]["ttft_s"] > 0
    with terminal("replay", str(file), "--url", url) as shown:
        assert shown.wait() == 0
    assert "line 2: equal, 0.0" in shown.text and shown.text.endswith("2 of 2 equal\n")
    records[0]["answer"]["text"] = "Ho."
    records[0]["answer"]["logprobs"][0]["logprob"] = -0.6
    records[0]["prompt_token_ids"][1] = 0
    records[1]["request"]["temperature"] = 3
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    code, out, _ = gptoss(capsys, "replay", str(file), "--url", url, "--json")
    first, second = (result["differences"] for result in json.loads(out)["results"])
    assert code == 1 and len(first) == 3
    assert first[1] == "text: from character 1: 'o.', now 'i.'" and first[2] == "logprobs: differ by up to 0.1"
    assert "400 from" in second[0]
    assert "line 1: differs" in gptoss(capsys, "replay", str(file), "--url", url)[1]
    file.write_text(file.read_text() + "{}\n")
    code, _, err = gptoss(capsys, "replay", str(file), "--url", url, "--json")
    assert (code, err) == (2, f"error: {file}, line 3: not a recorded request ('format' is not 1)\n")


def test_check_in_a_terminal() -> None:
    with terminal("check", "--port", str(free_port()), "--model", "no/such-model") as shown:
        assert shown.wait() == 1
    assert "\x1b[31mmissing  \x1b[0mcheckpoint" in shown.seen and "remedy: gptoss serve downloads it" in shown.text
