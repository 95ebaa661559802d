"""What the scripts import exists: mypy does not read them, and no test runs most of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path for folder in ("bench", "scripts", "compat") for path in (ROOT / folder).rglob("*.py"))
OURS = ("gptoss", "bench", "tests", "training")


def file_of(module: str) -> Path | None:
    first, *rest = module.split(".")
    path = ROOT.joinpath("src" if first == "gptoss" else first, *rest)
    return path / "__init__.py" if path.is_dir() else next((p for p in [path.with_suffix(".py")] if p.is_file()), None)


def defined_in(path: Path) -> set[str]:
    """The names that a module defines or imports at its top level."""
    if not path.is_file():
        return set()
    names: set[str] = set()
    for statement in ast.parse(path.read_text()).body:
        for node in ast.walk(statement) if isinstance(statement, ast.If | ast.Try) else [statement]:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                names.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_imports_of_ours_exists(script: Path) -> None:
    missing = []
    for node in ast.walk(ast.parse(script.read_text())):
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] not in OURS:
            continue
        path = file_of(node.module or "")
        known = defined_in(path) if path is not None else set()
        missing += [
            f"{node.module}.{a.name}"
            for a in node.names
            if a.name not in known and not file_of(f"{node.module}.{a.name}")
        ]
    assert not missing
