"""Cached files that are damaged, and caches that cannot be written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from gptoss import cached_files, run_folder
from gptoss.cached_files import CacheError, cached, damage
from gptoss.harmony import vocabulary_files
from tests.support.vocabulary import tokenizer_folder

ROOT = Path(__file__).resolve().parents[2]


class Maker:
    """Makes a file, or a folder of two, and counts how often."""

    def __init__(self, *, folder: bool) -> None:
        self.folder, self.count = folder, 0

    def __call__(self, path: Path) -> None:
        self.count += 1
        if self.folder:
            (path / "below").mkdir(parents=True)
            (path / "config").write_bytes(b"{}")
            path = path / "below" / "weights"
        path.write_bytes(b"x" * 1000)


def truncate(path: Path) -> None:
    os.truncate(path, 10)


def flip(path: Path) -> None:
    path.write_bytes(b"y" + path.read_bytes()[1:])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("harm", [truncate, flip, empty, Path.unlink])
def test_what_is_damaged_is_made_again_and_named(
    harm: Callable[[Path], None], folder: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, path = Maker(folder=folder), tmp_path / "cache" / "thing"
    assert cached(path, make) == path and make.count == 1
    assert cached(path, make) == path and make.count == 1 and not caplog.records
    file = path / "below" / "weights" if folder else path
    harm(file)
    assert cached(path, make) == path and make.count == 2
    assert file.read_bytes() == b"x" * 1000 and damage(path) is None
    if file.name in {p.name for p in path.parent.iterdir()} and harm is Path.unlink:
        assert not caplog.records  # a file that is missing is not damaged
    else:
        assert f"damaged cache: {file}" in caplog.text
    assert cached(path, make) == path and make.count == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b'{"thing": {"num_bytes": "x"}}', b"\xff"])
def test_a_damaged_record_is_no_record(content: bytes, tmp_path: Path) -> None:
    make = Maker(folder=True)
    path = cached(tmp_path / "thing", make)
    (tmp_path / "thing.sums").write_bytes(content)
    assert cached(path, make) == path and make.count == 2 and damage(path) is None
    (tmp_path / "thing.sums").unlink()
    assert cached(path, make) == path and make.count == 3 and damage(path) is None


def test_a_folder_in_the_place_of_a_file_and_the_reverse(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    assert cached(tmp_path / "file", Maker(folder=False)).is_file()
    (tmp_path / "folder").write_bytes(b"")
    assert cached(tmp_path / "folder", Maker(folder=True)).is_dir()


def blocked_by_a_file(cache: Path) -> Path:
    cache.write_bytes(b"")
    return cache / "gpt-oss-server" / "thing"


def of_no_space(cache: Path) -> Path:
    return cache / "thing"


@pytest.mark.parametrize("where", [blocked_by_a_file, of_no_space])
def test_without_a_writable_cache_it_is_made_for_this_process(
    where: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    path = where(tmp_path / "cache")
    full = Maker(folder=False)

    def make(made: Path) -> None:
        if "cache" in made.parts:
            raise OSError(28, "No space left on device")
        full(made)

    made = cached(path, make)
    assert made.read_bytes() == b"x" * 1000
    assert made.parent.name.startswith(run_folder.PREFIX)
    assert f"no cache: cannot write {path}" in caplog.text and "XDG_CACHE_HOME" in caplog.text


def test_where_nothing_can_be_written_the_error_is_one_line_with_the_remedy(tmp_path: Path) -> None:
    def make(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CacheError) as error:
        cached(tmp_path / "thing", make)
    text = str(error.value)
    assert "\n" not in text
    for part in (str(tmp_path / "thing"), "No space left", "set XDG_CACHE_HOME to a writable"):
        assert part in text
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_there_is_still_a_name_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cached_files.default_cache_folder() == Path("/.cache/gpt-oss-server")


def test_sources_that_are_not_utf_8_are_read_and_written(tmp_path: Path) -> None:
    target, tokenizer = tmp_path / vocabulary_files.RANKS_NAME, tokenizer_folder() / "tokenizer.json"
    sources = target.with_suffix(".sources")
    sources.write_bytes(b"\xff\xfe broken\n")
    assert not vocabulary_files._cached_source(target, tokenizer)
    vocabulary_files._remember_source(target, tokenizer)
    assert vocabulary_files._cached_source(target, tokenizer)
    sources.unlink()
    sources.mkdir()
    assert not vocabulary_files._cached_source(target, tokenizer)
    vocabulary_files._remember_source(target, tokenizer)  # cannot, and does no harm


# --- what is in the way, and records that are wrong ---


def _record_is_a_folder(path: Path) -> None:
    record = path.with_name(path.name + ".sums")
    record.unlink()
    (record / "below").mkdir(parents=True)


def _record(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.with_name(path.name + ".sums").write_bytes(content)

    return write


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _link_to(target: str) -> Callable[[Path], None]:
    def link(path: Path) -> None:
        _remove(path)
        path.symlink_to(target)

    return link


def _other_kind(path: Path) -> None:
    was_folder = path.is_dir()
    _remove(path)
    if was_folder:
        path.write_bytes(b"x")
    else:
        (path / "below").mkdir(parents=True)


def _parent_is_a_file(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.write_bytes(b"x")


def _parent_is_a_dangling_link(path: Path) -> None:
    shutil.rmtree(path.parent)
    path.parent.symlink_to("nothing-is-here")


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize(
    "harm",
    [
        _record_is_a_folder,
        _record(b'{"\xff":{"num_bytes":1,"sha256":"x"}}'),
        _record(b'{"a\\u0000":{"num_bytes":1,"sha256":"x"}}'),
        _record(b"[" * 100_000),
        _link_to("nothing-is-here"),
        _link_to("thing"),
        _link_to("/dev/zero"),
        _other_kind,
        _parent_is_a_file,
        _parent_is_a_dangling_link,
    ],
)
def test_what_is_in_the_way_is_replaced(
    harm: Callable[[Path], None], folder: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, path = Maker(folder=folder), tmp_path / "cache" / "thing"
    cached(path, make)
    harm(path)
    assert cached(path, make) == path and make.count == 2 and damage(path) is None
    assert "damaged cache" in caplog.text and not path.is_symlink()
    assert sorted(p.name for p in path.parent.iterdir()) == ["thing", "thing.sums"]


def test_a_file_that_was_added_to_a_folder_is_removed(tmp_path: Path) -> None:
    make, path = Maker(folder=True), tmp_path / "cache" / "thing"
    cached(path, make)
    (path / "a.safetensors").write_bytes(b"x")
    assert cached(path, make) == path and not (path / "a.safetensors").exists()
