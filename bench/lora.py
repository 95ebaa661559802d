"""Tokens per second of many requests that use LoRA adapters, beside the same requests without: in turns, in one engine.

    python bench/lora.py [--model nano|mini|FOLDER] [--requests 32] [--adapters 8] [--rank 16] [--rounds 5] [--experts]

Adapters are random, of the attention's projections; with --experts also of the experts' matrices. Prompts are random, one
token is drawn a step (no drafts), and the prefix cache is off.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.cached_files import default_cache_folder
from gptoss.cli.make_checkpoint import make_checkpoint
from gptoss.engine.block_hash import adapter_key
from gptoss.engine.config import EngineConfig
from gptoss.engine.core.core import EngineCore
from gptoss.engine.messages import Adapter, AddRequest
from gptoss.engine.model.lora_file import read_adapter
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.sampling_params import SamplingParams
from gptoss.model_locator import locate_model
from tests.support.adapters import DOWN, GATE_UP, write_adapter


def model_folder(name: str, temporary: Path) -> Path:
    if name == "mini":
        return make_checkpoint("mini", temporary / "mini", tokenizer=False)
    folder = locate_model(name, None, default_cache_folder()).folder if name == "nano" else Path(name)
    assert folder is not None
    return folder


def make_adapters(model: ModelConfig, root: Path, count: int, rank: int, *, experts: bool) -> list[Adapter]:
    parameters = [GATE_UP, DOWN] if experts else None
    made = []
    for i in range(count):
        folder = write_adapter(root / str(i), model, rank=rank, seed=i, target_parameters=parameters)
        made.append(Adapter(i + 1, str(i), str(folder), read_adapter(folder, model).digest))
    return made


def tokens_per_s(core: EngineCore, adapters: list[Adapter], requests: int, prompt: int, answer: int) -> float:
    """Of the answers, from the first request to the last token. Without adapters the base model answers."""
    numbers = random.Random(7)
    for i in range(requests):
        params = SamplingParams(max_tokens=answer, seed=i, temperature=1.0, ignore_eos=True)
        request = AddRequest(str(i), numbers.choices(range(100_000), k=prompt), params)
        if adapters:
            adapter = adapters[i % len(adapters)]
            request.adapter, request.adapter_key = adapter.id, adapter_key(adapter.name, adapter.digest)
        assert core.add_request(request) is None
    started, count = time.perf_counter(), 0
    while core.scheduler.has_requests():
        count += sum(len(output.token_ids) for output in core.step())
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--experts", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = model_folder(args.model, Path(temporary))
        model = ModelConfig.from_folder(folder)
        adapters = make_adapters(model, Path(temporary), args.adapters, args.rank, experts=args.experts)
        core = EngineCore(
            EngineConfig(
                model,
                folder,
                device="cpu",
                max_model_len=2048,
                max_num_seqs=args.requests,
                cpu_kv_cache_gib=0.3,
                num_speculative_tokens=0,
                enable_prefix_caching=False,
                lora={adapter.name: Path(adapter.folder) for adapter in adapters},
                max_loras=len(adapters),
                max_lora_rank=args.rank,
            )
        )
        for adapter in adapters:
            core.adapters.load(adapter)
        while core.adapters.is_changing:
            core.adapter_changes()
        found: dict[str, list[float]] = {"base": [], "lora": []}
        for turn in range(args.rounds + 1):  # the first one warms up
            for name, used in (("base", []), ("lora", adapters)):
                speed = tokens_per_s(core, used, args.requests, args.prompt, args.answer)
                if turn:
                    found[name].append(speed)
        base, lora = (statistics.median(speeds) for speeds in found.values())
        print(
            f"{args.model}, {args.requests} requests over {args.adapters} adapters of rank {args.rank}"
            f"{' with experts' if args.experts else ''}: {lora:.1f} tok/s, base {base:.1f} tok/s, ratio {lora / base:.2f}"
        )
        core.executor.shutdown()


if __name__ == "__main__":
    main()
