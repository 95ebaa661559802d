"""`gptoss eval` with inspect-ai and the bfcl-eval wheel, against a server of nano."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
URL = os.environ["TEST_SERVER_URL"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small files in the published formats, and the wheel."""
    folder = tmp_path_factory.mktemp("data")
    with (folder / "gpqa_diamond.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Question", "Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))])
        rows.writerows([f"What is {i} + {i}?", 2 * i, 2 * i + 1, 2 * i + 3, 2 * i + 7] for i in range(6))
    lines = {
        "aime2025-I.jsonl": [{"question": f"What is {i} + {i + 1}?", "answer": str(2 * i + 1)} for i in range(4)],
        "aime2025-II.jsonl": [{"question": "What is 2 + 2?", "answer": "4^\\circ"}],
        "mmlu_pro.jsonl": [
            {
                "question_id": i,
                "question": f"{i} * 2?",
                "options": list("0123456789"),
                "answer": "A",
                "category": "math",
            }
            for i in range(4)
        ],
        "ifeval_input_data.jsonl": [
            {
                "key": 1,
                "prompt": "Say hello in English.",
                "instruction_id_list": ["punctuation:no_comma", "language:response_language"],
                "kwargs": [{}, {"language": "en", "num_words": None}],
            }
        ],
        "healthbench.jsonl": [
            {
                "prompt_id": "p",
                "prompt": [{"role": "user", "content": "I have a headache."}],
                "rubrics": [{"criterion": "Advises rest", "points": 5}, {"criterion": "Is rude", "points": -4}],
            }
        ],
    }
    for name, records in lines.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "bfcl-eval==2026.3.23", "-d", str(folder)],
        check=True,
    )
    return folder


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "gptoss", "eval", *map(str, arguments), "--url", URL, "--max-tokens", "200"]


def evaluated(*arguments: str | Path) -> list[dict[str, object]]:
    done = subprocess.run(command(*arguments, "--json"), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows: list[dict[str, object]] = json.loads(done.stdout)
    return rows


def num_requests() -> int:
    with urllib.request.urlopen(f"{URL}/stats") as answer:
        total: int = json.load(answer)["requests"]["total"]
    return total


def test_every_evaluation(data: Path, tmp_path: Path) -> None:
    names = ("gpqa", "aime25", "mmlu_pro", "ifeval", "healthbench")
    grader = ("--grader-url", URL, "--grader-model", "gpt-oss-nano")
    rows = evaluated(*names, *grader, "--data", data, "--out", tmp_path, "--effort", "low", "high")
    found = {(row["evaluation"], row["effort"]): row for row in rows if not row["part"]}
    assert set(found) == {(name, effort) for name in names for effort in ("low", "high")}
    assert all(row["complete"] and row["score"] is not None and not row["errors"] for row in found.values())
    assert found["gpqa", "high"]["published"] == {"20b": 71.5, "120b": 80.1}
    assert [found[name, "low"]["samples"] for name in names] == [6, 5, 4, 1, 1]


def test_an_interrupted_run_continues(data: Path, tmp_path: Path) -> None:
    arguments = command("bfcl", "--data", data, "--out", tmp_path, "--limit", "5", "--connections", "2")
    before = num_requests()
    running = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while num_requests() < before + 12:
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    shown, notes = running.communicate(timeout=60)
    assert running.returncode == 130 and "bfcl (not complete)" in shown and "run the same command again" in notes
    first = num_requests() - before
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "| bfcl |  |  | medium | 65 | 0 |" in done.stdout, done.stderr
    assert num_requests() - before <= 65 + 2 * 2 and first >= 12  # only what was running is asked twice
