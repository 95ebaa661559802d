"""Random walks under the mask: whatever the grammar lets through is Harmony, and what it must hold back it does."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from llguidance import LLTokenizer

from gptoss.engine.core import grammar_matcher as guided_module
from gptoss.engine.core.grammar_matcher import GrammarError, GuidedDecoding, compile_grammar
from gptoss.engine.sampling_params import LoopGuard
from gptoss.harmony import grammar as grammar_module
from gptoss.harmony.deltas import ParsedMessage
from gptoss.harmony.grammar import ToolSpec, TurnSpec, fitted_grammar, grammar_error, turn_grammar
from gptoss.harmony.parser import ResponseParser
from gptoss.harmony.schema.checks import SchemaError
from gptoss.harmony.special_tokens import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    FIRST_SPECIAL,
    RETURN,
    SPECIAL_TOKENS,
    STOP_TOKEN_IDS,
)
from tests.support.tiers import sized
from tests.support.tokenizer import public_tokenizer
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
QUOTE, BRACKET = VOCABULARY.rank_of[b'"'], VOCABULARY.rank_of[b"]"]
ORDER = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
        "note": {"anyOf": [{"type": "string", "maxLength": 8}, {"type": "null"}]},
        "nested": {"$ref": "#/$defs/Point"},
    },
    "required": ["id", "tags", "note", "nested"],
    "additionalProperties": False,
    "$defs": {
        "Point": {
            "type": "object",
            "properties": {"x": {"type": "number"}},
            "required": ["x"],
            "additionalProperties": False,
        }
    },
}
WEATHER = ToolSpec(
    "get_weather",
    {"type": "object", "properties": {"city": {"type": "string", "maxLength": 10}}, "required": ["city"]},
    True,
)
FREE = ToolSpec("free-form", None, False)
SEEDS = sized(4, nightly=12)


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return public_tokenizer()


def walk(
    tokenizer: LLTokenizer, spec: TurnSpec, seed: int, limit: int = 400
) -> tuple[list[int], ResponseParser, ParsedMessage]:
    """Picks at random among the allowed tokens; endings are preferred after a while, as a real model would."""
    guided = GuidedDecoding(tokenizer)
    guided.add("r", turn_grammar(spec, VOCABULARY))
    parser = ResponseParser(VOCABULARY, [t.name for t in spec.tools])
    rng, out, message = random.Random(seed), [], ParsedMessage()
    while len(out) < limit:
        _, mask = guided.bitmask(["r"])
        allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
        special = allowed[allowed >= FIRST_SPECIAL]
        pick_special = len(special) and (len(special) == len(allowed) or rng.random() < 0.15)
        token = int(rng.choice(special if pick_special else allowed[allowed < FIRST_SPECIAL]))
        guided.advance("r", token)
        out.append(token)
        for delta in parser.push(token):
            message.add(delta)
        if token in STOP_TOKEN_IDS:
            break
    for delta in parser.finish(truncated=out[-1] not in STOP_TOKEN_IDS):
        message.add(delta)
    return out, parser, message


SPECS = {
    "plain": TurnSpec(),
    "budget": TurnSpec(reasoning_budget=5),
    "no reasoning": TurnSpec(reasoning_budget=0),
    "schema": TurnSpec(final_schema=ORDER, reasoning_budget=4),
    "object": TurnSpec(final_schema={"type": "object"}, reasoning_budget=0),
    "tools": TurnSpec([WEATHER, FREE]),
    "required": TurnSpec([WEATHER, FREE], must_call=True, reasoning_budget=6),
    "tools and schema": TurnSpec([WEATHER], final_schema=ORDER, reasoning_budget=3),
}


@pytest.mark.parametrize("name", SPECS)
def test_random_walks_are_wellformed(tokenizer: LLTokenizer, name: str) -> None:
    spec = SPECS[name]
    finished = 0
    for seed in range(SEEDS):
        out, parser, message = walk(tokenizer, spec, seed)
        assert not parser.recoveries - Counter(empty_arguments=1), (dict(parser.recoveries), VOCABULARY.decode(out))
        if out[-1] not in STOP_TOKEN_IDS:
            continue
        finished += 1
        if message.tool_calls:
            assert out[-1] == CALL and spec.tools
            call = message.tool_calls[-1]
            if call.name == "get_weather":
                jsonschema.validate(json.loads(call.arguments), WEATHER.parameters or {})
        else:
            assert out[-1] == RETURN and not spec.must_call
            if spec.final_schema is not None:
                jsonschema.validate(json.loads(message.content or ""), spec.final_schema)
    if name == "object":  # rarely ends by chance
        assert finished >= sized(0, nightly=1)
    else:
        assert finished >= SEEDS // 2


def test_the_budget_closes_the_analysis(tokenizer: LLTokenizer) -> None:
    spec = TurnSpec(reasoning_budget=7)
    for seed in range(20):
        _, _, message = walk(tokenizer, spec, seed, limit=60)
        assert len(VOCABULARY.encode(message.reasoning or "")) <= 3 * 7


def test_only_offered_tools_can_be_called(tokenizer: LLTokenizer) -> None:
    guided = GuidedDecoding(tokenizer)
    guided.add("r", turn_grammar(TurnSpec([WEATHER]), VOCABULARY))
    for token in VOCABULARY.encode_with_special("<|channel|>commentary to=functions.get"):
        guided.advance("r", token)
    with pytest.raises(GrammarError):
        for token in VOCABULARY.encode("_stock"):
            guided.advance("r", token)


def test_without_tools_there_is_no_commentary(tokenizer: LLTokenizer) -> None:
    guided = GuidedDecoding(tokenizer)
    guided.add("r", turn_grammar(TurnSpec(), VOCABULARY))
    guided.advance("r", SPECIAL_TOKENS["<|channel|>"])
    _, mask = guided.bitmask(["r"])
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))
    assert {VOCABULARY.decode([int(t)]) for t in allowed} == {"analysis", "final"}


def test_every_spec_compiles_without_a_tokenizer() -> None:
    for spec in SPECS.values():
        assert grammar_error(turn_grammar(spec, VOCABULARY)) is None
        assert fitted_grammar(spec, VOCABULARY) == (turn_grammar(spec, VOCABULARY), ())


def test_many_large_patterns_compile(tokenizer: LLTokenizer) -> None:
    patterns = " | ".join(rf"/(\p{{L}}\p{{N}}|\p{{Lu}}x){{1,{900 + n}}}/" for n in range(50))
    guided = GuidedDecoding(tokenizer)
    guided.add("r", f"start: {patterns}")
    for token in VOCABULARY.encode("a1Äx"):
        guided.advance("r", token)
    assert VOCABULARY.encode("b")[0] in allowed_tokens(guided)


@pytest.mark.parametrize("budget", [None, 0, 3])
def test_before_a_final_with_a_schema_a_preamble_only_leads_to_a_call(
    tokenizer: LLTokenizer, budget: int | None
) -> None:
    started = VOCABULARY.encode_with_special("<|channel|>commentary<|message|>")
    ended = VOCABULARY.encode_with_special("<|end|><|start|>assistant<|channel|>")
    for schema, channels in ((ORDER, {"comment"}), (None, {"comment", "final"})):
        guided = GuidedDecoding(tokenizer)
        spec = TurnSpec([WEATHER], final_schema=schema, reasoning_budget=budget)
        guided.add("r", turn_grammar(spec, VOCABULARY))
        assert "final" in channels_after(guided, [CHANNEL])
        for token in started[1:]:
            guided.advance("r", token)
        assert channels_after(guided, ended) - {"analysis"} == channels


def channels_after(guided: GuidedDecoding, token_ids: list[int]) -> set[str]:
    for token in token_ids:
        guided.advance("r", token)
    return {VOCABULARY.decode([token]) for token in allowed_tokens(guided)}


def test_the_largest_tools_are_relaxed_where_all_are_too_complex(monkeypatch: pytest.MonkeyPatch) -> None:
    def schema(size: int) -> dict[str, Any]:
        return {"type": "object", "properties": {"p" * size: {"type": "string"}}}

    tools = [ToolSpec(f"t{n}", schema(size), True) for n, size in enumerate((50, 900, 10, 500, 700))]
    tools.append(replace(tools[1], name="strict", strict=True))
    tools.append(ToolSpec("free", None, False))
    monkeypatch.setattr(grammar_module, "grammar_error", lambda text: "too large" if len(text) > 3500 else None)
    grammar, relaxed = fitted_grammar(TurnSpec(tools), VOCABULARY)
    assert relaxed == (1, 4) and len(grammar) <= 3500
    assert '"' + "p" * 500 + '"' in grammar and grammar.count("p" * 900) == 1
    assert fitted_grammar(TurnSpec(tools), VOCABULARY) == (grammar, relaxed)
    with pytest.raises(SchemaError, match="too large"):
        fitted_grammar(TurnSpec([replace(tool, strict=True) for tool in tools]), VOCABULARY)


def test_a_grammar_that_does_not_compile_is_an_error(tokenizer: LLTokenizer) -> None:
    with pytest.raises(GrammarError):
        GuidedDecoding(tokenizer).add("r", "start: nonsense(")


@pytest.mark.parametrize(
    ("beginning", "expected"),
    [
        ("<|channel|>analysis<|message|>", END),
        ("<|channel|>final<|message|>", RETURN),
        ("<|channel|>commentary to=functions.free-form <|constrain|>json<|message|>", CALL),
        ('<|channel|>commentary to=functions.note <|constrain|>json<|message|>{"text": "', QUOTE),
        ('<|channel|>commentary to=functions.plot <|constrain|>json<|message|>{"of": [1', BRACKET),
    ],
)
def test_the_loop_guard_ends_what_repeats_itself(tokenizer: LLTokenizer, beginning: str, expected: int) -> None:
    guard = LoopGuard(repeats=4, break_token_ids=(END, RETURN, CALL, QUOTE, BRACKET), max_period=8)
    run = VOCABULARY.encode(", 7, 8" if expected == BRACKET else " round and")
    text, numbers = {"type": "string"}, {"type": "array", "items": {"type": "number"}}
    note = {"type": "object", "properties": {"text": text}, "required": ["text"]}
    plot = {"type": "object", "properties": {"of": numbers}, "required": ["of"]}
    tools = (ToolSpec("note", note, True), ToolSpec("plot", plot, True), FREE)
    guided = GuidedDecoding(tokenizer)
    guided.add("r", turn_grammar(TurnSpec(tools=tools), VOCABULARY), guard)
    for token in VOCABULARY.encode_with_special(beginning):
        guided.advance("r", token)
    for token in run * 3:
        guided.advance("r", token)
    assert len(allowed_tokens(guided)) > (10 if expected == BRACKET else 1000)
    for token in run:
        guided.advance("r", token)
    assert allowed_tokens(guided) == [expected]
    guided.advance("r", expected)
    if expected not in (RETURN, CALL):
        assert allowed_tokens(guided) != [expected], "the count begins anew"


@pytest.mark.parametrize("many", [2, 100])
def test_requests_masks_are_the_same_together_and_alone(
    tokenizer: LLTokenizer, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guided_module, "MIN_THREADED_MASKS", many)
    guided = GuidedDecoding(tokenizer)
    analysis = VOCABULARY.encode_with_special("<|channel|>analysis<|message|>")
    guard = LoopGuard(repeats=3, break_token_ids=(END,), max_period=4)
    written = {
        "new": [],
        "tools": [CHANNEL],
        "analysis": analysis,
        "looping": [*analysis, *VOCABULARY.encode(" so") * 3],
        "ended": VOCABULARY.encode_with_special("<|channel|>final<|message|>Yes<|return|>"),
    }
    for name, token_ids in written.items():
        spec = SPECS["required"] if name == "tools" else TurnSpec()
        guided.add(name, turn_grammar(spec, VOCABULARY), guard)
        for token in token_ids:
            guided.advance(name, token)
    drafts = {"analysis": VOCABULARY.encode(" and more")}
    ids, masks = guided.bitmask([*written, "unknown"], drafts)
    assert ids == ["new", "tools", *["analysis"] * 3, "looping"]
    alone = [guided.bitmask([name], drafts)[1] for name in dict.fromkeys(ids)]
    assert bytes(masks) == b"".join(alone)
    assert len({bytes(mask) for mask in alone}) == len(alone)
    assert guided.bitmask(["ended", "unknown"])[0] == []


TOO_MUCH = {"type": "string", "pattern": "^.{0,3000}[ab].{3000}$"}  # states without end


@pytest.mark.parametrize("many", [1, 100])
def test_a_mask_that_takes_too_much_work_forbids_everything(
    tokenizer: LLTokenizer, many: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llguidance's own would allow what ends the turn: a cut answer would pass for a whole one."""
    monkeypatch.setattr(guided_module, "MIN_THREADED_MASKS", many)
    guided = GuidedDecoding(tokenizer)
    guided.add("r", turn_grammar(TurnSpec(final_schema=TOO_MUCH, reasoning_budget=0), VOCABULARY))
    for token in VOCABULARY.encode_with_special('<|channel|>final<|message|>"'):
        guided.advance("r", token)
    text = VOCABULARY.encode("a bat and a cab " * 40)
    for token in text:
        if not allowed_tokens(guided):
            break
        assert guided.error_of("r") is None
        guided.advance("r", token)
    assert guided.error_of("r") is not None
    assert allowed_tokens(guided) == []
    assert not any(guided.bitmask(["r"], {"r": text[:2]})[1])
    with pytest.raises(GrammarError):
        guided.advance("r", RETURN)


