"""Measures how long the server takes from its command to /ready, beside the embedded model in the same run.

    python bench/start.py CHECKPOINT [MODEL.gguf ...] [--rounds 3] [--flag=--cpu-isa=avx2]

In each round nano is started, then each model in turn; nothing else should run. A model's files are read once before,
so the page cache is warm, and its first start, which writes the weights cache into a folder of its own, is a column by
itself. Memory is that of the server's processes together, resident: pages of shared files in proportion. With --second, a second
server of each model is started beside the first one, asked something as that was, and a second table shows the memory of both.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.against_llama_cpp import wait_ready
from gptoss.cli.remote.load import Target
from tests.support.server_process import ServerProcess

KV_GIB = "0.25"
FIELDS = re.compile(r"^(Rss|Pss|Pss_Anon):\s+(\d+) kB", re.MULTILINE)


def files_of(model: str) -> list[Path]:
    path = Path(model)
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path] if path.is_file() else []


def read_once(files: list[Path]) -> None:
    for file in files:
        with file.open("rb") as stream:
            while stream.read(1 << 24):
                pass


@dataclass(frozen=True, slots=True)
class Memory:
    """GB of a server's processes together: all pages, shared ones in proportion, anonymous ones."""

    rss: float
    pss: float
    anonymous: float

    @classmethod
    def of(cls, server: ServerProcess) -> Memory:
        parent = psutil.Process(server.process.pid)
        texts = (Path(f"/proc/{p.pid}/smaps_rollup").read_text() for p in (parent, *parent.children(recursive=True)))
        sums = dict.fromkeys(("Rss", "Pss", "Pss_Anon"), 0)
        for name, number in (found for text in texts for found in FIELDS.findall(text)):
            sums[name] += int(number)
        return cls(*(number * 1024 / 1e9 for number in sums.values()))

    def cells(self) -> str:
        return f"{self.rss:.2f} | {self.pss:.2f} | {self.anonymous:.2f}"


def started(model: str, flags: list[str]) -> tuple[ServerProcess, float]:
    begun = time.perf_counter()
    server = ServerProcess("--model", model, "--cpu-kv-cache-gib", KV_GIB, *flags)
    wait_ready(server, "/ready")
    return server, time.perf_counter() - begun


def ask(server: ServerProcess) -> None:
    """Has the server answer a short prompt, so that it has used its weights."""
    target = Target(server.url)
    target.prepare()
    target.close()


class Row:
    """What was measured of one model."""

    def __init__(self, model: str, flags: list[str]) -> None:
        self.model, self.flags, self.first_s = model, flags, 0.0
        self.name = Path(model).name if files_of(model) else model
        self.later_s: list[float] = []
        self.memory = Memory(0, 0, 0)

    def first(self) -> None:
        read_once(files_of(self.model))
        server, self.first_s = started(self.model, self.flags)
        server.stop()

    def later(self, *, verbose: bool) -> None:
        server, seconds = started(self.model, self.flags)
        try:
            self.later_s.append(seconds)
            self.memory = Memory.of(server)
            if verbose:
                print(server.log, flush=True)
        finally:
            server.stop()

    def two(self) -> list[str]:
        """Starts two servers of the model, one after the other; returns the lines of their memory."""
        servers: list[ServerProcess] = []
        ready_s = []
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                server, seconds = started(self.model, self.flags)
                stack.callback(server.stop)
                ask(server)
                servers.append(server)
                ready_s.append(seconds)
                found = [Memory.of(server) for server in servers]
                if len(found) == 1:
                    alone = found[0]
        rows = zip(("alone", "the first of two", "the second"), (ready_s[0], *ready_s), (alone, *found), strict=True)
        return [f"| {self.name}, {which} | {seconds:.2f} | {memory.cells()} |" for which, seconds, memory in rows]

    def line(self, nano_s: float) -> str:
        later = statistics.median(self.later_s)
        return (
            f"| {self.name} | {self.first_s:.1f} | {later:.2f} | {later - nano_s:+.2f} | {self.memory.pss:.2f} | "
            f"{self.memory.anonymous:.2f} |"
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
        lines = [line for row in rows for line in (row.two() if args.second else [])]
    print(
        "| model | first start, s | later, s | after nano, s | resident, GB | anonymous, GB |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print(row.line(statistics.median(rows[0].later_s)))
    if lines:
        print("\n| server | ready, s | pages, GB | resident, GB | anonymous, GB |\n|---|---|---|---|---|")
        print("\n".join(lines))


if __name__ == "__main__":
    main()
