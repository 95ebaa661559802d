"""Finds the files of a model by its name. No torch: the API process imports this."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gptoss.cached_files import cached
from gptoss.config.errors import ConfigError
from gptoss.engine.model.gguf_config import read_gguf_config
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.gguf_header import SPLIT_NAME
from gptoss.ollama_store import PREFIX as OLLAMA
from gptoss.ollama_store import find_blob
from gptoss.resources import resource

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).parents[1]  # where gptoss is imported from: a checkout, or site-packages
SAFEGUARD = ("safeguard-20b", "safeguard-120b")  # the shapes of 20b and 120b
HUB_IDS = {name: f"openai/gpt-oss-{name}" for name in ("20b", "120b", *SAFEGUARD)}
FILES = ["*.json", "*.safetensors"]
SKIPPED = ["original/*", "metal/*"]
NETWORK_TIMEOUT_S = 1.5
LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")  # of a split file
NANO_ASSETS = resource("assets", "nano")
FOLD_VERSION = b"2"  # raise when unfolding writes other bytes


@dataclass(frozen=True, slots=True)
class LocatedModel:
    folder: Path | None  # of the checkpoint, or a GGUF file; None: random weights, no file
    config: ModelConfig
    size: str  # "20b", "120b", "nano", "mini" or "custom"
    name: str  # default for served_model_name
    repetition_guard: int = 0  # default for the configuration's


def locate_model(name: str, model_path: Path | None, cache_folder: Path, *, dummy: bool = False) -> LocatedModel:
    """Finds a model on disk, in Ollama's store, in the Hugging Face cache or on the Hub.

    Raises ConfigError with the paths that were searched and the command that fetches the model.
    """
    short = _short_name(name)
    if dummy:
        if short not in SIZES:
            raise ConfigError(f"load_format 'dummy' needs model to be one of {', '.join(SIZES)}, not {name!r}")
        return LocatedModel(None, ModelConfig.from_json(hf_config(SIZES[short])), short, f"gpt-oss-{short}")
    folder = _embedded_nano(cache_folder) if is_embedded(name, model_path) else _find(name, short, model_path)
    config = read_gguf_config(folder) if folder.is_file() else ModelConfig.from_folder(folder)
    size = next(
        (
            s
            for s, shape in SIZES.items()
            if ModelConfig.from_json(hf_config(shape, quantized=config.quantized)) == config
        ),
        "custom",
    )
    return LocatedModel(
        folder,
        config,
        size,
        _own_name(name, size, folder),
        _repetition_guard(folder),
    )


def _own_name(name: str, size: str, folder: Path) -> str:
    """The default name in /v1/models."""
    asked = _short_name(name)
    for own in SAFEGUARD:
        if own.endswith(f"-{size}") and own in (asked, folder.name.removeprefix("gpt-oss-")):
            return f"gpt-oss-{own}"
    if size != "custom":
        return f"gpt-oss-{size}"
    if name.startswith(OLLAMA):  # the file is named by its sum
        return name.removeprefix(OLLAMA)
    return folder.stem if folder.is_file() else folder.name


def is_embedded(name: str, model_path: Path | None) -> bool:
    """Whether the name selects the embedded model, which is unfolded into the cache."""
    return _short_name(name) == "nano" and model_path is None


def models_folder() -> Path:
    """models/ in the checkout, or in the working folder for an installed package."""
    return (PROJECT if (PROJECT / "pyproject.toml").is_file() else Path.cwd()) / "models"


def _repetition_guard(folder: Path) -> int:
    """`repetition_guard` of the checkpoint's generation_config.json; 0 if it has none."""
    try:
        value = json.loads((folder / "generation_config.json").read_text()).get("repetition_guard", 0)
    except (OSError, ValueError, AttributeError):
        return 0
    return value if isinstance(value, int) and value > 0 else 0


def _short_name(name: str) -> str:
    for short in (*SIZES, *SAFEGUARD):
        tagged = "gpt-oss-safeguard:" + short.removeprefix("safeguard-") if short in SAFEGUARD else f"gpt-oss:{short}"
        if name in (short, f"gpt-oss-{short}", f"openai/gpt-oss-{short}", tagged):
            return short
    return name


