"""Who may import whom (ARCHITECTURE.md, "Import rules"). What is not listed is forbidden."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
CONTROL = "src.engine.config src.engine.request src.engine.messages src.engine.sampling_params"
ALLOWED = {
    "src.logs": "",
    "src.run_folder": "",
    "src.cached_files": "src.run_folder",
    "src.server": "src src.logs src.config src.config_text src.cached_files src.port_manager src.model_locator src.harmony.vocabulary src.engine.config src.serving",
    "src.serving": "src.cached_files src.config src.config_text src.api.hosts src.api.keys src.model_locator src.harmony.vocabulary src.api.deps src.api.app src.api.descriptors src.api.http_protocol "
    "src.engine.client src.engine.lifecycle src.engine.config src.engine.gpus",
    "src.api": "src src.api src.config src.config_text src.profiles src.prompt_builder src.harmony src.engine.client src.engine.lifecycle "
    "src.engine.messages src.engine.request src.engine.sampling_params src.engine.gpus src.engine.config",
    "src.config": "src.config_text src.profiles src.engine.config",
    "src.config_text": "src.engine.config",
    "src.model_locator": "src.cached_files src.engine.config src.engine.shapes",
    "src.prompt_builder": "src.harmony",
    "src.harmony": "src.harmony src.cached_files",
    "src.port_manager": "",
    "src.profiles": "",
    "src.engine.config": "",
    "src.engine.sampling_params": "",
    "src.engine.shapes": "src.engine.config",
    "src.engine.gpus": "",
    "src.engine.shards": "src.engine.config",
    "src.engine.memory_plan": "src.engine.config src.engine.shards",
    "src.engine.placement": "src.engine.config src.engine.gpus src.engine.memory_plan",
    "src.engine.parallel": "src.engine.shards",
    "src.engine.guided": "src.engine.sampling_params",
    "src.engine.request": "src.engine.sampling_params",
    "src.engine.kv_cache_manager": "src.engine.request",
    "src.engine.messages": "src.engine.request src.engine.sampling_params",
    "src.engine.drafts": "src.engine.guided src.engine.request",
    "src.engine.waiting": "src.engine.request",
    "src.engine.scheduler": CONTROL + " src.engine.drafts src.engine.kv_cache_manager src.engine.waiting",
    "src.engine.client": CONTROL + " src.engine.core src.engine.streams src.engine.lifecycle src.run_folder",
    "src.engine.lifecycle": "",
    "src.engine.streams": "src.engine.messages",
    "src.kernels": "src.kernels src.cached_files",
    "src.engine.model": "src.engine.model src.kernels src.engine.config src.engine.parallel src.engine.shards",
    "src.engine.worker": CONTROL + " src.engine.worker src.engine.model src.kernels src.engine.parallel "
    "src.engine.shards src.engine.memory_plan src.logs",
    "src.engine.executor": CONTROL + " src.engine.worker src.run_folder",
    "src.engine.core": CONTROL + " src.engine.executor src.engine.scheduler src.engine.kv_cache_manager "
    "src.engine.drafts src.engine.guided src.engine.model.checkpoint src.engine.placement src.logs",
    "src.nano": "src.nano src.harmony src.prompt_builder src.kernels src.engine.config src.engine.shapes",
    "src.cli": "src.cached_files src.engine src.harmony src.kernels src.nano src.prompt_builder src.model_locator",
}
NO_TORCH = [
    "src.api",
    "src.config",
    "src.config_text",
    "src.profiles",
    "src.prompt_builder",
    "src.port_manager",
    "src.model_locator",
    "src.cached_files",
    "src.run_folder",
    "src.harmony",
    "src.engine.config",
    "src.engine.sampling_params",
    "src.engine.request",
    "src.engine.kv_cache_manager",
    "src.engine.messages",
    "src.engine.scheduler",
    "src.engine.waiting",
    "src.engine.client",
    "src.engine.guided",
    "src.engine.drafts",
    "src.engine.shapes",
    "src.engine.gpus",
    "src.engine.shards",
    "src.engine.memory_plan",
    "src.engine.placement",
    "src.server",
    "src.serving",
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
                found.add(f"{module}.{alias.name}" if inner.is_file() or module == "src.api" else module)
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
    if name.startswith(("src.engine", "src.kernels", "src.harmony", "src.prompt_builder")):
        assert not {i for i in imports(path) if i.split(".")[0] in ("fastapi", "starlette", "uvicorn")}


def test_nobody_imports_the_server() -> None:
    assert not [p for p in SRC.rglob("*.py") if "src.server" in imports(p)]


def test_a_child_that_imports_the_main_module_loads_nothing_by_that() -> None:
    """multiprocessing has the engine's process and each rank do so, at every start."""
    code = (
        "import sys, multiprocessing.spawn; before = set(sys.modules); import src.server; "
        "loaded = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; "
        "sys.exit(loaded != {'src'} or 'src.serving' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=SRC.parent).returncode == 0


def test_only_the_top_init_has_content() -> None:
    assert not [p for p in SRC.rglob("__init__.py") if p.parent != SRC and p.read_text().strip()]


def test_the_engine_knows_no_harmony() -> None:
    guilty = [p for p in (SRC / "engine").rglob("*.py") if "harmony" in p.read_text().lower()]
    assert not guilty


def test_the_api_process_loads_no_torch() -> None:
    code = "import sys, src.api.app, src.serving; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SRC.parent).returncode == 0


def test_the_server_needs_neither_sklearn_nor_scipy_nor_a_numpy_patch() -> None:
    code = "import sys, src.serving, src.engine.core; sys.exit(any(m in sys.modules for m in ('sklearn', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=SRC.parent).returncode == 0


def test_version_is_the_top_changelog_entry() -> None:
    from src import __version__

    changelog = (SRC.parent / "CHANGELOG.md").read_text()
    first = next(line for line in changelog.splitlines() if line.startswith("## ["))
    assert first.startswith(f"## [{__version__}]")
