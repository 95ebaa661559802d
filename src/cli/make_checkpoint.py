"""Writes a small gpt-oss checkpoint with random weights, in the exact format of the real ones.

    gptoss make-checkpoint --size mini --layout hf --seed 0 --out models/gpt-oss-mini

transformers loads the `hf` layout. --experts bf16 leaves the experts unquantised.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gptoss.engine.model.checkpoint import PACKED_TYPES, expected_tensors
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, Size, hf_config, original_config
from gptoss.harmony.special_tokens import CALL, ENDOFTEXT, RETURN, STARTOFTEXT
from gptoss.harmony.tokenizer_files import write_tokenizer
from gptoss.harmony.vocabulary_files import load_vocabulary
from gptoss.kernels.mxfp4 import quantize_mxfp4

SHARD_BYTES = 400 * 2**20


def make_checkpoint(
    size: str | Size, out: Path, *, layout: str = "hf", seed: int = 0, experts: str = "mxfp4", tokenizer: bool = True
) -> Path:
    """Writes the checkpoint and returns its folder. The same arguments give the same bytes."""
    dimensions = SIZES[size] if isinstance(size, str) else size
    original = layout == "original"
    raw = original_config(dimensions) if original else hf_config(dimensions, quantized=experts == "mxfp4")
    out.mkdir(parents=True, exist_ok=True)
    _write_json(out / "config.json", raw)
    config = ModelConfig.from_json(raw)
    shards = list(_shards(_random_tensors(config, original=original, packed=experts == "mxfp4", seed=seed)))
    _save(out, shards, single_name="model.safetensors")
    if not original:
        _write_json(
            out / "generation_config.json",
            {
                "bos_token_id": STARTOFTEXT,
                "do_sample": True,
                "eos_token_id": [RETURN, ENDOFTEXT, CALL],
                "pad_token_id": ENDOFTEXT,
                **({"repetition_guard": 16} if size == "nano" else {}),  # random weights repeat themselves
            },
        )
    if tokenizer:
        write_tokenizer(out, load_vocabulary().token_bytes)
    return out


def _random_tensors(
    config: ModelConfig, *, original: bool, packed: bool, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields name and value of each tensor.

    The variances keep activations near 1 and make the logits of different tokens differ clearly.
    """
    generator = torch.Generator().manual_seed(seed)
    expected = expected_tensors(config, original=original, packed=packed)
    for name, (shape, types) in expected.items():
        if types is PACKED_TYPES:
            if name.endswith("blocks"):
                dense = torch.empty((*shape[:2], shape[2] * 32)).normal_(
                    0, (shape[2] * 32) ** -0.5, generator=generator
                )
                quantized = quantize_mxfp4(dense)
                yield name, quantized.blocks
                yield name[: -len("blocks")] + "scales", quantized.scales
            continue
        if "norm" in name:
            value = torch.empty(shape).normal_(1, 0.1, generator=generator)
        elif name.endswith(("bias", "sinks")):
            value = torch.empty(shape).normal_(0, 0.5 if name.endswith("sinks") else 0.1, generator=generator)
        else:
            fan_in = shape[1]
            std = 1.0 if "embed" in name and "un" not in name else fan_in**-0.5
            if "unembedding" in name or "lm_head" in name:
                std = 4 * fan_in**-0.5
            value = torch.empty(shape).normal_(0, std, generator=generator)
        yield name, value.bfloat16()


def _shards(tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    shard: dict[str, torch.Tensor] = {}
    size = 0
    for name, value in tensors:
        if shard and size + value.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = value
        size += value.nbytes
    yield shard


def _save(out: Path, shards: list[dict[str, torch.Tensor]], *, single_name: str) -> None:
    if len(shards) == 1:
        save_file(shards[0], out / single_name, metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, out / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
    total = sum(value.nbytes for shard in shards for value in shard.values())
    _write_json(out / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def options_parser() -> argparse.ArgumentParser:
    """Returns the parser of this command's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("nano", "mini"), required=True)
    parser.add_argument("--layout", choices=("hf", "original"), default="hf")
    parser.add_argument("--experts", choices=("mxfp4", "bf16"), default="mxfp4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = options_parser()
    args = parser.parse_args(argv)
    if args.layout == "original" and args.experts != "mxfp4":
        parser.error("--layout original exists only with --experts mxfp4")
    started = time.perf_counter()
    make_checkpoint(args.size, args.out, layout=args.layout, seed=args.seed, experts=args.experts)
    sys.stdout.write(f"{args.out}: {args.size}, {args.layout}, in {time.perf_counter() - started:.1f} s\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
