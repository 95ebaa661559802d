"""A run's report: results.json and results.txt in a folder."""

from __future__ import annotations

import json
import platform
import time
from pathlib import Path
from typing import Any

import pytest


class Report:
    """A pytest plugin; with several workers that of the process which starts them."""

    def __init__(self, config: pytest.Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._started = time.time()
        self._results: dict[str, dict[str, Any]] = {}
        self._not_selected = 0

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self._not_selected += sum(1 for item in items if item.get_closest_marker("nightly"))

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Every worker collects all tests."""
        self._not_selected = getattr(node, "workeroutput", {}).get("not_selected", self._not_selected)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        entry = self._results.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0, "measured": {}})
        entry["seconds"] += report.duration
        entry["measured"] |= dict(report.user_properties)
        if report.outcome != "passed":
            entry["outcome"] = report.outcome
            entry["message"] = _message(report)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        outcomes = [entry["outcome"] for entry in self._results.values()]
        summary = {
            "exit_code": int(exitstatus),
            "model": self._config.getoption("--model"),
            "nightly": self._config.getoption("--nightly"),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started)),
            "seconds": round(time.time() - self._started, 1),
            "python": platform.python_version(),
            "not_selected": self._not_selected,  # of the nightly run
            **{name: outcomes.count(name) for name in ("passed", "failed", "skipped")},
        }
        content = json.dumps({"summary": summary, "tests": self._results}, indent=1)
        (self._folder / "results.json").write_text(content + "\n")
        (self._folder / "results.txt").write_text("\n".join(self._lines(summary)) + "\n")

    def _lines(self, summary: dict[str, Any]) -> list[str]:
        lines = [f"{key}: {value}" for key, value in summary.items()] + [""]
        for name, entry in self._results.items():
            lines.append(f"{entry['outcome']:8} {entry['seconds']:7.2f} s  {name}")
            lines += [f"{'':21}{key} = {value}" for key, value in entry["measured"].items()]
            lines += [f"{'':21}{line}" for line in entry.get("message", "").splitlines()]
        return lines


def _message(report: pytest.TestReport) -> str:
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    return str(report.longrepr)[-4000:]
