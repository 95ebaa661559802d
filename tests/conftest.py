"""Options, the two tiers (suite and nightly), and the report of a run."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import pytest

from gptoss.engine.parallel.gpus import visible_gpus
from tests.support import tiers
from tests.support.report import Report
from tests.support.server_process import LOG_FOLDER

# Triton kernels run on a GPU where there is one, else in triton's interpreter, which must be chosen before anything
# imports triton
if not visible_gpus() or importlib.metadata.version("torch").endswith("+cpu"):
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--report", help="folder for results.json, results.txt and the servers' logs")
    parser.addoption("--nightly", action="store_true", help="the long forms too")
    parser.addoption("--url", help="p0: the server to test; without it one is started")
    parser.addoption("--model", default="nano", help="p0: the model of the server that is started")
    parser.addoption("--any-requests", type=int, help="e2e: requests made from /openapi.json")
    parser.addoption("--profile", default="balanced", help="p0: its profile")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--nightly"):
        os.environ[tiers.VARIABLE] = "1"
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        _keep_to_own_cores(int(worker["workerid"].removeprefix("gw")), worker["workercount"])
        return
    folder = config.getoption("--report")
    if folder:
        Path(folder, "logs").mkdir(parents=True, exist_ok=True)
        os.environ[LOG_FOLDER] = str(Path(folder, "logs").resolve())
        config.pluginmanager.register(Report(config, Path(folder)), "report")


def _keep_to_own_cores(index: int, count: int) -> None:
    """Threads of two workers' servers on the same cores would wait for one another."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if count > len(cores):
            mine = [cores[index % len(cores)]]
        else:
            mine = cores[index * len(cores) // count : (index + 1) * len(cores) // count]
        os.sched_setaffinity(0, mine)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--nightly"):
        return
    later = [item for item in items if item.get_closest_marker("nightly")]
    if later:
        config.hook.pytest_deselected(items=later)
        if hasattr(config, "workeroutput"):
            config.workeroutput["not_selected"] = len(later)
        items[:] = [item for item in items if item not in set(later)]
