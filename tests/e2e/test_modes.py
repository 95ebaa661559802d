"""What the operator's flags promise, on servers started with them: profiles, types, ranks, backends, ports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from gptoss.config.profiles import PROFILES
from tests.support.forked_starts import ForkedStarts
from tests.support.helpers import checkpoint
from tests.support.server_process import ROOT, ServerProcess, running_server
from tests.support.tiers import nightly_except
from tests.support.waiting import wait_until

SMALL = ("--cpu-kv-cache-gib", "0.1", "--max-model-len", "4096", "--debug-endpoints", "--no-warm-up")


def ask(server: ServerProcess, **more: Any) -> httpx.Response:
    body = {
        "model": "gpt-oss-nano",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 12,
        "temperature": 0,
    }
    return httpx.post(f"{server.url}/v1/chat/completions", json=body | more, timeout=60)


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    """What one rank with our own backend answers in float32."""
    with running_server("--model", str(checkpoint()), "--dtype", "float32", *SMALL) as alone:
        choices: list[dict[str, Any]] = ask(alone, max_tokens=40).json()["choices"]
        return choices


@pytest.mark.parametrize("name", nightly_except("quality_first", of=PROFILES))
def test_a_profile_sets_what_it_says(name: str) -> None:
    profile = PROFILES[name]
    with running_server("--model", str(checkpoint()), "--profile", name, *SMALL) as server:
        stats = server.stats()
        assert stats["profile"] == name
        settings = stats["profile_settings"]
        for key in (
            "max_num_seqs",
            "max_num_batched_tokens",
            "max_num_waiting",
            "batch_invariant",
            "effort",
            "temperature",
            "top_p",
            "max_output_tokens",
            "reasoning_budget",
            "priority",
            "deadline_s",
            "ttft_p95_s",
            "e2e_p95_s",
        ):
            assert settings[key] == getattr(profile, key), key
        assert ask(server).json()["metadata"]["profile"] == name
        prompt = httpx.post(
            f"{server.url}/v1/chat/completions/render",
            json={"model": "gpt-oss-nano", "messages": [{"role": "user", "content": "Hi"}]},
        ).json()["prompt"]
        assert f"Reasoning: {profile.effort}" in prompt


def test_flags_beat_the_environment_the_environment_the_file_and_all_beat_the_profile(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "max_num_seqs: 3\nmax_num_waiting: 7\ndtype: float16\nprofiles: {latency_first: {deadline_s: 11, effort: high}}\n"
    )
    env = {"TORCH_DTYPE": "bfloat16", "GPTOSS_MAX_NUM_WAITING": "9"}
    flags = ("--config", str(file), "--profile", "latency_first", "--dtype", "float32")
    with running_server("--model", str(checkpoint()), *flags, *SMALL, env=env) as server:
        stats = server.stats()
        settings = stats["profile_settings"]
        assert (settings["max_num_seqs"], settings["max_num_waiting"]) == (3, 9)
        assert (settings["deadline_s"], settings["effort"]) == (11, "high")
        assert stats["dtype"] == "float32"
        assert ask(server).status_code == 200
    for environment, dtype in ((env, "bfloat16"), (None, "float16")):
        printed = run("--print-config", *flags[:-2], env=environment).stdout
        assert f"\ndtype: {dtype} " in printed


@pytest.mark.parametrize(
    ("flags", "mode", "ranks"),
    [
        (("--gpu-mode", "tensor", "--tensor-parallel-size", "2"), "tensor", 2),
        pytest.param(
            ("--gpu-mode", "pipeline", "--pipeline-parallel-size", "2"), "pipeline", 2, marks=pytest.mark.nightly
        ),
    ],
)
def test_ranks_behind_the_same_api_and_one_that_dies(
    expected: list[dict[str, Any]], flags: tuple[str, ...], mode: str, ranks: int
) -> None:
    with running_server("--model", str(checkpoint()), "--dtype", "float32", *flags, *SMALL) as server:
        stats = server.stats()
        assert stats["gpu_mode"] == mode and len(stats["engine"]["ranks"]) == ranks
        assert "memory plan: rank 1: layers" in server.log
        assert ask(server, max_tokens=40).json()["choices"] == expected
        last = stats["engine"]["ranks"][-1]["pid"]
        os.kill(last, signal.SIGKILL)
        answer = ask(server, max_tokens=40)  # waits for the restart, or is told that its engine died

        def answers() -> bool:
            nonlocal answer
            if answer.status_code != 200:
                assert answer.status_code in (500, 503), answer.text
                answer = ask(server, max_tokens=40)
            return answer.status_code == 200

        wait_until(answers, 60, every_s=0.2)
        assert answer.json()["choices"] == expected
        engine = server.wait_idle()["engine"]
        assert engine["restarts"] == 1 and "rank 1 died" in server.log
        pids = [rank["pid"] for rank in engine["ranks"]]
        assert last not in pids
        assert server.stop() == 0
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_the_transformers_backend_behind_the_same_api(expected: list[dict[str, Any]]) -> None:
    flags = ("--backend", "transformers", "--dtype", "float32")
    with running_server("--model", str(checkpoint()), *flags, *SMALL) as server:
        assert server.stats()["engine"]["kernel_path"] == "transformers"
        assert ask(server, max_tokens=40).json()["choices"] == expected


def run(*flags: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "src/server.py", *flags]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, timeout=60, env={**os.environ, **(env or {})}
    )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--gpu-mode", "tensor"), ("gpu_mode 'tensor'", "tensor_parallel_size")),
        (("--gpu-mode", "single", "--tensor-parallel-size", "2"), ("gpu_mode 'single'", "tensor_parallel_size")),
        (("--tensor-parallel-size", "3"), ("tensor_parallel_size (3)", "query heads")),
        (("--auto-port", "--force-port"), ("auto_port and force_port",)),
        (("--cpu-kv-cache-gib", "100000"), ("does not fit", "GB", "cpu_kv_cache_gib")),
        (("--backend", "transformers", "--tensor-parallel-size", "2"), ("backend 'transformers'",)),
        (("--backend", "transformers", "--load-format", "dummy"), ("backend 'transformers'", "load_format")),
        (("--profiles", "{balanced: {max_num_seq: 4}}"), ("profiles.balanced.max_num_seq", "max_num_seqs")),
        (("--profiles", "{balanced: {deadline_s: -1}}"), ("profiles.balanced.deadline_s", "-1")),
        (("--dtype", "float8"), ("dtype", "float8")),
        (("--device", "cuda"), ("device", "cpu")),
        (("--dense-dtype", "int8", "--dtype", "float32"), ("--dense-dtype", "dtype 'float32'")),
        (("--dense-dtype", "int8", "--backend", "transformers"), ("--dense-dtype", "backend 'transformers'")),
    ],
)
def test_impossible_combinations_name_the_key(
    starts: ForkedStarts, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    model = "nano" if "dummy" in flags else str(checkpoint())
    done = starts.run("--model", model, "--port", "0", *flags)
    assert done.returncode in (1, 2)
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.mark.parametrize("flags", [("--kv-cache-dtype", "fp8"), ("--lm-head-dtype", "fp8")])
def test_fp8_on_a_cpu_is_refused_before_an_engine_starts(starts: ForkedStarts, flags: tuple[str, ...]) -> None:
    done = starts.run("--model", str(checkpoint()), "--port", "0", "--device", "cpu", *flags)
    assert done.returncode == 2, "1 is what an engine that gives up ends with"
    assert f"({flags[0]}) needs a GPU of sm_89 or later" in done.stderr and "CPU" in done.stderr


def test_print_config_tells_where_each_value_came_from() -> None:
    done = run("--print-config", "--max-num-seqs", "5", env={"TORCH_DTYPE": "float16", "GPTOSS_PORT": "81"})
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert lines["max_num_seqs"] == "5  # flag"
    assert lines["dtype"] == "float16  # environment TORCH_DTYPE"
    assert lines["port"] == "81  # environment GPTOSS_PORT"
    assert lines["batch_invariant"] == "false  # profile balanced"


def test_a_taken_port_is_an_error_or_taken_over(tmp_path: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(tmp_path)}
    with running_server("--model", str(checkpoint()), *SMALL, env=env) as first:
        flags = ("--model", str(checkpoint()), "--port", str(first.port), *SMALL)
        refused = run(*flags, env=env)
        assert refused.returncode == 2
        assert f"port {first.port} is in use" in refused.stderr and f"pid {first.process.pid}" in refused.stderr
        second = ServerProcess(*flags, "--force-port", env=env)
        try:
            first.process.wait(20)
            assert first.process.returncode == 0, "it was asked to end and drained"
            second.url = first.url
            second.wait_ready()
            assert ask(second).status_code == 200
        finally:
            second.stop()
