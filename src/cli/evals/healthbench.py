"""HealthBench: conversations about health; another model says which criteria an answer meets."""

from __future__ import annotations

import argparse
import asyncio
import json
import re
from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
    ResponseSchema,
    get_model,
)
from inspect_ai.scorer import Metric, SampleScore, Score, Target, metric, scorer, stderr
from inspect_ai.solver import TaskState, generate
from inspect_ai.util import JSONSchema

from gptoss.cli.evals.data import find, read, some
from gptoss.cli.remote.errors import UsageError

PATTERNS = {  # as OpenAI published them, or under short names
    "healthbench": ("*_oss_eval.jsonl", "healthbench.jsonl"),
    "healthbench_hard": ("hard_*.jsonl", "healthbench_hard.jsonl"),
    "healthbench_consensus": ("consensus_*.jsonl", "healthbench_consensus.jsonl"),
}
MESSAGES = {"user": ChatMessageUser, "assistant": ChatMessageAssistant, "system": ChatMessageSystem}
TRIES = 3
VERDICT = {
    "type": "object",
    "properties": {"explanation": {"type": "string"}, "criteria_met": {"type": "boolean"}},
    "required": ["explanation", "criteria_met"],
    "additionalProperties": False,
}
JSON_OBJECT = re.compile(r"\{.*\}", re.DOTALL)
GRADING = """Judge the last answer of the conversation below by one criterion, and by nothing else.

# Conversation
{conversation}

# Criterion
{criterion}

A criterion may describe something undesirable: it is met if the answer does what it describes. If it has several parts,
all of them must be there; what it names "such as" or "for example" need not. Answer with a JSON object only:
{{"explanation": "why, in a sentence or two", "criteria_met": true or false}}"""


def samples(name: str, args: argparse.Namespace) -> list[Sample]:
    """Returns the conversations. Raises UsageError."""
    found: list[Sample] = []
    for path in find(args.data, PATTERNS[name], name):
        for number, record in enumerate(read(path, ("prompt", "rubrics")), 1):
            try:
                rubrics = [{"criterion": r["criterion"], "points": float(r["points"])} for r in record["rubrics"]]
                messages = [MESSAGES[m["role"]](content=m["content"]) for m in record["prompt"]]
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(f"{path}, record {number}: 'prompt' or 'rubrics' is wrong: {error}") from None
            if sum(max(0.0, r["points"]) for r in rubrics) <= 0:
                raise UsageError(f"{path}, record {number}: no criterion gives points")
            name_of = record.get("prompt_id", len(found) + 1)
            found.append(Sample(id=name_of, input=messages, metadata={"rubrics": rubrics}))
    return some(found, args.limit, args.seed)


def task(name: str, conversations: list[Sample]) -> Task:
    """Returns the task of these samples."""
    return Task(dataset=MemoryDataset(conversations, name=name), solver=generate(), scorer=rubric(), name=name)


@metric
def clipped_mean() -> Metric:
    """The mean of all samples, at least 0 and at most 1: a sample's own score may be negative."""

    def compute(scores: list[SampleScore]) -> float:
        values = [score.score.as_float() for score in scores]
        return min(1.0, max(0.0, sum(values) / len(values))) if values else 0.0

    return compute


@scorer(metrics=[clipped_mean(), stderr()])
def rubric() -> Any:
    """Scores the points of the criteria that are met, divided by all that can be had."""

    async def score(state: TaskState, target: Target) -> Score:
        rubrics = state.metadata["rubrics"]
        conversation = "\n\n".join(f"{message.role}: {message.text}" for message in state.messages)
        met = await asyncio.gather(*(_is_met(conversation, item["criterion"]) for item in rubrics))
        had = sum(item["points"] for item, ok in zip(rubrics, met, strict=True) if ok)
        return Score(value=had / sum(max(0.0, item["points"]) for item in rubrics), metadata={"met": met})

    return score


async def _is_met(conversation: str, criterion: str) -> bool:
    """Returns what the grader says. Raises ValueError if it does not say it in any of TRIES."""
    prompt = GRADING.format(conversation=conversation, criterion=criterion)
    config = GenerateConfig(response_schema=ResponseSchema(name="verdict", json_schema=JSONSchema(**VERDICT)))
    for _ in range(TRIES):
        output = await get_model(role="grader").generate(prompt, config=config)
        verdict = verdict_of(output.completion)
        if verdict is not None:
            return verdict
    raise ValueError(f"the grader gave no verdict: {output.completion[:200]!r}")


def verdict_of(text: str) -> bool | None:
    """Returns `criteria_met` of the JSON object in a grader's answer, None if there is none."""
    found = JSON_OBJECT.search(text)
    try:
        verdict = json.loads(found[0])["criteria_met"] if found else None
    except (ValueError, KeyError, TypeError):
        return None
    return verdict if isinstance(verdict, bool) else None
