"""What the embedded model is taught: lessons, the tools in them, and the batches that hold them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from random import Random

import jsonschema
import pytest
import torch

from gptoss.harmony.conversation import Conversation, ToolDefinition, UserMessage
from gptoss.harmony.parser import ResponseParser
from gptoss.harmony.special_tokens import CONSTRAIN
from gptoss.harmony.vocabulary_files import Vocabulary, load_vocabulary
from gptoss.prompt_builder import PromptBuilder
from training.nano.batches import GROUP_TOKENS, IGNORED, BatchMaker
from training.nano.described import described, said, value_for
from training.nano.evaluate import BY_HAND
from training.nano.everyday import RENAMED, archetypes, everyday, renamed, task_of
from training.nano.examples import Copier, Example, Source, completion_ids, held_out, prompt_of
from training.nano.lessons import ALL_KINDS, MIXTURE, Curriculum, lesson
from training.nano.near_words import near_words
from training.nano.network import GROUP
from training.nano.tasks import Task
from training.nano.tests.helpers import says
from training.nano.tools import invented, offered, same_tools
from training.nano.values import CITIES, near_word, value_text


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return load_vocabulary()


def test_a_batch_is_full_of_groups(vocabulary: Vocabulary) -> None:
    for step in range(3):
        batch = BatchMaker(vocabulary, 2, 3000).batch(step)
        assert 3000 <= len(batch.token_ids) < 3000 + GROUP_TOKENS
        numbers, sizes = (batch.branches // GROUP).unique_consecutive(return_counts=True)
        assert numbers.tolist() == list(range(len(numbers)))
        assert sizes.max() <= GROUP_TOKENS and len(numbers) > 3
        starts = batch.positions == 0
        assert torch.equal(batch.branches[starts], numbers * GROUP), "what is shared comes first"


def test_lessons_depend_on_the_seed_alone(vocabulary: Vocabulary) -> None:
    batches = [BatchMaker(vocabulary, seed, 1000).batch(step) for seed, step in ((1, 7), (1, 7), (1, 8), (2, 7))]
    same, other_step, other_seed = (
        torch.equal(batches[0].token_ids, b.token_ids) if b.token_ids.shape == batches[0].token_ids.shape else False
        for b in batches[1:]
    )
    assert same and not other_step and not other_seed


def test_targets_are_the_assistants_tokens(vocabulary: Vocabulary) -> None:
    batch = BatchMaker(vocabulary, 3, 1500).batch(0)
    wanted = batch.targets != IGNORED
    (places,) = torch.where(wanted[:-1] & (batch.branches[:-1] == batch.branches[1:]))
    assert torch.equal(batch.targets[places], batch.token_ids[places + 1])
    assert 0.2 < wanted.float().mean() < 0.6


@pytest.mark.parametrize("unseen", [False, True])
def test_every_lesson_is_valid_harmony_that_says_what_it_should(vocabulary: Vocabulary, unseen: bool) -> None:
    source, builder = Source(vocabulary, Random(4), unseen=unseen), PromptBuilder(vocabulary)
    seen = set()
    for made in (made for _ in range(300) for made in lesson(source)):
        seen.add(made.skill)
        prompt = prompt_of(made, builder).token_ids
        ids = completion_ids(made, vocabulary, prompt)
        parser = ResponseParser(vocabulary, [t["name"] for t in made.tools])
        deltas = [d for token in ids for d in parser.push(token)] + list(parser.finish(truncated=False))
        assert not parser.recoveries
        text = {
            kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("reasoning", "content", "tool_call")
        }
        assert text["reasoning"]
        if made.call is not None:
            assert next(d.tool_name for d in deltas if d.tool_name) == made.call[0]
        else:
            assert text["content"] == made.answer_text
            assert all(part in made.answer_text for part in made.expected)
    assert len(seen) == len(MIXTURE) + 2  # calls and results of tools


@pytest.mark.parametrize("kind", [everyday, described, invented])
def test_a_task_is_one_that_its_tool_can_do(vocabulary: Vocabulary, kind: Callable[[Source], Task]) -> None:
    source = Source(vocabulary, Random(9), unseen=False)
    for _ in range(300):
        task = kind(source)
        schema = task.definition.get("parameters", {"type": "object"})
        jsonschema.Draft202012Validator.check_schema(schema)
        jsonschema.validate(task.arguments, schema)
        assert set(task.arguments) <= set(schema.get("properties", {}))
        for value in task.arguments.values():
            for part in value if isinstance(value, list) else [value]:
                if not isinstance(part, bool):
                    assert says(task.ask, part), task


@pytest.mark.parametrize("kind", [everyday, described, invented])
def test_arguments_are_in_the_order_that_guidance_writes(
    vocabulary: Vocabulary, kind: Callable[[Source], Task]
) -> None:
    """A schema's; and it is not always that of the request."""
    source = Source(vocabulary, Random(10), unseen=False)
    others = 0
    for _ in range(300):
        task = kind(source)
        properties = task.definition.get("parameters", {}).get("properties", {})
        assert list(task.arguments) == [key for key in properties if key in task.arguments]
        texts = [value_text(v) for v in task.arguments.values() if not isinstance(v, list | bool)]
        places = [task.ask.find(text) for text in texts]
        others += places != sorted(places)
    assert kind is invented or others > 20


