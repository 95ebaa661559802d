"""Weights that threads bring to a device are those that the loader reads by itself. The device is the CPU here."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from gptoss.cli.make_checkpoint import make_checkpoint
from gptoss.engine.model import upload
from gptoss.engine.model.checkpoint import Checkpoint
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import Size
from gptoss.engine.model.tensor_source import CheckpointError, MappedFile
from gptoss.engine.model.upload import Uploader
from gptoss.engine.model.weights import WeightLoader, iterate_tensors
from gptoss.engine.parallel.shards import make_shard
from tests.support.helpers import checkpoint

CPU = torch.device("cpu")
SIZE = Size(layers=2, hidden=64, intermediate=128, experts=4, heads=4, kv_heads=2)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "SMALL_BYTES", 64)
    monkeypatch.setattr(upload, "BUFFER_BYTES", 9000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(SIZE, tmp_path_factory.mktemp("upload") / "model", tokenizer=False)


@pytest.mark.parametrize(("tensor_size", "dequantize"), [(2, False), (1, True)])
def test_the_weights_are_the_same(folder: Path, tensor_size: int, dequantize: bool) -> None:
    config = ModelConfig.from_folder(folder)
    for rank in range(tensor_size):
        shard = make_shard(
            config, rank, tensor_size=tensor_size, stage_layers=[range(config.num_layers)], expert_parallel=False
        )
        plain, brought = (
            WeightLoader(
                Checkpoint(folder, config), config, torch.bfloat16, dequantize=dequantize, shard=shard, uploads=uploads
            ).load()
            for uploads in (False, True)
        )
        pairs = list(zip(iterate_tensors(plain), iterate_tensors(brought), strict=True))
        assert len(pairs) > 15
        assert all(torch.equal(one, two) for one, two in pairs)


def test_pieces_are_read_by_threads_from_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.from_folder(checkpoint())
    source = Checkpoint(checkpoint(), config)
    readers: set[int] = set()
    read = upload._read

    def watched(file: MappedFile, handle: int, buffer: torch.Tensor, offset: int) -> None:
        readers.add(threading.get_ident())
        time.sleep(0.001)
        read(file, handle, buffer, offset)

    monkeypatch.setattr(upload, "_read", watched)
    halves = [source.part(f"model.layers.0.mlp.experts.{half}_proj_blocks") for half in ("gate", "up")]
    assert not halves[0].is_contiguous()
    with Uploader(CPU, source.files) as uploader:
        found = uploader.bring(halves)
        assert uploader._free.qsize() == 2 * upload.READERS
    assert all(torch.equal(one, two) for one, two in zip(halves, found, strict=True))
    assert len(readers) == upload.READERS and threading.get_ident() not in readers
    assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr(), "brought once"


def test_a_tensor_with_gaps_is_brought_without_them() -> None:
    memory = torch.arange(60_000.0).view(300, 200)
    with Uploader(CPU, ()) as uploader:
        (part,) = uploader.bring([memory[:, 20:70]])
        assert torch.equal(part, memory[:, 20:70]) and part.is_contiguous()
        (row,) = uploader.bring([memory[3, ::7]])
        assert torch.equal(row, memory[3, ::7])
        (nothing,) = uploader.bring([memory[:0]])
        assert nothing.shape == (0, 200)


def test_a_file_that_ends_early_is_named(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(50_000))
    file = MappedFile(path)
    tensor = file.view(torch.uint8, (50_000,), 0)
    with Uploader(CPU, [file]) as uploader:
        os.truncate(path, 20_000)
        with pytest.raises(CheckpointError, match=f"{path} ends within a tensor"):
            uploader.bring([tensor])
        assert uploader._free.qsize() == 2 * upload.READERS


def test_the_next_is_made_meanwhile_and_an_error_comes_in_its_turn() -> None:
    made: list[int] = []
    begun = threading.Event()

    def make(number: int) -> int:
        if number == 2:
            raise CheckpointError("two")
        made.append(number)
        if number == 1:
            begun.set()
        return 10 * number

    with Uploader(CPU, ()) as uploader:
        turns = uploader.in_turn(make, range(4))
        assert next(turns) == 0
        assert begun.wait(10)
        assert next(turns) == 10
        with pytest.raises(CheckpointError, match="two"):
            next(turns)
