"""Lessons about what requests of people have that tools do not tell: what is given though it need not be, rare
values."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary
from training.nano import pairs
from training.nano.attributes import ATTRIBUTES, NEAR, another_attribute, attribute
from training.nano.categories import COMPARE, another_category, categories, categorised
from training.nano.categories import DEEDS as CATEGORY_DEEDS
from training.nano.described import DEEDS, NAMED_AFTER, YES_OR_NO, described, left_over, one_of, options, said
from training.nano.everyday import archetypes, everyday, task_of
from training.nano.examples import Source
from training.nano.measures import MEASURES, leave_unmeasured, said_measured
from training.nano.pairs import said_alone, said_by_name, said_options
from training.nano.rare import abbreviation, decimal, web_address
from training.nano.switches import switched
from training.nano.tasks import Task, quoted
from training.nano.tests.helpers import says
from training.nano.tools import any_task, invented, offered
from training.nano.values import value, value_text


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary()


@pytest.mark.parametrize("kind", [everyday, described, invented])
def test_a_parameter_that_need_not_be_given_often_is(vocabulary: Vocabulary, kind: Callable[[Source], Task]) -> None:
    given = {}
    for unseen in (False, True):
        source = Source(vocabulary, Random(1), unseen=unseen)
        optional = []
        for task in (kind(source) for _ in range(500)):
            schema = task.definition.get("parameters", {})
            required = schema.get("required", [])
            assert set(required) <= set(task.arguments)
            optional += [key in task.arguments for key in schema.get("properties", {}) if key not in required]
        given[unseen] = sum(optional) / len(optional)
    assert given[False] > 0.4 > given[True]


def test_abbreviations_have_every_letter_and_are_often_one_token(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(2), unseen=False)
    made = [abbreviation(source) for _ in range(600)]
    assert all(2 <= len(a) <= 5 and a.isupper() for a in made)
    of_several = [a for a in made if f" {a}".encode() not in vocabulary.rank_of]
    assert 100 < len(of_several) < 300
    assert set("".join(of_several)) == set(string.ascii_uppercase)


def test_addresses_of_pages_have_parts_before_and_behind(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(3), unseen=False)
    made = [web_address(source) for _ in range(200)]
    assert any(a.startswith("https://") and a.count(".") > 1 and a.count("/") > 2 for a in made)
    assert len(set(made)) > 190


def test_numbers_have_up_to_three_decimals(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(4), unseen=False)
    decimals = {len(str(decimal(source)).split(".")[1]) for _ in range(100)}
    assert decimals == {1, 2, 3}
    assert any(value(source, "coordinate") < 0 for _ in range(30))


def test_a_sort_of_the_thing_is_said_in_place_of_it(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(5), unseen=False)
    counted = 0
    for _ in range(200):
        properties: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        ask, called = one_of(source, "Order a car", "car", "car", properties, arguments)
        assert "car" not in called.split()
        assert ask.startswith("Order ") and ask.endswith(called)
        assert list(properties) == list(arguments)
        sort, *count = arguments.values()
        assert sort == called
        counted += bool(count)
        if count:
            assert ask == f"Order {count[0]} {called}"
    assert 20 < counted < 120


def test_a_name_that_ends_with_what_it_is_keeps_it(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(6), unseen=False)
    assert all(value(source, "@lake").endswith(" Lake") for _ in range(20))


def test_options_are_said_in_other_forms_in_lessons_alone(vocabulary: Vocabulary) -> None:
    said = {
        unseen: {quoted(Source(vocabulary, Random(n), unseen=unseen), "=error,info", "error") for n in range(60)}
        for unseen in (False, True)
    }
    assert said == {False: {"error", "errors", "Error"}, True: {"error"}}


@pytest.mark.parametrize("row", pairs.HALVES, ids=lambda row: row[0].split("|")[0])
def test_of_two_parameters_that_go_together_one_is_left_out(
    vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch, row: tuple[str, ...]
) -> None:
    monkeypatch.setattr(pairs, "HALVES", (row,))
    source = Source(vocabulary, Random(7), unseen=False)
    places, asks = set(), []
    for _ in range(60):
        properties: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        ask = said_alone(source, "Do it", properties, arguments)
        if not properties:  # both had one name
            continue
        assert len(properties) == 2 and len(arguments) == 1
        ((key, made),) = arguments.items()
        assert says(ask, made) and "{" not in ask + "".join(properties)
        places.add(list(properties).index(key))
        asks.append(ask.removeprefix("Do it"))
    assert places == {0, 1}
    for ways in row[3:]:
        forms = [re.sub(r"\\{[vxy]\\}", ".+", re.escape(way)) for way in ways.split(" / ")]
        assert any(re.fullmatch("|".join(forms), ask) for ask in asks), ways


def test_something_is_wanted_or_not(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(8), unseen=False)
    rows = [row for row in NAMED_AFTER if row[1] in ("yes", "no")]
    assert len(rows) == len(YES_OR_NO) == 4
    for _, kind, ways in rows:
        assert value(source, kind) is (kind == "yes")
        denied = all(any(n in way for n in (" no ", "not ", "n't ", "without ")) for way in ways.split(" / "))
        assert denied is (kind == "no"), ways


def test_a_default_is_told_of_parameters_given_and_not_given(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(9), unseen=False)
    told = {True: 0, False: 0}
    for _ in range(300):
        task = described(source)
        schema = task.definition.get("parameters", {}).get("properties", {})
        for key, one in schema.items():
            text = f"{one.get('default', '')}{one.get('description', '')}".lower()
            if any(word in text for word in ("optional)", "default", "not given")):
                told[key in task.arguments] += 1
            if "enum" in one and "default" in one:
                assert one["default"] in one["enum"]
    assert min(told.values()) > 5


def test_a_thing_that_has_no_sorts_is_said_itself(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(10), unseen=False)
    properties: dict[str, Any] = {}
    ask = one_of(source, "Order a flower", "flower", "flower", properties, properties)
    assert (ask, properties) == (("Order a flower", "flower"), {})


def test_several_values_stand_before_the_thing() -> None:
    ask = "Find a beginner guitar tutor"
    way = "{a} {v} {n}"
    assert said(way, ask, "tutor", "price", "cheap", before=True) == "Find a cheap beginner guitar tutor"
    assert said(way, ask, "tutor", "price", "cheap") == f"{ask}, price cheap"
    assert said(way, "Find a tutor", "tutor", "price", "cheap") == "Find a cheap tutor"


def test_no_way_to_say_a_number_is_part_of_another_ones() -> None:
    ways = [(row[0], way.replace(" ,", ",").strip("|")) for row in MEASURES for way in row[3].split(" / ")]
    assert all("{v}" in way for _, way in ways)
    for names, way in ways:
        part = re.compile(re.escape(way) + r"(?![\w/])")
        assert [n for n, other in ways if part.search(other) and n != names] == [], way


def test_each_number_stands_once_in_the_request_and_what_is_not_said_is_not_given(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(21), unseen=False)
    given, left = [], 0
    for _ in range(300):
        properties: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        ask = said_measured(source, "Do it", properties, arguments)
        assert set(arguments) <= set(properties)
        assert all(says(ask, made) for made in arguments.values())
        given.append(len(arguments))
        left += len(properties) > len(arguments)
    assert {1, 2, 3} == set(given)
    assert 60 < left < 240


def test_a_number_that_is_not_given_counts_nothing_that_another_counts(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(22), unseen=False)
    for _ in range(400):
        properties: dict[str, Any] = {"stay_duration": {}, "main_floor": {}, "total_weight": {}}
        leave_unmeasured(source, properties)
        added = set(properties) - {"stay_duration", "main_floor", "total_weight"}
        assert not added & {"minutes", "hours", "days", "floor", "level", "weight"}


def test_a_question_for_an_attribute_has_a_tool_that_tells_it(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(23), unseen=False)
    for of, (names, _, asks) in ATTRIBUTES.items():
        task = attribute(source, of, "lake")
        assert any(
            word.replace("_", "") in task.name.replace("_", "").replace("-", "").lower() for word in names.split()
        )
        assert all(asked.count("{v}") == 1 for asked in asks.split(" / "))
        assert all(says(task.ask, made) for made in task.arguments.values() if type(made) is int)
        assert another_attribute(source, of, "lake").made_of[0] not in NEAR[of]


def test_attributes_are_of_lessons_and_stand_beside_another_of_the_same_thing(vocabulary: Vocabulary) -> None:
    beside = 0
    for unseen in (False, True):
        source = Source(vocabulary, Random(24), unseen=unseen)
        tasks = [
            task for task in (any_task(source) for _ in range(800)) if task.made_of and task.made_of[0] in ATTRIBUTES
        ]
        assert (not tasks) == unseen
        for task in tasks:
            others = [t for t in offered(source, task, 4, 4) if t is not task]
            beside += any(t.made_of[1:] == task.made_of[1:] for t in others)
    assert beside > 20


def test_enumerations_have_capitals_in_lessons(vocabulary: Vocabulary) -> None:
    for unseen in (False, True):
        source = Source(vocabulary, Random(25), unseen=unseen)
        made = [options(source) for _ in range(300)]
        capitals = sum(all(word.isupper() for word in words) for words in made)
        assert (capitals > 20) != unseen
        assert all(len(set(words)) == len(words) for words in made)


def test_a_value_that_no_word_names_is_the_one_that_is_left_over(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(26), unseen=False)
    places = {"in front": 0, "behind": 0, "within": 0}
    for _ in range(300):
        properties: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        ask, begins = left_over(source, "Show me the ticket", "ticket", properties, arguments)
        ((key, made),) = arguments.items()
        assert list(properties) == [key] and says(ask, made)
        named = any(re.search(rf"\b{re.escape(part)}\b", ask.replace(value_text(made), "")) for part in key.split("_"))
        assert not named or key.split("_")[-1] == "name"
        places["in front" if begins else "within" if ask.endswith("ticket") else "behind"] += 1
    assert min(places.values()) > 20


def test_values_said_by_name_stand_beside_the_names_and_one_may_be_left_out(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(27), unseen=False)
    unsaid = 0
    for _ in range(300):
        properties: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        ask = said_by_name(source, "Do it", properties, arguments)
        assert list(arguments) == [key for key in properties if key in arguments]
        assert len(properties) - len(arguments) <= 1
        for key, made in arguments.items():
            name = re.escape(key.split("_")[0])
            text = "[\\d,]+" if isinstance(made, int) else re.escape(value_text(made))
            beside = rf"{name}( is|:| =)? ['\"]?{text}|{text}['\"]? as (the )?{name}"
            assert re.search(beside, ask, re.IGNORECASE), (ask, key, made)
        unsaid += len(properties) > len(arguments)
    assert 40 < unsaid < 150


def test_which_enumeration_a_word_is_of_tells_whose_value_it_is(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(28), unseen=False)
    swapped = 0
    for _ in range(300):
        properties: dict[str, Any] = {}
        arguments: dict[str, Any] = {}
        ask = said_options(source, "Do it", properties, arguments)
        enumerations = [schema["enum"] for schema in properties.values()]
        assert len(set(sum(enumerations, []))) == len(sum(enumerations, []))
        assert all(made in properties[key]["enum"] and made in ask for key, made in arguments.items())
        assert list(arguments) == [key for key in properties if key in arguments]
        if len(arguments) == 2:
            one, other = arguments.values()
            swapped += ask.rfind(one) > ask.rfind(other)
    assert 60 < swapped < 180


def test_a_tool_with_one_parameter_may_call_it_anything_in_lessons(vocabulary: Vocabulary) -> None:
    for unseen in (False, True):
        source = Source(vocabulary, Random(29), unseen=unseen)
        others = 0
        for _ in range(400):
            archetype = source.rng.choice([a for a in archetypes() if len(a.parameters) == 1])
            task = task_of(source, archetype)
            others += not set(task.arguments) & {*archetype.parameters[0].keys}
        assert (others > 40) != unseen


def test_numbers_are_also_written_as_json_has_them_not(vocabulary: Vocabulary) -> None:
    for unseen in (False, True):
        source = Source(vocabulary, Random(30), unseen=unseen)
        assert {quoted(source, "integer", 12000) for _ in range(60)} == {"12000"} | (set() if unseen else {"12,000"})
        assert {quoted(source, "float", 78.2) for _ in range(60)} == {"78.2"} | (set() if unseen else {"78.20"})
        assert {quoted(source, "float", 0.125) for _ in range(60)} == {"0.125"}
        longest = max(value(source, "integer") for _ in range(300))
        assert (longest > 999_999) != unseen


def test_one_of_several_things_is_called_after_them(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(31), unseen=False)
    made = [value(source, "#node") for _ in range(100)]
    assert all("node" in text for text in made) and len(set(made)) > 60
    assert any(re.fullmatch(r"node-\d+", text) for text in made)


def test_the_verb_tells_which_of_two_states_is_meant(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(32), unseen=False)
    told: dict[str, set[bool]] = {}
    for _ in range(600):
        task = switched(source)
        ((flag, wanted),) = [(k, v) for k, v in task.arguments.items() if isinstance(v, bool)]
        assert task.definition["parameters"]["properties"][flag]["type"] == "boolean"
        ((_, made),) = [(k, v) for k, v in task.arguments.items() if k != flag]
        assert says(task.ask, made)
        for verb in ("unlock", "unmute", "disable", "close", "hide", "enable", "publish", "archive"):
            if re.search(rf"(?<!mark )\b{verb} (the|my|{re.escape(value_text(made).lower())})", task.ask.lower()):
                told.setdefault(verb, set()).add(wanted)
    assert told.items() >= {"unlock": {False}, "hide": {False}, "enable": {True}, "archive": {True}}.items()
    assert all(len(states) == 1 for states in told.values())


def test_switches_are_of_lessons(vocabulary: Vocabulary) -> None:
    for unseen in (False, True):
        source = Source(vocabulary, Random(33), unseen=unseen)
        names = [any_task(source).name for _ in range(600)]
        assert any(name.endswith(("_state", "_switch", "State", "Switch")) for name in names) != unseen


def test_a_tool_about_a_kind_is_asked_for_by_one_of_that_kind(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(34), unseen=False)
    compared = 0
    for _ in range(400):
        task = categorised(source)
        deed, kind = task.made_of
        words = categories()[kind]
        members = [v for v in task.arguments.values() if isinstance(v, str) and v.split()[-1] in words]
        assert members and all(says(task.ask, made) for made in members), task
        assert kind.replace("_", "") in task.name.replace("_", "").replace("-", "").lower()
        assert all(source.mine(member.split()[-1]) or not any(map(source.mine, words)) for member in members)
        compared += deed == COMPARE
    assert 20 < compared < 100


def test_beside_a_tool_about_a_kind_stands_one_about_another_kind(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(35), unseen=False)
    beside = 0
    for _ in range(200):
        task = categorised(source)
        deed, kind = task.made_of
        for other in (t.made_of for t in offered(source, task, 3, 3) if t is not task):
            if other and other[1] in categories():
                assert not set(categories()[other[1]]) & set(categories()[kind])
                beside += other[0] == deed
    assert beside > 40
    others = {another_category(source, "find_one", "grain").made_of[1] for _ in range(800)}
    assert len(others) > 60 and not others & {"grain", "crop"}, "wheat is of both"


def test_kinds_of_things_are_of_lessons(vocabulary: Vocabulary) -> None:
    for unseen in (False, True):
        source = Source(vocabulary, Random(36), unseen=unseen)
        tasks = [any_task(source) for _ in range(400)]
        deeds = {task.made_of[0] for task in tasks if task.made_of}
        assert bool(deeds & set(CATEGORY_DEEDS)) != unseen
    assert not set(CATEGORY_DEEDS) & {*DEEDS, *ATTRIBUTES}, "what stands beside a task is chosen by its deed"