@pytest.mark.parametrize(
    ("way", "ask", "whole"),
    [
        (" in {v}", "Book a table", "Book a table in red"),
        (", {k}: {v}", "Book a table", "Book a table, color: red"),
        ("{a} {v} {n}", "I need a new table for two", "I need a new red table for two"),
        ("{a} {n} of {v}", "Pay the table", "Pay the table of red"),
        ("{v} {n}s", "Order a table", "Order red tables"),
        ("{v}'s {n}", "Cancel my table", "Cancel red's table"),
        ("In {v}: |", "Book a table", "In red: Book a table"),
        ("{a} {v} {n}", "List all tables", "List all tables, color red"),
    ],
)
def test_a_value_is_said_before_the_request_within_or_behind(way: str, ask: str, whole: str) -> None:
    assert said(way, ask, "table", "color", "red") == whole


def test_no_two_tools_on_offer_could_be_meant_by_one_request(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(2), unseen=True)
    for _ in range(200):
        tasks = offered(source, everyday(source), 4, 4)
        assert len({t.name for t in tasks}) == 4
        for task in tasks:
            assert not any(task.confusable(other) for other in tasks if other is not task)


def test_everyday_tools_that_are_examined_are_not_taught(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(3), unseen=False)
    taught = {name.replace("_", "").lower() for a in archetypes() if not a.held_out for name in a.names}
    held = {name.replace("_", "").lower() for a in archetypes() if a.held_out for name in a.names}
    drawn = [everyday(source).name.replace("_", "").replace("-", "").lower() for _ in range(1500)]
    assert not set(drawn) & held and len(held) > 60
    renamed_share = sum(name not in taught for name in drawn) / len(drawn)
    assert 0.15 < renamed_share < RENAMED


def test_a_renamed_tool_is_asked_for_by_its_new_word_or_one_near_it(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(5), unseen=False)
    weather = next(a for a in archetypes() if "get_weather" in a.names)
    words = set()
    for _ in range(200):
        made = renamed(source, weather)
        (name,) = {n for n in made.names if n.startswith("get_") and "current" not in n} or {""}
        word = name.removeprefix("get_")
        assert made.parameters == weather.parameters and "{0}" in made.asks[0]
        words.add(word)
        near = {word, *near_words(word)}
        if word not in ("", "weather"):
            told = " ".join((*made.names, *made.descriptions)).lower()
            assert word in told and "weather" not in " ".join((told, *made.asks)).lower()
            assert all(any(w in ask.lower() for w in near) for ask in made.asks)
    assert len(words) > 50


