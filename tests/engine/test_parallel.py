"""Ranks over gloo against one rank: the same logits within float32 rounding, the same greedy tokens."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.core.core import EngineCore
from gptoss.engine.core.host_agent import HostAgent
from gptoss.engine.messages import AddRequest, FinishReason
from gptoss.engine.model.named_sizes import Size
from gptoss.engine.parallel.device_placement import choose_devices
from gptoss.engine.sampling_params import SamplingParams
from tests.support.helpers import checkpoint, engine_config, sized_checkpoint
from tests.support.server_process import free_port

# 120b's experts and grouping with few layers and narrow matrices
WIDE = Size(layers=4, hidden=64, intermediate=128, experts=128, heads=16, kv_heads=8)
LAYOUTS = {
    "tensor 2": {"tensor_parallel_size": 2},
    "tensor 4": {"tensor_parallel_size": 4},
    "experts 2": {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "pipeline 2": {"pipeline_parallel_size": 2},
    "pipeline 4": {"pipeline_parallel_size": 4},
    "tensor 2 x pipeline 2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
}
SUITE = {  # the other combinations run nightly
    "nano": ("tensor 2", "experts 2", "pipeline 2"),
    "120b's shape, few layers": ("tensor 2 x pipeline 2",),
}
PROMPTS = {f"r{i}": [(7 * i + 3 * j) % 900 + 5 for j in range(n)] for i, n in enumerate((1, 17, 150, 33, 80))}


@contextmanager
def running(folder: Path, **options: Any) -> Iterator[EngineCore]:
    core = EngineCore(choose_devices(engine_config(folder, num_threads=1, **options)))
    try:
        yield core
    finally:
        core.executor.shutdown()


def generate(core: EngineCore, params: dict[str, Any] | None = None) -> dict[str, tuple[list[int], list[float]]]:
    """Every prompt at once -> its answer's tokens, and the logprobs of prompt and answer that were asked for."""
    found: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in PROMPTS}
    wanted = {"max_tokens": 6, "temperature": 0.0, "seed": 3} | (params or {})
    for name, prompt in PROMPTS.items():
        assert core.add_request(AddRequest(name, prompt, SamplingParams(**wanted))) is None
    while core.has_work:
        for output in core.step():
            assert output.finish_reason is not FinishReason.ERROR, output.error
            found[output.request_id][0].extend(output.token_ids)
            entries = (output.prompt_logprobs or []) + (output.logprobs or [])
            found[output.request_id][1].extend(entry.logprob for entry in entries)
    core.kv.check_integrity()
    return found


def folder_of(shape: str) -> Path:
    return checkpoint() if shape == "nano" else sized_checkpoint("wide", WIDE)


@functools.cache
def alone(shape: str) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    with running(folder_of(shape)) as core:
        return {
            "greedy": generate(core),
            "logprobs": generate(core, {"logprobs": 0}),
            "prompt": generate(core, {"logprobs": 0, "prompt_logprobs": 2}),
            "drawn": generate(core, {"temperature": 0.8, "top_p": 0.9, "logprobs": 0}),
        }


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        pytest.param(shape, layout, marks=() if layout in SUITE[shape] else pytest.mark.nightly)
        for shape in SUITE
        for layout in LAYOUTS
    ],
)
def test_ranks_agree_with_one(shape: str, layout: str) -> None:
    wanted = alone(shape)
    with running(folder_of(shape), **LAYOUTS[layout]) as core:
        assert len(core.executor.ranks) == core.executor.worker.comm.world_size > 1
        assert {n: t for n, (t, _) in generate(core).items()} == {n: t for n, (t, _) in wanted["greedy"].items()}
        for kind, params in (
            ("logprobs", {"logprobs": 0}),
            ("prompt", {"logprobs": 0, "prompt_logprobs": 2}),
            ("drawn", {"temperature": 0.8, "top_p": 0.9, "logprobs": 0}),
        ):
            for name, (tokens, logprobs) in generate(core, params).items():
                expected_tokens, expected = wanted[kind][name]
                assert tokens == expected_tokens
                assert logprobs == pytest.approx(expected, abs=2e-4)


def run_host(config: EngineConfig) -> None:
    HostAgent(lambda: config, {"level": "warning", "log_format": "text"}).run()


