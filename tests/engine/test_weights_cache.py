"""Re-laid-out weights that are kept: the same bits, made once, never used after a change or damage."""

from __future__ import annotations

import errno
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss.engine.config import EngineConfig
from gptoss.engine.model import weights_cache, weights_file
from gptoss.engine.model.gpt_oss import layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.sources import open_source
from gptoss.engine.model.tensor_source import ranges_of
from gptoss.engine.model.weights import ModelWeights, WeightLoader, iterate_tensors
from gptoss.engine.model.weights_cache import WeightsCache
from gptoss.engine.parallel.shards import whole
from gptoss.engine.worker import worker
from gptoss.kernels.backend import choose_backend
from gptoss.kernels.cpu import native
from gptoss.kernels.int8 import Int8Matrix
from gptoss.kernels.layers import StoredExperts
from tests.support.gguf_files import make_small, write_gguf
from tests.support.helpers import engine_config, model_logits, one_rank

pytestmark = pytest.mark.skipif(native.library() is None, reason="the CPU kernels do not run here")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return make_small(tmp_path / "model")


def loader_of(path: Path, config: ModelConfig, dense_dtype: Any = "auto") -> tuple[WeightLoader, Any]:
    backend = choose_backend(
        torch.device("cpu"), torch.bfloat16, layer_shape(config, whole(config), 4096), dense_dtype=dense_dtype
    )
    source = open_source(path, config)
    loader = WeightLoader(
        source,
        config,
        torch.bfloat16,
        dequantize=False,
        prepare_layer=backend.prepare_layer,
        prepare_head=backend.prepare_head,
        stored_experts=backend.reads_stored_experts,
    )
    return loader, source


def load(path: Path, cache: Path, limit: int = 10**9, dense_dtype: str = "auto") -> ModelWeights:
    config = ModelConfig.from_folder(path if path.is_dir() else path.parent)
    loader, source = loader_of(path, config, dense_dtype)
    found = WeightsCache(cache, limit).load(loader, source, dense_dtype)
    for flush in weights_cache._flushes:
        flush.join()
    return found


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.weights"))


