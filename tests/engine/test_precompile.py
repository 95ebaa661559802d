"""A start compiles its kernels in another process while it reads the weights, once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptoss.engine.config import EngineConfig
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.parallel.shards import make_shard, whole
from gptoss.engine.worker import precompile
from gptoss.engine.worker.precompile import Job, Precompilation

MODEL = ModelConfig.from_json(hf_config(SIZES["nano"]))
READS = "import pickle, sys; job = pickle.loads(sys.stdin.buffer.read()); "


def config(**changes: Any) -> EngineConfig:
    return EngineConfig(MODEL, None, load_format="dummy", max_num_seqs=2, max_num_batched_tokens=64, **changes)


def job(**changes: Any) -> Job:
    return Job(config(**changes), whole(MODEL), 90, 2, os.getpid())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(precompile, "cache_folder", lambda: tmp_path)
    return tmp_path


def test_it_is_told_what_to_compile_and_its_word_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    started = Precompilation(
        job(), ("-c", READS + "print(job.config.max_num_seqs, job.capability, 'kernels compiled')")
    )
    started.wait()
    assert "2 90 kernels compiled while the weights were read, in " in caplog.text


def test_where_it_fails_the_start_goes_on_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    Precompilation(job(), ("-c", READS + "sys.exit('no compiler')")).wait()
    assert "kernels were not all compiled ahead: no compiler" in caplog.text


def test_one_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(precompile, "MAX_WAIT_S", 0.2)
    started = Precompilation(job(), ("-c", READS + "import time; time.sleep(60)"))
    started.wait()
    assert "not all compiled ahead" in caplog.text and started._process.poll() is not None


def test_what_is_compiled_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    begun: list[Job] = []
    monkeypatch.setattr(precompile, "Precompilation", begun.append)
    precompile.start(config(), whole(MODEL), (9, 0))
    assert [(one.capability, one.parent) for one in begun] == [(90, os.getpid())]
    begun[0].mark(cache).touch()
    assert precompile.start(config(), whole(MODEL), (9, 0)) is None
    precompile.start(config(), whole(MODEL), (8, 0))
    precompile.start(config(batch_invariant=True), whole(MODEL), (9, 0))
    assert len(begun) == 3, "another card, and another way to compute"


def test_one_rank_of_a_stage_compiles_and_models_without_mxfp4_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[Job] = []
    monkeypatch.setattr(precompile, "Precompilation", begun.append)
    for rank in range(2):
        shard = make_shard(MODEL, rank, tensor_size=2, stage_layers=[range(MODEL.num_layers)], expert_parallel=False)
        precompile.start(config(tensor_parallel_size=2), shard, (9, 0))
    assert len(begun) == 1
    plain = replace(MODEL, quantized=False)
    assert precompile.start(replace(config(), model=plain), whole(plain), (9, 0)) is None
    assert len(begun) == 1


def test_a_kernel_that_is_compiled_while_serving_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from triton import knobs

    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    precompile.warn_when_compiling()
    knobs.runtime.jit_post_compile_hook(key="k", fn=SimpleNamespace(name="_qkv_kernel"))
    assert "_qkv_kernel was compiled while serving" in caplog.text


@pytest.mark.nightly
def test_the_kernels_of_a_start_are_compiled_and_marked(tmp_path: Path) -> None:
    """Of two ranks of the embedded model, which takes a minute each."""
    code = """
        import os, sys
        from gptoss.engine.worker import precompile
        from tests.engine.test_precompile import MODEL, config
        from gptoss.engine.parallel.shards import make_shard
        for size in (1, 2):
            shard = make_shard(MODEL, 0, tensor_size=size, stage_layers=[range(2)], expert_parallel=False)
            given = config(tensor_parallel_size=size, max_model_len=256), shard, (9, 0)
            precompile.start(*given).wait()
            assert precompile.start(*given) is None
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.rglob("*.cubin"))) > 40 and len(list(tmp_path.glob("*.compiled"))) == 2
