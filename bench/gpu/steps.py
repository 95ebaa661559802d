"""The steps of a GPU run, the most useful first. bench/gpu/run.sh runs each in a process with a time limit.

    python -m bench.gpu.steps smoke --out reports/gpu
    python -m bench.gpu.steps table --out reports/gpu      # the results of all steps, as one table

A step appends each row to rows.jsonl immediately, so that the rows of a killed step are kept (rows.py).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench.gpu import rehearse, rows
from bench.gpu.timing import Row, measure_ceilings
from gptoss.engine.worker import kernel_check
from gptoss.kernels.triton import support

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cuda")
CONTEXT = 1024
BATCHES = (1, 8, 32)
SMOKE_BATCHES = (1, 8)
PREFILLS = (1024, 8192)
LONG = ((1, 8192), (1, 32_768))  # batch, context
REPLAYS = 200
RANDOM_STEPS = 100
SERVER_FLAGS = [
    "--load-format",
    "dummy",
    "--max-num-seqs",
    "256",
    "--max-model-len",
    "16384",
    "--no-guided-harmony",
    "--max-num-batched-tokens",
    "4096",
]
STREAMS = (1, 32, 256)  # first what matters most
TOKENS, REQUESTS, PROMPTS = 128, 40, 60
LOAD_S = 35  # of the client, for one number of streams
READY_S = 60
COMPILED = "while serving"  # engine/worker/precompile.py


def smoke() -> Iterator[Row]:
    """Are the numbers right, and the same every time?"""
    from bench.gpu.model import Loaded

    loaded = Loaded("20b", max_tokens=max(9000, 9 * CONTEXT), layers=2)
    row = loaded.check()
    yield row
    if not row.extra["error"] < kernel_check.TOLERANCE:
        with mock.patch.object(support, "PDL_CAPABILITY", (99, 0)):
            yield dataclasses.replace(loaded.check(), name="the same without dependent launches")
    for batch in SMOKE_BATCHES:
        graphs, prepared = loaded.prepared(batch, CONTEXT)
        first = graphs.run(prepared.states).clone()
        same = all(torch.equal(first, graphs.replay(batch)[:batch]) for _ in range(REPLAYS))
        eager = loaded.eager(prepared)
        error = float((eager - first).norm() / first.norm())
        note = f"{REPLAYS} replays alike: {same}; eager differs by {error:.1e}"
        yield Row("smoke", f"graph of batch {batch}", 0.0, note=note, extra={"same": same, "eager": error})
    yield _sampled()
    yield loaded.compilations(RANDOM_STEPS)


def _sampled() -> Row:
    """Greedy and drawn tokens against plain torch."""
    from gptoss.kernels.triton import sampling

    g = torch.Generator(device=DEVICE).manual_seed(0)
    vocab = 201_088 if DEVICE.type == "cuda" else rehearse.VOCAB
    logits = torch.randn(32, vocab, device=DEVICE, generator=g) * 2
    temperature = torch.rand(32, device=DEVICE, generator=g).add_(0.3)
    temperature[::2] = 0.0
    uniform = torch.rand(32, device=DEVICE, generator=g)
    mask_rows = torch.full((32,), -1, dtype=torch.int32, device=DEVICE)
    words = torch.zeros(1, -(-vocab // 32), dtype=torch.int32, device=DEVICE)
    given = (logits, temperature, uniform, mask_rows, words)
    found, expected = sampling.pick(*given).tokens, sampling.pick_ref(*given)[0]
    alike = int((found == expected).sum())
    return Row("smoke", "tokens as by torch", 0.0, note=f"{alike} of 32", extra={"alike": alike})


def decode(model: str) -> Iterator[Row]:
    from bench.gpu.model import Loaded, launches

    loaded = Loaded(model, max_tokens=max(BATCHES) * (CONTEXT + 128))
    for batch in BATCHES:
        yield loaded.decode(batch, CONTEXT)
    if model == "20b":
        yield from launches()
    else:
        yield loaded.check()


def profile(model: str) -> Iterator[Row]:
    """Where a step's time goes: the kernels of replayed graphs, as they follow one another."""
    from bench.gpu.model import Loaded

    loaded = Loaded(model, max_tokens=max(BATCHES) * (CONTEXT + 128))
    for batch in (BATCHES[0], BATCHES[-1]):
        graphs, prepared = loaded.prepared(batch, CONTEXT)
        graphs.run(prepared.states)
        for name, us, calls in profiled(lambda g=graphs, b=batch: g.replay(b), 20):
            note = f"{calls} a step"
            yield Row("profile", f"{model} batch {batch} {name}", us, note=note, extra={"calls": calls})


