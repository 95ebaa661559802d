"""`echo` with `logprobs`: how likely a model finds a given text, as evaluations ask for it."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.support.server_process import ServerProcess
from tests.support.vocabulary import public_vocabulary

MODEL = "gpt-oss-nano"
VOCABULARY = public_vocabulary()
TEXT = "Zwölf Boxkämpfer jagen <|start|> Viktor 🦊 über den großen Sylter Deich. " * 12


def complete(server: ServerProcess, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "temperature": 0, "ignore_eos": True} | fields
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def streamed(server: ServerProcess, **fields: Any) -> list[dict[str, Any]]:
    """The chunks' choices."""
    body = {"model": MODEL, "temperature": 0, "ignore_eos": True, "stream": True} | fields
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
        chunks = [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: {")]
    return [choice for chunk in chunks for choice in chunk["choices"]]


def test_a_text_scored_has_the_logprobs_that_it_was_written_with(server: ServerProcess) -> None:
    prompt = VOCABULARY.encode("Once upon a time")
    written = complete(server, prompt=prompt, max_tokens=12, logprobs=3)["choices"][0]["logprobs"]
    whole = "Once upon a time" + "".join(written["tokens"])
    ids = prompt + [VOCABULARY.rank_of[t.encode()] for t in written["tokens"]]
    choice = complete(server, prompt=ids, max_tokens=0, logprobs=3, echo=True)["choices"][0]
    scored = choice["logprobs"]
    assert choice["text"] == whole and choice["finish_reason"] == "length"
    assert len(scored["tokens"]) == len(ids)
    assert scored["token_logprobs"][0] is None and scored["top_logprobs"][0] is None
    end = len(prompt)
    assert scored["tokens"][end:] == written["tokens"]
    assert scored["token_logprobs"][end:] == pytest.approx(written["token_logprobs"], abs=1e-3)
    for one, other in zip(scored["top_logprobs"][end:], written["top_logprobs"], strict=True):
        assert one == pytest.approx(other, abs=1e-3)


@pytest.mark.parametrize("max_tokens", [0, 1, 7])
def test_tokens_lie_where_the_text_has_them(server: ServerProcess, max_tokens: int) -> None:
    ids = VOCABULARY.encode_with_special(TEXT)
    answer = complete(server, prompt=TEXT, max_tokens=max_tokens, logprobs=1, echo=True)
    choice = answer["choices"][0]
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["usage"]["completion_tokens"] == max_tokens
    assert choice["text"].startswith(TEXT) and (choice["text"] == TEXT) == (max_tokens == 0)
    numbers = choice["logprobs"]
    assert {len(entries) for entries in numbers.values()} == {len(ids) + max_tokens}
    ends = [*numbers["text_offset"][1:], None]
    for token, start, end in zip(numbers["tokens"], numbers["text_offset"], ends, strict=True):
        if not token.startswith("bytes:"):
            assert choice["text"][start:end] == token
    if max_tokens:
        assert numbers["text_offset"][len(ids)] == len(TEXT)
    # what evaluations compare: is each token the likeliest one?
    for token, top, logprob in list(
        zip(numbers["tokens"], numbers["top_logprobs"], numbers["token_logprobs"], strict=True)
    )[1:]:
        ((best, highest),) = top.items()
        assert logprob <= highest + 1e-4 and (token != best or logprob == pytest.approx(highest))


def test_a_stream_tells_the_same(server: ServerProcess) -> None:
    fields: Any = {"prompt": [TEXT, "b"], "n": 2, "seed": 4, "max_tokens": 3, "logprobs": 2, "echo": True}
    whole = complete(server, **fields)["choices"]
    texts, numbers, reasons = [""] * 4, [{} for _ in range(4)], [None] * 4
    for choice in streamed(server, **fields):
        place = choice["index"]
        assert reasons[place] is None, "nothing comes after the end"
        texts[place] += choice["text"]
        reasons[place] = choice["finish_reason"]
        for name, entries in choice["logprobs"].items():
            numbers[place].setdefault(name, []).extend(entries)
    assert [(c["text"], c["finish_reason"]) for c in whole] == list(zip(texts, reasons, strict=True))
    for choice, found in zip(whole, numbers, strict=True):
        for name in ("tokens", "text_offset"):
            assert choice["logprobs"][name] == found[name]
        assert found["token_logprobs"][1:] == pytest.approx(choice["logprobs"]["token_logprobs"][1:], abs=1e-3)


def test_without_logprobs_nothing_is_scored(server: ServerProcess) -> None:
    choice = complete(server, prompt=TEXT, max_tokens=0, echo=True)["choices"][0]
    assert (choice["text"], choice["logprobs"], choice["finish_reason"]) == (TEXT, None, "length")


@pytest.mark.parametrize("change", [{"max_tokens": 0}, {"max_tokens": 0, "logprobs": 1, "echo": False}])
def test_nothing_at_all_is_no_wish(client: openai.OpenAI, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", **change)
    assert (caught.value.param, caught.value.code) == ("max_tokens", "integer_below_min_value")


def test_more_tokens_at_least_than_at_most_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x", max_tokens=5, extra_body={"min_tokens": 6})
    assert caught.value.param == "min_tokens"
