"""Trains the embedded model gpt-oss-nano on lessons of our own making.

    python -m training.nano.train --out build/nano            # goes on from the last checkpoint there
    python -m training.nano.train --out build/nano --export assets/nano/gpt-oss-nano.safetensors
    python -m training.nano.train --out build/more --start assets/nano/gpt-oss-nano.safetensors --steps 1500

The lessons are in src/nano. Nothing is downloaded. The same seed on the same machine gives the same model.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import math
import string
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from gptoss.embedded.token_rows import TokenTraits
from gptoss.embedded.unfold import read_folded
from gptoss.engine.model.model_config import ModelConfig
from gptoss.engine.model.named_sizes import SIZES, hf_config
from gptoss.harmony.special_tokens import FIRST_SPECIAL, VOCAB_SIZE
from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary
from training.nano.batches import IGNORED, Batch, BatchMaker
from training.nano.folding import fold, restore
from training.nano.lessons import ALL_KINDS, Curriculum
from training.nano.muon import Muon
from training.nano.network import COMPUTE, Network, fuse, parts_of
from training.nano.tools import DECISIVE, TOLD

COMMON_TOKENS = 1536
COMMON_FROM_BATCHES = 150
BATCH_TOKENS = 2600
NEGATIVES = 2048
DECISIVE_WEIGHT = 4.0  # whether a tool fits is one token in thirty, and the hardest
VALUE_WEIGHT = 3.0  # where a parameter's value begins: which of the request's words it is, or none
LETTER_WEIGHT = 2.5  # one wrong letter spoils a word that is spelled
LATER_LETTER = 0.25  # more for each letter before it: long words are rare, and their ends go wrong
SAVE_EVERY = 100
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> None:
    """Has glibc keep what is freed: each step wants the same gigabyte again, and fresh pages cost time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def common_tokens(maker: BatchMaker, count: int = COMMON_TOKENS) -> torch.Tensor:
    """int64 [count]: the tokens that lessons use most; special tokens always."""
    seen: Counter[int] = Counter()
    for step in range(COMMON_FROM_BATCHES):
        seen.update(maker.batch(-1 - step).token_ids.tolist())
    special = [t for t in seen if t >= FIRST_SPECIAL]
    ordinary = [t for t, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0])) if t < FIRST_SPECIAL]
    return torch.tensor(sorted(special + ordinary[: count - len(special)]))


class TokenWeights:
    """How often a target counts in the loss."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        letters = [vocabulary.rank_of[letter.encode()] for letter in string.ascii_letters]
        self._of = torch.ones(VOCAB_SIZE)
        self._of[letters] = LETTER_WEIGHT
        self._of[[vocabulary.rank_of[word.encode()] for word in DECISIVE]] = DECISIVE_WEIGHT
        self._told = vocabulary.rank_of[TOLD.encode()]
        self._is_letter = torch.zeros(VOCAB_SIZE, dtype=torch.bool)
        self._is_letter[letters] = True

    def __call__(self, targets: torch.Tensor) -> torch.Tensor:
        """int64 [T], IGNORED where nothing is learnt -> float32 [T]."""
        token_ids = targets.clamp(min=0)
        letter = self._is_letter[token_ids] & (targets != IGNORED)
        count = letter.cumsum(dim=0)
        before = count - (count * ~letter).cummax(dim=0).values - 1  # letters of its word before it
        weights = self._of[token_ids] * (1 + LATER_LETTER * before.clamp(min=0))
        weights[1:][targets[:-1] == self._told] *= VALUE_WEIGHT
        return weights


def losses_of(
    network: Network, batch: Batch, generator: torch.Generator, weights_of: TokenWeights
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of each of the assistant's tokens, and how often it counts: float32 [tokens] both.

    The softmax is over the common tokens, those of the batch, a random sample that stands for the rest of the
    vocabulary (sampled softmax: Jean et al. 2015, arXiv 1412.2007), and one for all that are never written.
    """
    parts = parts_of(batch.positions, batch.branches, network.config)
    wanted = batch.targets != IGNORED
    hidden = network(batch.token_ids, batch.positions, parts, wanted)
    targets = batch.targets[wanted]
    known = torch.cat((network.common, batch.token_ids, targets)).unique()
    random = torch.randint(FIRST_SPECIAL, (NEGATIVES,), generator=generator)
    written = network.traits.written
    random = random[written[random] & ~torch.isin(random, known)]
    unwritten = (~written).nonzero()
    candidates = torch.cat((known, random, unwritten[0]))
    rest = int(written.sum()) - len(known)
    bias = torch.zeros(len(candidates))
    bias[len(known) : -1] = math.log(rest / len(random))
    bias[-1] = math.log(len(unwritten))
    logits = network.logits(hidden, candidates, bias)
    weights = weights_of(batch.targets)[wanted]
    losses = F.cross_entropy(logits, torch.searchsorted(known, targets), reduction="none")
    return losses, weights


