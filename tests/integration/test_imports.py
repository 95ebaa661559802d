"""What processes load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_child_that_imports_the_main_module_loads_nothing_by_that() -> None:
    """multiprocessing has the engine's process and each rank do so, at every start."""
    for main in ("gptoss.server", "gptoss.__main__", "gptoss.cli.main"):
        code = (
            f"import sys, multiprocessing.spawn; before = set(sys.modules); import {main}; "
            "loaded = {name.split('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; "
            "sys.exit(loaded != {'gptoss'} or 'gptoss.launcher' in sys.modules)"
        )
        assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, main


def test_the_api_process_loads_no_torch() -> None:
    code = "import sys, gptoss.api.app, gptoss.launcher; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_server_needs_neither_sklearn_nor_scipy_nor_a_numpy_patch() -> None:
    code = "import sys, gptoss.launcher, gptoss.engine.core.process; sys.exit(any(m in sys.modules for m in ('sklearn', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_huggingfaces_kernels_is_not_shadowed() -> None:
    """src/ has a folder `kernels` too; run as a script, Python puts src/ first."""
    code = "import runpy, sys; sys.path.insert(0, 'src'); runpy.run_path('src/server.py', run_name='child'); print(sys.path[0])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()) == ROOT
