#!/usr/bin/env bash
# triton 3.7.1: in the interpreter, a scalar comparison of floats that meets a block of booleans is a float again.
#
# One would guess: `tl.load(p) >= 1` is an int1 whatever p points to, so that `(tl.arange(0, 8) < 4) | (tl.load(p) >= 1)`
# works, as it does when it is compiled, or fails for every type alike.
# Behaviour: the scalar's value is a NumPy boolean, but its type is still that of its operands, and broadcasting it
# (create_splat) writes it into an array of that type. With an integer pointer the result happens to be right, with a
# float pointer NumPy refuses the bitwise operation. The compiler accepts all of them.
# Source: triton-lang/triton, python/triton/runtime/interpreter.py, create_splat and binary_op.
# No GPU is needed: the compiler builds for sm_90 without one.
#
# Output seen:
#   interpreter  i32   [1, 1, 1, 1, 0, 0, 0, 0]
#   interpreter  i64   [1, 1, 1, 1, 0, 0, 0, 0]
#   interpreter  fp32  InterpreterError: ufunc 'bitwise_or' not supported for the input types, and th
#   interpreter  fp64  InterpreterError: ufunc 'bitwise_or' not supported for the input types, and th
#   compiler     i32   compiles
#   compiler     i64   compiles
#   compiler     fp32  compiles
#   compiler     fp64  compiles
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat >"$dir/show.py" <<'PY'
import os

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = {"i32": torch.int32, "i64": torch.int64, "fp32": torch.float32, "fp64": torch.float64}


@triton.jit
def either(p, out):
    mask = (tl.arange(0, 8) < 4) | (tl.load(p) >= 1)
    tl.store(out + tl.arange(0, 8), mask.to(tl.int32))


def attempt(name):
    try:
        if INTERPRETED:
            out = torch.zeros(8, dtype=torch.int32)
            either[(1,)](torch.zeros(1, dtype=TYPES[name]), out)
            return str(out.tolist())
        triton.compile(ASTSource(either, {"p": f"*{name}", "out": "*i32"}), target=GPUTarget("cuda", 90, 32))
        return "compiles"
    except Exception as error:
        return f"{type(error).__name__}: {str(error.__cause__)[:60]}"


seen = {name: attempt(name) for name in TYPES}
for name, result in seen.items():
    print(f"{'interpreter' if INTERPRETED else 'compiler':<12} {name:<5} {result}")
refused = [name for name, result in seen.items() if "ufunc 'bitwise_or' not supported" in result]
failed = [name for name, result in seen.items() if "Error" in result]
raise SystemExit(0 if refused == failed == (["fp32", "fp64"] if INTERPRETED else []) else "the behaviour changed")
PY
TRITON_INTERPRET=1 "$dir/venv/bin/python" "$dir/show.py"
TRITON_CACHE_DIR="$dir/cache" "$dir/venv/bin/python" "$dir/show.py"
