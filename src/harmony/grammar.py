"""What the assistant's turn may look like, as one Lark grammar over all its tokens.

The engine runs the grammar without knowing Harmony. It begins after `<|start|>assistant`; headers are written as exact
token ids, so the model can only write them in the one form it was trained on: channel-first, with a space before
`<|constrain|>json`. Only a tool's name may be in any tokens that spell it. Bodies are free text, in which no special
token but the message's end can be sampled, or JSON.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

from llguidance import LLMatcher

from src.harmony.vocabulary import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, START, Vocabulary

# One space, or a line break and its indentation: what models write, and bounded, so that no answer ends in blanks.
_WHITESPACE = r"(\n {0,32}| )"
MAX_CHECKED = 10_000  # schemas and grammars known to compile
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


class SchemaError(ValueError):
    """A JSON schema that cannot be enforced. The message is llguidance's reason."""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    name: str
    parameters: Mapping[str, Any] | None
    constrained: bool  # arguments follow `parameters`; otherwise any text
    asked: bool = True  # the client wants them to; else they do as long as the grammar allows it


@dataclass(frozen=True, slots=True)
class TurnSpec:
    """What one request permits."""

    tools: Sequence[ToolSpec] = ()
    must_call: bool = False  # tool_choice required, or a named function
    final_schema: Mapping[str, Any] | None = None  # JSON schema of the final message's body
    reasoning_budget: int | None = (
        None  # tokens of analysis text, after which it is closed; None: no bound
    )


def turn_grammar(spec: TurnSpec, vocabulary: Vocabulary) -> str:
    """-> Lark text for llguidance. Schemas are taken as valid: see check_schema."""

    def ids(text: str) -> str:
        return " ".join(f"<[{token}]>" for token in vocabulary.encode(text))

    again = f"<[{END}]> <[{START}]> {ids('assistant')}"
    constrain = f"<[{CONSTRAIN}]> {ids('json')}"
    endings = [] if spec.must_call else ["final"]
    rules = []
    for number, tool in enumerate(spec.tools):
        name = json.dumps(f".{tool.name} ")
        header = f"<[{CHANNEL}]> {ids('commentary to=functions')} {name} {constrain} <[{MESSAGE}]>"
        rules.append(f"call{number}: {header} arguments{number} <[{CALL}]>")
        body = _json(tool.parameters or _ANY_OBJECT) if tool.constrained else "TEXT"
        rules.append(f"arguments{number}: {body}")
        endings.append(f"call{number}")
    preludes = [] if spec.reasoning_budget == 0 else ["analysis"]
    bounded = "" if spec.reasoning_budget is None else f"[max_tokens={spec.reasoning_budget}]"
    if spec.reasoning_budget != 0:
        rules.append(f"analysis: <[{CHANNEL}]> {ids('analysis')} <[{MESSAGE}]> thinking {again}")
        rules.append(f"thinking{bounded}: TEXT")
    if spec.tools and not spec.must_call:
        preludes.append("preamble")
        rules.append(
            f"preamble: <[{CHANNEL}]> {ids('commentary')} <[{MESSAGE}]> introduction {again}"
        )
        rules.append(f"introduction{bounded}: TEXT")
    if spec.reasoning_budget is None:
        prelude = f"({' | '.join(preludes)})*"
    else:  # each once, so that the bounds add up
        prelude = " ".join(f"{name}?" for name in preludes)
    if not spec.must_call:
        if spec.final_schema is None:
            rules.append(f"final: <[{CHANNEL}]> {ids('final')} <[{MESSAGE}]> answer <[{RETURN}]>")
            rules.append("answer: TEXT")
        else:
            header = f"<[{CHANNEL}]> ({ids('final')} | {ids('final ')} {constrain}) <[{MESSAGE}]>"
            rules.append(f"final: {header} answer <[{RETURN}]>")
            rules.append(f"answer: {_json(spec.final_schema)}")
    start = f"start: {prelude} ({' | '.join(endings)})"
    return "\n".join(["%llguidance {}", start, *rules, r"TEXT: /(?s:.*)/", ""])


def check_schema(schema: Any) -> None:
    """Raises SchemaError, before anything is generated, for a schema that the grammar cannot enforce."""
    try:
        text = json.dumps(schema)
    except (ValueError, RecursionError) as error:
        raise SchemaError(str(error)) from error
    _schemas.once(text, _check_schema_text)


def _check_schema_text(text: str) -> None:
    try:
        grammar = LLMatcher.grammar_from_json_schema(text)
    except (ValueError, RecursionError) as error:
        raise SchemaError(str(error)) from error
    problem = LLMatcher.validate_grammar(grammar, None)
    if problem:
        raise SchemaError(problem.splitlines()[0] if problem.startswith("Unimpl") else problem)


def check_grammar(grammar: str) -> None:
    """Raises SchemaError for a whole turn's grammar that does not compile (too large, say)."""
    _grammars.once(grammar, _check_grammar_text)


def _check_grammar_text(grammar: str) -> None:
    problem = LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(grammar), None)
    if problem:
        raise SchemaError(problem)


class _Checked:
    """What is known to be right, by digest: texts may have megabytes. For several threads."""

    def __init__(self) -> None:
        self._digests: OrderedDict[bytes, None] = OrderedDict()
        self._lock = Lock()

    def once(self, text: str, check: Callable[[str], None]) -> None:
        """`check` raises for what is wrong, which is not remembered."""
        digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
        with self._lock:
            if digest in self._digests:
                self._digests.move_to_end(digest)
                return
        check(text)
        with self._lock:
            self._digests[digest] = None
            if len(self._digests) > MAX_CHECKED:
                self._digests.popitem(last=False)


_schemas, _grammars = _Checked(), _Checked()


def _json(schema: Mapping[str, Any]) -> str:
    guided = {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}
    return f"%json {json.dumps(guided)}"
