"""Fits an EAGLE-3 head to the embedded model, whose weights stay as they are.

    python -m training.eagle3.fit --out build/eagle3-nano            # under ten minutes on two cores
    ./run_server.sh --model nano --speculative-model build/eagle3-nano

The head learns to foresee the lessons that the model was trained on (training/nano) from the model's own hidden states,
three guesses deep, each from the head's own state for the guess before. It is written in the format of SpecForge and
SGLang (docs/speculative-decoding.md). At the end its guesses are counted on lessons of words that training never saw.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from gptoss.cached_files import default_cache_folder
from gptoss.engine.messages import NewRequest, SchedulerOutput
from gptoss.engine.model.gpt_oss import GptOss, layer_shape
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.sources import open_source
from gptoss.engine.model.weights import WeightLoader
from gptoss.engine.parallel.communicator import Communicator
from gptoss.engine.parallel.shards import whole
from gptoss.engine.sampling_params import SamplingParams
from gptoss.engine.worker.batch import RequestTable, build_batch
from gptoss.harmony.vocabulary_files import load_vocabulary
from gptoss.kernels.backend import choose_backend
from gptoss.kernels.layers import LayerCache
from gptoss.model_locator import locate_model
from training.eagle3.network import HeadNetwork
from training.nano.batches import BatchMaker
from training.nano.examples import Source
from training.nano.lessons import lesson

TAPS = (2, 4, 6)
DEPTH = 3
VOCABULARY = 8192
INTERMEDIATE = 512
LONGEST = 640  # tokens of a conversation
BATCH_TOKENS = 3000
BLOCK_SIZE = 64
DEEPER = 0.8  # weight of each guess next to the one before
IGNORED, OUTSIDE = -1, -2
POOL = 40  # batches


class Target:
    """The model, which gives its hidden states at the taps."""

    def __init__(self) -> None:
        folder = locate_model("nano", None, default_cache_folder()).folder
        assert folder is not None
        self.config = ModelConfig.from_folder(folder)
        cpu, shard = torch.device("cpu"), whole(self.config)
        kernels = choose_backend(cpu, torch.bfloat16, layer_shape(self.config, shard, LONGEST))
        source = open_source(folder, self.config)
        loader = WeightLoader(
            source, self.config, torch.bfloat16, dequantize=not kernels.reads_mxfp4, prepare_layer=kernels.prepare_layer
        )
        weights = loader.load()
        assert isinstance(weights.lm_head, torch.Tensor) and weights.final_norm is not None
        self.lm_head, self.norm = weights.lm_head.float(), weights.final_norm.float()
        self.model = GptOss(self.config, weights, Communicator(shard, cpu), kernels, taps=TAPS)
        assert self.model.weights.embedding is not None
        self.embedding = self.model.weights.embedding
        shape = (LONGEST // BLOCK_SIZE + 2, BLOCK_SIZE, self.config.num_key_value_heads, self.config.head_dim)
        self._cache = [
            LayerCache(*(torch.zeros(shape, dtype=torch.bfloat16) for _ in range(2))) for _ in self.config.layer_types
        ]

    def states(self, ids: list[int]) -> torch.Tensor:
        """float32 [T, taps H]."""
        blocks = list(range(1, len(ids) // BLOCK_SIZE + 2))
        new = NewRequest("r", ids, len(ids), SamplingParams(max_tokens=1, seed=0), (blocks, blocks), 0)
        rows = RequestTable().apply(SchedulerOutput([new], {}, {"r": len(ids)}, []))
        found: list[torch.Tensor] = []
        self.model.forward(build_batch(rows, self.model.kernels, BLOCK_SIZE), self._cache, states=found)
        return torch.cat(found, dim=1).float()


Conversation = tuple[list[int], int]  # its tokens, and how many of them are the prompt


class Conversations:
    """Lessons as token ids, from a seed."""

    def __init__(self, seed: str, *, unseen: bool) -> None:
        self._vocabulary = load_vocabulary()
        self._maker = BatchMaker(self._vocabulary, 0, 1)
        self._source = Source(self._vocabulary, Random(seed), unseen=unseen)

    def __iter__(self) -> Iterator[Conversation]:
        while True:
            for example in lesson(self._source)[:2]:
                prompt, completion = self._maker.encode(example)
                if len(prompt) + len(completion) <= LONGEST:
                    yield [*prompt, *completion], len(prompt)


def common_tokens(count: int) -> torch.Tensor:
    """int64 [count], rising: the tokens that answers have most."""
    seen: Counter[int] = Counter()
    for number, (ids, num_prompt) in enumerate(Conversations("common", unseen=False)):
        seen.update(ids[num_prompt:])
        if number == 6000:
            break
    found = [token for token, _ in seen.most_common(count)]
    rest = (token for token in range(count) if token not in seen)
    return torch.tensor(sorted(found + [next(rest) for _ in range(count - len(found))]))


@dataclass(frozen=True, slots=True)
class Batch:
    """Conversations that end together, with padding before the shorter ones."""

    states: torch.Tensor  # float32 [B, T, taps H]
    embedded: torch.Tensor  # float32 [B, T + DEPTH - 1, H], of the tokens after them
    lengths: torch.Tensor  # int64 [B]
    # int64 [B, S] of each guess at the last S positions: a token of the head's vocabulary; OUTSIDE: another token;
    # IGNORED: not of the answer
    targets: list[torch.Tensor]

    def guesses(self, network: HeadNetwork) -> list[torch.Tensor]:
        """The network's states before its output head, [B, S, H] of each guess."""
        found: list[torch.Tensor] = network(
            self.states, self.embedded, self.lengths, self.targets[0].shape[1], len(self.targets)
        )
        return found


