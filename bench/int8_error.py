"""What `--dense-dtype int8` changes in the answers: logits and greedy tokens against those in bfloat16.

    python bench/int8_error.py [--model nano mini] [--tokens 64] [--isa avx2]

nano is the embedded model on chat prompts, mini has random weights (`gptoss make-checkpoint --size mini`) and random
prompts. Logits are those of each position of bfloat16's own greedy answers, so both read the same tokens; next to their
difference stands that of bfloat16 to float32, which is what rounding costs anyway.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gptoss.cli.make_checkpoint import make_checkpoint
from gptoss.embedded.unfold import ASSET, unfold
from gptoss.engine.config import EngineConfig
from gptoss.engine.core.core import EngineCore
from gptoss.engine.messages import AddRequest, NewRequest, SchedulerOutput
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import RequestTable, build_batch
from gptoss.engine.worker.worker import Worker
from gptoss.harmony.conversation import Conversation, UserMessage
from gptoss.harmony.special_tokens import CALL, RETURN
from gptoss.harmony.vocabulary_files import load_vocabulary
from gptoss.kernels.cpu import native
from gptoss.kernels.layers import LayerCache
from gptoss.prompt_builder import PromptBuilder

QUESTIONS = (
    "Hello!",
    "What is 17 + 25?",
    "Count from 1 to 12.",
    "Spell the word banana.",
    "Say this again: the quick brown fox jumps over the lazy dog",
    "What is the capital of France?",
    "Who are you and what can you do?",
    "Write the numbers from 5 down to 1, each on its own line.",
    "Which day comes after Tuesday?",
    "Give me a JSON object with the keys name and age.",
)
BLOCK = 64
Tokens = list[int]


@dataclass
class Case:
    prompt: Tokens
    answer: Tokens  # bfloat16's


def engine(folder: Path, **options: Any) -> EngineCore:
    config = ModelConfig.from_folder(folder)
    return EngineCore(EngineConfig(config, folder, device="cpu", cpu_kv_cache_gib=0.2, max_model_len=2048, **options))


def greedy(core: EngineCore, prompts: list[Tokens], count: int, stop: tuple[int, ...]) -> list[Tokens]:
    answers: dict[str, Tokens] = {str(n): [] for n in range(len(prompts))}
    for name, prompt in zip(answers, prompts, strict=True):
        params = SamplingParams(max_tokens=count, temperature=0.0, seed=0, stop_token_ids=stop)
        error = core.add_request(AddRequest(name, prompt, params))
        assert error is None, error
    while core.scheduler.has_requests():
        for output in core.step():
            answers[output.request_id].extend(output.token_ids)
    return list(answers.values())


@torch.inference_mode()
def logits(core: EngineCore, case: Case, cache_dtype: torch.dtype | None = None) -> torch.Tensor:
    """Returns float32 [answer, V]: what each token of the answer was chosen from. `cache_dtype`: else the engine's."""
    worker = core.executor.worker
    assert isinstance(worker, Worker)
    model, ids = worker.model, case.prompt + case.answer[:-1]
    blocks = list(range(1, len(ids) // BLOCK + 2))
    shape = (len(blocks) + 1, BLOCK, model.config.num_key_value_heads, model.config.head_dim)
    dtype = cache_dtype or worker.cache_dtype
    cache = [LayerCache(*(torch.zeros(shape, dtype=dtype) for _ in "kv")) for _ in model.config.layer_types]
    table = RequestTable()
    new = NewRequest("r", ids, len(ids), SamplingParams(max_tokens=1, seed=0), (blocks, blocks), 0)
    batch = build_batch(table.apply(SchedulerOutput([new], {}, {"r": len(ids)}, [])), worker.kernels, BLOCK)
    return model.forward(replace(batch, sample_rows=torch.arange(len(case.prompt) - 1, len(ids))), cache)


class Difference:
    """Sums over cases of how one engine's logits differ from another's."""

    def __init__(self) -> None:
        self.squares = self.reference_squares = self.largest = self.divergence = 0.0
        self.same = self.count = 0

    def add(self, reference: torch.Tensor, other: torch.Tensor) -> None:
        self.squares += float((other - reference).double().square().sum())
        self.reference_squares += float(reference.double().square().sum())
        self.largest = max(self.largest, float((other - reference).abs().max()))
        p, q = reference.log_softmax(-1), other.log_softmax(-1)
        self.divergence += float((p.exp() * (p - q)).sum())
        self.same += int((reference.argmax(-1) == other.argmax(-1)).sum())
        self.count += len(reference)

    def __str__(self) -> str:
        return (
            f"relative RMS {(self.squares / self.reference_squares) ** 0.5:.4f}, largest {self.largest:.3f}, "
            f"KL divergence {self.divergence / self.count:.1e}, same most likely token {self.same}/{self.count}"
        )


def compare(name: str, folder: Path, prompts: list[Tokens], options: dict[str, Any], stop: tuple[int, ...]) -> None:
    count, isa = options["tokens"], options["isa"]
    exact = engine(folder, dtype="float32", cpu_isa=isa)
    plain = engine(folder, dtype="bfloat16", cpu_isa=isa)
    int8 = engine(folder, dtype="bfloat16", dense_dtype="int8", cpu_isa=isa)
    cases = [Case(*pair) for pair in zip(prompts, greedy(plain, prompts, count, stop), strict=True)]
    others = greedy(int8, prompts, count, stop)
    rounding, added, both = Difference(), Difference(), Difference()
    for case in cases:
        three = [logits(core, case) for core in (exact, plain, int8)]
        rounding.add(three[0], three[1])
        added.add(three[1], three[2])
        both.add(three[0], three[2])
    total = sum(len(case.answer) for case in cases)
    before = sum(common(case.answer, other) for case, other in zip(cases, others, strict=True))
    equal = sum(case.answer == other for case, other in zip(cases, others, strict=True))
    print(f"{name}: {len(cases)} prompts, {total} tokens of bfloat16's greedy answers")
    print(f"  int8 against bfloat16:    {added}")
    print(f"  bfloat16 against float32: {rounding}")
    print(f"  int8 against float32:     {both}")
    print(
        f"  greedy answers: {equal}/{len(cases)} equal; {before}/{total} tokens before the first difference", flush=True
    )


def models(names: Sequence[str], temporary: Path) -> Iterator[tuple[str, Path, list[Tokens], tuple[int, ...]]]:
    """Yields title, folder, prompts and stop tokens of each."""
    if "nano" in names:
        builder = PromptBuilder(load_vocabulary())
        chats = [builder.build(Conversation((UserMessage(text),))).token_ids for text in QUESTIONS]
        yield "nano", unfold(ASSET, temporary / "nano"), chats, (RETURN, CALL)
    if "mini" in names:
        folder = make_checkpoint("mini", temporary / "mini", tokenizer=False)
        rng = random.Random(0)
        yield "mini, random weights", folder, [rng.choices(range(199_998), k=40) for _ in range(10)], ()


def common(one: Tokens, other: Tokens) -> int:
    """The number of equal tokens at the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=("nano", "mini"), default=["nano", "mini"])
    parser.add_argument("--tokens", type=int, default=64, help="of each answer, at most")
    parser.add_argument("--isa", default="auto", choices=("auto", *native.INSTRUCTION_SETS))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        for model in models(args.model, Path(temporary)):
            compare(*model[:3], vars(args), model[3])


if __name__ == "__main__":
    main()
