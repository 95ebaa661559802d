"""What a run of ./run_tests.sh came to: python -m tests.support.summary SECONDS [outcome=NAME: passed] [REPORT FOLDER].

Exits with 1 if a report is missing: pytest ended before it could write one.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

Lines = list[str]


def main(arguments: list[str]) -> int:
    seconds, *rest = arguments
    outcomes = [text.removeprefix("outcome=") for text in rest if text.startswith("outcome=")]
    folders = [Path(text) for text in rest if text and not text.startswith("outcome=")]
    missing = [folder for folder in folders if not (folder / "results.json").is_file()]
    lines = ["", "== summary =="] + [outcome for outcome in outcomes if outcome]
    for folder in folders:
        lines += [f"{folder}: NO REPORT"] if folder in missing else of_report(folder)
    sys.stdout.write("\n".join([*lines, f"{int(seconds) // 60} min {int(seconds) % 60} s in all"]) + "\n")
    return int(bool(missing))


def of_report(folder: Path) -> Lines:
    report = json.loads((folder / "results.json").read_text())
    summary, tests = report["summary"], report["tests"]
    by_suite: dict[str, Counter[str]] = {}
    for name, entry in tests.items():
        by_suite.setdefault(_suite(name), Counter())[entry["outcome"]] += 1
    lines = [f"{name}: {_counts(counts)}" for name, counts in by_suite.items()]
    if summary["not_selected"]:
        lines.append(f"left to `make nightly`: {summary['not_selected']}")
    lines += [f"FAILED {name}" for name, entry in tests.items() if entry["outcome"] == "failed"]
    reasons = Counter(entry.get("message", "") for entry in tests.values() if entry["outcome"] == "skipped")
    lines += [f"skipped {count}: {reason}" for reason, count in reasons.items()]
    if summary["exit_code"] and not summary["failed"]:
        lines.append(f"pytest ended with exit code {summary['exit_code']}")
    return [*lines, f"{summary['seconds']:.0f} s, report: {folder}/results.txt"]


def _suite(name: str) -> str:
    return "/".join(name.split("::")[0].split("/")[:2])


def _counts(counts: dict[str, Any]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped") if counts[kind])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
