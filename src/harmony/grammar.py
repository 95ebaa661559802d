"""Builds the Lark grammar of the assistant's turn, over all its tokens.

The engine runs the grammar without knowing Harmony. It begins after `<|start|>assistant`; headers are exact token ids,
so the model can only write them in the form it was trained on: channel-first, with a space before `<|constrain|>json`.
Only a tool's name may consist of any tokens that spell it. Bodies are JSON, or free text in which the only special
token that can be sampled is the message's end.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from gptoss.harmony.digest_cache import DigestCache
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.special_tokens import CALL, CHANNEL, CONSTRAIN, END, ENDOFTEXT, MESSAGE, RETURN, START
from gptoss.harmony.vocabulary_files import Vocabulary

# One space, or a line break and indentation, as models write it. Bounded, so that answers cannot end in endless blanks.
_WHITESPACE = r"(\n {0,32}| )"
MAX_CHECKED = 10_000  # grammars known to compile
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True, slots=True)
class ToolSpec:
    name: str
    parameters: Mapping[str, Any] | None  # None: any object
    constrained: bool  # arguments follow `parameters`, or `text_rule`; otherwise any text
    asked: bool = True  # whether the client requested that
    strict: bool = False  # nothing may be relaxed
    text_rule: str | None = None  # of a tool whose text is not JSON: its rule
    is_builtin: bool = False  # called by its name alone, on the analysis channel


@dataclass(frozen=True, slots=True)
class TurnSpec:
    """What the turn of one request may contain."""

    tools: Sequence[ToolSpec] = ()
    must_call: bool = False  # tool_choice required, or a named function
    final_schema: Mapping[str, Any] | None = None  # JSON schema of the final message's body
    final_rule: str | None = None  # the rule of that body if it is not JSON
    reasoning_budget: int | None = None  # maximum tokens of analysis text; None: no limit
    is_opened: bool = True  # whether the prompt ends after `<|start|>assistant`, not at the end of a message

    @property
    def has_free_final(self) -> bool:
        return self.final_schema is None and self.final_rule is None


def turn_grammar(spec: TurnSpec, vocabulary: Vocabulary) -> str:
    """Returns Lark text for llguidance. Its schemas must be enforceable: see schema/enforce.py."""

    def ids(text: str) -> str:
        return " ".join(f"<[{token}]>" for token in vocabulary.encode(text))

    again = f"<[{END}]> <[{START}]> {ids('assistant')}"
    constrain = f"<[{CONSTRAIN}]> {ids('json')}"
    rules = []
    for number, tool in enumerate(spec.tools):
        is_json = tool.text_rule is None
        if tool.is_builtin:
            header = _builtin_header(tool.name, ids)
            rules += [f"call{number}: {header} arguments{number} <[{CALL}]>", f"arguments{number}: {_body(tool)}"]
            continue
        name = json.dumps(f".{tool.name} " if is_json else f".{tool.name}")
        header = f"<[{CHANNEL}]> {ids('commentary to=functions')} {name} {constrain if is_json else ''} <[{MESSAGE}]>"
        rules.append(f"call{number}: {header} arguments{number} <[{CALL}]>")
        rules.append(f"arguments{number}: {_body(tool)}")
    bounded = "" if spec.reasoning_budget is None else f"[max_tokens={spec.reasoning_budget}]"
    if spec.reasoning_budget != 0:
        rules.append(f"analysis: <[{CHANNEL}]> {ids('analysis')} <[{MESSAGE}]> thinking {again}")
        rules.append(f"thinking{bounded}: TEXT")
    if spec.tools and not spec.must_call:
        rules.append(f"preamble: <[{CHANNEL}]> {ids('commentary')} <[{MESSAGE}]> introduction {again}")
        rules.append(f"introduction{bounded}: TEXT")
    if not spec.must_call:
        if spec.final_schema is None:
            rules.append(f"final: <[{CHANNEL}]> {ids('final')} <[{MESSAGE}]> answer <[{RETURN}]>")
            rules.append(f"answer: {spec.final_rule or 'TEXT'}")
        else:
            header = f"<[{CHANNEL}]> ({ids('final')} | {ids('final ')} {constrain}) <[{MESSAGE}]>"
            rules.append(f"final: {header} answer <[{RETURN}]>")
            rules.append(f"answer: {json_rule(spec.final_schema)}")
    start = _turn(spec)
    if not spec.is_opened:
        start = f"<[{START}]> {ids('assistant')} ({start})"
    return _lark(start, rules)


def _builtin_header(name: str, ids: Callable[[str], str]) -> str:
    """The rule of the header of a built-in tool's call.

    The model writes ` code` after the recipient, whatever the text is; it also knows other content types.
    """
    kinds = f'(" code" | " " <[{CONSTRAIN}]> ({ids("json")} | {ids("code")}))?'
    channel = f"({ids('analysis')} | {ids('commentary')})"
    return f"<[{CHANNEL}]> {channel} {json.dumps(f' to={name}')} {kinds} <[{MESSAGE}]>"


def _body(tool: ToolSpec) -> str:
    """The rule of a call's text."""
    if not tool.constrained:
        return "TEXT"
    return tool.text_rule or json_rule(tool.parameters or _ANY_OBJECT)


def text_grammar(rule: str = "TEXT", ends: Sequence[int] = (RETURN, ENDOFTEXT)) -> str:
    """Returns Lark text for one text that follows a rule, and the token that ends it."""
    last = " | ".join(f"<[{token}]>" for token in ends)
    return _lark(f"answer ({last})", [f"answer: {rule}"])


