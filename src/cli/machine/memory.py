"""The checkpoint, and whether memory and disk of this machine hold it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil

from gptoss.cached_files import REMEDY, default_cache_folder
from gptoss.cli.machine.finding import Finding
from gptoss.config.errors import ConfigError
from gptoss.engine.config import EngineConfig
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.engine.parallel.device_placement import choose_devices
from gptoss.engine.parallel.gpus import Gpu
from gptoss.engine.parallel.memory_plan import GB, choose_plan
from gptoss.model_locator import is_embedded, locate_model

HUB_UNREACHABLE = ", and the Hugging Face Hub cannot be reached"  # it was not asked
CACHE_BYTES = 10**9  # the embedded model, compiled kernels, the vocabulary


def checkpoint(model: str, model_path: Path | None) -> tuple[Finding, ModelConfig | None]:
    """Returns where the model's files are, and its configuration if that is known without them."""
    if is_embedded(model, model_path):
        return Finding("checkpoint", "ok", "nano is part of the package"), _named("nano")
    try:
        located = locate_model(model, model_path, default_cache_folder())
    except ConfigError as error:
        text, _, fetch = str(error).replace(HUB_UNREACHABLE, "").partition(". Fetch it ")
        remedy = "set --model-path to the checkpoint"
        if fetch:
            remedy = f"gptoss serve downloads it if the Hugging Face Hub can be reached; else fetch it {fetch}"
        return Finding("checkpoint", "missing", text, remedy), _named(model)
    return Finding("checkpoint", "ok", f"{located.name} in {located.folder}"), located.config


def _named(model: str) -> ModelConfig | None:
    """Returns the configuration of a published size, also under its longer names."""
    size = model.rpartition("gpt-oss-")[2]
    return ModelConfig.from_json(hf_config(SIZES[size])) if size in SIZES else None


def plan(model: str, config: ModelConfig | None, gpus: list[Gpu]) -> Finding:
    """Returns the memory plan for this machine, or why there is none."""
    if config is None:
        return Finding("memory", "note", f"not known without the checkpoint of {model}")
    settings = EngineConfig(config, None, load_format="dummy", max_model_len=config.max_position)
    try:
        if gpus:
            found = choose_plan(settings, [g.free_bytes for g in gpus], [g.total_bytes for g in gpus], element=2)
            return Finding("memory", "ok", found.lines()[0])
        choose_devices(settings)
    except ConfigError as error:
        remedy = "a smaller model, or more free memory; `gptoss memory-plan --table` shows what each model takes"
        return Finding("memory", "missing", f"{model}: {error}", remedy)
    available = psutil.virtual_memory().available
    return Finding("memory", "ok", f"{model} fits in the {available / GB:.1f} GB that are available")


def cache_folder() -> Finding:
    """Returns whether derived files can be kept."""
    folder = default_cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK):
        text = f"{folder} is not writable: files are made again at each start"
        return Finding("cache", "note", text, REMEDY)
    free = shutil.disk_usage(there).free
    if free < CACHE_BYTES:
        return Finding(
            "cache", "missing", f"{folder} has {free / GB:.1f} GB free, needs {CACHE_BYTES / GB:.0f}", REMEDY
        )
    return Finding("cache", "ok", f"{folder}, {free / GB:.0f} GB free")
