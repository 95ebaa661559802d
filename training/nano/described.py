"""Tools made of a verb and a thing, asked for in other words: what is learnt is that the thing and the deed tell them
apart.

A request says the thing as the tool's name or description has it, and the deed in the same or another word; other
tools on offer may do something else with the same thing, or the same with another one.
"""

from __future__ import annotations

import re
import string
from typing import Any

from training.nano.examples import Source
from training.nano.measures import leave_unmeasured, measured, said_measured
from training.nano.pairs import said_alone, said_by_name, said_options, said_together
from training.nano.rare import abbreviation
from training.nano.tasks import (
    Task,
    add_unasked,
    definition,
    property_schema,
    put_among,
    quoted,
    reordered,
    required_of,
    spoken,
    styled_name,
)
from training.nano.values import QUALITIES, email_of, near_word, some_thing, value

# deed: (words for it in a tool's name, ways to ask for it; {n} the thing)
DEEDS: dict[str, tuple[str, str]] = {
    "get": ("get fetch show lookup retrieve", "What is the {n} / Show me the {n} / Tell me the {n} / I need the {n} / Get the {n} / What's the {n} / Give me the {n} / Look up the {n} / Do you know the {n} / I want to see the {n}"),
    "create": ("create make add new generate", "Create a {n} / Make a {n} / Add a {n} / I need a new {n} / Make a new {n} / Set up a {n} / Generate a {n} / I'd like a new {n} / Create a new {n}"),
    "delete": ("delete remove erase clear", "Delete the {n} / Remove the {n} / Erase the {n} / I no longer need the {n} / Get rid of the {n} / Delete my {n} / Throw away the {n}"),
    "cancel": ("cancel stop abort end", "Cancel the {n} / Cancel my {n} / I want to cancel my {n} / Stop the {n} / Call off the {n} / End my {n} / I have to cancel the {n}"),
    "update": ("update change edit modify set", "Update the {n} / Change the {n} / Edit the {n} / Change my {n} / I want to change the {n} / Modify the {n} / The {n} has to be changed"),
    "list": ("list show get_all find_all", "List all {n}s / Show me all {n}s / Which {n}s are there / What {n}s do I have / Give me a list of all {n}s / List my {n}s / Show the {n}s"),
    "find": ("find search search_for locate", "Find a {n} / Search for a {n} / I am looking for a {n} / Look for a {n} / Where can I find a {n} / Is there a {n} / Find me a {n} / Where is a {n}"),
    "buy": ("buy order purchase", "Buy a {n} / Order a {n} / I want to buy a {n} / Purchase a {n} / I'd like to order a {n} / Get me a {n}"),
    "book": ("book reserve schedule", "Book a {n} / Reserve a {n} / I need a {n} / Schedule a {n} / I want to book a {n} / Please reserve a {n}"),
    "send": ("send share forward deliver", "Send the {n} / Send a {n} / Share the {n} / Forward the {n} / Please send my {n} / Deliver the {n}"),
    "check": ("check verify validate test", "Check the {n} / Is the {n} ok / Verify the {n} / Is my {n} correct / Check my {n} / Test the {n} / How is the {n}"),
    "start": ("start run launch begin", "Start the {n} / Run the {n} / Launch the {n} / Begin the {n} / Start a {n} / I want to start the {n}"),
    "calculate": ("calculate compute estimate", "Calculate the {n} / What is the {n} / Compute the {n} / Work out the {n} / How high is the {n} / Estimate the {n} / What will the {n} be"),
    "track": ("track follow monitor", "Track the {n} / Where is my {n} / Follow the {n} / Monitor the {n} / Where is the {n} now / Keep an eye on the {n}"),
    "open": ("open unlock", "Open the {n} / Unlock the {n} / Please open my {n} / I want to open the {n}"),
    "close": ("close shut lock", "Close the {n} / Shut the {n} / Lock the {n} / Please close my {n}"),
    "download": ("download export save", "Download the {n} / Export the {n} / Save the {n} / I want to download my {n} / Export my {n}"),
    "pay": ("pay settle", "Pay the {n} / Pay my {n} / I want to pay the {n} / Settle the {n}"),
    "print": ("print", "Print the {n} / I need a printed {n} / Print my {n} / Put the {n} on paper"),
    "explain": ("explain describe", "Explain the {n} / What does the {n} mean / Describe the {n} / I do not understand the {n}"),
    "rate": ("rate review score", "Rate the {n} / Review the {n} / I want to rate the {n} / Give the {n} a score"),
    "compare": ("compare", "Compare the {n} / Which {n} is better / Compare my {n}"),
}  # fmt: skip
# (names that the parameter may have, kind of its value, ways to say it): behind the request; with {n}, as part of what
# is asked for, {a} its article; with a | at the end, before the request
PARAMETERS = (
    ("id|{n}_id|number|reference", "code", " {v} /  number {v} /  with the id {v} /  {v} / {a} {n} {v} / {n} {v}"),
    ("name|title|label|{n}_name", "name", " {v} /  called {v} /  named {v} /  with the name {v} / {a} {v} {n} / {a} {n} {v}"),
    ("name|branch|project|tag|key|{n}_name", "slug", " {v} /  called {v} /  named {v} / {a} {n} {v} / {a} {v} {n}"),
    ("subject|field|topic|specialty|theme", "short_phrase", "{a} {v} {n} / {a} {v} {n} /  for {v} /  about {v}"),
    ("title|name|subject|description", "phrase", " called {v} /  titled {v} /  with the title {v} / : {v}"),
    ("city|location|place|region", "city", " in {v} /  near {v} /  for {v} /  in {v} / I am in {v}. | / In {v}: | / {a} {v} {n} / {a} {n} in {v}"),
    ("date|day|when", "day_or_date", " on {v} /  for {v} /  of {v} / On {v}, | / {a} {n} of {v} / {a} {n} on {v}"),
    ("time|start_time|hour", "time", " at {v} /  for {v} / At {v}: | / {a} {n} at {v} / {a} {v} {n}"),
    ("email|to|recipient|address", "email", " to {v} /  for {v} /  of {v}"),
    ("user|person|customer|client|owner|name|employee|patient", "person", " for {v} /  of {v} /  of {v} / {v}'s {n} / {v}'s {n} / For {v}: | / {v} is here. | / {a} {n} of {v}"),
    ("quantity|count|amount|limit|number", "integer", " with {k} {v} / , {k} {v} / , {k}: {v} / {v} {n}s / {v} {n}s / {v} {n}s"),
    ("price|max_price|budget|amount|cost", "integer", " for {v} dollars /  under {v} dollars /  for at most {v} / {a} {n} of {v} dollars / I have {v} dollars. | / {a} {v} dollar {n} / {a} {n} for {v}"),
    ("language|lang", "language", " in {v} /  in {v} / {a} {v} {n}"),
    ("currency", "currency", " in {v}"),
    ("color|colour", "color", " in {v} /  with the color {v} / {a} {v} {n} / {a} {v} {n}"),
    ("size", "=small,medium,large", " in size {v} /  of size {v} / , {v} / {a} {v} {n} / {a} {v} {n}"),
    ("priority|urgency|level", "=low,medium,high", " with {v} priority /  with priority {v} / , {k} {v} / {a} {v} priority {n}"),
    ("from|source|origin|start", "city", " from {v} / {a} {n} from {v} / From {v}: | / I am in {v}. |"),
    ("to|destination|target|end", "city", " to {v} / {a} {n} to {v} / {a} {v} {n}"),
    ("reason|note|comment|message|text", "phrase", " because {v} /  with the note {v} / : {v}"),
    ("days|minutes|hours|weeks|nights|months|years", "small", " for {v} {k} / {a} {n} for {v} {k} / {a} {v} {k} {n} / {a} {n} of {v} {k}"),
    ("category|type|kind|group", "word", " of type {v} /  of the {k} {v} / , {k} {v} / {a} {v} {n} / {a} {v} {n}"),
    ("status|state", "=open,closed,pending,done", " with status {v} /  that is {v} / , status {v} / {a} {v} {n}"),
    ("topic|subject|query|keyword|about", "phrase", " about {v} /  on {v} /  about {v} / {a} {n} about {v} / {a} {n} on {v}"),
    ("format|file_type", "=pdf,csv,json,xml", " as {v} /  in {v} format / {a} {v} {n}"),
    ("url|link|website", "url", " from {v} /  at {v}"),
    ("file|path|filename", "file", " in {v} /  from {v} /  {v}"),
    ("year", "year", " of {v} /  for {v} /  in {v} / {a} {v} {n} / {a} {n} of {v}"),
    ("month", "month", " for {v} /  of {v} /  in {v} / {a} {v} {n} / {a} {n} of {v}"),
    ("rate|discount|percent|percentage", "float", " with {k} {v} /  at {v} percent"),
    ("phone|phone_number", "phone", " for {v} /  with the number {v}"),
    ("max_minutes|minutes|max_time|time_limit|duration", "minutes", " in {v} minutes /  in under {v} minutes /  within {v} minutes /  for {v} minutes / {a} {v} minute {n}"),
    ("max_words|words|word_limit|length|max_length", "minutes", " in {v} words /  in at most {v} words / , at most {v} words / {a} {v} word {n}"),
    ("mode|style|type|kind|method|option|level|variant", "options", " with {v} / , {v} / , {k} {v} / {a} {v} {n} / {a} {v} {n} / {a} {v} {n} / {a} {n} with {v}"),
)  # fmt: skip
# of a thing {x} that the parameter's name and the request say both; kinds apart by a space
NAMED_AFTER = (
    ("max_{x}|{x}_limit|max_{x}s|{x}_max", "integer", " under {v} {x}s /  with at most {v} {x}s / , at most {v} {x}s /  for up to {v} {x}s /  with less than {v} {x}s / , not over {v} {x}s / {a} {n} under {v} {x}s"),
    ("min_{x}|min_{x}s|{x}_min", "integer", " over {v} {x}s /  with at least {v} {x}s / , {v} {x}s or more /  with more than {v} {x}s / {a} {n} over {v} {x}s"),
    ("{x}s|num_{x}s|number_of_{x}s|{x}_count|{x}", "small integer", " for {v} {x}s /  with {v} {x}s /  and {v} {x}s / , {v} {x}s / {a} {v} {x} {n} / {a} {n} with {v} {x}s / {a} {n} of {v} {x}s / We are {v} {x}s. | / I have {v} {x}s. |"),
    ("{x}|{x}_value|{x}_cm|{x}_kg|{x}_level", "integer float", " with a {x} of {v} / , {x} {v} /  with {x} {v} /  and a {x} of {v} / , {v} as the {x} / , the {x} is {v} / The {x} is {v}. |"),
    ("{x}|{x}_name|{x}_type|{x}_id|{x}_code", "word name code slug person", " with the {x} {v} / , {x} {v} /  with {v} as {x} /  in the {v} {x} /  for the {x} {v} /  at the {v} {x} /  to the {v} {x} / , the {x} is {v} / , {x}: {v} / {a} {n} in the {v} {x} / The {x} is {v}. | / In the {v} {x}: |"),
    ("{x}|{x}_type|{x}_class|{x}_kind|{x}_mode|{x}_option", "options", " on {v} /  with {v} /  in {v} /  as {v} /  using {v} /  by {v} / , {v} /  {v} / {a} {v} {n} / {a} {v} {n} / {v} {x}, please. | / I want {v}. |"),
    ("{x}|{x}_name", "@{x}", " at {v} /  of {v} /  in {v} /  for {v} /  near {v} /  to {v} / , {v} / {a} {v} {n} / {a} {n} of {v} / I am at {v}. | /  at the {v} /  of the {v} /  in the {v}"),
    ("{x}|{x}_name|{x}_id|{x}_no|host|name", "#{x}", " of {v} /  on {v} /  for {v} /  in {v} / , {v} /  at {v} /  {v} / {a} {n} of {v} / {a} {v} {n} /  on the {x} {v} / For {v}: |"),
    ("{x}_no|{x}_number|{x}_id|{x}_nr|{x}_ref|{x}", "code code slug integer", " for {x} {v} /  of {x} {v} /  {x} {v} /  in {x} {v} /  to {x} {v} /  with {x} {v} /  on {x} {v} / {a} {n} of {x} {v} / {a} {n} for {x} {v} / , {x} {v} /  for {x} number {v}"),
    ("weekday|day_of_week|day|on_day|which_day", "day", " on {v} /  {v} /  for {v} / , {v} / {a} {v} {n} / {a} {n} on {v} / On {v}, |"),
    ("{x}|{x}_code|{x}_symbol|{x}_id", "abbreviation abbreviation code", " for {v} /  of {v} /  in {v} /  {v} / {v} {n} / {a} {v} {n} / {a} {n} of {v} /  with {v}"),
    ("title|name|{n}_name|{n}_title|label", "title short_phrase", "{a} {n} {v} / {a} {n} {v} / {a} {n} {v} / {a} {v} {n} /  called {v} / {a} {n} called {v} / , {v}"),
    ("subject|topic|field|{n}_type|kind|type|specialty", "short_phrase word item", "{a} {v} {n} / {a} {v} {n} / {a} {v} {n} / {v} {n}"),
    ("{x}|{x}_name|user|owner|trainer|host|with|by", "person username slug", " with {v} /  by {v} /  of {v} / , {v} /  from {v} / , with {v}"),
    ("{x}|with_{x}|include_{x}|{x}_included|needs_{x}|has_{x}", "yes", " with {x} /  and {x} / , {x} too /  including {x} /  with a {x} / {a} {n} with {x} / I need a {x}. |"),
    ("{x}|with_{x}|include_{x}|{x}_included|needs_{x}|has_{x}", "no", " without {x} / , no {x} /  without a {x} / {a} {n} without {x} / I don't need a {x}. |"),
    ("limit|count|max_results|top|last|{x}_limit|num_{x}s|n", "small integer", "the last {v} {n}s / the first {v} {n}s / the top {v} {n}s / the {v} newest {n}s / , the last {v} / , only {v} / {v} {n}s"),
    ("{q}|is_{q}|{q}_only|only_{q}|{q}_{x}", "yes", "{a} {q} {n} / {a} {q} {n} / , {q} / , it is {q} / , only {q} ones / , {q} please"),
    ("{q}|is_{q}|{q}_only|{q}_{x}", "no", ", not {q} / , it is not {q} / , but not {q}"),
)  # fmt: skip
LEFT_OVER = " for {v} /  of {v} /  in {v} /  at {v} /  {v} /  on {v} /  to {v} /  from {v} / {a} {v} {n} / {a} {n} {v} / {a} {n} of {v} / {a} {n} for {v} / {v}: | / For {v}: | / {v}, please. | / {v} {n} / , {v}"
LEFT_OVER_KINDS = ("word", "word", "item", "item", "name", "slug", "code", "person", "title", "short_phrase", "file", "phrase", "place", "abbreviation")  # fmt: skip
# of values that are not taken for one of those
PLAIN_KINDS = ("day_or_date", "time", "email", "language", "currency", "color", "=small,medium,large", "=low,medium,high", "small", "year", "month",
               "float", "minutes", "=open,closed,pending,done", "=pdf,csv,json,xml")  # fmt: skip
