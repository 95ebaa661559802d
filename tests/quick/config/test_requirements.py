"""requirements.txt: what the product imports is required, and what is required is used."""

from __future__ import annotations

import ast
import sys
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gptoss import startup
from gptoss.config.errors import ConfigError
from gptoss.config.schema import ServerConfig

ROOT = Path(__file__).resolve().parents[3]
# used without an import of ours: uvicorn's HTTP parser, and what transformers loads with
INDIRECT = {"httptools", "accelerate"}
# of requirements-eval.txt and requirements-ray.txt, which are not installed with the others; pyarrow and the checker of BFCL only on request
EVALUATIONS = {"inspect_ai", "langdetect", "pyarrow", "bfcl_eval", "ray"}
# come with fastapi and pydantic, whose versions choose theirs
IMPLIED = {"starlette", "pydantic-core"}


def _normal(name: str) -> str:
    return name.lower().replace("_", "-")


def required(name: str) -> dict[str, set[str]]:
    """Names of the requirements, by extra; those of every installation are under ""."""
    found: dict[str, set[str]] = {"": set()}
    extra = ""
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("# --- extra "):
            extra = line.split()[3].rstrip(":")
            found[extra] = set()
        elif line and not line.startswith(("#", "-r")):
            found[extra].add(_normal(Requirement(line).name))
    return found


def imported() -> set[str]:
    """Names of the distributions that src/ imports."""
    modules: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    distributions = metadata.packages_distributions()
    foreign = modules - sys.stdlib_module_names - {"gptoss", "opentelemetry"} - EVALUATIONS
    return {_normal(distributions[module][0]) for module in foreign}


def test_what_is_imported_is_required_and_what_is_required_is_imported() -> None:
    files = required("requirements.txt")
    assert set().union(*(names for extra, names in files.items() if extra != "dev")) == imported() - IMPLIED | INDIRECT
    assert files["transformers"] == {"transformers", "accelerate"}
    assert files["dev"] == {"pytest", "httpx"}


def test_the_locks_hold_every_requirement() -> None:
    for name in ("requirements", "requirements-dev"):
        locked = {_normal(line.partition("==")[0]) for line in (ROOT / f"{name}.lock").read_text().split()}
        assert set.union(*required(f"{name}.txt").values()) <= locked, name


def test_a_backend_without_its_packages_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == "accelerate" else object())
    startup.check_backend(ServerConfig())
    with pytest.raises(ConfigError, match="requires accelerate; .*pip install transformers accelerate"):
        startup.check_backend(ServerConfig(backend="transformers"))
