"""`gptoss completion`, by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from gptoss.cli.completion import SHELLS, script
from gptoss.cli.main import COMMANDS


@pytest.mark.parametrize(
    "typed, completed",
    [
        (("me",), "memory-plan"),
        (("chat", "--eff"), "--effort"),
        (("chat", "--effort", ""), "low medium high"),
        (("serve", "--cpu-isa", ""), "auto avx2 avx512"),
        (("stop", "--for"), ""),
    ],
)
def test_bash_completes(typed: tuple[str, ...], completed: str) -> None:
    words = " ".join(f"'{word}'" for word in ("gptoss", *typed))
    shown = f'COMP_WORDS=({words}); COMP_CWORD={len(typed)}; _shtab_gptoss; echo "${{COMPREPLY[@]}}"'
    found = subprocess.run(["bash", "-c", f"{script('bash')}\n{shown}"], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == completed and found.stderr == ""


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_is_in_the_script(shell: str) -> None:
    written = script(shell)
    assert all(name in written for name in COMMANDS)
    if (program := shutil.which(shell)) is not None:
        assert subprocess.run([program, "-n"], input=written, capture_output=True, text=True).stderr == ""
