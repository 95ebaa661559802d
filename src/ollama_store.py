"""Finds a model's weights in Ollama's store, which is only read. No torch.

A name as Ollama takes it, `[HOST/][NAMESPACE/]MODEL[:TAG]`, has a manifest that lists layers by their SHA-256:
    manifests/registry.ollama.ai/library/gpt-oss/20b
    blobs/sha256-<hex>
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from gptoss.config.errors import ConfigError

PREFIX = "ollama:"
HOST, NAMESPACE, TAG = "registry.ollama.ai", "library", "latest"
SERVICE_STORE = Path("/usr/share/ollama/.ollama/models")  # of the Linux service, which has a user of its own
MODEL_LAYER = "application/vnd.ollama.image.model"
ADAPTER_LAYER = "application/vnd.ollama.image.adapter"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")


def find_blob(name: str) -> Path:
    """The GGUF file of the model of that name, without the prefix `ollama:`.

    Raises ConfigError, naming what was searched, if it is not there as Ollama left it.
    """
    parts = _manifest_parts(name)
    stores = _stores()
    manifests = [store.joinpath("manifests", *parts) for store in stores]
    for store, manifest in zip(stores, manifests, strict=True):
        if manifest.is_file():
            return _blob(store, manifest, name)
    raise ConfigError(
        f"no model '{PREFIX}{name}': looked for {', '.join(map(str, manifests))}. Fetch it with: ollama pull {name}; "
        "or set OLLAMA_MODELS to the store's folder"
    )


def _stores() -> list[Path]:
    configured = os.environ.get("OLLAMA_MODELS")
    if configured:
        return [Path(os.path.expanduser(configured))]
    try:
        return [Path.home() / ".ollama" / "models", SERVICE_STORE]
    except RuntimeError:  # no HOME
        return [SERVICE_STORE]


def _manifest_parts(name: str) -> tuple[str, str, str, str]:
    *before, last = name.split("/")
    model, _, tag = last.partition(":")
    parts = (*before, model)
    if len(parts) > 3:
        raise ConfigError(f"model '{PREFIX}{name}' is not a name of the form [HOST/][NAMESPACE/]MODEL[:TAG]")
    host, namespace, model = (HOST, NAMESPACE)[: 3 - len(parts)] + parts
    tag = tag or TAG
    for part in (host.partition(":")[0], namespace, model, tag):
        if not _PART.fullmatch(part):
            raise ConfigError(f"model '{PREFIX}{name}': {part!r} cannot be part of a name in Ollama's store")
    return host, namespace, model, tag


def _blob(store: Path, manifest: Path, name: str) -> Path:
    layers = _layers(manifest)
    if any(layer.get("mediaType") == ADAPTER_LAYER for layer in layers):
        raise ConfigError(f"model '{PREFIX}{name}' has an adapter layer, which is not applied: merge it ({manifest})")
    weights = [layer for layer in layers if layer.get("mediaType") == MODEL_LAYER]
    if len(weights) != 1:
        raise ConfigError(f"{manifest} lists {len(weights)} layers of type {MODEL_LAYER}, expected 1")
    match = _DIGEST.fullmatch(str(weights[0].get("digest")))
    if match is None:
        raise ConfigError(f"{manifest}: the digest of the model is {weights[0].get('digest')!r}")
    blob = store / "blobs" / f"sha256-{match[1]}"
    try:
        found = blob.stat().st_size
    except OSError as error:
        raise ConfigError(f"{blob}, which {manifest} names: {error.strerror or error}") from error
    if found != weights[0].get("size"):
        raise ConfigError(f"{blob} has {found} bytes, {manifest} says {weights[0].get('size')}: pull the model again")
    return blob


def _layers(manifest: Path) -> list[dict[str, Any]]:
    try:
        layers = json.loads(manifest.read_bytes())["layers"]
    except OSError as error:
        raise ConfigError(f"{manifest}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError):
        layers = None
    if isinstance(layers, list) and all(isinstance(layer, dict) for layer in layers):
        return layers
    raise ConfigError(f"{manifest} is not a manifest of Ollama")
