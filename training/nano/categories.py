"""Tools about a kind of things, asked for by one of that kind: a robin is a bird, so get_bird_info fits and
get_tree_info does not.

Which word is of which kind, the model has from the words' vectors; these lessons are what makes it look there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from training.nano.described import leave_unsaid, one_more
from training.nano.examples import Source
from training.nano.tasks import (
    Task,
    add_unasked,
    definition,
    property_schema,
    reordered,
    required_of,
    spoken,
    styled_name,
)
from training.nano.values import QUALITIES

# deed: (words for it in a tool's name, words behind the kind, ways to ask; {v} one of the kind, {a} with its article,
# {s} several)
DEEDS: dict[str, tuple[str, str, str]] = {
    "inform_one": ("get lookup describe about explain show", "info details facts entry data profile", "Tell me about {a} / What is {a} / What do you know about {s} / I'd like to know more about {v} / Explain {v} / {v}, what is that / Something about {v} please / I wonder about {s}"),
    "find_one": ("find search locate", "nearby places list", "Where can I find {a} / Is there {a} near here / I'm looking for {a} / Find {v} / Search for {s} / Where are {s} / I need {a}, where is one"),
    "buy_one": ("order buy purchase get", "order", "I want {a} / Order {v} / Get me some {s} / I need {v} / I'm out of {v} / I'd like {a} please / Buy {a} / {a}, please / I feel like {a}"),
    "price_one": ("get check lookup", "price cost value", "How much is {a} / What does {a} cost / Is {v} expensive / What do {s} cost / Price of {v} / What do I pay for {a}"),
    "show_one": ("show get find", "picture image photo", "Show me {a} / What does {a} look like / Picture of {a} / I want to see {a} / How do {s} look"),
    "stock_one": ("check count get", "stock supply count inventory", "How many {s} are left / Do we have {s} / Is any {v} left / Are there {s} / Have we run out of {v} / Count the {s}"),
    "add_one": ("add log record save", "entry log list", "Add {v} / Note {v} / I saw {a} / I had {a} / Put {v} on it / Today it was {v} / Save {a}"),
    "remove_one": ("remove delete drop", "entry", "No {s} any more / Remove {v} / Take {v} off / I don't want {v} / Without {v}"),
    "choose_one": ("set choose select change", "setting choice", "Set it to {v} / Use {v} / Switch to {v} / Make it {v} / I prefer {v} / I'd rather have {v} / {v} this time"),
    "learn_one": ("learn book start teach", "lesson course class", "I want to learn about {v} / Teach me {v} / I'd like to study {s} / A lesson about {v} / {v} for beginners / I know nothing about {v}"),
    "recommend_one": ("recommend suggest pair", "match tip idea", "Something with {v} / What goes with {v} / I like {v}, what else / Suggest something like {v} / What fits {v}"),
    "rate_one": ("rate review", "rating", "I like {v} / {v} was great / I love {s} / Give {v} a good mark / {v} was bad"),
    "count_one": ("count get", "number total statistics", "How many {s} are there / Number of {s} / How common is {v} / Are there many {s}"),
    "care_one": ("get show find", "care tips guide help", "How do I keep {a} / What does {a} need / How do I treat {v} / Tips for {s} / What helps with {v} / My {v} needs something"),
    "origin_one": ("get find", "origin history", "Where does {v} come from / Where do {s} come from / How old is {v} / Who made {v} / History of {v}"),
}  # fmt: skip
COMPARE = "compare_two"
COMPARING = "Is {v} better than {w} / Compare {v} with {w} / What is the difference between {v} and {w} / {v} or {w} / Which is better, {v} or {w} / {v} and {w} side by side"
QUESTIONS = ("What", "Where", "Is", "How", "Do", "Are", "Have", "Who", "Which")
ABOUT = ("{V} a {x}.", "{V} {x}s", "{N} of a {x}.", "{N} for a given {x}", "{V} the {n} of a {x}.", "Use this for {x}s.", "{V} {x} {n}")  # fmt: skip


@cache
def categories() -> dict[str, tuple[str, ...]]:
    """Kinds of things -> words for things of that kind."""
    table = yaml.safe_load(Path(__file__).with_name("categories.yaml").read_text())
    return {kind: tuple(str(words).split()) for kind, words in table.items()}


def categorised(s: Source, deed: str | None = None, kind: str | None = None) -> Task:
    """A tool about a kind of things and a request that has one of these."""
    kind = kind or s.rng.choice(list(categories()))
    if deed is None and s.maybe(0.12):
        return _compared(s, kind)
    deed = deed or s.rng.choice(list(DEEDS))
    verbs, nouns, asks = DEEDS[deed]
    verb, noun = s.pick(*verbs.split()), s.pick(*nouns.split())
    name = s.pick(f"{verb}_{kind}_{noun}", f"{verb}_{kind}", f"{kind}_{noun}", f"{verb}_{kind}_{noun}", f"{verb}_{noun}_of_{kind}")  # fmt: skip
    one = made = _member(s, kind)
    if s.maybe(0.1):
        made = f"{s.pick(*QUALITIES)} {made}"
    key = s.pick(kind, kind, f"{kind}_name", f"{kind}_type", "name", "type", "which", "item", "query", "what")
    several = one if one[-1] in "sxy" or one[0].isupper() else f"{one}s"
    article = made
    if made[0].islower() and not one.endswith("s"):
        article = f"{'an' if made[0] in 'aeiou' else 'a'} {made}"
    shown = s.pick(made, made, made, f"the {kind.replace('_', ' ')} {made}")
    ask = s.pick(*asks.split(" / ")).format(v=shown, a=article, s=several if made == one else made)
    begins = ask.startswith(made)
    properties: dict[str, Any] = {key: property_schema(s, key, "word", made)}
    arguments: dict[str, Any] = {key: made}
    kinds = {"word", "name", "city"}
    for _ in range(2):
        if not s.practice(0.3):
            break
        ask, in_front = one_more(s, ask, kinds, properties, arguments)
        begins |= in_front
    about = _about(s, verb, noun, kind)
    return _task(s, name, about, ask, (properties, arguments, kinds), begins, (deed, kind))


def _compared(s: Source, kind: str) -> Task:
    one, other = _member(s, kind), _member(s, kind)
    if one == other:
        return categorised(s, "inform_one", kind)
    first, second = s.rng.choice(
        (
            (f"{kind}_a", f"{kind}_b"),
            (f"first_{kind}", f"second_{kind}"),
            ("first", "second"),
            ("a", "b"),
            (f"{kind}1", f"{kind}2"),
            (kind, "other"),
        )
    )
    name = s.pick(f"compare_{kind}", f"compare_{kind}s", f"{kind}_comparison", f"{kind}_versus")
    properties = {key: property_schema(s, key, "word", made) for key, made in ((first, one), (second, other))}
    ask = s.pick(*COMPARING.split(" / ")).format(v=one, w=other)
    parts = (properties, {first: one, second: other}, {"word", "name", "city"})
    about = _about(s, "compare", "comparison", kind)
    return _task(s, name, about, ask, parts, ask.startswith(one), (COMPARE, kind))


def _member(s: Source, kind: str) -> str:
    words = categories()[kind]
    return s.rng.choice([word for word in words if s.mine(word)] or words)


def _about(s: Source, verb: str, noun: str, kind: str) -> str:
    x = kind.replace("_", " ")
    return s.pick(*ABOUT).format(V=verb.capitalize(), n=noun, N=noun.capitalize(), x=x)


def _task(
    s: Source,
    name: str,
    about: str,
    ask: str,
    parts: tuple[dict[str, Any], dict[str, Any], set[str]],
    begins: bool,
    made_of: tuple[str, str],
) -> Task:
    properties, arguments, kinds = parts
    leave_unsaid(s, kinds, properties)
    properties, arguments = reordered(s, properties, arguments)
    required = required_of(s, arguments, 0.95)
    add_unasked(s, properties)
    question = ask.split(" ", 1)[0] in QUESTIONS
    ask += "?" if question and s.maybe(0.85) else s.pick(".", "", "?" if question else "")
    return Task(
        definition(s, styled_name(s, name), about if s.maybe(0.85) else "", properties, required),
        spoken(s, ask, value_first=begins), arguments, (made_of[1], "status"), made_of,
    )  # fmt: skip


def another_category(s: Source, deed: str, kind: str) -> Task:
    """The same deed with things of another kind, none of which is of this one."""
    words = set(categories()[kind])
    far = [other for other, others in categories().items() if words.isdisjoint(others)]
    return categorised(s, deed if deed in DEEDS else None, s.rng.choice(far))