def test_only_lessons_rename_tools(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(5), unseen=True)
    held = {name.replace("_", "").lower() for a in archetypes() if a.held_out for name in a.names}
    assert {everyday(source).name.replace("_", "").replace("-", "").lower() for _ in range(500)} <= held


def test_only_lessons_ask_everyday_tools_for_more_than_their_row_says(vocabulary: Vocabulary) -> None:
    forecast = next(a for a in archetypes() if "get_forecast" in a.names)
    own = {key for parameter in forecast.parameters for key in parameter.keys}
    for unseen in (False, True):
        source = Source(vocabulary, Random(8), unseen=unseen)
        tasks = [task_of(source, forecast) for _ in range(300)]
        more = [task for task in tasks if not set(task.arguments) <= own]
        assert not more if unseen else 30 < len(more) < 120
        for task in more:
            added = [v for key, v in task.arguments.items() if key not in own]
            assert all(says(task.ask, v) for v in added if not isinstance(v, bool))
            assert not set(added) & set(CITIES), "a second city could be taken for the first"


def test_an_address_is_sometimes_that_of_the_person_who_is_named(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(8), unseen=False)
    made = [value_for(source, "email", {"name": "Ann Baker", "count": 3}) for _ in range(100)]
    hers = [address for address in made if address.startswith(("annbaker@", "ann.baker@"))]
    assert 25 < len(hers) < 75 and len(set(hers)) > 5


def test_a_word_near_another_is_no_form_of_it_and_of_the_sources_half(vocabulary: Vocabulary) -> None:
    assert "truck" in near_words("car") and "cars" not in near_words("car")
    assert near_words("vxyzzy") == ()
    for unseen in (False, True):
        source = Source(vocabulary, Random(7), unseen=unseen)
        for word in ("car", "movie", "doctor", "rain"):
            for _ in range(20):
                other = near_word(source, word)
                assert other == word or held_out(other) == unseen


def test_conversations_with_the_same_tools_share_their_definitions(vocabulary: Vocabulary) -> None:
    source = Source(vocabulary, Random(6), unseen=False)
    maker = BatchMaker(vocabulary, 0, 2000)
    for made in filter(lambda made: len(made) > 2, (same_tools(source) for _ in range(20))):
        prompts = [maker.encode(example)[0] for example in made]
        shared = os.path.commonprefix(prompts)
        tools_end = vocabulary.decode(shared).find("} // namespace functions")
        assert tools_end > 0, "the definitions are in what is shared"
        assert len({example.effort for example in made}) == 1


def test_plain_lessons_ask_for_a_tool_with_words_of_its_name(vocabulary: Vocabulary) -> None:
    def said(made: Example) -> bool:
        assert made.call is not None
        words = re.findall("[a-z]+|[A-Z][a-z]*", made.call[0])
        asked = made.messages[-1]["content"].lower()
        return any(word.lower() in asked for word in words)

    def calls(plain_share: float) -> list[Example]:
        source = Source(vocabulary, Random(9), unseen=False)
        lessons = (made for _ in range(100) for made in lesson(source, 0.0, plain_share))
        return [made for made in lessons if made.skill == "tool_call"]

    assert all(map(said, calls(1.0)))
    assert not all(map(said, calls(0.0)))


def test_lessons_are_plain_first_and_natural_later(vocabulary: Vocabulary) -> None:
    curriculum = Curriculum(begin=10, end=20)
    assert [curriculum.ready(step) for step in (0, 10, 15, 20, 30)] == [0, 0, 0.5, 1, 1]
    assert curriculum.ready(-1) == 1, "the common tokens are those of all lessons"
    staged, plainly = (BatchMaker(vocabulary, 4, 800, c) for c in (curriculum, ALL_KINDS))
    for step, same in ((0, False), (15, False), (20, True)):
        pair = [maker.batch(step).token_ids.tolist() for maker in (staged, plainly)]
        assert (pair[0] == pair[1]) is same


