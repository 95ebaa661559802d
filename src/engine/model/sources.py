"""Opens a checkpoint in whatever form it is."""

from __future__ import annotations

from pathlib import Path

from gptoss.engine.model.checkpoint import Checkpoint
from gptoss.engine.model.gguf import GgufCheckpoint
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.tensor_source import TensorSource


def open_source(path: Path, config: ModelConfig) -> TensorSource:
    """Opens the checkpoint at `path`: a folder of safetensors files, or a GGUF file.

    Raises as the two classes do.
    """
    return GgufCheckpoint(path, config) if path.is_file() else Checkpoint(path, config)
