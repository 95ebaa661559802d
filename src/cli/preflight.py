"""Checks whether a model can be tested on this machine, before anything is started.

gptoss preflight --model 20b      # exit code 0, or 3 and what is missing
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from gptoss.cached_files import default_cache_folder
from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.parallel.gpus import Gpu, visible_gpus
from gptoss.engine.parallel.memory_plan import GB, choose_plan
from gptoss.model_locator import locate_model

MISSING = 3


def missing(model: str, model_path: Path | None, gpus: list[Gpu]) -> list[str]:
    """Returns what is missing, one sentence each. The embedded model needs nothing."""
    if model == "nano":
        return []
    found = []
    try:
        located = locate_model(model, model_path, default_cache_folder())
    except ConfigError as error:
        found.append(f"checkpoint: {error}")
        located = locate_model(model, None, default_cache_folder(), dummy=True)
    if not gpus:
        return [*found, f"GPU: none is visible; the tests of {model} need one that holds its weights"]
    config = EngineConfig(located.config, None, load_format="dummy")
    try:
        choose_plan(config, [g.free_bytes for g in gpus], [g.total_bytes for g in gpus], element=2)
    except ConfigError as error:
        free = ", ".join(f"{g.name} {g.free_bytes / GB:.0f} GB free" for g in gpus)
        found.append(f"GPU memory ({free}): {error}")
    return found


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("nano", "20b", "120b"), required=True)
    parser.add_argument("--model-path", type=Path)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    problems = missing(args.model, args.model_path, visible_gpus())
    for problem in problems:
        sys.stderr.write(f"missing for {args.model}: {problem}\n")
    return MISSING if problems else 0


if __name__ == "__main__":
    sys.exit(main())
