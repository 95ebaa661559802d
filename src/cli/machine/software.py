"""Interpreter, packages, GPU driver, compiler and ports of this machine."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from gptoss import port_manager
from gptoss.cli.machine.finding import Finding
from gptoss.engine.parallel.gpus import Gpu

OLDEST_PYTHON = (3, 11)
OLDEST_CAPABILITY = [8, 0]  # of the Triton kernels
DISTRIBUTION = "gpt-oss-server"
CPU_FLAGS = ("avx512_bf16", "avx2")  # of the compiled kernels, the better first
GB = 10**9
# in a child, so that a broken installation of torch is found and not suffered
PROBE = """
import json, torch
devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
print(json.dumps({"cuda": torch.version.cuda, "capabilities": [torch.cuda.get_device_capability(d) for d in devices]}))
"""


def python() -> Finding:
    """Returns whether this interpreter is new enough."""
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        return Finding("Python", "missing", text, "install Python 3.11 or newer, and set PYTHON to its path")
    return Finding("Python", "ok", text)


def packages() -> Finding:
    """Returns whether every required package is installed."""
    try:
        required = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return Finding("packages", "note", "not installed as a package, so its requirements are not known here")
    names = [re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in required if ";" not in line]
    absent = [name for name in names if not _version(name)]
    if absent:
        return Finding("packages", "missing", f"without {', '.join(absent)}", f"pip install {' '.join(absent)}")
    return Finding("packages", "ok", f"{len(names)} required packages are installed")


def torch_build(*, has_gpu: bool) -> Finding:
    """Returns whether torch is there and, on a machine with a GPU, whether it can use it."""
    version = _version("torch")
    if version is None:
        return Finding("torch", "missing", "not installed", "pip install torch")
    text = f"torch {version}, triton {_version('triton') or 'not installed'}"
    if not has_gpu:
        return Finding("torch", "ok", text)
    found, error = _probe()
    if found is None:
        return Finding("torch", "missing", f"{text} cannot be imported: {error}", "install torch again")
    if found["cuda"] is None:
        remedy = f"pip install --force-reinstall torch=={version.partition('+')[0]}"
        return Finding("torch", "missing", f"{text} is a build without CUDA", remedy)
    if not found["capabilities"]:
        remedy = f"update the driver to one for CUDA {found['cuda']}, or install a torch for the driver's CUDA"
        return Finding("torch", "missing", f"{text} for CUDA {found['cuda']} cannot use the GPU", remedy)
    oldest = min(found["capabilities"])
    if oldest < OLDEST_CAPABILITY:
        shown = (
            f"{text}; a GPU of compute capability {oldest[0]}.{oldest[1]} runs the slow reference kernels in float16"
        )
        return Finding("torch", "note", shown, "a GPU of compute capability 8.0 or later (Ampere)")
    return Finding("torch", "ok", f"{text} for CUDA {found['cuda']}")


def _probe() -> tuple[dict[str, Any] | None, str]:
    """Returns what a child process found of torch, or None and the last line of its error."""
    try:
        done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    if done.returncode:
        return None, (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(done.stdout)
    return found, ""


def gpu(gpus: list[Gpu]) -> Finding:
    """Returns the GPUs and the driver's version."""
    if gpus:
        shown = ", ".join(f"{g.name} ({g.free_bytes / GB:.0f} of {g.total_bytes / GB:.0f} GB free)" for g in gpus)
        return Finding("GPU", "ok", f"{shown}; driver {_driver() or 'of unknown version'}")
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None and _driver():
        remedy = "unset it, or name GPUs that exist"
        return Finding("GPU", "note", f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} hides all", remedy)
    if Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists():
        return Finding(
            "GPU", "missing", "a device, but no working driver", "reinstall the NVIDIA driver; try nvidia-smi"
        )
    remedy = "none for nano; 20b and 120b need an NVIDIA GPU and its driver to be fast"
    return Finding("GPU", "note", "no NVIDIA GPU: the server runs on the CPU", remedy)


def _driver() -> str | None:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()
    return version.decode() if isinstance(version, bytes) else str(version)


def compiler(*, has_gpu: bool) -> Finding:
    """Returns the compiler: C++ for the CPU kernels, C for what Triton makes on a GPU."""
    language, variable, candidates = (
        ("C", "CC", ("gcc", "clang")) if has_gpu else ("C++", "CXX", ("c++", "g++", "clang++"))
    )
    named = os.environ.get(variable)
    found = shutil.which(named) if named else next(filter(None, map(shutil.which, candidates)), None)
    if found:
        return Finding("compiler", "ok", f"{language}: {found}")
    text = f"{variable}={named} does not exist" if named else f"no {language} compiler"
    if has_gpu:
        return Finding("compiler", "missing", f"{text}: Triton needs one", "install gcc, or set CC")
    return Finding("compiler", "note", f"{text}: the CPU runs the slow reference kernels", "install g++, or set CXX")


def instructions(*, has_gpu: bool) -> Finding:
    """Returns the CPU's vector instructions, which the compiled CPU kernels need."""
    try:
        line = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        line = None
    have = set(line[1].split()) if line else set()
    found = next((flag for flag in CPU_FLAGS if flag in have), None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if found or has_gpu:
        return Finding("CPU", "ok", f"{cores} cores" + (f", {found}" if found else ""))
    text = f"{cores} cores without AVX2: the CPU runs the slow reference kernels"
    return Finding("CPU", "note", text, "a CPU with AVX2, or a GPU")


def port(host: str, number: int) -> Finding:
    """Returns whether a server can listen there."""
    try:
        if port_manager.is_free(host, number):
            return Finding("port", "ok", f"{host}:{number} is free")
        ours = any(server.port == number for server in port_manager.running_servers())
    except port_manager.PortError as error:
        return Finding("port", "missing", str(error), "another --host or --port")
    if ours:
        text = f"{host}:{number} is in use by one of our servers"
        return Finding("port", "note", text, f"gptoss stop --url {host}:{number}, or serve with --auto-port")
    process = port_manager.owner(number)
    by = f" by {process.name()} (pid {process.pid})" if process is not None else ""
    return Finding(
        "port", "missing", f"{host}:{number} is in use{by}", "serve with another --port, or with --auto-port"
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
