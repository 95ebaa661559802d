"""Every output form seen in the wild (numbers as in the project's table), streamed and collected."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss.harmony.deltas import ParsedMessage, ToolCall
from gptoss.harmony.parser import ResponseParser
from gptoss.harmony.render import assistant_text, render_message, tool_call
from gptoss.harmony.special_tokens import CALL, CHANNEL, CONSTRAIN, END, MESSAGE, RETURN, SPECIAL_TOKENS, START
from gptoss.harmony.vocabulary_files import Vocabulary
from tests.support.tiers import sized
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()
TOOLS = ("get_weather", "f", "bash")
C, M, E, S, K, R, X = ["<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|call|>", "<|return|>", "<|constrain|>"]
CALL_F = f"{C}commentary to=functions.f {X}json{M}"
THINK = f"{C}analysis{M}think{E}{S}assistant"


def parse_tokens(
    vocabulary: Vocabulary, token_ids: Iterable[int], tool_names: Collection[str] = (), *, truncated: bool = False
) -> ParsedMessage:
    """Parses a whole answer, through the same deltas as a stream."""
    parser = ResponseParser(vocabulary, tool_names)
    message = ParsedMessage()
    for token_id in token_ids:
        for delta in parser.push(token_id):
            message.add(delta)
    for delta in parser.finish(truncated=truncated):
        message.add(delta)
    return message


def ids(text: str) -> list[int]:
    out: list[int] = []
    for part in re.split(r"(<\|\w+\|>)", text):
        out += [SPECIAL_TOKENS[part]] if part in SPECIAL_TOKENS else VOCABULARY.encode(part)
    return out


@dataclass
class Form:
    number: str
    text: str
    content: str | None = None
    reasoning: str | None = None
    calls: list[tuple[str, str]] = field(default_factory=list)
    truncated: bool = False
    recovered: bool = True


FORMS = [
    Form("0 plain", f"{THINK}{C}final{M}Hi{R}", "Hi", "think", recovered=False),
    Form("0 call", f"{THINK}{CALL_F}{{}}{K}", None, "think", [("f", "{}")], recovered=False),
    Form("1 no message marker", f'{C}final{{"a":1}}{R}', '{"a":1}'),
    Form("1 with space", f"{C}final The answer is 4{R}", "The answer is 4"),
    Form("1 at the end", f"{C}analysis I think", None, "I think"),
    Form("2 plain text", "Just an answer", "Just an answer"),
    Form("2 then a final", f"Some thoughts{E}{S}assistant{C}final{M}Yes{R}", "Yes", "Some thoughts"),
    Form("3 glued", f"{C}finalx{M}Hi{R}", "Hi"),
    Form("3 short", f"{C}comment{M}Hi{R}", "Hi"),
    Form("3 question mark", f"{C}commentary?{M}Hi{R}", "Hi"),
    Form("3 only marks", f"{C}??{M}Hi{R}", "Hi"),
    Form("3 marks, then final", f"{C}??{M}hm{E}{S}assistant{C}final{M}Hi{R}", "Hi", "hm"),
    Form("3 typo", f"{C}anaylsis{M}hm{E}{S}assistant{C}final{M}Hi{R}", "Hi", "hm"),
    Form("3 prose", f"{C}we should{M}do{E}{S}assistant{C}final{M}Hi{R}", "Hi", "we should\ndo"),
    Form("4 doubled", f"{C}commentary to=assistant{C}commentary to=functions.f {X}json{M}{{}}{K}", calls=[("f", "{}")]),
    Form("4 recipient first", f"{C}commentary to=functions.f{C}commentary{M}{{}}{K}", calls=[("f", "{}")]),
    Form("5 in role", f" to=functions.f{C}commentary{M}{{}}{K}", calls=[("f", "{}")], recovered=False),
    Form(
        "5 as role", f"{THINK[:-9]}to=functions.f{C}commentary{M}{{}}{K}", None, "think", [("f", "{}")], recovered=False
    ),
    Form("6 same twice", f"{C}commentary to=functions.f to=functions.f{M}{{}}{K}", calls=[("f", "{}")]),
    Form("6 offered wins", f"{C}commentary to=functions.f to=functions.zzz{M}{{}}{K}", calls=[("f", "{}")]),
    Form(
        "7 junk as text",
        f"{C}commentary to=functions.bash<" + f"|channel|>commentary{M}{{}}{K}",
        calls=[("bash", "{}")],
        reasoning=None,
    ),
    Form("8 glued type", f"{C}commentary to=functions.f{X}json{M}{{}}{K}", calls=[("f", "{}")], recovered=False),
    Form("8 plain json", f"{C}commentary to=functions.f json{M}{{}}{K}", calls=[("f", "{}")], recovered=False),
    Form("8 code", f"{C}commentary to=functions.f code{M}x=1{K}", calls=[("f", "x=1")], recovered=False),
    Form("8 absent", f"{C}commentary to=functions.f{M}{{}}{K}", calls=[("f", "{}")], recovered=False),
    Form(
        "8 channel as type",
        f"{C}commentary to=functions.f {X}commentary{M}{{}}{K}",
        calls=[("f", "{}")],
        recovered=False,
    ),
    Form("9 final json", f'{C}final {X}json{M}{{"a":1}}{R}', '{"a":1}', recovered=False),
    Form(
        "10 prose in header",
        f"{C}commentary to=functions.f {X}json Let me call{M}{{}}{K}",
        None,
        " Let me call",
        [("f", "{}")],
    ),
    Form("11 bare name", f"{C}commentary to=get_weather{M}{{}}{K}", calls=[("get_weather", "{}")], recovered=False),
    Form("12 on analysis", f"{C}analysis to=functions.f{M}{{}}{K}", calls=[("f", "{}")], recovered=False),
    Form("12 on final", f"{C}final to=functions.f{M}{{}}{K}", calls=[("f", "{}")], recovered=False),
    Form("13 return", f'{CALL_F}{{"a":1}}{R}', calls=[("f", '{"a":1}')], recovered=False),
    Form("13 end", f'{CALL_F}{{"a":1}}{E}', calls=[("f", '{"a":1}')], recovered=False),
    Form("13 eos", f'{CALL_F}{{"a":1}}<|endoftext|>', calls=[("f", '{"a":1}')], recovered=False),
    Form("14 cut", f'{CALL_F}{{"a":', calls=[("f", '{"a":')], truncated=True, recovered=False),
    Form("15 builtin", f"{C}commentary to=python{M}print(1){K}", None, "print(1)"),
    Form("15 unknown function", f"{C}commentary to=functions.nope{M}{{}}{K}", None, "{}"),
    Form("15 on final", f"{C}final to=browser.search{M}text{R}", "text"),
    Form("16 to assistant", f"{C}commentary to=assistant{M}Hello{R}", "Hello", recovered=False),
    Form("16 to all", f"{C}commentary to=all{M}Hello{R}", "Hello", recovered=False),
    Form(
        "17 preamble",
        f"{C}commentary{M}Looking.{E}{S}assistant{CALL_F}{{}}{K}",
        "Looking.",
        calls=[("f", "{}")],
        recovered=False,
    ),
    Form(
        "18 same tool twice", f"{CALL_F}1{K}{S}assistant{CALL_F}2{K}", calls=[("f", "1"), ("f", "2")], recovered=False
    ),
    Form(
        "19 analyses and finals",
        f"{THINK}{THINK}{C}final{M}a{E}{S}assistant{C}final{M}b{R}",
        "a\nb",
        "think\nthink",
        recovered=False,
    ),
    Form("20 specials after end", f"{C}final{M}a{E}{R}", "a", recovered=False),
    Form("20 blanks after end", f"{C}final{M}a{E} \n{R}", "a", recovered=False),
    Form("20 text after end", f"{C}analysis{M}a{E}more text{R}", "more text", "a"),
    Form("20 no start", f"{C}analysis{M}a{E}assistant{C}final{M}b{R}", "b", "a"),
    Form("21 two starts", f"{S}{S}assistant{C}final{M}a{R}", "a"),
    Form("21 two assistants", f"assistantassistant{C}final{M}a{R}", "a", recovered=False),
    Form("22 channel as role", f"{S}final{M}a{R}", "a"),
    Form("22 tool as role", f"{S}bash{C}commentary{M}ls{K}", calls=[("bash", "ls")]),
    Form("23 empty channel", f"{C}{M}a{R}", "a"),
    Form("24 start in a body", f"{C}analysis{M}a{S}assistant{C}final{M}b{R}", "b", "a"),
    Form("24 channel in a body", f"{C}analysis{M}a{C}final{M}b{R}", "b", "a"),
    Form("25 tool as channel", f"{C}bash{C}commentary{M}ls{K}", calls=[("bash", "ls")]),
    Form("25 dashes", f"{C}––commentary to=functions.f{M}1{K}", calls=[("f", "1")]),
    Form("27 not json", f"{CALL_F}[1, 2]]{K}", calls=[("f", "[1, 2]]")], recovered=False),
    Form("28 empty arguments", f"{CALL_F}{K}", calls=[("f", "{}")]),
    Form("30 cut in header", f"{THINK}{C}comment", None, "think", truncated=True),
    Form(
        "30 cut in a call's header",
        f"{THINK}{C}commentary to=functions.f {X}",
        None,
        "think",
        truncated=True,
        recovered=False,
    ),
    Form("31 cut in analysis", f"{C}analysis{M}hm", None, "hm", truncated=True, recovered=False),
    Form("32 beyond the stop", f"{C}final{M}a{R}and more{R}{S}assistant{C}final{M}b", "a\nb", "and more"),
]


def streamed(token_ids: list[int], *, truncated: bool = False) -> tuple[ParsedMessage, ResponseParser]:
    parser = ResponseParser(VOCABULARY, TOOLS)
    deltas = [delta for token in token_ids for delta in parser.push(token)]
    return ParsedMessage.fold([*deltas, *parser.finish(truncated=truncated)]), parser


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.number)
def test_form(form: Form) -> None:
    token_ids = ids(form.text)
    collected = parse_tokens(VOCABULARY, token_ids, TOOLS, truncated=form.truncated)
    message, parser = streamed(token_ids, truncated=form.truncated)
    assert message == collected
    assert message.content == form.content
    assert message.reasoning == form.reasoning
    assert message.tool_calls == [ToolCall(*c) for c in form.calls]
    assert bool(parser.recoveries) == form.recovered, dict(parser.recoveries)


def test_29_characters_split_over_tokens_arrive_whole() -> None:
    text = "日本語 🤖👩‍👩‍👧 ŋ"
    token_ids = ids(f"{C}final{M}") + [
        t for char in text.encode() for t in [VOCABULARY.token_bytes.index(bytes([char]))]
    ]
    parser = ResponseParser(VOCABULARY)
    deltas = [d for t in token_ids for d in parser.push(t)]
    assert "".join(d.text for d in deltas) == text
    assert all("\ufffd" not in d.text for d in deltas)
    cut = [d for t in token_ids[:-1] for d in parser.push(t)] + parser.finish()
    assert "".join(d.text for d in cut).endswith("\ufffd")


def test_40_endless_output_keeps_flowing() -> None:
    parser = ResponseParser(VOCABULARY)
    for token in ids("no channel and no end " * 100):
        parser.push(token)
    assert len(ParsedMessage.fold(parser.finish()).content or "") == len("no channel and no end " * 100)


def test_our_own_history_parses_back() -> None:
    written = [
        assistant_text("analysis", "thinking"),
        assistant_text("commentary", "preamble"),
        tool_call("f", '{"a": "<|end|>"}'),
    ]
    token_ids = [t for message in written for t in render_message(message, VOCABULARY)]
    message, parser = streamed(token_ids[1:])
    assert (message.reasoning, message.content) == ("thinking", "preamble")
    assert message.tool_calls == [ToolCall("f", '{"a": "<|end|>"}')]


def test_reasoning_tokens_are_counted_with_their_headers() -> None:
    token_ids = ids(f"{C}analysis{M}a b c")
    _, parser = streamed(token_ids, truncated=True)
    assert parser.num_reasoning_tokens == len(token_ids)


SPECIALS = [START, CHANNEL, MESSAGE, CONSTRAIN, END, CALL, RETURN, 199_999, 199_998, 200_013]
WORDS = VOCABULARY.encode(" quick brown fox jumps over lazy dogs")
HEADERS = [VOCABULARY.encode(t) for t in ("analysis", "commentary", "final", "assistant", " to=functions.f", "json")]


def check_random_sequence(token_ids: list[int]) -> None:
    message, parser = streamed(token_ids)
    assert message == parse_tokens(VOCABULARY, token_ids, TOOLS)
    everything = f"{message.reasoning}\n{message.content}\n{message.tool_calls}"
    for word in WORDS:
        text = VOCABULARY.decode([word]).strip()
        assert everything.count(text) == token_ids.count(word), (text, VOCABULARY.decode(token_ids))


def test_random_sequences_lose_no_text() -> None:
    rng = random.Random(0)
    for _ in range(sized(2_000, nightly=20_000)):
        token_ids: list[int] = []
        for _ in range(rng.randrange(1, 30)):
            kind = rng.random()
            if kind < 0.5:
                token_ids.append(rng.choice(SPECIALS))
            elif kind < 0.7:
                token_ids += rng.choice(HEADERS)
            else:
                token_ids.append(rng.choice(WORDS))
        check_random_sequence(token_ids)


@given(st.lists(st.one_of(st.sampled_from(SPECIALS), st.integers(0, 201_087)), max_size=60), st.booleans())
@settings(max_examples=sized(300, nightly=3_000), deadline=None)
def test_any_tokens_at_all_are_parsed(token_ids: list[int], truncated: bool) -> None:
    message, _ = streamed(token_ids, truncated=truncated)
    assert message == parse_tokens(VOCABULARY, token_ids, TOOLS, truncated=truncated)