class Lessons:
    """Batches of conversations with the model's states."""

    def __init__(self, target: Target, ids: torch.Tensor, seed: str, *, unseen: bool) -> None:
        self._target = target
        self._draft_of = torch.full((target.config.vocab_size,), -1)
        self._draft_of[ids] = torch.arange(len(ids))
        self._conversations = iter(Conversations(seed, unseen=unseen))

    def batch(self, num_tokens: int) -> Batch:
        made: list[Conversation] = []
        while sum(len(ids) for ids, _ in made) < num_tokens:
            made.append(next(self._conversations))
        count, guessed = max(len(ids) for ids, _ in made), max(len(ids) - start for ids, start in made)
        states = torch.zeros(len(made), count, len(TAPS) * self._target.config.hidden_size)
        tokens = torch.zeros(len(made), count + DEPTH + 1, dtype=torch.int64)
        answers = torch.zeros(len(made), count + DEPTH + 1, dtype=torch.bool)
        for row, (ids, num_prompt) in enumerate(made):
            states[row, count - len(ids) :] = self._target.states(ids)
            tokens[row, count - len(ids) : count] = torch.tensor(ids)
            answers[row, count - len(ids) + num_prompt : count] = True
        embedded = self._target.embedding[tokens[:, 1 : count + DEPTH]].float()
        targets = []
        for number in range(DEPTH):
            at = slice(count - guessed + 2 + number, count + 2 + number)
            drafts = self._draft_of[tokens[:, at]]
            # the token before is the answer's too: guesses follow a sampled token
            wanted = answers[:, at] & answers[:, count - guessed + 1 : count + 1]
            targets.append(torch.where(wanted, torch.where(drafts < 0, OUTSIDE, drafts), IGNORED))
        return Batch(states, embedded, torch.tensor([len(ids) for ids, _ in made]), targets)


def loss_of(network: HeadNetwork, batch: Batch) -> torch.Tensor:
    total = torch.zeros(())
    for number, (normed, target) in enumerate(zip(batch.guesses(network), batch.targets, strict=True)):
        known = target >= 0
        total = total + DEEPER**number * F.cross_entropy(network.logits(normed[known]), target[known])
    return total


