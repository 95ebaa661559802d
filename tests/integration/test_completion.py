"""`gptoss completion`, by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from gptoss.cli.completion import SHELLS, script
from gptoss.cli.main import COMMANDS
from tests.support.terminal import terminal


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


@pytest.mark.parametrize(
    "arguments, shown, code",
    [
        (("completion", "bash"), "_shtab_gptoss", 0),
        (("eval", "--report", "no-such-folder"), "inspect", 2),  # not installed with the tests
        (("convert", "no-such-model", "out"), "no-such-model", 2),
        (("batch", "run", "no-such.jsonl", "out.jsonl"), "no-such.jsonl", 2),
        (("mcp", "--help"), "usage: gptoss mcp", 0),
        (("apply-patch", "no-such.patch"), "no-such.patch", 2),
        (("unfold", "--help"), "usage: gptoss unfold", 0),
        (("preflight", "--model", "20b", "--model-path", "no-such"), "missing for 20b", None),
    ],
)
def test_commands_in_a_terminal(arguments: tuple[str, ...], shown: str, code: int | None) -> None:
    with terminal(*arguments) as opened:
        found = opened.wait(60)
    assert shown in opened.text and "Traceback" not in opened.text
    assert found == code or (code is None and found not in (0, 1))
