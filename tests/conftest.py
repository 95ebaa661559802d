"""Reports: with --report FOLDER a run leaves results.json and results.txt there, and the logs of its servers."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.server_process import LOG_FOLDER

# Triton kernels run on a GPU where there is one, else in triton's interpreter, which must be chosen before anything
# imports triton
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

_started = time.time()
_results: dict[str, dict[str, Any]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", help="folder for results.json, results.txt and the servers' logs")
    parser.addoption("--url", help="p0: the server to test; without it one is started")
    parser.addoption("--model", default="nano", help="p0: the model of the server that is started")
    parser.addoption("--any-requests", type=int, help="e2e: requests made from /openapi.json")
    parser.addoption("--profile", default="balanced", help="p0: its profile")


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--report")
    if folder:
        Path(folder, "logs").mkdir(parents=True, exist_ok=True)
        os.environ[LOG_FOLDER] = str(Path(folder, "logs").resolve())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    entry = _results.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "measured": {}})
    entry["seconds"] += report.duration
    entry["measured"] |= dict(report.user_properties)
    if report.outcome != "passed":
        entry["outcome"] = report.outcome
        entry["message"] = str(report.longrepr)[-4000:]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    folder = session.config.getoption("--report")
    if not folder or hasattr(session.config, "workerinput"):  # one of several processes
        return
    outcomes = [entry["outcome"] for entry in _results.values()]
    summary = {
        "exit_code": int(exitstatus),
        "model": session.config.getoption("--model"),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(_started)),
        "seconds": round(time.time() - _started, 1),
        "python": platform.python_version(),
        **{name: outcomes.count(name) for name in ("passed", "failed", "skipped")},
    }
    Path(folder, "results.json").write_text(json.dumps({"summary": summary, "tests": _results}, indent=1) + "\n")
    lines = [f"{key}: {value}" for key, value in summary.items()] + [""]
    for name, entry in _results.items():
        lines.append(f"{entry['outcome']:8} {entry['seconds']:7.2f} s  {name}")
        lines += [f"{'':21}{key} = {value}" for key, value in entry["measured"].items()]
        lines += [f"{'':21}{line}" for line in entry.get("message", "").splitlines()]
    Path(folder, "results.txt").write_text("\n".join(lines) + "\n")