def _lark(start: str, rules: Sequence[str]) -> str:
    return "\n".join(["%llguidance {}", f"start: {start}", *rules, r"TEXT: /(?s:.*)/", ""])


def choice_rule(choices: Sequence[str]) -> str:
    """A rule for one of these texts."""
    return " | ".join(json.dumps(choice) for choice in choices)


def pattern_rule(pattern: str) -> str:
    """A rule for a whole text that a regular expression matches.

    Characters that are operators only in the grammar, `/` and, within a class, `[`, `&` and `~`, are escaped.
    """
    out, at, in_class = [], 0, False
    while at < len(pattern):
        char = pattern[at]
        if char == "\\" and at + 1 < len(pattern):
            char, at = pattern[at : at + 2], at + 1
        elif char == "[" and not in_class:
            in_class = True
            for opening in ("[^]", "[]", "[^"):  # a leading closing bracket is an ordinary character
                if pattern.startswith(opening, at):
                    char, at = opening.replace("]", "\\]"), at + len(opening) - 1
                    break
        elif char == "]":
            in_class = False
        elif char == "/" or (in_class and char in "[&~"):
            char = f"\\{char}"
        out.append(char.replace("\\\n", "\n").replace("\n", "\\n"))
        at += 1
    return f"/{''.join(out)}/" if out else '""'


def _turn(spec: TurnSpec) -> str:
    """The order of messages.

    A preamble is content for the client, so there is none before a final message of a given format, only before calls.
    """
    reasoning = [] if spec.reasoning_budget == 0 else ["analysis"]
    calls = [f"call{number}" for number in range(len(spec.tools))]
    if spec.must_call or not calls:
        return f"{_before(spec, reasoning)} ({' | '.join(calls if spec.must_call else ['final'])})"
    if spec.has_free_final:
        return f"{_before(spec, [*reasoning, 'preamble'])} (final | {' | '.join(calls)})"
    more = "" if spec.reasoning_budget is not None else f"({' | '.join([*reasoning, 'preamble'])})*"
    return f"{_before(spec, reasoning)} (final | (preamble {more})? ({' | '.join(calls)}))"


def _before(spec: TurnSpec, messages: Sequence[str]) -> str:
    """Any number of these messages; with a budget each at most once, so that the limits add up."""
    if spec.reasoning_budget is None:
        return f"({' | '.join(messages)})*"
    return " ".join(f"{name}?" for name in messages)


def fitted_grammar(spec: TurnSpec, vocabulary: Vocabulary) -> tuple[str, tuple[int, ...]]:
    """Returns (Lark text that compiles, indices of the tools whose arguments are relaxed to any object).

    Schemas that are too complex together are relaxed, the largest first. Raises SchemaError if that does not help.
    """
    grammar = turn_grammar(spec, vocabulary)
    strict = "".join(f"{tool.strict:d}" for tool in spec.tools)
    relaxed = _fitted.get(f"{strict} {grammar}", lambda: _too_many(spec, vocabulary, grammar))
    return (turn_grammar(_relaxed(spec, relaxed), vocabulary) if relaxed else grammar), relaxed


def _too_many(spec: TurnSpec, vocabulary: Vocabulary, grammar: str) -> tuple[int, ...]:
    problem = grammar_error(grammar)
    if problem is None:
        return ()
    guided = [n for n, tool in enumerate(spec.tools) if tool.constrained and not tool.strict]
    guided.sort(key=lambda n: len(json.dumps(spec.tools[n].parameters)), reverse=True)
    too_few, enough = 0, len(guided)
    while enough - too_few > 1:
        count = (too_few + enough) // 2
        if grammar_error(turn_grammar(_relaxed(spec, guided[:count]), vocabulary)) is None:
            enough = count
        else:
            too_few = count
    if not guided or grammar_error(turn_grammar(_relaxed(spec, guided[:enough]), vocabulary)):
        raise SchemaError(problem)
    return tuple(sorted(guided[:enough]))


def _relaxed(spec: TurnSpec, numbers: Sequence[int]) -> TurnSpec:
    tools = [replace(t, parameters=_ANY_OBJECT) if n in numbers else t for n, t in enumerate(spec.tools)]
    return replace(spec, tools=tools)


def grammar_error(grammar: str) -> str | None:
    """Why a grammar does not compile, such as its size; None if it does."""
    return LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar), None) or None


def begin_error(grammar: str) -> str | None:
    """Why no text can begin by a Lark grammar without special tokens, as `start: start`; None if one can."""
    matcher = LLMatcher(_byte_tokenizer(), LLMatcher.grammar_from_lark(grammar), log_level=0)
    if len(matcher.compute_ff_bytes()) > MAX_FORCED_BYTES:
        return f"it begins with more than {MAX_FORCED_BYTES} bytes that leave no choice"
    matcher.compute_bitmask()
    return "no text follows it" if matcher.is_error() else None


@functools.cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer("byte")


MAX_FORCED_BYTES = 20_000  # of endless text llguidance sees 25,000
_fitted: DigestCache[tuple[int, ...]] = DigestCache(MAX_CHECKED, sys.maxsize)


def json_rule(schema: Mapping[str, Any]) -> str:
    """A rule for JSON that follows a schema."""
    guided = {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}
    return f"%json {json.dumps(guided)}"
