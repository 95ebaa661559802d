"""Measures times on a GPU, and the limits of its memory and matrix units."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import triton


@dataclass
class Row:
    """One line of the table."""

    section: str
    name: str
    us: float
    moved_bytes: int = 0
    flops: int = 0
    note: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def as_dict(self, ceilings: dict[str, float]) -> dict[str, Any]:
        seconds = self.us / 1e6
        row = asdict(self)
        if self.moved_bytes:
            row["tb_s"] = round(self.moved_bytes / seconds / 1e12, 3)
            row["of_copy"] = round(row["tb_s"] / ceilings["copy_tb_s"], 3)
        if self.flops:
            row["tflop_s"] = round(self.flops / seconds / 1e12, 1)
            row["of_matmul"] = round(row["tflop_s"] / ceilings["matmul_tflop_s"], 3)
        return row


def time_us(run: Callable[[], object], repeat_ms: int = 100) -> float:
    """Median over runs that find the L2 cache cold."""
    return float(triton.testing.do_bench(run, warmup=20, rep=repeat_ms, return_mode="median")) * 1e3


def graph_us(run: Callable[[], object], repeats: int = 20) -> float:
    """Mean of back-to-back runs in a CUDA graph: what a step costs without Python."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / repeats


def measure_ceilings() -> dict[str, float]:
    """TB/s of a copy (read + written) and TFLOP/s of cuBLAS in bfloat16, on this card, now."""
    x = torch.empty(1 << 31, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    copy = 2 * x.numel() / time_us(lambda: y.copy_(x)) / 1e6
    x = y = torch.empty(0)  # their memory back
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    matmul = 2 * 8192**3 / time_us(lambda: a @ b) / 1e6
    return {"copy_tb_s": copy, "matmul_tflop_s": matmul}
