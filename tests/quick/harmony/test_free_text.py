"""Custom tools: what the model is shown, which definitions are refused, and that the turn's grammar enforces the others."""

from __future__ import annotations

import random
import re
from typing import Any

import numpy as np
import pytest
from llguidance import LLTokenizer

from gptoss.engine.core.grammar_matcher import GrammarError, GuidedDecoding
from gptoss.harmony.conversation import FreeText, ToolDefinition
from gptoss.harmony.deltas import ParsedMessage
from gptoss.harmony.free_text import MAX_DEFINITION, FreeTextError, free_text_rule
from gptoss.harmony.grammar import ToolSpec, TurnSpec, turn_grammar
from gptoss.harmony.parser import ResponseParser
from gptoss.harmony.render import render_message, tool_call
from gptoss.harmony.special_tokens import CALL, FIRST_SPECIAL, START
from gptoss.harmony.tool_schema import render_tools
from tests.support.tokenizer import public_tokenizer
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
SINGLE = {bytes([b]): VOCABULARY.token_bytes.index(bytes([b])) for b in range(256)}
# of the shape of the one that Codex sends: aliases, groups, optional parts, an imported terminal, a text without an end
PATCH = r"""start: begin section+ end
begin: "*** Begin" LF
end: "*** End" LF?

section: add | delete   // two kinds
add: "+++ " name LF added+
delete: "--- " name LF
name: /(.+)/
added: ("+" | "@@ ") /(.*)/ LF -> line

%import common.LF
"""
WRITTEN = "*** Begin\n+++ a b.py\n+x = {1}\n@@ \n--- }\n*** End"
FREE = ToolSpec("note", None, False, False, strict=True, text_rule="TEXT")


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return public_tokenizer()


def custom(definition: str, syntax: str = "lark", name: str = "patch") -> ToolSpec:
    rule = free_text_rule(FreeText("lark" if syntax == "lark" else "regex", definition))
    return ToolSpec(name, None, True, True, strict=True, text_rule=rule)


def refused_at(guided: GuidedDecoding, ids: list[int]) -> int:
    """The index of the first token that the grammar does not allow; their number if it allows them all."""
    for index, token in enumerate(ids):
        try:
            guided.advance("r", token)
        except GrammarError:
            return index
    return len(ids)


def is_allowed(tokenizer: LLTokenizer, spec: TurnSpec, name: str, text: str, *, by_byte: bool = False) -> bool:
    """Whether the model may write this call."""
    guided = GuidedDecoding(tokenizer)
    guided.add("r", turn_grammar(spec, VOCABULARY))
    ids = render_message(tool_call(name, text, is_json=False), VOCABULARY)[2:]  # after `<|start|>assistant`
    if by_byte:
        at = len(ids) - 1 - len(VOCABULARY.encode(text))
        ids = [*ids[:at], *(SINGLE[bytes([b])] for b in text.encode()), CALL]
    return refused_at(guided, ids) == len(ids)


def test_a_custom_tool_is_shown_as_one_that_takes_plain_text() -> None:
    tools = [
        ToolDefinition("note", "Writes a note.\nAt once.", free_text=FreeText()),
        ToolDefinition("patch", free_text=FreeText("lark", 'start: "a"\n')),
        ToolDefinition("code", free_text=FreeText("regex", "[0-9]+")),
    ]
    assert render_tools(tools).split("namespace functions {\n\n")[1] == (
        "// Writes a note.\n// At once.\ntype note = (_: string) => any; // plain text, not JSON\n\n"
        '// The text follows this Lark grammar:\n// start: "a"\n'
        "type patch = (_: string) => any; // plain text, not JSON\n\n"
        "// The text follows this regular expression:\n// [0-9]+\n"
        "type code = (_: string) => any; // plain text, not JSON\n\n} // namespace functions"
    )


@pytest.mark.parametrize("by_byte", [False, True])
@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        (WRITTEN, True),
        (WRITTEN + "\n", True),
        (WRITTEN + "\n\n", False),
        (WRITTEN.replace("*** End", "***End"), False),
        (WRITTEN.removesuffix("\n*** End"), False),
        ('{"patch": "*** Begin"}', False),
        ("", False),
    ],
)
def test_a_lark_grammar_is_enforced(tokenizer: LLTokenizer, text: str, allowed: bool, by_byte: bool) -> None:
    spec = TurnSpec([custom(PATCH), FREE])
    assert is_allowed(tokenizer, spec, "patch", text, by_byte=by_byte) is allowed
    assert is_allowed(tokenizer, spec, "note", text, by_byte=by_byte)


@pytest.mark.parametrize(("text", "allowed"), [("42", True), ("", False), ("4 2", False), ("42\n", False)])
def test_a_regular_expression_is_enforced(tokenizer: LLTokenizer, text: str, allowed: bool) -> None:
    spec = TurnSpec([custom("[0-9]+", "regex")], must_call=True, reasoning_budget=0)
    assert is_allowed(tokenizer, spec, "patch", text) is allowed


def test_every_walk_through_the_grammar_is_one_call_of_its_form(tokenizer: LLTokenizer) -> None:
    dates = custom('start: day ("," day)*\nday: /[0-9]{4}/ "-" /[0-9]{2}/', name="dates")
    spec = TurnSpec([dates], must_call=True, reasoning_budget=0)
    for seed in range(3):
        guided, rng = GuidedDecoding(tokenizer), random.Random(seed)
        guided.add("r", turn_grammar(spec, VOCABULARY))
        parser, message = ResponseParser(VOCABULARY, ["dates"], ["dates"]), ParsedMessage()
        token = START
        while token != CALL:
            _, mask = guided.bitmask(["r"])
            allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
            ends = allowed[allowed >= FIRST_SPECIAL]
            token = int(rng.choice(ends if len(ends) and rng.random() < 0.5 or len(ends) == len(allowed) else allowed))
            guided.advance("r", token)
            for delta in parser.push(token):
                message.add(delta)
        assert [call.name for call in message.tool_calls] == ["dates"] and not parser.recoveries
        assert re.fullmatch(r"\d{4}-\d{2}(,\d{4}-\d{2})*", message.tool_calls[0].arguments)


