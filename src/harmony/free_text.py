"""What a custom tool's text must follow, as a rule of the turn's grammar.

A client's Lark grammar stands inside the turn's as `%lark { ... }`, which has names of its own and sees no rule around
it. It is read here token by token and written anew, without comments; what would reach beyond the text is refused:
special tokens, options of the compiler, grammars inside grammars.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from gptoss.harmony.conversation import FreeText
from gptoss.harmony.digest_cache import DigestCache
from gptoss.harmony.grammar import begin_error, grammar_error, pattern_rule, text_grammar

MAX_DEFINITION = 20_000  # characters
MAX_CACHED, MAX_CACHED_CHARS = 1_000, 4 * 2**20
_TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|\#[^\n]*)
    |(?P<text>"(?:[^"\\\n]|\\.)*"i?)
    |(?P<pattern>/(?:[^/\\\n]|\\.)+/[a-z]*)
    |(?P<attributes>^[ \t]*[!?]?[A-Za-z_][A-Za-z_0-9.-]*\[)
    |(?P<statement>%[a-z_]*)
    |(?P<special><[^\s>]*>?)
    |(?P<name>[!?]?[A-Za-z_](?:[A-Za-z_0-9.]|-(?!>))*|[0-9]+)
    |(?P<space>[ \t\r]+)
    |(?P<line>\n)
    |(?P<operator>->|\.\.|[:|()\[\]{},?*+~&.!])
    """,
    re.VERBOSE | re.MULTILINE,
)
_STATEMENTS = ("%import", "%ignore")
_PLACE = re.compile(r"^(?:at )?(?:\d+\(\d+\): )+")


class FreeTextError(ValueError):
    """A definition that cannot be enforced."""


def free_text_rule(wanted: FreeText) -> str:
    """Returns the rule in the grammar's syntax. Raises FreeTextError."""
    if len(wanted.definition) > MAX_DEFINITION:
        raise FreeTextError(f"it has {len(wanted.definition)} characters; at most {MAX_DEFINITION} are allowed")
    if wanted.syntax is None:
        return "TEXT"
    return _rules.get(f"{wanted.syntax} {wanted.definition}", lambda: _compiled(wanted))


def _compiled(wanted: FreeText) -> str:
    if wanted.syntax == "regex":
        rule = pattern_rule(wanted.definition)
        problem = grammar_error(text_grammar(rule))
        if problem is not None:
            raise FreeTextError(_reason(problem).rpartition(": ")[2])
        _check_begin(f"start: {rule}")
        return rule
    definition = lark_definition(wanted.definition)
    rule = f"%lark {{\n{definition}\n}}"
    problem = grammar_error(definition) or grammar_error(text_grammar(rule))
    if problem is not None:
        raise FreeTextError(_reason(problem))
    _check_begin(definition)
    return rule


def _check_begin(grammar: str) -> None:
    problem = begin_error(grammar)
    if problem is not None:
        raise FreeTextError(problem)


def lark_definition(text: str) -> str:
    """Rewrites a Lark grammar line by line. Raises FreeTextError for what is not supported."""
    lines: list[list[str]] = [[]]
    for kind, token in _tokens(text):
        if kind == "line":
            lines.append([])
        else:
            lines[-1].append(token)
    for number, tokens in enumerate(lines, start=1):
        if tokens and tokens[0] in ("}", "{"):
            raise FreeTextError(f"line {number}: a line cannot begin with '{tokens[0]}'")
    return "\n".join("".join(tokens).strip() for tokens in lines)


def _tokens(text: str) -> Iterator[tuple[str, str]]:
    at, line = 0, 1
    while at < len(text):
        found = _TOKEN.match(text, at)
        kind = found.lastgroup if found is not None else None
        token = found[0] if found is not None else text[at]
        problem = _unsupported(kind, token)
        if problem is not None:
            raise FreeTextError(f"line {line}: {problem}")
        line += token == "\n"
        at += len(token)
        if kind == "space":
            yield kind, " "
        elif kind not in (None, "comment"):
            yield str(kind), token


def _unsupported(kind: str | None, token: str) -> str | None:
    match kind:
        case None:
            return f"unexpected character {token!r}"
        case "statement" if token not in _STATEMENTS:
            return f"'{token}' is not supported; use {' and '.join(_STATEMENTS)}"
        case "special":
            return f"special tokens such as {token!r} are not supported"
        case "attributes":
            return f"attributes of rules, as in {token + '...]'!r}, are not supported"
    return None


def _reason(problem: str) -> str:
    """The fault and its line, without the lines of the grammar around it."""
    lines = problem.splitlines()
    place = _PLACE.match(lines[0])
    fault = lines[0][place.end() :] if place is not None else lines[0]
    for line in lines[1:]:
        if line.startswith("error: "):
            fault = line.removeprefix("error: ")
    number = re.search(r"\d+", place[0]) if place is not None else None
    return f"line {number[0]}: {fault}" if number is not None else fault


_rules: DigestCache[str] = DigestCache(MAX_CACHED, MAX_CACHED_CHARS)
