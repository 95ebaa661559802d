"""Values that people give to tools: names, dates, numbers, files and the like, by kind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from training.nano import natural
from training.nano.code_values import code_line, command, expression, path, sql
from training.nano.examples import Source
from training.nano.near_words import near_words
from training.nano.rare import abbreviation, decimal, web_address

WORDS: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("words.yaml").read_text())
PERSONS, CITIES = WORDS["persons"].split(), WORDS["cities"].split()
POOLS: dict[str, list[str]] = {
    kind: words.split(", ") if "," in words else words.split() for kind, words in WORDS["pools"].items()
}
THINGS, QUALITIES, CHORES = (WORDS[kind].split() for kind in ("things", "qualities", "chores"))
SENTENCES = [sentence.strip() for sentence in WORDS["sentences"].split(" / ")]
TWO_WORD_CITIES = ("New York", "San Francisco", "Los Angeles", "San Diego", "Las Vegas", "Hong Kong", "Cape Town", "Buenos Aires",
                   "Rio de Janeiro", "New Delhi", "Mexico City", "Kuala Lumpur", "Salt Lake City", "St. Louis")  # fmt: skip
SUFFIXES = ("CA", "NY", "TX", "France", "Germany", "UK", "Japan", "MA", "Spain")
SHOPS = [tuple(pair.split("/")) for pair in WORDS["shops"].split()]  # one, several
SITES, LANDMARKS, SMALL_WORDS = (WORDS[kind].split() for kind in ("sites", "landmarks", "small"))
RELATIVES, TAILS = WORDS["relatives"].split(), WORDS["tails"].split(" / ")
TITLES = ("Dr.", "Mr.", "Mrs.", "Ms.", "Prof.", "Dr")
MORE_ENDINGS = (".docx", ".xlsx", ".log", ".sh", ".js", ".toml", ".zip", ".xml", ".sql", ".pptx", ".ini", ".c", ".png", ".tar.gz")  # fmt: skip
MAIL_HOSTS = ("example.com", "mail.com", "example.org", "company.com", "test.com")


def _city(s: Source) -> str:
    kind = s.rng.random()
    if kind < 0.35:
        return s.name()
    city = s.rng.choice([c for c in (*CITIES, *TWO_WORD_CITIES) if s.mine(c)])
    return f"{city}, {s.pick(*SUFFIXES)}" if kind < 0.42 else city


def _person(s: Source) -> str:
    if s.practice(0.08):
        return f"my {s.pick(*RELATIVES)}"
    if s.practice(0.06):
        return s.word() if s.maybe(0.5) else s.rng.choice([p for p in PERSONS if s.mine(p)]).lower()
    kind = s.rng.random()
    if kind < 0.35:
        return s.name()
    first = s.rng.choice([p for p in PERSONS if s.mine(p)])
    if kind > 0.93:
        return f"{s.pick(*TITLES)} {s.name()}"
    return f"{first} {s.name()}" if kind < 0.5 else first


def _place(s: Source) -> str:
    """A city, a street or building with a name, or one that needs none."""
    kind = s.rng.random()
    if kind < 0.4:
        return _city(s)
    if kind < 0.7:
        return f"{s.name()} {s.pick(*SITES)}"
    landmark = s.rng.choice([place for place in LANDMARKS if s.mine(place)])
    return f"the {landmark}" if kind < 0.95 else s.pick("home", "work", "here")


def _shop(s: Source) -> str:
    one, several = s.rng.choice([pair for pair in SHOPS if s.mine(pair[0])])
    return one if s.maybe(0.5) else several


def _item(s: Source) -> str:
    """What a shop has: a word, or things, some with a quality."""
    if s.maybe(0.35):
        return s.word()
    thing = some_thing(s)
    several = thing if thing[-1] in "shxyz" or s.maybe(0.35) else f"{thing}s"
    return f"{s.pick(*QUALITIES)} {several}" if s.maybe(0.2) else several


def _mail_host(s: Source) -> str:
    if s.practice(0.25):
        return s.pick("gmail.com", "hotmail.com", "yahoo.com", "outlook.com", "site.org", "web.de", f"{s.word()}.{s.word()}.com", f"{s.word()}.io")  # fmt: skip
    return s.pick(*MAIL_HOSTS) if s.maybe(0.6) else s.word() + s.pick(".com", ".org", ".net", ".de")


def _email(s: Source) -> str:
    who = s.rng.choice([p for p in PERSONS if s.mine(p)]).lower() if s.maybe(0.6) else s.word()
    if s.maybe(0.25):
        who += f".{s.word()}"
    return f"{who}@{_mail_host(s)}"


def email_of(s: Source, person: str) -> str:
    """An address that begins as the person is called."""
    who = re.sub("[^a-z.]", "", person.lower().replace(" ", "." if s.maybe(0.3) else ""))
    return f"{who}@{_mail_host(s)}"


def _integer(s: Source) -> int:
    if s.practice(0.15):  # of several tokens
        return s.number(1, 10 ** s.number(4, 8))
    return s.rng.choice((s.number(1, 12), s.number(1, 99), s.number(100, 9999)))


def _version(s: Source) -> str:
    numbers = ".".join(str(s.number(0, 12)) for _ in range(s.number(2, 3)))
    return f"{'v' if s.maybe(0.3) else ''}{numbers}{s.pick('', '', '', '-rc1', '-beta')}"


def _username(s: Source) -> str:
    """As people call themselves on websites."""
    name = s.rng.choice([p for p in PERSONS if s.mine(p)]).lower() if s.maybe(0.4) else s.word()
    return s.pick(name, f"{name}{s.number(1, 99)}", f"{name}_{s.word()}", f"{name}.{s.number(1, 999)}", f"{s.word()}{name}"[:14])  # fmt: skip


def _coupon(s: Source) -> str:
    word = s.word().upper()
    return word if s.maybe(0.3) else f"{word}{s.pick('', '', '-')}{s.number(5, 99)}"


def _address(s: Source) -> str:
    return f"{s.number(1, 300)} {s.name()} {s.pick('Street', 'Street', 'Road', 'Avenue', 'Lane', 'St')}"


def _account(s: Source) -> str:
    return s.pick("checking", "savings", "business", "credit", "joint", "main", s.word(), some_thing(s)) + s.pick("", "", "", " account")  # fmt: skip


def _letters(s: Source, low: int, high: int) -> str:
    return "".join(s.rng.choice("ABCDEFGHIKLMNOPRSTXZ") for _ in range(s.number(low, high)))


def _ticker(s: Source) -> str:
    if s.practice(0.4):
        return abbreviation(s)
    kind = s.number(0, 3)
    if kind < 2:
        return str(value(s, "stock"))
    return s.name() if kind == 2 else _letters(s, 3, 4)


def _code(s: Source) -> str | int:
    plain = s.number(100, 99999)
    if s.practice(0.12):
        return _coupon(s)
    if s.practice(0.2):
        return f"{abbreviation(s)}{s.pick('-', '-', '', '_', ' ')}{s.number(1, 9999)}"
    kind = s.rng.random()
    if kind < 0.35:
        return plain
    if kind < 0.55:
        return str(plain)
    if kind > 0.93:
        return f"{s.number(1, 99)}{_letters(s, 1, 2)}{s.number(1, 9999)}"
    return f"{_letters(s, 1, 3)}{s.pick('-', '-', '', '_')}{s.number(1, 9999)}"


def _numbered(s: Source, thing: str) -> str:
    """One of several such things: node-17."""
    number = s.pick(str(s.number(1, 99)), f"{s.number(0, 9):02}", str(s.number(100, 9999)), s.pick(*"abcd"))
    return s.pick(
        f"{thing}-{number}",
        f"{thing}-{number}",
        f"{thing}{number}",
        f"{thing}_{number}",
        f"my-{thing}",
        f"{thing}-{s.word()}",
        f"{s.word()}-{thing}-{number}",
    )


def _slug(s: Source) -> str:
    """As programs and people who write them name things."""
    words = [s.word() if s.maybe(0.4) else some_thing(s) for _ in range(s.number(2, 3))]
    kind = s.rng.random()
    if kind < 0.6:
        return "-".join(words)
    if kind < 0.75:
        return "_".join(words)
    return s.pick(f"{words[0]}-{s.number(1, 99)}", f"v{s.number(1, 9)}.{s.number(0, 20)}", f"{words[0]}/{words[1]}", words[0])  # fmt: skip


def _date(s: Source) -> str:
    year, month, day = s.number(2023, 2028), s.number(1, 12), s.number(1, 28)
    written = f"{s.pick(*POOLS['month'])} {day}"
    return s.rng.choices(
        (f"{year}-{month:02}-{day:02}", written, f"{written}, {year}", f"{day:02}.{month:02}.{year}"), (6, 2, 1, 1)
    )[0]


def _time(s: Source) -> str:
    hour, minute = s.number(0, 23), s.number(0, 11) * 5
    return s.pick(f"{hour}:{minute:02}", f"{hour:02}:{minute:02}", f"{hour % 12 + 1} {s.pick('am', 'pm')}", f"{hour % 12 + 1}{s.pick('am', 'pm')}")  # fmt: skip


def _phrase(s: Source) -> str:
    """As people say things, or words as they come, some with the small ones between them that people use."""
    if s.practice(0.12):  # a string that ends in a figure is no number
        return s.pick(
            f"{_sentence(s)} {s.number()}", f"{s.word()} {s.number(1, 2030)}", f"{some_thing(s)} number {s.number(1, 999)}",
            f"{s.number(2, 12)} {some_thing(s)}s", f"{some_thing(s)} {s.number(1, 9)} {s.pick('of', 'and')} {s.number(1, 9)}",
        )  # fmt: skip
    if s.maybe(0.4):
        return _sentence(s)
    words = s.phrase().split()
    if s.practice(0.3):  # what comes next cannot be guessed, only copied
        return " ".join(
            word for content in words for word in (*(s.pick(*SMALL_WORDS) for _ in range(s.number(0, 2))), content)
        )
    if s.maybe(0.3) and len(words) > 1:
        at = s.number(1, len(words) - 1)
        words[at:at] = s.pick(
            "the", "of the", "a", "is", "of", "to the", "and", "my", "in", "on", "for", "you", "at"
        ).split()
    return " ".join(words)


def some_thing(s: Source) -> str:
    """A noun that tools are about."""
    return s.rng.choice([t for t in THINGS if s.mine(t)])


def near_word(s: Source, word: str) -> str:
    """Another word for nearly the same, or the word itself where there is none."""
    near = [other for other in near_words(word) if s.mine(other)]
    return s.rng.choice(near) if near else word


def _sentence(s: Source) -> str:
    made = {
        "{t}": lambda: some_thing(s),
        "{q}": lambda: s.pick(*QUALITIES),
        "{d}": lambda: s.pick(*CHORES),
        "{n}": lambda: s.name() if s.maybe(0.5) else _person(s),
        "{w}": lambda: s.pick(*POOLS["day"]),
    }
    sentence = s.rng.choice(SENTENCES) + (f" {s.pick(*TAILS)}" if s.practice(0.2) else "")
    return re.sub(r"\{\w\}", lambda slot: made[slot.group()](), sentence)


def _title(s: Source) -> str:
    """Of a song, a film, a restaurant: capitalised words, some with small ones between them."""
    words = [s.word() if s.maybe(0.5) else some_thing(s) for _ in range(s.number(1, 3))]
    text = s.pick(" ", " ", " ", " of ", " of the ", " and ").join(w.title() for w in words)
    return f"The {text}" if s.maybe(0.15) else text


def _several(kind: str) -> Callable[[Source], list[Any]]:
    return lambda s: [value(s, kind) for _ in range(s.number(2, 4))]


def _file(s: Source, *endings: str) -> str:
    if s.practice(0.25):
        stem = s.pick(s.word(), some_thing(s), f"{s.word()}_{some_thing(s)}", f"{some_thing(s)}{s.number(1, 99)}", s.rng.choice("abcxyz"))  # fmt: skip
        return stem + s.pick(*endings, *MORE_ENDINGS)
    name = f"{s.word()}{s.pick(*endings)}"
    return f"{s.word()}/{name}" if s.practice(0.2) else name


KINDS: dict[str, Callable[[Source], Any]] = {
    "name": Source.name,
    "word": Source.word,
    "phrase": _phrase,
    "short_phrase": lambda s: f"{s.word() if s.maybe(0.5) else some_thing(s)} {some_thing(s)}",
    "slug": _slug,
    "person": _person,
    "city": _city,
    "place": _place,
    "shop": _shop,
    "item": _item,
    "email": _email,
    "person_or_email": lambda s: _email(s) if s.maybe(0.4) else _person(s),
    "integer": _integer,
    "small": lambda s: s.number(1, 12),
    "minutes": lambda s: s.number(1, 12) * 5 if s.maybe(0.6) else s.number(1, 99),
    "thousands": lambda s: s.number(1, 500) * 1000,
    "year": lambda s: s.number(1990, 2030),
    "float": lambda s: decimal(s) if s.practice(0.4) else s.number(1, 99) / 10,
    "coordinate": lambda s: s.rng.choice((1, 1, 1, -1)) * decimal(s),
    "abbreviation": abbreviation,
    "yes": lambda _: True,
    "no": lambda _: False,
    "boolean": lambda s: s.maybe(0.5),
    "code": _code,
    "date": _date,
    "day_or_date": lambda s: _date(s) if s.maybe(0.4) else value(s, "day"),
    "time": _time,
    "hour": lambda s: _time(s) if s.maybe(0.5) else s.number(1, 23),
    "phone": lambda s: s.pick(f"555-{s.number(0, 9999):04}", f"+1 555 {s.number(1000000, 9999999)}", str(s.number(100000, 9999999))),
    "ip": lambda s: ".".join(str(s.number(0, 255)) for _ in range(4)),
    "url": lambda s: web_address(s) if s.practice(0.5) else s.pick(f"https://{s.word()}.com", f"www.{s.word()}.org", f"https://example.com/{s.word()}", f"{s.word()}.com"),
    "file": lambda s: _file(s, ".txt", ".py", ".csv", ".json", ".md", ".pdf", ".yaml", ".html"),
    "image": lambda s: _file(s, ".png", ".jpg"),
    "audio": lambda s: _file(s, ".mp3", ".wav"),
    "path": path,
    "sql": sql,
    "python": code_line,
    "command": command,
    "expression": expression,
    "flight": lambda s: s.pick("LH", "BA", "UA", "AF", "DL", "AA") + s.pick("", " ") + str(s.number(10, 4999)),
    "ticker": _ticker,
    "version": _version,
    "username": _username,
    "coupon": _coupon,
    "address": _address,
    "account": _account,
    "seat": lambda s: f"{s.number(1, 40)}{s.pick(*'ABCDEF')}",
    "title": lambda s: _title(s) if s.maybe(0.7) else s.name(),
    "words": _several("word"),
    "persons": _several("person"),
    "numbers": _several("integer"),
    **{f"{kind}s": _several(kind) for kind in ("item", "email", "file", "ticker", "seat", "color", "day")},
    "cities": _several("city"),
}  # fmt: skip


def value(s: Source, kind: str) -> Any:
    """A value of this kind; "=a,b" is one of these, and "@lake" a name that ends so: Mirror Lake; "#node" one of
    several: node-17."""
    if kind.startswith("="):
        return s.pick(*kind[1:].split(","))
    if kind.startswith("#"):
        return _numbered(s, kind[1:])
    if kind.startswith("@"):
        return f"{s.name()} {kind[1:].title()}"
    if kind in natural.KINDS and (s.natural or kind not in KINDS):
        return natural.KINDS[kind](s)
    return s.pick(*POOLS[kind]) if kind in POOLS else KINDS[kind](s)


def choices(kind: str) -> list[str] | None:
    """All values of a kind that has only some."""
    if kind.startswith("="):
        return kind[1:].split(",")
    return POOLS.get(kind)


def schema_of(made: Any) -> dict[str, Any]:
    if isinstance(made, list):
        return {"type": "array", "items": schema_of(made[0])}
    if isinstance(made, bool):
        return {"type": "boolean"}
    if isinstance(made, int):
        return {"type": "integer"}
    return {"type": "number" if isinstance(made, float) else "string"}


def value_text(made: Any) -> str:
    """As it stands in a sentence."""
    if isinstance(made, list):
        return f"[{', '.join(map(value_text, made))}]"
    return made if isinstance(made, str) else json.dumps(made)
