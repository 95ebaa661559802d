"""Questions with choices: GPQA Diamond and MMLU-Pro."""

from __future__ import annotations

import argparse
import re
from random import Random
from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import CORRECT, INCORRECT, Score, Target, accuracy, scorer, stderr
from inspect_ai.solver import TaskState, generate

from gptoss.cli.evals.data import find, read, some
from gptoss.cli.remote.errors import UsageError

LETTERS = "ABCDEFGHIJ"
GPQA_FIELDS = ("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
MMLU_PRO_FIELDS = ("question", "options", "answer", "category")
ANSWER = re.compile(r"answer\s*(?:is)?\s*:?[\s*$({\\]*(?:boxed|text)?[\s*${(\\]*([A-J])\b", re.IGNORECASE)
LETTER = re.compile(r"(?<![A-Za-z])([A-J])(?![A-Za-z])")


def samples(name: str, args: argparse.Namespace) -> list[Sample]:
    """Returns the samples of the evaluation. Raises UsageError."""
    return _gpqa(args) if name == "gpqa" else _mmlu_pro(args)


def task(name: str, questions: list[Sample]) -> Task:
    """Returns the task of these samples."""
    return Task(dataset=MemoryDataset(questions, name=name), solver=generate(), scorer=letter(), name=name)


def _gpqa(args: argparse.Namespace) -> list[Sample]:
    found: list[Sample] = []
    (path, *_) = find(args.data, ("gpqa_diamond.csv", "gpqa_diamond.jsonl"), "GPQA Diamond")
    for number, record in enumerate(read(path, GPQA_FIELDS)):
        options = [record[field].strip() for field in GPQA_FIELDS[1:]]
        order = Random(f"{args.seed} {number}").sample(range(4), 4)
        found.append(_sample(number, record["Question"].strip(), [options[i] for i in order], order.index(0)))
    return some(found, args.limit, args.seed)


def _mmlu_pro(args: argparse.Namespace) -> list[Sample]:
    paths = find(args.data, ("mmlu_pro*.jsonl", "mmlu_pro*.json", "mmlu_pro*.parquet", "test-*.parquet"), "MMLU-Pro")
    found: list[Sample] = []
    for path in paths:
        for number, record in enumerate(read(path, MMLU_PRO_FIELDS), 1):
            if record["answer"] not in LETTERS[: len(record["options"])]:
                raise UsageError(f"{path}, record {number}: 'answer' is not the letter of an option")
            number = record.get("question_id", len(found))
            found.append(_sample(number, record["question"], list(record["options"]), LETTERS.index(record["answer"])))
    return some(found, args.limit, args.seed)


def _sample(number: int, question: str, options: list[str], right: int) -> Sample:
    listed = "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
    text = f"{question}\n\n{listed}\n\nEnd with a line `Answer: X`, where X is the letter of the right choice."
    return Sample(id=number, input=text, target=LETTERS[right])


def chosen(text: str) -> str | None:
    """Returns the letter that an answer chooses: after the last `Answer:`, else its last letter alone."""
    found = ANSWER.findall(text) or LETTER.findall(text.strip().rpartition("\n")[2])
    return found[-1].upper() if found else None


@scorer(metrics=[accuracy(), stderr()])
def letter() -> Any:
    """Scores 1 if the letter is the target's."""

    async def score(state: TaskState, target: Target) -> Score:
        found = chosen(state.output.completion)
        return Score(value=CORRECT if found == target.text else INCORRECT, answer=found)

    return score
