"""Tools that tell one thing about something, asked for by a question that has another word for it: how tall, how old,
who wrote."""

from __future__ import annotations

from typing import Any

from training.nano.described import asked_too, leave_unsaid, named_after
from training.nano.examples import Source
from training.nano.tasks import (
    Task,
    add_unasked,
    definition,
    property_schema,
    quoted,
    reordered,
    required_of,
    spoken,
    styled_name,
)
from training.nano.values import some_thing, value

# attribute: (words for it in a tool's name, kinds of what has it, ways to ask; {v} what has it)
ATTRIBUTES: dict[str, tuple[str, str, str]] = {
    "height": ("height", "place title name person", "How tall is {v} / How high is {v} / Height of {v} / I wonder how tall {v} is"),
    "age": ("age", "person name title place username", "How old is {v} / What age is {v} / Age of {v} / When was {v} born / How many years old is {v}"),
    "length": ("length", "place name file title", "How long is {v} / Length of {v} / What length has {v} / How long is {v} exactly"),
    "depth": ("depth", "place name", "How deep is {v} / Depth of {v} / How far down does {v} go"),
    "weight": ("weight mass", "item code name word", "How heavy is {v} / How much does {v} weigh / What does {v} weigh / Weight of {v}"),
    "price": ("price cost", "item code title word slug", "How much is {v} / What does {v} cost / How expensive is {v} / How much does {v} cost / Price of {v} / Is {v} expensive / How much do I pay for {v}"),
    "speed": ("speed", "item name place ip slug", "How fast is {v} / Speed of {v} / How quick is {v} / How fast does {v} go"),
    "size": ("size", "file path slug place item url", "How big is {v} / How large is {v} / Size of {v} / How much space does {v} take"),
    "width": ("width", "item place image name", "How wide is {v} / Width of {v} / How broad is {v}"),
    "duration": ("duration runtime", "title slug name phrase", "How long does {v} take / How long does {v} last / How much time does {v} take / Duration of {v} / When is {v} over"),
    "humidity": ("humidity", "city place room", "How humid is it in {v} / Humidity in {v} / Is the air in {v} dry / How damp is it in {v}"),
    "wind": ("wind", "city place", "How windy is it in {v} / Is it windy in {v} / How strong does it blow in {v} / Wind in {v} / Are there gusts in {v}"),
    "rain": ("rain rainfall", "city place", "How rainy is it in {v} / Will it rain in {v} / Do I need an umbrella in {v} / Is {v} wet"),
    "crowd": ("crowd occupancy", "place shop name", "How crowded is {v} / How full is {v} / Is {v} busy / Are there many people at {v}"),
    "safety": ("safety", "city place url", "How safe is {v} / Is {v} safe / Is it dangerous in {v}"),
    "noise": ("noise", "place room city", "How loud is it in {v} / How noisy is {v} / Is it quiet in {v} / Noise in {v}"),
    "difficulty": ("difficulty", "title word slug name", "How hard is {v} / How difficult is {v} / Is {v} easy / Is {v} difficult"),
    "rating": ("rating score", "title shop name person username", "How good is {v} / Is {v} any good / What do people say about {v} / Rating of {v} / How many stars has {v}"),
    "strength": ("strength", "item slug word username", "How strong is {v} / Strength of {v} / Is {v} strong"),
    "health": ("health", "slug ip url place", "How healthy is {v} / Is {v} ok / Is {v} up / Is {v} alive / Is everything fine with {v}"),
    "author": ("author writer", "title phrase file slug", "Who wrote {v} / Who is the author of {v} / By whom is {v} / Who has written {v}"),
    "owner": ("owner", "slug file code place path", "Who owns {v} / Whose is {v} / To whom does {v} belong / Who is the owner of {v} / Who has {v}"),
    "founder": ("founder creator", "name title slug", "Who founded {v} / Who started {v} / Who made {v} / Who created {v}"),
    "winner": ("winner champion", "title year place word", "Who won {v} / Who is the champion of {v} / Who came first in {v} / Winner of {v}"),
    "director": ("director", "title name", "Who directed {v} / Who made the film {v} / Whose film is {v}"),
    "inventor": ("inventor", "word item title", "Who invented {v} / Whose idea was {v} / Inventor of {v}"),
    "leader": ("leader president", "name city title", "Who leads {v} / Who runs {v} / Who is in charge of {v} / Who is the head of {v}"),
    "location": ("location position", "person code item shop title", "Where is {v} / Where can I find {v} / Where is {v} now / Where do I find {v}"),
    "hours": ("hours opening_hours", "shop place title", "When does {v} open / Until when is {v} open / Is {v} open now / When does {v} close / At what time does {v} open"),
    "reason": ("reason cause", "phrase code slug", "Why is it that {v} / Why {v} / What is the cause of {v} / How come {v}"),
    "meaning": ("meaning definition", "word abbreviation name", "What does {v} mean / What is meant by {v} / What is {v} / Define {v} / What does {v} stand for"),
    "plot": ("plot synopsis info", "title name", "What is {v} about / What happens in {v} / Tell me about {v} / What's the story of {v} / Is {v} worth watching / I want to know more about {v}"),
    "origin": ("origin", "word person name item", "Where does {v} come from / Where is {v} from / From where is {v}"),
    "color": ("color", "item name code", "What color is {v} / What color has {v} / Which color is {v}"),
    "temperature": ("temperature", "room item place", "How hot is {v} / How warm is {v} / How cold is {v} / Is {v} warm / Is {v} cold"),
    "members": ("members", "slug title name", "Who is in {v} / Who belongs to {v} / Who are the people in {v} / Who is part of {v}"),
    "residents": ("residents inhabitants", "city place address", "Who lives in {v} / How many people live in {v} / Who lives at {v}"),
    "ingredients": ("ingredients", "item word title", "What is in {v} / What do I need for {v} / What is {v} made of / What goes into {v}"),
    "symptoms": ("symptoms", "word short_phrase", "How do I notice {v} / What are signs of {v} / How does {v} feel / How do I know it is {v}"),
    "treatment": ("treatment remedy", "word short_phrase item", "What helps against {v} / I have {v}, what can I do / What can I take for {v} / What to do about {v} / My child has {v}, what now"),
    "diagnosis": ("diagnosis", "word short_phrase phrase", "I have {v}, what can it be / My son has {v}, why / What could {v} be a sign of / Why do I have {v} / I feel {v}, what is it"),
    "usage": ("usage", "slug ip code person", "How much does {v} use / How much is used by {v} / What does {v} consume"),
    "count": ("count", "slug path word title", "How many are in {v} / How many has {v} / How many does {v} have"),
    "deadline": ("deadline due_date", "slug title phrase code", "When is {v} due / Until when must {v} be done / When must I hand in {v} / By when does {v} have to be ready"),
    "release": ("release release_date", "title slug name version", "When does {v} come out / When did {v} come out / When was {v} released / Is {v} out"),
    "arrival": ("arrival eta", "flight code person", "When does {v} arrive / When will {v} be here / When does {v} land / How long until {v} is here"),
    "version": ("version", "slug word name", "Which version of {v} is it / How new is {v} / What release of {v} do we have"),
    "language": ("language", "title city name phrase", "What do people speak in {v} / In what language is {v} / Which language is {v}"),
    "capacity": ("capacity", "place item room", "How many fit in {v} / How much fits into {v} / How many people can {v} hold / How much can {v} take"),
    "salary": ("salary wage", "word short_phrase person", "How much does {v} earn / What does {v} make a year / What is {v} paid"),
    "pronunciation": ("pronunciation", "word name", "How do I say {v} / How is {v} pronounced / How do you pronounce {v}"),
    "risk": ("risk", "city word slug", "How risky is {v} / Is {v} a risk / What can go wrong with {v}"),
    "demand": ("demand popularity", "item title word", "How popular is {v} / How many want {v} / Is {v} popular / Do people like {v}"),
    "phone": ("phone phone_number", "person shop title", "How can I call {v} / How do I reach {v} / What number has {v}"),
    "employer": ("employer company", "person username", "Where does {v} work / For whom does {v} work / Who employs {v}"),
    "job": ("job profession", "person username", "What does {v} do / What does {v} do for a living / What is {v} by trade"),
    "boss": ("manager boss", "person username", "Who is {v} working for / To whom does {v} report / Who is above {v}"),
}  # fmt: skip
ABOUT = ("Returns the {a} of a {x}.", "Get the {a} of a {x}", "The {a} of the given {x}", "Look up the {a} for a {x}", "{A} of a {x}", "Finds the {a}.", "Gives the {a} of any {x}.")  # fmt: skip
MORE = 0.25  # of these tools have one more parameter


