#!/usr/bin/env bash
# triton 3.7.1 and 3.6.0: the order in which tl.sum adds a column depends on num_warps, though each column stays in one warp.
#
# One would guess: of a bf16 tile [64, 16] whose columns are contiguous, tl.sum(x, axis=0) adds each column inside one warp with
# 4 warps and with 8, so that more warps only share out the columns and every sum has the same bits.
# Behaviour: a thread loads up to 16 bytes along the contiguous axis, here 8 numbers, but at most elements / threads. With 8 warps
# that is 4, so a column lies in 16 threads of a warp instead of 8. A thread adds its own numbers one after another and the threads
# add theirs in pairs (shfl.bfly), so the order is another. The column 2^25, 0, 0, 0, 1, 0, 0, 0, -2^25, 0, ... then sums to 1
# instead of 0 in float32 (worked out below in that order). A tile [64, 64] has enough numbers: its order stays.
# What to do: where the bits of a sum matter, tune neither num_warps nor the tile's size (16 or 64 columns differ with 8 warps too),
# or try only values that leave each thread at least 16 bytes of the tile.
# Source: triton-lang/triton, lib/Dialect/TritonGPU/Transforms/CoalesceUtils.cpp (`perThread`, `numElems / numThreads`).
# Neither a GPU nor torch is needed: the compiler builds for sm_90 and sm_100 (which give the same lines) without them.
#
# Output seen (the layout at tt.reduce, the distances of the shuffles, the sum of that column):
#   3.7.1  [64, 16]  2 warps  size [8, 1]  threads [8, 4]   warps [1, 2]  shuffles [4, 2, 1]     sum 0.0
#   3.7.1  [64, 16]  4 warps  size [8, 1]  threads [8, 4]   warps [1, 4]  shuffles [4, 2, 1]     sum 0.0
#   3.7.1  [64, 16]  8 warps  size [4, 1]  threads [16, 2]  warps [1, 8]  shuffles [8, 4, 2, 1]  sum 1.0
#   3.7.1  [64, 64]  2 warps  size [8, 1]  threads [8, 4]   warps [1, 2]  shuffles [4, 2, 1]     sum 0.0
#   3.7.1  [64, 64]  4 warps  size [8, 1]  threads [8, 4]   warps [1, 4]  shuffles [4, 2, 1]     sum 0.0
#   3.7.1  [64, 64]  8 warps  size [8, 1]  threads [8, 4]   warps [1, 8]  shuffles [4, 2, 1]     sum 0.0
#   and the same six lines for 3.6.0
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cat >"$dir/show.py" <<'PY'
import ctypes
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

COLUMN = [2.0**25, 0, 0, 0, 1, 0, 0, 0, -(2.0**25)] + [0] * 55


@triton.jit
def sums(x, out, K: tl.constexpr, M: tl.constexpr):
    tile = tl.load(x + tl.arange(0, K)[:, None] + tl.arange(0, M)[None, :] * K)
    tl.store(out + tl.arange(0, M), tl.sum(tile.to(tl.float32), axis=0))


def order(columns, warps, arch):
    signature = {"x": "*bf16", "out": "*fp32", "K": "constexpr", "M": "constexpr"}
    source = ASTSource(sums, signature, {"K": 64, "M": columns}, {(0,): [["tt.divisibility", 16]]})
    asm = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}).asm
    name = re.search(rf'"tt\.reduce".*?\}}\) : \(tensor<64x{columns}xf32, (#\w+)>\)', asm["ttgir"], re.DOTALL).group(1)
    layout = re.search(rf"^{name} = #ttg\.blocked<(.*)>$", asm["ttgir"], re.MULTILINE).group(1)
    parts = [re.search(rf"{part} = (\[.*?\])", layout).group(1) for part in ("sizePerThread", "threadsPerWarp", "warpsPerCTA")]
    distances = {int(distance) for distance in re.findall(r"shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+, (\d+),", asm["ptx"])}
    return *parts, sorted(distances, reverse=True)


def float32_sum(numbers):
    total = 0.0
    for number in numbers:
        total = ctypes.c_float(total + number).value
    return total


def column_sum(size, distances):
    threads = [float32_sum(COLUMN[start : start + size]) for start in range(0, len(COLUMN), size)]
    for distance in distances:
        threads = [float32_sum([number, threads[at ^ distance]]) for at, number in enumerate(threads)]
    return threads[0]


eight, four = ("[8, 1]", "[8, 4]", [4, 2, 1], 0.0), ("[4, 1]", "[16, 2]", [8, 4, 2, 1], 1.0)
changed = False
for columns in (16, 64):
    for warps in (2, 4, 8):
        size, threads, of_warps, distances = order(columns, warps, 90)
        total = column_sum(int(size[1]), distances)
        print(
            f"{triton.__version__}  [64, {columns}]  {warps} warps  size {size}  threads {threads:<7}  warps {of_warps}"
            f"  shuffles {distances!s:<12}  sum {total}"
        )
        changed |= (size, threads, distances, total) != (four if (columns, warps) == (16, 8) else eight)
        changed |= of_warps != f"[1, {warps}]" or order(columns, warps, 100) != (size, threads, of_warps, distances)
raise SystemExit("the behaviour changed" if changed else 0)
PY
for version in 3.7.1 3.6.0; do
  python3 -m venv "$dir/$version"
  "$dir/$version/bin/pip" install -q "triton==$version"
  TRITON_CACHE_DIR="$dir/cache" "$dir/$version/bin/python" "$dir/show.py"
done