class Running:
    """A running mean to be printed; "none" until something was added."""

    def __init__(self) -> None:
        self._mean: float | None = None

    def add(self, losses: torch.Tensor) -> None:
        if losses.numel():
            value = losses.mean().item()
            self._mean = value if self._mean is None else 0.98 * self._mean + 0.02 * value

    def __str__(self) -> str:
        return "none" if self._mean is None else f"{self._mean:.4f}"


class Optimizers:
    """Muon for the matrices inside (Jordan et al. 2024), AdamW for the rest. One schedule: up, level, down to zero."""

    def __init__(self, network: Network, steps: int, muon_rate: float, adam_rate: float) -> None:
        inner = [p for n, p in network.layers.named_parameters() if p.ndim == 2 and _is_matrix(n)]
        ids = {id(p) for p in inner}
        others: list[nn.Parameter] = [p for p in network.parameters() if id(p) not in ids]
        self._steps = steps
        self._muon = Muon(inner, lr=muon_rate, weight_decay=0.02, dtype=COMPUTE)
        self._adam = torch.optim.AdamW(others, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self._rates = ((self._muon, muon_rate), (self._adam, adam_rate))
        self._parameters = list(network.parameters())

    def step(self, step: int) -> None:
        left = (self._steps - step) / self._steps
        share = min(1.0, (step + 1) / 100, left / 0.5)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, rate in self._rates:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> list[dict[str, object]]:
        return [self._muon.state_dict(), self._adam.state_dict()]

    def load_state_dict(self, states: list[dict[str, object]]) -> None:
        for optimizer, state in zip((self._muon, self._adam), states, strict=True):
            optimizer.load_state_dict(state)


def _is_matrix(name: str) -> bool:
    return not name.endswith(("b1", "b2", "router"))


def save(checkpoint: Path, state: dict[str, object]) -> None:
    """At once: who reads it finds the old one or the new one, whole."""
    new = checkpoint.with_suffix(".new")
    torch.save(state, new)
    new.replace(checkpoint)


def train(
    out: Path,
    *,
    start: Path | None,
    seed: int,
    steps: int,
    batch_tokens: int,
    muon_rate: float,
    adam_rate: float,
    average_over: int = 1,
    curriculum: Curriculum = ALL_KINDS,
) -> Network:
    """-> a network with the mean of the last steps' weights, each step counting 1 - 1 / average_over of the next."""
    vocabulary = load_vocabulary()
    maker = BatchMaker(vocabulary, seed, batch_tokens, curriculum)
    torch.manual_seed(seed)
    config = ModelConfig.from_json(hf_config(SIZES["nano"]))
    checkpoint = out / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True) if checkpoint.is_file() else None
    common = common_tokens(maker) if state is None else state["common"]
    network = Network(config, TokenTraits.of(vocabulary), common)
    if start is not None and state is None:
        restore(network, read_folded(start))
    optimizers = Optimizers(network, steps, muon_rate, adam_rate)
    mean = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(1 - 1 / average_over))
    generator = torch.Generator()
    weights = TokenWeights(vocabulary)
    first = 0
    if state is not None:
        network.load_state_dict(state["network"])
        optimizers.load_state_dict(state["optimizers"])
        mean.load_state_dict(state["mean"])
        first = state["step"]
    out.mkdir(parents=True, exist_ok=True)
    average, fit = Running(), Running()
    bar = tqdm(range(first, steps), initial=first, total=steps, mininterval=5, smoothing=0.02)
    for step in bar:
        generator.manual_seed(seed * 1_000_003 + step)
        losses, counts = losses_of(network, maker.batch(step), generator, weights)
        loss = (losses * counts).sum() / counts.sum()
        loss.backward()
        optimizers.step(step)
        mean.update_parameters(network)
        average.add(loss.detach())
        fit.add(losses.detach()[counts == DECISIVE_WEIGHT])
        bar.set_postfix(loss=average, tool_fits=fit, refresh=False)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            state = {
                "network": network.state_dict(),
                "optimizers": optimizers.state_dict(),
                "mean": mean.state_dict(),
                "step": step + 1,
                "common": common,
            }
            save(checkpoint, state)
            with (out / "loss.txt").open("a") as log:
                log.write(f"{step + 1} {average} {fit}\n")
    averaged = mean.module
    assert isinstance(averaged, Network)
    return averaged


