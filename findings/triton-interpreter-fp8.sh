#!/usr/bin/env bash
# triton 3.7.1: in the interpreter, float32 to float8e4nv turns numbers just below 2 into 1, and does not round to even.
#
# One would guess: `x.to(tl.float8e4nv)` rounds to nearest, ties to even, as torch's cast and the GPU's instruction do, so that
# a kernel that quantises can be tested in the interpreter against torch.
# Behaviour: the rounding bit is added to the mantissa, which is then or-ed with the exponent. Where the mantissa overflows and the
# exponent's last bit is set already, the carry is lost: 1.9375 becomes 1 instead of 2 (3.9, whose exponent is even, becomes 4). Ties
# go up, and numbers below the normal ones (2^-6) are cut off instead of rounded.
# Source: triton-lang/triton, python/triton/runtime/interpreter.py, _convert_float.
#
# Output seen (number, interpreter, torch):
#   carry      1.938     1           2
#   carry      1.96      1           2
#   carry      3.9       4           4
#   tie        1.062     1.125       1
#   tie        1.188     1.25        1.25
#   tie        1.312     1.375       1.25
#   subnormal  0.005078  0.003906    0.005859
#   subnormal  0.001758  0           0.001953
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q torch==2.13.0 triton==3.7.1 numpy==2.4.6
cat >"$dir/show.py" <<'PY'
import torch
import triton
import triton.language as tl


@triton.jit
def convert(x_ptr, out_ptr, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.float8e4nv))


ROWS = [
    ("carry", 1.9375, 1.0, 2.0),
    ("carry", 1.96, 1.0, 2.0),
    ("carry", 3.9, 4.0, 4.0),
    ("tie", 1.0625, 1.125, 1.0),
    ("tie", 1.1875, 1.25, 1.25),
    ("tie", 1.3125, 1.375, 1.25),
    ("subnormal", 2**-8 * 1.3, 2**-8, 2**-8 * 1.5),
    ("subnormal", 2**-9 * 0.9, 0.0, 2**-9),
]
x = torch.tensor([row[1] for row in ROWS])
out = torch.zeros(len(ROWS), dtype=torch.float8_e4m3fn)
convert[(1,)](x, out, N=len(ROWS))
seen, wanted = out.float().tolist(), x.to(torch.float8_e4m3fn).float().tolist()
for (name, number, _, _), interpreted, cast in zip(ROWS, seen, wanted, strict=True):
    print(f"{name:<10} {number:<9.4g} {interpreted:<11.4g} {cast:.4g}")
same = seen == [row[2] for row in ROWS] and wanted == [row[3] for row in ROWS]
raise SystemExit(0 if same else "the behaviour changed")
PY
TRITON_INTERPRET=1 "$dir/venv/bin/python" "$dir/show.py"
