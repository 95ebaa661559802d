"""Describes an EAGLE-3 draft head, and checks it against the model.

Uses no torch, and reads no tensor's content but that of d2t.

A head (Li et al. 2025, arXiv 2503.01840) is one Llama decoder layer that guesses the next tokens from hidden states of
the model. Two dialects of its folder are published: that of SpecForge, SGLang and NVIDIA's ModelOpt (`midlayer.*`, keys
in `eagle_config` or at the top), and that of vLLM's speculators (`layers.0.*`, the layer's keys in
`transformer_layer_config`). The files are config.json and model.safetensors, or the files of its index.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from gptoss.engine.model.draft_head_config import DraftHeadError, HeadConfig, HeadRope
from gptoss.engine.model.json_file import read_object
from gptoss.engine.model.model_config import ModelConfig

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
FLOAT_TYPES, INDEX_TYPES = ("BF16", "F16", "F32"), ("I64", "I32")
LAYER = "layers.0."
Shapes = dict[str, tuple[int, ...]]
NOT_READ = ("t2d", LAYER + "self_attn.rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class HeadTensor:
    """A tensor of a file."""

    file: Path
    name: str
    type: str  # as safetensors names it
    shape: tuple[int, ...]

    @property
    def shown(self) -> str:
        """The tensor in an error message."""
        return f"{self.file}: tensor {self.name!r}"


@dataclass(frozen=True, slots=True, eq=False)
class DraftHead:
    """A checked EAGLE-3 head.

    `taps` are boundaries between the model's layers: boundary i is the residual stream that layer i takes, and the last
    one what the last layer returns, before the final norm. vLLM counts so, and SGLang for gpt-oss (its PR 32334). A
    head without taps reads the model's final state, normed, and has no `fc`.
    """

    folder: Path
    taps: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope: HeadRope
    window: int | None  # tokens that a token sees, itself included; None: all
    norm_before_residual: bool
    norm_before_fc: bool  # one norm over all taps
    fc_norm: bool  # a norm for each tap
    norm_output: bool  # the next guess takes the state after the last norm
    tensors: Mapping[str, HeadTensor]  # by the names of the speculators dialect

    def boundaries(self, num_layers: int) -> tuple[int, ...]:
        """The boundaries whose states the head takes."""
        return self.taps or (num_layers,)

    @property
    def num_elements(self) -> int:
        """Parameters that are loaded; the model's embedding and output head are not counted."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def weight_bytes(self, element: int) -> int:
        """Bytes of the loaded parameters; `element`: of one."""
        return self.num_elements * element

    def kv_bytes_per_token(self, element: int) -> int:
        return 2 * self.num_kv_heads * self.head_dim * element


def read_draft_head(folder: Path, model: ModelConfig) -> DraftHead:
    """Reads the description of a head and the shapes of its tensors.

    Raises:
        DraftHeadError: it is damaged, for another model, or of a kind that is not served.
    """
    state = tuple(_modified(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE))
    return _read(folder, model, state)