def _find(name: str, short: str, model_path: Path | None) -> Path:
    """The folder of the checkpoint, or the GGUF file. Raises ConfigError."""
    if name.startswith(OLLAMA):
        return find_blob(name.removeprefix(OLLAMA))
    hub_id = HUB_IDS.get(short, name)
    base = hub_id.rsplit("/", 1)[-1]
    candidates = [Path(os.path.expanduser(name))]
    if model_path is not None:
        candidates += [model_path / base, model_path / hub_id, model_path]
    candidates += [models_folder() / base, models_folder() / hub_id]
    for candidate in candidates:
        if candidate.is_file() or (candidate / "config.json").is_file():
            return _without_links(candidate)
        if candidate.is_dir() and (file := _gguf_in(candidate)) is not None:
            return _without_links(file)
    looked = [str(c) for c in candidates]
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise ConfigError(f"no model {name!r}: no config.json in {', '.join(looked)}, nor a GGUF file")
    # imported here: it takes a quarter of a second
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    cache = os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE
    try:
        return Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=FILES, ignore_patterns=SKIPPED))
    except (LocalEntryNotFoundError, FileNotFoundError):
        looked.append(f"the Hugging Face cache {cache}")
    if not _hub_reachable():
        raise ConfigError(
            f"no model {name!r}: looked in {', '.join(looked)}, and the Hugging Face Hub cannot be reached. Fetch it "
            f"where there is a network with: hf download {hub_id} --exclude 'original/*' --exclude 'metal/*' "
            f"--local-dir models/{base}"
        )
    logger.info("downloading %s", hub_id)
    try:
        return Path(snapshot_download(hub_id, allow_patterns=FILES, ignore_patterns=SKIPPED))
    except Exception as error:  # of HTTP, of the network, of the disk
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"could not download {hub_id} into {cache}: {reason}. Set HF_HOME to a writable folder with free space, "
            "or model_path to the checkpoint"
        ) from error


def _without_links(path: Path) -> Path:
    """The path without links, but for a part of a split model whose name only the link has.

    The Hub's cache names files by their sums.
    """
    target = path.resolve()
    is_named_by_link = SPLIT_NAME.fullmatch(path.name) and not SPLIT_NAME.fullmatch(target.name)
    return path.parent.resolve() / path.name if is_named_by_link else target


def _gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder, the first of a split one. Raises ConfigError if there are several models."""
    files = [path for path in sorted(folder.glob("*.gguf")) if not LATER_PART.search(path.name)]
    if len(files) > 1:
        raise ConfigError(f"{folder} holds {len(files)} GGUF models: name one of {', '.join(p.name for p in files)}")
    return files[0] if files else None


def _hub_reachable() -> bool:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=NETWORK_TIMEOUT_S):
            return True
    except OSError:
        return False


def _embedded_nano(cache_folder: Path) -> Path:
    """Returns the folder of the embedded model, unfolded into the cache at first use."""
    parts = [path.read_bytes() for path in sorted(NANO_ASSETS.glob("*.safetensors"))]
    version = hashlib.sha256(b"".join((FOLD_VERSION, *parts))).hexdigest()[:12]
    return cached(cache_folder / f"gpt-oss-nano-{version}", _unfold_nano)


def _unfold_nano(folder: Path) -> None:
    """Unfolds in a child process, which may load torch.

    Raises OSError if the disk is full, else ConfigError.
    """
    logger.info("unfolding the embedded model nano into %s", folder)
    command = [sys.executable, "-m", "gptoss", "unfold", "--out", str(folder)]
    command += ["--parent", str(os.getpid())]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    if done.returncode == 0:
        for line in done.stderr.splitlines():  # such as warnings about the vocabulary's cache
            logger.warning("%s", line)
        return
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if "os error" in reason or "[Errno" in reason:  # the forms of safetensors and of Python
        raise OSError(reason)
    raise ConfigError(f"could not unfold the embedded model: {reason}")
