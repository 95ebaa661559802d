#!/usr/bin/env bash
# triton 3.7.1: tl.topk(x, 1) of a one-dimensional block neither compiles nor runs in the interpreter.
#
# One would guess: it is the maximum, as a block of one element: the docstring asks for a power of two, and 1 is one. Or
# else the limit is of the interpreter alone.
# Behaviour: for k = 1 both raise "'dtype' object has no attribute 'numel'" (compiled: as the cause of a
# CompilationError), since the last reduction leaves a scalar, which has no shape. Of a block of two dimensions, k = 1 works.
# Source: triton-lang/triton, python/triton/language/standard.py, sort_impl (`_log2(h.numel)`, `_bitonic_merge_hypercube`).
# No GPU is needed: the compiler builds for sm_90 without one.
#
# Output seen:
#   interpreter  8 k=2    [7.0, 6.0]
#   interpreter  8 k=1    InterpreterError: 'dtype' object has no attribute 'numel'
#   interpreter  2x4 k=2  [3.0, 2.0, 7.0, 6.0]
#   interpreter  2x4 k=1  [3.0, 7.0]
#   compiler     8 k=2    compiles
#   compiler     8 k=1    CompilationError: 'dtype' object has no attribute 'numel'
#   compiler     2x4 k=2  compiles
#   compiler     2x4 k=1  compiles
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


@triton.jit
def line(x, out, k: tl.constexpr):
    tl.store(out + tl.arange(0, k), tl.topk(tl.load(x + tl.arange(0, 8)), k))


@triton.jit
def rows(x, out, k: tl.constexpr):
    block = tl.load(x + tl.arange(0, 2)[:, None] * 4 + tl.arange(0, 4)[None, :])
    tl.store(out + tl.arange(0, 2)[:, None] * k + tl.arange(0, k)[None, :], tl.topk(block, k))


def innermost(error):
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error)


def attempt(kernel, k):
    try:
        if INTERPRETED:
            out = torch.zeros(k if kernel is line else 2 * k)
            kernel[(1,)](torch.arange(8.0), out, k)
            return str(out.tolist())
        signature = {"x": "*fp32", "out": "*fp32", "k": "constexpr"}
        triton.compile(ASTSource(kernel, signature, {"k": k}), target=GPUTarget("cuda", 90, 32))
        return "compiles"
    except Exception as error:
        text = innermost(error)
        missing = "'dtype' object has no attribute 'numel'"
        return f"{type(error).__name__}: " + (missing if missing in text else text)


where = "interpreter" if INTERPRETED else "compiler"
seen = {f"{name} k={k}": attempt(kernel, k) for name, kernel in (("8", line), ("2x4", rows)) for k in (2, 1)}
for name, result in seen.items():
    print(f"{where:<12} {name:<8} {result}")
failures = [name for name, result in seen.items() if "'dtype' object has no attribute 'numel'" in result]
raise SystemExit(0 if failures == ["8 k=1"] else "the behaviour changed")
PY
TRITON_INTERPRET=1 "$dir/venv/bin/python" "$dir/show.py"
TRITON_CACHE_DIR="$dir/cache" "$dir/venv/bin/python" "$dir/show.py"
