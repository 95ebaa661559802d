"""Runs evaluations with inspect-ai, which keeps a log of every sample and continues where it stopped."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from gptoss.cli.remote.connection import base_url
from gptoss.cli.remote.errors import UsageError

MODULES = {  # evaluation -> module of this folder
    "gpqa": "choices",
    "mmlu_pro": "choices",
    "aime25": "aime",
    "ifeval": "ifeval",
    "healthbench": "healthbench",
    "healthbench_hard": "healthbench",
    "healthbench_consensus": "healthbench",
    "bfcl": "bfcl",
}
METRICS = {"healthbench": "clipped_mean", "healthbench_hard": "clipped_mean", "healthbench_consensus": "clipped_mean"}
NewTask = Callable[[], Any]
SHOWN_ERRORS, MAX_ERROR_CHARS = 3, 500
RETRIES, RETRY_WAIT_S = 2, 10
GRADER_KEY = "GRADER_API_KEY"


def read_tasks(args: argparse.Namespace) -> dict[str, NewTask]:
    """Returns what makes the task of each evaluation, once its files are read.

    Raises:
        UsageError: a file is missing or wrong, or an evaluation needs a grader.
    """
    graded = [name for name in args.tasks if name.startswith("healthbench")]
    if graded and not (args.grader_url and args.grader_model):
        raise UsageError(f"{graded[0]} is graded by a model: set --grader-url and --grader-model")
    return {name: _read_task(name, args) for name in args.tasks}


def _read_task(name: str, args: argparse.Namespace) -> NewTask:
    module = import_module(f"gptoss.cli.evals.{MODULES[name]}")
    samples = module.samples(name, args)
    return lambda: module.task(name, samples)


def run(tasks: dict[str, NewTask], args: argparse.Namespace, model: str, url: str, api_key: str | None) -> bool:
    """Runs the evaluations at each effort. Returns whether all samples have a score."""
    grader = _grader(args)
    done = [
        _run(new_task(), name, effort, _model(args, effort, model, url, api_key), grader, args)
        for effort in args.effort
        for name, new_task in tasks.items()
    ]
    return all(done)


def _model(args: argparse.Namespace, effort: str, model: str, url: str, api_key: str | None) -> Any:
    from inspect_ai.model import GenerateConfig, get_model

    config = GenerateConfig(
        temperature=args.temperature,
        seed=args.seed,
        reasoning_effort=effort,
        max_connections=args.connections,
        max_tokens=args.max_tokens,
        timeout=round(args.timeout),
    )
    name = f"openai-api/gptoss/{model}"
    # strict: BFCL has schemas that no strict tool may have, such as enums of another type than their property
    return get_model(name, base_url=url, api_key=api_key or "none", config=config, memoize=False, strict_tools=False)


def _run(task: Any, name: str, effort: str, model: Any, grader: Any, args: argparse.Namespace) -> bool:
    """Runs one evaluation, or what is left of it. Returns whether all its samples have a score."""
    from inspect_ai import eval_set

    folder = args.out / (args.label or "run") / effort / name
    folder.mkdir(parents=True, exist_ok=True)
    metric = METRICS.get(name, "accuracy")
    task.metadata = {"task": name, "label": args.label, "effort": effort, "model": model.name, "metric": metric}
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the table's
        success, logs = eval_set(
            task,
            log_dir=str(folder),
            model=model,
            model_roles={"grader": grader} if grader else None,
            epochs=args.epochs,
            continue_on_fail=True,
            retry_attempts=RETRIES,
            retry_wait=RETRY_WAIT_S,
            display="plain" if sys.stderr.isatty() else "none",
            ctl_server=False,
        )
    if not logs:  # inspect-ai 0.3.285 returns success and no logs after ctrl-C
        raise KeyboardInterrupt
    for log in logs:
        _report_errors(f"{name}, effort {effort}", log)
    return bool(success)


def _report_errors(name: str, log: Any) -> None:
    """Writes what went wrong with the first samples that have no score to standard error."""
    from inspect_ai.log import read_eval_log_sample_summaries

    found = [f"sample {s.id}: {s.error}" for s in read_eval_log_sample_summaries(log.location) if s.error]
    if log.error is not None:
        found.append(log.error.message)
    for message in found[:SHOWN_ERRORS]:
        sys.stderr.write(f"error: {name}: {message[-MAX_ERROR_CHARS:]}\n")


def _grader(args: argparse.Namespace) -> Any:
    """Returns the model that grades, None without --grader-url."""
    from inspect_ai.model import GenerateConfig, get_model

    if not (args.grader_url and args.grader_model):
        return None
    return get_model(
        f"openai-api/grader/{args.grader_model}",
        base_url=f"{base_url(args.grader_url)}/v1",
        api_key=os.environ.get(GRADER_KEY) or "none",
        config=GenerateConfig(temperature=0, max_connections=args.connections),
        memoize=False,
    )
