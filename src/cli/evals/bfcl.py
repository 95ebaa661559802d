"""BFCL v4, single turn: function calls, checked by the checker in the bfcl-eval wheel.

The wheel is read where it lies; its pinned requirements are not installed. The checker needs none of them.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessageAssistant, ChatMessageSystem, ChatMessageUser, get_model
from inspect_ai.scorer import CORRECT, INCORRECT, SampleScore, Score, Target, metric, scorer, stderr
from inspect_ai.solver import Generate, TaskState, solver
from inspect_ai.tool import ToolInfo, ToolParams

from gptoss.cli.eval import BFCL_LIMIT
from gptoss.cli.evals.data import find, some
from gptoss.cli.remote.errors import UsageError

ANSWERED = (
    *("simple_python", "simple_java", "simple_javascript", "multiple", "parallel", "parallel_multiple"),
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
NO_CALL, ANY_CALL = ("irrelevance", "live_irrelevance"), ("live_relevance",)
CATEGORIES = (*ANSWERED, *NO_CALL, *ANY_CALL)
MESSAGES = {"user": ChatMessageUser, "assistant": ChatMessageAssistant, "system": ChatMessageSystem}
TYPES = {  # BFCL's names of types -> JSON schema's; Java's and JavaScript's values are written as text
    **{name: name for name in ("integer", "number", "string", "boolean", "array", "object")},
    **{"float": "number", "double": "number", "dict": "object", "tuple": "array", "list": "array", "bool": "boolean"},
}
KEPT = ("type", "description", "enum", "default", "items", "properties", "required", "additionalProperties")


def samples(name: str, args: argparse.Namespace) -> list[Sample]:
    """Returns BFCL_LIMIT or --limit samples of each category, or all with --full. Raises UsageError."""
    folder = _open_wheel(args.data)
    limit = None if args.full else args.limit or BFCL_LIMIT
    found = []
    for category in CATEGORIES:
        records = _records(folder, f"BFCL_v4_{category}.json")
        answers = {}
        if category in ANSWERED:
            answers = {r["id"]: r["ground_truth"] for r in _records(folder, f"possible_answer/BFCL_v4_{category}.json")}
        for record in some(records, limit, args.seed):
            found.append(_sample(category, record, answers.get(record["id"])))
    return found


def _open_wheel(data: Path) -> Any:
    """Returns the folder of BFCL's files, in the wheel or unpacked, and makes its checker importable."""
    (path, *_) = find(data, ("bfcl_eval-*.whl", "bfcl_eval"), "BFCL: the bfcl-eval wheel, as it is or unpacked")
    root = zipfile.Path(path, "bfcl_eval/data/") if path.suffix == ".whl" else path / "data"
    importable = str(path if path.suffix == ".whl" else path.parent)
    if importable not in sys.path:
        sys.path.insert(0, importable)
    # the checker reads only whether dots of a function's name were replaced; the module itself imports every client
    clients = types.ModuleType("bfcl_eval.constants.model_config")
    clients.MODEL_CONFIG_MAPPING = {"gptoss": types.SimpleNamespace(underscore_to_dot=True)}  # type: ignore[attr-defined]
    sys.modules[clients.__name__] = clients
    return root


def _records(folder: Any, name: str) -> list[dict[str, Any]]:
    file = folder.joinpath(name)
    try:
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, KeyError, ValueError) as error:
        raise UsageError(f"cannot read {file}: {error}") from None


def _sample(category: str, record: dict[str, Any], answer: Any) -> Sample:
    messages = [MESSAGES[message["role"]](content=message["content"]) for message in record["question"][0]]
    metadata = {"category": category, "functions": record["function"], "answer": answer}
    return Sample(id=record["id"], input=messages, metadata=metadata)


def task(name: str, questions: list[Sample]) -> Task:
    """Returns the task of these samples."""
    return Task(dataset=MemoryDataset(questions, name=name), solver=call_functions(), scorer=calls(), name=name)


def call_name(name: str) -> str:
    """Returns a function's name as OpenAI's API takes it."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def json_schema(schema: dict[str, Any], *, as_text: bool) -> dict[str, Any]:
    """Returns BFCL's schema as JSON schema. `as_text`: values are source text of another language."""
    found = {name: schema[name] for name in KEPT if name in schema}
    kind = schema.get("type")
    if as_text and "properties" not in schema:
        text = f"{schema.get('description', '')} In {kind} syntax, as text."
        return {"type": "string", "description": text.strip()}
    if kind in TYPES:
        found["type"] = TYPES[kind]
    elif kind is not None:
        del found["type"]  # any
    if "properties" in found:
        found["properties"] = {n: json_schema(s, as_text=as_text) for n, s in found["properties"].items()}
    if isinstance(found.get("items"), dict):
        found["items"] = json_schema(found["items"], as_text=False)
    if isinstance(found.get("additionalProperties"), dict):
        found["additionalProperties"] = json_schema(found["additionalProperties"], as_text=False)
    return found


@solver
def call_functions() -> Any:
    """Generates once, with the sample's functions as tools."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        as_text = state.metadata["category"] in ("simple_java", "simple_javascript")
        tools = [
            ToolInfo(
                name=call_name(function["name"]),
                description=function["description"],
                parameters=ToolParams.model_validate(json_schema(function["parameters"], as_text=as_text)),
            )
            for function in state.metadata["functions"]
        ]
        state.output = await get_model().generate(state.messages, tools=tools, tool_choice="auto")
        state.messages.append(state.output.message)
        return state

    return solve


@metric
def by_category() -> Any:
    """The accuracy of each category, and the mean over them as `accuracy`."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        groups: dict[str, list[float]] = {}
        for score in scores:
            groups.setdefault((score.sample_metadata or {})["category"], []).append(score.score.as_float())
        parts = {name: sum(values) / len(values) for name, values in sorted(groups.items())}
        return {"accuracy": sum(parts.values()) / len(parts) if parts else 0.0, **parts}

    return compute


@scorer(metrics=[by_category(), stderr()])
def calls() -> Any:
    """Scores 1 if the calls are a possible answer, or are missing where none fits."""

    async def score(state: TaskState, target: Target) -> Score:
        made = state.output.message.tool_calls or []
        problem = _problem(state.metadata, [{call.function: call.arguments} for call in made])
        answer = json.dumps([{call.function: call.arguments} for call in made])
        return Score(value=INCORRECT if problem else CORRECT, answer=answer, explanation=problem or "")

    return score


def _problem(metadata: dict[str, Any], made: list[dict[str, Any]]) -> str:
    """Returns what is wrong with the calls, or nothing."""
    category = metadata["category"]
    if category in NO_CALL:
        return "a call where no function fits" if made else ""
    if category in ANY_CALL:
        return "" if made else "no call"
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    languages = {"simple_java": Language.JAVA, "simple_javascript": Language.JAVASCRIPT}
    language = languages.get(category, Language.PYTHON)
    verdict = ast_checker(metadata["functions"], made, metadata["answer"], language, category, "gptoss")
    return "" if verdict["valid"] else str(verdict["error"])
