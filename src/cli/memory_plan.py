"""Prints the memory plan of a model for a number of equal GPUs, on a machine that needs to have none.

gptoss memory-plan --model 120b --cards 4 --gb 24
gptoss memory-plan --model 20b --gb 24 --kv-cache-dtype fp8 --lm-head-dtype fp8
gptoss memory-plan --table
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, get_args, get_type_hints

from gptoss.cli.remote.options import count, positive
from gptoss.config.engine_keys import DeviceKeys
from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.parallel.memory_plan import GB, MemoryPlan, choose_plan

ENGINE_KEYS = ("kv_cache_dtype", "lm_head_dtype", "speculative_model")
TABLE = ((1, 24), (1, 80), (2, 24), (4, 24), (4, 80), (1, 141))


def plan(model: str, cards: int, gigabytes: float, **keys: Any) -> MemoryPlan:
    """Returns the plan, with `keys` of the engine's configuration.

    Raises:
        ConfigError: the model does not fit, or a key does not go with it.
    """
    if keys.get("speculative_model") is not None:
        keys["gpu_mode"] = "single"  # a draft head works on one rank
    config = EngineConfig(ModelConfig.from_json(hf_config(SIZES[model])), None, load_format="dummy", **keys)
    memory = [int(gigabytes * GB)] * cards
    return choose_plan(config, memory, memory, element=2)


def table() -> str:
    """Returns a Markdown table of both models on common machines."""
    lines = [
        "| model | cards | mode | weights a card, GB | KV cache a card, GB | KV tokens |",
        "|---|---|---|---|---|---|",
    ]
    for model in ("20b", "120b"):
        for cards, gigabytes in TABLE:
            try:
                found = plan(model, cards, gigabytes)
            except ConfigError as error:
                cells = ["does not fit", "-", "-", str(error).rpartition("); ")[2] or "-"]
            else:
                weights = [f"{rank.weight_bytes / GB:.2f}" for rank in found.ranks]
                kv = min(rank.kv_bytes for rank in found.ranks) / GB
                cells = [
                    f"{found.gpu_mode} ({len(found.ranks)})",
                    " / ".join(dict.fromkeys(weights)),
                    f"{kv:.2f}",
                    f"{found.kv_tokens:,}",
                ]
            lines.append(f"| {model} | {cards} x {gigabytes} GB | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(SIZES))
    parser.add_argument("--cards", type=count, default=1, help="number of GPUs")
    parser.add_argument("--gb", type=positive, help="memory of one GPU, in units of 10^9 bytes")
    for name in ("kv_cache_dtype", "lm_head_dtype"):
        flag = f"--{name.replace('_', '-')}"
        choices = get_args(get_type_hints(DeviceKeys)[name])
        parser.add_argument(flag, default="auto", choices=choices, help="as for the server")
    parser.add_argument("--speculative-model", type=Path, metavar="FOLDER", help="a draft head, as for the server")
    parser.add_argument("--table", action="store_true", help="print both models on common machines")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = options_parser()
    args = parser.parse_args(argv)
    if args.table:
        if any(args.__dict__[name] != parser.get_default(name) for name in ENGINE_KEYS):
            parser.error("--table is printed for the server's defaults; give --model and --gb")
        sys.stdout.write(table())
        return 0
    if args.model is None or args.gb is None:
        parser.error("--model and --gb are required without --table")
    try:
        lines = plan(args.model, args.cards, args.gb, **{name: args.__dict__[name] for name in ENGINE_KEYS}).lines()
    except ConfigError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
