"""Reads a gpt-oss checkpoint in Hugging Face's layout or that of `original/`.

Experts are MXFP4 or BF16, stacked or modules of their own (expert_modules.py), in one file or many. Everything is
checked against the shapes that config.json implies before the first tensor is read, so a broken download is an error
that names file and tensor, not a crash or a wrong answer later.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gptoss.engine.model.expert_modules import IGNORED, Maker, kv_scale_names, maker_of, module_shapes
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.stored_views import as_stored, expert_views, module_views, original_views
from gptoss.engine.model.tensor_source import CheckpointError, MappedFile, Shape, StoredMatrices
from gptoss.kernels.mxfp4 import GROUP_SIZE, AlternatingMxfp4, Mxfp4Tensor

FLOAT_TYPES = frozenset({"BF16", "F16", "F32"})
PACKED_TYPES = frozenset({"U8"})
SCALE_TYPES = frozenset({"U8", "F8_E8M0"})
TORCH_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TORCH_TYPES |= {"U8": torch.uint8, "F8_E8M0": torch.uint8}
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    type: str  # as safetensors names it
    shape: Shape
    offset: int  # from the beginning of the file


def expected_tensors(c: ModelConfig, *, original: bool, packed: bool) -> dict[str, tuple[Shape, frozenset[str]]]:
    """Name -> (shape, allowed safetensors types) of every tensor that a checkpoint of this shape holds."""
    if original:
        layer_tensors, separator = _original_layer, "."
        embedding, head, norm = "embedding.weight", "unembedding.weight", "norm.scale"
    else:
        layer_tensors, separator = _hf_layer, "_"
        embedding, head, norm = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
    shapes: dict[str, Shape] = {
        embedding: (c.vocab_size, c.hidden_size),
        head: (c.vocab_size, c.hidden_size),
        norm: (c.hidden_size,),
    }
    packed_shapes: dict[str, Shape] = {}
    for n in range(c.num_layers):
        tensors, matrices = layer_tensors(c, n)
        shapes |= tensors
        for name, (rows, columns) in matrices.items():
            if packed:
                stored = (c.experts_of(n), rows, columns // GROUP_SIZE)
                packed_shapes[f"{name}{separator}blocks"] = (*stored, GROUP_SIZE // 2)
                packed_shapes[f"{name}{separator}scales"] = stored
            else:  # transformers keeps unquantised experts transposed
                shapes[name] = (c.experts_of(n), columns, rows)
    return {
        **{name: (shape, FLOAT_TYPES) for name, shape in shapes.items()},
        **{name: (shape, PACKED_TYPES) for name, shape in packed_shapes.items()},
    }


# a layer's tensors, and its experts' matrices as (rows, columns) of one expert
LayerTensors = tuple[dict[str, Shape], dict[str, tuple[int, int]]]


def _original_layer(c: ModelConfig, n: int) -> LayerTensors:
    hidden, inter, experts = c.hidden_size, c.intermediate_size, c.experts_of(n)
    q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    a, m = f"block.{n}.attn.", f"block.{n}.mlp."
    tensors: dict[str, Shape] = {
        a + "norm.scale": (hidden,),
        a + "qkv.weight": (q_dim + 2 * kv_dim, hidden),
        a + "qkv.bias": (q_dim + 2 * kv_dim,),
        a + "sinks": (c.num_attention_heads,),
        a + "out.weight": (hidden, q_dim),
        a + "out.bias": (hidden,),
        m + "norm.scale": (hidden,),
        m + "gate.weight": (experts, hidden),
        m + "gate.bias": (experts,),
        m + "mlp1_bias": (experts, 2 * inter),
        m + "mlp2_bias": (experts, hidden),
    }
    return tensors, {m + "mlp1_weight": (2 * inter, hidden), m + "mlp2_weight": (hidden, inter)}


def _hf_layer(c: ModelConfig, n: int) -> LayerTensors:
    hidden, inter, experts = c.hidden_size, c.intermediate_size, c.experts_of(n)
    q_dim, kv_dim = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    layer = f"model.layers.{n}."
    a, m = layer + "self_attn.", layer + "mlp."
    tensors: dict[str, Shape] = {
        layer + "input_layernorm.weight": (hidden,),
        layer + "post_attention_layernorm.weight": (hidden,),
        a + "q_proj.weight": (q_dim, hidden),
        a + "q_proj.bias": (q_dim,),
        a + "k_proj.weight": (kv_dim, hidden),
        a + "k_proj.bias": (kv_dim,),
        a + "v_proj.weight": (kv_dim, hidden),
        a + "v_proj.bias": (kv_dim,),
        a + "o_proj.weight": (hidden, q_dim),
        a + "o_proj.bias": (hidden,),
        a + "sinks": (c.num_attention_heads,),
        m + "router.weight": (experts, hidden),
        m + "router.bias": (experts,),
        m + "experts.gate_up_proj_bias": (experts, 2 * inter),
        m + "experts.down_proj_bias": (experts, hidden),
    }
    matrices = {m + "experts.gate_up_proj": (2 * inter, hidden), m + "experts.down_proj": (hidden, inter)}
    return tensors, matrices


class Checkpoint:
    """The tensors of a folder, memory-mapped. Checked whole when opened.

    Raises:
        CheckpointError: a file or a tensor is missing, extra, truncated, or of another shape or type.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        self.folder = folder
        paths = self._listed_files()
        headers = [_read_header(path) for path in paths]
        self.files = tuple(MappedFile(path) for path in paths)
        self._stored: dict[str, tuple[MappedFile, StoredTensor]] = {}
        for file, header in zip(self.files, headers, strict=True):
            for name, tensor in header.items():
                if name in self._stored:
                    raise CheckpointError(f"tensor {name!r} is in both {self._path_of(name).name} and {file.path.name}")
                self._stored[name] = (file, tensor)
        self._scales = self._taken_out()
        self.original = "embedding.weight" in self._stored
        self.maker = maker_of(self._stored)
        self.packed = self.maker == "quark" or any(name.endswith(("_blocks", ".blocks")) for name in self._stored)
        if self.maker is None:
            self._check(expected_tensors(config, original=self.original, packed=self.packed))
            views = original_views(config) if self.original else {}
            self._views = views | expert_views(config, original=self.original, packed=self.packed)
        else:
            router = (
                "mlp.router.linear" if any(".mlp.router.linear." in name for name in self._stored) else "mlp.router"
            )
            self._check(_expected_modules(config, self.maker, router))
            self._views = module_views(config, self.maker, router)
        if self.packed != config.quantized:
            logger.warning(
                "%s: experts are %s, which its config.json does not say: the memory plan is wrong",
                folder,
                "MXFP4" if self.packed else "bfloat16",
            )

    def part(self, name: str, *cut: slice) -> torch.Tensor:
        """The part of a canonical tensor (tensor_source.py) that `cut` selects, as a view of the mapped file."""
        stored, view = self._views.get(name, (name, as_stored))
        if isinstance(stored, str):
            return view(self.tensor(stored))[cut]
        experts, *rest = cut or (slice(None),)
        return torch.stack([view(self.tensor(one).unsqueeze(0))[0][tuple(rest)] for one in stored[experts]])

    def stored_experts(self, layer: int, experts: slice) -> StoredMatrices | None:
        """A layer's matrices as views of the mapped files.

        None if experts are modules of their own, or not MXFP4.
        """
        if self.maker is not None or not self.packed:
            return None
        first, second = (
            (f"block.{layer}.mlp.mlp1_weight.", f"block.{layer}.mlp.mlp2_weight.")
            if self.original
            else (f"model.layers.{layer}.mlp.experts.{name}_proj_" for name in ("gate_up", "down"))
        )
        return (
            AlternatingMxfp4(*(self.tensor(first + part)[experts] for part in ("blocks", "scales"))),
            Mxfp4Tensor(*(self.tensor(second + part)[experts] for part in ("blocks", "scales"))),
        )

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor of that name in the files, mapped."""
        file, stored = self._stored[name]
        return file.view(TORCH_TYPES[stored.type], stored.shape, stored.offset)

    def kv_scales(self, layer: int) -> tuple[float, float] | None:
        """The scales of a layer's keys and values; None where it has neither.

        Raises CheckpointError for a scale that is not one positive number, or that only one of the two has.
        """
        names = [next((n for n in kv_scale_names(x, layer) if n in self._scales), None) for x in "kv"]
        if names == [None, None]:
            return None
        key, value = (self._kv_scale(name, layer) for name in names)
        return key, value

    def _kv_scale(self, name: str | None, layer: int) -> float:
        if name is None:
            raise CheckpointError(f"{self.folder}: layer {layer} has the scale of its keys or of its values, not both")
        file, stored = self._scales[name]
        dtype = TORCH_TYPES.get(stored.type) if stored.type in FLOAT_TYPES else None
        if dtype is None or torch.Size(stored.shape).numel() != 1:
            raise CheckpointError(
                f"{file.path}: tensor {name!r} is {stored.type} of shape {stored.shape}, expected one number"
            )
        scale = float(file.view(dtype, (1,), stored.offset).float())
        if not 0 < scale < float("inf"):
            raise CheckpointError(f"{file.path}: tensor {name!r} is {scale}, expected a positive number")
        return scale

    def _taken_out(self) -> dict[str, tuple[MappedFile, StoredTensor]]:
        """The scales of quantised activations and KV caches, which are no part of the weights; says that."""
        scales = {name: self._stored.pop(name) for name in list(self._stored) if IGNORED.search(name)}
        if scales:
            logger.info(
                "%s: %d scales of activations and of the KV cache are not part of the weights, such as %s; activations "
                "stay in bfloat16, and the cache does without kv_cache_dtype fp8",
                self.folder,
                len(scales),
                next(iter(scales)),
            )
        return scales

    def _path_of(self, name: str) -> Path:
        return self._stored[name][0].path

    def _listed_files(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            return [self.folder / name for name in _names_in(index)]
        files = sorted(self.folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError(f"{self.folder} holds no *.safetensors file")
        return files

    def _check(self, expected: dict[str, tuple[Shape, frozenset[str]]]) -> None:
        for name, (shape, types) in expected.items():
            if name not in self._stored:
                raise CheckpointError(f"{self.folder}: tensor {name!r} is missing")
            path, found = self._path_of(name), self._stored[name][1]
            if found.shape != shape:
                raise CheckpointError(f"{path}: tensor {name!r} has shape {found.shape}, expected {shape}")
            if found.type not in types:
                raise CheckpointError(
                    f"{path}: tensor {name!r} has type {found.type}, expected {' or '.join(sorted(types))}"
                )
        for name in self._stored:
            if name not in expected:
                raise CheckpointError(f"{self._path_of(name)}: unexpected tensor {name!r}")


def _names_in(index: Path) -> list[str]:
    """The files that an index lists. Raises CheckpointError if it is not an index."""
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files: {error!r}") from None
    if not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{index}: weight_map must have names of files")
    return sorted(names)


def _read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file, whose header and size its own library has checked."""
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, though the index names it") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _expected_modules(c: ModelConfig, maker: Maker, router: str) -> dict[str, tuple[Shape, frozenset[str]]]:
    """As expected_tensors, where experts are modules of their own."""
    expected = {
        name.replace(".mlp.router.", f".{router}."): found
        for name, found in expected_tensors(c, original=False, packed=False).items()
        if ".mlp.experts." not in name
    }
    for n in range(c.num_layers):
        dense, packed = module_shapes(maker, c, n)
        expected |= {name: (shape, FLOAT_TYPES) for name, shape in dense.items()}
        expected |= {name: (shape, SCALE_TYPES) for name, shape in packed.items()}
    return expected