def test_a_definition_has_names_of_its_own(tokenizer: LLTokenizer) -> None:
    """Those of the rules around it among them; what one definition ignores another does not."""
    first = custom('start: TEXT call0\nTEXT: "a"\ncall0: "b"', name="first")
    second = custom('%ignore /[ ]+/\nstart: TEXT TEXT\nTEXT: "c"', name="second")
    spec = TurnSpec([first, second, FREE])
    for name, text, allowed in [
        ("first", "ab", True),
        ("first", "a b", False),
        ("first", "cc", False),
        ("second", "c  c", True),
        ("second", "ab", False),
        ("note", "anything }", True),
    ]:
        assert is_allowed(tokenizer, spec, name, text) is allowed, (name, text)


@pytest.mark.parametrize(
    ("definition", "reason"),
    [
        ("start: <[200012]>", "line 1: special tokens such as '<[200012]>' are not supported"),
        ('start: "a"\n  | <|call|>', "line 2: special tokens such as '<|call|>' are not supported"),
        ("start: foo\nfoo[max_tokens=3]: /.*/", "line 2: attributes of rules, as in 'foo[...]', are not supported"),
        ('start: foo\nfoo [stop="x"]: /.*/', "line 2: unexpected character '='"),
        ('start: %json {"type": "object"}', "line 1: '%json' is not supported; use %import and %ignore"),
        ('start: %lark {\nstart: "a"\n}', "line 1: '%lark' is not supported; use %import and %ignore"),
        ('%llguidance {}\nstart: "a"', "line 1: '%llguidance' is not supported; use %import and %ignore"),
        ('start: "a"\n}\ncall9: "b"', "line 2: a line cannot begin with '}'"),
        ("start: @other", "line 1: unexpected character '@'"),
        ('start: "a\n}\n"', "line 1: unexpected character '\"'"),
        ("start: call0", 'line 1: unknown name: "call0"'),
        ("start: /a(?=b)/", "line 1: look-around, including look-ahead and look-behind, is not supported"),
        ('start: A\nA.2: "x"', "line 2: priority not supported yet"),
        ('rule: "a"', "no start rule found"),
        ("", "Empty grammar"),
        (
            'start: "a' + "b" * MAX_DEFINITION + '"',
            f"it has {MAX_DEFINITION + 10} characters; at most 20000 are allowed",
        ),
    ],
)
def test_what_is_not_supported_is_refused(definition: str, reason: str) -> None:
    with pytest.raises(FreeTextError) as caught:
        free_text_rule(FreeText("lark", definition))
    assert str(caught.value) == reason


@pytest.mark.parametrize("definition", ["(", "a(?=b)", "a\\"])
def test_a_regular_expression_that_does_not_compile_is_refused(definition: str) -> None:
    with pytest.raises(FreeTextError):
        free_text_rule(FreeText("regex", definition))


@pytest.mark.parametrize(
    "definition",
    [
        'start: a["b"] c[d]\na: "x"\nc: "y"\nd: "z"',
        'start: /[0-9]{2,3}/ "c"{2,3} "d"~2 "e"~1..3 "f".."h"',
        'start: "<|call|>" /<\\|call/ "}" /\\}/',
        '?start: _a\n_a: "x" // }\n# }\n!b: "x"i',
        '%import common (INT, WS)\n%ignore WS\nstart: INT "->" INT\n   | "b"\r\n',
    ],
)
def test_what_openai_documents_is_taken(tokenizer: LLTokenizer, definition: str) -> None:
    guided = GuidedDecoding(tokenizer)
    guided.add("r", turn_grammar(TurnSpec([custom(definition)]), VOCABULARY))
    _, masks = guided.bitmask(["r"])
    assert guided.error_of("r") is None and np.frombuffer(masks, np.int32).any()


def test_the_empty_text_of_a_custom_tool_stays_empty() -> None:
    ids = render_message(tool_call("note", "", is_json=False), VOCABULARY)[2:]
    for custom_names, text in ([["note"], ""], [[], "{}"]):
        parser, message = ResponseParser(VOCABULARY, ["note"], custom_names), ParsedMessage()
        for token in ids:
            for delta in parser.push(token):
                message.add(delta)
        assert message.tool_calls[0].arguments == text


@pytest.mark.parametrize(
    ("syntax", "definition"),
    [
        ("lark", "start: a\na: a"),
        ("lark", "start: a\na: b\nb: a"),
        ("lark", r"start: /[^\s\S]/"),
        ("regex", r"[^\s\S]"),
    ],
)
def test_a_definition_that_no_text_follows_is_refused(syntax: Any, definition: str) -> None:
    with pytest.raises(FreeTextError, match="no text follows it"):
        free_text_rule(FreeText(syntax, definition))


@pytest.mark.parametrize("definition", ['start: "x" start', 'start: "a" b\nb: "c" b', 'start: "a"~200000'])
def test_a_definition_that_forces_too_long_a_text_is_refused(definition: str) -> None:
    with pytest.raises(FreeTextError, match="more than 20000 bytes"):
        free_text_rule(FreeText("lark", definition))
