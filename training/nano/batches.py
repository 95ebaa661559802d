"""Lessons as batches: groups of conversations behind what they share.

The system message is a third of a short conversation, and the tools are most of one with tools, so each group holds
them once and the conversations branch off: a branch sees the shared part and itself, with positions as if it stood
alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from random import Random

import torch

from gptoss.harmony.render import render_message, system_message
from gptoss.harmony.vocabulary_files import Vocabulary
from gptoss.prompt_builder import PromptBuilder
from training.nano.examples import EFFORTS, Example, Source, completion_ids, prompt_of
from training.nano.lessons import ALL_KINDS, NATURAL_SHARE, PLAIN_SHARE, Curriculum, lesson
from training.nano.network import GROUP

IGNORED = -100
GROUP_TOKENS = 768  # at most, with its branches


@dataclass(frozen=True, slots=True)
class Batch:
    token_ids: torch.Tensor  # int64 [T]
    positions: torch.Tensor  # int64 [T]
    # int64 [T]: n GROUP for what group n shares, n GROUP + 1.. for its conversations
    branches: torch.Tensor
    targets: torch.Tensor  # int64 [T]: the next token where the assistant writes it, else IGNORED


class BatchMaker:
    """`batch(step)` depends on the seed, the curriculum and the step alone, so that training can go on where it
    stopped."""

    def __init__(self, vocabulary: Vocabulary, seed: int, num_tokens: int, curriculum: Curriculum = ALL_KINDS) -> None:
        """`num_tokens`: at least, for a batch; it is full with the group that reaches it."""
        self._vocabulary = vocabulary
        self._builder = PromptBuilder(vocabulary, cache_bytes=1 << 20)
        self._source = Source(vocabulary, Random(), unseen=False)
        self._seed, self._num_tokens, self._curriculum = seed, num_tokens, curriculum
        self._shared = {
            effort: render_message(system_message(effort, has_tools=False, current_date=None), vocabulary)
            for effort in EFFORTS
        }

    def batch(self, step: int) -> Batch:
        self._source.rng = Random(f"{self._seed} {step}")
        ready = self._curriculum.ready(step)
        groups: list[_Group] = []
        open_groups: dict[str, _Group] = {}
        while sum(map(len, groups)) < self._num_tokens:
            made = lesson(self._source, NATURAL_SHARE * ready, PLAIN_SHARE * (1 - ready))
            encoded = [self.encode(example) for example in made]
            if made[0].tools:
                group = self._group_of(encoded)
                groups += [group] if group.has_branches else []
                continue
            effort, (prompt, completion) = made[0].effort, encoded[0]
            shared = self._shared[effort]
            rest = prompt[len(shared) :]
            if effort in open_groups and open_groups[effort].add(rest, completion):
                continue
            group = _Group(shared)
            if group.add(rest, completion):
                open_groups[effort] = group
                groups.append(group)
        parts = [group.numbered(number) for number, group in enumerate(groups)]
        return Batch(*(torch.tensor(sum(part, [])) for part in zip(*parts, strict=True)))

    def _group_of(self, encoded: list[tuple[list[int], list[int]]]) -> _Group:
        """As many as fit behind what their prompts begin with alike."""
        shared = os.path.commonprefix([prompt[:-1] for prompt, _ in encoded])
        group = _Group(list(shared))
        for prompt, completion in encoded:
            group.add(prompt[len(shared) :], completion)
        return group

    def encode(self, made: Example) -> tuple[list[int], list[int]]:
        prompt = prompt_of(made, self._builder)
        return prompt.token_ids, completion_ids(made, self._vocabulary, prompt.token_ids)


class _Group:
    def __init__(self, shared: list[int]) -> None:
        self._ids = list(shared)
        self._start = len(shared)
        self._positions = list(range(len(shared)))
        self._branches = [0] * len(shared)
        self._targets = [IGNORED] * len(shared)
        self._count = 0

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def has_branches(self) -> bool:
        return self._count > 0

    def add(self, rest: list[int], completion: list[int]) -> bool:
        """One more branch; False: there is no room for it."""
        ids = rest + completion
        if len(self) + len(ids) > GROUP_TOKENS:
            return False
        self._count += 1
        self._ids += ids
        self._positions += range(self._start, self._start + len(ids))
        self._branches += [self._count] * len(ids)
        self._targets += [IGNORED] * (len(rest) - 1) + completion + [IGNORED]
        return True

    def numbered(self, number: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """As the group of this number: ids, positions, branches, targets."""
        branches = [number * GROUP + branch for branch in self._branches]
        return self._ids, self._positions, branches, self._targets
