"""A model to convert: its tensors, its shape and its vocabulary, whatever it is read from."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gptoss.cached_files import default_cache_folder
from gptoss.cli.conversion.adapter_merge import AdapterMerge
from gptoss.engine.model.gguf import QUANTISED
from gptoss.engine.model.gguf_config import gguf_config
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import Size, hf_config
from gptoss.engine.model.sources import open_source
from gptoss.engine.model.tensor_source import TensorSource
from gptoss.gguf_header import StringArray, read_model, read_strings
from gptoss.harmony.special_tokens import CALL, FIRST_SPECIAL, SPECIAL_TEXT
from gptoss.harmony.tokenizer_files import write_tokenizer
from gptoss.harmony.vocabulary_files import load_vocabulary
from gptoss.kernels.mxfp4 import GROUP_SIZE, Mxfp4Tensor, dequantize_mxfp4, quantize_mxfp4, quantize_mxfp4_closest

NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's types of tokens


@dataclass(frozen=True, slots=True)
class Tokens:
    """The vocabulary as GGUF files have it."""

    texts: list[str]
    types: list[int]
    merges: list[str]


class Model:
    """Reads a checkpoint through the server's own loader, which checks it whole.

    Counts what is lost: dense values that bfloat16 does not hold, and the error of experts that are quantised.
    """

    def __init__(self, path: Path, *, quantize_experts: bool = False) -> None:
        self.path = path
        self.raw = _raw_config(path)
        self.config = ModelConfig.from_json(self.raw)
        self.source: TensorSource = open_source(path, self.config)
        self.quantizes = quantize_experts and not self.source.packed
        self.packed = self.source.packed or self.quantizes
        self.merge: AdapterMerge | None = None
        self.num_rounded = 0
        self._squares, self._error = 0.0, 0.0

    @property
    def expert_error(self) -> float:
        """The relative RMS error of the experts that were quantised."""
        return float((self._error / self._squares) ** 0.5) if self._squares else 0.0

    def dense(self, name: str) -> torch.Tensor:
        """A tensor other than the experts' matrices, in bfloat16."""
        stored = self.source.part(name)
        if self._is_adapted(name):
            return self._merged(name, stored, torch.bfloat16)
        rounded = stored.to(torch.bfloat16)
        if stored.dtype != torch.bfloat16 and not torch.equal(rounded.to(stored.dtype), stored):
            self.num_rounded += 1
        return rounded.contiguous()

    def unpacked_experts(self, name: str) -> torch.Tensor:
        """The matrices of one kind [E, R, K] of a source that does not quantise them, in its type."""
        stored = self.source.part(name)
        if not self._is_adapted(name):
            return stored
        out = torch.empty(stored.shape, dtype=stored.dtype)
        for number, one in enumerate(stored):
            out[number] = self._merged(name, one, stored.dtype, number)
        return out

    def experts(self, name: str) -> Iterator[Mxfp4Tensor]:
        """The MXFP4 matrices of one kind, expert by expert."""
        for number in range(self.config.num_experts):
            one = slice(number, number + 1)
            if self.source.packed:
                parts = (self.source.part(f"{name}_{part}", one)[0].contiguous() for part in ("blocks", "scales"))
                packed = Mxfp4Tensor(*parts)
                yield self._requantized(name, number, packed) if self._is_adapted(name) else packed
                continue
            dense = self.source.part(name, one)[0].float().contiguous()
            yield self._quantized(name, number, dense)

    def _quantized(self, name: str, expert: int, dense: torch.Tensor) -> Mxfp4Tensor:
        change = self.merge.change(name, expert) if self.merge is not None and self.merge.adapts(name) else None
        exact = dense if change is None else dense + change
        packed = quantize_mxfp4(exact)
        self._count_error(exact, packed)
        if self.merge is not None and change is not None:
            self.merge.count(name, exact, change, dequantize_mxfp4(packed, torch.float32), "MXFP4")
        return packed

    def _is_adapted(self, name: str) -> bool:
        return self.merge is not None and self.merge.adapts(name)

    def _merged(self, name: str, stored: torch.Tensor, dtype: torch.dtype, expert: int | None = None) -> torch.Tensor:
        assert self.merge is not None
        change = self.merge.change(name, expert)
        exact = stored.float() + change
        rounded = exact.to(dtype)
        self.merge.count(name, exact, change, rounded.float(), str(dtype).removeprefix("torch."))
        return rounded.contiguous()

    def _requantized(self, name: str, expert: int, stored: Mxfp4Tensor) -> Mxfp4Tensor:
        assert self.merge is not None
        change = self.merge.change(name, expert)
        exact = dequantize_mxfp4(stored, torch.float32) + change
        packed = quantize_mxfp4_closest(exact)
        self.merge.count(name, exact, change, dequantize_mxfp4(packed, torch.float32), "MXFP4")
        return packed

    def _count_error(self, dense: torch.Tensor, packed: Mxfp4Tensor) -> None:
        self._squares += float(dense.square().sum())
        self._error += float((dequantize_mxfp4(packed, torch.float32) - dense).square().sum())

    def packed_experts(self, name: str) -> Mxfp4Tensor:
        """Those matrices as one tensor."""
        rows, groups = self._rows_of(name)
        count = self.config.num_experts
        blocks = torch.empty((count, rows, groups, GROUP_SIZE // 2), dtype=torch.uint8)
        scales = torch.empty((count, rows, groups), dtype=torch.uint8)
        for number, one in enumerate(self.experts(name)):
            blocks[number], scales[number] = one.blocks, one.scales
        return Mxfp4Tensor(blocks, scales)

    def _rows_of(self, name: str) -> tuple[int, int]:
        hidden, inter = self.config.hidden_size, self.config.intermediate_size
        rows, columns = (hidden, inter) if name.endswith("down_proj") else (inter, hidden)
        return rows, columns // GROUP_SIZE

    @cached_property
    def quantized_dense(self) -> dict[str, int]:
        """How many dense tensors of a GGUF file are quantised, by type, the most frequent first."""
        tensors = read_model(self.path).tensors.values() if self.path.is_file() else ()
        return dict(Counter(t.type.name for t in tensors if t.type.name in QUANTISED).most_common())

    @cached_property
    def chat_template(self) -> str | None:
        if self.path.is_file():
            found = read_model(self.path).keys.get("tokenizer.chat_template")
            return found if isinstance(found, str) else None
        file = self.path / "chat_template.jinja"
        return file.read_text() if file.is_file() else None

    def tokens(self) -> Tokens:
        """The model's own vocabulary, or the one of every gpt-oss if it has none."""
        if self.path.is_file():
            keys = read_model(self.path).keys
            texts, merges, types = (keys.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
            if isinstance(texts, StringArray) and isinstance(merges, StringArray) and isinstance(types, list):
                return Tokens(read_strings(texts), types, read_strings(merges))
        tokenizer = self.path / "tokenizer.json"
        if tokenizer.is_file():
            return _tokens(json.loads(tokenizer.read_bytes()), self.config.vocab_size)
        with tempfile.TemporaryDirectory() as folder:
            write_tokenizer(Path(folder), load_vocabulary(None, default_cache_folder()).token_bytes)
            return _tokens(json.loads((Path(folder) / "tokenizer.json").read_bytes()), self.config.vocab_size)


def _raw_config(path: Path) -> dict[str, Any]:
    """The model's config.json, in either layout; of a GGUF file what its keys stand for."""
    if path.is_file():
        return gguf_config(read_model(path))
    ModelConfig.from_folder(path)  # whose errors name the file
    raw: dict[str, Any] = json.loads((path / "config.json").read_text())
    return raw


def _tokens(tokenizer: dict[str, Any], vocab_size: int) -> Tokens:
    texts = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [UNUSED] * vocab_size
    special = {token["id"]: token["content"] for token in tokenizer.get("added_tokens", ())}
    special |= {number: SPECIAL_TEXT[number] for number in range(FIRST_SPECIAL, CALL + 1) if number not in special}
    for text, number in tokenizer["model"]["vocab"].items():
        if number < vocab_size:
            texts[number], types[number] = text, NORMAL
    for number, text in special.items():
        if number < vocab_size:
            texts[number], types[number] = text, CONTROL
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in tokenizer["model"]["merges"]]
    return Tokens(texts, types, merges)


def full_config(config: ModelConfig, *, packed: bool) -> dict[str, Any]:
    """The config.json in Hugging Face's layout of any shape."""
    c = config
    size = Size(
        c.num_layers, c.hidden_size, c.intermediate_size, c.num_experts, c.num_attention_heads, c.num_key_value_heads
    )
    raw = hf_config(size, quantized=packed)
    scaling = {
        "factor": c.rope_factor,
        "beta_fast": c.rope_beta_fast,
        "beta_slow": c.rope_beta_slow,
        "original_max_position_embeddings": c.rope_original_max_position,
    }
    return raw | {
        "experts_per_token": c.experts_per_token,
        "head_dim": c.head_dim,
        "initial_context_length": c.rope_original_max_position,
        "layer_types": list(c.layer_types),
        "max_position_embeddings": c.max_position,
        "num_experts_per_tok": c.experts_per_token,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_scaling": raw["rope_scaling"] | scaling,
        "rope_theta": c.rope_theta,
        "sliding_window": c.sliding_window,
        "swiglu_limit": c.swiglu_limit,
        "vocab_size": c.vocab_size,
    }


def original_config_of(config: ModelConfig) -> dict[str, Any]:
    """The config.json in the layout of `original/` of any shape."""
    return {
        "num_hidden_layers": config.num_layers,
        "num_experts": config.num_experts,
        "experts_per_token": config.experts_per_token,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": config.rope_original_max_position,
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": config.rope_factor,
        "rope_ntk_alpha": config.rope_beta_slow,
        "rope_ntk_beta": config.rope_beta_fast,
    }
