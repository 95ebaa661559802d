"""Compares our server on a CPU with llama.cpp's: the same random weights, the same prompts, the two in turns.

    python bench/against_llama_cpp.py --size mini
    python bench/against_llama_cpp.py --size 20b --cpu-isa avx2

The first run builds llama.cpp's server from the sources in llama-cpp-python's sdist (20 minutes on two cores) and writes
the weights twice, as a checkpoint and as a GGUF file: 30 GB for 20b. Both stay in --cache-dir. In each round one server
is started, measured and ended, then the other; its file is read once before, and it was started once before. The table has medians of the rounds, and
ratios in which more than 1 is better for ours. With --cpu-isa avx2 both servers are held to AVX2.

"beside a busy process": another program keeps one core busy. Roofs come from bench/cpu_roof.cpp: bytes of a token over
the rate of a plain read, and arithmetic of a prompt over the rate of float32 FMA on AVX2.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.cpu_products import roofs
from bench.random_model import write_checkpoint, write_gguf
from gptoss.cached_files import default_cache_folder
from gptoss.cli.remote.load import Target, prefill, repeated_prefix, streams
from gptoss.engine.model.named_sizes import SIZES, VOCAB_SIZE
from gptoss.engine.worker.device_choice import set_threads
from gptoss.kernels.cpu import native
from tests.support.server_process import ServerProcess

PEER = "llama-cpp-python==0.3.36"
AVX2_ONLY = ("NATIVE=OFF", "AVX=ON", "AVX2=ON", "FMA=ON", "F16C=ON", "BMI2=ON")
BUILD = (
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    "LLAMA_USE_PREBUILT_UI=OFF",
    "BUILD_SHARED_LIBS=OFF",
)
FREE_BYTES = {"mini": 3 * 10**9, "20b": 30 * 10**9}
SLOTS, SLOT_TOKENS = 16, 1536
SHORT_WORDS, CLIENTS = 150, 8  # 200 tokens
BUSY = "while True: pass"
LESS_IS_BETTER = ("s", "ms", "GB")


@dataclass(frozen=True)
class Plan:
    """How much is measured: 20b takes a second for what mini does in a hundredth."""

    tokens: int
    prefill: int
    requests: int


PLANS = {"mini": Plan(64, 1000, 48), "20b": Plan(32, 512, 8)}
SHORT = Plan(6, 60, 2)


def require_space(folder: Path, size: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(f.stat().st_size for f in folder.glob(f"{size}*/*"))
    missing = FREE_BYTES[size] - held - shutil.disk_usage(folder).free
    if missing > 0:
        sys.exit(f"error: {folder} needs {missing / 1e9:.1f} GB more of free disk for {size} (--cache-dir)")


def peer_server(cache: Path, isa: str) -> Path:
    """Returns llama.cpp's server, built now or by an earlier run."""
    build = cache / f"build-{isa}"
    server = build / "bin/llama-server"
    if server.exists():
        return server
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            sys.exit(f"error: building llama.cpp needs {tool}")
    flags = [f"GGML_{flag}" for flag in AVX2_ONLY] if isa == "avx2" else ["GGML_NATIVE=ON"]
    source = peer_source(cache) / "vendor/llama.cpp"
    options = [f"-D{flag}" for flag in (*flags, *BUILD, "CMAKE_BUILD_TYPE=Release")]
    subprocess.run(["cmake", "-S", source, "-B", build, *options], check=True)
    subprocess.run(["cmake", "--build", build, "--target", "llama-server", "--parallel"], check=True)
    return server