def mix(network: Network, start: Path, share: float) -> None:
    """Takes so much of a folded model's weights into the network's, 0..1.

    The mean of a file and of what training made of it can do better than either (Wortsman et al. 2022, arXiv
    2203.05482); that has to be examined.
    """
    began = copy.deepcopy(network)
    restore(began, read_folded(start))
    with torch.no_grad():
        for mine, theirs in zip(network.parameters(), began.parameters(), strict=True):
            mine.lerp_(theirs, share)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the training checkpoint")
    parser.add_argument("--export", type=Path, help="file of the folded model, written at the end")
    parser.add_argument(
        "--start", type=Path, help="folded model to begin with where --out has no checkpoint; else random weights"
    )
    parser.add_argument(
        "--start-share",
        type=float,
        default=0.0,
        help="how much of --start's weights the exported ones keep, 0..1; 0.5: the mean",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=7300)
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="of one step, at least")
    parser.add_argument("--muon-rate", type=float, default=4e-3)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument(
        "--average-over",
        type=int,
        default=400,
        metavar="STEPS",
        help="export the mean of the weights of about so many last steps (an exponential one)",
    )
    parser.add_argument(
        "--plain-steps",
        type=int,
        nargs=2,
        metavar=("BEGIN", "END"),
        help="lessons are plain until step BEGIN, and of all kinds from step END on (default: 3/10 and half of "
        "--steps; with --start 0 0)",
    )
    args = parser.parse_args(argv)
    if args.plain_steps is None:
        args.plain_steps = (0, 0) if args.start else (3 * args.steps // 10, args.steps // 2)
    if not 0 <= args.plain_steps[0] <= args.plain_steps[1]:
        parser.error("--plain-steps must be 0 <= BEGIN <= END")
    if args.average_over < 1:
        parser.error("--average-over must be at least 1")
    if not 0 <= args.start_share <= 1:
        parser.error("--start-share must lie between 0 and 1")
    if args.start_share and args.start is None:
        parser.error("--start-share needs --start")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    keep_freed_memory()
    fuse()
    started = time.perf_counter()
    network = train(
        args.out,
        start=args.start,
        seed=args.seed,
        steps=args.steps,
        batch_tokens=args.batch_tokens,
        muon_rate=args.muon_rate,
        adam_rate=args.adam_rate,
        average_over=args.average_over,
        curriculum=Curriculum(*args.plain_steps),
    )
    if args.start_share:
        mix(network, args.start, args.start_share)
    if args.export is not None:
        fold(network, args.export)
    sys.stdout.write(f"{args.out}: {(time.perf_counter() - started) / 60:.0f} minutes\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