def test_tools_are_looked_at_one_after_the_other(vocabulary: Vocabulary) -> None:
    """Until one fits; then each of its parameters is told, also those that are left out."""
    source = Source(vocabulary, Random(8), unseen=False)
    left_out = none_fits = 0
    for made in (made for _ in range(60) for made in same_tools(source)):
        if made.skill == "tool_result":
            continue
        assert isinstance(made.analysis[0], str)
        names = [t["name"] for t in made.tools]
        looked_at = re.findall(r"[:?,] (\S+) (no|yes)\b", made.analysis[0].split(" = ")[0])
        if made.call is None:
            none_fits += 1
            assert looked_at == [(name, "no") for name in names]
            continue
        name, arguments = made.call
        assert looked_at == [*((n, "no") for n in names[: names.index(name)]), (name, "yes")]
        for key in made.tools[names.index(name)].get("parameters", {}).get("properties", {}):
            left_out += key not in arguments
            assert f" {key} = {value_text(arguments.get(key, 'none'))}" in made.analysis[0]
    assert left_out > 10 and none_fits > 10


def test_held_out_words_never_appear_in_training(vocabulary: Vocabulary) -> None:
    seen, unseen = (Source(vocabulary, Random(1), unseen=u) for u in (False, True))
    assert not {seen.word() for _ in range(3000)} & {unseen.word() for _ in range(3000)}
    assert held_out("sum 3 4") == held_out("sum 3 4")


@pytest.mark.parametrize(
    ("prompt", "answer", "written"),
    [
        ("weather in Alabama", '{"city": "Alabama"}', ['{"', "city", '":', ' "', *"Alabama", '"}']),
        ("weather in Paris", '"Paris"', ['"', "Paris", '"']),
        ('{"s": "ejecut"}', "s: ejecut.", ["s", ":", " ej", "ecut", "."]),
        ('both climbing and "climbing"', '"climbing"', None),
        ("use do_fyr", "do_fyr(", None),
        ("plain", "other", None),
    ],
)
def test_copied_words_keep_the_prompts_tokens(
    vocabulary: Vocabulary, prompt: str, answer: str, written: list[str] | None
) -> None:
    """None: as the vocabulary writes it, because that is in the prompt already or nothing is."""
    ids = Copier(vocabulary, vocabulary.encode(prompt)).encode(answer)
    assert vocabulary.decode(ids) == answer
    expected = vocabulary.encode(answer) if written is None else [vocabulary.rank_of[t.encode()] for t in written]
    assert ids == expected


def test_a_call_names_its_tool_in_tokens_of_the_prompt(vocabulary: Vocabulary) -> None:
    """As one text ".get" is a token, which no prompt has."""
    tools = [{"name": "get_horoscope"}]
    made = Example("tool_call", [], "low", ["get_horoscope"], call=("get_horoscope", {}), tools=tools)
    said = Conversation((UserMessage("Hi"),))
    prompt = PromptBuilder(vocabulary).build(said, tools=[ToolDefinition("get_horoscope")], effort="low")
    ids = completion_ids(made, vocabulary, prompt.token_ids)
    header = ids[: ids.index(CONSTRAIN)]
    assert vocabulary.decode(header).endswith("commentary to=functions.get_horoscope ")
    written = [vocabulary.decode([token]) for token in header]
    assert written[written.index("functions") + 1 :][:2] == [".", "get"]
    assert header[-4:-1] == vocabulary.encode(" get_horoscope")[1:]


@pytest.mark.parametrize("requests", ["taught", "requests", "untouched"])
def test_requests_by_hand_can_be_answered_with_their_tools(requests: str) -> None:
    for ask, name, arguments in BY_HAND[requests]:
        tool = BY_HAND["tools"][name]
        schema = {"properties": tool["parameters"], "required": tool["required"]}
        jsonschema.validate(arguments, {"type": "object", "additionalProperties": False, **schema})
        for key, value in arguments.items():
            parts = value if isinstance(value, list) else [value]
            said = isinstance(value, bool) or all(says(ask, part) for part in parts)
            assert said or tool["parameters"][key].get("enum"), f"{value!r} is not in {ask!r}"
