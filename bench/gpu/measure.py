"""All that one GPU can tell in a few minutes, as one table and one JSON file. bench/gpu/run.sh calls it.

    python -m bench.gpu.measure --out reports/gpu [--sections kernels model http anchor] [--models 20b 120b]

Sections run in processes of their own, so that one that fails leaves the others; what failed is a row of the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = ("ceilings", "launches", "kernels", "model", "http", "anchor")
TIMEOUT_S = {"kernels": 240, "model": 300, "http": 200, "anchor": 60}
DECODE = ((1, 1024), (8, 1024), (32, 1024), (128, 1024), (1, 8192), (8, 8192), (32, 8192))
MIN_BYTES = {"20b": 20e9, "120b": 90e9}  # of GPU memory, weights, cache and temporaries


def rows_of(section: str, model: str) -> Iterator[Any]:
    """Rows of one section, as they come. Imports torch and triton here: this process is the section's own."""
    from bench.gpu.timing import Row

    if section == "launches":
        from bench.gpu.model import launches

        yield from launches()
    elif section == "kernels":
        from bench.gpu.kernels import Layer

        layer = Layer(model)
        for tokens in (1, 8, 32, 128, 8192):
            for bench in layer.benches(tokens):
                try:
                    yield bench.row("kernels")
                except Exception as error:
                    yield Row(
                        "kernels",
                        bench.name,
                        0.0,
                        note=f"FAILED {type(error).__name__}: {error}"[:300],
                    )
    elif section == "model":
        yield from _model_rows(model)
    elif section == "anchor":
        from bench.gpu import anchor

        yield from anchor.rows(model, (1, 8, 32, 128, 8192))
    elif section == "http":
        yield from _http_rows(model)


def _model_rows(model: str) -> Iterator[Any]:
    from bench.gpu.model import Loaded
    from bench.gpu.timing import Row

    started = time.perf_counter()
    loaded = Loaded(model, max_tokens=300_000)
    us = (time.perf_counter() - started) * 1e6
    yield Row("model", f"{model} weights made", us, note=f"{loaded.bytes / 1e9:.2f} GB")
    jobs: list[tuple[str, Any]] = [("check", loaded.check)]
    jobs += [(f"decode {b} at {c}", lambda b=b, c=c: loaded.decode(b, c)) for b, c in DECODE]
    jobs += [(f"prefill {n}", lambda n=n: loaded.prefill(n)) for n in (1024, 8192)]
    for name, job in jobs:
        try:
            yield job()
        except Exception as error:
            traceback.print_exc()
            yield Row(
                "model",
                f"{model} {name}",
                0.0,
                note=f"FAILED {type(error).__name__}: {error}"[:300],
            )
    if model == "20b":
        del loaded
        yield Loaded(model, max_tokens=20_000, invariant=True).invariance()


def _http_rows(model: str) -> Iterator[Any]:
    """The server with random weights, and bench/serve.py as its client."""
    from bench.gpu.timing import Row
    from tests.server_process import free_port

    port = free_port()
    flags = ["--model", model, "--load-format", "dummy", "--port", str(port), "--max-num-seqs", "256",
    "--max-model-len", "16384",
             "--guided-harmony", "false", "--max-num-batched-tokens", "4096"]  # fmt: skip
    server = subprocess.Popen([sys.executable, "src/server.py", *flags], cwd=ROOT)
    try:
        _wait_ready(port, server)
        found = ROOT / "reports" / "gpu-http.json"
        found.parent.mkdir(exist_ok=True)
        command = [sys.executable, "bench/serve.py", "--url", f"http://127.0.0.1:{port}", "--streams", "1", "32", "256",
                   "--tokens", "128", "--repeat", "2", "--json", str(found)]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        yield Row(
            "http", f"{model} bench/serve.py", 0.0, note=done.stdout[-1500:] or done.stderr[-800:]
        )
    finally:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        server.kill()


def _wait_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    import httpx

    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise RuntimeError(f"the server ended with exit code {server.returncode}")
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(f"http://127.0.0.1:{port}/ready", timeout=2).status_code == 200:
                return
        time.sleep(0.5)
    raise RuntimeError("the server was not ready within 150 s")


def run_section(section: str, model: str, out: Path) -> None:
    """In the section's own process: rows are appended to the file as they come."""
    ceilings = json.loads((out / "ceilings.json").read_text())
    with (out / "rows.jsonl").open("a") as file:
        for row in rows_of(section, model):
            line = row.as_dict(ceilings)
            file.write(json.dumps(line) + "\n")
            file.flush()
            show(line)


def show(line: dict[str, Any]) -> None:
    figures = [f"{line['us']:,.1f} us" if line["us"] else "-"]
    if "tb_s" in line:
        figures.append(f"{line['tb_s']:.2f} TB/s ({line['of_copy']:.0%} of copy)")
    if "tflop_s" in line:
        figures.append(f"{line['tflop_s']:.0f} TFLOP/s ({line['of_matmul']:.0%} of matmul)")
    sys.stdout.write(
        f"| {line['section']} | {line['name']} | {' | '.join(figures)} | {line['note']} |\n"
    )
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("reports/gpu"))
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--models", nargs="+", default=["20b", "120b"], choices=("20b", "120b"))
    parser.add_argument("--one", help="run this one section here and now")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one:
        run_section(args.one, args.models[0], args.out)
        return 0
    import torch
    import triton

    if not torch.cuda.is_available():
        sys.stderr.write(
            "no NVIDIA GPU here: bench/kernels/report.py says what can be said without one\n"
        )
        return 3
    from bench.gpu.timing import measure_ceilings

    (out := args.out / "rows.jsonl").unlink(missing_ok=True)
    device, total = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    ceilings = measure_ceilings()
    torch.cuda.empty_cache()
    (args.out / "ceilings.json").write_text(json.dumps(ceilings))
    versions = (
        f"torch {torch.__version__}, triton {triton.__version__}, Python {sys.version.split()[0]}"
    )
    reached = (
        f"copy {ceilings['copy_tb_s']:.2f} TB/s, matmul {ceilings['matmul_tflop_s']:.0f} TFLOP/s"
    )
    sys.stdout.write(f"{device}, {versions}: {reached}\n")
    failed = 0
    for section in (s for s in args.sections if s != "ceilings"):
        for model in args.models if section in ("kernels", "model") else args.models[:1]:
            if section == "model" and total < MIN_BYTES[model]:
                sys.stdout.write(
                    f"| model | {model} | left out: {total / 1e9:.0f} GB of memory |\n"
                )
                continue
            code = _in_own_process(section, model, args.out)
            if code:
                failed += section != "anchor"  # its source is rarely at hand
                sys.stdout.write(f"| {section} | {model} | FAILED with exit code {code} |\n")
    summary = {"device": device, "versions": versions, "ceilings": ceilings,
               "rows": [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []}  # fmt: skip
    (args.out / "results.json").write_text(json.dumps(summary, indent=1) + "\n")
    return int(failed > 0)


def _in_own_process(section: str, model: str, out: Path) -> int:
    command = [
        sys.executable,
        "-m",
        "bench.gpu.measure",
        "--one",
        section,
        "--models",
        model,
        "--out",
        str(out),
    ]
    limit = TIMEOUT_S.get(section, 120)
    try:
        return subprocess.run(
            command, cwd=ROOT, timeout=limit, check=False, env=_environment()
        ).returncode
    except subprocess.TimeoutExpired:
        return 124


def _environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


if __name__ == "__main__":
    sys.exit(main())
