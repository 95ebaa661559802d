"""Lists the launches of Triton kernels with keys and values, or the output head, in FP8."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import triton.language as tl

from bench.kernels import cases
from bench.kernels.cases import Maker, Row
from bench.kernels.cross_compile import Case
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.kernels.triton.attention import num_warps


def fp8_cases(model: str, architecture: str) -> list[Case]:
    """What kv_cache_dtype fp8 and lm_head_dtype fp8 launch in place of others: none below sm_89."""
    if int(architecture.removeprefix("sm_")) < 89:
        return []
    return cases.distinct(ModelConfig.from_json(hf_config(SIZES[model])), architecture, _FP8_MAKERS)


def _in_fp8(
    made: Iterator[Case],
    scales: tuple[str, ...],
    compute: tl.dtype,
    stored: tuple[str, ...] = ("key_ptr", "value_ptr"),
    scale_type: str = "fp32",
) -> Iterator[Case]:
    """The same cases with `stored` in FP8."""
    for case in made:
        kept = {name: value for name, value in case.constexprs.items() if name not in scales} | {"COMPUTE": compute}
        signature = case.signature | dict.fromkeys(stored, "*fp8e4nv") | dict.fromkeys(scales, scale_type)
        yield replace(case, name=f"fp8 {case.name}", constexprs=kept, signature=signature)


def _qkv_fp8(c: ModelConfig, row: Row) -> Iterator[Case]:
    return _in_fp8(cases._qkv(c, row), ("key_factor", "value_factor"), tl.bfloat16)


def _lm_head_fp8(c: ModelConfig, row: Row) -> Iterator[Case]:
    return _in_fp8(cases._lm_head(c, row), ("w_scale_ptr",), tl.bfloat16, ("w_ptr",), "*fp32")


def _attention_fp8(c: ModelConfig, row: Row) -> Iterator[Case]:
    for case in _in_fp8(cases._attention(c, row), ("value_scale",), tl.float16):
        split, fixed = case.constexprs["SPLIT"], case.constexprs["FIXED"]
        yield replace(case, warps=num_warps(row.config, is_fp8=True, split=split, fixed=fixed))


_FP8_MAKERS: dict[str, Maker] = {"qkv": _qkv_fp8, "attention": _attention_fp8, "lm_head": _lm_head_fp8}