YES_OR_NO = tuple(row for row in NAMED_AFTER if row[1] in ("yes", "no"))
SAID_TOO = (said_alone, said_together, said_measured, said_by_name, said_options)
PREFIXES = ("new", "target", "preferred", "max", "customer", "user", "event", "main", "first", "given", "default", "my", "desired")  # fmt: skip
MOST_BEFORE = 3  # words between "the" and the thing that another value may go before
# kinds of values that could be taken for one another
FAMILY = {
    "place": "city", "language": "currency",
    "date": "day", "day_or_date": "day", "month": "day", "year": "day", "time": "day", "hour": "day",
    "person": "name", "person_or_email": "name", "email": "name", "title": "name", "phone": "name", "shop": "name",
    "short_phrase": "phrase", "word": "phrase", "slug": "phrase", "item": "phrase", "words": "phrase", "url": "file", "path": "file",
    "small": "integer", "float": "integer", "thousands": "integer", "minutes": "integer", "code": "integer", "numbers": "integer",
    "expression": "integer", "coordinate": "integer", "abbreviation": "integer",
}  # fmt: skip
ABOUT = ("{V} a {n}.", "{V} the {n}.", "{V}s the {n} of a user.", "{V} a {n} in the system.", "Use this to {v} a {n}.", "Tool to {v} the {n}",
         "This function lets you {v} a {n}.", "{V} {n}", "{V} one {n} with the given values.", "Call this when the user wants to {v} a {n}.")  # fmt: skip