def peer_source(cache: Path) -> Path:
    folder = cache / PEER.replace("==", "-").replace("-", "_", 2)
    if not folder.exists():
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", "llama-cpp-python", PEER]
        subprocess.run([*pip, "--dest", cache], check=True)
        with tarfile.open(next(cache.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(cache, filter="data")
    return folder


class Side:
    """One of the two servers: how it is started, and what was measured of it."""

    def __init__(self, name: str, files: list[Path], command: list[str] | None, flags: list[str]) -> None:
        self.name, self.files, self.command, self.flags = name, files, command, flags
        self.ready_path = "/ready" if command is None else "/health"
        self.found: dict[str, list[float]] = {}

    @contextlib.contextmanager
    def running(self) -> Iterator[ServerProcess]:
        for file in self.files:
            with file.open("rb") as stream:
                while stream.read(1 << 24):
                    pass
        started = time.perf_counter()
        server = ServerProcess(*self.flags, command=self.command)
        try:
            wait_ready(server, self.ready_path)
            self.add({"command to ready, s": time.perf_counter() - started})
            yield server
        finally:
            server.stop()

    def add(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self.found.setdefault(name, []).append(value)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(values) for name, values in self.found.items()}


def wait_ready(server: ServerProcess, path: str, timeout_s: float = 900.0) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            sys.exit(f"error: a server ended at its start:\n{server.log[-3000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(server.url + path, timeout=5).status_code == 200:
                return
        time.sleep(0.02)
    sys.exit(f"error: a server was not ready after {timeout_s:.0f} s:\n{server.log[-3000:]}")


def resident_bytes(pid: int) -> int:
    """Proportional resident memory of a process and its children: pages of shared files count once."""
    parent = psutil.Process(pid)
    return sum(process.memory_full_info().pss for process in (parent, *parent.children(recursive=True)))


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def one_token_requests(target: Target, count: int) -> float:
    prompts = [target.prompt(SHORT_WORDS) for _ in range(count)]
    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(lambda prompt: target.answer(prompt, 1), prompts))
    return count / (time.perf_counter() - started)


def measure(server: ServerProcess, plan: Plan) -> dict[str, float]:
    """One round of one server. Raises CommandError."""
    target = Target(server.url)
    target.prepare()
    found: dict[str, float] = {}
    for count in (1, 4, 16):
        found[f"{count} streams, tok/s"] = decode_rate(target, count, plan.tokens)
    found[f"prefill of {plan.prefill} words, tok/s"] = prefill(target, plan.prefill)["prefill tok/s"]
    found["repeated prefix, ms"] = repeated_prefix(target, plan.prefill)["repeated-prefix ttft ms"]
    found["1-token requests/s"] = one_token_requests(target, plan.requests)
    found["resident, GB"] = resident_bytes(server.process.pid) / 1e9
    with busy_process():
        time.sleep(1)
        found["1 stream beside a busy process, tok/s"] = decode_rate(target, 1, plan.tokens // 2)
    target.close()
    return found


def decode_rate(target: Target, count: int, tokens: int) -> float:
    """Tokens a second after each stream's first: prompts are measured apart."""
    if count == 1:
        stream = target.stream(target.prompt(32), tokens)
        return (stream.tokens - 1) / (stream.total_s - stream.ttft_s)
    return streams(target, count, tokens)[f"tok/s at {count}"]


def token_cost(size: str, dense_bits: int) -> tuple[float, float]:
    """Bytes that one token reads of the weights, and the operations of one of a prompt."""
    s = SIZES[size]
    dense = s.layers * (s.hidden * 64 * (2 * s.heads + 2 * s.kv_heads) + s.hidden * s.experts)
    head, experts = VOCAB_SIZE * s.hidden, s.layers * 4 * 3 * s.hidden * s.intermediate
    return (dense + head) * dense_bits / 8 + experts * 17 / 32, 2.0 * (dense + experts)


def print_table(sides: list[Side], limits: dict[str, float]) -> None:
    ours, theirs = (side.medians() for side in sides)
    print(f"\n| case | {sides[0].name} | {sides[1].name} | ratio | roof |\n|---|---|---|---|---|")
    for name, value in ours.items():
        ratio = value / theirs[name]
        is_less = name.endswith(LESS_IS_BETTER) and not name.endswith("/s")
        limit = f"{limits[name]:.1f}" if name in limits else ""
        print(f"| {name} | {value:.2f} | {theirs[name]:.2f} | {1 / ratio if is_less else ratio:.2f} | {limit} |")


def sides_of(args: argparse.Namespace, cache: Path, threads: int) -> list[Side]:
    binary = peer_server(cache, args.cpu_isa)
    print(f"writing {args.size} ...", flush=True)
    folder = write_checkpoint(args.size, cache / f"{args.size}-checkpoint")
    gguf = write_gguf(folder, cache / f"{args.size}-gguf" / f"{args.gguf_dense}.gguf", args.gguf_dense)
    s = SIZES[args.size]
    kv_gib = SLOTS * SLOT_TOKENS * s.layers * 2 * s.kv_heads * 64 * 2 / 2**30
    ours = [
        "--model",
        str(folder),
        "--served-model-name",
        "ours",
        "--cpu-isa",
        args.cpu_isa,
        "--num-threads",
        str(threads),
    ]
    ours += [
        "--cpu-kv-cache-gib",
        f"{kv_gib:.3f}",
        "--max-model-len",
        str(SLOT_TOKENS),
        "--num-speculative-tokens",
        "0",
    ]
    ours += ["--dense-dtype", args.dense_dtype, *args.flag]
    peer = ["--threads", str(threads), "--ctx-size", str(SLOTS * SLOT_TOKENS), "--parallel", str(SLOTS), "--no-webui"]
    shards = sorted(folder.glob("*.safetensors"))
    return [Side("ours", shards, None, ours), Side("llama.cpp", [gguf], [str(binary), "--model", str(gguf)], peer)]


def limits_of(args: argparse.Namespace, plan: Plan, threads: int) -> dict[str, float]:
    set_threads(threads)
    with tempfile.TemporaryDirectory() as temporary:
        read, arithmetic = roofs(Path(temporary))
    size, operations = token_cost(args.size, 8 if args.dense_dtype == "int8" else 16)
    print(f"read {read:.1f} GB/s, FMA {arithmetic:.0f} GFLOP/s; a token reads {size / 1e9:.2f} GB")
    prompt = f"prefill of {plan.prefill} words, tok/s"
    return {"1 streams, tok/s": read * 1e9 / size, prompt: arithmetic * 1e9 / operations}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=PLANS, default="mini")
    parser.add_argument("--cpu-isa", choices=("auto", *native.INSTRUCTION_SETS), default="auto")
    parser.add_argument("--dense-dtype", choices=("auto", "int8"), default="auto", help="of our dense matrices")
    parser.add_argument("--gguf-dense", choices=("BF16", "Q8_0"), default="BF16", help="of llama.cpp's")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=psutil.cpu_count(logical=False) or 1)
    parser.add_argument("--cache-dir", type=Path, default=default_cache_folder() / "against-llama-cpp")
    parser.add_argument(
        "--flag", action="append", default=[], help="one more argument of our server, like --flag=--name=value"
    )
    parser.add_argument("--short", action="store_true", help="few tokens: shows that everything runs, measures nothing")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    plan = SHORT if args.short else PLANS[args.size]
    native.choose_instruction_set(args.cpu_isa)
    cache = args.cache_dir.resolve()
    require_space(cache, args.size)
    (cache / f"{args.size}-gguf").mkdir(exist_ok=True)
    sides = sides_of(args, cache, args.threads)
    limits = limits_of(args, plan, args.threads)
    for side in sides:  # kernels compiled, weights re-laid out
        print(f"{side.name}: a first start ...", flush=True)
        with side.running():
            side.found.clear()
    for number in range(args.rounds):
        for side in sides:
            print(f"round {number + 1} of {args.rounds}: {side.name} ...", flush=True)
            with side.running() as server:
                side.add(measure(server, plan))
    print_table(sides, limits)
    if args.json:
        figures: dict[str, Any] = {side.name: side.found for side in sides}
        args.json.write_text(json.dumps(figures | {"roof": limits}, indent=2))


if __name__ == "__main__":
    main()
