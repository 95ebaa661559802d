"""Steps from graphs hand a draft head the states of their own tokens, also where the next step has begun since.

The stand-in of test_cuda_graphs.py computes its logits from a number for each token, which is its state. So its head
knows what the model draws greedily as long as it gets the right states.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch

from gptoss.engine.core.draft_proposer import Drafter
from gptoss.engine.messages import SchedulerOutput
from gptoss.engine.parallel.memory_plan import graph_bytes
from gptoss.engine.parallel.shards import whole
from gptoss.kernels.layers import LayerCache
from gptoss.kernels.step_layout import StepLayout
from tests.engine.test_cuda_graphs import CPU, ENGINE, MODEL, Script, decode, executed, logits_of, request, served, side
from tests.support.draft_heads import write_head


class KnowingHead:
    """Its states are [T, 2]: the model's number of a token, and its position."""

    def __init__(self) -> None:
        self.kernels = SimpleNamespace(device=CPU, prepare_step=lambda layout: layout)
        self.num_seen = 0

    def fuse(self, states: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat([state[:, :1] for state in states], dim=1)

    def store(self, next_ids: torch.Tensor, hidden: torch.Tensor, cache: LayerCache, step: StepLayout) -> None:
        assert hidden[:, 1].tolist() == list(step.positions)
        self.num_seen += len(hidden)

    def guess(
        self, next_ids: torch.Tensor, hidden: torch.Tensor, cache: LayerCache, step: StepLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.store(next_ids, hidden, cache, step)
        sums, positions = hidden.split(1, dim=1)
        sums = sums + 2 * (next_ids[:, None] + 1) * (positions + 2)  # two kinds of layers add the next token
        return logits_of(sums, range(MODEL.vocab_size)).argmax(dim=1), torch.cat((sums, positions + 1), dim=1)


def test_a_head_with_graphs_changes_no_answer_and_knows_the_greedy_one() -> None:
    """The first of the three requests is greedy, and alone; the others are drawn, together."""
    plain, _ = served(executed(side(graphed=False)))
    found = []
    for graphed in (False, True):
        one = side(graphed=graphed, head=KnowingHead())
        drafter = Drafter(None, 3, has_head=True)
        answers, scheduler = served(executed(one), drafter)
        assert answers == plain
        found.append(scheduler.num_head_drafts)
    assert found[0] == found[1]
    assert found[1][1] >= 15


@pytest.mark.parametrize("seed", range(4))
def test_the_head_sees_the_states_of_eager_steps(seed: int) -> None:
    """Whatever joins, ends and waits: the guesses are the same. With one seed most graphs are missing."""
    heads = KnowingHead(), KnowingHead()
    plain, graphed = side(graphed=False, head=heads[0]), side(graphed=True, head=heads[1])
    graphs = graphed.runner._graphs
    assert graphs is not None and graphs.prompts is not None
    if seed == 3:
        graphs._sizes = [1, 2]
        graphs.prompts.replays.clear()
    script, num_guesses = Script(seed), 0
    for _ in range(30):
        out = script.step()
        out.draft_limits = dict.fromkeys(out.num_scheduled_tokens, 2)
        expected, result = plain.runner.execute_model(out, {}), graphed.runner.execute_model(out, {})
        assert expected is not None and result is not None
        assert result.sampled == expected.sampled and result.drafts == expected.drafts
        num_guesses += sum(len(guesses) for guesses in result.drafts.values())
        script.done(out, expected.sampled)
    assert heads[0].num_seen == heads[1].num_seen and num_guesses > 20


def test_a_row_that_was_started_ahead_hands_out_its_states_beside_its_drafts() -> None:
    """Request 2 comes first in the step, and last in what is computed."""
    one, plain = side(graphed=True, head=KnowingHead()), side(graphed=False, head=KnowingHead())
    new = [request("1", 3), request("2", 5)]
    for each in new:
        each.params = msgspec.structs.replace(each.params, temperature=0.0)
    begin = SchedulerOutput(new, {}, {"1": 3, "2": 5}, [])
    step = SchedulerOutput([], {}, {"2": 1, "1": 3}, [], {"1": [50, 60]}, draft_limits={"1": 3, "2": 2})
    found = []
    for runner in (one.runner, plain.runner):
        runner.execute_model(begin, {})
        result = runner.execute_model(step, {})
        assert result is not None
        found.append((result.sampled, result.drafts))
    assert found[0] == found[1] and {name: len(guesses) for name, guesses in found[0][1].items()} == {"1": 3, "2": 2}
    after = one.runner.execute_model(decode(["2"]), {})
    assert after is not None and after.sampled["2"] == found[0][1]["2"][0], "what the head said"


def test_states_lie_in_one_buffer_for_all_sizes_and_are_planned(tmp_path: Path) -> None:
    one = side(graphed=True, head=KnowingHead())
    graphs = one.runner._graphs
    assert graphs is not None and graphs.prompts is not None
    for owner, most in ((graphs, graphs.max_rows), (graphs.prompts, max(graphs.prompts.sizes))):
        buffers = owner._taps._buffers
        assert [tuple(buffer.shape) for buffer in buffers] == 2 * [(most, MODEL.hidden_size)]
    assert side(graphed=True).runner._graphs._taps._buffers == []  # type: ignore[union-attr]
    with_head = dataclasses.replace(ENGINE, speculative_model=write_head(tmp_path, MODEL, draft_vocab=50))
    more = graph_bytes(with_head, whole(MODEL), 4) - graph_bytes(ENGINE, whole(MODEL), 4)
    held = 3 * (graphs.max_rows + max(graphs.prompts.sizes)) * MODEL.hidden_size * 4
    assert held < more < 2 * held
    assert graph_bytes(dataclasses.replace(with_head, enforce_eager=True), whole(MODEL), 4) == 0
