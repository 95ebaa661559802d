"""The arithmetic of `gptoss bench`; tests/integration/test_bench_command.py measures a server."""

from __future__ import annotations

import math

import pytest

from gptoss.cli.bench import ratios
from gptoss.cli.remote.errors import Refused
from gptoss.cli.remote.load import ServiceLevel, Stream, Target, percentile, table, take_turns


def test_percentiles_are_of_the_nearest_rank() -> None:
    values = [float(n) for n in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.95), percentile([7.0], 0.95)) == (51, 96, 7)
    assert math.isnan(percentile([], 0.5))


def test_a_service_level_bounds_the_first_token_and_the_mean_of_the_others() -> None:
    stream = Stream(0.2, [0.1, 0.3], 3, 0.6)
    assert not ServiceLevel()
    assert ServiceLevel(0.2).is_kept(stream) and not ServiceLevel(0.19).is_kept(stream)
    assert ServiceLevel(inter_token_s=0.21).is_kept(stream) and not ServiceLevel(inter_token_s=0.19).is_kept(stream)
    assert not ServiceLevel(0.2, 0.19).is_kept(stream)


def test_prompts_share_only_their_prefix() -> None:
    target = Target("localhost:1", "m", prefix_share=0.5)
    one, other = target.prompt(64).split(), target.prompt(64).split()
    assert len(one) == len(other) == 64
    assert one[:32] == other[:32] and one[32:] != other[32:]


def test_chunks_are_timed_by_the_part_that_completes_them() -> None:
    target = Target("localhost:1", "m")
    parts = [
        b'data: {"choices": [{}]}\n\ndata: {"cho',
        b'ices": [{}]}\n\n: keep-alive\n\n',
        b'data: {"choices": [], "usage": {"completion_tokens": 9}}\n\ndata: [DONE]\n\n',
    ]
    assert target._tokens_of([1.0, 2.0, 3.0], parts, 8) == ([1.0, 2.0], 9)
    with pytest.raises(Refused, match="without an answer"):
        target._tokens_of([1.0], [b"data: [DONE]\n\n"], 8)
    with pytest.raises(Refused, match="ended an answer: full"):
        target._tokens_of([1.0], [b'data: {"error": {"message": "full"}}\n\n'], 8)


def test_two_targets_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Target, "prepare", lambda _: None)
    turns: list[str] = []

    def job(target: Target) -> dict[str, float]:
        turns.append(target.model)
        return {"x": float(len(turns))}

    results = take_turns([Target("localhost:1", "a"), Target("localhost:2", "b")], [job], 3)
    assert turns == ["a", "b"] * 3 and results == [{"x": 3.0}, {"x": 4.0}]
    assert ratios(results) == {"x": 0.75} and ratios(results[:1]) is None
    assert table(results) == [f"{'x':28}{3.0:12.1f}{4.0:12.1f}     0.75x"]
    assert table([{"x": 1.0}, {"x": 0.0}])[0].endswith("0.0         -")
