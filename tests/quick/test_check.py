"""`gptoss check`: what this machine has and lacks."""

from __future__ import annotations

import json
import os
import socket
import sys
from importlib import metadata
from pathlib import Path

import psutil
import pytest

from gptoss.cli import check
from gptoss.cli.machine import memory, software
from gptoss.cli.machine.finding import Finding
from gptoss.cli.main import main
from gptoss.engine.parallel.gpus import Gpu
from gptoss.port_manager import recorded

GB = 10**9
H200 = Gpu(0, "NVIDIA H200", 141 * GB, 140 * GB, None, None)
SMALL = Gpu(0, "NVIDIA T4", 16 * GB, 15 * GB, None, None)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No GPU, no records of servers, no checkpoint, an empty cache."""
    monkeypatch.setattr(check, "visible_gpus", lambda: [])
    monkeypatch.setattr(check, "python_sandbox", lambda: Finding("sandbox", "ok", "bubblewrap"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    tmp_path.chmod(0o700)


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def test_a_machine_without_a_gpu_can_serve_nano(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--port", free_port(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    states = {finding["name"]: finding["state"] for finding in found["findings"]}
    assert found["can_serve"] and states["checkpoint"] == states["memory"] == states["port"] == "ok"
    assert list(states) == [
        *("Python", "packages", "torch", "GPU", "compiler", "CPU", "checkpoint", "memory", "cache", "port", "sandbox")
    ]


def test_a_lack_has_a_remedy_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 8 * GB}))
    assert main(["check", "--model", "120b", "--port", free_port()]) == 1
    out = capsys.readouterr().out
    assert "missing  checkpoint   no model '120b': looked in 120b, " in out
    assert "remedy: gptoss serve downloads it if the Hugging Face Hub can be reached; else fetch it where " in out
    assert "missing  memory       120b: the model does not fit: 6" in out and "\x1b" not in out


def test_a_model_is_planned_on_the_gpus_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    probe = {"cuda": "13.0", "capabilities": [[9, 0]]}
    monkeypatch.setattr(software, "_probe", lambda: (probe, ""))
    monkeypatch.setattr(check, "visible_gpus", lambda: [H200])
    found = {finding.name: finding for finding in check.check(None, None, "127.0.0.1", int(free_port()))}
    assert found["memory"].state == "ok" and found["memory"].text.startswith("single: 1 rank,")
    assert "NVIDIA H200 (140 of 141 GB free); driver " in found["GPU"].text
    assert found["torch"].text.endswith("for CUDA 13.0")
    assert memory.plan("120b", memory._named("openai/gpt-oss-120b"), [SMALL]).state == "missing"
    assert memory.plan("x/y", None, [SMALL]).state == "note"


@pytest.mark.parametrize(
    ("probe", "state", "text"),
    [
        ((None, "ImportError: libcudart.so"), "missing", "cannot be imported: ImportError: libcudart.so"),
        (({"cuda": None, "capabilities": []}, ""), "missing", "is a build without CUDA"),
        (({"cuda": "13.0", "capabilities": []}, ""), "missing", "cannot use the GPU"),
        (({"cuda": "13.0", "capabilities": [[9, 0], [7, 5]]}, ""), "note", "capability 7.5 runs the slow reference"),
    ],
)
def test_torch_that_cannot_use_the_gpu(
    probe: tuple[object, str], state: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(software, "_probe", lambda: probe)
    found = software.torch_build(has_gpu=True)
    assert (found.state, text in found.text, bool(found.remedy)) == (state, True, True)


def test_software_that_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10))
    assert software.python().state == "missing"
    monkeypatch.setattr(metadata, "requires", lambda _: ["no-such-package>=1", "numpy>=2", 'x; extra == "dev"'])
    assert software.packages().remedy == "pip install no-such-package"
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software.compiler(has_gpu=False).state == "note"
    assert software.compiler(has_gpu=True).state == "missing"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert software.compiler(has_gpu=False).text.startswith("CXX=no-such-compiler does not exist")
    monkeypatch.setattr(Path, "read_text", lambda _: "flags\t\t: fpu sse2\n")
    assert software.instructions(has_gpu=False).state == "note"


def test_a_port_that_is_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        number = held.getsockname()[1]
        found = software.port("127.0.0.1", number)
        assert found.state == "missing" and f"(pid {os.getpid()})" in found.text
        with recorded(held):
            assert "gptoss stop --url" in software.port("127.0.0.1", number).remedy
    assert software.port("192.0.2.1", number).state == "missing"
    with pytest.raises(SystemExit, match="2"):
        main(["check", "--port", "70000"])


def test_a_cache_that_cannot_be_written_or_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert memory.cache_folder().state == "note"
    monkeypatch.undo()
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**8}))
    assert "has 0.1 GB free" in memory.cache_folder().text
