"""Measures the CPU kernels' matrix products in the shapes of gpt-oss-20b against the limits of memory and cores.

    python bench/cpu_products.py [--isa avx2] [--rows 1 4 16 128 512] [--vs FOLDER | --int8]

With one row a product is bound by reading its weights (GB/s), with many by arithmetic (GFLOP/s). The limits are a plain
read of memory and chains of float32 FMA on AVX2. --vs: the kernels folder of another version (its `native.cpp`), called
alternately with this one's. --int8: the dense products with int8 weights alternately with bfloat16; the last column is
the time of bfloat16 / int8. --threads 1 counts CPU time, not time on the clock: for a machine that has other work.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.engine.worker.device_choice import set_threads
from gptoss.kernels.cpu import native
from gptoss.kernels.mxfp4 import Mxfp4Tensor

HIDDEN, INTERMEDIATE, EXPERTS, PER_TOKEN = 2880, 2880, 32, 4
DENSE = {"QKV": (5120, HIDDEN), "O": (HIDDEN, 4096), "head": (201_088, HIDDEN)}
SECONDS = 2.0
FEW_ROWS = 4  # up to here the weights' bytes are what counts

Library = ctypes.CDLL


def compiled(source: Path, flags: tuple[str, ...], folder: Path) -> Library:
    """-> the library, its OpenMP symbols taken from torch's as native.py does."""
    target = folder / f"{source.stem}-{source.parent.name}"
    compile_to = ["c++", *native.COMPILE_FLAGS, *flags, "-w", "-c", str(source), "-o"]
    subprocess.run([*compile_to, f"{target}.o"], check=True)
    subprocess.run(["c++", "-shared", "-pthread", f"{target}.o", "-o", f"{target}.so"], check=True)
    return Library(f"{target}.so")


def seconds_of(run: Callable[[], object], wanted: float = SECONDS) -> float:
    """-> the median time of one call."""
    run()
    taken: list[float] = []
    while sum(taken) < wanted or len(taken) < 3:
        started = time.perf_counter()
        run()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def roofs(folder: Path) -> tuple[float, float]:
    """-> (GB/s of a plain read, GFLOP/s of float32 FMA)."""
    library = compiled(Path(__file__).with_name("cpu_roof.cpp"), ("-mavx2", "-mfma"), folder)
    library.read_all.restype = library.multiply_add.restype = ctypes.c_double
    data = torch.ones(1 << 30, dtype=torch.uint8)
    address = ctypes.c_void_p(data.data_ptr())
    read = seconds_of(lambda: library.read_all(address, ctypes.c_int64(data.numel())))
    rounds = 20_000_000
    flops = rounds * 12 * 8 * 2 * torch.get_num_threads()
    return data.numel() / read / 1e9, flops / seconds_of(lambda: library.multiply_add(ctypes.c_int64(rounds))) / 1e9


class Version:
    """Calls the kernels of one library; ours, or an earlier one's with its own arguments."""

    def __init__(self, library: Library | None) -> None:
        self._library = library

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        if self._library is None:
            native.linear(x, weight)
            return
        out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)
        scales = [None] if hasattr(self._library, "quantize_int8") else []  # earlier versions have no such argument
        pointers = [t.data_ptr() if t is not None else 0 for t in (x, weight, *scales, None, None, out)]
        sizes = [x.shape[0], *weight.shape]
        self._library.linear(*map(ctypes.c_void_p, pointers), 0, *map(ctypes.c_int64, sizes))

    def moe(self, x: torch.Tensor, experts: torch.Tensor, w: MoeWeights) -> None:
        shares = torch.full(experts.shape, 1 / PER_TOKEN)
        if self._library is None:
            native.moe(x, experts, shares, w.w1, w.b1, w.w2, w.b2, x, 7.0)
            return
        rows = experts.numel()
        out, parts = torch.empty_like(x), torch.empty(rows, HIDDEN)
        is_early = not hasattr(self._library, "quantize_int8")
        middle = [torch.empty(rows, INTERMEDIATE, dtype=x.dtype)] if is_early else []  # 0.20's further argument
        tensors = (
            x,
            experts,
            shares,
            w.w1.blocks,
            w.w1.scales,
            w.b1,
            w.w2.blocks,
            w.w2.scales,
            w.b2,
            x,
            out,
            *middle,
            parts,
        )
        sizes = (x.shape[0], PER_TOKEN, EXPERTS, HIDDEN, INTERMEDIATE)
        pointers = (ctypes.c_void_p(t.data_ptr()) for t in tensors)
        layout = ctypes.c_void_p(0), ctypes.c_int64(0)  # which earlier versions do not look at
        self._library.moe(*pointers, ctypes.c_float(7.0), *map(ctypes.c_int64, sizes), *layout)


