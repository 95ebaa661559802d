"""Values that nothing but copying gets right: abbreviations, addresses of pages, numbers with several decimals."""

from __future__ import annotations

import string
from functools import cache

from gptoss.harmony.vocabulary_files import Vocabulary
from training.nano.examples import Source

PROTOCOLS = ("https://", "https://", "https://", "http://", "", "www.")
HOSTS = ("docs", "api", "blog", "shop", "news", "hooks", "app", "dev", "my", "cdn", "mail")
DOMAINS = ("com", "com", "org", "net", "io", "dev", "de", "co.uk", "app", "eu")


def abbreviation(s: Source) -> str:
    """Two to five capitals: those that the vocabulary has as one token, or any."""
    if s.maybe(0.5):
        return s.rng.choice([a for a in _abbreviations(s.vocabulary) if s.mine(a)])
    return "".join(s.rng.choices(string.ascii_uppercase, k=s.number(2, 4)))


@cache
def _abbreviations(vocabulary: Vocabulary) -> tuple[str, ...]:
    texts = (token[1:].decode("latin-1") for token in vocabulary.token_bytes if token[:1] == b" ")
    return tuple(t for t in texts if 2 <= len(t) <= 5 and t.isascii() and t.isalpha() and t.isupper())  # fmt: skip


def web_address(s: Source) -> str:
    host = s.word() if s.maybe(0.5) else s.pick("example", "example", "mysite", "acme", "github")
    if s.maybe(0.5):
        host = f"{s.pick(*HOSTS) if s.maybe(0.6) else s.word()}.{host}"
    path = "".join(f"/{s.word()}" for _ in range(s.rng.choices((0, 1, 2), (5, 4, 1))[0]))
    return f"{s.pick(*PROTOCOLS)}{host}.{s.pick(*DOMAINS)}{path}"


def decimal(s: Source) -> float:
    """A number with one to three decimals, as measurements, prices and coordinates have them."""
    size = s.rng.choice((1, 10, 100, 1000))
    return round(s.rng.uniform(0, size), s.rng.choices((1, 2, 3), (3, 5, 1))[0])