def test_ranks_on_two_hosts_agree_with_one() -> None:
    """Two addresses of this machine stand for two hosts."""
    hosts: dict[str, Any] = {"nnodes": 2, "master_addr": "127.0.0.1", "master_port": free_port()}
    wanted = alone("nano")["drawn"]
    layout = {**hosts, "tensor_parallel_size": 2}
    other = engine_config(checkpoint(), node_rank=1, node_addr="127.0.0.2", num_threads=1, **layout)
    host = multiprocessing.get_context("spawn").Process(target=run_host, args=(other,))
    host.start()
    try:
        with running(checkpoint(), **layout) as core:
            assert [rank.rank for rank in core.executor.ranks] == [0, 1]
            listening = {
                c.laddr.ip for c in psutil.Process(core.executor.ranks[1].pid).net_connections() if c.status == "LISTEN"
            }
            assert listening == {"127.0.0.2"}, "tensor traffic binds the host's address alone"
            found = generate(core, {"temperature": 0.8, "top_p": 0.9, "logprobs": 0})
            assert {n: t for n, (t, _) in found.items()} == {n: t for n, (t, _) in wanted.items()}
            deaths: list[tuple[str, bool]] = []
            watching = threading.Thread(target=core.executor._watch, args=(lambda *death: deaths.append(death),))
            watching.start()
            host.kill()
            watching.join(10)
            assert deaths == [("host 1 (127.0.0.2) is gone", False)]
    finally:
        host.kill()
        host.join()


def test_every_rank_holds_its_part_only() -> None:
    with running(checkpoint()) as core:
        everything = core.executor.ranks[0].weight_bytes
    with running(checkpoint(), tensor_parallel_size=2, pipeline_parallel_size=2) as core:
        ranks = core.executor.ranks
        assert [r.layers for r in ranks] == [(0, 2), (0, 2), (3, 5), (3, 5)]
        assert [r.num_heads for r in ranks] == [2, 2, 2, 2]
        assert max(r.weight_bytes for r in ranks) < 0.27 * everything
        assert len({r.pid for r in ranks}) == 4
        assert core.gpu_mode == "tensor+pipeline"


def test_a_pipeline_has_several_batches_under_way() -> None:
    with running(checkpoint(), pipeline_parallel_size=2) as core:
        for name, prompt in PROMPTS.items():
            core.add_request(AddRequest(name, prompt, SamplingParams(max_tokens=8, temperature=0.0, seed=1)))
        deepest = 0
        collect = core.executor.collect

        def counting() -> Any:
            nonlocal deepest
            deepest = max(deepest, core.executor.num_in_flight)
            return collect()

        core.executor.collect = counting  # type: ignore[method-assign]
        while core.has_work:
            core.step()
        assert deepest == 2


def test_requests_can_be_aborted_while_they_are_in_the_pipeline() -> None:
    with running(checkpoint(), pipeline_parallel_size=2) as core:
        for name, prompt in PROMPTS.items():
            core.add_request(AddRequest(name, prompt, SamplingParams(max_tokens=200, temperature=0.0, seed=1)))
        for _ in range(5):
            core.step()
        core.abort(list(PROMPTS))
        while core.has_work:
            assert core.step() == []
        core.kv.check_integrity()
        assert core.kv.usage == 0
        assert all(len(tokens) == 6 for tokens, _ in generate(core).values())


def test_preemption_in_a_pipeline_changes_no_token() -> None:
    with running(checkpoint(), max_num_seqs=5) as core:
        expected = generate(core, {"max_tokens": 40})
    options = {"pipeline_parallel_size": 2, "cpu_kv_cache_gib": 0.0024, "enable_prefix_caching": False}
    with running(checkpoint(), max_num_seqs=5, **options) as core:
        assert generate(core, {"max_tokens": 40}) == expected
        assert core.scheduler.num_preemptions > 0


def test_a_dead_rank_is_reported() -> None:
    heard: list[tuple[str, bool]] = []
    told = threading.Event()

    def on_death(message: str, fatal: bool) -> None:
        heard.append((message, fatal))
        told.set()

    core = EngineCore(choose_devices(engine_config(checkpoint(), num_threads=1, pipeline_parallel_size=2)), on_death)
    started = time.monotonic()
    os.kill(core.executor.ranks[1].pid, signal.SIGKILL)
    assert told.wait(10)
    assert time.monotonic() - started < 5
    assert heard == [("rank 1 died: exit code -9", False)]
    core.executor.shutdown()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"tensor_parallel_size": 3}, "tensor_parallel_size"),
        ({"pipeline_parallel_size": 7}, "pipeline_parallel_size"),
        ({"gpu_mode": "tensor"}, "tensor_parallel_size"),
        ({"gpu_mode": "pipeline"}, "pipeline_parallel_size"),
        ({"gpu_mode": "single", "tensor_parallel_size": 2}, "gpu_mode"),
        ({"gpu_mode": "tensor", "tensor_parallel_size": 1}, "gpu_mode"),
    ],
)
def test_impossible_layouts_name_the_key(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        choose_devices(engine_config(checkpoint(), **options))
