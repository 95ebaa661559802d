"""Patches applied to files: what they become, and that nothing else is touched."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from gptoss.cli.main import main
from gptoss.tools.apply_patch import apply, root
from gptoss.tools.apply_patch.apply import Changed, apply_patch
from gptoss.tools.apply_patch.parser import PatchError


def patch(*lines: str) -> str:
    return "\n".join(("*** Begin Patch", *lines, "*** End Patch"))


def update(path: str, *lines: str) -> str:
    return patch(f"*** Update File: {path}", *lines)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, and every empty folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes().decode()
        elif not any(path.iterdir()):
            found[name + "/"] = ""
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "root" / "src").mkdir(parents=True)
    (tmp_path / "root" / "a.py").write_text("one\ntwo\nthree\n")
    (tmp_path / "root" / "src" / "b.py").write_text("class B:\n    def f(self):\n        return 1\n")
    (tmp_path / "outside.txt").write_text("secret\n")
    return tmp_path / "root"


def test_one_patch_adds_changes_moves_and_deletes(folder: Path) -> None:
    (folder / "old.txt").write_text("gone\n")
    (folder / "a.py").chmod(0o751)
    text = patch(
        *("*** Add File: new/deep/c.txt", "+first", "+", "+*** End Patch"),
        *("*** Update File: a.py", "@@", " one", "-two", "+2", "+2.5", " three"),
        *(
            "*** Update File: src/b.py",
            "*** Move to: lib/b.py",
            "@@ class B:",
            "-        return 1",
            "+        return 2",
        ),
        "*** Delete File: old.txt",
    )
    before = tree(folder)
    assert apply_patch(text, folder, dry_run=True) == apply_patch(text, folder) != []
    assert tree(folder) != before
    assert tree(folder) == {
        "a.py": "one\n2\n2.5\nthree\n",
        "lib/b.py": "class B:\n    def f(self):\n        return 2\n",
        "new/deep/c.txt": "first\n\n*** End Patch\n",
        "src/": "",
    }
    assert (folder / "a.py").stat().st_mode & 0o777 == 0o751


def test_the_result_names_what_changed(folder: Path) -> None:
    text = patch(
        "*** Update File: a.py",
        "*** Move to: z.py",
        "-one",
        "+1",
        "+1.5",
        "*** Add File: n",
        "*** Delete File: src/b.py",
    )
    assert apply_patch(text, folder) == [
        Changed("R", "a.py", "z.py", 2, 1),
        Changed("A", "n", None, 0, 0),
        Changed("D", "src/b.py", None, 0, 3),
    ]


@pytest.mark.parametrize(
    ("before", "lines", "after"),
    [
        ("a\nb\n", ["+c"], "a\nb\nc\n"),  # no context: at the end
        ("a\nb\na\nb\n", [" a", "-b", "+x", "@@", " a", "-b", "+y"], "a\nx\na\ny\n"),  # in order
        ("a\nb\na\nb\n", ["@@", " a", "-b", "+x", "*** End of File"], "a\nb\na\nx\n"),
        ("def f():\n    x\ndef g():\n    x\n", ["@@ def g():", "-    x", "+    y"], "def f():\n    x\ndef g():\n    y\n"),
        ("class A:\n  def f\n    x\nclass B:\n  def f\n    x\n", ["@@ class B:", "@@   def f", "-    x", "+    y"], "class A:\n  def f\n    x\nclass B:\n  def f\n    y\n"),
        ("def g():\n    x\n", ["@@ def g():", "+    first"], "def g():\n    first\n    x\n"),
        ("a\nb", [" a", "-b", "+c"], "a\nc\n"),
        ("a\nb", ["-a", "+c", " b"], "c\nb"),  # no newline at the end stays so
        ("a\r\nb\r\n", [" a", "-b", "+c"], "a\r\nc\r\n"),
        ("\ufeffa\nb\n", ["-a", "+c"], "\ufeffc\nb\n"),
        ("a  \n\tb\nc\n", [" a", " b", "-c", "+d"], "a  \n\tb\nd\n"),  # context keeps the file's whitespace
        ("say “hi” – now\nx\n", [' say "hi" - now', "-x", "+y"], "say “hi” – now\ny\n"),
        ("a\n\nb\n", [" a", "", "-b", "+c"], "a\n\nc\n"),
        ("a\nb\n", ["@@ -1,2 +1,2 @@", "-a", "+c"], "c\nb\n"),  # the numbers of diff -u
        ("a\nb\n", ["-a", "-b"], ""),
        ("", ["+a"], "a\n"),
        ("a\nb\n", ["-a", "+x", "", "*** Add File: n"], "x\nb\n"),  # an empty line between two files
    ],
)  # fmt: skip
def test_hunks(folder: Path, before: str, lines: list[str], after: str) -> None:
    (folder / "f").write_bytes(before.encode())
    apply_patch(update("f", *lines), folder)
    assert (folder / "f").read_bytes().decode() == after


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "line 1 of the patch, 'hello': a patch begins with '*** Begin Patch'"),
        ("\n*** Begin Patch\n*** Delete File: a.py", "line 3 of the patch, '*** Delete File: a.py': a patch ends with"),
        (patch(), "the patch changes no file"),
        (patch("+x"), "line 2 of the patch, '+x': a header"),
        (patch("*** Add File: n", "x"), "line 3 of the patch, 'x': every line of a new file begins with '+'"),
        (patch("*** Add File: "), "line 2 of the patch, '*** Add File: ': the path is missing"),
        (patch("*** Delete File: a.py", "+x"), "line 3 of the patch, '+x': nothing follows"),
        (update("a.py", "x"), "line 3 of the patch, 'x': a line of a change begins with"),
        (update("a.py"), "line 2 of the patch, '*** Update File: a.py': nothing of the file changes"),
        (update("a.py", "@@ one"), "line 3 of the patch, '@@ one': no change follows"),
        (update("a.py", " one", "-2", "+x"), "line 4 of the patch, '-2': line 2 of a.py is 'two'"),
        (update("a.py", "-nine"), "line 3 of the patch, '-nine': a.py has no such line"),
        (update("a.py", " three", "-four"), "line 4 of the patch, '-four': a.py ends before it"),
        (update("a.py", "@@ def f():", "-x"), "line 3 of the patch, '@@ def f():': a.py has no line 'def f():'"),
        (update("a.py", "-one", "*** End of File"), "'-one': a.py has these lines, but not at its end"),
        (update("a.py", "-two", "+2", "@@", "-one"), "line 6 of the patch, '-one': a.py has no such line after its line 2"),
        (patch("*** Add File: a.py", "+x"), "line 2 of the patch, '*** Add File: a.py': the file exists already"),
        (patch("*** Update File: a.py", "*** Move to: src/b.py"), "'*** Move to: src/b.py': the file exists already"),
        (patch("*** Update File: a.py", "-one", "*** Move to: c"), "'*** Move to: c': a file is moved once, right after"),
        (patch("*** Delete File: a.py", "*** Delete File: ./a.py"), "line 2 changes this file already"),
        (update("none.py", "+x"), "'*** Update File: none.py': there is no such file"),
        (update("src", "+x"), "'*** Update File: src': the path is not a regular file"),
        (update("a.py/x", "+x"), "'a.py' is not a folder"),
        (patch("*** Add File: a\0b"), "NUL"),
        (patch("*** Add File: x/"), "the path names no file"),
        (patch("*** Add File: " + "d/" * 2000 + "x"), "more than 128 folders"),
        (patch("*** Add File: " + "n" * 300, "+x"), "File name too long"),
        (patch("*** Add File: n", "+\ud800"), "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_an_error_that_quotes_the_line(folder: Path, text: str, message: str) -> None:
    before = tree(folder)
    with pytest.raises(PatchError) as raised:
        apply_patch(text, folder)
    assert message in str(raised.value)
    assert tree(folder) == before


@pytest.mark.parametrize(
    "path", ["../outside.txt", "src/../../outside.txt", "/etc/passwd", "link/x", "file_link", "dangling"]
)
@pytest.mark.parametrize("kind", ["Add", "Update", "Delete", "Move"])
def test_nothing_outside_the_root(folder: Path, path: str, kind: str) -> None:
    (folder / "link").symlink_to("..")
    (folder / "link" / "x").write_text("secret\n")
    (folder / "file_link").symlink_to("../outside.txt")
    (folder / "dangling").symlink_to("../made.txt")
    named = path if not path.startswith("/etc") else str(folder.parent / "outside.txt")
    body = {"Add": ["+x"], "Update": ["-secret", "+x"], "Delete": [], "Move": []}[kind]
    lines = [f"*** {kind} File: {named}", *body]
    if kind == "Move":
        lines = ["*** Update File: a.py", f"*** Move to: {named}"]
    before = tree(folder.parent)
    with pytest.raises(PatchError):
        apply_patch(patch("*** Add File: first", "+x", *lines), folder)
    assert tree(folder.parent) == before


def test_special_files_are_refused(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "binary").write_bytes(b"\xff\xfe\0")
    for path, message in (("pipe", "not a regular file"), ("binary", "not UTF-8")):
        with pytest.raises(PatchError, match=message):
            apply_patch(update(path, "+x"), folder)


def test_a_hard_link_outside_keeps_its_content(folder: Path) -> None:
    os.link(folder.parent / "outside.txt", folder / "hard")
    apply_patch(update("hard", "-secret", "+changed"), folder)
    assert (folder / "hard").read_text() == "changed\n"
    assert (folder.parent / "outside.txt").read_text() == "secret\n"


EVERYTHING = patch(
    *("*** Update File: a.py", "-one", "+1"),
    *("*** Add File: new/n.txt", "+x"),
    *("*** Update File: src/b.py", "*** Move to: lib/b.py"),
    *("*** Delete File: c.txt",),
)


@pytest.mark.parametrize("call", ["write_beside", "link", "rename", "remove", "is_unchanged"])
@pytest.mark.parametrize("index", range(5))
def test_an_error_at_any_point_leaves_all_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str, index: int
) -> None:
    (folder / "c.txt").write_text("c\n")
    before = tree(folder)
    real, calls = getattr(apply, call), iter(range(100))

    def fails(*args: object) -> object:
        if next(calls) == index:
            if call == "is_unchanged":
                return False
            raise OSError(28, "No space left on device")
        return real(*args)

    monkeypatch.setattr(apply, call, fails)
    try:
        apply_patch(EVERYTHING, folder)
    except PatchError as error:
        assert "nothing was changed" in str(error)
        assert tree(folder) == before
    else:  # fewer calls than that, a second name instead of a link, or what is left over at the end
        assert {name: text for name, text in tree(folder).items() if "." not in (name[0], Path(name).name[0])} == {
            "a.py": "1\ntwo\nthree\n", "lib/b.py": "class B:\n    def f(self):\n        return 1\n", "new/n.txt": "x\n", "src/": "",
        }  # fmt: skip


def test_a_full_disk_leaves_no_half_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    before = tree(folder)
    monkeypatch.setattr(root.os, "fsync", full)
    with pytest.raises(PatchError, match="'\\*\\*\\* Add File: deep/n': No space left on device; nothing was changed"):
        apply_patch(patch("*** Add File: deep/n", "+x"), folder)
    assert tree(folder) == before


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    file = folder.parent / "p.patch"
    file.write_text(update("a.py", "-one", "+1"))
    assert main(["apply-patch", "--root", str(folder), "--dry-run", str(file)]) == 0
    assert (folder / "a.py").read_text() == "one\ntwo\nthree\n"
    assert main(["apply-patch", "--root", str(folder), str(file)]) == 0
    assert capsys.readouterr().out == "M a.py (+1 -1)\n" * 2
    assert main(["apply-patch", "--root", str(folder), str(file)]) == 1
    assert capsys.readouterr().err == "error: line 3 of the patch, '-one': a.py has no such line\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(patch("*** Delete File: a.py").encode())))
    monkeypatch.chdir(folder)
    assert main(["apply-patch", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["applied"] and shown["changes"][0]["letter"] == "D" and not (folder / "a.py").exists()


def test_options_and_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "latin").write_bytes(b"\xe9")
    for argv in (["--root", str(tmp_path / "none")], [str(tmp_path / "none")], [str(tmp_path / "latin")]):
        assert main(["apply-patch", *argv]) == 2
        assert capsys.readouterr().err.startswith("error: ")
