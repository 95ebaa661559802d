"""Who may import whom (ARCHITECTURE.md, "Import rules"). What is not listed is forbidden."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
CONTROL = "gptoss.engine.config gptoss.engine.request gptoss.engine.messages gptoss.engine.sampling_params"
ALLOWED = {
    "gptoss.logs": "",
    "gptoss.run_folder": "",
    "gptoss.cached_files": "gptoss.run_folder",
    "gptoss.server": "src gptoss.logs gptoss.config gptoss.config_text gptoss.cached_files gptoss.port_manager gptoss.model_locator gptoss.harmony.vocabulary gptoss.engine.config gptoss.serving",
    "gptoss.serving": "gptoss.cached_files gptoss.config gptoss.config_text gptoss.api.hosts gptoss.api.keys gptoss.model_locator gptoss.harmony.vocabulary gptoss.api.deps gptoss.api.app gptoss.api.descriptors gptoss.api.http_protocol "
    "gptoss.engine.client gptoss.engine.lifecycle gptoss.engine.config gptoss.engine.gpus",
    "gptoss.api": "src gptoss.api gptoss.config gptoss.config_text gptoss.profiles gptoss.prompt_builder gptoss.harmony gptoss.engine.client gptoss.engine.lifecycle "
    "gptoss.engine.messages gptoss.engine.request gptoss.engine.sampling_params gptoss.engine.gpus gptoss.engine.config",
    "gptoss.config": "gptoss.config_text gptoss.profiles gptoss.engine.config",
    "gptoss.config_text": "gptoss.engine.config",
    "gptoss.model_locator": "gptoss.cached_files gptoss.engine.config gptoss.engine.shapes",
    "gptoss.prompt_builder": "gptoss.harmony",
    "gptoss.harmony": "gptoss.harmony gptoss.cached_files",
    "gptoss.port_manager": "",
    "gptoss.profiles": "",
    "gptoss.engine.config": "",
    "gptoss.engine.sampling_params": "",
    "gptoss.engine.shapes": "gptoss.engine.config",
    "gptoss.engine.gpus": "",
    "gptoss.engine.shards": "gptoss.engine.config",
    "gptoss.engine.memory_plan": "gptoss.engine.config gptoss.engine.shards",
    "gptoss.engine.placement": "gptoss.engine.config gptoss.engine.gpus gptoss.engine.memory_plan",
    "gptoss.engine.parallel": "gptoss.engine.shards",
    "gptoss.engine.guided": "gptoss.engine.sampling_params",
    "gptoss.engine.request": "gptoss.engine.sampling_params",
    "gptoss.engine.kv_cache_manager": "gptoss.engine.request",
    "gptoss.engine.messages": "gptoss.engine.request gptoss.engine.sampling_params",
    "gptoss.engine.drafts": "gptoss.engine.guided gptoss.engine.request",
    "gptoss.engine.waiting": "gptoss.engine.request",
    "gptoss.engine.scheduler": CONTROL + " gptoss.engine.drafts gptoss.engine.kv_cache_manager gptoss.engine.waiting",
    "gptoss.engine.client": CONTROL + " gptoss.engine.core gptoss.engine.streams gptoss.engine.lifecycle gptoss.run_folder",
    "gptoss.engine.lifecycle": "",
    "gptoss.engine.streams": "gptoss.engine.messages",
    "gptoss.kernels": "gptoss.kernels gptoss.cached_files",
    "gptoss.engine.model": "gptoss.engine.model gptoss.kernels gptoss.engine.config gptoss.engine.parallel gptoss.engine.shards",
    "gptoss.engine.worker": CONTROL + " gptoss.engine.worker gptoss.engine.model gptoss.kernels gptoss.engine.parallel "
    "gptoss.engine.shards gptoss.engine.memory_plan gptoss.logs",
    "gptoss.engine.executor": CONTROL + " gptoss.engine.worker gptoss.run_folder",
    "gptoss.engine.core": CONTROL + " gptoss.engine.executor gptoss.engine.scheduler gptoss.engine.kv_cache_manager "
    "gptoss.engine.drafts gptoss.engine.guided gptoss.engine.model.checkpoint gptoss.engine.placement gptoss.logs",
    "gptoss.nano": "gptoss.nano gptoss.harmony gptoss.prompt_builder gptoss.kernels gptoss.engine.config gptoss.engine.shapes",
    "gptoss.cli": "gptoss.cached_files gptoss.engine gptoss.harmony gptoss.kernels gptoss.nano gptoss.prompt_builder gptoss.model_locator",
}
NO_TORCH = [
    "gptoss.api",
    "gptoss.config",
    "gptoss.config_text",
    "gptoss.profiles",
    "gptoss.prompt_builder",
    "gptoss.port_manager",
    "gptoss.model_locator",
    "gptoss.cached_files",
    "gptoss.run_folder",
    "gptoss.harmony",
    "gptoss.engine.config",
    "gptoss.engine.sampling_params",
    "gptoss.engine.request",
    "gptoss.engine.kv_cache_manager",
    "gptoss.engine.messages",
    "gptoss.engine.scheduler",
    "gptoss.engine.waiting",
    "gptoss.engine.client",
    "gptoss.engine.guided",
    "gptoss.engine.drafts",
    "gptoss.engine.shapes",
    "gptoss.engine.gpus",
    "gptoss.engine.shards",
    "gptoss.engine.memory_plan",
    "gptoss.engine.placement",
    "gptoss.server",
    "gptoss.serving",
]


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(SRC.parent).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            for alias in node.names:
                inner = SRC.parent / module.replace(".", "/") / f"{alias.name}.py"
                found.add(f"{module}.{alias.name}" if inner.is_file() or module == "gptoss.api" else module)
    return found


def rule(name: str) -> str:
    matches = [key for key in ALLOWED if name == key or name.startswith(key + ".")]
    assert matches, f"{name} has no import rule"
    return max(matches, key=len)


def below(name: str, prefixes: list[str]) -> bool:
    return any(name == p or (p != "src" and name.startswith(p + ".")) for p in prefixes)


@pytest.mark.parametrize(
    "path", [p for p in SRC.rglob("*.py") if p.read_text().strip() and p.name != "__init__.py"], ids=module_name
)
def test_a_module_imports_only_what_it_may(path: Path) -> None:
    name = module_name(path)
    ours = {i for i in imports(path) if i.split(".")[0] == "src"}
    allowed = ALLOWED[rule(name)].split()
    assert not [i for i in ours if not below(i, allowed)], f"{name} may import only: {allowed}"
    if below(name, NO_TORCH):
        assert not {i for i in imports(path) if i.split(".")[0] in ("torch", "triton", "transformers")}
    if name.startswith(("gptoss.engine", "gptoss.kernels", "gptoss.harmony", "gptoss.prompt_builder")):
        assert not {i for i in imports(path) if i.split(".")[0] in ("fastapi", "starlette", "uvicorn")}


def test_nobody_imports_the_server() -> None:
    assert not [p for p in SRC.rglob("*.py") if "gptoss.server" in imports(p)]


def test_a_child_that_imports_the_main_module_loads_nothing_by_that() -> None:
    """multiprocessing has the engine's process and each rank do so, at every start."""
    code = (
        "import sys, multiprocessing.spawn; before = set(sys.modules); import gptoss.server; "
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; "
        "sys.exit(loaded != {'src'} or 'gptoss.serving' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=SRC.parent).returncode == 0


def test_only_the_top_init_has_content() -> None:
    assert not [p for p in SRC.rglob("__init__.py") if p.parent != SRC and p.read_text().strip()]


def test_the_engine_knows_no_harmony() -> None:
    guilty = [p for p in (SRC / "engine").rglob("*.py") if "harmony" in p.read_text().lower()]
    assert not guilty


def test_the_api_process_loads_no_torch() -> None:
    code = "import sys, gptoss.api.app, gptoss.serving; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SRC.parent).returncode == 0


def test_the_server_needs_neither_sklearn_nor_scipy_nor_a_numpy_patch() -> None:
    code = "import sys, gptoss.serving, gptoss.engine.core; sys.exit(any(m in sys.modules for m in ('sklearn', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SRC.parent).returncode == 0


def test_version_is_the_top_changelog_entry() -> None:
    from gptoss import __version__

    changelog = (SRC.parent / "CHANGELOG.md").read_text()
    first = next(line for line in changelog.splitlines() if line.startswith("## ["))
    assert first.startswith(f"## [{__version__}]")
