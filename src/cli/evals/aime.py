"""AIME 2025: thirty problems whose answers are integers from 0 to 999."""

from __future__ import annotations

import argparse
import re
from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from gptoss.cli.evals.data import find, read, some
from gptoss.cli.remote.errors import UsageError

PATTERNS = ("aime2025-*.jsonl", "aime25*.jsonl", "aime25*.json", "aime25*.parquet")
BOXED = re.compile(r"\\boxed\{\D{0,12}?(\d{1,4})\D{0,12}?\}")
NUMBER = re.compile(r"(?<![\d.,])\d{1,3}(?![\d]|[.,]\d)")
ASKED = "Reason step by step, and end with the answer as \\boxed{N}, where N is an integer."


def samples(name: str, args: argparse.Namespace) -> list[Sample]:
    """Returns the problems: those of parts I and II, or of one file of both. Raises UsageError."""
    found: list[Sample] = []
    for path in find(args.data, PATTERNS, "AIME 2025"):
        for number, record in enumerate(read(path, ("answer",)), 1):
            problem = record.get("problem") or record.get("question")
            digits = re.fullmatch(r"\s*(\d{1,3})\b.*", str(record["answer"]))  # one published answer ends with a unit
            if not problem or digits is None:
                raise UsageError(f"{path}, record {number}: there is no problem, or its answer is not an integer")
            found.append(Sample(id=len(found) + 1, input=f"{problem}\n\n{ASKED}", target=str(int(digits[1]))))
    return some(found, args.limit, args.seed)


def task(name: str, problems: list[Sample]) -> Task:
    """Returns the task of these samples."""
    return Task(dataset=MemoryDataset(problems, name=name), solver=generate(), scorer=integer(), name=name)


def final_integer(text: str) -> str | None:
    """Returns the integer in the last box, else the last integer of the last line."""
    found = BOXED.findall(text) or NUMBER.findall(text.strip().rpartition("\n")[2])
    return str(int(found[-1])) if found else None


@scorer(metrics=[accuracy(), stderr()])
def integer() -> Any:
    """Scores 1 if the final integer is the target's."""

    async def score(state: TaskState, target: Target) -> Score:
        found = final_integer(state.output.completion)
        return Score(value=CORRECT if found == target.text else INCORRECT, answer=found)

    return score
