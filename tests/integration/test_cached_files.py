"""Cached files of several processes, and the library of kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gptoss import cached_files, run_folder
from gptoss.cached_files import cached
from gptoss.kernels.cpu import native
from gptoss.run_folder import RunFolder
from tests.quick.test_cached_files import Maker

ROOT = Path(__file__).resolve().parents[2]


def test_an_intact_cache_need_not_be_writable(tmp_path: Path) -> None:
    path, make = tmp_path / "thing", Maker(folder=True)
    cached(path, make)
    code = (
        "import sys; from pathlib import Path; from gptoss.cached_files import cached; "
        "cached(Path(sys.argv[1]), lambda path: sys.exit('made again'))"
    )
    for entry in (path, tmp_path):
        entry.chmod(0o555)
    try:
        done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT)
    finally:
        tmp_path.chmod(0o755)
        path.chmod(0o755)
    assert done.returncode == 0


SLEEPER = """
import os, sys, time
from pathlib import Path
from gptoss.cached_files import cached
from gptoss.run_folder import RunFolder
folder = RunFolder()
def make(path):
    path.write_bytes(b"half")
    print(folder.path, flush=True)
    time.sleep(60)
cached(Path(sys.argv[1]) / "thing", make)
"""


def test_the_next_start_removes_what_a_killed_one_left_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    cache.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    others = [temporary / "gpt-oss-20b", temporary / "gpt-oss-run-mine", cache / "tmpabcdefgh"]
    for other in others:
        other.mkdir()
    old = cache / "tmp12345678"  # as earlier versions named them
    old.mkdir()
    os.utime(old, (0, 0))
    link = temporary / f"{run_folder.PREFIX}aaaaaaaa"
    link.symlink_to(others[0])
    with subprocess.Popen(
        [sys.executable, "-c", SLEEPER, str(cache)],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        text=True,
    ) as killed:
        assert killed.stdout is not None
        left = Path(killed.stdout.readline().strip())
        assert left.is_dir() and left.parent == temporary
        assert len(list(cache.glob(f"{cached_files.MAKING}*"))) == 1
        with RunFolder() as mine:
            assert left.is_dir(), "its process runs"
            run_folder.remove_abandoned()
            assert mine.is_dir()
        killed.kill()
    cached(cache / "thing", Maker(folder=False))
    RunFolder().remove()
    assert not left.exists() and not mine.exists() and not old.exists()
    assert not list(cache.glob(f"{cached_files.MAKING}*"))
    assert all(other.is_dir() for other in others) and link.is_symlink()


def test_of_two_starts_at_once_one_makes_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from gptoss.cached_files import cached\n"
        "def make(path):\n"
        "    print('made', flush=True); time.sleep(0.3); path.write_bytes(b'x')\n"
        "cached(Path(sys.argv[1]), make)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "thing")]
    starts = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(start.communicate()[0] for start in starts) == ["", "", "made\n"]


@pytest.mark.skipif(native.library() is None, reason="no native kernels on this machine")
def test_a_damaged_library_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A truncated one would end the process by SIGBUS, an empty one turn the kernels off."""
    current = native.library()
    assert current is not None
    intact = current._name
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_compile", lambda _, __, made: shutil.copy(intact, made))
    load = native.library.__wrapped__
    assert load() is not None
    (library,) = (tmp_path / "gpt-oss-server" / "native").glob("*.so")
    truncated = library.with_suffix(".new")
    truncated.write_bytes(library.read_bytes()[:5000])
    truncated.replace(library)  # the loaded one stays as it is
    assert load() is not None
    assert f"damaged cache: {library} has 5000 bytes" in caplog.text