def profiled(run: Callable[[], object], repeats: int) -> list[tuple[str, float, int]]:
    """-> (kernel, us a call, calls a run), the costliest first."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    events = sorted(found.key_averages(), key=lambda e: -e.device_time_total)
    return [(e.key[:60], e.device_time_total / e.count, e.count // repeats) for e in events if e.count]


def prefill(model: str) -> Iterator[Row]:
    from bench.gpu.model import Loaded

    loaded = Loaded(model, max_tokens=max(40_000, *PREFILLS) if DEVICE.type == "cuda" else 300)
    for tokens in PREFILLS:
        yield loaded.prefill(tokens)
    for batch, context in LONG:
        yield loaded.decode(batch, context)


def http(model: str, out: Path, flags: list[str]) -> Iterator[Row]:
    """The server with random weights, and bench/serve.py as its client; then prompts of many lengths."""
    with server(model, out, flags) as (url, ready_s):
        yield Row("http", f"{model} ready", ready_s * 1e6, note=f"{ready_s:.0f} s")
        for streams in STREAMS:
            yield _load(url, model, streams, out)
        yield _prompts(url, model, PROMPTS, out)


def _load(url: str, model: str, streams: int, out: Path) -> Row:
    found = out / f"http-{streams}.json"
    figures = {"--streams": streams, "--tokens": TOKENS, "--requests": REQUESTS, "--repeat": 1, "--json": found}
    command = [sys.executable, "bench/serve.py", "--url", url]
    command += [str(word) for pair in figures.items() for word in pair]
    with (out / "http.txt").open("a") as log:
        try:
            code = subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, timeout=LOAD_S, check=False).returncode
            note = "" if code == 0 else f"FAILED exit code {code}, see http.txt; "
        except subprocess.TimeoutExpired:
            note = f"FAILED not done in {LOAD_S} s; "
    result = json.loads(found.read_text())["results"] if found.exists() else {}
    found.unlink(missing_ok=True)
    note += json.dumps(result)[:400]
    return Row("http", f"{model} streams {streams}", 0.0, note=note, extra={"serve": result})


def _prompts(url: str, model: str, count: int, out: Path) -> Row:
    """The longest wait for a first token among prompts of random lengths: a compilation in between would show."""
    import httpx

    rng, waits = random.Random(0), []
    name = httpx.get(f"{url}/v1/models", timeout=60).json()["data"][0]["id"]
    for _ in range(count):
        length = rng.randint(5, 256)
        body = {"model": name, "prompt": [rng.randrange(1000, 9000) for _ in range(length)], "max_tokens": 1}
        started = time.perf_counter()
        httpx.post(f"{url}/v1/completions", json=body, timeout=60).raise_for_status()
        waits.append((time.perf_counter() - started) * 1e3)
    waits.sort()
    compiled = (out / "server.txt").read_text(errors="replace").count(COMPILED)
    note = f"median {waits[count // 2]:.1f} ms, worst {waits[-1]:.1f} ms, {compiled} kernels compiled while serving"
    name = f"{model} {count} prompts of 5 to 256 tokens"
    return Row("http", name, waits[-1] * 1e3, note=note, extra={"compiled": compiled})


@contextlib.contextmanager
def server(model: str, out: Path, flags: list[str]) -> Iterator[tuple[str, float]]:
    """-> its address, and the seconds until it was ready."""
    from tests.support.server_process import free_port

    port, started = free_port(), time.monotonic()
    command = [sys.executable, "src/server.py", "--model", model, "--port", str(port), *flags]
    with (out / "server.txt").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        try:
            _wait_ready(port, process)
            yield f"http://127.0.0.1:{port}", time.monotonic() - started
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def _wait_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    import httpx

    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {process.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2).status_code == 200:
                return
        time.sleep(0.3)
    raise RuntimeError(f"the server was not ready within {READY_S} s")


def kernels(model: str) -> Iterator[Row]:
    """Each kernel by itself, with a cold cache: for the launch table, not for the headline."""
    from bench.gpu.kernels import Layer

    layer = Layer(model)
    for tokens in (1, 32) if DEVICE.type == "cuda" else (2,):
        for bench in layer.benches(tokens, CONTEXT):
            yield bench.row("kernels")


def once(model: str) -> Iterator[Row]:
    """A launch of each decode kernel at batch 1, for a profiler that is told to watch them."""
    from bench.gpu.kernels import Layer

    for bench in Layer(model).benches(1 if DEVICE.type == "cuda" else 2, CONTEXT):
        if "cuBLAS" not in bench.name:
            bench.launch(bench.config())
            yield Row("once", bench.name, 0.0)


def rows_of(step: str, model: str, out: Path, flags: list[str]) -> Iterator[Row]:
    if step == "smoke":
        return smoke()
    if step == "http":
        return http(model, out, flags)
    return {"decode": decode, "profile": profile, "prefill": prefill, "kernels": kernels, "once": once}[step](model)


def run(step: str, model: str, out: Path, flags: list[str]) -> int:
    """Appends the step's rows; one that fails leaves a row that says so. -> exit code."""
    ceilings = _ceilings(out)
    code = 0
    name = os.environ.get("STEP", step)  # as run.sh calls it

    def write(row: Row) -> None:
        line = row.as_dict(ceilings) | {"step": name}
        rows.append(out, line)
        show(line)

    try:
        for row in rows_of(step, model, out, flags):
            write(row)
    except Exception as error:
        traceback.print_exc()
        code = 1
        write(Row(step, model, 0.0, note=f"FAILED {type(error).__name__}: {error}"[:300]))
    return code