def _modified(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


@functools.lru_cache(maxsize=4)
def _read(folder: Path, model: ModelConfig, state: tuple[int | None, ...]) -> DraftHead:
    """`state`: of the files, so that a changed head is read again."""
    if not folder.is_dir():
        raise DraftHeadError(f"{folder} is not a folder; a head is a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    config = HeadConfig(folder / CONFIG_FILE)
    config.check_kind()
    config.check_model(model)
    tensors = _read_tensors(folder)
    taps = config.taps(model)
    head = DraftHead(
        folder=folder,
        taps=taps,
        num_heads=config.count("num_attention_heads"),
        num_kv_heads=config.count("num_key_value_heads", config.count("num_attention_heads")),
        head_dim=config.count("head_dim", model.hidden_size // config.count("num_attention_heads")),
        intermediate_size=config.count("intermediate_size"),
        rms_norm_eps=config.number("rms_norm_eps", 1e-6),
        rope=config.rope(),
        window=config.window(),
        norm_before_residual=config.flag("norm_before_residual"),
        norm_before_fc=config.flag("norm_before_fc"),
        fc_norm=config.flag("fc_norm"),
        norm_output=config.flag("norm_output"),
        tensors=tensors,
    )
    _check(head, config, model)
    return head


def _read_tensors(folder: Path) -> dict[str, HeadTensor]:
    """The tensors by the names of the speculators dialect."""
    tensors: dict[str, HeadTensor] = {}
    for path in _weight_files(folder):
        if not path.is_file():
            raise DraftHeadError(f"{path} {'is not a file' if path.exists() else 'is missing'}")
        try:
            with safe_open(path, framework="numpy") as file:
                for stored in file.keys():  # noqa: SIM118 (not a mapping)
                    view = file.get_slice(stored)
                    name = _canonical(stored)
                    if name in tensors:
                        raise DraftHeadError(f"{path}: tensor {stored!r} is there twice, as {tensors[name].name!r} too")
                    tensors[name] = HeadTensor(path, stored, view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise DraftHeadError(f"{path} is truncated or damaged: {error}") from None
    return {name: tensor for name, tensor in tensors.items() if name not in NOT_READ}


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        names = read_object(folder / INDEX_FILE, DraftHeadError).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise DraftHeadError(f"{folder / INDEX_FILE}: weight_map must be an object of file names")
        if any(Path(name).name != name for name in names.values()):
            raise DraftHeadError(f"{folder / INDEX_FILE}: weight_map names a file outside of the folder")
        return [folder / name for name in sorted(set(names.values()))]
    pickled = (folder / "pytorch_model.bin").exists()
    hint = ": pytorch_model.bin is a pickle, which may run code; save it as safetensors"
    raise DraftHeadError(f"{folder / WEIGHTS_FILE} is missing{hint if pickled else ''}")


def _canonical(stored: str) -> str:
    """A tensor's name in the speculators dialect."""
    name = stored.removeprefix("model.")
    return LAYER + name.removeprefix("midlayer.") if name.startswith("midlayer.") else name


def _check(head: DraftHead, config: HeadConfig, model: ModelConfig) -> None:
    """Raises DraftHeadError unless the tensors are those of the configuration."""
    if head.norm_before_fc and head.fc_norm:
        raise config.error("fc_norm", "which excludes norm_before_fc: a head has one or the other")
    if not head.taps and (head.norm_before_fc or head.fc_norm):
        raise config.error("use_aux_hidden_state", "so there is no fc that a norm could precede")
    if head.head_dim % 2:
        raise config.error("head_dim", "expected an even number")
    if head.num_heads % head.num_kv_heads:
        raise config.error("num_attention_heads", f"expected a multiple of num_key_value_heads ({head.num_kv_heads})")
    wanted, optional = _expected(head, model)
    for name, tensor in head.tensors.items():
        if name not in wanted and name not in optional:
            raise DraftHeadError(f"{tensor.shown} is not part of an EAGLE-3 head of one layer")
        if tensor.type not in (INDEX_TYPES if name == "d2t" else FLOAT_TYPES):
            raise DraftHeadError(f"{tensor.shown} has type {tensor.type}")
    for name, shape in (wanted | optional).items():
        found = head.tensors.get(name)
        if found is None and name in wanted:
            raise DraftHeadError(f"{head.folder}: tensor {name!r} is missing")
        if found is not None and shape is not None and found.shape != shape:
            raise DraftHeadError(f"{found.shown} has shape {found.shape}, expected {shape}")
    _check_vocabulary(head, config, model)


def _expected(head: DraftHead, model: ModelConfig) -> tuple[Shapes, dict[str, tuple[int, ...] | None]]:
    """The tensors that must be there and those that may be, with their shapes; None: checked elsewhere."""
    hidden, inter = model.hidden_size, head.intermediate_size
    q_dim, kv_dim = head.num_heads * head.head_dim, head.num_kv_heads * head.head_dim
    a, m = LAYER + "self_attn.", LAYER + "mlp."
    wanted: Shapes = {
        a + "q_proj.weight": (q_dim, 2 * hidden),
        a + "k_proj.weight": (kv_dim, 2 * hidden),
        a + "v_proj.weight": (kv_dim, 2 * hidden),
        a + "o_proj.weight": (hidden, q_dim),
        m + "gate_proj.weight": (inter, hidden),
        m + "up_proj.weight": (inter, hidden),
        m + "down_proj.weight": (hidden, inter),
        "norm.weight": (hidden,),
    }
    norms = ("hidden_norm", "input_layernorm", "post_attention_layernorm")
    wanted |= {f"{LAYER}{name}.weight": (hidden,) for name in norms}
    if head.taps:
        wanted["fc.weight"] = (hidden, len(head.taps) * hidden)
    if head.norm_before_fc:
        wanted["input_norm.weight"] = (len(head.taps) * hidden,)
    if head.fc_norm:
        wanted |= {f"fc_norm.{i}.weight": (hidden,) for i in range(len(head.taps))}
    biases = {"q": q_dim, "k": kv_dim, "v": kv_dim, "o": hidden}
    optional: dict[str, tuple[int, ...] | None] = {f"{a}{x}_proj.bias": (size,) for x, size in biases.items()}
    return wanted, optional | {"embed_tokens.weight": (model.vocab_size, hidden), "lm_head.weight": None, "d2t": None}


def _check_vocabulary(head: DraftHead, config: HeadConfig, model: ModelConfig) -> None:
    """Raises DraftHeadError unless output head, d2t and draft_vocab_size fit together."""
    own, ids = head.tensors.get("lm_head.weight"), head.tensors.get("d2t")
    if config.flag("tie_word_embeddings") and own is None:
        raise config.error("tie_word_embeddings", "but tensor 'lm_head.weight' is missing")
    size = model.vocab_size if config.get("draft_vocab_size") is None else config.count("draft_vocab_size")
    if own is not None and own.shape != (size, model.hidden_size):
        raise DraftHeadError(
            f"{own.shown} has shape {own.shape}, expected {(size, model.hidden_size)} by draft_vocab_size"
        )
    if own is None and size != model.vocab_size:
        raise config.error("draft_vocab_size", "but tensor 'lm_head.weight' is missing")
    if size > model.vocab_size:
        raise config.error("draft_vocab_size", f"above the model's {model.vocab_size}")
    if size != model.vocab_size and ids is None:
        raise config.error("draft_vocab_size", f"below the model's {model.vocab_size}, but tensor 'd2t' is missing")
    if ids is not None and ids.shape != (size,):
        raise DraftHeadError(f"{ids.shown} has shape {ids.shape}, expected {(size,)}")
    if ids is not None:
        _check_tokens(ids, model.vocab_size)


def _check_tokens(d2t: HeadTensor, vocab_size: int) -> None:
    """Raises DraftHeadError unless d2t, which has differences, names different tokens of the model."""
    try:
        with safe_open(d2t.file, framework="numpy") as file:
            differences = file.get_tensor(d2t.name).astype(np.int64)
    except (SafetensorError, OSError) as error:
        raise DraftHeadError(f"{d2t.file} is truncated or damaged: {error}") from None
    tokens = np.sort(differences + np.arange(len(differences)))
    if tokens[0] < 0 or tokens[-1] >= vocab_size:
        raise DraftHeadError(f"{d2t.shown} names tokens outside of the model's {vocab_size}")
    if (tokens[1:] == tokens[:-1]).any():
        raise DraftHeadError(f"{d2t.shown} names a token twice")
