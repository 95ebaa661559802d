"""Compiles a start's Triton kernels in a process of its own, while the weights are read.

One after another they would take a minute or more. The process lists them on meta tensors (dry_run.py), compiles them
with several workers into triton's cache on disk, and marks the cache with a file, so that the next start compiles
nothing.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptoss.engine.config import EngineConfig
from gptoss.engine.parallel.device_placement import usable_cores
from gptoss.engine.parallel.shards import Shard
from gptoss.parent_process import end_with_parent

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).resolve().parents[2]
MAX_WORKERS = 8
MAX_WAIT_S = 600
FIELDS = (
    *("model", "max_num_seqs", "max_num_batched_tokens", "block_size", "batch_invariant", "enforce_eager"),
    *("kv_cache_dtype", "lm_head_dtype"),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What one rank's start compiles."""

    config: EngineConfig
    shard: Shard
    capability: int
    workers: int
    parent: int  # process

    def mark(self, folder: Path) -> Path:
        """The file that marks that `folder`, triton's cache, has these kernels."""
        import triton

        facts = [getattr(self.config, name) for name in FIELDS]
        what = sys.version, triton.__version__, self.capability, replace(self.shard, rank=0), facts
        digest = hashlib.sha256(repr(what).encode())
        for package in ("kernels", "engine/worker", "engine/model"):
            for path in sorted((SOURCES / package).rglob("*")):
                if path.suffix in (".py", ".json"):
                    digest.update(path.read_bytes())
        return folder / f"gptoss-{digest.hexdigest()[:24]}.compiled"


class Precompilation:
    """The process, and what it printed."""

    def __init__(self, job: Job, command: tuple[str, ...] = ("-m", __name__)) -> None:
        """`command`: arguments of Python; it reads the job from its input."""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._started = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(pickle.dumps(job))
        self._process.stdin.close()
        self._process.stdin = None

    def wait(self) -> None:
        """Returns when the process has ended.

        Kernels that it did not compile are compiled when they are launched.
        """
        try:
            output, _ = self._process.communicate(timeout=MAX_WAIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            output, _ = self._process.communicate()
        text, seconds = output.decode(errors="replace").strip(), time.monotonic() - self._started
        if self._process.returncode:
            logger.warning("kernels were not all compiled ahead: %s", text[-500:] or self._process.returncode)
        else:
            logger.info("%s while the weights were read, in %.1f s", text, seconds)


def start(config: EngineConfig, shard: Shard, capability: tuple[int, int]) -> Precompilation | None:
    """Starts to compile.

    Returns None if triton's cache has all of it, or another rank of the stage compiles the same.
    """
    if not shard.is_tensor_leader or not config.model.quantized:
        return None
    major, minor = capability
    workers = max(1, min(MAX_WORKERS, usable_cores() // config.ranks_per_node))
    job = Job(config, shard, 10 * major + minor, workers, os.getpid())
    return None if job.mark(cache_folder()).exists() else Precompilation(job)


def cache_folder() -> Path:
    from triton import knobs

    return Path(knobs.cache.dir)


def warn_when_compiling(tell: Callable[[str], object] | None = None) -> None:
    """Warns of each kernel that is compiled from now on, or loaded from disk: requests wait for it."""
    from triton import knobs

    tell = tell or functools.partial(logger.warning, "%s was compiled while serving: requests waited for it")

    def told(**found: Any) -> None:
        tell(getattr(found.get("fn"), "name", "a kernel"))

    knobs.runtime.jit_post_compile_hook = told


def run(job: Job) -> int:
    """Lists, compiles and marks; returns the exit code."""
    from triton.backends.compiler import GPUTarget

    from gptoss.engine.worker import dry_run

    with dry_run.recording(job.capability) as record:
        dry_run.DryEngine(job.config, job.shard).start()
    jobs = [record.compilations[key] for key in sorted(record.compilations)]
    if dry_run.compile_all(jobs, GPUTarget("cuda", job.capability, 32), job.workers):
        return 1
    mark = job.mark(cache_folder())
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.touch()
    sys.stdout.write(f"{len(jobs)} kernels compiled\n")
    return 0


def main() -> int:
    job: Job = pickle.loads(sys.stdin.buffer.read())  # from our own process
    end_with_parent(job.parent)
    return run(job)


if __name__ == "__main__":
    sys.exit(main())