def described(s: Source, deed: str | None = None, thing: str | None = None) -> Task:
    deed = deed or s.rng.choice(list(DEEDS))
    thing = thing or _thing(s)
    names, asks = DEEDS[deed]
    verb = s.pick(*names.split())
    name = s.pick(f"{verb}_{thing}", f"{verb}_{thing}", f"{verb}_{thing}", f"{thing}_{verb}").replace(" ", "_")
    another = s.pick(*names.split()).replace("_", " ") if s.maybe(0.4) else verb.replace("_", " ")
    about = s.pick(*ABOUT).format(V=another.capitalize(), v=another, n=thing) if s.maybe(0.85) else ""
    properties: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    called = near_word(s, thing) if s.practice(0.2) else thing
    ask = s.pick(*asks.split(" / ")).format(n=called)
    if s.practice(0.15):
        ask, called = one_of(s, ask, called, thing, properties, arguments)
    begins_otherwise = False
    is_question = ask.startswith(("What", "Which", "Where", "Is ", "How", "Do "))
    together = s.practice(0.4)
    kinds: set[str] = set()
    count = s.rng.choices((0, 1, 2, 3), (1, 5, 4, 1))[0]
    rows = s.rng.sample(PARAMETERS, min(count, 1) if together else count)
    if rows and s.practice(0.3):
        rows = [row for row in rows[1:] if row[1] in PLAIN_KINDS]
        ask, begins_otherwise = left_over(s, ask, called, properties, arguments)
        kinds.update(("word", "name", "city", "file", "integer"))
    for row in rows:
        keys, kind, ways = named_after(s) if s.practice(0.3) else row
        kinds.add(kind)
        parameter = (keys.format(n=thing.replace(" ", "_")), kind, ways.split(" / "))
        ask, begins = asked_too(s, ask, called, parameter, properties, arguments)
        begins_otherwise |= begins
    if together:
        more = s.rng.choices(SAID_TOO, (4, 8, 5, 3, 2))[0]
        ask = more(s, ask, properties, arguments)
    properties, arguments = reordered(s, properties, arguments)
    required = required_of(s, (k for k in properties if k in arguments), 0.95)
    if not together:
        leave_unsaid(s, kinds, properties)
    add_unasked(s, properties)
    ask += "?" if is_question and s.maybe(0.85) else s.pick(".", ".", "")
    return Task(
        definition(s, styled_name(s, name), about, properties, required), spoken(s, ask, value_first=begins_otherwise),
        arguments, (thing.split()[-1], "status"), (deed, thing),
    )  # fmt: skip