def _ceilings(out: Path) -> dict[str, float]:
    """Measured once for all steps."""
    found = _kept_ceilings(out)
    if not found:
        found = measure_ceilings() if DEVICE.type == "cuda" else rehearse.CEILINGS
        (out / "ceilings.json").write_text(json.dumps(found))
    return found


def _kept_ceilings(out: Path) -> dict[str, float]:
    """What an earlier step measured; nothing if there is none, or it was killed while it wrote."""
    try:
        found = json.loads((out / "ceilings.json").read_text())
    except (OSError, ValueError):
        return {}
    return dict(found) if isinstance(found, dict) else {}


def show(line: dict[str, Any]) -> None:
    figures = [f"{line['us']:,.1f} us" if line["us"] else "-"]
    if "tb_s" in line:
        figures.append(f"{line['tb_s']:.2f} TB/s ({line['of_copy']:.0%} of copy)")
    if "tflop_s" in line:
        figures.append(f"{line['tflop_s']:.0f} TFLOP/s ({line['of_matmul']:.0%} of matmul)")
    sys.stdout.write(f"| {line['section']} | {line['name']} | {' | '.join(figures)} | {line['note']} |\n")
    sys.stdout.flush()


def table(out: Path, of: Sequence[str] = ()) -> int:
    """What all steps left, once more and as results.json; 1 if one of the steps `of` (none: all) failed."""
    lines = rows.read_rows(out)
    sys.stdout.write("\n| step | what | figures | note |\n|---|---|---|---|\n")
    for line in lines:
        show(line)
    if not lines:
        sys.stdout.write(f"| - | no step has left a row in {out} | - | - |\n")
    failed = [line for line in lines if "FAILED" in line["note"]]
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "rehearsal on a CPU"
    summary = {"device": name, "versions": versions, "ceilings": _kept_ceilings(out)}
    summary |= {"failed": sorted({line.get("step", line["section"]) for line in failed}), "rows": lines}
    (out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(not lines or any(not of or line.get("step") in of for line in failed))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("smoke", "decode", "profile", "prefill", "http", "kernels", "once", "table")
    parser.add_argument("step", choices=names)
    parser.add_argument("--model", default="20b", choices=("20b", "120b", "nano"))
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"))
    parser.add_argument("--of", nargs="*", default=(), help="table: the steps of run.sh that the exit code is about")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.step == "table":
        return table(args.out, args.of)
    if rehearse.wanted():
        flags = [] if args.step == "http" else SERVER_FLAGS
        with rehearse.on_a_cpu():
            return run(args.step, "nano" if args.step == "http" else args.model, args.out, flags)
    if not torch.cuda.is_available():
        sys.stderr.write("no NVIDIA GPU here: REHEARSE=1 runs the steps on a tiny model\n")
        return 3
    return run(args.step, args.model, args.out, SERVER_FLAGS)


if __name__ == "__main__":
    from bench.gpu import steps  # the module that a rehearsal changes, and not this copy of it

    sys.exit(steps.main())
