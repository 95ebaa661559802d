"""The wheel: what is in it, and that a server starts from it in an empty folder, with site-packages read-only."""

from __future__ import annotations

import email
import email.message
import re
import subprocess
import sys
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from tests.support.server_process import ServerProcess

ROOT = Path(__file__).resolve().parents[2]


def metadata_of(wheel: Path) -> email.message.Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        assert name.replace("METADATA", "licenses/LICENSE") in archive.namelist()
        return email.message_from_bytes(archive.read(name))


def files_of_requirements(wheel: Path) -> set[Path]:
    """What lies in site-packages of the distributions that the wheel requires, directly or through others."""
    queue = [Requirement(line) for line in metadata_of(wheel).get_all("Requires-Dist", []) if "extra ==" not in line]
    seen: set[tuple[str, str]] = set()
    found: set[Path] = set()
    while queue:
        requirement = queue.pop()
        for extra in ("", *requirement.extras):
            if (requirement.name, extra) in seen:
                continue
            seen.add((requirement.name, extra))
            distribution = metadata.distribution(requirement.name)
            tops = {file.parts[0] for file in distribution.files or () if file.parts[0] != ".."}
            found |= {Path(str(distribution.locate_file(top))) for top in tops if not top.endswith(".pth")}
            needed = map(Requirement, distribution.requires or ())
            queue += [item for item in needed if item.marker is None or item.marker.evaluate({"extra": extra})]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git has, without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-cf", source / "all.tar", "--null", "-T", "-"], cwd=ROOT, input=files, check=True)
    subprocess.run(["tar", "-xf", "all.tar"], cwd=source, check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_has_the_package_and_its_data_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"gptoss"}
    for name in (
        "server.py",
        "launcher.py",
        "kernels/cpu/native.cpp",
        "kernels/cpu/simd.h",
        "kernels/triton/launch_configs.json",
        "configs/server_config.yaml",
        "assets/page/index.html",
        "assets/page/vendor/README.md",
        "assets/page/vendor/uplot/uPlot.iife.min.js",
        "assets/page/vendor/uplot/LICENSE",
        "assets/nano/gpt-oss-nano.safetensors",
        "assets/vocabulary/o200k_base.tiktoken.gz",
    ):
        assert f"gptoss/{name}" in names, name
    assert not [
        name
        for name in names
        if "training" in name
        or name.endswith((".yaml", ".txt"))
        and "/configs/" not in name
        and ".dist-info/" not in name
    ]


def test_the_wheel_requires_what_every_server_needs_and_offers_the_rest(wheel: Path) -> None:
    found = metadata_of(wheel)
    assert found["License-Expression"] == "Apache-2.0"
    headings = re.findall(r"^# --- extra (\w+):", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert set(found.get_all("Provides-Extra", [])) == {"transformers", "tracing", "eval", "ray", "dev", *headings}
    needs: dict[str, set[str]] = {}
    for line in found.get_all("Requires-Dist", []):
        requirement = Requirement(line)
        extra = str(requirement.marker).partition("extra == ")[2].strip('"')
        needs.setdefault(extra, set()).add(requirement.name)
    assert {"torch", "fastapi", "openai-harmony", "pydantic"} <= needs[""]
    assert not needs[""] & {"transformers", "accelerate", "httpx", "pytest"}
    assert needs["transformers"] == {"transformers", "accelerate"}
    assert needs["tracing"] == {"opentelemetry-sdk", "opentelemetry-exporter-otlp-proto-http"}
    assert {"pytest", "httpx", "openai", "mypy"} | needs["transformers"] | needs["tracing"] <= needs["dev"]


def test_a_server_starts_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    """In a venv of its own, which borrows from this one what the wheel requires, without extras and the checkout."""
    place, home, empty = tmp_path / "venv", tmp_path / "home", tmp_path / "empty"
    for folder in (home, empty):
        folder.mkdir()
    venv.create(place, with_pip=False, symlinks=True)
    python = place / "bin" / "python"
    install = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        "--python",
        str(python),
        "install",
        "--no-deps",
        "--no-index",
        str(wheel),
    ]
    subprocess.run(install, check=True, cwd=empty)
    site = Path(
        subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    )
    # a plain folder of links: no .pth file of this environment is read
    borrowed = tmp_path / "borrowed"
    borrowed.mkdir()
    for entry in files_of_requirements(wheel):
        if not (borrowed / entry.name).exists():
            (borrowed / entry.name).symlink_to(entry)
    assert not [name for name in ("transformers", "accelerate", "pytest") if (borrowed / name).exists()]
    before = {path: path.stat().st_mtime_ns for path in (site / "gptoss").rglob("*") if path.is_file()}
    for path in (site, *site.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    environment = {"HOME": str(home), "PYTHONPATH": str(borrowed), "XDG_CACHE_HOME": "", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(place / "bin" / "gptoss"), "serve"]
    refused = subprocess.run(
        [*command, "--backend", "transformers"], cwd=empty, env=environment, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "requires transformers and accelerate" in refused.stderr and "pip install" in refused.stderr
    server = ServerProcess("--cpu-kv-cache-gib", "0.1", env=environment, command=command, cwd=empty)
    try:
        server.wait_ready(120)
        page = httpx.get(server.url)
        assert page.status_code == 200 and "page.js" in page.text
        body = {
            "model": "gpt-oss-nano",
            "messages": [{"role": "user", "content": "What is 12 + 30?"}],
            "temperature": 0,
        }
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert "42" in answer["choices"][0]["message"]["content"]
    finally:
        code = server.stop()
        log = server.log
        for path in (site, *site.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)
    assert code == 0, log
    assert before == {path: path.stat().st_mtime_ns for path in (site / "gptoss").rglob("*") if path.is_file()}
    assert list(empty.iterdir()) == []
    assert list((home / ".cache" / "gpt-oss-server").glob("gpt-oss-nano-*/model.safetensors"))
