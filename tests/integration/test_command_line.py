"""The commands against a server in this process, each also in a pseudo-terminal."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss.cli.main import main
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
from gptoss.port_manager import recorded, reserve
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
with reserve("127.0.0.1", 0) as held, recorded(held):
    sys.stdout.write(f"{held.getsockname()[1]}\\n")
    sys.stdout.flush()
    signal.sigwait({signal.SIGTERM})
    if len(sys.argv) > 1:
        signal.pause()
"""


@pytest.mark.parametrize(("hangs", "code", "how"), [((), 0, "stopped in "), (("hangs",), 1, "killed, as it had not")])
def test_stop_waits_for_the_end_of_the_only_server(hangs: tuple[str, ...], code: int, how: str) -> None:
    command = [sys.executable, "-c", SERVER, *hangs]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        with terminal("stop", "--timeout", "0.5" if hangs else "20") as shown:
            assert shown.wait() == code
        assert f"the server on port {port} (pid {server.pid}) is {how}" in shown.text
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
