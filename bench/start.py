"""Measures how long the server takes from its command to /ready, beside the embedded model in the same run.

    python bench/start.py CHECKPOINT [MODEL.gguf ...] [--rounds 3] [--flag=--cpu-isa=avx2]

In each round nano is started, then each model in turn; nothing else should run. A model's files are read once before,
so the page cache is warm, and its first start, which writes the weights cache into a folder of its own, is a column by
itself. Memory is that of the server's processes together: resident (pages of shared files in proportion), anonymous, and
what a second server beside the first adds to the resident memory of both.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.against_llama_cpp import resident_bytes, wait_ready
from tests.support.server_process import ServerProcess

KV_GIB = "0.25"
ANONYMOUS = re.compile(r"^Pss_Anon:\s+(\d+) kB", re.MULTILINE)


def files_of(model: str) -> list[Path]:
    path = Path(model)
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []


def read_once(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


def anonymous_bytes(pid: int) -> int:
    parent = psutil.Process(pid)
    texts = (Path(f"/proc/{p.pid}/smaps_rollup").read_text() for p in (parent, *parent.children(recursive=True)))
    return sum(1024 * int(number) for text in texts for number in ANONYMOUS.findall(text))


def started(model: str, flags: list[str]) -> tuple[ServerProcess, float]:
    begun = time.perf_counter()
    server = ServerProcess("--model", model, "--cpu-kv-cache-gib", KV_GIB, *flags)
    wait_ready(server, "/ready")
    return server, time.perf_counter() - begun


class Row:
    """What was measured of one model."""

    def __init__(self, model: str, flags: list[str]) -> None:
        self.model, self.flags, self.first_s = model, flags, 0.0
        self.later_s: list[float] = []
        self.resident = self.anonymous = self.second = 0.0

    def first(self) -> None:
        read_once(files_of(self.model))
        server, self.first_s = started(self.model, self.flags)
        server.stop()

    def later(self, *, verbose: bool) -> None:
        server, seconds = started(self.model, self.flags)
        try:
            self.later_s.append(seconds)
            self.resident = resident_bytes(server.process.pid) / 1e9
            self.anonymous = anonymous_bytes(server.process.pid) / 1e9
            if verbose:
                print(server.log, flush=True)
        finally:
            server.stop()

    def beside(self) -> None:
        """Measures what a second server of the same model adds."""
        servers = [started(self.model, self.flags)[0] for _ in range(2)]
        try:
            self.second = sum(resident_bytes(s.process.pid) for s in servers) / 1e9 - self.resident
        finally:
            for server in servers:
                server.stop()

    def line(self, nano_s: float) -> str:
        later = statistics.median(self.later_s)
        name = Path(self.model).name if files_of(self.model) else self.model
        return (
            f"| {name} | {self.first_s:.1f} | {later:.2f} | {later - nano_s:+.2f} | {self.resident:.2f} | "
            f"{self.anonymous:.2f} | {self.second:.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="folders of checkpoints, GGUF files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--flag", action="append", default=[], help="one more argument of the server, as --flag=--name=value"
    )
    parser.add_argument("--second", action="store_true", help="start a second server beside the first, too")
    parser.add_argument("--verbose", action="store_true", help="print the servers' logs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.home() / ".cache") as cache:
        flags = ["--weights-cache-dir", cache, *args.flag]
        rows = [Row(model, flags) for model in ("nano", *args.models)]
        for row in rows:
            row.first()
        for _ in range(args.rounds):
            for row in rows:
                row.later(verbose=args.verbose)
        for row in rows:
            if args.second:
                row.beside()
    print(
        "| model | first start, s | later, s | after nano, s | resident, GB | anonymous, GB | a second server adds, GB |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print(row.line(statistics.median(rows[0].later_s)))


if __name__ == "__main__":
    main()