def assert_same(found: ModelWeights, expected: ModelWeights) -> None:
    pairs = list(zip(iterate_tensors(found), iterate_tensors(expected), strict=True))
    assert len(pairs) > 20 and all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def makes(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One element for each time that weights were laid out."""
    counted: list[None] = []
    parts = WeightLoader.parts

    def counting(self: WeightLoader) -> Any:
        counted.append(None)
        return parts(self)

    monkeypatch.setattr(WeightLoader, "parts", counting)
    return counted


@pytest.mark.parametrize("dense_dtype", ["auto", "int8"])
@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_kept_weights_have_the_same_bits_and_are_made_once(
    small: Path, tmp_path: Path, makes: list[None], form: str, dense_dtype: str
) -> None:
    path = small if form == "hf" else write_gguf(small, small / "model.gguf")
    expected = loader_of(path, ModelConfig.from_folder(small), dense_dtype)[0].load()
    del makes[:]
    first, second = (load(path, tmp_path / "cache", dense_dtype=dense_dtype) for _ in range(2))
    assert len(makes) == len(files(tmp_path / "cache")) == 1
    for found in (first, second):
        assert_same(found, expected)
    assert isinstance(second.layers[0].qkv, Int8Matrix) == (dense_dtype == "int8")


def test_what_the_file_has_already_is_not_kept_twice(small: Path, tmp_path: Path) -> None:
    weights = load(small, tmp_path / "cache")
    relaid = sum(t.nbytes for layer in weights.layers for t in (layer.qkv, layer.experts.b1))  # type: ignore[union-attr]
    kept = files(tmp_path / "cache")[0].stat().st_size
    assert relaid < kept < relaid + 40 * weights_file.ALIGNMENT < sum(t.nbytes for t in iterate_tensors(weights))


def test_a_write_to_mapped_weights_stays_in_the_process(small: Path, tmp_path: Path) -> None:
    weights = load(small, tmp_path / "cache")
    for tensor in iterate_tensors(weights):
        tensor.zero_()
    again = load(small, tmp_path / "cache")
    assert again.layers[0].qkv.count_nonzero() and again.embedding.count_nonzero()  # type: ignore[union-attr]


@pytest.mark.parametrize("change", ["time", "size"])
def test_a_changed_checkpoint_is_laid_out_again(small: Path, tmp_path: Path, makes: list[None], change: str) -> None:
    load(small, tmp_path / "cache")
    before = files(tmp_path / "cache")
    if change == "time":
        os.utime(small / "model.safetensors", ns=(1, 1))
    else:
        shutil.rmtree(small)
        make_small(small, vocab=320)
    for path in before:
        weights_cache._held.pop(path, None)  # as if that process had ended; its lock goes with the descriptor
    load(small, tmp_path / "cache")
    assert len(makes) == 2 and set(files(tmp_path / "cache")) - set(before)


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("damage", ["data", "table", "end", "truncated", "empty"])
def test_a_damaged_file_is_made_again(
    small: Path, tmp_path: Path, makes: list[None], caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    expected = load(small, tmp_path / "cache")
    path = files(tmp_path / "cache")[0]
    path.with_suffix(weights_cache.VERIFIED).unlink()  # as after a boot
    match damage:
        case "truncated":
            os.truncate(path, path.stat().st_size - 5000)
        case "empty":
            os.truncate(path, 0)
        case _:
            flip(path, {"data": 9000, "table": -200, "end": -3}[damage])
    assert_same(load(small, tmp_path / "cache2"), loader_of(small, ModelConfig.from_folder(small))[0].load())
    found = load(small, tmp_path / "cache")
    assert f"damaged weights cache {path}" in caplog.text
    assert_same(found, load(small, tmp_path / "cache2"))
    assert expected is not None and len(makes) >= 3


@pytest.mark.parametrize("keeps_time", [False, True])
def test_damage_after_the_sums_were_compared_is_found(
    small: Path, tmp_path: Path, makes: list[None], caplog: pytest.LogCaptureFixture, keeps_time: bool
) -> None:
    expected = load(small, tmp_path / "cache")
    path = files(tmp_path / "cache")[0]
    before = path.stat()
    flip(path, 9000)
    if keeps_time:  # as of a disk: here the only portion is compared at each start
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert_same(load(small, tmp_path / "cache"), loader_of(small, ModelConfig.from_folder(small))[0].load())
    assert f"damaged weights cache {path}" in caplog.text and expected is not None and len(makes) == 3


def test_a_start_compares_a_few_portions_and_the_first_after_a_boot_all(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_file, "PORTION", 5000)
    load(small, tmp_path / "cache")
    path = files(tmp_path / "cache")[0]
    count = len(weights_file.read_table(path)["sums"])
    compared: list[int] = []

    def choose(numbers: range, most: int) -> list[int]:
        compared.append(most)
        return list(numbers)[-most:]

    monkeypatch.setattr(weights_cache.random, "sample", choose)
    load(small, tmp_path / "cache")
    assert count > 10 and compared == [weights_cache.SAMPLED]
    flip(path, 100)
    load(small, tmp_path / "cache")  # a new time: all
    assert len(compared) == 1 and len(files(tmp_path / "cache")) == 1


def test_a_file_that_cannot_be_flushed_is_removed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(weights_cache.os, "fsync", fails)
    assert load(small, tmp_path / "cache").embedding is not None
    assert "could not be written: Input/output error" in caplog.text and not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_experts_are_read_where_the_file_has_them(small: Path, tmp_path: Path, form: str) -> None:
    path = small if form == "hf" else write_gguf(small, small / "model.gguf")
    config = ModelConfig.from_folder(small)
    loader, source = loader_of(path, config)
    stored = loader.load()
    for layer in stored.layers:
        assert isinstance(layer.experts, StoredExperts)
        for tensor in (*native.matrix_parts(layer.experts.w1), *native.matrix_parts(layer.experts.w2)):
            assert tensor is None or any(file.offset_of(tensor) is not None for file in source.files)
    relaid = WeightLoader(source, config, torch.bfloat16, dequantize=False).load()
    ids = torch.arange(2, 40)
    found, expected = (model_logits(one_rank(config, weights), ids, last=4) for weights in (stored, relaid))
    if form == "hf" or native.available_instruction_sets()[0] == "avx512":
        assert torch.equal(found, expected)
    else:  # a lane adds other columns
        assert torch.allclose(found, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_the_sums_are_compared_once_after_a_boot(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(small, tmp_path / "cache")
    boot = tmp_path / "boot_id"
    boot.write_text("another")
    monkeypatch.setattr(weights_cache, "BOOT_ID", boot)
    compared: list[Path] = []
    remember = weights_cache._remember
    monkeypatch.setattr(weights_cache, "_remember", lambda path: (compared.append(path), remember(path)))
    load(small, tmp_path / "cache")
    load(small, tmp_path / "cache")
    assert len(compared) == 1


def test_beyond_the_limit_weights_stay_in_memory_and_the_log_says_so(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = load(small, tmp_path / "cache", limit=100_000)
    assert "laid out in memory" in caplog.text and "weights_cache_gib" in caplog.text
    assert not list((tmp_path / "cache").iterdir())
    assert_same(found, loader_of(small, ModelConfig.from_folder(small))[0].load())


def test_a_folder_that_cannot_be_written_is_not_fatal(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    found = load(small, tmp_path / "file" / "cache")
    assert "Not a directory" in caplog.text and str(tmp_path / "file") in caplog.text
    assert found.embedding is not None


def test_the_least_recently_used_file_goes_first_and_none_in_use(small: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    names = {}
    for name in ("a", "b", "c"):
        shutil.copytree(small, tmp_path / name)
        before = set(files(cache))
        size = files(cache)[0].stat().st_size if before else 0
        load(tmp_path / name, cache, limit=2 * size + 10_000 if name == "c" else 10**9)
        names[name] = (set(files(cache)) - before).pop()
        if name == "a":
            os.close(weights_cache._held.pop(names["a"]))  # its process has ended
    assert set(files(cache)) == {names["b"], names["c"]}


def test_two_at_once_make_one_file(small: Path, tmp_path: Path, makes: list[None]) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: load(small, tmp_path / "cache"), range(2))
    assert len(makes) == 1
    assert_same(first, second)


def test_what_a_killed_process_left_is_removed(small: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "x.making").write_bytes(b"1")
    load(small, tmp_path / "cache")
    assert [path.suffix for path in sorted((tmp_path / "cache").iterdir())] == [".verified", ".weights"]


@pytest.mark.parametrize(("gib", "kept"), [(1.0, 1), (0.0, 0)])
def test_the_worker_keeps_weights_unless_told_otherwise(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gib: float, kept: int
) -> None:
    monkeypatch.setattr(worker, "LEAST_BYTES", 0)
    config: EngineConfig = engine_config(
        small, dtype="bfloat16", weights_cache_dir=tmp_path / "cache", weights_cache_gib=gib
    )
    worker.Worker(config).load()
    assert len(files(tmp_path / "cache")) == kept


def test_neighbouring_tensors_are_one_range_of_pages() -> None:
    memory = torch.zeros(100 * 4096, dtype=torch.uint8)
    start = -memory.data_ptr() % 4096
    at = memory.data_ptr() + start
    parts = [memory[start + a : start + b] for a, b in ((9000, 20_000), (0, 9000), (60_000, 60_001), (20_100, 30_000))]
    assert ranges_of(parts) == [(at, at + 30_000), (at + 57_344, at + 60_001)]
