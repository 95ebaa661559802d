"""Compiles every kernel for every supported GPU, and prints a table of the results. Needs no GPU.

    make kernel-report                     # all targets; a few minutes
    python -m bench.kernels.report --target 90 --model 120b --json report.json

Instructions per weight are SASS instructions of the main loop times 32 lanes, over the weights that the program
multiplies in one round. The budget is what a GPU can issue while its memory delivers: SMs * 128 * clock / (bandwidth /
0.53125 bytes a weight); at H200's 4.3 TB/s 3.66.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

TARGETS = (80, 89, 90, 100, 120)


def compile_all(jobs: list[tuple[str, int]], workers: int = 0, *, fp8: bool = False) -> list[dict[str, Any]]:
    """Jobs are (model, target). -> a row for each kernel. `fp8`: those of a KV cache in FP8 instead of the others."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    count = workers or len(os.sched_getaffinity(0))
    split = [(model, target, fp8, part, 4) for model, target in jobs for part in range(4)]
    with ProcessPoolExecutor(count, mp_context=context) as pool:
        return [row for rows in pool.map(_compile_part, split) for row in rows]


def _compile_part(job: tuple[str, int, bool, int, int]) -> list[dict[str, Any]]:
    """Every `of`-th case, from the `part`-th on. In a process of its own, which has not seen triton yet."""
    os.environ.pop("TRITON_INTERPRET", None)
    from bench.kernels.cases import cases
    from bench.kernels.cross_compile import SHARED_BYTES, cross_compile
    from bench.kernels.fp8_cases import fp8_cases

    model, target, fp8, part, of = job
    rows = []
    for case in (fp8_cases if fp8 else cases)(model, f"sm_{target}")[part::of]:
        row: dict[str, Any] = {
            "model": model,
            "target": target,
            "kernel": case.name,
            "warps": case.warps,
            "wants_mma": case.mma,
        }
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                made = cross_compile(case, target)
        except Exception as error:
            rows.append(row | {"error": f"{type(error).__name__}: {error}"[:2000]})
            continue
        row |= {f.name: getattr(made, f.name) for f in dataclasses.fields(made) if f.name != "ops"}
        row |= {"shared_limit": SHARED_BYTES[target], "threads": case.warps * 32}
        if case.weights_per_iteration:
            row["per_weight"] = round(made.per_weight(case), 2)
        rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--target", type=int, action="append", choices=TARGETS, help="compute capability; all if not given"
    )
    parser.add_argument("--model", action="append", choices=("20b", "120b"), help="both if not given")
    parser.add_argument("--json", type=Path, help="write the rows here too")
    args = parser.parse_args(argv)
    jobs = [(m, t) for t in args.target or TARGETS for m in args.model or ("20b", "120b")]
    rows = [*compile_all(jobs), *compile_all(jobs, fp8=True)]
    out = sys.stdout.write
    out(
        "| target | model | kernel | warps | registers | spilled B | shared B | instr / weight | wide loads | MMA | "
        "instr | loop | early B |\n"
    )
    out("|---|---|---|---|---|---|---|---|---|---|---|---|---|\n")
    for r in rows:
        if "error" in r:
            out(
                f"| sm_{r['target']} | {r['model']} | {r['kernel']} | {r['warps']} | {r['error'].splitlines()[0][:120]} |\n"
            )
            continue
        out(
            f"| sm_{r['target']} | {r['model']} | {r['kernel']} | {r['warps']} | {r['registers']} | {r['spilled_bytes']} | "
            f"{r['shared_bytes']} | {r.get('per_weight', '-')} | {r['wide_loads']} | {r['mma']} | {r['instructions']} | {r['loop_instructions']} | {r['early_bytes']} |\n"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return int(any("error" in r or r["spilled_bytes"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
