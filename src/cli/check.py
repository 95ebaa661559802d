"""Shows what this machine has and lacks for a server, with a remedy for each lack.

    gptoss check [--model 20b] [--json]

No server is started; nothing is downloaded, compiled or loaded. One sandbox is started and ended.

exit codes: 0 a server can start, 1 something is missing, 2 usage
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from gptoss.cli.machine import memory, software
from gptoss.cli.machine.finding import Finding
from gptoss.cli.machine.sandbox import python_sandbox
from gptoss.cli.remote.errors import NO, OK
from gptoss.cli.remote.options import command_parser, port_number
from gptoss.cli.terminal.style import Style
from gptoss.config.profiles import PROFILES
from gptoss.engine.parallel.gpus import visible_gpus

COLOURS = {"ok": "green", "note": "yellow", "missing": "red"}


def main(argv: list[str] | None = None) -> int:
    args = options_parser().parse_args(argv)
    os.environ["HF_HUB_OFFLINE"] = "1"  # a checkpoint is looked for, not downloaded
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as the server does
    findings = check(args.model, args.model_path, args.host, args.port)
    lacking = any(finding.state == "missing" for finding in findings)
    if args.json:
        answer = {"can_serve": not lacking, "findings": [asdict(finding) for finding in findings]}
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
    else:
        style = Style.of(sys.stdout)
        sys.stdout.write("".join(line + "\n" for finding in findings for line in lines(finding, style)))
    return NO if lacking else OK


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = command_parser(__doc__ or "", epilog="")
    parser.add_argument("--model", help="as for `gptoss serve` (default: what it would serve here)")
    parser.add_argument("--model-path", type=Path, metavar="DIR", help="as for `gptoss serve`")
    parser.add_argument("--host", default="127.0.0.1", help="address to serve on (default: %(default)s)")
    parser.add_argument("--port", type=port_number, default=8000, help="port to serve on (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def check(model: str | None, model_path: Path | None, host: str, port: int) -> list[Finding]:
    """Returns one finding for each thing that a server needs."""
    gpus = visible_gpus()
    chosen = model or (str(model_path) if model_path else PROFILES["balanced"].model if gpus else "nano")
    checkpoint, located = memory.checkpoint(chosen, model_path)
    return [
        software.python(),
        software.packages(),
        software.torch_build(has_gpu=bool(gpus)),
        software.gpu(gpus),
        software.compiler(has_gpu=bool(gpus)),
        software.instructions(has_gpu=bool(gpus)),
        checkpoint,
        memory.plan(chosen, located, gpus),
        memory.cache_folder(),
        software.port(host, port),
        python_sandbox(),
    ]


def lines(finding: Finding, style: Style) -> list[str]:
    """Returns the finding for people, its remedy on a line of its own."""
    shown = [f"{style(f'{finding.state:9}', COLOURS[finding.state])}{finding.name:13}{finding.text}"]
    return shown + ([f"{'':22}remedy: {finding.remedy}"] if finding.remedy else [])