def one_of(
    s: Source, ask: str, called: str, thing: str, properties: dict[str, Any], arguments: dict[str, Any]
) -> tuple[str, str]:
    """Says what sort of thing is meant in place of the thing: roses where the parameter is a flower, sometimes how
    many.

    -> the request, and what it calls the thing.
    """
    sort = near_word(s, thing.split()[-1])
    if sort == thing.split()[-1]:
        return ask, called
    sort = s.pick(sort, sort, f"{s.pick(*QUALITIES)} {sort}", f"{s.word()} {sort}", f"{some_thing(s)} {sort}", sort.capitalize())  # fmt: skip
    noun = re.search(rf"\b(a new|a|the|my) {re.escape(called)}\b", ask)
    if noun is None:
        return ask, called
    plain = thing.replace(" ", "_")
    key = s.pick(plain, plain, f"{plain}_name", f"{plain}_type", "type", "kind", "item", "name")
    arguments[key] = sort
    before = noun[1]
    if before != "the" and s.maybe(0.4):
        arguments[key] = sort = sort if sort.endswith("s") else f"{sort}s"
        before = ""
        if s.maybe(0.7):
            counted = s.pick("quantity", "count", "amount", "number", f"num_{plain}s")
            arguments[counted] = s.number(2, 40)
            before = str(arguments[counted])
    for k, made in arguments.items():
        properties[k] = property_schema(s, k, "integer" if isinstance(made, int) else "item", made)
    said = f"{before} {sort}".strip()
    return ask[: noun.start()] + said + ask[noun.end() :], sort


