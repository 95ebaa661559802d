"""Full-text ranking of documents by BM25 (Robertson and Zaragoza 2009), and their best passages."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"  # written without spaces: each character is a word
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")
K1, B = 1.2, 0.75
TITLE_WEIGHT = 3  # a word of the title counts as this many of the text
PASSAGE_CHARS = 300
K = TypeVar("K", bound=Hashable)


def words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@dataclass(frozen=True, slots=True)
class Indexed:
    """What is kept of a document's words."""

    counts: Mapping[str, int]
    length: int

    @classmethod
    def of(cls, title: str, text: str) -> Indexed:
        counts = Counter(words(text))
        for word in words(title):
            counts[word] += TITLE_WEIGHT
        return cls(dict(counts), counts.total())


def term_weights(query: str, documents: Collection[Indexed]) -> dict[str, float]:
    """The weight of each word of a query that a document has: rare words weigh more."""
    having = {term: sum(term in one.counts for one in documents) for term in dict.fromkeys(words(query))}
    return {
        term: math.log(1 + (len(documents) - count + 0.5) / (count + 0.5)) for term, count in having.items() if count
    }


def ranked(weights: Mapping[str, float], documents: Mapping[K, Indexed]) -> list[K]:
    """The documents that have one of the words, the best first."""
    if not weights:
        return []
    average = sum(one.length for one in documents.values()) / len(documents)
    scores = {key: _score(one, weights, average) for key, one in documents.items()}
    return sorted((key for key, score in scores.items() if score > 0), key=lambda key: -scores[key])


def _score(one: Indexed, weights: Mapping[str, float], average: float) -> float:
    norm = K1 * (1 - B + B * one.length / average)
    found = ((one.counts.get(term, 0), weight) for term, weight in weights.items())
    return sum(weight * count * (K1 + 1) / (count + norm) for count, weight in found if count)


def best_passage(weights: Mapping[str, float], lines: Sequence[str]) -> str:
    """The text from the first of those lines on that have the most of the words, by weight."""
    best, best_score, most = 0, -1.0, sum(weights.values())
    for index in range(len(lines)):
        found = set(words(_joined(lines[index : index + 4])))
        score = sum(weight for word, weight in weights.items() if word in found)
        if score > best_score + 1e-9:
            best, best_score = index, score
            if score > most - 1e-9:
                break
    while best < len(lines) - 1 and not weights.keys() & set(words(lines[best])):
        best += 1
    return _joined(lines[best:], PASSAGE_CHARS)


def _joined(lines: Iterable[str], max_chars: int = 10_000) -> str:
    text = ""
    for line in lines:
        text += f"{line} "
        if len(text) > max_chars:
            return text[:max_chars].rsplit(" ", 1)[0]
    return text.strip()
