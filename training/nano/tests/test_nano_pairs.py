"""Lessons about values that are easily taken for one another, and what only lessons do."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary
from training.nano import described as described_module
from training.nano.alike import alike
from training.nano.described import SAID_TOO, described, named, named_after
from training.nano.everyday import archetypes, everyday, task_of
from training.nano.examples import Source
from training.nano.pairs import said_together
from training.nano.tasks import CONTEXTS, quoted
from training.nano.tests.helpers import says
from training.nano.values import KINDS, value, value_text


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary()


@pytest.mark.parametrize(
    ("kind", "other", "shared"),
    [
        ("date", "2026-03-14", ("2026-",)),
        ("day_or_date", "March 14, 2026", ("March ",)),
        ("time", "10:45", (":45",)),
        ("file", "docs/report.docx", ("docs/", "report", ".docx")),
        ("path", "home/anna", ("home/",)),
        ("email", "anna@mail.com", ("anna@", "@mail.com")),
        ("person", "Anna Baker", ("Anna", "Baker")),
        ("slug", "fix-login-2", ("fix", "login", "2")),
        ("code", "AB-1200", ("AB-",)),
        ("coupon", "SAVE10", ("SAVE",)),
        ("integer", 1200, ("12", "00", "1", "2")),
    ],
)
def test_a_value_alike_has_a_part_of_the_other(
    vocabulary: Vocabulary, kind: str, other: Any, shared: tuple[str, ...]
) -> None:
    source = Source(vocabulary, Random(1), unseen=False)
    made = [alike(source, kind, other) for _ in range(60)]
    assert other not in made and len(set(made)) > 5
    parts = [[part for part in shared if part in value_text(m)] for m in made]
    assert sum(map(bool, parts)) >= 55
    assert {part for found in parts for part in found} == set(shared)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_kind_has_another_value_beside_any(vocabulary: Vocabulary, kind: str) -> None:
    source = Source(vocabulary, Random(2), unseen=False)
    for _ in range(20):
        one = value(source, kind)
        assert isinstance(alike(source, kind, one), type(one) if kind != "hour" else (int, str))


@pytest.mark.parametrize(("kind", "low", "high"), [("hour", 1, 23), ("year", 1990, 2030)])
def test_a_value_alike_stays_within_its_kind(vocabulary: Vocabulary, kind: str, low: int, high: int) -> None:
    source = Source(vocabulary, Random(7), unseen=False)
    made = [alike(source, kind, high - 1) for _ in range(100)]
    assert all(low <= m <= high for m in made if isinstance(m, int))


def test_two_values_said_together_are_in_the_request(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(3), unseen=False)
    alike_ones = 0
    for _ in range(500):
        properties: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        ask = said_together(source, "Do it", properties, arguments)
        assert ask.startswith("Do it") and list(properties) == list(arguments)
        if not arguments:  # both had one name
            continue
        one, other = arguments.values()
        assert len(arguments) == 2 and all(says(ask, v) for v in (one, other)), ask
        assert one != other
        texts = [value_text(v) for v in (one, other)]
        ends = [os.path.commonprefix(texts), os.path.commonprefix([t[::-1] for t in texts])]
        alike_ones += max(map(len, ends)) >= 3
    assert alike_ones > 30


def test_a_number_is_named_after_what_the_request_counts(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(4), unseen=False)
    for _ in range(100):
        keys, kind, ways = named_after(source)
        assert "{x}" not in keys + kind + ways
        assert value_text(value(source, named(source, keys, kind)[1]))


def test_two_parameters_of_one_kind_have_values_alike_in_lessons(vocabulary: Vocabulary) -> None:
    rename = next(a for a in archetypes() if "rename_file" in a.names)
    endings = {}
    for unseen in (False, True):
        source = Source(vocabulary, Random(5), unseen=unseen)
        made = [task_of(source, rename).arguments for _ in range(200)]
        files = [[v for v in m.values() if isinstance(v, str) and "." in v][:2] for m in made]
        pairs = [f for f in files if len(f) == 2]
        endings[unseen] = sum(a.split(".")[-1] == b.split(".")[-1] for a, b in pairs) / len(pairs)
    assert endings[False] > endings[True] + 0.1


def test_only_lessons_have_pairs_contexts_and_options_in_capitals(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, bool]] = []

    def spied(real: Callable[..., str]) -> Callable[..., str]:
        def spy(s: Source, *args: Any) -> str:
            calls.append((real.__name__, s.unseen))
            return real(s, *args)

        return spy

    monkeypatch.setattr(described_module, "SAID_TOO", tuple(map(spied, SAID_TOO)))
    endings = tuple(context for context in CONTEXTS if "{" not in context)
    for unseen in (False, True):
        source = Source(vocabulary, Random(6), unseen=unseen)
        asks = [kind(source).ask for kind in (described, everyday) for _ in range(400)]
        with_context = sum(any(c in ask for c in endings) for ask in asks)
        capitals = [quoted(source, "=suv,compact", "suv") for _ in range(100)]
        if unseen:
            assert not with_context and set(capitals) == {"suv"}
        else:
            assert with_context > 30 and "SUV" in capitals and "suv" in capitals
    assert {name for name, _ in calls} == {real.__name__ for real in SAID_TOO}
    assert not any(unseen for _, unseen in calls)