class MoeWeights:
    def __init__(self) -> None:
        def packed(rows: int, columns: int) -> Mxfp4Tensor:
            blocks = torch.randint(0, 256, (EXPERTS, rows, columns // 32, 16), dtype=torch.uint8)
            scales = torch.randint(115, 123, (EXPERTS, rows, columns // 32), dtype=torch.uint8)
            return Mxfp4Tensor(blocks, scales)

        self.w1, self.w2 = packed(2 * INTERMEDIATE, HIDDEN), packed(HIDDEN, INTERMEDIATE)
        self.b1 = torch.randn(EXPERTS, 2 * INTERMEDIATE).bfloat16()
        self.b2 = torch.randn(EXPERTS, HIDDEN).bfloat16()


def compare(name: str, calls: list[Callable[[], None]], gigabytes: float, gflop: float) -> None:
    """Prints the rate of each call, taken in turns, and the first one's time as a share of the other's."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    started = time.perf_counter()
    while time.perf_counter() - started < SECONDS * len(calls) or len(taken[0]) < 3:
        for call, times in zip(calls, taken, strict=True):
            begun = clock()
            call()
            times.append(clock() - begun)
    medians = [statistics.median(times) for times in taken]
    line = f"{name:14}{1e3 * medians[0]:9.2f} ms{gigabytes / medians[0]:9.1f} GB/s{gflop / medians[0]:9.1f} GFLOP/s"
    print(line + (f"{medians[1] / medians[0]:9.2f}x" if len(medians) == 2 else ""))


def dense(name: str, rows: int, versions: list[Version]) -> None:
    shape = DENSE[name]
    size = 2 * shape[0] * shape[1]
    copies = [torch.rand(shape).sub(0.5).bfloat16() for _ in range(max(1, int(2e8 // size)))]
    x = torch.randn(rows, shape[1]).bfloat16()
    turns = [0] * len(versions)

    def call(
        index: int,
    ) -> None:  # on other weights each time: the caches hold none of them, nor what the other has read
        turns[index] += 1
        versions[index].linear(x, copies[(turns[index] + index * len(copies) // 2) % len(copies)])

    calls = [lambda i=i: call(i) for i in range(len(versions))]
    compare(f"{name}, {rows}", calls, size / 1e9, 2e-9 * rows * shape[0] * shape[1])


def dense_int8(name: str, rows: int) -> None:
    """Prints int8's rates, and the time of bfloat16 divided by its own."""
    outputs, inputs = DENSE[name]
    copies = [torch.rand(outputs, inputs).sub(0.5).bfloat16() for _ in range(max(1, int(1e8 // (outputs * inputs))))]
    small = [native.quantize_int8(weight) for weight in copies]
    x = torch.randn(rows, inputs).bfloat16()
    turns = itertools.count()
    calls = [
        lambda: native.linear(x, small[next(turns) // 2 % len(small)]),
        lambda: native.linear(x, copies[next(turns) // 2 % len(copies)]),
    ]
    bytes_read = outputs * (inputs + 4)
    compare(f"{name} int8, {rows}", calls, bytes_read / 1e9, 2e-9 * rows * outputs * inputs)


def experts(rows: int, weights: MoeWeights, versions: list[Version]) -> None:
    x = torch.randn(rows, HIDDEN).bfloat16()
    chosen = [torch.stack([torch.randperm(EXPERTS)[:PER_TOKEN] for _ in range(rows)]) for _ in range(8)]
    turns = [0] * len(versions)

    def call(index: int) -> None:
        turns[index] += 1
        versions[index].moe(x, chosen[(turns[index] + index * len(chosen) // 2) % len(chosen)], weights)

    used = statistics.mean(len(set(ids.flatten().tolist())) for ids in chosen)
    size = 3 * HIDDEN * INTERMEDIATE / 32 * 17
    calls = [lambda i=i: call(i) for i in range(len(versions))]
    flop = 2e-9 * rows * PER_TOKEN * 3 * HIDDEN * INTERMEDIATE
    compare(f"W1 + W2, {rows}", calls, used * size / 1e9, flop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", default="auto", choices=("auto", *native.INSTRUCTION_SETS))
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--threads", type=int, default=0)
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--vs", type=Path, help="folder of another version's native.cpp")
    other.add_argument("--int8", action="store_true", help="compare int8 weights with bfloat16")
    args = parser.parse_args()
    native.choose_instruction_set(args.isa)
    if native.library() is None:
        sys.exit("the CPU kernels do not run here")
    set_threads(args.threads)
    torch.manual_seed(0)
    flags = native.instruction_flags()
    assert flags is not None
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        read, arithmetic = roofs(folder)
        print(f"{'roof':14}{'':12}{read:9.1f} GB/s{arithmetic:9.1f} GFLOP/s (FMA on AVX2)")
        versions = [Version(None)]
        if args.vs:
            versions.append(Version(compiled(args.vs / "native.cpp", flags, folder)))
        weights = None if args.int8 else MoeWeights()
        for rows in args.rows:
            for name in DENSE:
                if name != "head" or rows <= 16:  # only the last position of a prompt needs it
                    dense_int8(name, rows) if weights is None else dense(name, rows, versions)
            if weights is not None:
                experts(rows, weights, versions)


if __name__ == "__main__":
    main()