@torch.inference_mode()
def right_guesses(network: HeadNetwork, lessons: Lessons, num_batches: int) -> list[float]:
    """The share of answers' positions at which the first 1, 2, ... guesses are all right."""
    right, asked = torch.zeros(DEPTH), torch.zeros(DEPTH)
    for _ in range(num_batches):
        batch = lessons.batch(BATCH_TOKENS)
        so_far = torch.ones(batch.targets[0].shape, dtype=torch.bool)
        for number, (normed, target) in enumerate(zip(batch.guesses(network), batch.targets, strict=True)):
            so_far &= network.logits(normed).argmax(-1) == target
            right[number] += (so_far & (target != IGNORED)).sum()
            asked[number] += (target != IGNORED).sum()
    return (right / asked).tolist()


def write(network: HeadNetwork, ids: torch.Tensor, target: Target, folder: Path) -> None:
    """Writes the head as SpecForge does."""
    c = target.config
    config = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": c.hidden_size,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": 1,
        "num_attention_heads": network.heads,
        "num_key_value_heads": network.kv_heads,
        "head_dim": network.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": LONGEST,
        "vocab_size": c.vocab_size,
        "draft_vocab_size": len(ids),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(TAPS), "norm_before_fc": True},
    }
    t2d = torch.zeros(c.vocab_size, dtype=torch.bool)
    t2d[ids] = True
    folder.mkdir(parents=True, exist_ok=True)
    save_file(network.tensors() | {"d2t": ids - torch.arange(len(ids)), "t2d": t2d}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def fit(out: Path, steps: int, minutes: float, seed: int) -> list[float]:
    """Fits and writes a head; returns its share of right guesses by depth.

    It ends after `steps`, or after `minutes` on a slow machine, and then says so.
    """
    torch.manual_seed(seed)
    target, ids = Target(), common_tokens(VOCABULARY)
    network = HeadNetwork(target.config.hidden_size, len(TAPS), INTERMEDIATE, target.lm_head[ids], target.norm)
    lessons = Lessons(target, ids, f"eagle3 {seed}", unseen=False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.01)
    pool: list[Batch] = []  # every second step repeats an earlier batch: making one takes as long as learning from it
    chosen, started, step = Random(seed), time.monotonic(), 0
    while (done := max(step / steps, (time.monotonic() - started) / (60 * minutes))) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 30, 4 * (1 - done))  # up, level, down to zero
        if step % 2 == 0:
            pool = [*pool[-POOL + 1 :], lessons.batch(BATCH_TOKENS)]
        loss = loss_of(network, pool[-1] if step % 2 == 0 else chosen.choice(pool))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}, {time.monotonic() - started:.0f} s, loss {loss.item():.3f}", flush=True)  # noqa: T201
        step += 1
    if step < steps:
        sys.stderr.write(f"ended by --minutes {minutes:g} after {step} of {steps} steps: the head guesses worse\n")
    write(network, ids, target, out)
    return right_guesses(network, Lessons(target, ids, "examination", unseen=True), 12)


def steps_number(text: str) -> int:
    """At least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return value


def minutes_number(text: str) -> float:
    """Above 0, for argparse."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return value


def seed_number(text: str) -> int:
    """What torch takes, for argparse."""
    value = int(text)
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2^63 - 1")
    return value


def new_folder(text: str) -> Path:
    """A folder that is made here, before the minutes of training, for argparse."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written to")
    return path


def options_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=new_folder, metavar="FOLDER", required=True)
    parser.add_argument("--steps", type=steps_number, default=800)
    parser.add_argument("--minutes", type=minutes_number, default=9.0, help="end earlier on a slow machine")
    parser.add_argument("--seed", type=seed_number, default=0)
    return parser


def main() -> int:
    args = options_parser().parse_args()
    shares = fit(args.out, args.steps, args.minutes, args.seed)
    shown = ", ".join(f"{share:.1%}" for share in shares)
    print(f"{args.out}: all of the first 1, 2, ... guesses right on unseen lessons: {shown}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