def left_over(
    s: Source, ask: str, thing: str, properties: dict[str, Any], arguments: dict[str, Any]
) -> tuple[str, bool]:
    """Adds a parameter that no word of the request names: its value is what nothing else in the request is there
    for."""
    other = some_thing(s)
    keys = f"{other}|{other}|{other}_name|{other}_id|{some_thing(s)}_{other}"
    return asked_too(s, ask, thing, (keys, s.pick(*LEFT_OVER_KINDS), LEFT_OVER.split(" / ")), properties, arguments)


def named_after(s: Source) -> tuple[str, str, str]:
    """A row of NAMED_AFTER, of some thing; or of a number that its unit tells."""
    if s.practice(0.2):
        return measured(s)
    keys, kinds, ways = s.rng.choice(NAMED_AFTER)
    thing, quality = some_thing(s), s.pick(*QUALITIES)
    keys, kinds, ways = (text.replace("{x}", thing).replace("{q}", quality) for text in (keys, kinds, ways))
    return keys, s.pick(*kinds.split()), ways


def leave_unsaid(s: Source, kinds: set[str], properties: dict[str, Any]) -> None:
    """Sometimes a parameter that nothing in the request, of these kinds, could be taken for, among the others."""
    if not s.practice(0.3):
        return
    if s.maybe(0.25):
        leave_unmeasured(s, properties)
        return
    keys, kind, _ = s.rng.choice(PARAMETERS if s.maybe(0.8) else YES_OR_NO)
    key, kind = named(s, keys.format(n=some_thing(s), x=some_thing(s), q=s.pick(*QUALITIES)), kind)
    if _family(kind) in map(_family, kinds) or key in properties:
        return
    put_among(s, properties, key, property_schema(s, key, kind, value(s, kind)))


