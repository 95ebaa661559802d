"""Lessons with tools and values as people write them first, and what keeps them apart from the examination."""

from __future__ import annotations

from random import Random

import jsonschema
import pytest
import torch

from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary
from training.nano import natural, network
from training.nano.evaluate import BY_HAND, SKILLS, held_out_example
from training.nano.examples import Source, held_out
from training.nano.lessons import lesson
from training.nano.natural_tools import Row, natural_tool, rows, taught
from training.nano.tasks import Task
from training.nano.tests.helpers import says
from training.nano.tools import any_task
from training.nano.values import value


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary()


@pytest.fixture
def source(vocabulary: Vocabulary) -> Source:
    made = Source(vocabulary, Random(1), unseen=False)
    made.natural = True
    return made


def unsaid(task: Task) -> dict[str, object]:
    """Arguments that neither the request nor an enumeration of the tool has."""
    properties = task.definition.get("parameters", {}).get("properties", {})

    def said(key: str, made: object) -> bool:
        parts = made if isinstance(made, list) else [made]
        return isinstance(made, bool) or "enum" in properties[key] or all(says(task.ask, part) for part in parts)

    return {key: made for key, made in task.arguments.items() if not said(key, made)}


def test_every_request_can_be_answered_with_its_tool(source: Source) -> None:
    for task in (natural_tool(source) for _ in range(1500)):
        schema = task.definition.get("parameters", {"type": "object"})
        jsonschema.validate(task.arguments, {"additionalProperties": False, **schema})
        assert not unsaid(task), task.ask


@pytest.mark.parametrize(
    "line",
    [
        "get_time | The time. | city:city | What time is it in {town}?",
        "get_time | The time. | city:city | What time is it?",
        "get_time | The time. | city | What time is it in {city}?",
        "get_time | The time. | city:city | What time is it in {city}? @zone=UTC",
        "get_time | The time. | city:city",
    ],
    ids=["slot without parameter", "parameter not said", "no kind", "value without parameter", "no requests"],
)
def test_a_line_that_does_not_fit_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"get_time|parameter|unpack"):
        Row.of(line)


def test_a_request_gives_what_is_not_said() -> None:
    row = Row.of("set_blinds | Blinds. | room:room; action?:=up,down | Blinds down in the {room} @action=down")
    assert row.requests[0].ask == "Blinds down in the {room}"
    assert row.requests[0].unsaid == {"action": "down"}


def test_no_tool_of_lessons_is_examined() -> None:
    lessons = {row.name for row in rows()} | {tool["name"] for _, tool, _ in taught()}
    examined = {name for requests in ("requests", "untouched") for _, name, _ in BY_HAND[requests]}
    assert not lessons & examined
    asked = {ask for ask, _, _ in taught()}
    assert not asked & {ask for r in ("requests", "untouched") for ask, _, _ in BY_HAND[r]}


def test_held_out_names_and_places_are_in_no_lesson(source: Source) -> None:
    for kind in ("first", "last", "city", "title", "item"):
        assert any(held_out(v) for v in natural.POOLS[kind])
        drawn = {natural.pooled(source, kind) for _ in range(400)}
        assert not any(held_out(v) for v in drawn & set(natural.POOLS[kind]))
        exchanged = {word for v in drawn - set(natural.POOLS[kind]) for word in v.split(" ")}
        known = {word for v in natural.POOLS[kind] for word in v.split(" ")}
        assert exchanged - known and not any(map(held_out, exchanged - known))


def test_the_examination_has_no_natural_lessons(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source(vocabulary, Random(2), unseen=True)
    monkeypatch.setattr("training.nano.tools.natural_tool", lambda _: pytest.fail("a natural tool"))
    for _ in range(100):
        lesson(source)
        assert not source.natural
    for skill in SKILLS.values():
        held_out_example(source, skill)


def test_lessons_are_natural_more_often_than_not_and_keep_what_is_hard(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(3), unseen=False)
    natural_ones = 0
    for _ in range(300):
        lesson(source)
        natural_ones += source.natural
    assert 235 < natural_ones < 275


def test_natural_values_are_those_of_the_table(source: Source) -> None:
    tasks = [value(source, "task") for _ in range(400)]
    of_the_table = [task for task in tasks if task in natural.POOLS["task"]]
    assert 280 < len(of_the_table) < 360, "in others a word is exchanged"
    assert any(value(source, "city") in natural.POOLS["city"] for _ in range(5))
    source.natural = False
    hard = [value(source, "phrase") for _ in range(50)]
    assert len(set(hard) & {v for pool in natural.POOLS.values() for v in pool}) < 5


def test_values_of_one_kind_in_a_request_differ(source: Source) -> None:
    """Else which parameter has which cannot be learnt."""
    row = next(r for r in rows() if r.name == "compare_two_numbers")
    made = [t for t in (any_task(source) for _ in range(3000)) if t.name.startswith(row.name)]
    assert made
    assert all(len(set(t.arguments.values())) == 2 for t in made)


def test_what_is_fused_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, gate_up = torch.randn(64, 96) * 3, torch.randn(40, 64) * 4

    def results() -> list[torch.Tensor]:
        x = gate_up.clone().requires_grad_()
        made = network.SwiGlu.apply(x, 7.0)
        made.sum().backward()
        assert x.grad is not None
        return [network.fake_quantize(weight), made.detach(), x.grad]

    monkeypatch.setattr(network, "_fused", {})
    plain = results()
    network.fuse()
    assert network._fused
    for one, other in zip(plain, results(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
