"""`gptoss bench` and bench/serve.py against a server in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss.cli.main import main
from gptoss.cli.remote.plot import panels
from tests.support.instant_engine import served
from tests.support.terminal import ROOT, terminal

SMALL = ("--streams", "1", "3", "--requests", "8", "--prefill", "40", "--repeat", "1", "--tokens", "6")
FIGURES = {
    *(f"{name} at {n}" for n in (1, 3) for name in ("tok/s", "ttft p50 ms", "ttft p95 ms", "itl p50 ms", "itl p95 ms")),
    *("prefill tok/s", "repeated-prefix ttft ms", "1-token requests/s"),
}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(pause_s=0.002) as url:
        yield url


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GPTOSS_URL", "GPTOSS_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_two_servers_in_a_terminal(url: str) -> None:
    with terminal("bench", "--url", url, "--vs", f"{url}/v1", "--vs-plain", *SMALL) as shown:
        assert shown.wait() == 0
    lines = shown.text.splitlines()
    assert lines[:2] == [f"1: gpt-oss-nano at {url}", f"2: gpt-oss-nano at {url}"]
    assert len(lines) == 2 + len(FIGURES) and all(line.endswith(("x", " -")) for line in lines[2:])
    assert "\x1b[1m1: " in shown.seen


def test_figures_as_json(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", url, *SMALL, "--json", "--sla-ttft-ms", "10000", "--sla-itl-ms", "1000"]) == 0
    found = json.loads(capsys.readouterr().out)
    (target,) = found["targets"]
    assert found["ratios"] is None and target["url"] == url and target["model"] == "gpt-oss-nano"
    figures = target["figures"]
    assert set(figures) == FIGURES | {"goodput/s at 1", "goodput/s at 3"}
    assert figures["goodput/s at 3"] > 0 and figures["itl p95 ms at 1"] >= 2
    assert figures["ttft p50 ms at 1"] < 1000


def test_arrivals_count_what_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--rate",
        "200",
        "--requests",
        "6",
        "--repeat",
        "1",
        "--tokens",
        "2",
        "--sla-ttft-ms",
        "0.001",
        "--json",
    ]
    with served(requests_per_minute=4) as url:
        assert main(["bench", "--url", url, *arguments]) == 0
    figures = json.loads(capsys.readouterr().out)["targets"][0]["figures"]
    assert figures["failed at 200/s"] == 3, "the first request of all goes to find out whether the server answers"
    assert figures["goodput/s at 200/s"] == 0 and figures["requests/s at 200/s"] > 0


def test_failures_are_one_line(url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, code, message in (
        (("--url", "127.0.0.1:9"), 3, "cannot reach http://127.0.0.1:9: Connection refused"),
        (("--url", url, "--model", "other"), 4, f"404 from {url}/v1/completions: The model 'other' does not exist."),
        (("--url", url, "--vs", "ftp://x"), 2, "'ftp://x' is not the URL of a server"),
    ):
        found = main(["bench", *arguments])
        err = capsys.readouterr().err
        assert (found, message in err, len(err.splitlines())) == (code, True, 1), err


def test_the_script_prints_and_writes_the_same_figures(url: str, tmp_path: Path) -> None:
    command = [sys.executable, "bench/serve.py", "--url", url, *SMALL, "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["targets"] == [url] and set(found["results"][0]) == FIGURES
    assert len(done.stdout.splitlines()) == len(FIGURES)


def test_a_picture_of_the_figures(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--url", url, "--vs", url, *SMALL, "--plot", str(tmp_path / "bench.png")]) == 0
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    for wrong, problem in (("bench.txt", ".png, .svg or .pdf"), ("none/bench.png", "there is no folder")):
        assert main(["bench", "--url", url, *SMALL, "--plot", str(tmp_path / wrong)]) == 2
        assert problem in capsys.readouterr().err


def test_the_panels_of_a_picture() -> None:
    one = {"tok/s at 1": 5.0, "tok/s at 16": 40.0, "itl p50 ms at 1": 2.0, "itl p95 ms at 1": 3.0, "prefill tok/s": 9.0}
    assert panels([one, {"tok/s at 1": 6.0}]) == {
        "tok/s": {(0, ""): [(1, 5.0), (16, 40.0)], (1, ""): [(1, 6.0)]},
        "itl ms": {(0, "p50"): [(1, 2.0)], (0, "p95"): [(1, 3.0)]},
    }
