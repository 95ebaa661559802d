"""Lessons without tools: sums, counting, spelling, echo, lists, memory, JSON, small talk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gptoss.harmony.render import ReasoningEffort
from training.nano.examples import Example, Letters, Source
from training.nano.talk import FALLBACK, OTHER_REQUESTS, TALK

LISTS = {
    "fruits": "apple banana orange pear grape mango cherry lemon",
    "colors": "red blue green yellow orange purple pink brown",
    "animals": "dog cat horse cow lion tiger bear wolf",
    "vegetables": "carrot potato tomato onion pepper cabbage spinach broccoli",
    "countries": "France Germany Italy Spain Japan Brazil Canada Egypt",
    "planets": "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune",
    "days": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "months": "January February March April May June July August",
    "drinks": "water tea coffee milk juice lemonade cocoa soda",
    "languages": "English French German Spanish Italian Japanese Arabic Hindi",
    "tools": "hammer saw drill wrench pliers knife level chisel",
    "sports": "football tennis golf rugby hockey boxing rowing cricket",
}
NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
OBJECTS = ["apples", "books", "coins", "pens", "eggs", "stamps", "cards", "balls", "shells", "keys"]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def addition(s: Source) -> Example:
    a, b = _pair(s)
    result = a + b
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = ones // 10
    low = f"{a % 10}+{b % 10}={ones}, {a // 10}+{b // 10}+{carry}={tens + carry}, {result}"
    question = s.pick(
        f"What is {a} + {b}?", f"What is {a} plus {b}?", f"{a} + {b}", f"{a}+{b}", f"{a}+{b}=?", f"{a} + {b} = ?",
        f"Add {a} and {b}.", f"Add {a} to {b}", f"How much is {a} + {b}?", f"How much is {a} plus {b}?",
        f"Calculate {a} + {b}.", f"Compute {a}+{b}", f"What's {a}+{b}?", f"What's {a} + {b}?",
        f"What is the sum of {a} and {b}?", f"Please add {a} and {b}.", f"Can you tell me what {a} plus {b} is?",
        f"Solve {a} + {b}", f"what is {a}+{b}", f"I have {a} {(o := s.rng.choice(OBJECTS))} and get {b} more. "
        f"How many {o} do I have?", f"{s.name()} has {a} {(p := s.rng.choice(OBJECTS))} and buys {b} more. "
        f"How many {p} are there now?",
    )  # fmt: skip
    medium = f"Add {a} and {b}. Ones: {a % 10}+{b % 10}={ones}. Tens: {a // 10}+{b // 10}+{carry}={tens + carry}. Result {result}."
    return _sum(s, "addition", question, low, medium, f"{a} + {b}", result)


def subtraction(s: Source) -> Example:
    a, b = _pair(s)
    if s.maybe(0.9):
        a, b = max(a, b), min(a, b)
    result = a - b
    big, small = max(a, b), min(a, b)
    borrow = int(big % 10 < small % 10)
    ones, tens = big % 10 + 10 * borrow - small % 10, big // 10 - borrow - small // 10
    low = f"{big % 10 + 10 * borrow}-{small % 10}={ones}, {big // 10 - borrow}-{small // 10}={tens}, {result}"
    question = s.pick(
        f"What is {a} - {b}?", f"What is {a} minus {b}?", f"{a} - {b}", f"{a}-{b}", f"Subtract {b} from {a}.",
        f"How much is {a} - {b}?", f"Calculate {a} - {b}.", f"What's {a} minus {b}?", f"Take {b} away from {a}.",
        f"I have {a} {(o := s.rng.choice(OBJECTS))} and lose {b}. How many {o} are left?",
    )  # fmt: skip
    medium = f"Subtract {b} from {a}. Ones: {big % 10 + 10 * borrow}-{small % 10}={ones}. Tens: {big // 10 - borrow}-{small // 10}={tens}. Result {result}."
    return _sum(s, "subtraction", question, low, medium, f"{a} - {b}", result)


def multiplication(s: Source) -> Example:
    a, b = s.number(0, 99), s.number(0, 9)
    if s.maybe(0.5):
        a, b = s.number(0, 12), s.number(0, 12)
    result = a * b
    ones, tens = a % 10 * b, a // 10 * b
    working = (f"{a % 10}*{b}={ones}", f"{a // 10}*{b}={tens}, {tens}+{ones // 10}={tens + ones // 10}")
    if s.maybe(0.5) and a <= 12:
        a, b = b, a
    question = s.pick(
        f"What is {a} * {b}?", f"What is {a} times {b}?", f"{a} * {b}", f"{a} x {b}", f"{a}*{b}", f"What is {a} x {b}?",
        f"Multiply {a} by {b}.", f"Multiply {a} and {b}", f"How much is {a} times {b}?", f"Calculate {a} * {b}.",
    )  # fmt: skip
    return _sum(
        s, "multiplication", question, f"{', '.join(working)}, {result}",
        f"Multiply {a} and {b}. Ones: {working[0]}. Tens: {working[1]}. Result {result}.", f"{a} * {b}", result,
    )  # fmt: skip


def _pair(s: Source) -> tuple[int, int]:
    while True:
        a, b = s.number(), s.number()
        if s.maybe(0.2):
            a, b = s.number(0, 12), s.number(0, 12)
        if s.mine(f"sum {a} {b}"):
            return a, b


def _sum(s: Source, skill: str, question: str, low: str, medium: str, sum_: str, result: int) -> Example:
    effort = s.effort()
    analysis = _by_effort(effort, low, medium, f" Check: {sum_} = {result}. The answer is {result}.")
    answer = s.pick(str(result), f"{sum_} = {result}") if effort == "low" else f"{sum_} = {result}"
    return Example(skill, [user(question)], effort, [analysis], [answer], expected=[str(result)])


def _by_effort(effort: ReasoningEffort, low: str, medium: str, extra: str) -> str:
    return low if effort == "low" else medium if effort == "medium" else medium + extra


def counting(s: Source) -> Example:
    first, last = 1, s.number(2, 20)
    if s.maybe(0.35) or s.practice(0.3):
        first = s.number(0, 40)
        last = first + s.number(2, 12)
    down = s.maybe(0.25) or s.practice(0.1)
    numbers = list(range(first, last + 1))
    if down:
        numbers.reverse()
        ask = s.pick(f"Count down from {last} to {first}.", f"Count backwards from {last} to {first}")
        task = f"Count down from {last} to {first}"
    elif first == 1 and s.maybe(0.7):
        shown = NUMBER_WORDS[last] if last <= 10 and s.maybe(0.3) else str(last)
        ask = s.pick(
            f"Count to {shown}.", f"Count to {shown}", f"Please count to {shown}.", f"Can you count to {shown}?",
            f"Count up to {shown}.", f"count from 1 to {shown}",
        )  # fmt: skip
        task = f"Count from 1 to {last}"
    else:
        ask = s.pick(
            f"Count from {first} to {last}.", f"Please count from {first} to {last}",
            f"List the numbers from {first} to {last}.",
        )  # fmt: skip
        task = f"Count from {first} to {last}"
    text = ", ".join(map(str, numbers))
    effort = s.effort()
    analysis = _by_effort(
        effort, f"{task}.", f"{task}, one by one, with commas.",
        f" The first is {numbers[0]} and the last is {numbers[-1]}.",
    )  # fmt: skip
    return Example("counting", [user(ask)], effort, [analysis], [text], expected=[text])


def spelling(s: Source) -> Example:
    word = s.word() if s.practice(0.35) else s.short_word()
    spelled = "-".join(word)
    ask = s.pick(
        f"Spell the word {word}.", f"Spell {word}", f'Spell "{word}".', f"How do you spell {word}?",
        f"How is {word} spelled?", f"Please spell {word}.", f"Spell '{word}' letter by letter.",
        f"What are the letters of {word}?",
    )  # fmt: skip
    effort = s.effort()
    analysis = _by_effort(effort, f"Spell {word}.", f"Spell {word} letter by letter.", f" It has {len(word)} letters.")
    return Example("spelling", [user(ask)], effort, [analysis], [spelled], expected=[spelled])


def reversing(s: Source) -> Example:
    word = s.short_word()[:6]
    turned = word[::-1]
    ask = s.pick(
        f"Reverse the word {word}.", f"Reverse {word}", f'Reverse the word "{word}".', f'Reverse "{word}".',
        f"Write {word} backwards.", f"What is {word} spelled backwards?", f"Please reverse the word '{word}'.",
        f'Spell "{word}" backwards',
    )  # fmt: skip
    effort = s.effort()
    working = f"{'-'.join(word)}, reversed {'-'.join(turned)}"
    analysis = _by_effort(effort, working, f"Letters of {word}: {working}.", " So the last letter comes first.")
    return Example("reversing", [user(ask)], effort, [analysis], [Letters(turned)], expected=[turned])


def echo(s: Source) -> Example:
    text = s.phrase(1, 5) if s.maybe(0.6) else f"{s.name()} {s.phrase(0, 3)} {s.number()}".replace("  ", " ")
    style = s.rng.randrange(7)
    asks = [
        s.pick(f"Repeat after me: {text}", f"Say {text}", f"Echo: {text}", f"Repeat: {text}", f'Say "{text}"',
               f"Please repeat: {text}", f"Say exactly: {text}", f"Reply with: {text}", f"Echo {text}",
               f"Answer with exactly this text: {text}", f"Repeat the following: {text}"),
        s.pick(f"Put this in quotes: {text}", f"Write in quotes: {text}"),
        s.pick(f"Make this bold: {text}", f"Write in bold: {text}"),
        s.pick(f"Write this twice: {text}", f"Say this twice: {text}"),
        s.pick(f"Put this in brackets: {text}", f"Write in brackets: {text}"),
    ]  # fmt: skip
    answers = [text, f'"{text}"', f"**{text}**", f"{text} {text}", f"[{text}]"]
    which = style if style < len(asks) else 0
    effort = s.effort()
    what = ["repeat the text", "put quotes around it", "make it bold", "write it twice", "put brackets around it"][
        which
    ]
    analysis = _by_effort(effort, f"{what}.", f"The user wants me to {what}.", f" The text is: {text}.")
    return Example("echo", [user(asks[which])], effort, [analysis], [answers[which]], expected=[answers[which]])


def listing(s: Source) -> Example:
    effort = s.effort()
    if s.maybe(0.5):
        items = [s.word() for _ in range(s.number(2, 5))]
        joined = ", ".join(items)
        ask = s.pick(
            f"Make a list of {joined}.", f"Write as a list: {joined}", f"Turn this into a bullet list: {joined}",
            f"Make a bullet list: {joined}", f"List these items: {joined}",
        )  # fmt: skip
        low, medium = "make a list.", f"Write the {len(items)} items as a bullet list."
    else:
        kind = s.rng.choice(sorted(LISTS))
        number = s.number(2, 5)
        items = LISTS[kind].split()[:number]
        shown = NUMBER_WORDS[number] if s.maybe(0.6) else str(number)
        ask = s.pick(
            f"List {shown} {kind}.", f"Name {shown} {kind}.", f"Give me {shown} {kind}.", f"Tell me {shown} {kind}",
            f"Can you list {shown} {kind}?", f"Please name {shown} {kind}.", f"Write a list of {shown} {kind}.",
        )  # fmt: skip
        low, medium = f"{number} {kind}.", f"The user wants {number} {kind}, as a list."
    text = "\n".join(f"- {item}" for item in items)
    analysis = _by_effort(effort, low, medium, f" The first is {items[0]}, the last is {items[-1]}.")
    return Example("lists", [user(ask)], effort, [analysis], [text], expected=items)


def memory(s: Source) -> Example:
    """A name, a town or a favourite thing told some turns before."""
    name, town, thing = s.name(), s.name(), s.word()
    kind = s.rng.choices(("name", "town", "favorite"), (6, 2, 2))[0]
    color = s.rng.choice(LISTS["colors"].split())
    kinds = ("color", "animal", "food", "number")
    favorite = s.rng.choice(kinds)
    value = {"color": color, "number": str(s.number())}.get(favorite, thing)
    if kind == "name":
        tell = s.pick(
            f"My name is {name}.", f"Hi, I'm {name}.", f"Hello, my name is {name}.", f"I am {name}.", f"Hi! My name is {name}",
            f"Please call me {name}.", f"Hello! I'm {name}. Nice to meet you.", f"my name is {name}",
            f"Hi, my name is {name}. Please remember it.", f"Remember that my name is {name}.",
        )  # fmt: skip
        ask = s.pick(
            "What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "What was my name?",
            "Can you tell me my name?", "what is my name", "Tell me my name.", "What is my name again?", "What did I say my name was?",
        )  # fmt: skip
        reply, answer, value = f"Nice to meet you, {name}!", f"Your name is {name}.", name
    elif kind == "town":
        tell = s.pick(f"I live in {town}.", f"I am from {town}.", f"My home is {town}.")
        ask = s.pick("Where do I live?", "Which city do I live in?", "Where am I from?")
        reply, answer, value = f"{town} sounds nice!", f"You live in {town}.", town
    else:
        tell = s.pick(f"My favorite {favorite} is {value}.", f"My favourite {favorite} is {value}.")
        ask = s.pick(
            f"What is my favorite {favorite}?",
            f"What's my favourite {favorite}?",
            f"Do you remember my favorite {favorite}?",
        )
        reply, answer = f"I will remember that: {value}.", f"Your favorite {favorite} is {value}."
    effort = s.effort()
    if s.maybe(0.25):
        analysis = _by_effort(effort, "A fact to remember.", f"The user tells me: {value}.", " I will remember it.")
        return Example("memory", [user(tell)], effort, [analysis], [reply], expected=[value])
    if s.maybe(0.2):
        messages = [user(f"{tell} {ask}")]
    else:
        messages = [
            user(tell),
            assistant(s.pick(reply, reply, f"Hello {value}!", "Nice to meet you!", "OK.", FALLBACK)),
        ]
        for _ in range(s.rng.choices((0, 1, 2, 3), (5, 3, 2, 1))[0]):
            between = s.rng.choice((addition, counting, talk, echo, spelling))(s)
            messages += [between.messages[-1], assistant(between.answer_text)]
        messages.append(user(ask))
    analysis = _by_effort(effort, value, f"The user told me: {value}.", " I can answer from the conversation.")
    return Example("memory", messages, effort, [analysis], [answer], expected=[value])


def talk(s: Source) -> Example:
    topic = s.rng.choice(TALK)
    ask = s.rng.choice(topic.asks)
    if s.maybe(0.3):
        ask = s.pick(ask.lower(), ask.rstrip("?.!"), ask.upper() if len(ask) < 12 else ask)
    effort = s.effort()
    analysis = _by_effort(
        effort, topic.about, f"The user asks about {topic.about}.", " I know the answer and give it in short."
    )
    return Example("talk", [user(ask)], effort, [analysis], [topic.answer], expected=[topic.answer])


def other(s: Source) -> Example:
    """What it cannot do, it says."""
    ask = s.rng.choice(OTHER_REQUESTS).format(word=s.word(), phrase=s.phrase(1, 4), name=s.name(), number=s.number())
    effort = s.effort()
    analysis = _by_effort(effort, "I cannot do that.", "This is more than I can do.", " I say what I am instead.")
    return Example("fallback", [user(ask)], effort, [analysis], [FALLBACK], expected=["tiny demonstration model"])


Skill = Callable[[Source], Example]
