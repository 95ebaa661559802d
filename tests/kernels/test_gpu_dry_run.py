"""What the engine compiles and launches, found by triton's own binder on meta tensors: nothing is compiled while it
serves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from bench.kernels.cases import load_table

# what its kernels have rows in the launch table for; those that are not here take no configuration from it
ROWS_OF = {
    "_qkv_kernel": ("qkv",),
    "_linear_kernel": ("out", "lm_head"),
    "_route_few_kernel": ("router",),
    "_route_many_kernel": ("router",),
    "_place_kernel": ("moe_w1",),
    "_moe_w1_kernel": ("moe_w1",),
    "_moe_w2_kernel": ("moe_w2",),
}
OTHERS = {"_attention_kernel": 4}  # full and sliding, of one new token and of many


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """In a process of its own, as here kernels are defined for the interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.kernels.dry_run", "--check"],
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("invariant", ["False", "True"])
def test_a_prompt_of_any_length_takes_a_compilation_of_the_launch_table(found: dict[str, Any], invariant: str) -> None:
    table = load_table()["sm_90"]
    counts = found["eager"][invariant]["counts"]
    assert len(counts) >= 8
    for kernel, count in counts.items():
        rows = [
            table.get(f"{name}.invariant" if invariant == "True" else name, table[name])
            for name in ROWS_OF.get(kernel, ())
        ]
        # the experts' kernels find their experts themselves for a few tokens, and read a list for more
        direct = invariant == "True" and kernel.startswith("_moe")
        limit = sum(map(len, rows)) + direct if rows else OTHERS.get(kernel, 1)
        assert count <= limit, kernel


@pytest.mark.parametrize("start", ["7", "32", "256", "fp8"])
def test_a_start_compiles_all_that_mixed_steps_ask_for(found: dict[str, Any], start: str) -> None:
    assert sum(found["start"][start]["start"].values()) > 20
    assert found["start"][start]["missing"] == []


def test_keys_and_values_in_fp8_take_no_more_compilations(found: dict[str, Any]) -> None:
    assert found["start"]["fp8"]["start"] == found["start"]["7"]["start"]


@pytest.mark.parametrize("invariant", ["False", "True"])
def test_a_layer_of_a_step_of_any_size_takes_nine_launches_at_most(found: dict[str, Any], invariant: str) -> None:
    launches = found["eager"][invariant]["launches"]
    assert len(launches) == 14
    for step, kernels in launches.items():
        assert len(kernels) <= 9, step
        assert not [name for name in kernels if name.startswith("torch.")], step
    if invariant == "False":
        assert len(launches["1 tokens beside 0"]) == 6
        assert len(launches["33 tokens beside 0"]) == 6


@pytest.mark.parametrize("model", ["20b", "120b"])
def test_all_that_a_run_on_a_gpu_asks_for_is_compiled_for_it(found: dict[str, Any], model: str) -> None:
    assert found["gpu_run"][model] == []


def test_what_is_compiled_ahead_is_what_triton_looks_for(found: dict[str, Any]) -> None:
    """By the names in triton's cache, with triton's own launcher down to the driver; and a server would tell of each."""
    hashes = found["hashes"]
    assert len(hashes["listed"]) > 20
    assert hashes["listed"] == hashes["asked"]
    assert hashes["told"] == len(hashes["asked"])
