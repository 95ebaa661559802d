"""IFEval: prompts with instructions that a program can check."""

from __future__ import annotations

import argparse
import inspect
from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import SampleScore, Score, Target, metric, scorer, stderr
from inspect_ai.solver import TaskState, generate

from gptoss.cli.evals.data import find, read, some
from gptoss.cli.evals.ifeval_rules import CHECKS, follows
from gptoss.cli.remote.errors import UsageError

PATTERNS = ("ifeval*.jsonl", "input_data.jsonl")


def samples(name: str, args: argparse.Namespace) -> list[Sample]:
    """Returns the prompts. Raises UsageError, also for an instruction or an argument that is not IFEval's."""
    found: list[Sample] = []
    for path in find(args.data, PATTERNS, "IFEval"):
        for number, record in enumerate(read(path, ("prompt", "instruction_id_list", "kwargs")), 1):
            instructions = list(zip(record["instruction_id_list"], record["kwargs"], strict=False))
            if len(record["instruction_id_list"]) != len(record["kwargs"]):
                raise UsageError(f"{path}, record {number}: as many 'kwargs' as instructions are needed")
            for instruction, arguments in instructions:
                _check(instruction, arguments, f"{path}, record {number}")
            key = record.get("key", len(found) + 1)
            found.append(Sample(id=key, input=record["prompt"], metadata={"instructions": instructions}))
    return some(found, args.limit, args.seed)


def _check(instruction: str, arguments: dict[str, Any], where: str) -> None:
    if instruction not in CHECKS:
        raise UsageError(f"{where}: no instruction {instruction!r}")
    wanted = list(inspect.signature(CHECKS[instruction]).parameters)[1:]
    given = {key for key, value in arguments.items() if value is not None}
    if missing := [name for name in wanted if name not in given]:
        raise UsageError(f"{where}: {instruction} lacks {missing[0]!r}")
    if unknown := given - set(wanted):
        raise UsageError(f"{where}: {instruction} takes no {min(unknown)!r}")


def task(name: str, prompts: list[Sample]) -> Task:
    """Returns the task of these samples."""
    return Task(dataset=MemoryDataset(prompts, name=name), solver=generate(), scorer=instructions(), name=name)


@metric
def prompts_and_instructions() -> Any:
    """The share of prompts with all instructions followed (`accuracy`), and of instructions followed."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        followed = [ok for score in scores for ok in (score.score.metadata or {})["followed"]]
        prompts = [score.score.as_float() for score in scores]
        return {
            "accuracy": sum(prompts) / len(prompts) if prompts else 0.0,
            "by instruction": sum(followed) / len(followed) if followed else 0.0,
        }

    return compute


@scorer(metrics=[prompts_and_instructions(), stderr()])
def instructions() -> Any:
    """Scores 1 if the answer follows all instructions (strict)."""

    async def score(state: TaskState, target: Target) -> Score:
        text = state.output.completion
        followed = [follows(name, text, arguments) for name, arguments in state.metadata["instructions"]]
        return Score(value=float(all(followed)), metadata={"followed": followed})

    return score
