"""The GPU benchmarks run to their end: on a GPU machine minutes are dear. Here they run on tiny models, and time nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench.gpu import kernels, measure, model, timing
from bench.gpu.timing import Row
from src.engine.shapes import Size, hf_config
from src.engine.worker import graph_runner
from src.kernels import native
from src.kernels.gpu import support
from tests.kernels.gpu_helpers import DEVICE, TYPE

pytestmark = [
    pytest.mark.skipif(
        DEVICE.type == "cuda", reason="bench/gpu/run.sh runs the benchmarks themselves"
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
]
TINY = {"20b": Size(layers=2, hidden=64, intermediate=32, experts=6, heads=4, kv_heads=2)}
CEILINGS = {"copy_tb_s": 4.0, "matmul_tflop_s": 700.0}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def once(run: Callable[[], object], repeat_ms: int = 100) -> float:
        run()
        return 1.0

    for module in (kernels, model):
        monkeypatch.setattr(module, "DEVICE", DEVICE)
        monkeypatch.setattr(module, "SIZES", TINY)
        monkeypatch.setattr(module, "hf_config", lambda size: hf_config(size) | {"vocab_size": 512})
        monkeypatch.setattr(module.torch, "bfloat16", TYPE)
    for repeats in ("REPEATS", "PREFILL_REPEATS"):
        monkeypatch.setattr(model, repeats, 1)
    monkeypatch.setattr(kernels, "time_us", once)
    monkeypatch.setattr(model, "graph_us", once)
    monkeypatch.setattr(model, "graph_time", lambda graphs, batch: 1.0)
    monkeypatch.setattr(graph_runner, "CudaGraphs", lambda: lambda forward: forward)
    monkeypatch.setattr(support, "runs_triton", lambda _: True)
    monkeypatch.setattr(native, "supports", lambda _: False)  # what stands for bfloat16 here is not
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


@pytest.mark.parametrize("tokens", [2, 66])
def test_kernel_rows(tokens: int) -> None:
    rows = [bench.row("kernels") for bench in kernels.Layer("20b").benches(tokens, context=80)]
    names = " ".join(row.name for row in rows)
    for kernel in (
        "qkv",
        "out",
        "router",
        "lm_head",
        "moe_w1",
        "moe_w2",
        "attention full",
        "attention sliding",
    ):
        assert f"20b {kernel}" in names
    for row in rows:
        assert row.as_dict(CEILINGS)["us"] == 1.0


def test_model_rows(capsys: pytest.CaptureFixture[str]) -> None:
    loaded = model.Loaded("20b", max_tokens=1000)
    for row in (loaded.check(), loaded.decode(2, 70), loaded.prefill(20)):
        measure.show(row.as_dict(CEILINGS))
    assert "tok/s" in capsys.readouterr().out


def test_launch_rows() -> None:
    assert [row.section for row in model.launches()] == ["launch"]


def test_what_a_row_says() -> None:
    row = Row("kernels", "one", 10.0, moved_bytes=20_000_000, flops=3_500_000_000).as_dict(CEILINGS)
    assert (row["tb_s"], row["of_copy"], row["tflop_s"], row["of_matmul"]) == (2.0, 0.5, 350.0, 0.5)


def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure.main(["--out", str(tmp_path)]) == 3
    assert "no NVIDIA GPU" in capsys.readouterr().err
    assert timing.Row
