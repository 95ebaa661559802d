"""The config.json of an EAGLE-3 draft head, in both published dialects (draft_head.py)."""

from __future__ import annotations

import json
import math
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
