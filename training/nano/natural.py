"""Values as most people give them: names, places, errands and titles that make sense, dates and times as they are said.

`values.py` makes what is hard to copy; a lesson that is `Source.natural` takes these instead (natural.yaml).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from training.nano.examples import Source

TABLE: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("natural.yaml").read_text())
POOLS: dict[str, list[str]] = {kind: text.strip().split(", ") for kind, text in TABLE["pools"].items()}
EXCHANGED_FROM = 3  # letters
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December")  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
STATES = ("CA", "NY", "TX", "MA", "WA", "France", "Germany", "UK", "Japan", "Italy", "Canada", "Spain")  # fmt: skip
STREETS = ("Main Street", "Park Lane", "Mill Road", "High Street", "Oak Avenue", "Elm Street", "Station Road", "King Street", "Lake View",
           "Church Lane", "Market Street", "River Road", "Maple Drive", "Broadway", "Hill Road", "Garden Street")  # fmt: skip
ENDINGS = (".txt", ".pdf", ".csv", ".py", ".md", ".json", ".yaml", ".html", ".docx", ".xlsx", ".log", ".js", ".zip")  # fmt: skip
FOLDERS = ("docs", "src", "data", "config", "images", "tmp", "home", "logs", "tests", "reports", "music")  # fmt: skip
ROUND = (5, 10, 15, 20, 25, 30, 40, 45, 50, 60, 75, 80, 90, 100, 120, 150, 180, 200, 250, 300, 400, 500, 750, 800, 1000, 1200, 1500, 2000, 2500, 5000, 10000)  # fmt: skip


def pooled(s: Source, kind: str) -> str:
    """One of these values, sometimes with another word in it: what people name is in no list."""
    made = s.rng.choice([v for v in POOLS[kind] if s.mine(v)])
    words = made.split(" ")
    plain = [at for at, word in enumerate(words) if word.isalpha() and len(word) >= EXCHANGED_FROM]
    if plain:
        at = s.rng.choice(plain)
        words[at] = s.usual_or_not(words[at])
    return " ".join(words)


def person(s: Source) -> str:
    kind = s.rng.random()
    if kind < 0.06:
        return s.pick("mom", "dad", "my brother", "my sister", "my boss", "my wife", "my husband", "Grandma", "the team")  # fmt: skip
    if kind < 0.12:
        return f"{s.pick('Dr.', 'Mr.', 'Mrs.', 'Ms.', 'Professor')} {pooled(s, 'last')}"
    return f"{pooled(s, 'first')} {pooled(s, 'last')}" if kind < 0.45 else pooled(s, "first")


def city(s: Source) -> str:
    if s.maybe(0.12):
        return pooled(s, "country")
    return pooled(s, "city") + (f", {s.pick(*STATES)}" if s.maybe(0.08) else "")


def place(s: Source) -> str:
    kind = s.rng.random()
    if kind < 0.4:
        return city(s)
    return pooled(s, "landmark").removeprefix("the " if kind < 0.7 else " ")


def address(s: Source) -> str:
    street = s.pick(*STREETS)
    return f"{street} {s.number(1, 99)}" if s.maybe(0.15) else f"{s.number(1, 400)} {street}"


def email(s: Source) -> str:
    first, last = pooled(s, "first").lower(), pooled(s, "last").lower()
    who = s.pick(first, first, f"{first}.{last}", f"{first[0]}{last}", "info", "support", "team", "sales", "hr", f"{first}{s.number(1, 99)}")  # fmt: skip
    return f"{who}@{pooled(s, 'host')}"


def integer(s: Source) -> int:
    return s.rng.choice((s.number(1, 12), s.number(1, 99), s.rng.choice(ROUND), s.rng.choice(ROUND), s.number(100, 9999)))  # fmt: skip


def decimal(s: Source) -> float:
    return s.rng.choice((s.number(1, 99) / 10, s.number(1, 40) / 2, s.number(100, 9999) / 100, s.number(1, 99) / 100))  # fmt: skip


def date(s: Source) -> str:
    year, month, day = s.number(2022, 2028), s.number(1, 12), s.number(1, 28)
    name = MONTHS[month - 1]
    return s.rng.choices(
        (
            f"{year}-{month:02}-{day:02}", f"{name} {day}", f"{day} {name}", f"{name} {day}, {year}", f"{day:02}.{month:02}.{year}",
            f"{month:02}/{day:02}/{year}", f"{name} {day}{_ordinal(day)}", f"the {day}{_ordinal(day)} of {name}",
        ),
        (8, 6, 2, 1, 1, 1, 2, 1),
    )[0]  # fmt: skip


def _ordinal(day: int) -> str:
    return "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")


def day(s: Source) -> str:
    return s.pick(*DAYS, *DAYS, "today", "tomorrow", "tonight", f"next {s.pick(*DAYS)}", "next week", "this weekend")  # fmt: skip


def time(s: Source) -> str:
    hour, minute = s.number(0, 23), s.rng.choice((0, 0, 5, 10, 15, 20, 30, 30, 40, 45, 50))
    half = s.pick("am", "pm")
    return s.rng.choices(
        (f"{hour}:{minute:02}", f"{hour:02}:{minute:02}", f"{hour % 12 + 1} {half}", f"{hour % 12 + 1}{half}", f"{hour % 12 + 1}:{minute:02} {half}", s.pick("noon", "midnight"), f"{hour % 12 + 1} o'clock"),
        (6, 4, 4, 3, 2, 1, 1),
    )[0]  # fmt: skip


def phrase(s: Source) -> str:
    """What is said, looked for or to be done."""
    kind = s.pick("task", "message", "message", "topic", "topic", "event", "item")
    return pooled(s, kind)


def title(s: Source) -> str:
    return pooled(s, s.rng.choices(("title", "event", "artist", "company"), (7, 2, 1, 1))[0])


def word(s: Source) -> str:
    return pooled(s, s.rng.choices(("word", "object", "animal", "plant"), (6, 3, 1, 1))[0])


def item(s: Source) -> str:
    made = pooled(s, s.rng.choices(("item", "food", "object"), (6, 2, 2))[0])
    return re.sub("^(a|an) ", "", made)


def code(s: Source) -> str | int:
    number = s.number(1, 10 ** s.number(2, 5))
    letters = "".join(s.rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(s.number(1, 3)))
    return s.rng.choice(
        (number, number, str(number), f"{letters}-{number}", f"{letters}-{number}", f"{letters}{number}", f"{letters}-{number // 100 + 1}",
         f"{s.pick('INV', 'ORD', 'BUG', 'PO', 'TKT', 'REQ', 'SKU', 'CASE', 'ID', 'A', 'C', 'R', 'JIRA', 'DOC')}-{number}", f"{number}{letters[0].lower()}")
    )  # fmt: skip


def file(s: Source, *endings: str) -> str:
    stem = pooled(s, "stem")
    if s.maybe(0.25):
        stem += s.pick(f"{s.number(1, 12)}", f"_{s.number(2020, 2028)}", "_final", "-v2", "_old", f"_{pooled(s, 'stem')}")  # fmt: skip
    name = stem + s.pick(*(endings or ENDINGS))
    return f"{s.pick(*FOLDERS)}/{name}" if s.maybe(0.2) else name


def path(s: Source) -> str:
    return s.pick(f"/{s.pick(*FOLDERS)}/{pooled(s, 'stem')}", f"/var/{s.pick(*FOLDERS)}", f"{s.pick(*FOLDERS)}/{pooled(s, 'stem')}", f"/home/{pooled(s, 'first').lower()}", file(s), file(s))  # fmt: skip


def url(s: Source) -> str:
    site = pooled(s, "site")
    tail = s.pick("", "", f"/{pooled(s, 'stem')}", f"/{s.pick(*FOLDERS)}/{pooled(s, 'stem')}", f"/{s.number(1, 999)}")  # fmt: skip
    return f"{s.pick('https://', 'https://', '', 'http://')}{site}{tail}"


def username(s: Source) -> str:
    first, last = pooled(s, "first").lower(), pooled(s, "last").lower()
    return s.pick(first, f"{first}{s.number(1, 99)}", f"{first}_{last}", f"{first[0]}{last}", f"{first}.{last}", f"{pooled(s, 'animal').replace(' ', '')}{s.number(1, 99)}")  # fmt: skip


def several(kind: Callable[[Source], Any]) -> Callable[[Source], list[Any]]:
    return lambda s: list(dict.fromkeys(kind(s) for _ in range(s.rng.choice((2, 2, 3, 3, 4)))))


KINDS: dict[str, Callable[[Source], Any]] = {
    "name": lambda s: pooled(s, s.pick("first", "first", "city", "last", "title", "company")),
    "word": word,
    "phrase": phrase,
    "short_phrase": lambda s: pooled(s, "subject"),
    "slug": lambda s: pooled(s, s.pick("slug", "slug", "service")),
    "person": person,
    "full_name": lambda s: f"{pooled(s, 'first')} {pooled(s, 'last')}",
    "city": city,
    "place": place,
    "item": item,
    "email": email,
    "person_or_email": lambda s: email(s) if s.maybe(0.4) else person(s),
    "integer": integer,
    "amount": lambda s: s.rng.choice(ROUND) if s.maybe(0.6) else s.number(1, 999),
    "float": decimal,
    "date": date,
    "day": day,
    "day_or_date": lambda s: date(s) if s.maybe(0.5) else day(s),
    "time": time,
    "hour": time,
    "code": code,
    "url": url,
    "username": username,
    "address": address,
    "file": lambda s: file(s, ".txt", ".py", ".csv", ".json", ".md", ".pdf", ".yaml", ".html"),
    "image": lambda s: file(s, ".png", ".jpg"),
    "audio": lambda s: file(s, ".mp3", ".wav"),
    "path": path,
    "title": title,
    "words": several(word),
    "persons": several(person),
    "cities": several(city),
    "items": several(item),
    "emails": several(email),
    "files": several(file),
    "numbers": several(integer),
    **{kind: partial(pooled, kind=kind) for kind in POOLS if kind not in ("word", "title", "city", "item")},
}  # fmt: skip
