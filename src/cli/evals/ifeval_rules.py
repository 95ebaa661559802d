"""IFEval's 25 instructions, each a check of a text, by the names and arguments of the published file.

Sentences are counted by punctuation, not by a trained splitter, so that nothing is downloaded; languages by langdetect.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Check = Callable[..., bool]
SENTENCE_END = re.compile(r"(?<!\b[A-Z])(?<!\bDr)(?<!\bMr)(?<!\bMs)(?<!\bMrs)(?<!\bSt)[.!?]+[\"')\]]*(?=\s|$)")
WORD = re.compile(r"\w+")
BULLET = re.compile(r"^\s*(?:\*(?!\*)|-)\s*\S.*$", re.MULTILINE)
HIGHLIGHT = re.compile(r"\*{2}[^\n*]+\*{2}|\*[^\n*]+\*")
TITLE = re.compile(r"<<[^\n]+>>")
PLACEHOLDER = re.compile(r"\[.*?\]")
OPTIONS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compared(found: int, relation: str | None, wanted: int) -> bool:
    """Returns whether the count keeps the relation, `at least` or `less than`."""
    return found < wanted if relation == "less than" else found >= wanted


def _occurrences(text: str, word: str) -> int:
    return len(re.findall(re.escape(word), text, re.IGNORECASE))


def _has_keywords(text: str, keywords: list[str]) -> bool:
    return all(_occurrences(text, word) for word in keywords)


def _keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compared(_occurrences(text, keyword), relation, frequency)


def _no_forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compared(text.lower().count(letter.lower()), let_relation, let_frequency)


def _in_language(text: str, language: str) -> bool:
    import langdetect

    langdetect.DetectorFactory.seed = 0
    try:
        return bool(langdetect.detect(text) == language)
    except langdetect.LangDetectException:  # no letters: the reference counts it as followed
        return True


def _number_of_sentences(text: str, num_sentences: int, relation: str) -> bool:
    ends = list(SENTENCE_END.finditer(text))
    rest = text[ends[-1].end() :] if ends else text
    return _compared(len(ends) + bool(rest.strip()), relation, num_sentences)


def _number_of_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", text)
    inner = parts[1:-1]
    return all(part.strip() for part in inner) and sum(bool(part.strip()) for part in parts) == num_paragraphs


def _number_of_words(text: str, num_words: int, relation: str) -> bool:
    return _compared(len(WORD.findall(text)), relation, num_words)


def _first_word_of_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    paragraphs = [part for part in re.split(r"\n\n", text) if part.strip()]
    if len(paragraphs) != num_paragraphs or not 0 < nth_paragraph <= len(paragraphs):
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'\"")
    return re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(PLACEHOLDER.findall(text)) >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    marks = {"P.P.S": r"\s*p\.\s?p\.\s?s", "P.S.": r"\s*p\.\s?s\."}
    pattern = marks.get(postscript_marker, rf"\s*{re.escape(postscript_marker.lower())}")
    return re.search(pattern, text.lower()) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    return len(BULLET.findall(text)) == num_bullets


def _highlights(text: str, num_highlights: int) -> bool:
    return sum(bool(found.strip("*").strip()) for found in HIGHLIGHT.findall(text)) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def _is_json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(inner)
    except ValueError:
        return False
    return True


def _has_title(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in TITLE.findall(text))


def _two_responses(text: str) -> bool:
    parts = text.split("******")
    inner = [part.strip() for index, part in enumerate(parts) if part.strip() or 0 < index < len(parts) - 1]
    return len(inner) == 2 and inner[0] != inner[1] and all(inner)


def _repeats_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends_with(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _is_quoted(text: str) -> bool:
    return len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = [word for word in re.findall(r"[\w'-]+", text) if word.isupper()]
    return _compared(len(words), capital_relation, capital_frequency)


CHECKS: dict[str, Check] = {
    "keywords:existence": _has_keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _no_forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _in_language,
    "length_constraints:number_sentences": _number_of_sentences,
    "length_constraints:number_paragraphs": _number_of_paragraphs,
    "length_constraints:number_words": _number_of_words,
    "length_constraints:nth_paragraph_first_word": _first_word_of_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": lambda text: any(option in text for option in OPTIONS),
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _has_title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _is_quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda text: text.isupper() and _in_language(text, "en"),
    "change_case:english_lowercase": lambda text: text.islower() and _in_language(text, "en"),
    "punctuation:no_comma": lambda text: "," not in text,
}


def follows(name: str, text: str, arguments: dict[str, Any]) -> bool:
    """Returns whether a text follows an instruction; an empty one follows none.

    `arguments`: of the published file; those that are null are left out.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    return bool(text.strip()) and CHECKS[name](text, **given)
