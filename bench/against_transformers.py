"""Compares our server with plain transformers `generate`: same checkpoint, same run, alternating.

python bench/against_transformers.py CHECKPOINT [--tokens 32] [--repeat 3]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from gptoss.cli.remote.load import Target, streams
from tests.support.server_process import ServerProcess


def load_transformers(folder: Path) -> Any:
    from transformers import GptOssForCausalLM, Mxfp4Config

    options: dict[str, Any] = {"dtype": torch.bfloat16, "quantization_config": Mxfp4Config(dequantize=True)}
    return GptOssForCausalLM.from_pretrained(folder, **options).eval()


@torch.inference_mode()
def generate(model: Any, batch: int, tokens: int) -> float:
    """-> tokens per second."""
    prompt = torch.randint(0, 199_998, (batch, 40))
    started = time.perf_counter()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=199_999,
    )
    return batch * tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    started = time.perf_counter()
    server = ServerProcess("--model", str(args.checkpoint))
    server.wait_ready(300)
    print(f"start to ready: {time.perf_counter() - started:.1f} s")
    model = load_transformers(args.checkpoint)

    def ours(count: int) -> float:
        target = Target(server.url)
        target.prepare()
        result = streams(target, count, args.tokens)
        target.close()
        return result[f"tok/s at {count}"]

    try:
        for count in (1, 16):
            pairs = [(ours(count), generate(model, count, args.tokens)) for _ in range(args.repeat)]
            mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(f"{count:3} streams: ours {mine:7.1f} tok/s, transformers {theirs:7.1f}, {mine / theirs:.2f}x")
    finally:
        server.stop()


if __name__ == "__main__":
    main()
