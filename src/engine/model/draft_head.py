"""Reads what an EAGLE-3 draft head is, and checks it against the model.

No torch, and no tensor's content.

A head (Li et al. 2025, arXiv 2503.01840) is one Llama decoder layer that guesses the next tokens from hidden states of
the model. Two dialects of its folder are published: that of SpecForge, SGLang and NVIDIA's ModelOpt (`midlayer.*`, keys
in `eagle_config` or at the top), and that of vLLM's speculators (`layers.0.*`, the layer's keys in
`transformer_layer_config`). The files are config.json and model.safetensors, or the files of its index.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gptoss.config.errors import ConfigError
from gptoss.engine.model.model_config import ModelConfig

CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_CONFIG_BYTES = 1 << 20
FLOAT_TYPES, INDEX_TYPES = ("BF16", "F16", "F32"), ("I64", "I32")
NAMED_HEADS = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
LAYER = "layers.0."
NOT_READ = ("t2d", LAYER + "self_attn.rotary_emb.inv_freq")
# keys whose values change what is computed, and the value that does not; all may be absent or null
PLAIN_VALUES: dict[str, Any] = {
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "mlp_bias": False,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "parallel_draft_step": 1,
    "parallel_drafting": False,
    "partial_rotary_factor": 1.0,
    "is_causal": True,
}
FOREIGN_KEYS = ("dflash_config", "block_size", "mask_token_id", "ptd_token_id", "pard_token")
ROPE_TYPES = ("default", "yarn", "llama3")


class DraftHeadError(ConfigError):
    """The head cannot guess for this model. The message names file, key or tensor."""


@dataclass(frozen=True, slots=True)
class HeadRope:
    """The rotary embedding of a head; the fields of other types than its own are unused."""

    type: str  # one of ROPE_TYPES
    theta: float
    factor: float = 1.0
    original_max_position: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True, slots=True)
class HeadTensor:
    """Where a tensor is."""

    file: Path
    name: str
    type: str  # as safetensors names it
    shape: tuple[int, ...]


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
    config = _Config(folder / CONFIG_FILE)
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


class _Config:
    """A head's config.json, whatever the dialect."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._top = _read_object(path)
        self._places = [self._top]
        for key in ("eagle_config", "transformer_layer_config"):
            nested = self._top.get(key)
            if nested is None:
                continue
            if not isinstance(nested, dict):
                raise self.error(key, "expected an object")
            self._places.append(nested)

    def get(self, key: str) -> Any:
        """The first value at the top, in eagle_config, in transformer_layer_config; None: null or missing."""
        return next((place[key] for place in self._places if place.get(key) is not None), None)

    def error(self, key: str, expected: str) -> DraftHeadError:
        value = self.get(key) if key not in self._top else self._top[key]
        return DraftHeadError(f"{self._path}: {key} is {json.dumps(value)[:200]}, {expected}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.error(key, "expected a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        return default if value is None else self._positive(key, value)

    def _positive(self, key: str, value: Any) -> float:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
            raise self.error(key, "expected a positive number")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.get(key)
        if not isinstance(value, (bool, type(None))):
            raise self.error(key, "expected true or false")
        return bool(value)

    def check_kind(self) -> None:
        """Raises DraftHeadError for anything but an EAGLE-3 head of one Llama layer."""
        kind = self.get("speculators_model_type")
        if kind not in (None, "eagle3"):
            raise self.error("speculators_model_type", "only heads of type 'eagle3' are served")
        names = self.get("architectures") or []
        named = [name for name in names if name in NAMED_HEADS] if isinstance(names, list) else []
        # some heads name only the layer that they are made of, and have the size of the reduced vocabulary
        is_unnamed = names == ["LlamaForCausalLM"] and self.get("draft_vocab_size") is not None
        if not named and not is_unnamed and not (kind == "eagle3" and not names):
            raise self.error("architectures", f"only EAGLE-3 heads are served ({', '.join(NAMED_HEADS)})")
        for key in FOREIGN_KEYS:
            if self.get(key) is not None:
                raise self.error(key, "which EAGLE-3 heads do not have: this kind of head is not served")
        for key, plain in PLAIN_VALUES.items():
            if self.get(key) is not None and self.get(key) != plain:
                raise self.error(key, f"only heads with {json.dumps(plain)} are served")
        if self.get("model_type") not in (None, "llama", "gpt_oss", "speculators"):
            raise self.error("model_type", "the layer of a head must be of type 'llama'")

    def check_model(self, model: ModelConfig) -> None:
        """Raises DraftHeadError for a head of another model."""
        for key, wanted in (
            ("hidden_size", model.hidden_size),
            ("target_hidden_size", model.hidden_size),
            ("vocab_size", model.vocab_size),
        ):
            if self.get(key) not in (None, wanted):
                raise self.error(key, f"but the model's is {wanted}: the head is for another model")
        if self.get("hidden_size") is None:
            raise self.error("hidden_size", f"expected the model's, {model.hidden_size}")

    def taps(self, model: ModelConfig) -> tuple[int, ...]:
        """The boundaries whose states the head takes; none: the final state."""
        key, last = "eagle_aux_hidden_state_layer_ids", model.num_layers
        if self.get("use_aux_hidden_state") is False:
            return ()
        ids = self.get(key) or self.get("aux_hidden_state_layer_ids") or [2, last // 2, last - 3]
        valid = isinstance(ids, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in ids)
        if not valid or not all(0 <= i <= last for i in ids) or sorted(set(ids)) != ids:
            raise self.error(key, f"expected rising numbers between 0 and {last}, the model's layers")
        return tuple(ids)

    def window(self) -> int | None:
        """The sliding window of the layer, if it has one."""
        types = self.get("layer_types")
        if types is None or types == ["full_attention"] or len(types) != 1:
            return None
        if types != ["sliding_attention"]:
            raise self.error("layer_types", "expected full_attention or sliding_attention")
        return self.count("sliding_window")

    def rope(self) -> HeadRope:
        """The rotary embedding, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
        found: dict[str, Any] = {"rope_theta": self.get("rope_theta")}
        for key in ("rope_scaling", "rope_parameters"):
            value = self.get(key)
            if value is not None and not isinstance(value, dict):
                raise self.error(key, "expected an object")
            found |= {name: v for name, v in (value or {}).items() if v is not None}
        kind = found.get("rope_type", found.get("type", "default"))
        if kind not in ROPE_TYPES or not {"mscale", "mscale_all_dim"}.isdisjoint(found):
            key = "rope_scaling" if self.get("rope_scaling") is not None else "rope_parameters"
            raise self.error(key, f"only the rope types {', '.join(ROPE_TYPES)} are served")
        theta = found["rope_theta"]
        numbers = {
            ours: self._positive(theirs, found[theirs])
            for ours, theirs in (
                ("factor", "factor"),
                ("beta_fast", "beta_fast"),
                ("beta_slow", "beta_slow"),
                ("attention_factor", "attention_factor"),
                ("low_freq_factor", "low_freq_factor"),
                ("high_freq_factor", "high_freq_factor"),
            )
            if theirs in found
        }
        return HeadRope(
            type=kind,
            theta=10_000.0 if theta is None else self._positive("rope_theta", theta),
            original_max_position=int(found.get("original_max_position_embeddings", 4096)),
            truncate=bool(found.get("truncate", True)),
            **numbers,
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise DraftHeadError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DraftHeadError(f"{path} is missing") from None
    except OSError as error:
        raise DraftHeadError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise DraftHeadError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DraftHeadError(f"{path} must hold an object")
    return value


def _read_tensors(folder: Path) -> dict[str, HeadTensor]:
    """The tensors by the names of the speculators dialect."""
    tensors: dict[str, HeadTensor] = {}
    for path in _weight_files(folder):
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
        names = _read_object(folder / INDEX_FILE).get("weight_map")
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


def _check(head: DraftHead, config: _Config, model: ModelConfig) -> None:
    """Raises DraftHeadError unless the tensors are those of the configuration."""
    if head.norm_before_fc and head.fc_norm:
        raise config.error("fc_norm", "which excludes norm_before_fc: a head has one or the other")
    if not head.taps and (head.norm_before_fc or head.fc_norm):
        raise config.error("use_aux_hidden_state", "so there is no fc that a norm could precede")
    if head.num_heads % head.num_kv_heads or head.head_dim % 2:
        raise config.error("num_attention_heads", f"no multiple of num_key_value_heads ({head.num_kv_heads})")
    wanted, optional = _expected(head, model)
    shown = f"{head.folder}: tensor"
    for name, tensor in head.tensors.items():
        if name not in wanted and name not in optional:
            raise DraftHeadError(f"{shown} {tensor.name!r} is not part of an EAGLE-3 head of one layer")
        if tensor.type not in (INDEX_TYPES if name == "d2t" else FLOAT_TYPES):
            raise DraftHeadError(f"{shown} {tensor.name!r} has type {tensor.type}")
    for name, shape in (wanted | optional).items():
        found = head.tensors.get(name)
        if found is None and name in wanted:
            raise DraftHeadError(f"{shown} {name!r} is missing")
        if found is not None and shape is not None and found.shape != shape:
            raise DraftHeadError(f"{shown} {found.name!r} has shape {found.shape}, expected {shape}")
    _check_vocabulary(head, config, model)


Shapes = dict[str, tuple[int, ...]]


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


def _check_vocabulary(head: DraftHead, config: _Config, model: ModelConfig) -> None:
    """Raises DraftHeadError unless output head, d2t and draft_vocab_size fit together."""
    own, ids = head.tensors.get("lm_head.weight"), head.tensors.get("d2t")
    if config.flag("tie_word_embeddings") and own is None:
        raise config.error("tie_word_embeddings", "but tensor 'lm_head.weight' is missing")
    size = model.vocab_size if config.get("draft_vocab_size") is None else config.count("draft_vocab_size")
    if own is not None and own.shape != (size, model.hidden_size):
        raise DraftHeadError(
            f"{head.folder}: tensor {own.name!r} has shape {own.shape}, expected {(size, model.hidden_size)} by "
            "draft_vocab_size"
        )
    if own is None and size != model.vocab_size:
        raise config.error("draft_vocab_size", "but tensor 'lm_head.weight' is missing")
    if size != model.vocab_size and ids is None:
        raise config.error("draft_vocab_size", f"below the model's {model.vocab_size}, but tensor 'd2t' is missing")
    if ids is not None and ids.shape != (size,):
        raise DraftHeadError(f"{head.folder}: tensor 'd2t' has shape {ids.shape}, expected {(size,)}")