def attribute(s: Source, of: str | None = None, thing: str | None = None) -> Task:
    """A tool for one attribute of a thing. Its name says the attribute, the request mostly does not."""
    of, thing = of or s.rng.choice(list(ATTRIBUTES)), thing or some_thing(s)
    names, kinds, asks = ATTRIBUTES[of]
    word = s.pick(*names.split())
    verb = s.pick("get", "get", "get", "fetch", "lookup", "find", "check", "show")
    name = s.pick(f"{verb}_{thing}_{word}", f"{verb}_{thing}_{word}", f"{thing}_{word}", f"{verb}_{word}", f"{word}_of_{thing}")  # fmt: skip
    kind = s.pick(*kinds.split())
    made = value(s, kind)
    key = s.pick(thing, f"{thing}_name", "name", f"{thing}_id", "query", "of", "target")
    properties: dict[str, Any] = {key: property_schema(s, key, kind, made)}
    arguments: dict[str, Any] = {key: made}
    text = quoted(s, kind, made)
    shown = s.pick(text, text, text, f"the {thing} {text}") if text[:4] != "the " else text
    ask = s.pick(*asks.split(" / ")).format(v=shown)
    question = ask.split(" ", 1)[0] in QUESTIONS
    begins = False
    if s.practice(MORE):
        keys, another, ways = named_after(s)
        fitting = [way for way in ways.split(" / ") if "{n}" not in way]
        if fitting:
            more = (keys.format(n=thing), another, fitting)
            ask, begins = asked_too(s, ask, thing, more, properties, arguments)
    leave_unsaid(s, {kind}, properties)
    properties, arguments = reordered(s, properties, arguments)
    required = required_of(s, arguments, 0.95)
    add_unasked(s, properties)
    about = s.pick(*ABOUT).format(a=word.replace("_", " "), A=word.replace("_", " ").capitalize(), x=thing)  # fmt: skip
    ask += "?" if question and s.maybe(0.85) else s.pick(".", "", "?")
    return Task(
        definition(s, styled_name(s, name), about if s.maybe(0.85) else "", properties, required),
        spoken(s, ask, value_first=begins), arguments, (word, thing), (of, thing),
    )  # fmt: skip