def _family(kind: str) -> str:
    return "city" if kind[0] in "@#" else FAMILY.get(kind, kind)


def asked_too(
    s: Source,
    ask: str,
    thing: str,
    parameter: tuple[str, str, list[str]],
    properties: dict[str, Any],
    arguments: dict[str, Any],
) -> tuple[str, bool]:
    """Adds a parameter (names, kind, ways to say it) and its value. -> (the request that says it, whether in front)."""
    key, kind = named(s, *parameter[:2])
    if key in properties:
        return ask, False
    made = value_for(s, kind, arguments)
    properties[key] = property_schema(s, key, kind, made)
    arguments[key] = made
    way = s.pick(*parameter[2])
    asked = said(way, ask, thing, key.replace("_", " "), quoted(s, kind, made), before=s.practice(0.7))
    return asked, way.endswith("|")


def one_more(
    s: Source, ask: str, kinds: set[str], properties: dict[str, Any], arguments: dict[str, Any]
) -> tuple[str, bool]:
    """asked_too for an everyday tool, of a kind that could not be taken for one of `kinds`, which it joins."""
    after = s.practice(0.4)  # its name tells it from others of its kind
    keys, kind, ways = named_after(s) if after else s.rng.choice(PARAMETERS)
    fitting = [w for w in ways.split(" / ") if "{n}" not in w]
    kind_of = _family(kind)
    taken = not after and kind_of in map(_family, kinds)
    if not fitting or taken:
        return ask, False
    kinds.add(kind_of)
    parameter = (keys.format(n=some_thing(s)), kind, fitting)
    plain = ask.rstrip(".?")
    asked, begins = asked_too(s, plain, "", parameter, properties, arguments)
    return asked + ask[len(plain) :], begins


