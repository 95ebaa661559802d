"""transformers behind our scheduler, and float16: both against our own engine."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss.config.errors import ConfigError
from gptoss.engine.core.core import EngineCore
from gptoss.engine.core.executor import SelfTestError
from gptoss.engine.parallel.device_placement import choose_devices
from tests.engine.test_parallel import generate, running
from tests.support.helpers import checkpoint, engine_config, load_model, model_logits, relative_rms


@pytest.mark.filterwarnings("ignore")  # transformers' own
def test_the_transformers_backend_gives_the_same_tokens() -> None:
    with running(checkpoint()) as core:
        greedy, drawn = generate(core), generate(core, {"temperature": 0.8, "top_p": 0.9})
        scored = generate(core, {"prompt_logprobs": 1})
    with running(checkpoint(), backend="transformers") as core:
        assert core.executor.worker.kernel_path == "transformers"
        assert generate(core) == greedy
        assert generate(core, {"temperature": 0.8, "top_p": 0.9}) == drawn
        for name, (tokens, logprobs) in generate(core, {"prompt_logprobs": 1}).items():
            assert tokens == scored[name][0]
            assert logprobs == pytest.approx(scored[name][1], abs=2e-4)


@pytest.mark.nightly
@pytest.mark.filterwarnings("ignore")
def test_the_transformers_backend_survives_chunks_and_preemption() -> None:
    with running(checkpoint()) as core:
        expected = generate(core, {"max_tokens": 20})
    options = {"backend": "transformers", "max_num_batched_tokens": 32, "cpu_kv_cache_gib": 0.0024}
    with running(checkpoint(), **options) as core:
        assert generate(core, {"max_tokens": 20}) == expected
        assert core.scheduler.num_preemptions > 0


def test_transformers_places_the_model_itself() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size"):
        choose_devices(engine_config(checkpoint(), backend="transformers", tensor_parallel_size=2))


def test_float16_keeps_its_residual_stream_in_float32() -> None:
    reference = model_logits(load_model(checkpoint()), list(range(5, 60)))
    model = load_model(checkpoint(), torch.float16)
    assert model.residual_dtype is torch.float32
    assert relative_rms(reference, model_logits(model, list(range(5, 60)))) < 0.01


def _scaled(folder: Path, out: Path, factor: float) -> Path:
    """The same model with an embedding and biases so large that only a wide residual stream holds them."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in tensors:
        if name.endswith("down_proj_bias"):
            tensors[name] = tensors[name] * factor
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def test_activations_beyond_float16_are_carried(tmp_path: Path) -> None:
    """Sums of several layers leave float16's range, single terms do not."""
    folder = _scaled(checkpoint(), tmp_path / "large", 150_000.0)
    core = EngineCore(choose_devices(engine_config(folder, dtype="float16")))
    assert core.executor.worker.dtype is torch.float16
    core.executor.shutdown()


def test_overflow_in_float16_refuses_to_serve(tmp_path: Path) -> None:
    folder = _scaled(checkpoint(), tmp_path / "huge", 1e7)
    with pytest.raises(SelfTestError, match="float16"):
        EngineCore(choose_devices(engine_config(folder, dtype="float16")))
    core = EngineCore(choose_devices(engine_config(folder, dtype="bfloat16")))
    core.executor.shutdown()


def test_memory_that_is_not_there_is_an_error_before_loading() -> None:
    config = engine_config(checkpoint(), cpu_kv_cache_gib=10_000.0)
    with pytest.raises(ConfigError, match=r"does not fit: .* GB .*cpu_kv_cache_gib"):
        choose_devices(dataclasses.replace(config))


def test_the_plan_on_a_cpu_shows_the_cache_that_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    choose_devices(engine_config(checkpoint(), cpu_kv_cache_gib=0.5, tensor_parallel_size=2))
    lines = [r.getMessage() for r in caplog.records if "memory plan: rank" in r.getMessage()]
    assert len(lines) == 2 and all("KV 0.27 GB" in line for line in lines), lines
