"""One choice: text, logprobs and stop strings over several messages."""

from __future__ import annotations

import pytest

from gptoss.engine.messages import FinishReason, TokenLogprobs, TokenOutput
from gptoss.generation.chat_output import ChatChoice, ChatDelta
from gptoss.harmony.parser import ResponseParser
from gptoss.harmony.special_tokens import CALL, CHANNEL, END, MESSAGE, RETURN, START
from tests.support.vocabulary import public_vocabulary

VOCABULARY = public_vocabulary()


def message(channel: str, text: str, end: int) -> list[int]:
    encode = VOCABULARY.encode
    return [CHANNEL, *encode(channel), MESSAGE, *encode(text), end]


def turn(*messages: list[int]) -> list[int]:
    out: list[int] = []
    for ids in messages:
        out += ([START, *VOCABULARY.encode("assistant")] if out else []) + ids
    return out


def answer(ids: list[int], stops: list[str], batch: int) -> tuple[str, bytes, ChatChoice]:
    """-> (content, bytes of the entries of logprobs, the choice)."""
    choice = ChatChoice(0, ResponseParser(VOCABULARY, ["f"]), stops, VOCABULARY.bytes_of)
    deltas: list[ChatDelta] = []
    for first in range(0, len(ids), batch):
        part = ids[first : first + batch]
        last = first + batch >= len(ids)
        numbers = [TokenLogprobs(-0.5, []) for _ in part]
        reason = FinishReason.STOP if last else None
        deltas += choice.feed(TokenOutput("r", part, logprobs=numbers, finish_reason=reason))
        if choice.finish_reason is not None:
            break
    content = [item for item in deltas if item.delta.kind == "content"]
    entries = [entry for item in content for entry in item.logprobs or []]
    text = "".join(item.delta.text for item in content)
    return text, b"".join(bytes(entry["bytes"]) for entry in entries), choice


PREAMBLE = message("commentary", "I look it up.", END)
ANALYSIS = message("analysis", "Hm.", END)
FINAL = message("final", "It is 17 degrees in Paris.", RETURN)
CALLS = [CHANNEL, *VOCABULARY.encode("commentary to=functions.f <json"), MESSAGE, CALL]


@pytest.mark.parametrize("batch", [1, 3, 100])
@pytest.mark.parametrize(
    ("ids", "stops", "content"),
    [
        (turn(FINAL), [" degrees"], "It is 17"),
        (turn(PREAMBLE, FINAL), [" degrees"], "I look it up.\nIt is 17"),
        (turn(ANALYSIS, PREAMBLE, ANALYSIS, FINAL), ["grees"], "I look it up.\nIt is 17 de"),
        (turn(PREAMBLE, PREAMBLE, FINAL), ["7"], "I look it up.\nI look it up.\nIt is 1"),
        (turn(PREAMBLE, FINAL), ["\nIt"], "I look it up."),
        (turn(PREAMBLE, FINAL), ["never"], "I look it up.\nIt is 17 degrees in Paris."),
        (turn(PREAMBLE, FINAL), [], "I look it up.\nIt is 17 degrees in Paris."),
    ],
)
def test_logprobs_end_where_the_content_ends(ids: list[int], stops: list[str], content: str, batch: int) -> None:
    text, logged, choice = answer(ids, stops, batch)
    assert text == content and choice.finish_reason == "stop"
    assert logged.decode() == content.replace("\n", "")  # no token stands for the line breaks


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize(
    ("ids", "reason", "content"),
    [
        ([*VOCABULARY.encode(" 17 degrees."), RETURN], FinishReason.STOP, " 17"),
        (VOCABULARY.encode(" 1"), FinishReason.LENGTH, " 1"),
        ([RETURN], FinishReason.STOP, ""),
        ([], FinishReason.ABORT, ""),
    ],
)
def test_a_final_that_the_prompt_has_begun_goes_on(
    ids: list[int], reason: FinishReason, content: str, joins: bool
) -> None:
    parser = ResponseParser(VOCABULARY, ["f"])
    parser.open_final()
    choice = ChatChoice(0, parser, [" degrees"], VOCABULARY.bytes_of, joins_messages=joins)
    numbers = [TokenLogprobs(-0.5, []) for _ in ids]
    deltas = choice.feed(TokenOutput("r", ids, logprobs=numbers, finish_reason=reason))
    assert "".join(item.delta.text for item in deltas) == content
    entries = [entry for item in deltas for entry in item.logprobs or []]
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == content
    assert [channel for channel, _ in choice.messages] == ["final"]
