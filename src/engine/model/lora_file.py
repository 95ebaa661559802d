"""Reads what a LoRA adapter of PEFT adapts, and checks it against the model.

No torch, and no tensor's content.

The files are adapter_config.json and adapter_model.safetensors. The matrices of an expert parameter are
[E r, inputs] (expert outer) and [outputs, r E] (rank outer); PEFT nests them where both parameters are adapted:
`mlp.experts.base_layer` is then gate_up_proj, and `mlp.experts` down_proj. With one of them it is `mlp.experts`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import regex
from safetensors import SafetensorError, safe_open

from gptoss.engine.model.json_file import read_object
from gptoss.engine.model.model_config import ModelConfig

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PATTERN_TIMEOUT_S = 1.0
FLOAT_TYPES = ("F32", "F16", "BF16")
Module = Literal["q", "k", "v", "out", "router", "w1", "w2"]
ATTENTION: dict[str, Module] = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "out"}
EXPERTS: dict[str, Module] = {"gate_up_proj": "w1", "down_proj": "w2"}
PARAMETERS: dict[str, Module] = {"router.weight": "router", "experts.gate_up_proj": "w1", "experts.down_proj": "w2"}
_NAME = regex.compile(r"(?:base_model\.model\.)?(?:model\.)?layers\.(\d{1,4})\.(.+)\.lora_([AB])(?:\.default)?\.weight")
_EXPERT_MODULE = regex.compile(r"mlp\.experts\.(gate_up|down)_projs\.(\d{1,4})")
# keys of the configuration whose values change what is computed, and the values that do not
PLAIN_VALUES: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "trainable_token_indices": ([], {}),
    "layer_replication": ([],),
    "use_qalora": (False,),
    "use_bdlora": (False,),
    "alora_invocation_tokens": ([],),
    "arrow_config": (),
    "kasa_config": (),
    "velora_config": (),
    "monteclora_config": (),
}
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base weights


class AdapterError(Exception):
    """The adapter cannot be served with this model. The message names file, key or tensor."""


@dataclass(frozen=True, slots=True)
class AdaptedMatrix:
    """One adapted matrix of a layer; of all experts, or of one where `expert` is set."""

    layer: int
    module: Module
    a: str  # name of A
    b: str
    rank: int
    scale: float
    inputs: int
    outputs: int
    count: int = 1  # matrices in the tensors: the number of experts
    expert: int | None = None

    @property
    def num_elements(self) -> int:
        return self.rank * (self.inputs + self.outputs) * self.count


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """A checked adapter."""

    folder: Path
    matrices: tuple[AdaptedMatrix, ...]
    digest: str  # of its files

    @property
    def rank(self) -> int:
        """The largest one."""
        return max(matrix.rank for matrix in self.matrices)

    @property
    def num_elements(self) -> int:
        return sum(matrix.num_elements for matrix in self.matrices)


def read_adapter(folder: Path, model: ModelConfig) -> AdapterFile:
    """Reads an adapter's description and the shapes of its tensors.

    Raises:
        AdapterError: it is damaged, for another model, or of a kind that is not served.
    """
    config = _read_config(folder / CONFIG_FILE)
    shapes = _read_shapes(folder)
    adapter = _Adapter(config, model)
    matrices = adapter.matrices(shapes)
    if not matrices:
        raise AdapterError(f"{folder / WEIGHTS_FILE} holds no tensor of an adapter")
    return AdapterFile(folder, tuple(matrices), _digest(folder))


def _read_config(path: Path) -> dict[str, Any]:
    config = read_object(path, AdapterError)
    _check_kind(config)
    return config


def _check_kind(config: Mapping[str, Any]) -> None:
    """Raises AdapterError for anything but plain LoRA."""
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"peft_type is {config.get('peft_type')!r}; only 'LORA' adapters are served")
    for key, plain in PLAIN_VALUES.items():
        value = config.get(key)
        if value is not None and value not in plain:
            raise AdapterError(f"{key} is {json.dumps(value)}: adapters with {key} are not served")
    start = config.get("init_lora_weights")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in PLAIN_STARTS):
        raise AdapterError(
            f"init_lora_weights is {json.dumps(start)}, which changes the base model's weights: save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    if config.get("target_parameters") and config.get("lora_dropout"):
        raise AdapterError("lora_dropout must be 0 with target_parameters")


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by name."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").exists()
        hint = ": adapter_model.bin is a pickle, which may run code; save it with safe_serialization=True"
        raise AdapterError(f"{path} is missing{hint if pickled else ''}")
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            views = {name: file.get_slice(name) for name in names}
            for name, view in views.items():
                if view.get_dtype() not in FLOAT_TYPES:
                    raise AdapterError(
                        f"{path}: tensor {name!r} has type {view.get_dtype()}, expected {' or '.join(FLOAT_TYPES)}"
                    )
            return {name: tuple(view.get_shape()) for name, view in views.items()}
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is truncated or damaged: {error}") from None


def _digest(folder: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        with (folder / name).open("rb") as file:
            digest.update(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest())
    return digest.hexdigest()


class _Adapter:
    """One adapter's configuration against one model."""

    def __init__(self, config: Mapping[str, Any], model: ModelConfig) -> None:
        self._config = config
        self._model = model
        self._use_rslora = bool(config.get("use_rslora"))
        self._rank = _number(config.get("r"), "r", whole=True)
        self._alpha = _number(config.get("lora_alpha"), "lora_alpha")
        self._ranks = _patterns(config, "rank_pattern", whole=True)
        self._alphas = _patterns(config, "alpha_pattern")

    def matrices(self, shapes: Mapping[str, tuple[int, ...]]) -> list[AdaptedMatrix]:
        """The adapted matrices, each checked."""
        pairs: dict[tuple[int, str], dict[str, str]] = {}
        for name in shapes:
            found = _NAME.fullmatch(name)
            if found is None:
                raise AdapterError(f"tensor {name!r} is not part of a LoRA adapter for gpt-oss that can be served")
            layer, module, which = int(found[1]), found[2], found[3]
            if layer >= self._model.num_layers:
                raise AdapterError(
                    f"tensor {name!r} is for layer {layer}, but the model has {self._model.num_layers} layers"
                )
            if which in pairs.setdefault((layer, module), {}):
                raise AdapterError(f"tensor {name!r} is there twice, as {pairs[layer, module][which]!r} too")
            pairs[layer, module][which] = name
        found_matrices = [self._matrix(layer, module, pair, shapes) for (layer, module), pair in pairs.items()]
        self._check_all_there(found_matrices)
        return sorted(found_matrices, key=lambda m: (m.layer, m.module, m.expert or 0))

    def _matrix(
        self, layer: int, path: str, pair: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> AdaptedMatrix:
        for which, other in (("A", "B"), ("B", "A")):
            if which not in pair:
                missing = f"lora_{which}".join(pair[other].rsplit(f"lora_{other}", 1))
                raise AdapterError(f"tensor {missing!r} is missing")
        a, b = pair["A"], pair["B"]
        module, parameter, count, expert = self._target(path, a, shapes[a], shapes[b])
        full_name = f"model.layers.{layer}.{parameter}"
        rank = int(self._ranks_of(full_name))
        inputs, outputs = self._sizes(module)
        for name, wanted in ((a, (count * rank, inputs)), (b, (outputs, count * rank))):
            if shapes[name] != wanted:
                raise AdapterError(
                    f"tensor {name!r} has shape {shapes[name]}, expected {wanted} for rank {rank} of this model"
                )
        alpha = _first_match(self._alphas, full_name, self._alpha)
        scale = alpha / (math.sqrt(rank) if self._use_rslora else rank)
        return AdaptedMatrix(layer, module, a, b, rank, scale, inputs, outputs, count, expert)

    def _ranks_of(self, full_name: str) -> float:
        return _first_match(self._ranks, full_name, self._rank)

    def _target(
        self, path: str, name: str, a: tuple[int, ...], b: tuple[int, ...]
    ) -> tuple[Module, str, int, int | None]:
        """What a path adapts: module, name in patterns, number of experts in the tensors, which one."""
        parent, _, last = path.rpartition(".")
        if parent == "self_attn" and last in ATTENTION:
            return ATTENTION[last], path + self._parameter_suffix(path), 1, None
        if path in ("mlp.router", "mlp.router.linear"):
            return "router", "mlp.router.weight" if path == "mlp.router" else path, 1, None
        if path in ("mlp.experts", "mlp.experts.base_layer"):
            which = self._experts_parameter(name, a, b)
            return EXPERTS[which], f"mlp.experts.{which}", self._model.num_experts, None
        one = _EXPERT_MODULE.fullmatch(path)
        if one is not None and int(one[2]) < self._model.num_experts:
            return EXPERTS[f"{one[1]}_proj"], path, 1, int(one[2])
        raise AdapterError(
            f"tensor {name!r} adapts {path!r}, which cannot be adapted here: only the attention's projections, the "
            "router and the experts' gate_up_proj and down_proj can"
        )

    def _parameter_suffix(self, path: str) -> str:
        """`.weight` where a projection is adapted as a parameter, which patterns then name."""
        parameters = self._config.get("target_parameters") or []
        return ".weight" if any(f".{path}.weight".endswith(f".{name}") for name in parameters) else ""

    def _experts_parameter(self, name: str, a: tuple[int, ...], b: tuple[int, ...]) -> str:
        """Which of the experts' parameters matrices of these shapes adapt."""
        sizes = {which: self._sizes(module) for which, module in EXPERTS.items()}
        found = [which for which, (inputs, outputs) in sizes.items() if a[-1:] == (inputs,) and b[:1] == (outputs,)]
        if not found:
            shown = " or ".join(f"{i} inputs and {o} outputs ({which})" for which, (i, o) in sizes.items())
            raise AdapterError(f"tensor {name!r} has shape {a} and its lora_B {b}; the experts have {shown}")
        listed = self._config.get("target_parameters")
        if listed and not any(f".mlp.experts.{found[0]}".endswith(f".{entry}") for entry in listed):
            raise AdapterError(f"tensor {name!r} adapts {found[0]}, which target_parameters does not list")
        return found[0]

    def _sizes(self, module: Module) -> tuple[int, int]:
        """Inputs and outputs of a matrix."""
        c = self._model
        heads, groups = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        sizes: dict[Module, tuple[int, int]] = {
            "q": (c.hidden_size, heads),
            "k": (c.hidden_size, groups),
            "v": (c.hidden_size, groups),
            "out": (heads, c.hidden_size),
            "router": (c.hidden_size, c.num_experts),
            "w1": (c.hidden_size, 2 * c.intermediate_size),
            "w2": (c.intermediate_size, c.hidden_size),
        }
        return sizes[module]

    def _check_all_there(self, found: list[AdaptedMatrix]) -> None:
        """Raises AdapterError if the configuration names a matrix that the file lacks.

        An adapter of a shallower model may fit layer by layer.
        """
        there = {(m.layer, m.module) for m in found}
        for layer, module, path in self._targeted():
            if (layer, module) not in there:
                raise AdapterError(f"the tensors of {path!r} are missing, which adapter_config.json targets")
        by_expert: dict[tuple[int, Module], list[AdaptedMatrix]] = {}
        for m in found:
            if m.expert is not None:
                by_expert.setdefault((m.layer, m.module), []).append(m)
        for (layer, _), group in by_expert.items():
            if len(group) != self._model.num_experts:
                raise AdapterError(
                    f"layer {layer} adapts {len(group)} experts, as {group[0].a!r}; it must be all "
                    f"{self._model.num_experts}"
                )
            if len({(m.rank, m.scale) for m in group}) > 1:
                raise AdapterError(f"layer {layer}: the experts of {group[0].a!r} must have one rank and alpha")

    def _targeted(self) -> Iterator[tuple[int, Module, str]]:
        """Each matrix that PEFT would adapt with this configuration."""
        parameters = _names(self._config, "target_parameters")
        for layer in range(self._model.num_layers):
            for name, module in ATTENTION.items():
                path = f"model.layers.{layer}.self_attn.{name}"
                if self._is_target(path, layer):
                    yield layer, module, path
            for name, target in PARAMETERS.items():
                path = f"model.layers.{layer}.mlp.{name}"
                if any(path == entry or path.endswith(f".{entry}") for entry in parameters):
                    yield layer, target, path

    def _is_target(self, path: str, layer: int) -> bool:
        """Whether `target_modules` matches, as PEFT does it."""
        only = self._config.get("layers_to_transform")
        if only is not None and layer not in (only if isinstance(only, list) else [only]):
            return False
        return self._matches("target_modules", path) and not self._matches("exclude_modules", path)

    def _matches(self, key: str, path: str) -> bool:
        value = self._config.get(key)
        if isinstance(value, str):
            return value == "all-linear" or _match(value, path, key)
        return any(path == name or path.endswith(f".{name}") for name in _names(self._config, key))


def _names(config: Mapping[str, Any], key: str) -> list[str]:
    value = config.get(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise AdapterError(f"{key} must be a list of names")
    return value


def _patterns(config: Mapping[str, Any], key: str, *, whole: bool = False) -> dict[str, float]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{key} must be an object")
    return {pattern: _number(number, f"{key}[{pattern!r}]", whole=whole) for pattern, number in value.items()}


def _number(value: Any, key: str, *, whole: bool = False) -> float:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (whole and (value < 1 or value != int(value))):
        raise AdapterError(f"{key} must be a {'whole number above 0' if whole else 'number'}, got {value!r}")
    return float(value)


def _first_match(patterns: Mapping[str, float], full_name: str, default: float) -> float:
    """The value of the first pattern that matches the end of a name, as in PEFT."""
    for pattern, value in patterns.items():
        if _match(rf"(?:.*\.)?(?:{pattern})", full_name, pattern):
            return value
    return default


def _match(pattern: str, text: str, key: str) -> bool:
    try:
        return regex.fullmatch(pattern, text, timeout=PATTERN_TIMEOUT_S) is not None
    except regex.error as error:
        raise AdapterError(f"{key} is not a valid regular expression: {error}") from None
    except TimeoutError:
        raise AdapterError(f"{key} is a regular expression that takes too long to match") from None