def named(s: Source, keys: str, kind: str) -> tuple[str, str]:
    """One of the names that a parameter may have, some with a word before it, and the kind of its value."""
    key = s.pick(*keys.split("|"))
    if s.practice(0.2):
        key = f"{s.pick(*PREFIXES) if s.maybe(0.6) else some_thing(s)}_{key}"
    if kind == "options":
        kind = "=" + ",".join(options(s))
    return key, kind


def options(s: Source) -> list[str]:
    """What an enumeration has: words, in lessons sometimes as capitals, short ones or with a capital letter."""
    count = s.number(2, 4)
    if s.practice(0.2):
        made = [s.rng.choice(string.ascii_uppercase) if s.maybe(0.15) else abbreviation(s) for _ in range(count)]
    else:
        made = [s.word() if s.maybe(0.6) else some_thing(s) for _ in range(count)]
    if s.practice(0.15):
        made = [word.capitalize() for word in made]
    return list(dict.fromkeys(made))


def value_for(s: Source, kind: str, arguments: dict[str, Any]) -> Any:
    """A value beside those that there are; some addresses are those of a person who is named too."""
    made = value(s, kind)
    if kind == "email" and s.practice(0.5):
        names = [v for v in arguments.values() if isinstance(v, str) and v[:1].isupper()]
        return email_of(s, names[0]) if names else made
    return made


def said(way: str, ask: str, thing: str, key: str, value: str, *, before: bool = False) -> str:
    """The request with one more value said in this way; behind it where the way does not fit.

    `before`: also where other values stand before the thing already (a large beginner course).
    """
    if way.endswith("|"):
        return way[:-1].format(v=value) + ask
    if "{n}" not in way:
        return ask + way.format(k=key, v=value)
    between = rf"(?:[^\s,.:]+ ){{0,{MOST_BEFORE if before else 0}}}"
    asked = re.search(rf"\b(a new|a|the|my) ({between}{re.escape(thing)})\b", ask)
    if asked is None:
        return f"{ask}, {key} {value}"
    noun = way.format(a=asked[1], n=asked[2], k=key, v=value)
    return ask[: asked.start()] + noun + ask[asked.end() :]


def neighbour(s: Source, task: Task) -> Task:
    """Another deed with the same thing, or the same deed with another thing."""
    deed, thing = task.made_of
    if s.maybe(0.5):
        return described(s, deed=deed)
    far = [d for d in DEEDS if not set(_words(d)) & set(_words(deed))]
    return described(s, s.rng.choice(far), thing)


def _words(deed: str) -> list[str]:
    names, asks = DEEDS[deed]
    return names.split() + [a.split()[0] for a in asks.lower().split(" / ")]


def _thing(s: Source) -> str:
    def one() -> str:
        return some_thing(s) if s.maybe(0.75) else s.word()

    return f"{one()} {one()}" if s.maybe(0.2) else one()