def another_attribute(s: Source, of: str, thing: str) -> Task:
    """Of the same thing, what a request for the one does not ask for."""
    return attribute(s, s.rng.choice([a for a in ATTRIBUTES if a not in NEAR.get(of, (of,))]), thing)


QUESTIONS = ("How", "What", "Who", "When", "Where", "Why", "Is", "Are", "Will", "Do", "Does", "Which", "Whose", "By", "To", "Until", "In", "From", "For", "At")  # fmt: skip
# of which one might be meant by a question for the other
_NEAR = (
    ("height", "length", "depth", "width", "size", "duration"),
    ("age", "release", "origin", "version", "duration"),
    ("hours", "deadline", "arrival", "release", "duration"),
    ("author", "owner", "founder", "director", "inventor", "leader", "boss", "members"),
    ("residents", "members", "capacity", "crowd", "count"),
    ("treatment", "diagnosis", "symptoms", "reason", "meaning"),
    ("rating", "demand", "plot", "meaning", "difficulty"),
    ("wind", "rain", "humidity", "temperature", "noise", "safety", "risk"),
    ("strength", "weight", "speed", "health", "safety", "usage"),
    ("price", "salary", "usage"),
    ("employer", "boss", "job"),
    ("ingredients", "meaning", "plot", "treatment"),
    ("location", "origin", "employer", "phone"),
)
NEAR = {of: {other for group in _NEAR if of in group for other in group} | {of} for of in ATTRIBUTES}