def test_objects_of_many_optional_properties_are_enforced(tokenizer: LLTokenizer) -> None:
    names = [
        f"{word}_{number}"
        for number in range(120)
        for word in ("red", "blue", "old", "tall", "new", "sad", "wet", "raw")
    ]
    schema = {"type": "object", "properties": dict.fromkeys(names, {"type": "integer"}), "additionalProperties": False}
    guided = GuidedDecoding(tokenizer)
    guided.add("r", turn_grammar(TurnSpec(final_schema=schema, reasoning_budget=0), VOCABULARY))
    value = '{"blue_0": 1, "sad_77": 2, "raw_119": 3}'
    for token in VOCABULARY.encode_with_special(f"<|channel|>final<|message|>{value}<|return|>"):
        assert token in allowed_tokens(guided)
        guided.advance("r", token)
    assert guided.error_of("r") is None


def allowed_tokens(guided: GuidedDecoding) -> list[int]:
    _, mask = guided.bitmask(["r"])
    bits = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
    return [int(t) for t in np.flatnonzero(bits)]


@pytest.mark.parametrize(
    "written", [[".get", "_weather", " "], [".", "get", "_weather", " "], [".", "g", "et", "_weather", " "]]
)
def test_a_tools_name_may_be_in_any_tokens_that_spell_it(tokenizer: LLTokenizer, written: list[str]) -> None:
    """What is forced once one tool is left is written as the vocabulary splits it."""
    guided = GuidedDecoding(tokenizer)
    guided.add("r", turn_grammar(SPECS["required"], VOCABULARY))
    header = [CHANNEL, *VOCABULARY.encode("commentary to=functions")]
    for token in (*header, *(VOCABULARY.rank_of[part.encode()] for part in written), CONSTRAIN):
        _, mask = guided.bitmask(["r"])
        allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little")
        assert allowed[token]
        assert not allowed[VOCABULARY.rank_of[b"ting"]]
        guided.advance("r", token)


def test_compiled_grammars_are_bounded_by_bytes(tokenizer: LLTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_too(tokenizer: LLTokenizer, grammar: str) -> Any:
        compiled.append(grammar)
        return compile_grammar(tokenizer, grammar)

    monkeypatch.setattr(guided_module, "compile_grammar", compile_too)
    monkeypatch.setattr(guided_module, "MAX_COMPILED_BYTES", 1_000_000)
    guided = GuidedDecoding(tokenizer)
    small = [f"start: /[a-f]{{{size}}}/" for size in range(1, 9)]
    for grammar in [*small, *small[-4:], small[0]]:
        guided.add("r", grammar)
    assert compiled == [*small, small[0]], "the latest are kept, the oldest is not"
    large = f"start: /{'a' * 50_000}/"
    for grammar in [large, large, small[0]]:
        guided.add("r", grammar)
    assert compiled[len(small) + 1 :] == [large, small[0]], "one is kept however large it is"
