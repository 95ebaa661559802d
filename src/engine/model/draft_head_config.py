"""The config.json of an EAGLE-3 draft head, in both published dialects (draft_head.py)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss.config.errors import ConfigError
from gptoss.engine.model.json_file import read_object
from gptoss.engine.model.model_config import ModelConfig

NAMED_HEADS = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
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
ROPE_KEYS = ("rope_scaling", "rope_parameters")
LAYER_TYPES = ("full_attention", "sliding_attention")
MAX_COUNT = 2**31 - 1
MIN_NUMBER, MAX_NUMBER = 1e-12, 1e12  # outside of these a rotary embedding is no longer finite


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


class HeadConfig:
    """A head's config.json, in either dialect. Its methods raise DraftHeadError, which names the key."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._top = read_object(path, DraftHeadError)
        self._sections = [self._top]
        for key in ("eagle_config", "transformer_layer_config"):
            nested = self._top.get(key)
            if nested is None:
                continue
            if not isinstance(nested, dict):
                raise self.error(key, "expected an object")
            self._sections.append(nested)

    def get(self, key: str) -> Any:
        """The first value at the top, in eagle_config or in transformer_layer_config; None if null or missing."""
        return next((section[key] for section in self._sections if section.get(key) is not None), None)

    def error(self, key: str, expected: str) -> DraftHeadError:
        return self._error(key, self.get(key) if key not in self._top else self._top[key], expected)

    def _error(self, shown: str, value: Any, expected: str) -> DraftHeadError:
        return DraftHeadError(f"{self._path}: {shown} is {json.dumps(value)[:200]}, {expected}")

    def count(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        return self._count(key, default if value is None else value)

    def _count(self, shown: str, value: Any) -> int:
        if not _is_whole(value) or not 1 <= value <= MAX_COUNT:
            raise self._error(shown, value, f"expected a positive whole number, at most {MAX_COUNT}")
        return int(value)

    def number(self, key: str, default: float) -> float:
        value = self.get(key)
        return default if value is None else self._positive(key, value)

    def _positive(self, shown: str, value: Any) -> float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not MIN_NUMBER <= value <= MAX_NUMBER:
            raise self._error(shown, value, f"expected a positive number, {MIN_NUMBER:g} to {MAX_NUMBER:g}")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        return default if value is None else self._flag(key, value)

    def _flag(self, shown: str, value: Any) -> bool:
        if not isinstance(value, bool):
            raise self._error(shown, value, "expected true or false")
        return value

    def check_kind(self) -> None:
        """Raises DraftHeadError unless this is an EAGLE-3 head of one Llama layer."""
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
            value = self.get(key)
            if value is not None and (value != plain or isinstance(value, bool) is not isinstance(plain, bool)):
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
            value = self.get(key)
            if value is not None and (value != wanted or not _is_whole(value)):
                raise self.error(key, f"but the model's is {wanted}: the head is for another model")
        if self.get("hidden_size") is None:
            raise self.error("hidden_size", f"expected the model's, {model.hidden_size}")

    def taps(self, model: ModelConfig) -> tuple[int, ...]:
        """The boundaries whose states the head takes; none: the final state."""
        last = model.num_layers
        if not self.flag("use_aux_hidden_state", default=True):
            return ()
        names = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
        key = next((name for name in names if self.get(name) is not None), names[0])
        ids = self.get(key)
        ids = [2, last // 2, last - 3] if ids is None else ids
        is_valid = isinstance(ids, list) and bool(ids) and all(_is_whole(i) for i in ids)
        if not is_valid or not all(0 <= i <= last for i in ids) or sorted(set(ids)) != ids:
            raise self.error(key, f"expected rising numbers between 0 and {last}, the model's layers")
        return tuple(ids)

    def window(self) -> int | None:
        """The sliding window of the layer, if it has one."""
        types = self.get("layer_types")
        if types is None:
            return None
        if not isinstance(types, list) or not types or not all(kind in LAYER_TYPES for kind in types):
            raise self.error("layer_types", f"expected a list of {' or '.join(LAYER_TYPES)}")
        return self.count("sliding_window") if types == ["sliding_attention"] else None

    def rope(self) -> HeadRope:
        """The rotary embedding, of transformers 4 (rope_theta, rope_scaling) or 5 (rope_parameters)."""
        found = self._rope_values()
        shown, kind = found.get("rope_type", found.get("type", ("rope_type", "default")))
        if kind not in ROPE_TYPES:
            raise self._error(shown, kind, f"only the rope types {', '.join(ROPE_TYPES)} are served")
        for name in ("mscale", "mscale_all_dim"):
            if name in found:
                raise self._error(*found[name], "which no rope type that is served has")
        names = {"theta": "rope_theta"} | {
            name: name
            for name in ("factor", "beta_fast", "beta_slow", "attention_factor", "low_freq_factor", "high_freq_factor")
        }
        values: dict[str, Any] = {ours: self._positive(*found[name]) for ours, name in names.items() if name in found}
        if "original_max_position_embeddings" in found:
            values["original_max_position"] = self._count(*found["original_max_position_embeddings"])
        if "truncate" in found:
            values["truncate"] = self._flag(*found["truncate"])
        rope = HeadRope(**({"theta": 10_000.0} | values), type=kind)
        self._check_rope(rope, found)
        return rope

    def _rope_values(self) -> dict[str, tuple[str, Any]]:
        """By name: where a message says that the value is, and the value."""
        theta = self.get("rope_theta")
        found = {} if theta is None else {"rope_theta": ("rope_theta", theta)}
        for key in ROPE_KEYS:
            section = self.get(key)
            if section is not None and not isinstance(section, dict):
                raise self.error(key, "expected an object")
            found |= {name: (f"{key}.{name}", v) for name, v in (section or {}).items() if v is not None}
        return found

    def _check_rope(self, rope: HeadRope, found: dict[str, tuple[str, Any]]) -> None:
        """Raises DraftHeadError for numbers that exclude each other."""
        if rope.type == "yarn" and rope.theta <= 1:
            raise self._error(*found["rope_theta"], "expected a number above 1")
        pairs = {"yarn": ("beta_fast", "beta_slow"), "llama3": ("high_freq_factor", "low_freq_factor")}
        upper, lower = pairs.get(rope.type, ("factor", "factor"))
        if rope.type in pairs and getattr(rope, upper) <= getattr(rope, lower):
            shown, value = found.get(upper, (upper, getattr(rope, upper)))
            raise self._error(shown, value, f"expected a number above {lower} ({getattr(rope, lower):g})")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
